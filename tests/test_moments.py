"""Nothing depends on the moment it is made in, or remembers it.

Each public function and module is called under each state that PyTorch may be in, with the caches empty and with the
caches filled by a plain call: the outcome is the same, and plain calls afterwards give what they gave before.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from subjects import Typed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

import anyattention
from anyattention import (
    Blocks,
    Causal,
    Documents,
    Dynamic,
    ExpanderGraph,
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
    edge_dot,
    edge_softmax,
    edge_sum,
    encodings,
    explain,
    geometry,
    mask_from_blocked,
    merge,
)
from anyattention.ambient import Moment, moment_of
from anyattention.nn import (
    DistanceAttention,
    EquivariantAttention,
    GraphAttention,
    GraphTransformerLayer,
    MemoryAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
    SparseAttention,
)
from anyattention.ops.dense import api
from anyattention.ops.edges import arrays

_EDGES = torch.tensor([[0, 1, 3, 3, 0, 4, 4, 0, 2], [0, 0, 2, 2, 3, 3, 0, 2, 4]])


def graph() -> Graph:
    return Graph.from_edge_index(_EDGES, num_nodes=5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Subject:
    """A function and its arguments: tensors, and Graphs of them."""

    of: Callable[..., Any]
    inputs: tuple[Any, ...] = ()

    def __call__(self) -> Any:
        return results_of(self.of(*self.inputs))


def results_of(found: Any) -> list[Any]:
    """The tensors and numbers of a result; a Graph's are its fields."""
    if isinstance(found, RelativeBias):
        return [found.numbers]
    if hasattr(found, "implementation"):
        return [found.implementation, found.refusals, found.notes]
    if isinstance(found, geometry.Neighbours | geometry.PrincipalComponents):
        found = tuple(found)
    return [
        x.to_dense() if isinstance(x, Tensor) and x.layout is not torch.strided else x
        for x in tree_leaves(found)
        if x is not None
    ]


def rows_of(*shape: int) -> list[Tensor]:
    """Query, key and value."""
    return [random(*shape, seed=seed) for seed in range(3)]


def attending(pattern: Any, **settings: Any) -> Subject:
    return Subject(lambda *given: attend(*given, pattern, **settings), tuple(rows_of(1, 6, 2, 4)))


def on_graph(**settings: Any) -> Subject:
    return Subject(lambda made, *given: attend(*given, made, **settings), (graph(), *rows_of(5, 2, 4)))


def module(make: Callable[[], nn.Module], *inputs: Any, method: str = "forward", **settings: Any) -> Subject:
    torch.manual_seed(1)
    layer = make().eval()

    def of(state: dict[str, Tensor], *given: Any) -> Any:
        def call(*args: Any) -> Any:
            return getattr(layer, method)(*args, **settings)

        # `functional_call` calls the module; another method is called in its place.
        layer.forward = call if method != "forward" else type(layer).forward.__get__(layer)
        try:
            return torch.func.functional_call(layer, state, given)
        finally:
            del layer.forward

    return Subject(of, (dict(layer.named_parameters()) | dict(layer.named_buffers()), *inputs))


