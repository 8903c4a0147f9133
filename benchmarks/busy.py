"""Small calls on two threads, on a quiet machine and beside two busy processes; with and without the kernels' grain.

Without it (ANYATTENTION_GRAIN=0) a call starts a team however small its work is, and waits where one of the team's
threads is scheduled out. Each setting is a fresh process, since the grain is read once; they take turns. "quiet" is the
least of the rounds' medians; beside busy processes, the median and the 95th percentile are of all calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention import Graph, Window, attend, explain
from benchmarks.harness import require_tests, write_result

ROUNDS, CALLS, BUSY = 6, 60, 2
GRAINS = {"": None, "without a grain, ": "0"}
PYTORCH = "one query, 1,000 keys: PyTorch's fused attention"


def main() -> None:
    require_tests("tests/native/test_team.py")
    torch.set_num_threads(2)
    quiet: dict[str, dict[str, list[list[float]]]] = {}
    busy: dict[str, dict[str, list[list[float]]]] = {}
    for _ in range(ROUNDS):
        for name, grain in GRAINS.items():
            _collect(quiet, name, grain)
            with busy_processes():
                _collect(busy, name, grain)
    cases: dict[str, dict[str, float]] = {}
    for call in small_calls():
        for name in GRAINS:
            if call == PYTORCH and name:
                continue
            rounds, beside = quiet[call][name], sorted(chain.from_iterable(busy[call][name]))
            cases.setdefault(call, {}).update(
                {
                    f"{name}quiet: ms": min(sorted(times)[CALLS // 2] for times in rounds),
                    f"{name}busy: ms": beside[len(beside) // 2],
                    f"{name}busy, 95th percentile: ms": beside[len(beside) * 95 // 100],
                }
            )
        print(call, {name: round(number, 3) for name, number in cases[call].items()})
    write_result("busy", {"calls": cases})


def _collect(found: dict[str, dict[str, list[list[float]]]], name: str, grain: str | None) -> None:
    others = {key: value for key, value in os.environ.items() if key != "ANYATTENTION_GRAIN"}
    command = [sys.executable, "-m", "benchmarks.busy", "times"]
    environment = others if grain is None else {**others, "ANYATTENTION_GRAIN": grain}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for call, times in json.loads(done.stdout).items():
        found.setdefault(call, {}).setdefault(name, []).append(times)


@contextmanager
def busy_processes() -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def times_of_calls() -> dict[str, list[float]]:
    """Milliseconds of each call, in this process."""
    torch.set_num_threads(2)
    found = {}
    for name, call in small_calls().items():
        for _ in range(10):
            call()
        found[name] = []
        for _ in range(CALLS):
            begin = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - begin) * 1e3)
    return found


def small_calls() -> dict[str, Callable[[], object]]:
    few = [torch.randn(1, 16, 8, 64) for _ in range(3)]
    nodes = [torch.randn(500, 4, 8) for _ in range(3)]
    edges = Graph.from_edge_index(torch.randint(500, (2, 1500)), num_nodes=500)
    token = torch.randn(1, 1, 8, 64)
    near, far = ([torch.randn(1, length, 8, 64) for _ in range(2)] for length in (200, 1000))
    last = Window(255, 0, align="bottom_right")
    turned = [x.transpose(1, 2) for x in (token, *far)]
    return {
        "16 positions": forward(*few),
        "16 positions, backward too": both(*few),
        "window": forward(*few, pattern=Window(3, 2)),
        "window, backward too": both(*few, pattern=Window(3, 2)),
        "graph of 500 nodes": forward(*nodes, pattern=edges),
        "graph of 500 nodes, backward too": both(*nodes, pattern=edges),
        "one query, 200 keys": forward(token, *near),
        "one query, the last 256 of 1,000 keys": forward(token, *far, pattern=last),
        "one query, 1,000 keys": forward(token, *far),
        PYTORCH: lambda: F.scaled_dot_product_attention(*turned),
    }


def forward(query: Tensor, key: Tensor, value: Tensor, pattern: Any = None) -> Callable[[], object]:
    assert explain(query, key, value, pattern).implementation == "cpu"
    return lambda: attend(query, key, value, pattern)


def both(query: Tensor, key: Tensor, value: Tensor, pattern: Any = None) -> Callable[[], object]:
    query, key, value = (x.clone().requires_grad_() for x in (query, key, value))
    cotangent = torch.ones_like(query)
    assert explain(query, key, value, pattern).implementation == "cpu"
    return lambda: torch.autograd.grad(attend(query, key, value, pattern).output, (query, key, value), cotangent)


if __name__ == "__main__":
    if sys.argv[1:] == ["times"]:
        print(json.dumps(times_of_calls()))
    else:
        main()
