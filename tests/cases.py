"""What the tests of all operations share: random graphs, calls of `attend`, and settings in which each two meet.

`make_call` makes a call, with the tensors that it is differentiated by; `CASES` are the calls that every law holds of.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from anyattention import (
    Additive,
    Blocks,
    Causal,
    Documents,
    Dynamic,
    EdgeFeatures,
    Fixed,
    Full,
    Global,
    Graph,
    RandomBlocks,
    RelativeBias,
    Strided,
    TopK,
    Window,
    attend,
    explain,
)

SCORES = ("dot", "additive", "dynamic")
AGGREGATIONS = ("sum", "mean", "max")
# Of a bias by distance: the first distance, and the alignment.
_RELATIVE = (-2, "bottom_right")


def random_graph(num_queries: int = 5, num_keys: int = 7, num_edges: int = 23, *, hub: float = 0.0) -> Graph:
    """Random edges, some of them twice. Query 1 and key 2 have none; the part `hub` is query 2's, and again key 3's."""

    def ends(count: int, isolated: int, favourite: int) -> Tensor:
        index = torch.randint(max(count - 1, 1), (num_edges,))
        index += index >= isolated
        return index.masked_fill_(torch.rand(num_edges) < hub, favourite)

    edge_index = torch.stack([ends(num_keys, 2, 3), ends(num_queries, 1, 2)])
    return Graph.from_edge_index(edge_index, num_queries=num_queries, num_keys=num_keys)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers that a gradient is asked for."""
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@dataclass(frozen=True)
class Call:
    """The arguments of `attend`.

    Args:
        tensors: those that have gradients, by name: query, key and value, then, where used, vector, sinks, bias,
            numbers (of a RelativeBias), features, key_weight and value_weight.
        settings: the others, by their names in `attend`.
        score, slope: the score and its negative slope; Dynamic takes its vector from the tensors.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    score: str = "dot"
    slope: float = 0.2

    @property
    def leaves(self) -> list[Tensor]:
        return list(self.tensors.values())

    @property
    def pattern(self) -> Any:
        return self.settings["pattern"]

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """The arguments by name, with some of them changed."""
        given: dict[str, Any] = {name: self.tensors[name] for name in ("query", "key", "value")}
        if self.score != "dot":
            given["score"] = Additive(self.slope) if self.score == "additive" else Dynamic(self["vector"], self.slope)
        for name in ("sinks", "bias"):
            if name in self.tensors:
                given[name] = self[name]
        if "numbers" in self.tensors:
            given["bias"] = RelativeBias(self["numbers"], *_RELATIVE)
        if "features" in self.tensors:
            weights = self.tensors.get("key_weight"), self.tensors.get("value_weight")
            given["edges"] = EdgeFeatures(self["features"], *weights)
        return given | self.settings | changes

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def run(self, implementation: str | None = None, **asked: Any) -> Any:
        """The AttentionResult, with everything that can be returned; by an implementation which `explain` names."""
        asked = {"return_weights": "heads", "return_logsumexp": self.settings.get("normalize", True)} | asked
        if implementation is not None and not torch.compiler.is_compiling():
            given = self.arguments(implementation=implementation, **asked)
            assert explain(**given).implementation == implementation
        return self.attend(implementation=implementation, **asked)

    def attend(self, **changes: Any) -> Any:
        """The AttentionResult of the arguments, some of them changed."""
        return attend(**self.arguments(**changes))

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Call":
        """The same call of other tensors, in the order of its own."""
        return replace(self, tensors=dict(zip(self.tensors, tensors, strict=True)))

    def changed(self, **settings: Any) -> "Call":
        return replace(self, settings=self.settings | settings)

    def to(self, dtype: torch.dtype) -> "Call":
        """The same call in another dtype, with leaves of its own."""
        call = self.with_tensors(each.detach().to(dtype).requires_grad_() for each in self.leaves)
        bias = self.settings.get("bias")
        if isinstance(bias, RelativeBias):
            return call.changed(bias=replace(bias, numbers=bias.numbers.to(dtype)))
        return call if bias is None else call.changed(bias=bias.to(dtype))


def make_call(
    pattern: Any,
    score: str = "dot",
    *,
    lengths: tuple[int, int] = (5, 7),
    batch: int | None = None,
    heads: int = 3,
    key_heads: int | None = None,
    width: int = 4,
    value_dim: int = 3,
    mask: str | Tensor | None = None,
    bias: str | Tensor | None = None,
    features: str = "",
    denominator: str = "softmax",
    dtype: torch.dtype = torch.float64,
    slope: float = 0.2,
    **settings: Any,
) -> Call:
    """A random call.

    Args:
        pattern: as in `attend`; a Graph has its own lengths.
        batch: None leaves the axis out, which only a Graph allows.
        mask, bias: a tensor, which stays without gradient, or a letter for each axis of one: b(atch), h(eads),
            q(ueries), k(eys), e(dges), 1. A bias may also be "relative"; a "fixed ..." one has no gradient.
        features: which of k(ey) and v(alue) the edges' features reach; "-" are features without weights.
        denominator: "softmax", "sinks" for one with sinks, or "gates" for normalize=False.
        settings: others of `attend`.
    """
    edges = pattern.num_edges if isinstance(pattern, Graph) else 0
    queries, keys = (pattern.num_queries, pattern.num_keys) if isinstance(pattern, Graph) else lengths
    head_dim, edge_dim = (1 if score == "additive" else width), 2
    key_heads = heads if key_heads is None else key_heads
    lead = () if batch is None else (batch,)
    sizes = {"b": batch, "h": heads, "q": queries, "k": keys, "e": edges, "1": 1}

    def shape(letters: str) -> list[int]:
        return [size for size in (sizes[letter] for letter in letters) if size is not None]

    shapes: dict[str, Sequence[int]] = {
        "query": (*lead, queries, heads, head_dim),
        "key": (*lead, keys, key_heads, head_dim),
        "value": (*lead, keys, key_heads, value_dim),
    }
    if score == "dynamic":
        shapes["vector"] = (heads, head_dim)
    if denominator == "sinks":
        shapes["sinks"] = (heads,)
    elif denominator == "gates":
        settings["normalize"] = False
    if isinstance(bias, Tensor):
        settings["bias"] = bias
    elif bias == "relative":
        shapes["numbers"] = (heads, 5)
    elif bias == "fixed relative":
        settings["bias"] = RelativeBias(torch.randn(heads, 5, dtype=dtype), *_RELATIVE)
    elif bias and bias.startswith("fixed "):
        settings["bias"] = torch.randn(shape(bias.removeprefix("fixed ")), dtype=dtype)
    elif bias:
        shapes["bias"] = shape(bias)
    if features:
        shapes["features"] = (edges, edge_dim)
    if "k" in features:
        shapes["key_weight"] = (heads, head_dim, edge_dim)
    if "v" in features:
        shapes["value_weight"] = (heads, value_dim, edge_dim)
    if mask is not None:
        settings["mask"] = mask if isinstance(mask, Tensor) else torch.rand(shape(mask)) < 0.6
    tensors = {name: leaf(*each, dtype=dtype) for name, each in shapes.items()}
    return Call(tensors, {"pattern": pattern, **settings}, score, slope)


def pairwise_sample(settings: Sequence[Iterable[Any]]) -> list[int]:
    """Positions of few settings in which each two values meet that meet at all; greedy, the first of the best."""
    left = [{*combinations(setting, 2), *combinations(setting, 1)} for setting in map(tuple, settings)]
    kept = []
    while any(left):
        best = max(range(len(left)), key=lambda position: len(left[position]))
        kept.append(best)
        met = left[best]
        left = [pairs - met for pairs in left]
    return sorted(kept)


def sampled(axes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Settings of all axes in which each two values meet, by what each differs in from the first values."""
    choice = random.Random(0)
    drawn = [[(name, choice.randrange(len(values))) for name, values in axes.items()] for _ in range(400)]
    found = {}
    for position in pairwise_sample(drawn):
        name = ", ".join(f"{axis}={axes[axis][value]}" for axis, value in drawn[position] if value)
        found[name or "plain"] = {axis: axes[axis][value] for axis, value in drawn[position]}
    return found


