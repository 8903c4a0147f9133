"""Random calls of `attend`, and what each should give: masked attention in plain PyTorch, in float64.

A call is drawn from its seed alone. Its tensors lie in memory in any way: axes in any order, cut out, expanded, or with
strides that overlap. The oracle knows pairs and formula only, and has copies of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anyattention import (
    AttentionResult,
    Blocks,
    Causal,
    Documents,
    Fixed,
    Full,
    Global,
    Graph,
    Pattern,
    RandomBlocks,
    RelativeBias,
    Strided,
    TopK,
    Window,
    attend,
)
from anyattention.ops.dropout import factors_by_formula

_LONGEST = 17
_DTYPES = (torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class RandomCall:
    """A call of `attend`.

    Attributes:
        tensors: what has gradients: query, key, value and, where drawn, bias, numbers (of a RelativeBias) and sinks.
        settings: the other arguments.
        relative: first distance and alignment of a bias by distance.
        asked: which of weights and logsumexp are returned.
        hidden_keys: `(batch, keys, key heads)`, those that no query may attend to, where they hold NaN.
    """

    seed: int
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    relative: tuple[int, str] | None
    asked: dict[str, Any]
    hidden_keys: Tensor | None = None
    strides: dict[str, str] = field(default_factory=dict)

    @property
    def pattern(self) -> Any:
        return self.settings["pattern"]

    @property
    def lengths(self) -> tuple[int, int]:
        return self.tensors["query"].shape[-3], self.tensors["key"].shape[-3]

    def __str__(self) -> str:
        shapes = {
            name: f"{tuple(x.shape)} {self.strides.get(name, '')}{'' if x.requires_grad else ' fixed'}"
            for name, x in self.tensors.items()
        }
        settings = {
            name: f"{tuple(x.shape)}" if isinstance(x, Tensor) else x
            for name, x in self.settings.items()
            if x is not None
        }
        dtype = self.tensors["query"].dtype
        return f"seed {self.seed}: {dtype} {shapes} {settings} relative={self.relative} {self.asked}"

    def attend(self, tensors: Mapping[str, Tensor] | None = None) -> AttentionResult:
        given = dict(self.tensors if tensors is None else tensors)
        if self.relative is not None:
            first, align = self.relative
            given["bias"] = RelativeBias(given.pop("numbers"), first, align)  # pyright: ignore[reportArgumentType]
        torch.manual_seed(self.seed)
        return attend(**given, **self.settings, **self.asked)

    def kept(self, shape: tuple[int, ...]) -> Tensor:
        """The factors of dropout of `attend`, which draws a seed and nothing else."""
        torch.manual_seed(self.seed)
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
        return factors_by_formula(shape, self.settings.get("dropout", 0.0), seed, torch.float64)


class _Draw:
    """Draws of one seed."""

    def __init__(self, seed: int) -> None:
        self.choice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.strides: dict[str, str] = {}

    def any(self, *values: Any) -> Any:
        return self.choice.choice(values)

    def chance(self, probability: float) -> bool:
        return self.choice.random() < probability

    def size(self) -> int:
        """0 to 17, small ones more often."""
        return self.any(
            0, 1, 2, 3, self.choice.randint(1, 8), self.choice.randint(1, 8), self.choice.randint(4, _LONGEST)
        )

    def numbers(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def booleans(self, shape: tuple[int, ...], share: float) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def view(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[tuple[int, ...]], Tensor]
    ) -> Tensor:
        """A tensor that lies in any way; around what is cut out there is NaN, or True."""
        kind = self.any("whole", "whole", "turned", "cut", "expanded", "overlapping")
        self.strides[name] = kind
        if kind == "overlapping" and shape:
            strides = [self.choice.choice((0, 1, 2, 3, 5)) for _ in shape]
            if self.chance(0.7):
                strides[-1] = 1
            offset = self.choice.randint(0, 3)
            span = offset + 1 + sum(max(n - 1, 0) * stride for n, stride in zip(shape, strides, strict=True))
            return fill((span,)).to(dtype).as_strided(shape, strides, offset)
        if kind == "turned":
            order = self.choice.sample(range(len(shape)), len(shape))
            lying = fill(tuple(shape[axis] for axis in order)).to(dtype)
            return lying.permute([order.index(axis) for axis in range(len(shape))])
        if kind == "cut":
            before, steps = [self.choice.randint(0, 2) for _ in shape], [self.any(1, 1, 2, 3) for _ in shape]
            whole = [first + n * step + 1 for n, first, step in zip(shape, before, steps, strict=True)]
            around = True if dtype == torch.bool else math.nan
            cut = torch.full(whole, around, dtype=dtype)[
                tuple(slice(first, first + n * step, step) for n, first, step in zip(shape, before, steps, strict=True))
            ]
            return cut.copy_(fill(shape))
        if kind == "expanded":
            once = tuple(1 if n > 1 and self.chance(0.5) else n for n in shape)
            return fill(once).to(dtype).expand(shape)
        return fill(shape).to(dtype)


def draw_call(seed: int) -> RandomCall:
    """The call of a seed."""
    draw = _Draw(seed)
    dtype, batch = draw.any(*_DTYPES), draw.any(0, 1, 1, 2, 2, 3)
    heads = draw.any(1, 1, 2, 3, 4, 6)
    key_heads = draw.any(*[n for n in range(1, heads + 1) if heads % n == 0])
    pattern, lengths = _draw_pattern(draw)
    lead: tuple[int, ...] = (batch,)
    if isinstance(pattern, Graph) and draw.chance(0.4):
        lead = ()
    width, value_dim = draw.size() or draw.any(0, 1, 4), draw.size() or draw.any(0, 1, 4)
    shapes = {
        "query": (*lead, lengths[0], heads, width),
        "key": (*lead, lengths[1], key_heads, width),
        "value": (*lead, lengths[1], key_heads, value_dim),
    }
    tensors = {name: draw.view(name, shape, dtype, draw.numbers) for name, shape in shapes.items()}
    settings: dict[str, Any] = {"pattern": pattern}
    full = _pair_sizes(pattern, lead, heads, lengths)
    relative = None
    if draw.chance(0.4):
        mask = _broadcastable(draw, pattern, full)
        settings["mask"] = draw.view(
            "mask", mask, torch.bool, lambda shape: draw.booleans(shape, draw.any(0.2, 0.6, 0.9))
        )
    if draw.chance(0.25) and not isinstance(pattern, Graph):
        tensors["numbers"] = draw.view(
            "numbers", (draw.any(1, heads), draw.any(1, 3, 9)), draw.any(dtype, torch.float32), draw.numbers
        )
        relative = draw.choice.randint(-8, 3), draw.any("top_left", "bottom_right")
    elif draw.chance(0.35):
        shape = _broadcastable(draw, pattern, full)
        bias = draw.view("bias", shape, draw.any(dtype, torch.float32), draw.numbers)
        if draw.chance(0.3):
            bias = bias.masked_fill(draw.booleans(shape, 0.3), -math.inf)
        tensors["bias"] = bias
    if draw.chance(0.35):
        sinks = draw.view("sinks", (heads,), draw.any(dtype, torch.float32), draw.numbers)
        tensors["sinks"] = sinks.masked_fill(draw.booleans((heads,), 0.3), -math.inf) if draw.chance(0.3) else sinks
    if draw.chance(0.4):
        settings["scale"] = draw.any(0.0, 0.7, -1.3, 0.2)
    if draw.chance(0.25) and not isinstance(pattern, TopK):
        settings["softcap"] = draw.any(0.5, 2.0, 30.0)
    if draw.chance(0.15):
        settings["dropout"] = draw.any(0.3, 0.8)
    if draw.chance(0.3):
        settings["implementation"] = draw.any("reference", "torch", "cpu", "graph")
    asked = {"return_weights": draw.any(False, False, "mean", "heads"), "return_logsumexp": draw.chance(0.5)}
    tensors = {name: x.detach().requires_grad_(draw.chance(0.8)) for name, x in tensors.items()}
    call = RandomCall(seed, tensors, settings, relative, asked, strides=draw.strides)
    if draw.chance(0.3):
        _spoil_hidden_keys(call)
    return call


def _draw_pattern(draw: _Draw) -> tuple[Any, tuple[int, int]]:
    """A pattern and its lengths."""
    lengths = draw.size(), draw.size()
    kind = draw.any("none", "causal", "sparse", "sparse", "both", "either", "graph", "top-k")
    if kind == "none":
        return draw.any(None, Full()), lengths
    if kind == "graph":
        num_edges = draw.choice.randint(0, 40) if 0 not in lengths else 0
        ends = [torch.randint(max(n, 1), (num_edges,), generator=draw.generator) for n in (lengths[1], lengths[0])]
        return Graph.from_edge_index(torch.stack(ends), num_queries=lengths[0], num_keys=lengths[1]), lengths
    if draw.chance(0.5):
        lengths = lengths[0], lengths[0]
    align = draw.any("top_left", "bottom_right")
    if kind == "causal":
        return Causal(align), lengths
    if kind == "top-k":
        selection = TopK(draw.choice.randint(1, 6))
        return (_simple(draw, lengths, align) & selection if draw.chance(0.5) else selection), lengths
    pattern = _simple(draw, lengths, align)
    if kind == "both":
        pattern = pattern & _simple(draw, lengths, align)
    elif kind == "either":
        pattern = pattern | _simple(draw, lengths, align)
    return pattern, lengths


def _simple(draw: _Draw, lengths: tuple[int, int], align: Any) -> Pattern:
    """A pattern that is made of no others."""
    number = draw.choice.randint
    kind = draw.any("causal", "window", "window", "strided", "fixed", "global", "random", "documents", "blocks")
    if kind == "documents" and lengths[0] == lengths[1]:
        cut = number(0, lengths[0])
        return Documents((cut, lengths[0] - cut))
    if kind == "blocks":
        size = number(1, 5)
        return Blocks(draw.booleans((-(-lengths[0] // size), -(-lengths[1] // size)), 0.5), size)
    made: dict[str, Callable[[], Pattern]] = {
        "causal": lambda: Causal(align),
        "strided": lambda: Strided(number(1, 4), number(0, 3), align),
        "fixed": lambda: Fixed(block := number(1, 4), number(1, block), align),
        "global": lambda: Global(number(1, 3), align),
        "random": lambda: RandomBlocks(number(1, 2), seed=number(0, 9), size=number(1, 4)),
    }
    return made.get(kind, lambda: Window(number(0, 5), number(0, 5), align))()


def _pair_sizes(pattern: Any, lead: tuple[int, ...], heads: int, lengths: tuple[int, int]) -> tuple[int, ...]:
    """The sizes of numbers of pairs, as a mask has them."""
    return (*lead, pattern.num_edges, heads) if isinstance(pattern, Graph) else (*lead, heads, *lengths)


def _broadcastable(draw: _Draw, pattern: Any, full: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a mask or a bias."""
    if isinstance(pattern, Graph):
        edges = full[-2:-1]
        return draw.any(edges, (*edges, full[-1]), full)
    rank = draw.any(1, 2, 4, 4)
    return tuple(n if draw.chance(0.7) else 1 for n in full[-rank:])


