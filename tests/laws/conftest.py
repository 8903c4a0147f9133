"""Laws are about many small calls."""

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def _one_thread(threads: Callable[[int], None]) -> None:
    """A second thread would wait for work most of the time."""
    threads(1)
