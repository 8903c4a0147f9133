"""Fixtures for the tests of the commands."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

_FILE = Path(__file__).parents[1] / "training/data_files.py"


@pytest.fixture(scope="session")
def data_files() -> ModuleType:
    """The module data_files.py; tests are not a package, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location("data_files", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The commands choose their number of threads for the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