_PATTERNS: dict[str, Callable[[], Pattern]] = {
    "Full": Full,
    "Causal": Causal,
    "Window": lambda: Window(1, 1),
    "Strided": lambda: Strided(2, 1),
    "Fixed": lambda: Fixed(2, 1),
    "Global": lambda: Global(2),
    "Documents": lambda: Documents((2, 4)),
    "Blocks": lambda: Blocks(torch.tensor([[True, False, True], [True, True, False], [False, True, True]]), 2),
    "RandomBlocks": lambda: RandomBlocks(1, seed=1, size=2),
    "Intersection": lambda: Strided(2, 1) & Causal(),
    "Union": lambda: Window(1, 0) | Global(1),
}
_POINTS = random(7, 3)
_CLOUD = torch.tensor([0, 0, 0, 0, 1, 1, 1])
_CELL = torch.diag(torch.tensor([4.0, 5.0, 6.0]))
_SUBJECTS: dict[str, Callable[[], Subject]] = {
    "attend": lambda: attending(None),
    "attend weights": lambda: attending(Causal(), return_weights="heads", return_logsumexp=True),
    "attend torch": lambda: attending(Causal(), implementation="torch"),
    "attend reference": lambda: attending(Causal(), implementation="reference"),
    "attend relative bias": lambda: Subject(
        lambda numbers, *rows: attend(*rows, Window(2, 2), bias=RelativeBias(numbers, -2)),
        (random(2, 5), *rows_of(1, 6, 2, 4)),
    ),
    "attend graph implementation": lambda: attending(Window(1, 1), implementation="graph", return_weights=True),
    "attend sparse weights": lambda: attending(Window(1, 1), return_weights="heads"),
    "attend sinks": lambda: Subject(
        lambda sinks, *rows: attend(*rows, Causal(), sinks=sinks, return_weights=True, return_logsumexp=True),
        (random(2), *rows_of(1, 6, 2, 4)),
    ),
    "attend Graph sinks": lambda: Subject(
        lambda made, sinks, *rows: attend(*rows, made, sinks=sinks, return_weights="heads"),
        (graph(), random(2), *rows_of(5, 2, 4)),
    ),
    "attend TopK": lambda: attending(TopK(2)),
    "attend TopK among": lambda: attending(TopK(2, among=Causal())),
    "attend Graph": on_graph,
    "attend Graph weights": lambda: on_graph(return_weights="heads", return_logsumexp=True),
    "attend Graph mean": lambda: on_graph(aggregation="mean"),
    "attend Graph maximum": lambda: on_graph(aggregation="max"),
    "attend Graph Dynamic": lambda: Subject(
        lambda made, vector, *rows: attend(*rows, made, score=Dynamic(vector)),
        (graph(), random(2, 4, seed=3), *rows_of(5, 2, 4)),
    ),
    **{f"attend {name}": partial(lambda make: attending(make()), make) for name, make in _PATTERNS.items()},
    "explain": lambda: Subject(lambda x: explain(x, x, x, Window(1, 1)), (random(1, 6, 2, 4),)),
    "explain graph": lambda: Subject(
        lambda x: explain(x, x, x, Window(1, 1), implementation="graph"), (random(1, 6, 2, 4),)
    ),
    "merge": lambda: Subject(
        lambda x, y: merge([attend(x, x, x, return_logsumexp=True), attend(x, y, y, return_logsumexp=True)]),
        (random(1, 6, 2, 4), random(1, 3, 2, 4, seed=1)),
    ),
    "edge_dot": lambda: Subject(lambda made, x: edge_dot(x, x, made), (graph(), random(5, 2, 4))),
    "edge_sum": lambda: Subject(
        lambda made, weights, x: edge_sum(weights, x, made), (graph(), random(9, 2), random(5, 2, 4))
    ),
    "edge_softmax": lambda: Subject(lambda made, x: edge_softmax(x, made), (graph(), random(9, 2))),
    "mask_from_blocked": lambda: Subject(mask_from_blocked, (torch.tensor([0, 1, 0]),)),
    "RelativeBias.to_dense": lambda: Subject(lambda x: RelativeBias(x, -1).to_dense(3, 3), (random(2, 3),)),
    "Graph.from_edge_index": lambda: Subject(lambda x: Graph.from_edge_index(x, num_nodes=5), (_EDGES,)),
    "Graph.of_known": lambda: Subject(lambda x: Graph.of_known(x, 5, 5), (_EDGES,)),
    "Graph.from_rows": lambda: Subject(lambda x: Graph.from_rows(x, 5), (_EDGES.T,)),
    "Graph.all_pairs": lambda: Subject(lambda: Graph.all_pairs(2, 3)),
    "Graph.from_adjacency": lambda: Subject(Graph.from_adjacency, (random(3, 4).relu(),)),
    "Graph.from_adjacency sparse": lambda: Subject(
        lambda x: Graph.from_adjacency(x.to_sparse()), (random(3, 4).relu(),)
    ),
    "Graph.from_adjacency numpy": lambda: Subject(partial(Graph.from_adjacency, random(3, 4).relu().numpy())),
    "Graph.batch": lambda: Subject(lambda made: Graph.batch([made, made]), (graph(),)),
    "Graph.batch none": lambda: Subject(lambda: Graph.batch([])),
    "Graph.with_self_loops": lambda: Subject(lambda made: made.with_self_loops(), (graph(),)),
    "Graph.edges_as_keys": lambda: Subject(lambda made: made.edges_as_keys(), (graph(),)),
    "Graph.to_dense": lambda: Subject(lambda made: made.to_dense(), (graph(),)),
    "Graph.displacements": lambda: Subject(lambda made, x: made.displacements(x), (graph(), _POINTS[:5])),
    "Graph.radius": lambda: Subject(lambda x: Graph.radius(x, 1.5), (_POINTS,)),
    "Graph.radius clouds": lambda: Subject(lambda x, batch: Graph.radius(x, 1.5, batch), (_POINTS, _CLOUD)),
    "Graph.radius cell": lambda: Subject(lambda x, cell: Graph.radius(x, 2.0, cell=cell), (_POINTS, _CELL)),
    "Graph.radius queries": lambda: Subject(lambda x: Graph.radius(x, 1.5, queries=x[:3]), (_POINTS,)),
    "Graph.radius none": lambda: Subject(lambda x: Graph.radius(x[:0], 1.5), (_POINTS,)),
    "Graph.nearest": lambda: Subject(lambda x: Graph.nearest(x, 2), (_POINTS,)),
    "Graph.nearest clouds": lambda: Subject(lambda x, batch: Graph.nearest(x, 2, batch), (_POINTS, _CLOUD)),
    "Graph.nearest cell": lambda: Subject(lambda x, cell: Graph.nearest(x, 2, cell=cell), (_POINTS, _CELL)),
    "radius_neighbours": lambda: Subject(lambda x: geometry.radius_neighbours(x, 1.5), (_POINTS,)),
    "nearest_neighbours": lambda: Subject(lambda x: geometry.nearest_neighbours(x, 2), (_POINTS,)),
    "principal_components": lambda: Subject(lambda x: geometry.principal_components(x, 2), (_POINTS,)),
    "edge_displacements": lambda: Subject(
        lambda edges, x: geometry.edge_displacements(edges, 5, 5, x), (_EDGES, _POINTS[:5])
    ),
    "random_orthogonal": lambda: Subject(
        lambda: geometry.random_orthogonal(2, 3, generator=torch.Generator().manual_seed(0))
    ),
    "safe_distance": lambda: Subject(lambda x: geometry.safe_distance(x, 0.5), (random(5).abs(),)),
    "gaussian_basis": lambda: Subject(lambda x: geometry.gaussian_basis(x, 2.0, 3), (random(5).abs(),)),
    "bessel_basis": lambda: Subject(lambda x: geometry.bessel_basis(x, 2.0, 3), (random(5).abs(),)),
    "cutoff_envelope": lambda: Subject(lambda x: geometry.cutoff_envelope(x, 2.0), (random(5).abs(),)),
    "log_cutoff_envelope": lambda: Subject(lambda x: geometry.log_cutoff_envelope(x, 2.0), (random(5).abs(),)),
    **{
        f"{name}.{method}": partial(
            lambda make, of: Subject(partial(of, make())),
            make,
            {
                "to_dense": lambda pattern: pattern.to_dense(6, 6),
                "to_graph": lambda pattern: pattern.to_graph(6, 6),
                "to_blocks": lambda pattern: pattern.to_blocks(2, 6, 6),
                "density": lambda pattern: (pattern.density(6), pattern.max_attended(6)),
            }[method],
        )
        for name, make in _PATTERNS.items()
        for method in ("to_dense", "to_graph", "to_blocks", "density")
    },
    "TopK.density": lambda: Subject(lambda: (TopK(2, Causal()).density(6), TopK(2, Causal()).max_attended(6))),
    "ScaledDotProductAttention": lambda: module(lambda: ScaledDotProductAttention(8, 2), random(1, 6, 8)),
    "MultiHeadAttention": lambda: module(
        lambda: MultiHeadAttention(8, 2, positions="sinusoidal", max_seq_len=9), random(1, 6, 8)
    ),
    "MultiHeadAttention pattern": lambda: module(
        lambda: MultiHeadAttention(8, 2), random(1, 6, 8), pattern=Window(1, 1)
    ),
    "SparseAttention": lambda: module(lambda: SparseAttention(8, 2), random(1, 6, 8)),
    "GraphAttention": lambda: module(lambda: GraphAttention(8, 2), random(5, 8), _EDGES),
    "GraphAttention Graph": lambda: module(lambda: GraphAttention(8, 2), random(5, 8), graph()),
    "degrees": lambda: Subject(encodings.degrees, (graph(),)),
    "hop_distances": lambda: Subject(lambda of: encodings.hop_distances(of, 2), (graph(),)),
    "laplacian_eigenvectors": lambda: Subject(lambda of: tuple(encodings.laplacian_eigenvectors(of, 2)), (graph(),)),
    "random_signs": lambda: Subject(
        lambda x: encodings.random_signs(x, generator=torch.Generator("cpu").manual_seed(0)), (random(5, 2),)
    ),
    "random_walk_probabilities": lambda: Subject(lambda of: encodings.random_walk_probabilities(of, 3), (graph(),)),
    "Graph.expander": lambda: Subject(
        lambda: Graph.expander(5, 2, generator=torch.Generator("cpu").manual_seed(0)),
    ),
    "Graph.reorder": lambda: Subject(lambda of: of.reorder("rcm")[0], (graph(),)),
    "ExpanderGraph": lambda: Subject(
        lambda of: ExpanderGraph.from_graph(of, 2, generator=torch.Generator("cpu").manual_seed(0)).graph, (graph(),)
    ),
    "GraphTransformerLayer": lambda: module(
        lambda: GraphTransformerLayer(8, 2, attention="graph + all"), random(5, 8), graph()
    ),
    "MemoryAttention": lambda: module(
        lambda: MemoryAttention(8, 2, k=2, measure="euclidean", trainable=True, num_memories=5), random(1, 6, 8)
    ),
    "HeterogeneousGraphAttention": lambda: module(
        lambda: Typed("dot", "relation"), random(5, 2), random(3, 3), random(9, 2)
    ),
    "DistanceAttention": lambda: module(lambda: DistanceAttention(8, 2), random(7, 8), _POINTS),
    "DistanceAttention radius": lambda: module(
        lambda: DistanceAttention(8, 2, radius=1.5), _POINTS, random(7, 8), method="distance_attention", radius=1.5
    ),
    "EquivariantAttention": lambda: module(
        lambda: EquivariantAttention(8, 2), random(7, 8), _POINTS, method="equivariant_forward"
    ),
}


