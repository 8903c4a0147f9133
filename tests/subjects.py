"""The public operations and modules as functions of all tensors that they are differentiated by.

What every one of them owes (`tests/laws`) is written once, and holds of a new one as soon as it stands here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyattention import (
    AttentionResult,
    Causal,
    Dynamic,
    EdgeFeatures,
    ExpanderGraph,
    Graph,
    HeterogeneousGraph,
    Strided,
    TopK,
    Window,
    attend,
    edge_dot,
    edge_softmax,
    edge_sum,
    merge,
)
from anyattention.nn import (
    DistanceAttention,
    EquivariantAttention,
    GraphAttention,
    GraphTransformerLayer,
    HeterogeneousGraphAttention,
    MemoryAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
    SparseAttention,
)
from cases import Call, make_call

_F64 = torch.float64
_EDGE_INDEX = torch.tensor([[0, 1, 3, 3, 0, 4, 4, 0, 2], [0, 0, 2, 2, 3, 3, 0, 2, 4]])
_PAIRS_OF_FIVE = Graph.from_edge_index(_EDGE_INDEX, num_nodes=5)
GRAPH = Graph.from_edge_index(_EDGE_INDEX[:, :8], num_queries=4, num_keys=5)


@dataclass(frozen=True)
class Subject:
    """A function of named tensors, float64, and tensors to start from."""

    of: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
    tensors: dict[str, Tensor]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors.values())

    @property
    def every(self) -> tuple[int, ...]:
        """The places of all inputs."""
        return tuple(range(len(self.tensors)))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results that have a gradient."""
        return self.of(dict(zip(self.tensors, inputs, strict=True)))

    def loss(self, *inputs: Tensor) -> Tensor:
        """A number of all results; the sine keeps what is linear from vanishing at the second derivative."""
        each = [(found.sin() * waves(found)).sum() for found in self(*inputs)]
        return sum(each[1:], each[0])

    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in self.inputs]

    def directions(self, *leading: int) -> tuple[Tensor, ...]:
        """Random tensors like the inputs."""
        return tuple([torch.randn(*leading, *x.shape, dtype=x.dtype) for x in self.inputs])

    def cotangents(self, *leading: int) -> tuple[Tensor, ...]:
        """Random tensors like the results."""
        return tuple([torch.randn(*leading, *x.shape, dtype=x.dtype) for x in self(*self.inputs)])

    def among(self, *places: int) -> tuple["Subject", tuple[Tensor, ...]]:
        """The same function of some inputs, and these."""
        names = [list(self.tensors)[place] for place in places]
        some = Subject(lambda given: self.of({**self.tensors, **given}), {name: self.tensors[name] for name in names})
        return some, some.inputs

    def along(self, count: int) -> "Subject":
        """The same of a few numbers: how far all inputs are moved along some directions. Hessians of it are small."""
        directions = self.directions(count)

        def of(given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            moved = [
                x + torch.tensordot(given["far"], each, 1) for x, each in zip(self.inputs, directions, strict=True)
            ]
            return self(*moved)

        return Subject(of, {"far": torch.zeros(count, dtype=_F64)})


def waves(like: Tensor) -> Tensor:
    """Constant numbers of a tensor's shape, no two alike."""
    return torch.arange(1, like.numel() + 1, dtype=like.dtype).cos().view(like.shape)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=_F64)


def _finite(*results: Tensor | None) -> tuple[Tensor, ...]:
    """Results with a gradient; what stands for nothing, as the logsumexp of no key, has none."""
    return tuple([torch.where(x == -torch.inf, 0.0, x) for x in results if x is not None])


