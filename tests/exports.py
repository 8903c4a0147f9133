"""What is exported with any batch and any length: the dense modules, their inputs, and the sizes that may change."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from anyattention import Global, Window, nn

exhaustive = pytest.mark.exhaustive
# (batch, length); the first is traced.
SIZES = ((4, 12), (2, 3), (3, 30), (7, 101), (1, 1))
_BATCH, _LENGTH, _KEYS = Dim("batch"), Dim("length", max=512), Dim("keys", max=512)


class Exported(torch.nn.Module):
    """A module as a function of tensors alone."""

    def __init__(self, module: torch.nn.Module, **settings: Any) -> None:
        super().__init__()
        self.module, self.settings = module, settings
        self.eval()

    def forward(self, query: Tensor, key: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
        results = self.module(query, key, mask=mask, **self.settings)
        return [x for x in results if x is not None]


def masked(batch: int, length: int) -> Tensor:
    """A mask of pairs, of which the first query sees none, and no query the last key."""
    mask = torch.rand(batch, length, length) < 0.6
    mask[:, 0] = mask[:, :, -1] = False
    return mask


def inputs(batch: int, length: int, *, more_keys: int | None = None, has_mask: bool = False) -> dict[str, Tensor]:
    given = {"query": torch.randn(batch, length, 16)}
    if more_keys is not None:
        given["key"] = torch.randn(batch, length + more_keys, 16)
    if has_mask:
        given["mask"] = masked(batch, length)
    return given


def shapes(given: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Which sizes of the inputs may change."""
    query = {0: _BATCH, 1: _LENGTH}
    return {name: {"query": query, "key": {0: _BATCH, 1: _KEYS}, "mask": {**query, 2: _LENGTH}}[name] for name in given}


MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "MultiHeadAttention": lambda: nn.MultiHeadAttention(16, 2),
    "MultiHeadAttention window": lambda: nn.MultiHeadAttention(16, 2, pattern=Window(2, 1), causal=True),
    "SparseAttention global": lambda: nn.SparseAttention(
        16, 2, sparsity_pattern="global", num_global_tokens=2, local_window=2, causal=True
    ),
    "MultiHeadAttention rope": lambda: nn.MultiHeadAttention(
        16, 2, num_kv_heads=1, positions="rope", causal=True, softcap=3.0
    ),
    "MultiHeadAttention alibi": lambda: nn.MultiHeadAttention(16, 2, positions="alibi"),
    "MultiHeadAttention alibi window": lambda: nn.MultiHeadAttention(16, 2, positions="alibi", pattern=Window(2, 1)),
    "MultiHeadAttention causal": lambda: nn.MultiHeadAttention(16, 2, causal=True),
    "MultiHeadAttention sinusoidal": lambda: nn.MultiHeadAttention(16, 2, positions="sinusoidal"),
    "MultiHeadAttention learned": lambda: nn.MultiHeadAttention(16, 2, positions="learned", qk_norm=True),
    "ScaledDotProductAttention": lambda: nn.ScaledDotProductAttention(16, 2),
    "ScaledDotProductAttention window": lambda: nn.ScaledDotProductAttention(
        16, 2, pattern=Window(2, 1) | Global((0, 5))
    ),
    "SparseAttention local": lambda: nn.SparseAttention(16, 2, local_window=2),
    "SparseAttention strided": lambda: nn.SparseAttention(
        16, 2, sparsity_pattern="strided", block_size=4, local_window=1
    ),
    "SparseAttention fixed": lambda: nn.SparseAttention(16, 2, sparsity_pattern="fixed", block_size=4),
    "SparseAttention block": lambda: nn.SparseAttention(16, 2, sparsity_pattern="block", block_size=4),
}
QUICK = list(MODULES)[:3]


def some(names: Sequence[str]) -> Any:
    """Modules, of which the first few are tested always."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in QUICK else [exhaustive]) for name in names]
    )
