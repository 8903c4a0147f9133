"""The fixed cost of one small call: `attend` over 8 x 8 pairs and over a graph of 3 nodes, on one thread.

The limit is an `autograd.Function` of the same tensors that allocates its results, and computes nothing.

`python -m benchmarks.small busy` prints what small calls take on two threads beside two busy processes, and
`ANYATTENTION_GRAIN=0 python -m benchmarks.small busy` what they took when small work too started teams.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.utils import scatter, softmax

from anyattention import Graph, Window, attend, explain
from benchmarks.harness import Timing, measure, print_table, require_tests, write_result


class Nothing(torch.autograd.Function):
    """Output and logsumexp of attention, uninitialised; so are the gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        results = query.new_empty((*query.shape[:-1], value.shape[-1])), query.new_empty(query.shape[:-1])
        ctx.save_for_backward(query, key, value, *results)
        return results

    @staticmethod
    def backward(ctx: Any, *by: Tensor) -> tuple[Tensor, ...]:
        return tuple([torch.empty_like(x) for x in ctx.saved_tensors[:3]])


Call = Callable[[], Tensor]


def main() -> None:
    require_tests("tests/ops/test_operator.py")
    torch.set_num_threads(1)
    cases: dict[str, dict[str, Timing]] = {}
    for name, make in (("dense, 8 x 8 pairs", dense), ("graph of 3 nodes", graph)):
        for backward in (False, True):
            inputs, contestants = make()
            title = f"{name}, forward{'+backward' if backward else ''}"
            cases[title] = timed(inputs, contestants, backward)
            print_table(title, cases[title])
    write_result("small", cases)


def timed(inputs: Sequence[Tensor], contestants: dict[str, Call], backward: bool) -> dict[str, Timing]:
    def differentiated(forward: Call) -> Callable[[], object]:
        cotangent = torch.ones_like(forward())
        return lambda: torch.autograd.grad(forward(), inputs, cotangent)

    if backward:
        return measure("anyattention", {name: differentiated(call) for name, call in contestants.items()})
    with torch.no_grad():
        return measure("anyattention", contestants)


def dense() -> tuple[Sequence[Tensor], dict[str, Call]]:
    query, key, value = (torch.randn(1, 8, 2, 8, requires_grad=True) for _ in range(3))
    assert explain(query, key, value).implementation == "cpu"
    return (query, key, value), {
        "anyattention": lambda: attend(query, key, value).output,
        "torch SDPA, bare": lambda: F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2),
        "limit": lambda: Nothing.apply(query, key, value)[0],  # pyright: ignore[reportOptionalSubscript]
    }


def graph() -> tuple[Sequence[Tensor], dict[str, Call]]:
    query, key, value = (torch.randn(3, 2, 4, requires_grad=True) for _ in range(3))
    edge_index = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]])
    source, target = edge_index
    pattern = Graph.from_edge_index(edge_index, num_nodes=3)
    assert explain(query, key, value, pattern).implementation == "cpu"

    def messages() -> Tensor:
        weights = softmax((query[target] * key[source]).sum(-1) / 2, target, num_nodes=3)
        return scatter(weights[..., None] * value[source], target, dim_size=3)

    return (query, key, value), {
        "anyattention": lambda: attend(query, key, value, pattern).output,
        "PyTorch Geometric": messages,
        "limit": lambda: Nothing.apply(query, key, value)[0],  # pyright: ignore[reportOptionalSubscript]
    }


def beside_busy_processes(processes: int = 2, calls: int = 300) -> None:
    """Prints the median and the 95th percentile: the machine is busy, so that no best time says much."""
    torch.set_num_threads(2)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        for name, call in small_calls().items():
            for _ in range(10):
                call()
            times = []
            for _ in range(calls):
                begin = time.perf_counter()
                call()
                times.append((time.perf_counter() - begin) * 1e3)
            times.sort()
            print(f"{name:30} median {times[calls // 2]:7.3f} ms, 95th percentile {times[calls * 95 // 100]:7.3f} ms")
    finally:
        for process in busy:
            process.kill()
            process.wait()


def small_calls() -> dict[str, Callable[[], object]]:
    def forward(query: Tensor, key: Tensor, value: Tensor, pattern: Any = None) -> Callable[[], object]:
        return lambda: attend(query, key, value, pattern)

    def both(query: Tensor, key: Tensor, value: Tensor, pattern: Any = None) -> Callable[[], object]:
        query, key, value = (x.clone().requires_grad_() for x in (query, key, value))
        cotangent = torch.ones_like(query)
        return lambda: torch.autograd.grad(attend(query, key, value, pattern).output, (query, key, value), cotangent)

    few = [torch.randn(1, 16, 2, 16) for _ in range(3)]
    nodes = [torch.randn(100, 2, 8) for _ in range(3)]
    edges = Graph.from_edge_index(torch.randint(100, (2, 400)), num_nodes=100)
    keys = [torch.randn(1, 1000, 4, 32) for _ in range(2)]
    return {
        "16 positions": forward(*few),
        "16 positions, backward too": both(*few),
        "window": forward(*few, pattern=Window(3, 2)),
        "window, backward too": both(*few, pattern=Window(3, 2)),
        "one query, 1,000 keys": forward(torch.randn(1, 1, 4, 32), *keys),
        "graph of 100 nodes": forward(*nodes, pattern=edges),
        "graph, backward too": both(*nodes, pattern=edges),
    }


if __name__ == "__main__":
    beside_busy_processes() if sys.argv[1:] == ["busy"] else main()
