"""The code of graph attention that keeps sums in registers, and rows that are columns of one matrix."""

from itertools import product

import pytest
import torch
from torch import Tensor

from anyattention import attend, explain
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.graph.operators import GraphAttention, graph_attention
from anyattention.patterns import Graph
from anyattention.scores import Additive, Dot, Dynamic, Score
from cases import SCORES, make_call, random_graph

pytestmark = pytest.mark.usefixtures("native")


def score_of(kind: str, vector: Tensor | None) -> Score:
    if kind == "dynamic":
        assert vector is not None
        return Dynamic(vector, 0.1)
    return Dot() if kind == "dot" else Additive(0.3)


def rows_of(graph: Graph, kind: str, heads: int, width: int) -> list[Tensor]:
    """Query, key, value and, for "dynamic", the vector."""
    return make_call(graph, kind, heads=heads, width=width, value_dim=width, dtype=torch.float32).leaves


def results(
    graph: Graph, kind: str, leaves: list[Tensor], dtype: torch.dtype, implementation: str, dropout: float
) -> list[Tensor]:
    """Output, logsumexp and the leaves' gradients of a random loss on both."""
    own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    torch.manual_seed(1)
    result = attend(
        own[0],
        own[1],
        own[2],
        graph,
        score=score_of(kind, own[3] if kind == "dynamic" else None),
        scale=0.3,
        dropout=dropout,
        return_logsumexp=True,
        implementation=implementation,
    )
    assert result.logsumexp is not None
    found = [result.output, result.logsumexp]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(part.shape, generator=generator, dtype=torch.float64).to(dtype) for part in found]
    return [*found, *torch.autograd.grad(found, own, cotangents)]


@pytest.mark.pairwise
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("hub", [0.0, 0.5])
@pytest.mark.parametrize("kind", SCORES)
def test_equal_the_reference_in_float64(kind: str, hub: float, dropout: float) -> None:
    """Every shape that has such code, in float32 with nothing beside the scores; short rows, and rows that are cut."""
    graph = random_graph(300, 200, 9000, hub=hub)
    assert (graph.query_offsets.diff().max() > 2048) == (hub > 0)
    for heads, width in product((1, 2, 4, 8), (8, 16, 32, 64)):
        leaves = rows_of(graph, kind, heads, width)
        ours = results(graph, kind, leaves, torch.float32, "cpu", dropout)
        theirs = results(graph, kind, leaves, torch.float64, "reference", dropout)
        for one, other in zip(ours, theirs, strict=True):
            tolerance = 2e-4 if hub else 3e-5  # thousands of terms of either sign
            scale = float(other.detach().abs().max())
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.pairwise
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", SCORES)
def test_narrower_rows_on_padded_copies(kind: str, dropout: float) -> None:
    """Widths that are padded, and some that are just not."""
    graph = random_graph(60, 50, 900)
    for heads, width in product((1, 2, 8), (1, 3, 7, 11, 13, 15, 27, 50)):
        leaves = rows_of(graph, kind, heads, width)
        ours = results(graph, kind, leaves, torch.float32, "cpu", dropout)
        theirs = results(graph, kind, leaves, torch.float64, "reference", dropout)
        for one, other in zip(ours, theirs, strict=True):
            scale = float(other.detach().abs().max())
            torch.testing.assert_close(one.double(), other, rtol=3e-5, atol=3e-5 * scale)