def caches() -> list[Any]:
    """Whatever the package's operations keep results in."""
    found = []
    for name, loaded in sorted(sys.modules.items()):
        if name.startswith("anyattention.ops"):
            each = list(vars(loaded).values())
            each += [x.__wrapped__ for x in each if hasattr(x, "__wrapped__")]
            found += [x for x in each if hasattr(x, "cache_clear")]
    return found


def empty_caches() -> None:
    for each in caches():
        each.cache_clear()
    arrays._kept.clear()
    api._kept.clear()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def within(state: Callable[[], Any]) -> Callable[[Subject], Any]:
    def run(subject: Subject) -> Any:
        with state():
            return subject()

    return run


def inference_inputs(subject: Subject) -> Any:
    with torch.inference_mode():
        return Subject(subject.of, tree_map_only(Tensor, torch.clone, subject.inputs))()


def fake(subject: Subject) -> Any:
    with FakeTensorMode() as mode:
        return Subject(subject.of, tree_map_only(Tensor, mode.from_tensor, subject.inputs))()


def traced(subject: Subject, kind: str) -> Any:
    numbers: list[Any] = []

    def of(*inputs: Any) -> Any:
        found = results_of(subject.of(*inputs))
        numbers[:] = [None if isinstance(x, Tensor) else x for x in found]
        return [x for x in found if isinstance(x, Tensor)]

    tensors = iter(make_fx(of, tracing_mode=kind)(*subject.inputs)(*subject.inputs))
    return [next(tensors) if x is None else x for x in numbers]


