"""Attention to chosen slots in the primitives of edges: differentiable to any order, and no row of values per entry.

Axes: T tokens, H heads, D half_dim, n half keys of a half, S = n x n slots, C value_dim, k slots chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.edges.composed import recorded_gradients
from anyattention.ops.edges.operators import edge_dot, edge_sum
from anyattention.patterns import Graph

if TYPE_CHECKING:
    from anyattention.ops.product_keys.operators import SlotAttention

__all__ = ["gradients_again"]


def gradients_again(
    call: SlotAttention, by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    """The gradients, by name, of output and weights times `by`, which autograd differentiates again."""
    inputs = {"query": call.query, "half_keys": call.half_keys, "values": call.values}
    names = [name for name in inputs if name in needs]
    asked = [n for n, each in enumerate(by) if each is not None]

    def results(*given: Tensor) -> tuple[Tensor, ...]:
        found = _results(**{**inputs, **dict(zip(names, given, strict=True))}, indices=call.indices, keep=call.keep)
        return tuple([found[n] for n in asked])

    cotangents = [each for each in by if each is not None]
    return dict(zip(names, recorded_gradients(results, [inputs[name] for name in names], cotangents), strict=True))


def _results(
    query: Tensor, half_keys: Tensor, values: Tensor, indices: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output `(T, C)` and weights `(T, H, k)`."""
    tokens, heads, _ = indices.shape
    num_half_keys = half_keys.shape[2]
    first = torch.arange(heads, device=indices.device)[:, None] * num_half_keys
    scores = query.new_zeros(indices.shape)
    places = (indices // num_half_keys, indices % num_half_keys)
    for half, own in enumerate(places):
        # Each token and head is a node, and so is each head's half key.
        graph = Graph.from_rows((first + own).flatten(0, 1), heads * num_half_keys)
        products = edge_dot(
            query[:, :, half].reshape(tokens * heads, 1, -1),
            half_keys[half].reshape(heads * num_half_keys, 1, -1),
            arrays_of(graph),
        )
        scores = scores + products.view(indices.shape)
    weights = scores.softmax(-1)
    kept = weights if keep is None else weights * keep
    to_slots = Graph.from_rows(indices.flatten(1), len(values))
    output = edge_sum(kept.reshape(-1, 1), values.to(kept.dtype).unsqueeze(1), arrays_of(to_slots))
    return output.squeeze(1), weights
