"""Runs a command: mistakes in one line, and the exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from anyattention.errors import AttentionError, InvalidInputError

__all__ = ["Parser", "run_command"]

_MISTAKE, _INTERRUPTED, _NO_READER = 2, 130, 141


class Parser(argparse.ArgumentParser):
    """Reports a mistake as this package's other errors are reported: in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise InvalidInputError."""
        raise InvalidInputError(f"{message} (see {self.prog} --help)")


def run_command(parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and call `run`, a default that the parser sets, with them.

    Args:
        parser: of the command.
        argv: the arguments; None takes the process's.

    Returns:
        The exit code: that of `run`; 2 after a mistake of the user, told in one line on stderr; 130 when Ctrl-C came
        before there was anything to keep; 141 when nobody reads the output any more.
    """
    try:
        arguments = parser.parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as finished:
        # argparse ends `--help` this way.
        return finished.code if isinstance(finished.code, int) else 0
    except AttentionError as mistake:
        print(f"{parser.prog}: error:", " ".join(str(mistake).split()), file=sys.stderr)
        return _MISTAKE
    except BrokenPipeError:
        # The reader, such as `head`, has had enough; Python's own last flush would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing was written", file=sys.stderr)
        return _INTERRUPTED
