"""What `torch.nn.MultiheadAttention` is told about pairs, as `attend` takes it: masks, hints, extra keys, weights.

Axes: B batch, H heads, L queries, S keys, extra keys included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.errors import DimensionMismatchError
from anyattention.nn.projected import allowed_pairs
from anyattention.output import AttentionResult
from anyattention.patterns import Causal, Full, Graph, Pattern, TopK
from anyattention.patterns.base import Align
from anyattention.patterns.composed import require_simple
from anyattention.patterns.spans import Spans, concatenate

__all__ = ["Call", "as_pairs", "as_pattern", "dense_weights"]


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of `torch.nn.MultiheadAttention.forward`, in its order and with its defaults."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False

    @property
    def is_batched(self) -> bool:
        """Whether the inputs have a batch axis."""
        return self.query.dim() == 3

    @property
    def is_self_attention(self) -> bool:
        """Whether query, key and value are one tensor."""
        return self.query is self.key and self.key is self.value


@dataclass(frozen=True)
class BesideExtraKeys(Pattern):
    """A pattern's pairs, and keys behind its own that every query may attend to (add_bias_kv, add_zero_attn)."""

    pattern: Pattern
    extra: int

    def __post_init__(self) -> None:
        require_simple(self.pattern)

    @property
    def align(self) -> Align | None:  # pyright: ignore[reportIncompatibleVariableOverride]  # the pattern's
        """The pattern's alignment."""
        return self.pattern.align

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """True for the extra keys, and where the pattern is."""
        own = num_keys - self.extra
        return (key >= own) | self.pattern.allows(query, key.clamp(max=max(own - 1, 0)), num_queries, own)

    def spans(self, num_queries: int, num_keys: int, *, device: torch.device | str = "cpu") -> Spans:
        """The pattern's spans, and one run for each query."""
        own = num_keys - self.extra
        query = torch.arange(num_queries, device=device)
        extra = Spans.of(query, own, num_keys - 1)
        return concatenate([self.pattern.spans(num_queries, own, device=device), extra])


def as_pattern(
    pattern: Pattern | TopK | None, call: Call, heads: list[Tensor], extra: int
) -> tuple[Pattern | TopK | None, bool]:
    """The pairs of a call by its pattern and hint, and whether these say what `attn_mask` says, too.

    The hint `is_causal` is that `attn_mask` is the causal mask, that of the top left where the lengths differ.

    Args:
        heads: query and key, `(B, L, H, head_dim)` and `(B, S, H, head_dim)`.
        extra: how many of the keys are extra.
    """
    if isinstance(pattern, Graph):
        _check_lengths(pattern, heads[0].shape[1], heads[1].shape[1] - extra)
        pattern = pattern.to(heads[0].device)
    elif call.is_causal and not extra:
        if heads[0].shape[1] == heads[1].shape[1]:
            return allowed_pairs(pattern, True, heads), True
        if pattern is None:
            return Causal(align="top_left"), True
    return (_beside(pattern, extra) if extra else pattern), False


def _check_lengths(graph: Graph, num_queries: int, num_keys: int) -> None:
    if (num_queries, num_keys) != (graph.num_queries, graph.num_keys):
        raise DimensionMismatchError(
            argument="pattern",
            expected=f"a Graph of {num_queries} queries and {num_keys} keys",
            actual=f"{graph.num_queries} and {graph.num_keys}",
        )


def _beside(pattern: Pattern | TopK | None, extra: int) -> Pattern | TopK | None:
    if isinstance(pattern, TopK):
        return pattern if pattern.among is None else TopK(pattern.k, BesideExtraKeys(pattern.among, extra))
    return pattern if pattern is None or isinstance(pattern, Full) else BesideExtraKeys(pattern, extra)


def as_pairs(
    call: Call, with_attn_mask: bool, pattern: Pattern | TopK | None, query: Tensor, extra: int
) -> tuple[Tensor | None, Tensor | None]:
    """`mask` and `bias` of `attend`, from masks in which True is blocked and float numbers are added.

    Args:
        query: `(B, L, H, head_dim)`.
    """
    batch, _, num_heads, _ = query.shape
    mask = bias = None
    for given in (_of_keys(call), _of_pairs(call, num_heads) if with_attn_mask else None):
        if given is None:
            continue
        given = F.pad(given, (0, extra)) if extra else given
        if given.dtype == torch.bool:
            mask = ~given if mask is None else mask & ~given
        else:
            bias = given if bias is None else bias + given
    if isinstance(pattern, Graph):
        return tuple(None if x is None else _at_edges(x, pattern, batch, num_heads) for x in (mask, bias))  # pyright: ignore[reportReturnType]  # two
    return mask, bias


def _of_keys(call: Call) -> Tensor | None:
    """The mask of keys with four axes, (B, 1, 1, S)."""
    mask = call.key_padding_mask
    if mask is None:
        return None
    return mask[:, None, None] if call.is_batched else mask[None, None, None]


def _of_pairs(call: Call, num_heads: int) -> Tensor | None:
    """The mask of pairs with four axes, (1, 1, L, S) or (B, H, L, S)."""
    mask = call.attn_mask
    if mask is None:
        return None
    return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, num_heads))


def _at_edges(pairs: Tensor, graph: Graph, batch: int, heads: int) -> Tensor:
    """A mask or bias of four axes, each whole or 1, at the edges: `(B, edges, H)`."""
    query = graph.query_index if pairs.shape[2] > 1 else torch.zeros_like(graph.query_index)
    return pairs[:, :, query, graph.key_index].transpose(1, 2).expand(batch, -1, heads)


def dense_weights(
    result: AttentionResult, pattern: Pattern | TopK | None, num_queries: int, num_keys: int, average: bool
) -> Tensor:
    """The weights as `(B, L, S)`, their mean over heads, or as `(B, H, L, S)`; 0 for pairs that do not exist."""
    weights = result.weights
    assert weights is not None
    if pattern is None or isinstance(pattern, Full | Causal):
        return weights
    if isinstance(pattern, TopK):
        assert result.indices is not None
        is_used = result.indices >= 0
        empty = weights.new_zeros((*weights.shape[:3], num_keys))
        chosen = empty.scatter_add(-1, result.indices.clamp(min=0), weights.where(is_used, 0.0)).transpose(1, 2)
        return chosen.mean(1) if average else chosen
    by_pairs = weights if average else weights.transpose(1, 2)
    empty = weights.new_zeros((*by_pairs.shape[:-1], num_queries * num_keys))
    if isinstance(pattern, Graph):
        places = pattern.query_index * num_keys + pattern.key_index
        spread = empty.index_add(-1, places, by_pairs)
    else:
        # The pairs of a pattern come by query, then key, as the cells of its matrix do.
        is_pair = pattern.to_dense(num_queries, num_keys, device=weights.device).flatten()
        spread = empty.masked_scatter(is_pair, by_pairs)
    return spread.unflatten(-1, (num_queries, num_keys))
