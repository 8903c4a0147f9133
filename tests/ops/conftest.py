"""Every test of graph attention runs twice: on the compiled kernels, and on the reference."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyattention.native.structures import layout_of
from anyattention.ops.graph import api
from anyattention.ops.operator import Operator
from anyattention.ops.records import flattened

_BOTH = ("test_graph_attention", "test_graph_compile", "test_graph_gradients", "test_graph_laws", "test_graph_nan")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__.rsplit(".", 1)[-1]
    if name in _BOTH:
        marks = [pytest.mark.exhaustive] if name == "test_graph_compile" else []
        both = ["cpu", pytest.param("reference", marks=marks)]
        metafunc.parametrize("graph_implementation", both, indirect=True)


@pytest.fixture(autouse=True)
def graph_implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The implementation that runs; "cpu" leaves to the reference what it refuses, as it does for users."""
    wanted = getattr(request, "param", None)
    if wanted == "cpu":
        request.getfixturevalue("native")
    if wanted == "reference":
        monkeypatch.setattr(api, "_TABLE", tuple(row for row in api._TABLE if row.name == "reference"))
    return wanted


@pytest.fixture(scope="session")
def opcheck() -> Callable[[Operator[Any], Any], None]:
    """PyTorch's checks of a registered operator, of an operator and a record."""

    def check(operator: Operator[Any], record: Any) -> None:
        registered = getattr(torch.ops.anyattention, operator.name).default
        torch.library.opcheck(registered, tuple(flattened(layout_of(type(record)), record)))

    return check


def _peak_of(name: str) -> Callable[..., float]:
    """Runs a script that prints a peak, with its arguments, in a process of its own."""
    if sys.platform != "linux":
        pytest.skip("peak memory is read from /proc")

    def run(*arguments: str) -> float:
        script = Path(__file__).with_name(name)
        # The script imports benchmarks, which are not installed.
        path = [str(script.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        finished = subprocess.run(
            [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr
        return float(finished.stdout)

    return run


@pytest.fixture
def peak_of_a_step() -> Callable[..., float]:
    """Runs the script of that name."""
    return _peak_of("peak_of_a_step.py")


@pytest.fixture
def peak_of_many_heads() -> Callable[..., float]:
    """Runs the script of that name."""
    return _peak_of("peak_of_many_heads.py")


@pytest.fixture
def peak_of_a_penalty() -> Callable[..., float]:
    """Runs the script of that name."""
    return _peak_of("peak_of_a_penalty.py")
