"""Graphs that are built while PyTorch differentiates or maps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from anyattention import Blocks, Graph, attend
from anyattention.errors import UnsupportedError
from anyattention.nn import DistanceAttention, GraphAttention

_SEARCHES: dict[str, Callable[[Tensor], Graph]] = {
    "radius": lambda points: Graph.radius(points, 1.3),
    "radius in a cell": lambda points: Graph.radius(points, 1.3, cell=2.0 * torch.eye(3, dtype=points.dtype)),
    "radius of queries": lambda points: Graph.radius(points, 1.3, queries=points[:2]),
    "nearest": lambda points: Graph.nearest(points, 2),
}
each_search = pytest.mark.parametrize("search", list(_SEARCHES.values()), ids=list(_SEARCHES))


def points() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64)


def assert_same(found: Graph, expected: Graph) -> None:
    """Equal, and plain: of use after the transform."""
    for name in ("edge_index", "query_offsets", "edges_by_key", "shifts"):
        x, y = getattr(found, name), getattr(expected, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.tolist() == y.tolist()
    rows = torch.randn(max(expected.num_keys, expected.num_queries), 1, 2)
    queries, keys = rows[: expected.num_queries], rows[: expected.num_keys]
    assert torch.equal(attend(queries, keys, keys, found).output, attend(queries, keys, keys, expected).output)


@each_search
class TestSearches:
    def test_inside_a_derivative(self, search: Callable[[Tensor], Graph]) -> None:
        x, found = points(), []

        def keep(x: Tensor) -> Tensor:
            found.append(search(x))
            return x.sum()

        torch.func.grad(keep)(x)
        torch.func.jvp(keep, (x,), (x,))
        torch.func.grad(lambda x: torch.func.jvp(keep, (x,), (x.detach(),))[1])(x)
        with forward_ad.dual_level():
            keep(forward_ad.make_dual(x, x))
        with torch.inference_mode():
            keep(x)
        for graph in found:
            assert_same(graph, search(x))

    def test_is_refused_where_each_entry_has_its_own(self, search: Callable[[Tensor], Graph]) -> None:
        with pytest.raises(UnsupportedError, match="neighbours under vmap"):
            torch.vmap(lambda x: search(x).edge_index)(torch.stack([points(), points()]))


def loop(function: Callable[..., Any], *many: Tensor) -> Tensor:
    return torch.stack([function(*[x[n] for x in many]) for n in range(len(many[0]))])


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # PyTorch's own, of what its vmap makes of one
class TestEdgeLists:
    """Of one size, mapped together with what is attended to."""

    edges = torch.tensor([[[0, 1, 3, 3], [0, 0, 2, 1]], [[2, 2, 1, 0], [3, 3, 3, 1]], [[1, 1, 1, 1], [0, 1, 2, 3]]])

    def test_attend(self) -> None:
        rows = torch.randn(3, 4, 2, 3, dtype=torch.float64)

        def attended(edges: Tensor, x: Tensor) -> Tensor:
            return attend(x, x, x, Graph.from_edge_index(edges, num_nodes=4)).output

        torch.testing.assert_close(torch.vmap(attended)(self.edges, rows), loop(attended, self.edges, rows))

    def test_a_layer_that_builds_its_graph(self) -> None:
        layer, x = GraphAttention(4, 2).double().eval(), torch.randn(3, 4, 4, dtype=torch.float64)

        def loss(edges: Tensor, x: Tensor) -> Tensor:
            return layer(x, edges).output.sin().sum()

        gradient = torch.func.grad(loss, 1)
        torch.testing.assert_close(torch.vmap(gradient)(self.edges, x), loop(gradient, self.edges, x))


def test_a_check_of_finite_numbers_cannot_be_made_of_mapped_ones() -> None:
    layer = DistanceAttention(4, 2, check_finite=True).eval()
    with pytest.raises(UnsupportedError, match="check_finite=True"):
        torch.vmap(lambda x, positions: layer(x, positions).output)(torch.randn(2, 5, 4), torch.randn(2, 5, 3))


def test_values_of_a_batch_keep_their_derivatives() -> None:
    edges, weights = torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.arange(6.0)

    def total(values: torch.Tensor) -> torch.Tensor:
        graph = Graph.from_edge_index(edges, num_nodes=3, values=values)
        joined = Graph.batch([graph, graph]).values
        assert joined is not None
        return (joined * weights).sum()

    values, expected = torch.ones(3), torch.tensor([3.0, 5.0, 7.0])
    torch.testing.assert_close(torch.func.grad(total)(values), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(values[None]), expected[None])
    torch.testing.assert_close(torch.func.jvp(total, (values,), (values,))[1], expected.sum())


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda mask: Graph.from_adjacency(mask), "an adjacency under vmap"),
        (lambda mask: Graph.from_adjacency(mask.double()), "an adjacency under vmap"),
        (lambda mask: Blocks(mask, 2), "Blocks under vmap"),
    ],
    ids=["adjacency of bool", "adjacency of numbers", "blocks"],
)
def test_places_that_a_map_hides_are_refused(build: Callable[[Tensor], object], named: str) -> None:
    masks = torch.rand(3, 2, 2) > 0.5

    def count(mask: Tensor) -> Tensor:
        build(mask)
        return mask.sum()

    with pytest.raises(UnsupportedError, match=named):
        torch.vmap(count)(masks)
