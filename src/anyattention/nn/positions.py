"""Positions of a sequence: sines and cosines to add, angles to turn by, biases by distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.patterns import Graph, Pattern, TopK
from anyattention.patterns.base import Align

__all__ = ["alibi_bias", "rotary_angles", "rotated", "sinusoidal_positions"]


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Sines and cosines `(length, width)`, float64: `sin(p / 10000^(2 i / width))` at 2 i, the cosine at 2 i + 1.

    Source: Vaswani et al., 2017, section 3.5.
    """
    # On the CPU, whatever device new tensors go to.
    position = torch.arange(length, dtype=torch.float64, device="cpu")[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") * (-math.log(1e4) / width))
    table = torch.empty(length, width, dtype=torch.float64, device="cpu")
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: width // 2])
    return table


def rotary_angles(first: int, length: int, like: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `p theta^(-2 i / width)`, for positions p from `first`.

    Args:
        first: the first position.
        length: how many.
        like: `(batch, length, heads, width)`, the heads that are to be turned.
        theta: the base of the angles.

    Returns:
        Two tensors `(length, 1, width / 2)` of its device and dtype. The angles are float64: in float32 that of
        position 100,000 is off by 0.004.
    """
    width = like.shape[-1]
    pair = torch.arange(0, width, 2, dtype=torch.float64, device=like.device)
    position = torch.arange(first, first + length, dtype=torch.float64, device=like.device)
    angles = position[:, None, None] * torch.exp(pair * (-math.log(theta) / width))
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Each pair of channels (i, i + width / 2) turned by its angle, as Llama has them.

    Source: Su et al., 2021, RoFormer, equation 34, which pairs the channels (2 i, 2 i + 1).
    """
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


def alibi_bias(
    num_heads: int,
    pattern: Pattern | TopK | None,
    bias: Tensor | RelativeBias | None,
    heads: list[Tensor],
    align: Align,
) -> Tensor | RelativeBias:
    """The bias by distance of "alibi", and a caller's own added to it.

    Of a Graph it is a bias of the edges. Together with a bias of pairs it takes memory for all pairs.
    """
    query, key = heads[0], heads[1]
    num_queries, num_keys = query.shape[1], key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    length = max(num_queries, num_keys, 1)
    linear = RelativeBias.alibi(num_heads, length, align=align, device=query.device, dtype=dtype)
    if isinstance(pattern, Graph):
        on_edges = linear.at(pattern.query_index, pattern.key_index, num_queries, num_keys).T
        return on_edges if bias is None else on_edges + _on_edges(bias, pattern, num_queries, num_keys)
    if bias is None:
        return linear
    own = bias.to_dense(num_queries, num_keys) if isinstance(bias, RelativeBias) else bias
    return linear.to_dense(num_queries, num_keys)[None] + own


def _on_edges(bias: Tensor | RelativeBias, graph: Graph, num_queries: int, num_keys: int) -> Tensor:
    """A bias of a Graph with an axis of heads, last."""
    if isinstance(bias, RelativeBias):
        return bias.at(graph.query_index, graph.key_index, num_queries, num_keys).T
    return bias[:, None] if bias.ndim == 1 else bias