def attention(pattern: Any, score: str = "dot", **settings: Any) -> Callable[[], Subject]:
    """`attend` as `make_call` makes it, with all that it returns."""
    asked = {name: settings.pop(name) for name in ("return_weights", "implementation") if name in settings}

    def made() -> Subject:
        call = make_call(pattern, score, width=2, value_dim=3, heads=2, **{"lengths": (4, 5), **settings})

        def of(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            given = Call(dict(tensors), call.settings, call.score, call.slope)
            found = given.attend(return_logsumexp=settings.get("denominator") != "gates", **asked)
            return _finite(*_as_tuple(found))

        return Subject(of, {name: x.detach() for name, x in call.tensors.items()})

    return made


def module(
    make: Callable[[], nn.Module], inputs: Mapping[str, Tensor], method: str = "forward", **given: Any
) -> Callable[[], Subject]:
    """A module's method, of its arguments and its parameters. A sparse result is left out: it has no dense gradient."""

    def made() -> Subject:
        layer = make().double().eval()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        names = dict(layer.named_parameters())

        def of(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            parameters = {name: tensors[name] for name in names}
            arguments = {name: tensors[name] for name in inputs}
            caller = _Calls(layer, method)
            found = torch.func.functional_call(
                caller, {f"layer.{name}": x for name, x in parameters.items()}, (), {**arguments, **given}
            )
            return _finite(*[x for x in found if x is not None and not x.is_sparse and x.is_floating_point()])

        return Subject(of, {**inputs, **{name: x.detach() for name, x in names.items()}})

    return made


class _Calls(nn.Module):
    """A method of a module as `forward`."""

    def __init__(self, layer: nn.Module, method: str) -> None:
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.layer, self.method)(*args, **kwargs)


_RELATIONS = [("a", "to", "b"), ("b", "to", "b"), ("b", "of", "a")]
TYPED_GRAPH = HeterogeneousGraph.from_edge_index(
    dict(
        zip(
            _RELATIONS,
            [_EDGE_INDEX[:, :6] % torch.tensor([[5], [3]]), _EDGE_INDEX % 3, _EDGE_INDEX[:, 2:] % 3],
            strict=True,
        )
    ),
    {"a": 5, "b": 3},
)


class Typed(nn.Module):
    """A HeterogeneousGraphAttention between two types, of their features and of those of one relation's edges."""

    def __init__(self, score: str, softmax_over: str, **settings: Any) -> None:
        super().__init__()
        widths, edge_dim = {"a": 2, "b": 3}, {_RELATIONS[1]: 2}
        self.attention = HeterogeneousGraphAttention(
            4,
            2,
            in_features=widths,
            relations=_RELATIONS,
            score=score,  # pyright: ignore[reportArgumentType]
            softmax_over=softmax_over,  # pyright: ignore[reportArgumentType]
            edge_dim=edge_dim,
            **settings,
        )

    def forward(self, a: Tensor, b: Tensor, edges: Tensor) -> tuple[Tensor, ...]:
        result = self.attention({"a": a, "b": b}, TYPED_GRAPH, {_RELATIONS[1]: edges}, return_weights="heads")
        weights = [] if result.relation_weights is None else [torch.stack(list(result.relation_weights.values()))]
        return (*result.output.values(), *result.weights.values(), *weights)


def _typed(*settings: str, **more: Any) -> Callable[[], Subject]:
    return module(lambda: Typed(*settings, **more), {"a": random(5, 2), "b": random(3, 3), "edges": random(9, 2)})


def _plain(function: Callable[..., Any], **tensors: Tensor) -> Callable[[], Subject]:
    return lambda: Subject(lambda given: _finite(*_as_tuple(function(**given))), tensors)


def _as_tuple(found: Any) -> tuple[Tensor | None, ...]:
    if isinstance(found, AttentionResult):
        return found.output, found.weights, found.logsumexp
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _merged(query: Tensor, key: Tensor, value: Tensor) -> AttentionResult:
    parts = [(key[:, :2], value[:, :2]), (key[:, 2:], value[:, 2:])]
    return merge([attend(query, *part, return_logsumexp=True) for part in parts])


def _with_features(query: Tensor, key: Tensor, value: Tensor, features: Tensor, vector: Tensor) -> AttentionResult:
    """Values that are keys, no batch axis, and features of edges for both."""
    weight = torch.ones(2, 2, 3, dtype=_F64)
    edges = EdgeFeatures(features, weight, weight)
    return attend(query, key, key + value, GRAPH, score=Dynamic(vector), edges=edges, return_weights="heads")


OPERATIONS: dict[str, Callable[[], Subject]] = {
    "edge_dot": _plain(lambda query, key: edge_dot(query, key, GRAPH), query=random(4, 2, 3), key=random(5, 1, 3)),
    "edge_sum": _plain(
        lambda weights, value: edge_sum(weights, value, GRAPH), weights=random(8, 2), value=random(5, 1, 3)
    ),
    "edge_softmax": _plain(lambda scores: edge_softmax(scores, GRAPH), scores=random(2, 8, 2)),
    "merge": _plain(_merged, query=random(1, 3, 2, 2), key=random(1, 4, 2, 2), value=random(1, 4, 2, 2)),
    "graph": attention(GRAPH),
    "graph, additive": attention(GRAPH, "additive", batch=2, bias="e"),
    "graph, dynamic": attention(GRAPH, "dynamic", key_heads=1, mask="e"),
    "graph, features": attention(GRAPH, features="kv", return_weights="heads"),
    "graph, dynamic with features": _plain(
        _with_features,
        query=random(4, 2, 2),
        key=random(5, 2, 2),
        value=random(5, 2, 2),
        features=random(8, 3),
        vector=random(2, 2),
    ),
    "graph, maximum": attention(GRAPH, aggregation="max"),
    "graph, sinks": attention(GRAPH, "additive", denominator="sinks", return_weights="heads"),
    "graph, gates": attention(GRAPH, aggregation="mean", denominator="gates", softcap=1.3, bias="eh"),
    "dense": attention(None, batch=2),
    "dense, torch": attention(None, batch=2, implementation="torch"),
    "dense, weights": attention(None, batch=1, return_weights="mean", bias="1hqk"),
    "dense, sinks": attention(Causal("top_left"), batch=1, denominator="sinks", mask="bhqk", return_weights="mean"),
    "causal": attention(Causal("bottom_right"), batch=1, mask="k", softcap=1.3),
    "window": attention(Window(1, 1, "top_left"), batch=2, key_heads=1, return_weights="heads"),
    "window, relative bias": attention(Window(2, 0), batch=1, lengths=(5, 5), bias="relative"),
    "window, bias of pairs": attention(Window(1, 1), batch=1, lengths=(5, 5), bias="1hqk"),
    "dense, relative bias": attention(None, batch=1, lengths=(5, 5), bias="relative"),
    "strided": attention(Strided(2, 0) & Causal(), batch=1, lengths=(5, 5)),
    "window, sinks": attention(Window(1, 0, "top_left"), batch=1, denominator="sinks", return_weights="heads"),
    "window over edges": attention(Window(1, 1), "dynamic", batch=1, lengths=(5, 5)),
    "top-k": attention(TopK(2), batch=1, return_weights="heads"),
    "top-k, sinks": attention(TopK(2), batch=1, denominator="sinks", return_weights="heads"),
    "top-k, bias": attention(TopK(2), batch=1, bias="k"),
}

_POINTS = {"x": random(5, 4), "positions": random(5, 3)}
_CLOUD = {"positions": _POINTS["positions"], "features": _POINTS["x"]}
_ROWS = {"query": random(1, 4, 4)}
_EXPANDER = ExpanderGraph.from_graph(_PAIRS_OF_FIVE, 2, generator=torch.Generator().manual_seed(0))
_DISTANCES = torch.tensor([[0, 1, 2, 1, 3]]) + torch.arange(5)[:, None] - 2
_CELL = torch.eye(3, dtype=_F64) * 2.5
_SHIFTED = Graph.radius(_POINTS["positions"], 1.6, cell=_CELL).with_self_loops()

MODULES: dict[str, Callable[[], Subject]] = {
    "MultiHeadAttention": module(lambda: MultiHeadAttention(4, 2), _ROWS, return_weights=True),
    "MultiHeadAttention, causal": module(lambda: MultiHeadAttention(4, 2, causal=True), _ROWS),
    "MultiHeadAttention, rope": module(
        lambda: MultiHeadAttention(8, 2, num_kv_heads=1, positions="rope", softcap=3.0, kdim=4, vdim=3),
        {"query": random(2, 3, 8), "key": random(2, 5, 4), "value": random(2, 5, 3)},
        lengths=[5, 2],
        return_weights="heads",
    ),
    "MultiHeadAttention, alibi": module(
        lambda: MultiHeadAttention(4, 2, positions="alibi", pattern=Window(1, 1)),
        {"query": random(2, 4, 4)},
        key_mask=torch.tensor([[True, True, False, True], [False, True, True, True]]),
    ),
    "MultiHeadAttention, documents": module(
        lambda: MultiHeadAttention(4, 2, positions="learned", causal=True),
        {"query": random(2, 4, 4)},
        documents=[[1, 3], [2, 2]],
    ),
    "ScaledDotProductAttention": module(
        lambda: ScaledDotProductAttention(4, 2),
        {"query": random(2, 3, 4), "key": random(2, 5, 4), "value": random(2, 5, 4)},
    ),
    "SparseAttention, window": module(lambda: SparseAttention(4, 2, local_window=1), _ROWS),
    "SparseAttention, top-k": module(lambda: SparseAttention(4, 2, sparsity_pattern="top_k", top_k=2), _ROWS),
    "SparseAttention, top-k with weights": module(
        lambda: SparseAttention(4, 2, sparsity_pattern="top_k", top_k=2), _ROWS, return_weights=True
    ),
    "GraphAttention, additive": module(
        lambda: GraphAttention(4, 2, residual=True), {"x": random(5, 4)}, graph=_EDGE_INDEX
    ),
    "GraphAttention, dynamic": module(
        lambda: GraphAttention(4, 2, score="dynamic", edge_dim=2),
        {"x": random(5, 4), "edge_attr": random(9, 2)},
        graph=_EDGE_INDEX,
        return_weights="heads",
    ),
    "GraphAttention, dot": module(lambda: GraphAttention(4, 2, score="dot"), {"x": random(5, 4)}, graph=_PAIRS_OF_FIVE),
    "GraphTransformerLayer, graph": module(
        lambda: GraphTransformerLayer(4, 2, edge_dim=2, hidden_features=3),
        {"x": random(5, 4), "edge_attr": random(9, 2)},
        graph=_PAIRS_OF_FIVE,
        return_weights="heads",
    ),
    "GraphTransformerLayer, all": module(
        lambda: GraphTransformerLayer(4, 2, attention="all", max_distance=2, hidden_features=3),
        {"x": random(5, 4)},
        distances=_DISTANCES,
        return_weights=True,
    ),
    "GraphTransformerLayer, graph + all": module(
        lambda: GraphTransformerLayer(4, 2, attention="graph + all", score="additive", hidden_features=3),
        {"x": random(2, 5, 4)},
        graph=_EDGE_INDEX,
        sizes=[2, 3],
    ),
    "GraphTransformerLayer, expander": module(
        lambda: GraphTransformerLayer(4, 2, attention="expander", edge_dim=1, hidden_features=3),
        {"x": random(6, 4), "edge_attr": random(9, 1)},
        graph=_EXPANDER,
        return_weights="heads",
    ),
    "MemoryAttention, dot": module(
        lambda: MemoryAttention(4, 2, value_dim=3, k=2, trainable=True, num_memories=5), {"x": random(3, 4)}
    ),
    "MemoryAttention, euclidean": module(
        lambda: MemoryAttention(4, 2, value_dim=3, k=2, measure="euclidean", trainable=True, num_memories=5),
        {"x": random(3, 4)},
        "memory_forward",
    ),
    "MemoryAttention, cosine": module(
        lambda: MemoryAttention(4, 1, value_dim=3, k=2, measure="cosine", project=False),
        {"x": random(3, 4), "keys": random(5, 4), "values": random(5, 3)},
        exclude=torch.tensor([0, -1, 4]),
    ),
    "HeterogeneousGraphAttention, dot": _typed("dot", "node", residual=True),
    "HeterogeneousGraphAttention, additive": _typed("additive", "relation"),
    "HeterogeneousGraphAttention, dynamic": _typed("dynamic", "node", concat=False),
    "DistanceAttention": module(lambda: DistanceAttention(4, 2), _POINTS, return_weights=True),
    "DistanceAttention, radius": module(lambda: DistanceAttention(4, 2, radius=1.9), _POINTS, return_weights=True),
    "DistanceAttention, graph": module(lambda: DistanceAttention(4, 2, radius=3.0), _POINTS, graph=_PAIRS_OF_FIVE),
    "DistanceAttention, cell": module(
        lambda: DistanceAttention(4, 2, radius=1.6), {**_POINTS, "cell": _CELL}, graph=_SHIFTED
    ),
    "DistanceAttention, positions to points": module(
        lambda: DistanceAttention(4, 2, radius=1.9),
        {"query_pos": random(3, 3), "key_pos": random(5, 3), "features": random(5, 4)},
        "geometric_forward",
    ),
    "DistanceAttention, its own graph": module(
        lambda: DistanceAttention(4, 2), _CLOUD, "distance_attention", radius=1.9
    ),
    "EquivariantAttention": module(
        lambda: EquivariantAttention(4, 2), {**_POINTS, "vectors": random(5, 2, 3)}, "equivariant_forward"
    ),
    "EquivariantAttention, radius": module(
        lambda: EquivariantAttention(4, 2, radius=1.9), _POINTS, "equivariant_forward"
    ),
    "EquivariantAttention, its own graph": module(
        lambda: EquivariantAttention(4, 2, radius=1.9), _CLOUD, "distance_attention", radius=1.9
    ),
}

SUBJECTS = {**OPERATIONS, **MODULES}

_FORCED = "implementation='torch' cannot run this call"
_SPARSE = "weights as a sparse tensor"
# What is refused, with the error that says so, under forward derivatives and where the inputs are mapped.
REFUSED_FORWARD = {
    "dense, torch": _FORCED,
    "SparseAttention, top-k with weights": _SPARSE,
    "DistanceAttention, its own graph": _SPARSE,
    "EquivariantAttention, its own graph": _SPARSE,
}
REFUSED_MAPPED = {
    "dense, torch": _FORCED,
    "SparseAttention, top-k with weights": _SPARSE,
    "DistanceAttention, its own graph": "neighbours under vmap",
    "EquivariantAttention, its own graph": "neighbours under vmap",
}
# And under any transform of torch.func.
REFUSED_TRANSFORMED = {"dense, torch": _FORCED}