def _spoil_hidden_keys(call: RandomCall) -> None:
    """NaN in keys and values that no query may attend to, where they lie apart from others."""
    if any(call.strides[name] in ("expanded", "overlapping") for name in ("key", "value")):
        return
    allowed = allowed_pairs(call)
    if allowed is None:
        return
    key = call.tensors["key"]
    used = allowed.any(2).unflatten(1, (key.shape[2], -1)).any(2).transpose(1, 2)
    call.hidden_keys = ~used.expand(key.shape[:3])
    with torch.no_grad():
        for name in ("key", "value"):
            call.tensors[name][call.hidden_keys] = math.nan


def allowed_pairs(call: RandomCall) -> Tensor | None:
    """Which pairs pattern, mask and bias leave, `(batch, heads, queries, keys)`; None for a Graph."""
    pattern, lengths = call.pattern, call.lengths
    if isinstance(pattern, Graph):
        return None
    among = pattern.among if isinstance(pattern, TopK) else pattern
    allowed = torch.ones(lengths, dtype=torch.bool) if among is None else among.to_dense(*lengths)
    query = call.tensors["query"]
    allowed = allowed.expand(query.shape[0], query.shape[2], *lengths)
    if "mask" in call.settings:
        allowed = allowed & call.settings["mask"]
    return allowed & (call.tensors["bias"] != -math.inf) if "bias" in call.tensors else allowed


def draw_views_like(call: RandomCall, results: Mapping[str, Tensor], order: int) -> dict[str, Tensor]:
    """A random cotangent of each result, which lies in any way too."""
    draw = _Draw(call.seed + (1 + order) * 1_000_003)
    return {name: draw.view(name, tuple(x.shape), x.dtype, draw.numbers) for name, x in results.items()}
