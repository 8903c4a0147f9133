"""FlashAttention's rule for half precision, over a grid of shapes, patterns and settings.

Against exact results, the error is at most twice that of plain attention computed in half precision by PyTorch, for a
gradient three times, and a small number. So nothing is rounded more often than there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Blocks, Causal, Full, Graph, Pattern, Strided, Window, attend, explain

pytestmark = pytest.mark.usefixtures("native")

HEADS = 4
# Of numbers about 1: far below a rounding step of float16, 1e-3, and of bfloat16, 8e-3.
_FLOOR = 1e-5
_PATTERNS: dict[str, Callable[[int, int], Pattern]] = {
    "full": lambda queries, keys: Full(),
    "causal": lambda queries, keys: Causal("bottom_right"),
    "window": lambda queries, keys: Window(23, 5, "bottom_right"),
    "blocks": lambda queries, keys: Blocks(_block_matrix(queries, keys), 16),
    "strided": lambda queries, keys: Strided(7, 3, "top_left"),
}
_EXTRAS = ("nothing", "mask", "bias", "softcap", "sinks")


def _block_matrix(queries: int, keys: int) -> Tensor:
    grid = -(-queries // 16), -(-keys // 16)
    return (torch.arange(grid[0])[:, None] + 2 * torch.arange(grid[1])) % 3 != 1


@dataclass(frozen=True)
class _Setting:
    """A call in half precision.

    Attributes:
        tensors: query, key and value, and where they are there bias and sinks, of which there are gradients.
        allowed: the pairs, `(batch | 1, 1, queries, keys)`.
    """

    pattern: Pattern
    tensors: Mapping[str, Tensor]
    allowed: Tensor
    mask: Tensor | None
    softcap: float | None

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: x.to(dtype).detach().requires_grad_() for name, x in self.tensors.items()}


def _setting(
    pattern: str, extra: str, lengths: tuple[int, int], width: int, key_heads: int, dtype: torch.dtype
) -> _Setting:
    shapes: dict[str, tuple[int, ...]] = {
        "query": (2, lengths[0], HEADS, width),
        "key": (2, lengths[1], key_heads, width),
        "value": (2, lengths[1], key_heads, width),
    }
    if extra == "bias":
        shapes["bias"] = (1, HEADS, *lengths)
    if extra == "sinks":
        shapes["sinks"] = (HEADS,)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    made = _PATTERNS[pattern](*lengths)
    mask = torch.rand(2, 1, *lengths) < 0.7 if extra == "mask" else None
    allowed = made.to_dense(*lengths)[None, None]
    return _Setting(
        made, tensors, allowed if mask is None else allowed & mask, mask, 2.0 if extra == "softcap" else None
    )


def _plain(setting: _Setting, tensors: Mapping[str, Tensor]) -> Tensor:
    """The output by PyTorch's products and softmax, all in the dtype of the tensors."""
    query, key, value = (tensors[name].transpose(1, 2) for name in ("query", "key", "value"))
    key, value = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    if setting.softcap is not None:
        scores = setting.softcap * torch.tanh(scores / setting.softcap)
    if "bias" in tensors:
        scores = scores + tensors["bias"]
    scores = scores.masked_fill(~setting.allowed, -math.inf)
    if "sinks" in tensors:
        scores = torch.cat([scores, tensors["sinks"][:, None, None].expand(*scores.shape[:3], 1)], -1)
    has_keys = setting.allowed.any(-1, keepdim=True)
    weights = torch.where(has_keys, scores, 0.0).softmax(-1)[..., : key.shape[2]]
    return (torch.where(setting.allowed, weights, 0.0) @ value).transpose(1, 2)


def _of_plain(setting: _Setting, dtype: torch.dtype, cotangent: Tensor) -> list[Tensor]:
    leaves = setting.leaves(dtype)
    output = _plain(setting, leaves)
    return [output, *torch.autograd.grad(output, list(leaves.values()), cotangent.to(dtype))]


def _of_ours(setting: _Setting, implementation: str | None, cotangent: Tensor, **more: Any) -> list[Tensor]:
    leaves = setting.leaves(cotangent.dtype)
    arguments = {
        **leaves,
        "pattern": setting.pattern,
        "mask": setting.mask,
        "softcap": setting.softcap,
        "implementation": implementation,
        **more,
    }
    if implementation is not None:
        assert explain(**arguments).implementation == implementation
    output = attend(**arguments).output
    return [output, *torch.autograd.grad(output, list(leaves.values()), cotangent)]


def _assert_rule(setting: _Setting, ours: list[Tensor], cotangent: Tensor) -> None:
    dtype = cotangent.dtype
    exact = _of_plain(setting, torch.float32, cotangent)
    plain = _of_plain(setting, dtype, cotangent)
    names = ["output", *setting.tensors]
    for name, one, other, true in zip(names, ours, plain, exact, strict=True):
        assert one.dtype == dtype
        error, allowed = (float((x.detach().float() - true.detach()).abs().max()) for x in (one, other))
        # And one rounding step: of a few sums over all rows the plain computation's error may be 0 by chance.
        step = torch.finfo(dtype).eps * float(true.detach().abs().max()) if name == "sinks" else 0.0
        assert error <= (2 if name == "output" else 3) * allowed + step + _FLOOR, (name, error, allowed)


every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.pairwise
@every_half
@pytest.mark.parametrize("extra", _EXTRAS)
@pytest.mark.parametrize("pattern", _PATTERNS)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("width", [16, 59, 64, 128])
@pytest.mark.parametrize("lengths", [(1, 97), (33, 33), (113, 203), (200, 128)], ids=str)
def test_the_rule(
    lengths: tuple[int, int], width: int, key_heads: int, pattern: str, extra: str, dtype: torch.dtype
) -> None:
    setting = _setting(pattern, extra, lengths, width, key_heads, dtype)
    cotangent = torch.randn(2, lengths[0], HEADS, width).to(dtype)
    _assert_rule(setting, _of_ours(setting, None, cotangent, dropout=0.0), cotangent)


@every_half
@pytest.mark.parametrize("extra", _EXTRAS)
@pytest.mark.parametrize(
    ("pattern", "implementation"),
    [
        ("full", "reference"),
        ("causal", "reference"),
        ("window", "reference"),
        ("window", "graph"),
        ("causal", "torch"),
        ("full", "torch"),
    ],
)
def test_the_rule_for_each_implementation(pattern: str, implementation: str, extra: str, dtype: torch.dtype) -> None:
    if implementation == "torch" and extra in ("softcap", "bias"):
        return
    setting = _setting(pattern, extra, (65, 97), 32, 2, dtype)
    cotangent = torch.randn(2, 65, HEADS, 32).to(dtype)
    _assert_rule(setting, _of_ours(setting, implementation, cotangent), cotangent)


@every_half
def test_the_rule_over_a_graph(dtype: torch.dtype) -> None:
    allowed = torch.rand(1, 1, 60, 80) < 0.3
    queries, keys = allowed[0, 0].nonzero().unbind(1)
    graph = Graph.from_edge_index(torch.stack([keys, queries]), num_queries=60, num_keys=80)
    tensors = _setting("full", "sinks", (60, 80), 32, 2, dtype).tensors
    setting = _Setting(graph, tensors, allowed, None, None)
    cotangent = torch.randn(2, 60, HEADS, 32).to(dtype)
    _assert_rule(setting, _of_ours(setting, None, cotangent), cotangent)
