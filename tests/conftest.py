"""Fixtures that every test may ask for.

With CI=true nothing is skipped: what is missing there is a failure.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from anyattention import _native

_ROOT = Path(__file__).resolve().parents[1]


def skip_or_fail(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def pytest_report_header() -> str:
    about = _native.info()
    return f"anyattention kernels: {about.level or about.reason}"


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _uninitialized_memory_is_nan() -> Iterator[None]:
    """Fills new memory with NaN, or the largest integer, so that a forgotten element shows.

    torch has this built in, but only together with use_deterministic_algorithms, which would
    have the tests run other algorithms than users do.
    """

    def filled(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def create_filled(*args: Any, **kwargs: Any) -> Tensor:
            created = create(*args, **kwargs)
            if not torch.compiler.is_compiling():
                _fill(created)
            return created

        return create_filled

    new_empty = Tensor.new_empty

    def new_filled(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # torch.compile does not trace a method that was taken off its class.
        if torch.compiler.is_compiling():
            return self.new_zeros(*args, **kwargs)
        created = new_empty(self, *args, **kwargs)
        _fill(created)
        return created

    # `with torch.device(...)` looks up the functions it serves at its first use, and must find them as they are.
    with torch.device("meta"):
        torch.ones(0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, filled(getattr(torch, name)))
        patch.setattr(Tensor, "new_empty", new_filled)
        yield


def _fill(created: Tensor) -> None:
    # A fake or traced tensor has no memory to fill.
    if type(created) is not Tensor or created.device.type == "meta":
        return
    if created.layout is not torch.strided:
        return
    if created.dtype.is_floating_point or created.dtype.is_complex:
        created.detach().fill_(float("nan"))
    elif created.dtype is torch.bool:
        created.fill_(True)
    else:
        created.fill_(torch.iinfo(created.dtype).max)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the data sets, from ANYATTENTION_DATA."""
    folder = Path(os.environ.get("ANYATTENTION_DATA") or _ROOT / "../shared/data")
    if not folder.is_dir():
        skip_or_fail(f"no data sets in {folder}; set ANYATTENTION_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def require() -> Callable[[str], ModuleType]:
    """Imports a module that only tests need: `scipy_sparse = require("scipy.sparse")`."""

    def import_or_skip(module: str) -> ModuleType:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            skip_or_fail(f"cannot import {module}: {error}")

    return import_or_skip


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """The module `anyattention._native`, for a test that needs the compiled kernels."""
    reason = _native.info().reason
    if reason is not None:
        skip_or_fail(f"no compiled kernels: {reason}")
    return _native
