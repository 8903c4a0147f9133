"""Fixtures that every test may ask for; what `make test` takes of the tests; what may not happen in CI.

With CI=true a skipped test is a failure, and so is a package without compiled kernels, where only the reference runs.
"""

import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention.native import load
from cases import pairwise_sample

_ROOT = Path(__file__).resolve().parents[1]

# Kernels read it at their first call: small work too runs on as many threads as a test asks for.
os.environ.setdefault("ANYATTENTION_GRAIN", "0")


def in_ci() -> bool:
    return os.environ.get("CI") == "true"


def pytest_report_header() -> str:
    about = load.info()
    return f"anyattention kernels: {about.level or about.reason}"


def pytest_sessionstart() -> None:
    reason = load.info().reason
    if reason is not None and in_ci():
        raise pytest.UsageError(f"CI=true, and only the reference can run: no compiled kernels, {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return failed_if_skipped_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return failed_if_skipped_in_ci((yield))


def failed_if_skipped_in_ci(report: Any) -> Any:
    if in_ci() and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"CI=true, and this was skipped: {report.longrepr[2]}"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the settings of a test that is marked pairwise, marks as exhaustive what the sample can do without."""
    settings_of = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("pairwise"):
            settings_of[item.parent, item.originalname].append(item)
    for settings in settings_of.values():
        # A value is one object in all of its settings.
        kept = pairwise_sample(
            [[(name, id(value)) for name, value in item.callspec.params.items()] for item in settings]
        )
        for position, item in enumerate(settings):
            if position not in kept:
                item.add_marker("exhaustive")


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


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, which is as before after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the data sets, from ANYATTENTION_DATA."""
    folder = Path(os.environ.get("ANYATTENTION_DATA") or _ROOT / "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set ANYATTENTION_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def require() -> Callable[[str], ModuleType]:
    """Imports a module that only tests need: `scipy_sparse = require("scipy.sparse")`."""

    def import_or_skip(module: str) -> ModuleType:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"cannot import {module}: {error}")

    return import_or_skip


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """The module `anyattention.native.load`, for a test that needs the compiled kernels."""
    reason = load.info().reason
    if reason is not None:
        pytest.skip(f"no compiled kernels: {reason}")
    return load


@pytest.fixture
def two_threads():
    """Compiled code is another with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