_GRAPHS = {"random": lambda: random_graph(), "hub": lambda: random_graph(5, 4, 31, hub=0.5)}
_BLOCKS = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
_EDGES: dict[str, Sequence[Any]] = {
    "graph": tuple(_GRAPHS),
    "score": SCORES,
    "aggregation": AGGREGATIONS,
    "denominator": ("softmax", "gates", "sinks"),
    "batch": (None, 2),
    "key_heads": (None, 1),
    "mask": (None, "e", "eh", "beh"),
    "bias": (None, "e", "eh", "beh"),
    "features": ("", "k", "v", "kv"),
    "scale": (None, 0.7, -1.3),
    "softcap": (None, 1.3),
}
_PAIRS: dict[str, Sequence[Any]] = {
    "score": SCORES,
    "batch": (1, 2),
    "mask": (None, "k", "1hq1", "bhqk"),
    "bias": (None, "k", "1hqk", "relative"),
    "scale": (None, 0.7, -1.3),
    "softcap": (None, 1.3),
    "denominator": ("softmax", "sinks"),
}
_DENSE: dict[str, Sequence[Any]] = {
    "pattern": (None, Full(), Causal("top_left"), Causal("bottom_right")),
    "lengths": ((5, 7), (7, 5), (6, 6)),
    **_PAIRS,
}
_SPARSE: dict[str, Sequence[Any]] = {
    "lengths": ((7, 7),),
    "pattern": (
        Window(2, 1),
        Strided(2, 0) & Causal(),
        Strided(3, 1),
        Fixed(3, 1) & Causal(),
        Window(1, 1) | Global(1),
        RandomBlocks(1, seed=4, size=2),
        Documents((3, 0, 4)),
        Blocks(_BLOCKS, 3),
    ),
    "key_heads": (None, 1),
    **_PAIRS,
}
_SELECTED: dict[str, Sequence[Any]] = {
    "pattern": (TopK(3), Causal("bottom_right") & TopK(4), Window(4, 1, "top_left") & TopK(1), TopK(20)),
    "key_heads": (None, 1),
    **_PAIRS,
}
# Fused kernels score by products, and PyTorch's has no gradient of a bias.
_DOT: dict[str, Sequence[Any]] = {"score": ("dot",)}
_FIXED_BIASES = (None, "fixed k", "fixed 1hqk", "fixed relative")