def floating(subject: Subject) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The subject as a function of its floating tensors."""
    leaves = tree_leaves(subject.inputs)
    places = [n for n, x in enumerate(leaves) if x is not None and x.is_floating_point()]

    def of(*floats: Tensor) -> Any:
        given = dict(zip(places, floats, strict=True))
        count = iter([n for n, x in enumerate(leaves) if x is not None])

        def put(x: Tensor) -> Tensor:
            return given.get(next(count), x)

        found = results_of(subject.of(*tree_map_only(Tensor, put, subject.inputs)))
        return tuple(x for x in found if isinstance(x, Tensor) and x.is_floating_point()), found

    return of, tuple(leaves[n].detach() for n in places)


def transformed(subject: Subject) -> Any:
    of, floats = floating(subject)
    return list(torch.func.vjp(of, *floats, has_aux=True)[2])


def tangents(subject: Subject) -> Any:
    of, floats = floating(subject)
    if not floats:
        return subject()
    return list(torch.func.jvp(of, floats, floats, has_aux=True)[2])


def mapped(subject: Subject) -> Any:
    of, floats = floating(subject)
    if not floats:
        return subject()
    mapped = iter(torch.func.vmap(lambda *x: of(*x)[0])(*[x[None] for x in floats]))
    floating_results = [isinstance(x, Tensor) and x.is_floating_point() for x in subject()]
    return [next(mapped)[0] if is_floating else x for x, is_floating in zip(subject(), floating_results, strict=True)]


def compiled(subject: Subject) -> Any:
    torch.compiler.reset()
    return results_of(torch.compile(subject.of, backend="eager")(*subject.inputs))


def exported(subject: Subject) -> Any:
    class Whole(nn.Module):
        def forward(self, *inputs: Any) -> Any:
            return subject.of(*inputs)

    return results_of(torch.export.export(Whole(), subject.inputs).module()(*subject.inputs))


# Under these every call runs, and gives what it gives elsewhere.
_HARMLESS = {
    "no_grad": within(torch.no_grad),
    "inference mode": within(torch.inference_mode),
    "tensors of inference mode": inference_inputs,
    "default device": within(lambda: torch.device("meta")),
    "default dtype float64": within(lambda: default_dtype(torch.float64)),
    "default dtype float16": within(lambda: default_dtype(torch.float16)),
}
# Under these a call may refuse, and says so; it does not matter what was called before.
_LOOKING = {
    "fake tensors": fake,
    "make_fx": partial(traced, kind="real"),
    "make_fx fake": partial(traced, kind="fake"),
    "make_fx symbolic": partial(traced, kind="symbolic"),
    "torch.func.vjp": transformed,
    "torch.func.jvp": tangents,
    "torch.func.vmap": mapped,
}
_SLOW = {"torch.compile": compiled, "torch.export": exported}
_STATES = _HARMLESS | _LOOKING | _SLOW
# Each takes a second.
_COMPILED = ("attend", "attend Causal", "attend Window", "attend TopK", "attend Graph", "edge_sum")
_QUICK = ("inference mode", "default device", "default dtype float64", "fake tensors")
# What runs under each mode, too. The others read numbers to decide a shape, and under transforms some have no rule.
_RUNS_TRACED = ("attend", "explain", "merge", "edge_", "Scaled", "Multi", "Sparse", "GraphAttention Graph")


# PyTorch's own: a trace draws anew, and a fake sparse matrix has no entries.
_DIFFERS = {"make_fx": ("random_orthogonal", "random_signs"), "fake tensors": ("Graph.from_adjacency sparse",)}


def outcome_of(run: Callable[[Subject], Any], subject: Subject) -> Any:
    """The results, or the error's type."""
    try:
        return run(subject)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as refusal:
        return refusal


