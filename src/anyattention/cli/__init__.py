"""The command line: `anyattention train | demo | predict | info`."""

from __future__ import annotations

from collections.abc import Sequence

from anyattention.cli import demo, info, predict, train
from anyattention.cli.command import Parser, run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit code, as `command.run_command` says.
    """
    return run_command(_parser(), argv)


def _parser() -> Parser:
    parser = Parser(
        prog="anyattention",
        description="Attention over anything: train and use a graph attention network on the command line.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in (train, demo, predict, info):
        command.add_parser(commands)
    return parser
