"""The command line: `anyattention train | demo | predict | info`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit code, as `command.run_command` says.
    """
    try:
        # Not above: Ctrl-C while they are read ends in a line too.
        from anyattention.cli import demo, info, predict, train
        from anyattention.cli.command import Parser, run_command
    except KeyboardInterrupt:
        print("anyattention: interrupted; nothing was written", file=sys.stderr)
        return 130
    parser = Parser(
        prog="anyattention",
        description="Attention over anything: train and use a graph attention network on the command line.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in (train, demo, predict, info):
        command.add_parser(commands)
    return run_command(parser, argv)
