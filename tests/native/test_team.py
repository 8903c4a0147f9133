"""Small work runs on the caller's thread: a team would wait for whichever of its threads is scheduled out."""

import os
import subprocess
import sys

import pytest

from anyattention import native

# In a fresh process: the grain is read once, and this one's is 0.
SETUP = """
import torch
from anyattention import Graph, TopK, Window, attend, native
from anyattention.geometry import radius_neighbours
from anyattention.scores import Dynamic
torch.set_num_threads(4)
generator = torch.Generator().manual_seed(0)
def rows(*shape):
    return torch.randn(*shape, generator=generator, requires_grad=True)
def graph(nodes, edges):
    return Graph.from_edge_index(torch.randint(nodes, (2, edges), generator=generator), num_nodes=nodes)
def both(query, key, value, pattern=None, **given):
    output = attend(query, key, value, pattern, **given).output
    torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
def teams():
    return native.library().anyattention_num_teams()
"""

SMALL = {
    "dense": "both(*(rows(1, 16, 2, 16) for _ in range(3)))",
    "window": "both(*(rows(1, 16, 2, 16) for _ in range(3)), Window(3, 2))",
    "a token": "attend(rows(1, 1, 8, 16), rows(1, 500, 8, 16), rows(1, 500, 8, 16))",
    "graph": "both(*(rows(100, 4, 8) for _ in range(3)), graph(100, 500))",
    "additive": "both(*(rows(100, 4, 8) for _ in range(3)), graph(100, 500), score=Dynamic(rows(4, 8)))",
    "keys chosen": "both(*(rows(1, 64, 2, 16) for _ in range(3)), TopK(4))",
    "neighbours": "radius_neighbours(rows(50, 3).detach(), 1.0)",
}
LARGE = {
    "dense": "both(*(rows(1, 512, 4, 32) for _ in range(3)))",
    "graph": "both(*(rows(5000, 4, 16) for _ in range(3)), graph(5000, 50000))",
}


def output_of(code: str, **environment: str) -> str:
    others = {name: value for name, value in os.environ.items() if name != "ANYATTENTION_GRAIN"}
    command = [sys.executable, "-c", f"{SETUP}\n{code}"]
    finished = subprocess.run(
        command, env={**others, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def teams_of(calls: str, **environment: str) -> int:
    return int(output_of(f"{calls}\nprint(teams())", **environment))


def test_small_work_starts_no_team():
    assert teams_of("\n".join(SMALL.values())) == 0


@pytest.mark.parametrize("name", SMALL)
def test_without_a_grain_it_would(name):
    assert teams_of(SMALL[name], ANYATTENTION_GRAIN="0") > 0


@pytest.mark.parametrize("name", LARGE)
def test_large_work_starts_teams(name):
    assert teams_of(LARGE[name]) >= 2


def test_all_threads_that_have_a_piece_or_one():
    kernels = native.library()
    assert kernels is not None
    size = kernels.anyattention_team_size  # of this process, whose grain is 0
    assert [size(4, 8, 1.0), size(4, 3, 1.0), size(4, 1, 1.0), size(1, 8, 1.0), size(0, 8, 1.0)] == [4, 3, 1, 1, 1]


def test_one_thread_below_the_grain():
    code = "print(*[native.library().anyattention_team_size(4, 8, n) for n in (999.0, 1000.0)])"
    assert output_of(code, ANYATTENTION_GRAIN="1000").split() == ["1", "4"]
