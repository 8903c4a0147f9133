"""Random regular graphs, and graphs that are joined by them and by virtual nodes."""

import copy
import pickle

import networkx
import numpy
import pytest
import torch
from torch.utils import _pytree

from anyattention import ExpanderGraph, Graph
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError

EDGE_INDEX = torch.tensor([[0, 0, 1, 2, 5, 6], [1, 2, 2, 2, 6, 4]])
SIZES = (3, 0, 1, 4)
GRAPH = Graph.from_edge_index(EDGE_INDEX, num_nodes=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestRegular:
    @pytest.mark.parametrize("degree", [2, 4, 6])
    @pytest.mark.parametrize("nodes", [2, 3, 5, 11, 100])
    def test_each_node_has_as_many_edges_each_way(self, nodes: int, degree: int) -> None:
        graph = Graph.expander(nodes, degree, generator=seeded())
        for offsets in (graph.query_offsets, graph.key_offsets):
            assert (offsets.diff() == degree).all()
        assert not (graph.key_index == graph.query_index).any()
        pairs = sorted(map(tuple, graph.edge_index.T.tolist()))
        assert pairs == sorted(map(tuple, graph.edge_index.flip(0).T.tolist()))

    def test_each_pair_of_edges_is_a_cycle_through_all_nodes(self) -> None:
        graph = Graph.expander(11, 6, generator=seeded())
        for part in graph.edge_index.split(22, dim=1):
            made = networkx.Graph(part.T.tolist())
            assert networkx.is_isomorphic(made, networkx.cycle_graph(11))

    def test_graphs_of_a_batch_have_cycles_of_their_own(self) -> None:
        graph = Graph.expander(8, 4, sizes=SIZES, generator=seeded())
        of_node = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3])
        assert torch.equal(of_node[graph.key_index], of_node[graph.query_index])
        assert graph.query_offsets.diff().tolist() == [4, 4, 4, 0, 4, 4, 4, 4]

    def test_a_generator_decides(self) -> None:
        first, again, other = (Graph.expander(100, 4, generator=seeded(seed)).edge_index for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        torch.manual_seed(5)
        drawn = Graph.expander(100, 4).edge_index
        torch.manual_seed(5)
        assert torch.equal(drawn, Graph.expander(100, 4).edge_index)

    def test_every_cycle_is_equally_likely(self) -> None:
        """Four nodes have three; chi-squared with 2 degrees of freedom is below 13.8 in 999 of 1,000 cases."""
        generator, counts = seeded(), [0, 0, 0]
        for _ in range(600):
            edges = Graph.expander(4, 2, generator=generator).edge_index.T.tolist()
            (opposite,) = {1, 2, 3} - {key for key, query in edges if query == 0}
            counts[opposite - 1] += 1
        assert sum((count - 200) ** 2 / 200 for count in counts) < 13.8

    def test_it_expands(self) -> None:
        """The second eigenvalue of random regular graphs is near 2 sqrt(degree - 1)."""
        graph = Graph.expander(400, 6, generator=seeded())
        matrix = torch.zeros(400, 400, dtype=torch.float64)
        matrix.index_put_(tuple(graph.edge_index), torch.tensor(1.0, dtype=torch.float64), accumulate=True)
        assert torch.linalg.eigvalsh(matrix)[-2] < 1.05 * 2 * 5**0.5

    @pytest.mark.parametrize("nodes", [0, 1])
    def test_too_few_nodes_for_a_cycle(self, nodes: int) -> None:
        assert Graph.expander(nodes, 4).num_edges == 0

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(InvalidInputError, match=r"degree: expected an even int.*got 3"):
            Graph.expander(5, 3)
        with pytest.raises(InvalidInputError, match="degree: expected an int of at least 2, got 0"):
            Graph.expander(5, 0)
        with pytest.raises(InvalidInputError, match="num_nodes: expected an int of at least 0, got -1"):
            Graph.expander(-1, 2)
        with pytest.raises(InvalidInputError, match=r"generator: expected a torch.Generator of the CPU, or None"):
            Graph.expander(5, 2, generator=7)  # pyright: ignore[reportArgumentType]
        with pytest.raises(DimensionMismatchError, match="sizes: expected numbers that add up to the 5 nodes, got 4"):
            Graph.expander(5, 2, sizes=[4])


class TestJoined:
    def test_edges_stand_by_their_kind(self) -> None:
        made = ExpanderGraph.from_graph(GRAPH, 2, num_virtual_nodes=2, sizes=SIZES, generator=seeded())
        assert made.edge_counts == (6, 14, 16, 16)
        assert (made.num_nodes, made.graph.num_queries, made.graph.num_keys) == (8, 16, 16)
        own, regular, into, out = made.graph.edge_index.split(made.edge_counts, dim=1)
        assert torch.equal(own, EDGE_INDEX)
        assert torch.equal(regular, Graph.expander(8, 2, sizes=SIZES, generator=seeded()).edge_index)
        of_node = [0, 0, 0, 2, 3, 3, 3, 3]
        pairs = {(node, 8 + 2 * graph + place) for node, graph in enumerate(of_node) for place in range(2)}
        assert set(map(tuple, into.T.tolist())) == pairs
        assert torch.equal(out, into.flip(0))

    def test_a_batch_vector_and_parts_left_out(self) -> None:
        batch = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3])
        made = ExpanderGraph.from_graph(GRAPH, 2, batch=batch, generator=seeded())
        same = ExpanderGraph.from_graph(GRAPH, 2, sizes=SIZES, generator=seeded())
        assert torch.equal(made.graph.edge_index, same.graph.edge_index)
        assert ExpanderGraph.from_graph(GRAPH, 0).edge_counts == (6, 0, 8, 8)
        plain = ExpanderGraph.from_graph(GRAPH, 0, num_virtual_nodes=0)
        assert torch.equal(plain.graph.edge_index, EDGE_INDEX)
        assert repr(plain) == "ExpanderGraph(num_nodes=8, num_virtual_nodes=0, edge_counts=(6, 0, 0, 0))"

    def test_features_of_virtual_nodes_and_edges(self) -> None:
        made = ExpanderGraph.from_graph(GRAPH, 2, num_virtual_nodes=2, sizes=SIZES)
        x, virtual = torch.randn(3, 8, 5), torch.randn(2, 5)
        found = made.with_virtual_nodes(x, virtual)
        assert torch.equal(found[:, :8], x)
        assert torch.equal(found[:, 8:], torch.cat([virtual] * 4).expand(3, -1, -1))
        assert torch.equal(made.with_virtual_nodes(x[0], virtual), found[0])
        edge_attr = torch.randn(6, 2)
        features = made.edge_features(edge_attr, torch.float32)
        assert torch.equal(features[:6], torch.cat([edge_attr, torch.zeros(6, 3)], dim=1))
        kinds = torch.arange(3).repeat_interleave(torch.tensor([14, 16, 16]))
        assert torch.equal(features[6:], torch.nn.functional.one_hot(kinds + 2, 5).float())
        assert made.edge_features(None, torch.float64).shape == (52, 3)

    @pytest.mark.parametrize("kind", [int, numpy.int64, numpy.int32])
    def test_no_regular_graph(self, kind) -> None:
        made = ExpanderGraph.from_graph(GRAPH, kind(0), sizes=SIZES)
        assert made.edge_counts[1] == 0

    def test_copies_and_leaves(self) -> None:
        made = ExpanderGraph.from_graph(GRAPH, 2, sizes=SIZES)
        leaves, spec = _pytree.tree_flatten(made)
        again = _pytree.tree_unflatten(leaves, _pytree.treespec_loads(_pytree.treespec_dumps(spec)))
        for twin in (again, copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.to("cpu")):
            assert torch.equal(twin.graph.edge_index, made.graph.edge_index)
            assert (twin.sizes, twin.num_virtual_nodes, twin.edge_counts) == (SIZES, 1, made.edge_counts)
        named, _ = _pytree.tree_flatten_with_path(made)
        assert _pytree.keystr(named[0][0]) == ".graph.edge_index"

    def test_what_does_not_fit(self) -> None:
        bipartite = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), num_queries=1, num_keys=2)
        with pytest.raises(GraphStructureError, match="graph: expected as many queries as keys"):
            ExpanderGraph.from_graph(bipartite, 2)
        with pytest.raises(GraphStructureError, match=r"edge 4 from node 5 to node 6 of another graph"):
            ExpanderGraph.from_graph(GRAPH, 2, sizes=[3, 3, 2])
        with pytest.raises(InvalidInputError, match="graph: expected a Graph"):
            ExpanderGraph.from_graph(EDGE_INDEX, 2)  # pyright: ignore[reportArgumentType]
        with pytest.raises(InvalidInputError, match=r"degree: expected an even int.*got 3"):
            ExpanderGraph.from_graph(GRAPH, 3)
        for degree in (False, -2, 0.0):
            with pytest.raises(InvalidInputError, match=f"degree: expected an int of at least 0, got {degree}"):
                ExpanderGraph.from_graph(GRAPH, degree)  # pyright: ignore[reportArgumentType]
        with pytest.raises(InvalidInputError, match="num_virtual_nodes: expected an int of at least 0, got -1"):
            ExpanderGraph.from_graph(GRAPH, 2, num_virtual_nodes=-1)
        made = ExpanderGraph.from_graph(GRAPH, 2)
        with pytest.raises(DimensionMismatchError, match=r"x: expected \(num_nodes=8, d\), got \(7, 2\)"):
            made.with_virtual_nodes(torch.ones(7, 2), torch.ones(1, 2))
        with pytest.raises(DimensionMismatchError, match=r"features: expected \(num_virtual_nodes=1, d=2\)"):
            made.with_virtual_nodes(torch.ones(8, 2), torch.ones(2, 2))
        with pytest.raises(InvalidInputError, match="features: expected device cpu"):
            made.with_virtual_nodes(torch.ones(8, 2), torch.ones(1, 2, device="meta"))
