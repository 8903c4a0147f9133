"""The command line: `anyattention train | demo | predict | info`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from anyattention.cli import demo, info, predict, train
from anyattention.errors import AttentionError, InvalidInputError

__all__ = ["main"]

_MISTAKE, _INTERRUPTED, _NO_READER = 2, 130, 141


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as this package's other errors are reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit code: 0; 2 after a mistake of the user, told in one line on stderr; 130 when Ctrl-C came before there
        was anything to keep; 141 when nobody reads the output any more.
    """
    try:
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as finished:
        # argparse ends `--help` this way.
        return finished.code if isinstance(finished.code, int) else 0
    except AttentionError as mistake:
        print("anyattention: error:", " ".join(str(mistake).split()), file=sys.stderr)
        return _MISTAKE
    except BrokenPipeError:
        # The reader, such as `head`, has had enough; Python's own last flush would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    except KeyboardInterrupt:
        print("anyattention: interrupted; nothing was written", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="anyattention",
        description="Attention over anything: train and use a graph attention network on the command line.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in (train, demo, predict, info):
        command.add_parser(commands)
    return parser