def assert_same(found: Any, expected: Any, *, is_fake: bool = False) -> None:
    if isinstance(expected, Exception):
        assert type(found) is type(expected), (found, expected)
        return
    if isinstance(found, Exception):
        raise found
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        if not isinstance(y, Tensor):
            assert x == y
        elif is_fake:
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        else:
            torch.testing.assert_close(x.detach().clone(), y.detach().clone(), equal_nan=True)


def cases() -> Iterator[Any]:
    for state in _STATES:
        for name in _COMPILED if state in _SLOW else _SUBJECTS:
            marks = [pytest.mark.exhaustive] if state not in _QUICK else []
            yield pytest.param(state, name, marks=marks, id=f"{state}-{name}")


@pytest.mark.parametrize(("state", "name"), list(cases()))
def test_a_state_neither_breaks_a_call_nor_outlives_it(state: str, name: str) -> None:
    run, make = _STATES[state], _SUBJECTS[name]
    subject = make()
    empty_caches()
    expected = subject()
    later = outcome_of(run, subject)
    assert_same(subject(), expected)
    empty_caches()
    subject = make()
    first = outcome_of(run, subject)
    found = subject()
    assert_same(found, expected)
    # And with gradients, which save what inference mode must not have marked.
    for x in found:
        if isinstance(x, Tensor) and x.requires_grad:
            x.sum().backward(retain_graph=True)
    is_fake = state == "fake tensors"
    assert_same(later, first, is_fake=is_fake)
    must_run = state in _HARMLESS or (state.startswith(("fake", "make_fx")) and name.startswith(_RUNS_TRACED))
    if must_run or not (isinstance(first, Exception) or name in _DIFFERS.get(state, ())):
        assert_same(first, expected, is_fake=is_fake)


