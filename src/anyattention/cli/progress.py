"""The progress bar of a training."""

from __future__ import annotations

import sys
from typing import Any

from anyattention.training.extras import import_demo, is_installed

__all__ = ["progress_bar"]


class _NoBar:
    """What stands in for tqdm's bar where tqdm is not installed, and shows nothing."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_postfix(self, *_: object, **__: object) -> None:
        pass

    def update(self) -> None:
        pass


def progress_bar(label: str, total: int, unit: str) -> Any:
    """tqdm's, on stderr, or one that shows nothing where tqdm is not installed; a context manager."""
    if not is_installed("tqdm"):
        return _NoBar()
    # A log file is not redrawn in place, so it gets a line now and then.
    pause = 0.1 if sys.stderr.isatty() else 5.0
    return import_demo("tqdm", "the progress bar").tqdm(
        total=total, desc=label, unit=unit, mininterval=pause, file=sys.stderr
    )
