"""Positions of a sequence: sines and cosines to add, angles to turn by, biases by distance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import describe_shape, require_tensor, to_four_axes
from anyattention.bias import RelativeBias
from anyattention.errors import DimensionMismatchError, UnsupportedError
from anyattention.ops.arguments import read_bias, require_relative
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
    align: Align | None,
) -> Tensor | RelativeBias:
    """The bias by distance of "alibi", and a caller's own added to it.

    Of a Graph it is a bias of the edges. Together with a bias of pairs it takes memory for all pairs.

    Raises:
        DimensionMismatchError: the lengths differ and `align` is None, or the caller's bias does not fit.
        InvalidInputError: the caller's bias is not floating.
        UnsupportedError: it is one by distance, over a Graph.
    """
    query, key = heads[0], heads[1]
    if bias is not None and not isinstance(bias, RelativeBias):
        require_tensor("bias", bias)
    num_queries, num_keys = query.shape[1], key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    # A symbol where a trace is of any length.
    length: Any = torch.sym_max(torch.sym_max(num_queries, num_keys), 1)
    linear = RelativeBias.alibi(num_heads, length, align=align, device=query.device, dtype=dtype)
    if isinstance(pattern, Graph):
        on_edges = linear.at(pattern.query_index, pattern.key_index, num_queries, num_keys).T
        return on_edges if bias is None else on_edges + _of_edges(bias, pattern, query)
    if bias is None:
        return linear
    if isinstance(bias, RelativeBias):
        require_relative(bias, query, num_heads)
        own = bias.to_dense(num_queries, num_keys)
    else:
        own = to_four_axes("bias", read_bias(bias, query), query.shape[0], num_heads, num_queries, num_keys)
    return linear.to_dense(num_queries, num_keys)[None] + own


def _of_edges(bias: Tensor | RelativeBias, graph: Graph, query: Tensor) -> Tensor:
    """A caller's bias of a Graph's edges with an axis of heads, last."""
    if isinstance(bias, RelativeBias):
        raise UnsupportedError(
            "a bias by distance over a Graph: bias.at(query_index, key_index, ...) has that of its edges",
            argument="bias",
        )
    bias, num_edges, heads = read_bias(bias, query), graph.num_edges, query.shape[2]
    shapes = ((num_edges,), (num_edges, heads), (query.shape[0], num_edges, heads))
    if tuple(bias.shape) not in shapes:
        raise DimensionMismatchError(
            argument="bias",
            expected=f"(edges={num_edges},), (edges, heads={heads}) or (batch={query.shape[0]}, edges, heads)",
            actual=describe_shape(bias),
        )
    return bias[:, None] if bias.ndim == 1 else bias
