"""Attention to memories with product keys: what `MemoryAttention` does with index="product"."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention.config import MemoryAttentionConfig
from anyattention.errors import UnsupportedError
from anyattention.memory import ProductKeys
from anyattention.ops.product_keys import product_key_attention

if TYPE_CHECKING:
    from anyattention.nn.memory import MemoryAttention

__all__ = ["add_product_keys", "attend_to_slots", "index_of_head", "refuse_rows", "reset_product_keys"]


def add_product_keys(module: nn.Module, config: MemoryAttentionConfig, kind: dict[str, Any]) -> None:
    """Give a module its half keys `(2, num_heads, n, key_dim / 2)` and values `(n * n, value_dim)`, uninitialised."""
    assert config.num_memories is not None
    n, device, dtype = math.isqrt(config.num_memories), kind["device"], kind["dtype"]
    module.half_keys = nn.Parameter(
        torch.empty(2, config.base.num_heads, n, config.get_key_dim() // 2, device=device, dtype=dtype)
    )
    module.values = nn.Parameter(torch.empty(config.num_memories, config.get_value_dim(), device=device, dtype=dtype))


def reset_product_keys(half_keys: Tensor, values: Tensor) -> None:
    """Half keys and values drawn anew, so that keys and values are about of length 1."""
    nn.init.normal_(half_keys, std=(2 * half_keys.shape[3]) ** -0.5)
    nn.init.normal_(values, std=values.shape[1] ** -0.5)


def attend_to_slots(module: MemoryAttention, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(queries, value_dim)`, weights and slots `(queries, heads, k)` of queries `(queries, heads, key_dim)`."""
    config = module.config
    result = product_key_attention(
        query,
        module.half_keys,
        module.values,
        k=config.k,
        scale=config.get_scale(),
        dropout=config.base.dropout if module.training else 0.0,
        sparse_grad=config.sparse_grad and torch.is_grad_enabled(),
    )
    assert result.weights is not None
    assert result.indices is not None
    return result.output, result.weights, result.indices


def index_of_head(half_keys: Tensor) -> ProductKeys:
    """The keys of the only head as an index."""
    if half_keys.shape[1] != 1:
        raise UnsupportedError(
            'index="product": each head has keys of its own, which ProductKeys(module.half_keys[:, head]) searches'
        )
    return ProductKeys(half_keys[:, 0])


def refuse_rows(**given: object) -> None:
    """Raise where a call brings what needs memories that are rows of a table."""
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(
                f'{name}: with index="product" the memories are all pairs of half keys', argument=name
            )