_MAKERS = tuple(
    f"Graph.{name}" for name in ("from", "of", "all", "batch", "with", "radius", "nearest", "expander", "reorder")
)


@pytest.mark.parametrize("state", _HARMLESS)
@pytest.mark.parametrize(
    "name", [name for name in _SUBJECTS if name.startswith(_MAKERS) or ".to_graph" in name if "sparse" not in name]
)
def test_a_graph_serves_any_call_whenever_it_was_made(state: str, name: str) -> None:
    made = _STATES[state](_SUBJECTS[name]())
    assert moment_of(made) is Moment.PLAIN
    assert all(x.is_cpu and not x.is_inference() for x in made)


def test_every_cache_is_emptied() -> None:
    names = {each.__name__ for each in caches()}
    assert names == {
        "_owner_of",
        "layout_of",
        "runs_of",
        "pairs_in_tiles",
        "_graph_fields",
        "_kept_run_part",
        "_intervals",
        "pattern_of",
    }


def test_every_public_function_and_module_is_here() -> None:
    public = {name for space in (anyattention, encodings, geometry) for name in space.__all__ if name.islower()}
    # A cache is what a moment leaves behind on purpose: tests/nn/test_key_value_cache.py.
    public |= {name for name in anyattention.nn.__all__ if name not in ("AttentionModule", "KeyValueCache")}
    missing = {name for name in public if not any(each.startswith(name) for each in _SUBJECTS)}
    assert missing <= {"encodings", "errors", "interfaces", "load", "nn", "save", "__version__"}


def test_a_graph_keeps_its_edges_when_the_caller_changes_them() -> None:
    edges, x = _EDGES.clone(), random(5, 2, 4).double().requires_grad_()
    made = Graph.from_edge_index(edges, num_nodes=5)

    def second() -> Tensor:
        (grad,) = torch.autograd.grad(attend(x, x, x, made).output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    expected = second()
    edges.zero_()
    empty_caches()
    assert torch.equal(second(), expected)
    assert torch.equal(made.edge_index, _EDGES)
