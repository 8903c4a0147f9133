"""Small work runs on the caller's thread: a team would wait for whichever of its threads is scheduled out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import entry_points
import pytest

from anyattention import native

pytestmark = pytest.mark.usefixtures("native")

_TESTS = Path(__file__).parents[1]
_HUGE = "1e12"

# In a fresh process: the grain is read once, and this one's is 0.
SETUP = """
import torch
from anyattention import Graph, TopK, Window, attend, native
from anyattention.scores import Dynamic
from entry_points import started
torch.set_num_threads(4)
generator = torch.Generator().manual_seed(0)
def rows(*shape):
    return torch.randn(*shape, generator=generator, requires_grad=True)
def graph(nodes, edges):
    return Graph.from_edge_index(torch.randint(nodes, (2, edges), generator=generator), num_nodes=nodes)
def both(query, key, value, pattern=None, **given):
    output = attend(query, key, value, pattern, **given).output
    torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
"""

SMALL = {
    "dense": "both(*(rows(1, 16, 4, 16) for _ in range(3)))",
    "window": "both(*(rows(1, 16, 4, 16) for _ in range(3)), Window(3, 2))",
    "a token": "attend(rows(1, 1, 8, 16), rows(1, 200, 8, 16), rows(1, 200, 8, 16))",
    "graph": "both(*(rows(500, 4, 8) for _ in range(3)), graph(500, 1500))",
    "Dynamic": "both(*(rows(500, 4, 8) for _ in range(3)), graph(500, 1500), score=Dynamic(rows(4, 8)))",
    "keys chosen": "both(*(rows(1, 64, 2, 16) for _ in range(3)), TopK(4))",
}
LARGE = {
    "dense": "both(*(rows(1, 512, 4, 32) for _ in range(3)))",
    "graph": "both(*(rows(5000, 4, 16) for _ in range(3)), graph(5000, 50000))",
}


def output_of(*command: str, **environment: str) -> str:
    others = {name: value for name, value in os.environ.items() if name != "ANYATTENTION_GRAIN"}
    path = os.pathsep.join([str(_TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    finished = subprocess.run(
        [sys.executable, *command],
        env={**others, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def started_by(*cases: str, **environment: str) -> list[int]:
    """How many threads each of some calls starts."""
    given = ", ".join(f"started(lambda: {case})" for case in cases)
    return [int(count) for count in output_of("-c", f"{SETUP}\nprint({given})", **environment).split()]


def test_small_work_starts_no_thread():
    assert started_by(*SMALL.values()) == [0] * len(SMALL)


def test_without_a_grain_it_would():
    found = started_by(*SMALL.values(), ANYATTENTION_GRAIN="0")
    assert min(found) > 0, dict(zip(SMALL, found, strict=True))


def test_large_work_starts_threads():
    assert started_by(*LARGE.values()) == [3, 3]


def test_every_kernel_of_threads_is_called():
    assert set(entry_points.calls()) == entry_points.entry_points()


def test_no_kernel_starts_a_thread_or_gives_other_bits_below_the_grain():
    alone, together = (json.loads(output_of("-m", "entry_points", ANYATTENTION_GRAIN=grain)) for grain in (_HUGE, "0"))
    assert {name for name, (started, _) in alone.items() if started} == set()
    assert {name for name, (started, _) in together.items() if not started} == set()
    assert {name: bits for name, (_, bits) in alone.items()} == {name: bits for name, (_, bits) in together.items()}


def test_all_threads_that_have_a_piece_or_one():
    kernels = native.library()
    assert kernels is not None
    size = kernels.anyattention_team_size  # of this process, whose grain is 0
    assert [size(4, 8, 1.0), size(4, 3, 1.0), size(4, 1, 1.0), size(1, 8, 1.0), size(0, 8, 1.0)] == [4, 3, 1, 1, 1]


def test_one_thread_below_the_grain():
    code = "print(*[native.library().anyattention_team_size(4, 8, n) for n in (999.0, 1000.0)])"
    assert output_of("-c", SETUP + code, ANYATTENTION_GRAIN="1000").split() == ["1", "4"]


def test_others_that_search_for_us_are_told_of_one_thread_too():
    code = "print(native.num_threads(), *[native.num_threads(n) for n in (999.0, 1000.0)])"
    assert output_of("-c", SETUP + code, ANYATTENTION_GRAIN="1000").split() == ["4", "1", "4"]
