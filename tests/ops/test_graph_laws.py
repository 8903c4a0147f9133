"""What holds of graph attention whatever its arguments: symmetry, agreement of patterns, determinism, precision."""

from typing import Any

import pytest
import scipy.sparse
import torch
from torch import Tensor

from anyattention import EdgeFeatures
from anyattention.patterns import Causal, Full, Graph
from cases import AGGREGATIONS, SCORES, Call, make_call, random_graph

_HEADS = 3


def make_nodes(score: str, num_queries: int, num_keys: int, **settings: Any) -> Call:
    """A call without a pattern."""
    return make_call(None, score, lengths=(num_queries, num_keys), width=5, value_dim=2, slope=0.3, **settings)


@pytest.mark.pairwise
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_renaming_nodes_and_shuffling_edges_only_renames_the_results(
    score: str, aggregation: str, normalize: bool
) -> None:
    graph, nodes = random_graph(7, 11, 30), make_nodes(score, 7, 11)
    bias = torch.randn(30, _HEADS, dtype=torch.float64)
    settings: dict[str, Any] = {"aggregation": aggregation, "normalize": normalize, "return_weights": "heads"}
    plain = nodes.attend(pattern=graph, bias=bias, **settings)

    queries, keys, edges = torch.randperm(7), torch.randperm(11), torch.randperm(30)
    new_query, new_key = queries.argsort(), keys.argsort()
    renamed = torch.stack([new_key[graph.key_index], new_query[graph.query_index]])[:, edges]
    places = {"query": queries, "key": keys, "value": keys}
    moved = nodes.with_tensors(x[places[name]] if name in places else x for name, x in nodes.tensors.items())
    permuted_graph = Graph.from_edge_index(renamed, num_queries=7, num_keys=11)
    permuted = moved.attend(pattern=permuted_graph, bias=bias[edges], **settings)
    assert permuted.weights is not None
    assert plain.weights is not None
    torch.testing.assert_close(permuted.output, plain.output[queries])
    torch.testing.assert_close(permuted.weights, plain.weights[edges])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_a_batch_of_features_equals_a_loop(score: str, aggregation: str) -> None:
    graph, nodes = random_graph(5, 7, 23), make_nodes(score, 5, 7, batch=3)
    settings: dict[str, Any] = {"aggregation": aggregation, "return_weights": "heads", "return_logsumexp": True}
    mask = torch.rand(3, 23, _HEADS) < 0.7
    whole = nodes.attend(pattern=graph, mask=mask, **settings)
    for each in range(3):
        single = nodes.with_tensors(x[each] if x.ndim == 4 else x for x in nodes.leaves)
        alone = single.attend(pattern=graph, mask=mask[each], **settings)
        for ours, theirs in zip(whole[:3], alone[:3], strict=True):
            torch.testing.assert_close(ours[each], theirs, rtol=0, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_a_block_diagonal_graph_equals_separate_calls(score: str, aggregation: str) -> None:
    sizes = [(3, 5, 11), (1, 1, 0), (7, 2, 13), (0, 3, 0)]
    graphs = [random_graph(*size) for size in sizes]
    nodes = make_nodes(score, 11, 11)
    settings: dict[str, Any] = {"aggregation": aggregation, "return_weights": "heads", "return_logsumexp": True}
    whole = nodes.attend(pattern=Graph.batch(graphs), **settings)
    queries, keys = nodes["query"].split([3, 1, 7, 0]), nodes["key"].split([5, 1, 2, 3])
    values = nodes["value"].split([5, 1, 2, 3])
    parts = [
        nodes.with_tensors([*tensors, *nodes.leaves[3:]]).attend(pattern=graph, **settings)
        for graph, *tensors in zip(graphs, queries, keys, values, strict=True)
    ]
    for field in ("output", "weights", "logsumexp"):
        expected = torch.cat([getattr(part, field) for part in parts])
        torch.testing.assert_close(getattr(whole, field), expected, rtol=0, atol=0)


@pytest.mark.parametrize("score", SCORES)
def test_patterns_agree(score: str) -> None:
    pairs = torch.rand(7, 11) < 0.4
    pairs[3] = False
    pairs[:, 2] = False
    nodes = make_nodes(score, 7, 11)
    dense = nodes.with_tensors(x[None] if x.ndim == 3 else x for x in nodes.leaves)
    bias = torch.randn(7, 11, dtype=torch.float64).requires_grad_()
    by_mask = dense.attend(
        pattern=None, mask=pairs, bias=bias, return_weights="heads", return_logsumexp=True, softcap=3.0
    )
    assert by_mask.weights is not None
    assert by_mask.logsumexp is not None

    query, key = pairs.nonzero(as_tuple=True)
    shuffled = torch.randperm(len(query))
    graphs = {
        "edge_index": Graph.from_edge_index(torch.stack([key, query])[:, shuffled], num_queries=7, num_keys=11),
        "dense": Graph.from_adjacency(pairs),
        "scipy CSR": Graph.from_adjacency(scipy.sparse.csr_array(pairs.numpy())),
        "scipy COO": Graph.from_adjacency(scipy.sparse.coo_array(pairs.numpy())),
        "torch COO": Graph.from_adjacency(pairs.double().to_sparse_coo()),
    }
    leaves = [*nodes.leaves, bias]
    cotangent = torch.randn_like(nodes["value"][:7])
    expected = torch.autograd.grad(by_mask.output, leaves, cotangent[None])
    for name, graph in graphs.items():
        by_graph = nodes.attend(
            pattern=graph,
            bias=bias[graph.query_index, graph.key_index],
            return_weights="heads",
            return_logsumexp=True,
            softcap=3.0,
        )
        weights = by_mask.weights[0][:, graph.query_index, graph.key_index].T
        torch.testing.assert_close(by_graph.output, by_mask.output[0], msg=name)
        torch.testing.assert_close(by_graph.weights, weights, msg=name)
        torch.testing.assert_close(by_graph.logsumexp, by_mask.logsumexp[0], msg=name)
        torch.testing.assert_close(torch.autograd.grad(by_graph.output, leaves, cotangent), expected, msg=name)


@pytest.mark.parametrize("pattern", [Full(), Causal("top_left"), Causal("bottom_right")], ids=repr)
@pytest.mark.parametrize("score", SCORES)
def test_sequence_patterns_agree_with_their_graph(score: str, pattern: Full | Causal) -> None:
    nodes = make_nodes(score, 5, 7, batch=2)
    graph = pattern.to_graph(5, 7)
    dense = nodes.attend(pattern=pattern, return_weights="heads", return_logsumexp=True)
    sparse = nodes.attend(pattern=graph, return_weights="heads", return_logsumexp=True)
    assert dense.weights is not None
    torch.testing.assert_close(sparse.output, dense.output)
    torch.testing.assert_close(sparse.logsumexp, dense.logsumexp)
    weights = dense.weights[:, :, graph.query_index, graph.key_index].transpose(1, 2)
    torch.testing.assert_close(sparse.weights, weights)


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_the_same_input_gives_the_same_bits_on_any_number_of_threads(score: str, aggregation: str) -> None:
    graph = random_graph(997, 1009, 20_011)
    nodes = make_nodes(score, 997, 1009, dtype=torch.float32)
    cotangent = torch.randn_like(nodes["query"][..., :1]).expand(-1, -1, 2)
    features = EdgeFeatures(torch.randn(20_011, 2), value_weight=torch.randn(_HEADS, 2, 2))

    def results() -> list[Tensor]:
        torch.manual_seed(5)
        result = nodes.attend(
            pattern=graph,
            aggregation=aggregation,
            edges=features,
            dropout=0.1,
            return_weights=True,
            return_logsumexp=True,
        )
        gradients = torch.autograd.grad(result.output, nodes.leaves, cotangent)
        assert result.weights is not None
        assert result.logsumexp is not None
        return [result.output, result.weights, result.logsumexp, *gradients]

    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results())
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run, runs[0], strict=True))


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_low_precision_is_one_rounding_away_from_float64(score: str, aggregation: str, dtype: torch.dtype) -> None:
    graph = random_graph(7, 11, 200)
    nodes = make_nodes(score, 7, 11).to(dtype)
    exact = nodes.to(torch.float64)
    settings: dict[str, Any] = {"aggregation": aggregation, "return_weights": "heads", "return_logsumexp": True}
    low, high = nodes.attend(pattern=graph, **settings), exact.attend(pattern=graph, **settings)
    assert low.output.dtype == dtype
    assert low.weights is not None
    assert low.weights.dtype == dtype
    assert low.logsumexp is not None
    assert low.logsumexp.dtype == torch.float32
    step = torch.finfo(dtype).eps
    for ours, theirs in ((low.output, high.output), (low.weights, high.weights)):
        torch.testing.assert_close(ours.double(), theirs, rtol=step, atol=1e-5)
    torch.testing.assert_close(low.logsumexp.double(), high.logsumexp, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(low.output)
    ours = torch.autograd.grad(low.output, nodes.leaves, cotangent)
    theirs = torch.autograd.grad(high.output, exact.leaves, cotangent.double())
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        # Gradients of a gathered row are rounded once an edge, and there are up to 30 edges in a row.
        bound = 8 * step * float(right.abs().max())
        torch.testing.assert_close(mine.double(), right, rtol=step, atol=bound + 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_autocast_computes_as_on_cast_inputs(score: str, dtype: torch.dtype) -> None:
    graph = random_graph(5, 7, 30)
    nodes = make_nodes(score, 5, 7, dtype=torch.float32)
    tensors = torch.randn(30, 2), torch.randn(_HEADS, nodes["key"].shape[-1], 2), torch.randn(_HEADS, 2, 2)
    cast = nodes.to(dtype).attend(pattern=graph, edges=EdgeFeatures(*(each.to(dtype) for each in tensors)))
    with torch.autocast("cpu", dtype=dtype):
        result = nodes.attend(pattern=graph, edges=EdgeFeatures(*tensors))
        assert make_nodes(score, 5, 7).attend(pattern=graph).output.dtype == torch.float64
    assert result.output.dtype == dtype
    assert torch.equal(result.output, cast.output)
    cotangent = torch.randn_like(result.output)
    gradients = torch.autograd.grad(result.output, nodes.leaves, cotangent)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


def test_non_contiguous_inputs_change_nothing() -> None:
    graph, nodes = random_graph(5, 7, 20), make_nodes("dynamic", 5, 7, batch=2)

    def strided(tensor: Tensor) -> Tensor:
        spread = tensor.detach().transpose(0, -1).contiguous().transpose(0, -1)
        assert not spread.is_contiguous()
        return spread

    bias, mask = torch.randn(2, 20, _HEADS, dtype=torch.float64), torch.rand(2, 20, _HEADS) < 0.7
    plain = nodes.attend(pattern=graph, bias=bias, mask=mask, aggregation="max")
    views = nodes.with_tensors([*map(strided, nodes.leaves[:3]), *nodes.leaves[3:]])
    viewed = views.attend(pattern=graph, bias=strided(bias), mask=strided(mask), aggregation="max")
    assert torch.equal(viewed.output, plain.output)
