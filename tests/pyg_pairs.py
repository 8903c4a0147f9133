"""A model of the drop-in layers beside the same one of PyTorch Geometric's own: weights, values, gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import nn as parent

from anyattention.interop import pyg
from anyattention.native import load

NAMES = ("GATConv", "GATv2Conv", "TransformerConv")
# In the graph of derivatives: each stands for a layer that ran on our kernels.
_KERNEL = "graph_attentionBackward"


def pair(build: Callable[[Any], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model of our layers and one of the parent's, with the same weights, float64."""
    ours, theirs = (build(home).double() for home in (pyg, parent))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def graph(num_nodes: int = 11, num_edges: int = 30, width: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(num_nodes, width, dtype=torch.float64, requires_grad=True)
    return x, torch.randint(num_nodes, (2, num_edges))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [tensor for part in parts if part is not None for tensor in tensors(part)]


def kernel_calls(outputs: list[Tensor]) -> int:
    """How many layers ran on our kernels."""
    seen, left = set(), [output.grad_fn for output in outputs]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    return sum(node.name() == _KERNEL for node in seen)


def gradients(outputs: list[Tensor], model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    cotangents = [torch.randn_like(output) for output in outputs]
    wanted = [*inputs, *model.parameters()]
    return list(torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True, allow_unused=True))


def compare(
    models: tuple[nn.Module, nn.Module], call: Callable[[nn.Module], Any], inputs: list[Tensor], layers: int
) -> list[Tensor]:
    """Outputs and gradients of both models; `layers` of ours run on our kernels, and none of the parent's."""
    results = []
    for model, count in zip(models, (layers, 0), strict=True):
        outputs = tensors(call(model))
        if load.available():
            assert kernel_calls(outputs) == count
        results.append((outputs, gradients(outputs, model, inputs)))
    close(results[0], results[1])
    assert all(gradient.abs().max() > 0 for gradient in results[0][1][: len(inputs)])
    return results[0][0]
