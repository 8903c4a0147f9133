"""The progress bar of a training."""

from __future__ import annotations

import sys
from typing import Any

from anyattention.training.extras import import_demo

__all__ = ["progress_bar"]


def progress_bar(label: str, total: int, unit: str) -> Any:
    """tqdm's, on stderr; a context manager.

    Raises:
        MissingExtraError: tqdm is not installed.
    """
    # A log file is not redrawn in place, so it gets a line now and then.
    pause = 0.1 if sys.stderr.isatty() else 5.0
    tqdm = import_demo("tqdm", "the progress bar").tqdm
    return tqdm(total=total, desc=label, unit=unit, mininterval=pause, file=sys.stderr)
