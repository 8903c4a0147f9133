"""The fixed cost of one small call: `attend` over 8 x 8 pairs and over a graph of 3 nodes, on one thread.

The limit is an `autograd.Function` of the same tensors that allocates its results, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.utils import scatter, softmax

from anyattention import Graph, attend, explain
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


if __name__ == "__main__":
    main()
