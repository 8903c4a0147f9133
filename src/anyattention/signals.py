"""Signals that end a process: Ctrl-C (SIGINT) and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted(outcome: str = "") -> Iterator[None]:
    """While Ctrl-C and SIGTERM wait, which only the main thread can make them do.

    Args:
        outcome: the message of the KeyboardInterrupt that a waiting one then raises.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    # None is the handler of a program that Python is embedded in, which cannot be put back.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt as interrupt:
                raise type(interrupt)(outcome) from None