# The settings of each operation that each of its implementations runs.
AXES: dict[tuple[str, str], Mapping[str, Sequence[Any]]] = {
    ("dense", "reference"): _DENSE,
    ("dense", "cpu"): _DENSE | _DOT,
    ("dense", "torch"): _DENSE | _DOT | {"bias": _FIXED_BIASES, "softcap": (None,)},
    ("graph", "reference"): _EDGES,
    ("graph", "cpu"): _EDGES,
    ("sparse", "reference"): _SPARSE,
    ("sparse", "graph"): _SPARSE,
    ("sparse", "cpu"): _SPARSE | _DOT,
    ("top-k", "reference"): _SELECTED | _DOT,
    ("top-k", "cpu"): _SELECTED | _DOT | {"softcap": (None,), "dtype": (torch.float32,)},
}


@dataclass(frozen=True)
class Case:
    """Settings of `make_call` for an operation, which an implementation of it runs."""

    name: str
    operation: str
    implementation: str
    settings: dict[str, Any]

    def call(self, **changes: Any) -> Call:
        """The call, drawn anew."""
        settings = self.settings | changes
        if "graph" in settings:
            settings["pattern"] = _GRAPHS[settings.pop("graph")]()
        return make_call(settings.pop("pattern"), settings.pop("score", "dot"), **settings)


# For every operation and implementation, settings in which each two values of two axes meet.
CASES = [
    Case(f"{operation} by {implementation}: {name}", operation, implementation, settings)
    for (operation, implementation), axes in AXES.items()
    for name, settings in sampled(axes).items()
]
