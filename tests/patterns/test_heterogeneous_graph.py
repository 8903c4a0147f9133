"""HeterogeneousGraph: what it keeps, and its joint Graph against a loop over the edges."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.utils import _pytree
from torch_geometric.data import HeteroData

from anyattention import Graph, HeterogeneousGraph
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError

COUNTS = {"a": 3, "b": 5, "none": 0, "c": 2}
EDGES = {
    ("b", "to", "a"): torch.tensor([[0, 4, 4], [2, 0, 0]]),
    ("a", "to", "b"): torch.tensor([[2, 0], [4, 4]]),
    ("b", "of", "a"): torch.tensor([[1], [1]]),
    ("a", "to", "c"): torch.zeros(2, 0, dtype=torch.int64),
    ("b", "to", "b"): torch.tensor([[3, 2, 0, 3], [3, 1, 0, 2]]),
}


@pytest.fixture
def graph():
    return HeterogeneousGraph.from_edge_index(EDGES, COUNTS)


def rows(end, by_relation):
    """The row of each (type, node, relation), counted in the documented order."""
    found, row = {}, 0
    for kind, count in COUNTS.items():
        relations = [relation for relation in EDGES if relation[end] == kind]
        for node in range(count):
            for relation in relations:
                found[relation, node] = row
                row += by_relation
            row += bool(relations) and not by_relation
    return found, row


@pytest.mark.parametrize("by_relation", [False, True])
def test_the_joint_graph_is_that_of_a_loop_over_the_edges(graph, by_relation):
    keys, num_keys = rows(0, True)
    queries, num_queries = rows(2, by_relation)
    expected = [
        (keys[relation, key], queries[relation, query])
        for relation, edges in EDGES.items()
        for key, query in edges.T.tolist()
    ]
    joint = graph.joint(by_relation=by_relation)
    assert joint.edge_index.T.tolist() == [list(pair) for pair in expected]
    assert (joint.num_keys, joint.num_queries) == (num_keys, num_queries)
    assert graph.joint(by_relation=by_relation) is joint
    built = Graph.from_edge_index(joint.edge_index, num_queries=num_queries, num_keys=num_keys)
    assert all(one.equal(other) for one, other in zip(vars(built).values(), vars(joint).values(), strict=True)
               if isinstance(one, torch.Tensor))  # fmt: skip


def test_what_a_graph_says_of_itself(graph):
    assert graph.node_types == ("a", "b", "none", "c")
    assert graph.relations == tuple(EDGES)
    assert graph.num_edges == 10
    assert graph.outgoing("b") == (("b", "to", "a"), ("b", "of", "a"), ("b", "to", "b"))
    assert graph.incoming("b") == (("a", "to", "b"), ("b", "to", "b"))
    assert (graph.outgoing("none"), graph.incoming("none")) == ((), ())
    assert repr(graph) == "HeterogeneousGraph(a=3, b=5, none=0, c=2, b-to-a=3, a-to-b=2, b-of-a=1, a-to-c=0, b-to-b=4)"
    one = graph["b", "to", "a"]
    assert (one.num_queries, one.num_keys, one.edge_index.tolist()) == (3, 5, [[0, 4, 4], [2, 0, 0]])
    with pytest.raises(GraphStructureError, match=r"relation: expected one of .*got \('b', 'new', 'a'\)"):
        graph["b", "new", "a"]
    parts = graph.by_relation(torch.arange(10))
    assert [part.tolist() for part in parts.values()] == [[0, 1, 2], [3, 4], [5], [], [6, 7, 8, 9]]


def test_the_callers_edges_may_change_afterwards():
    edges = {("a", "to", "a"): torch.tensor([[0], [1]])}
    graph = HeterogeneousGraph.from_edge_index(edges, {"a": 2})
    edges["a", "to", "a"].fill_(7)
    assert graph.joint().edge_index.tolist() == [[0], [1]]


def test_heterodata():
    data = HeteroData()
    data["a"].x = torch.ones(3, 2)
    data["b"].num_nodes = 5
    data["b", "to", "a"].edge_index = EDGES["b", "to", "a"]
    graph = HeterogeneousGraph.from_data(data)
    assert dict(graph.num_nodes) == {"a": 3, "b": 5}
    assert graph.edge_index["b", "to", "a"].equal(EDGES["b", "to", "a"])
    data["a", "to", "b"].adj_t = torch.eye(3)
    with pytest.raises(
        InvalidInputError, match=r"data: expected an edge_index of each relation, got none of \('a', 'to'"
    ):
        HeterogeneousGraph.from_data(data)
    with pytest.raises(InvalidInputError, match="data: expected a HeteroData, got dict"):
        HeterogeneousGraph.from_data({})


def test_reverse_relations(graph):
    both = graph.with_reverse("back_")
    assert both.relations[5:] == tuple((target, f"back_{name}", source) for source, name, target in EDGES)
    assert both.edge_index["a", "back_to", "b"].equal(EDGES["b", "to", "a"].flip(0))
    with pytest.raises(GraphStructureError, match="prefix: expected one that makes new names"):
        both.with_reverse("back_").with_reverse("back_")
    with pytest.raises(GraphStructureError, match="prefix"):
        HeterogeneousGraph.from_edge_index({("a", "to", "a"): torch.tensor([[0], [1]])}, {"a": 2}).with_reverse("")


def test_copies_pickles_trees_and_devices(graph):
    graph.joint()
    for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), copy.copy(graph)):
        assert twin.relations == graph.relations
        assert all(twin.edge_index[relation].equal(edges) for relation, edges in EDGES.items())
        assert twin.joint().edge_index.equal(graph.joint().edge_index)
    leaves, spec = _pytree.tree_flatten(graph)
    back = _pytree.tree_unflatten(leaves, spec)
    assert back.joint().edge_index.equal(graph.joint().edge_index)
    assert dict(back.num_nodes) == COUNTS
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec
    assert graph.to("cpu") is graph
    assert graph.to("meta").edge_index["b", "to", "a"].is_meta
    held = io.BytesIO()
    torch.save(graph, held)
    held.seek(0)
    with torch.serialization.safe_globals([HeterogeneousGraph]):
        assert torch.load(held, weights_only=True).relations == graph.relations


def test_a_pickle_that_was_changed_is_refused(graph):
    state = graph.__getstate__()
    state["edge_index"]["b", "to", "a"] = torch.tensor([[9], [0]])
    with pytest.raises(GraphStructureError, match=r"edge_index\[\('b', 'to', 'a'\)\].*indices from 0 to 4"):
        HeterogeneousGraph.__new__(HeterogeneousGraph).__setstate__(state)
    with pytest.raises(GraphStructureError, match="state: expected num_nodes, num_queries and edge_index, got list"):
        HeterogeneousGraph.__new__(HeterogeneousGraph).__setstate__([])


def test_built_under_inference_mode_and_trained_on():
    with torch.inference_mode():
        graph = HeterogeneousGraph.from_edge_index(EDGES, COUNTS)
        graph.joint()
    assert not graph.joint().edge_index.is_inference()
    assert not any(edges.is_inference() for edges in graph.edge_index.values())


def test_numpy_counts_are_numbers():
    graph = HeterogeneousGraph.from_edge_index(EDGES, {kind: np.int64(count) for kind, count in COUNTS.items()})
    assert all(type(count) is int for count in graph.num_nodes.values())


@pytest.mark.parametrize(
    ("error", "match", "edges", "counts"),
    [
        (GraphStructureError, r"edge_index\[\('a', 'to', 'b'\)\]: expected node types of num_nodes: 'a', got 'b'",
         {("a", "to", "b"): torch.tensor([[0], [0]])}, {"a": 1}),
        (GraphStructureError, r"edge_index\[\('a', 'to', 'a'\)\].*indices from 0 to 1",
         {("a", "to", "a"): torch.tensor([[2], [0]])}, {"a": 2}),
        (GraphStructureError, r"edge_index: expected relations .*got 'a'", {"a": torch.tensor([[0], [0]])}, {"a": 2}),
        (GraphStructureError, r"edge_index: expected relations .*got \('a', 'a'\)",
         {("a", "a"): torch.tensor([[0], [0]])}, {"a": 2}),
        (InvalidInputError, r"edge_index\[\('a', 'to', 'a'\)\].*torch.int32",
         {("a", "to", "a"): torch.tensor([[0], [0]], dtype=torch.int32)}, {"a": 2}),
        (DimensionMismatchError, r"edge_index\[\('a', 'to', 'a'\)\].*\(2, edges\)",
         {("a", "to", "a"): torch.zeros(3, 1, dtype=torch.int64)}, {"a": 2}),
        (InvalidInputError, "edge_index: expected a dictionary of edge lists", torch.zeros(2, 1), {"a": 2}),
        (GraphStructureError, "num_nodes: expected a dictionary of numbers", {}, 3),
        (GraphStructureError, "num_nodes: expected types named by strings, got 3", {}, {3: 3}),
        (GraphStructureError, r"num_nodes\['a'\]: expected an int >= 0.*got -1", {}, {"a": -1}),
        (GraphStructureError, r"num_nodes\['a'\]: expected an int >= 0.*got None", {}, {"a": None}),
    ],
)  # fmt: skip
def test_wrong_input_is_named(error, match, edges, counts):
    with pytest.raises(error, match=match):
        HeterogeneousGraph.from_edge_index(edges, counts)
