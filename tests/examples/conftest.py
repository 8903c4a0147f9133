"""Fixtures for the tests of the examples."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The commands choose their number of threads for the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
