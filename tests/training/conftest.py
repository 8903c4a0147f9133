"""Fixtures for the training tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

_FILE = Path(__file__).parent / "data_files.py"


@pytest.fixture(scope="session")
def data_files() -> ModuleType:
    """The module data_files.py; tests are not a package, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location("data_files", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
