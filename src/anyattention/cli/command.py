"""Runs a command: mistakes in one line, and the exit code."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from anyattention.errors import AttentionError, InvalidInputError
from anyattention.signals import uninterrupted

__all__ = ["Parser", "run_command"]

_NUMBERS = re.compile(r"-\d+(,-?\d+)+")
_MISTAKE, _INTERRUPTED, _NO_READER, _TERMINATED = 2, 130, 141, 143


class Parser(argparse.ArgumentParser):
    """Reports a mistake as this package's other errors are reported: in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise InvalidInputError."""
        raise InvalidInputError(f"{message} (see {self.prog} --help)")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what there is to keep is kept."""


def run_command(parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and call `run`, a default that the parser sets, with them.

    Another default, `imports`, names modules that `run` imports.

    Args:
        parser: of the command.
        argv: the arguments; None takes the process's.

    Returns:
        The exit code: that of `run`; 2 after a mistake of the user or where the output cannot be written, told in one
        line on stderr; 130 when Ctrl-C, and 143 when SIGTERM came before there was anything to keep; 141 when nobody
        reads the output any more.
    """
    _open_what_is_closed()
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if is_main else None
    try:
        try:
            arguments = parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))
            with uninterrupted():
                # Libraries in C make other errors of a Ctrl-C while they are imported.
                for module in vars(arguments).get("imports", ()):
                    import_module(module)
            code = arguments.run(arguments)
        except SystemExit as finished:
            # argparse ends `--help` this way.
            code = finished.code if isinstance(finished.code, int) else 0
        sys.stdout.flush()
        return code
    except AttentionError as mistake:
        return _told(f"{parser.prog}: error: {' '.join(str(mistake).split())}", _MISTAKE)
    except BrokenPipeError:
        # The reader, such as `head`, has had enough.
        _drop_output()
        return _NO_READER
    except OSError as fault:
        _drop_output()
        return _told(f"{parser.prog}: error: the output cannot be written: {fault.strerror or fault}", _MISTAKE)
    except KeyboardInterrupt as interrupt:
        code = _TERMINATED if isinstance(interrupt, _Terminated) else _INTERRUPTED
        return _told(f"{parser.prog}: interrupted; {str(interrupt) or 'nothing was written'}", code)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _joined(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--fanout=-1,5` for `--fanout -1,5`, whose second argparse takes for an option."""
    joined: list[str] = []
    for text in arguments:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and _NUMBERS.fullmatch(text):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _open_what_is_closed() -> None:
    """Closed streams lead nowhere: else a file that is opened takes their number, and what others print."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # until the process ends


def _told(line: str, code: int) -> int:
    # stderr may be closed or full too.
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    return code


def _drop_output() -> None:
    """What is left in stdout's buffer goes nowhere: Python's own last flush would complain once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
