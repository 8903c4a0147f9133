"""Shared cases: the calls that every implementation of an operation is tested with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from anyattention.patterns import Causal, Full, Pattern
from anyattention.scores import Additive, Dot, Dynamic, Score

__all__ = ["DENSE_CASES", "DenseCase"]


@dataclass(frozen=True)
class DenseCase:
    """One call of dense `attend`, drawn anew from a seed.

    Args:
        name: what the case is about.
        batch, query_length, key_length, heads, head_dim, value_dim: sizes; head_dim is 1 with the additive score.
        pattern: as in `attend`.
        score: which score.
        mask: the shape of a random mask, or None.
        bias: the shape of a random bias, or None.
        bias_hides: some of the bias is -inf.
        has_empty_row: the mask, or a bias that hides, leaves query 1 nothing.
        scale, softcap: as in `attend`.

    Example:
        >>> case = DenseCase("causal", pattern=Causal("bottom_right"))
        >>> sorted(case.arguments())
        ['key', 'pattern', 'query', 'value']
    """

    name: str
    batch: int = 2
    query_length: int = 5
    key_length: int = 7
    heads: int = 3
    head_dim: int = 4
    value_dim: int = 4
    pattern: Pattern | None = None
    score: Literal["dot", "additive", "dynamic"] = "dot"
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    bias_hides: bool = False
    has_empty_row: bool = False
    scale: float | None = None
    softcap: float | None = None

    def arguments(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
        """The call's arguments by name, without those that keep their default; tensors have no gradient."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

        head_dim = 1 if self.score == "additive" else self.head_dim
        arguments: dict[str, Any] = {
            "query": normal(self.batch, self.query_length, self.heads, head_dim),
            "key": normal(self.batch, self.key_length, self.heads, head_dim),
            "value": normal(self.batch, self.key_length, self.heads, self.value_dim),
        }
        if self.score != "dot":
            arguments["score"] = self._score(normal(self.heads, head_dim))
        if self.mask is not None:
            mask = torch.rand(self.mask, generator=generator, dtype=torch.float32, device="cpu") < 0.6
            if self.has_empty_row:
                mask[..., 1, :] = False
            arguments["mask"] = mask
        if self.bias is not None:
            bias = normal(*self.bias)
            if self.bias_hides:
                bias[torch.rand(self.bias, generator=generator, dtype=torch.float32, device="cpu") < 0.4] = -torch.inf
                if self.has_empty_row:
                    bias[..., 1, :] = -torch.inf
            arguments["bias"] = bias
        for name in ("pattern", "scale", "softcap"):
            if getattr(self, name) is not None:
                arguments[name] = getattr(self, name)
        return arguments

    def _score(self, vector: Tensor) -> Score:
        return {"dot": Dot(), "additive": Additive(0.3), "dynamic": Dynamic(vector, 0.1)}[self.score]


DENSE_CASES: tuple[DenseCase, ...] = (
    DenseCase("no pattern"),
    DenseCase("full", pattern=Full()),
    DenseCase("one of everything", 1, 1, 1, 1, 1, 1),
    DenseCase("one key", key_length=1),
    DenseCase("long", 1, 67, 131, 2, 8, 8),
    DenseCase("value_dim greater than head_dim", value_dim=11),
    DenseCase("value_dim less than head_dim", head_dim=5, value_dim=2),
    DenseCase("causal", query_length=7, pattern=Causal()),
    DenseCase("causal top_left, fewer queries", pattern=Causal("top_left")),
    DenseCase("causal top_left, more queries", query_length=11, pattern=Causal("top_left")),
    DenseCase("causal bottom_right, fewer queries", pattern=Causal("bottom_right")),
    DenseCase("causal bottom_right, more queries", query_length=11, pattern=Causal("bottom_right")),
    DenseCase("mask of keys", mask=(7,)),
    DenseCase("mask of one number", mask=(1,)),
    DenseCase("mask of pairs", mask=(5, 7)),
    DenseCase("mask of queries", mask=(5, 1)),
    DenseCase("mask of keys, rank 2", mask=(1, 7)),
    DenseCase("mask of keys by batch", mask=(2, 1, 1, 7)),
    DenseCase("mask of heads", mask=(1, 3, 1, 1)),
    DenseCase("mask of all axes, an empty row", mask=(2, 3, 5, 7), has_empty_row=True),
    DenseCase("mask of pairs, an empty row", mask=(5, 7), has_empty_row=True),
    DenseCase("mask and causal", query_length=7, pattern=Causal(), mask=(2, 1, 7, 7), has_empty_row=True),
    DenseCase("mask and causal top_left", pattern=Causal("top_left"), mask=(7,)),
    DenseCase("bias of keys", bias=(7,)),
    DenseCase("bias of pairs", bias=(5, 7)),
    DenseCase("bias of queries", bias=(5, 1)),
    DenseCase("bias by head", bias=(1, 3, 5, 7)),
    DenseCase("bias of batch", bias=(2, 1, 1, 1)),
    DenseCase("bias of all axes that hides", bias=(2, 3, 5, 7), bias_hides=True),
    DenseCase("bias of pairs that hides, an empty row", bias=(5, 7), bias_hides=True, has_empty_row=True),
    DenseCase("bias and causal", query_length=7, pattern=Causal(), bias=(7, 7)),
    DenseCase(
        "mask, bias and causal",
        pattern=Causal("bottom_right"),
        mask=(2, 1, 5, 7),
        bias=(1, 3, 1, 7),
        bias_hides=True,
        value_dim=6,
        scale=0.7,
    ),
    DenseCase("scale", scale=1.3),
    DenseCase("negative scale", scale=-0.6),
    DenseCase("softcap", softcap=0.8, bias=(5, 7), scale=2.0),
    DenseCase("softcap and mask", softcap=1.5, mask=(5, 7), has_empty_row=True),
    DenseCase("additive", score="additive"),
    DenseCase("additive, masked, scaled", score="additive", mask=(2, 1, 5, 7), has_empty_row=True, scale=0.4),
    DenseCase("dynamic", score="dynamic", value_dim=2),
    DenseCase("dynamic, causal, bias", score="dynamic", pattern=Causal("bottom_right"), bias=(5, 7), softcap=2.0),
    DenseCase("no queries", query_length=0),
    DenseCase("no keys", key_length=0),
    DenseCase("no queries, no keys, causal", query_length=0, key_length=0, pattern=Causal()),
    DenseCase("no keys, masked", key_length=0, mask=(5, 1)),
    DenseCase("no batch", batch=0, mask=(5, 7)),
    DenseCase("no heads", heads=0),
    DenseCase("no head_dim", head_dim=0),
    DenseCase("no value_dim", value_dim=0),
)