@pytest.mark.parametrize(("kind", "width"), [("dot", 7), ("dynamic", 7), ("additive", 1)])
def test_a_padded_value_that_is_the_key(kind: str, width: int) -> None:
    graph = random_graph(60, 50, 900)
    query, key, _, *vector = rows_of(graph, kind, 2, width)
    found = []
    for implementation, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in (query, key, *vector)]
        score = score_of(kind, own[2] if vector else None)
        output = attend(own[0], own[1], own[1], graph, score=score, implementation=implementation).output
        cotangent = torch.linspace(-1, 2, output.numel(), dtype=dtype).reshape(output.shape)
        found.append([output, *torch.autograd.grad(output, own, cotangent)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_padded_rows_that_are_columns_and_one_broken_node() -> None:
    """Nothing leaks from a node's row into those beside it, nor from the copies into the results."""
    graph = random_graph(60, 60, 900)
    matrix = torch.randn(60, 9)
    matrix[17] = torch.nan
    value, key, query = (part.unflatten(-1, (1, -1)) for part in matrix.split([7, 1, 1], dim=-1))
    result = attend(query, key, value, graph, score=Additive(), return_weights="heads", implementation="cpu")
    assert result.weights is not None
    sees = torch.zeros(60, 60, dtype=torch.bool)
    sees[graph.edge_index[1], graph.edge_index[0]] = True
    broken = sees[:, 17] | (torch.arange(60) == 17) & sees.any(1)
    assert result.output.isnan().all((-2, -1)).tolist() == broken.tolist()
    assert result.weights.isnan().any(-1).tolist() == broken[graph.edge_index[1]].tolist()


def test_the_logarithm_of_a_row_with_few_and_many_edges() -> None:
    """Equal scores make the logsumexp a logarithm of the number of edges."""
    degrees = torch.tensor([0, *range(1, 200), 2_047, 4_097, 100_000])
    query_index = torch.arange(degrees.numel()).repeat_interleave(degrees)
    edge_index = torch.stack([torch.zeros_like(query_index), query_index])
    graph = Graph.from_edge_index(edge_index, num_queries=degrees.numel(), num_keys=1)
    query, key = torch.zeros(degrees.numel(), 8, 8), torch.zeros(1, 8, 8)
    found = attend(query, key, key, graph, return_logsumexp=True, implementation="cpu").logsumexp
    assert found is not None
    expected = degrees.double().log().unsqueeze(1).expand(-1, 8)
    torch.testing.assert_close(found.double(), expected, rtol=2.5e-7, atol=1e-7)


class TestColumns:
    """Query, key and value that lie side by side in one matrix: read as they lie, and so their gradients."""

    @pytest.mark.parametrize("order", ["query key value", "value key query"])
    @pytest.mark.parametrize(("heads", "width"), [(8, 16), (3, 5)])
    @pytest.mark.parametrize("kind", SCORES)
    def test_equal_rows_of_their_own(self, kind: str, heads: int, width: int, order: str) -> None:
        graph = random_graph(31, 31, 203)
        leaves = rows_of(graph, kind, heads, width)
        names = order.split()
        parts = {name: leaf.detach() for name, leaf in zip(("query", "key", "value"), leaves, strict=False)}
        whole = torch.cat([parts[name].flatten(1) for name in names], dim=1)
        columns = whole.split([parts[name][0].numel() for name in names], dim=1)
        by_name = dict(zip(names, columns, strict=True))
        beside = [by_name[name].unflatten(1, (heads, -1)).requires_grad_() for name in ("query", "key", "value")]
        assert not beside[0].is_contiguous()
        vector = leaves[3] if kind == "dynamic" else None

        def gradients(rows: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
            output = attend(rows[0], rows[1], rows[2], graph, score=score_of(kind, vector), implementation="cpu").output
            torch.manual_seed(2)
            return output, torch.autograd.grad(output, rows, torch.randn_like(output))

        (output, ours), (expected, theirs) = gradients(beside), gradients(leaves[:3])
        assert torch.equal(output, expected)
        for one, other, rows in zip(ours, theirs, beside, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == rows.stride()
        assert len({one.untyped_storage().data_ptr() for one in ours}) == 1

    @pytest.mark.parametrize("cut", ["gap", "overlap", "heads apart", "channels apart"])
    def test_of_another_layout_are_copied(self, cut: str) -> None:
        graph = random_graph(7, 7, 41)
        whole = torch.randn(7, 3 * 3 * 5 + 2)
        starts = {"gap": (0, 15, 32), "overlap": (0, 15, 15)}.get(cut, (0, 15, 30))
        rows = [whole[:, start : start + 15].unflatten(1, (3, 5)) for start in starts]
        if cut == "heads apart":
            rows[1] = torch.randn(7, 6, 5)[:, ::2]
        if cut == "channels apart":
            rows[1] = torch.randn(7, 3, 10)[..., ::2]
        rows = [x.requires_grad_() for x in rows]
        output, expected = (
            attend(x[0], x[1], x[2], graph, implementation="cpu").output
            for x in (rows, [row.contiguous() for row in rows])
        )
        assert torch.equal(output, expected)
        cotangent = torch.randn_like(output)
        ours = torch.autograd.grad(output, rows, cotangent)
        torch.testing.assert_close(ours, torch.autograd.grad(expected, rows, cotangent))

    def test_of_a_batch(self) -> None:
        graph = random_graph(7, 7, 41)
        rows = [x.unflatten(-1, (3, 5)).requires_grad_() for x in torch.randn(2, 7, 45).split(15, dim=-1)]
        output, expected = (
            attend(x[0], x[1], x[2], graph, implementation="cpu").output
            for x in (rows, [row.contiguous() for row in rows])
        )
        cotangent = torch.randn_like(output)
        ours = torch.autograd.grad(output, rows, cotangent)
        assert torch.equal(output, expected)
        torch.testing.assert_close(ours, torch.autograd.grad(expected, rows, cotangent))


@pytest.mark.pairwise
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "width"), [(8, 16), (3, 5), (2, 1)])
@pytest.mark.parametrize("kind", ["dot", "dynamic"])
def test_a_value_that_is_the_key(kind: str, heads: int, width: int, dtype: torch.dtype, create_graph: bool) -> None:
    """One gradient is what two tensors of the same numbers get together."""
    graph = random_graph(31, 23, 203)
    query, key, _, *vectors = (x.detach().to(dtype).requires_grad_() for x in rows_of(graph, kind, heads, width))
    score = score_of(kind, *vectors) if vectors else score_of(kind, None)
    twin = key.detach().clone().requires_grad_()
    one, two = (attend(query, key, value, graph, score=score).output for value in (key, twin))
    assert explain(query, key, key, graph, score=score).implementation == "cpu"
    assert torch.equal(one, two)
    cotangent = torch.randn_like(one)
    ours = torch.autograd.grad(one, [query, key, *vectors], cotangent, create_graph=create_graph)
    theirs = torch.autograd.grad(two, [query, key, twin, *vectors], cotangent, create_graph=create_graph)
    expected = [theirs[0], theirs[1] + theirs[2], *theirs[3:]]
    torch.testing.assert_close(list(ours), expected, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-10)


def test_columns_of_storages_of_their_own() -> None:
    """numpy's columns share an address range and no torch storage."""
    graph = random_graph(7, 7, 41)
    whole = torch.randn(7, 24).numpy()
    rows = [torch.from_numpy(whole[:, n : n + 8]).view(7, 2, 4).requires_grad_() for n in (0, 8, 16)]
    output, expected = (
        attend(x[0], x[1], x[2], graph, implementation="cpu").output for x in (rows, [row.contiguous() for row in rows])
    )
    cotangent = torch.randn_like(output)
    ours = torch.autograd.grad(output, rows, cotangent)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, rows, cotangent))


@pytest.mark.parametrize("score", ["Dynamic", "Dot"])
def test_a_vector_comes_with_dynamic_alone(score: str) -> None:
    graph = random_graph(7, 7, 41)
    x = torch.randn(1, 7, 2, 4)
    vector = None if score == "Dynamic" else torch.randn(2, 4)
    record = GraphAttention(
        arrays_of(graph),
        query=x,
        key=x,
        value=x,
        vector=vector,
        term=None,
        bias=None,
        seed=None,
        score=score,
        normalize=True,
        scale=1.0,
        softcap=0.0,
        negative_slope=0.2,
        dropout=0.0,
    )
    with pytest.raises(ValueError, match="graph_attention: invalid argument"):
        graph_attention(record)
