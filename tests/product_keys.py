"""Product-key memories for tests, and the oracle: attention to all slots."""

import torch
from torch import Tensor

from anyattention import AttentionResult


def leaves(
    tokens: int = 5,
    heads: int = 3,
    half_dim: int = 2,
    n: int = 7,
    value_dim: int = 11,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Query, half keys and values."""
    shapes = (tokens, heads, 2 * half_dim), (2, heads, n, half_dim), (n * n, value_dim)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def all_scores(query: Tensor, half_keys: Tensor) -> Tensor:
    """The score `(tokens, heads, n * n)` of each slot, each from a whole key of its own."""
    n = half_keys.shape[2]
    first = half_keys[0].unsqueeze(2).expand(-1, -1, n, -1)
    second = half_keys[1].unsqueeze(1).expand(-1, n, -1, -1)
    keys = torch.cat([first, second], dim=-1).flatten(1, 2)
    return torch.einsum("thd,hsd->ths", query, keys)


def by_all_slots(query: Tensor, half_keys: Tensor, values: Tensor, k: int) -> AttentionResult:
    """The oracle: every slot's score, a stable sort of them, and a softmax."""
    scores = all_scores(query, half_keys)
    indices = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    weights = scores.gather(-1, indices).softmax(-1)
    return AttentionResult(torch.einsum("thk,thkc->tc", weights, values[indices]), weights, indices=indices)
