"""Graphs in files of torch.save: read in its safe mode, and checked, since a file can hold anything."""

import copy
import dataclasses
import io
import pickle
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import nn

from anyattention import Graph, attend
from anyattention.errors import AttentionError, DimensionMismatchError, GraphStructureError, InvalidInputError
from anyattention.nn import EquivariantAttention, GraphAttention, MultiHeadAttention, SparseAttention

_EDGES = torch.tensor([[1, 2, 0, 4, 1], [0, 2, 3, 3, 0]])
_ARRAYS = [item.name for item in dataclasses.fields(Graph)][:7]


def _graph() -> Graph:
    graph = Graph.from_edge_index(
        _EDGES,
        num_queries=4,
        num_keys=5,
        values=torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0]),
        shifts=torch.arange(10).reshape(5, 2),
    )
    return dataclasses.replace(graph, search_radius=1.5)


def _read(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    with torch.serialization.safe_globals([Graph]):
        return torch.load(file, weights_only=True)


def _assert_same(found: Graph, graph: Graph) -> None:
    for item in dataclasses.fields(Graph):
        ours, theirs = getattr(found, item.name), getattr(graph, item.name)
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs, item.name


@pytest.mark.parametrize("graph", [_graph(), Graph.from_edge_index(_EDGES, 5), Graph.batch([])], ids=str)
def test_a_saved_graph_is_the_graph(graph: Graph) -> None:
    found = _read({"graph": graph, "epoch": 3})
    _assert_same(found["graph"], graph)
    for copied in (copy.deepcopy(graph), copy.copy(graph), pickle.loads(pickle.dumps(graph))):
        _assert_same(copied, graph)


def test_graphs_of_every_constructor_pass_the_check(require: Any) -> None:
    require("vesin")
    points = torch.rand(20, 3)
    for graph in (
        Graph.radius(points, 0.6, cell=torch.eye(3)),
        Graph.radius(points, 0.4).with_self_loops(),
        Graph.nearest(points, 3),
        Graph.all_pairs(3, 4),
        Graph.from_rows(torch.tensor([[0, 0], [2, 1]]), 3),
        _graph().edges_as_keys(),
    ):
        _assert_same(_read(graph), graph)


def test_without_being_told_of_graphs_safe_mode_names_the_class() -> None:
    file = io.BytesIO()
    torch.save(_graph(), file)
    file.seek(0)
    # Told by other tests of this process.
    told = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(pickle.UnpicklingError, match=r"anyattention\.patterns\.graph\.Graph"):
            torch.load(file, weights_only=True)
    finally:
        torch.serialization.add_safe_globals(told)


@pytest.mark.parametrize(
    "module",
    [
        MultiHeadAttention(8, 2, positions="learned", max_seq_len=6, qk_norm=True),
        MultiHeadAttention(8, 2, pattern=_graph()),
        SparseAttention(8, 2),
        GraphAttention(8, 2, edge_dim=1, residual=True),
        EquivariantAttention(8, 2, radius=1.0),
    ],
    ids=lambda module: module.name,
)
def test_a_state_dict_is_read_in_safe_mode_as_it_is(module: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert found.keys() == module.state_dict().keys()
    module.load_state_dict(found)


def test_a_graph_of_a_file_written_before_graphs_had_a_radius() -> None:
    found = Graph.__new__(Graph)
    state = {name: part for name, part in vars(_graph()).items() if name != "search_radius"}
    found.__setstate__(state)
    _assert_same(found, dataclasses.replace(_graph(), search_radius=None))


def test_a_graph_on_meta_is_copied() -> None:
    assert copy.deepcopy(_graph().to("meta")).device.type == "meta"


def test_strided_arrays_are_laid_out_anew() -> None:
    graph = _graph()
    strided = dataclasses.replace(
        graph, **{name: getattr(graph, name).repeat_interleave(2, -1)[..., ::2] for name in _ARRAYS}
    )
    found = _read(strided)
    _assert_same(found, graph)
    assert all(getattr(found, name).is_contiguous() for name in _ARRAYS)


def _is_right(graph: Graph) -> bool:
    """The definition, edge by edge."""
    keys, queries = graph.edge_index.tolist()
    edges = range(len(keys))
    for ends, others, offsets, slots, order in (
        (queries, keys, graph.query_offsets, graph.keys_by_query, graph.edges_by_query),
        (keys, queries, graph.key_offsets, graph.queries_by_key, graph.edges_by_key),
    ):
        if sorted(order.tolist()) != list(edges):
            return False
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != len(keys) or sorted(bounds) != bounds:
            return False
        for row in range(len(bounds) - 1):
            for slot in range(bounds[row], bounds[row + 1]):
                edge = order.tolist()[slot]
                if ends[edge] != row or others[edge] != slots.tolist()[slot]:
                    return False
    return True


@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=300)
@hypothesis.given(
    strategies.sampled_from(_ARRAYS),
    strategies.integers(0, 9),
    strategies.one_of(strategies.integers(-2, 6), strategies.sampled_from([2**40, -(2**62)])),
)
def test_a_changed_index_is_refused_unless_it_is_right(name: str, place: int, number: int) -> None:
    graph = _graph()
    changed = getattr(graph, name).clone()
    changed.view(-1)[place % changed.numel()] = number
    changed = dataclasses.replace(graph, **{name: changed})
    if _is_right(changed):
        _read(changed)
    else:
        with pytest.raises(GraphStructureError):
            _read(changed)


@pytest.mark.parametrize("name", _ARRAYS)
@pytest.mark.parametrize(
    "wrong", [lambda x: x.int(), lambda x: x[None], lambda x: x[..., :-1], lambda x: x.to("meta"), lambda x: x.tolist()]
)
def test_arrays_of_another_kind_or_length_are_refused(name: str, wrong: Any) -> None:
    graph = _graph()
    with pytest.raises(AttentionError):
        _read(dataclasses.replace(graph, **{name: wrong(getattr(graph, name))}))


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("values", torch.ones(4), DimensionMismatchError),
        ("values", 1.0, InvalidInputError),
        ("shifts", torch.ones(5, 2), InvalidInputError),
        ("shifts", torch.ones(5, dtype=torch.int64), DimensionMismatchError),
        ("search_radius", -1.0, InvalidInputError),
        ("search_radius", float("inf"), InvalidInputError),
        ("search_radius", "far", InvalidInputError),
    ],
)
def test_values_shifts_and_radius_are_checked(name: str, wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{name}: expected"):
        _read(dataclasses.replace(_graph(), **{name: wrong}))


@pytest.mark.parametrize(
    "state",
    [None, [1, 2], {}, {"edge_index": _EDGES}, {**vars(_graph()), "more": 1}, {**vars(_graph()), 3: 1}],
    ids=lambda state: type(state).__name__,
)
def test_other_fields_are_refused(state: Any) -> None:
    with pytest.raises(
        GraphStructureError, match="state: expected a dictionary of the fields edge_index, query_offsets"
    ):
        Graph.__new__(Graph).__setstate__(state)


def test_a_read_graph_computes_what_the_graph_does() -> None:
    graph = Graph.from_edge_index(_EDGES, 5)
    x = torch.randn(5, 2, 3)
    assert torch.equal(attend(x, x, x, _read([graph])[0]).output, attend(x, x, x, graph).output)
