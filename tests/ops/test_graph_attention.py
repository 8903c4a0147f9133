"""attend over a Graph against the same written out, in float64: values, and gradients of every input."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import attend
from anyattention.patterns import Graph
from cases import AGGREGATIONS, SCORES, Call, make_call
from oracle import expected

# Duplicates (0, 2), a self-loop (3, 3), key 6 and queries 1 and 4 alone; (key, query).
_EDGES = [(0, 2), (3, 3), (5, 0), (0, 2), (2, 0), (1, 3), (4, 2), (0, 0), (5, 2), (2, 3), (0, 2)]


def make_case(
    score: str = "dot",
    *,
    edges: list[tuple[int, int]] = _EDGES,
    num_queries: int = 5,
    num_keys: int = 7,
    **settings: Any,
) -> Call:
    return make_call(graph_of(edges, num_queries, num_keys), score, **settings)


def graph_of(edges: list[tuple[int, int]], num_queries: int = 5, num_keys: int = 7) -> Graph:
    edge_index = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T
    return Graph.from_edge_index(edge_index, num_queries=num_queries, num_keys=num_keys)


def check(case: Call) -> None:
    """Values, and gradients by every leaf of one random loss on output, weights and logsumexp together."""
    result, wanted = case.run(), list(expected(case.arguments()))
    actual = [result.output, result.weights, result.logsumexp]
    if not case.settings.get("normalize", True):
        assert actual.pop() is None
        wanted.pop()
    for ours, theirs in zip(actual, wanted, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        assert ours.requires_grad
    # A logsumexp of -inf is a constant.
    cotangents = [torch.randn_like(each).masked_fill(each == -math.inf, 0.0) for each in wanted]
    leaves = case.leaves

    def gradients(results: list[Tensor]) -> list[Tensor]:
        loss = torch.zeros(())
        for each, cotangent in zip(results, cotangents, strict=True):
            loss = loss + (each.masked_fill(each == -math.inf, 0.0) * cotangent).sum()
        if not loss.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True))

    for name, ours, theirs in zip(case.tensors, gradients(actual), gradients(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.pairwise
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_and_aggregation(score: str, aggregation: str, normalize: bool) -> None:
    check(make_case(score, aggregation=aggregation, normalize=normalize))
    everything = make_case(
        score,
        aggregation=aggregation,
        normalize=normalize,
        batch=2,
        mask="beh",
        bias="beh",
        features="kv",
        scale=0.7,
        softcap=1.3,
    )
    check(everything)


@pytest.mark.pairwise
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("mask_shape", [None, "e", "eh", "beh"])
@pytest.mark.parametrize("bias_shape", [None, "e", "eh", "beh"])
def test_masks_and_biases_per_edge_head_and_batch(
    bias_shape: str | None, mask_shape: str | None, batch: int | None
) -> None:
    check(make_case("dynamic", batch=batch, mask=mask_shape, bias=bias_shape))


@pytest.mark.pairwise
@pytest.mark.parametrize("mask_shape", [None, "e", "eh", "beh"])
@pytest.mark.parametrize("features", ["k", "v", "kv"])
@pytest.mark.parametrize("score", SCORES)
def test_edge_features_reach_keys_and_values(score: str, features: str, mask_shape: str | None) -> None:
    check(make_case(score, features=features, mask=mask_shape, batch=2 if mask_shape == "beh" else None))


def test_edge_features_without_weights_change_nothing() -> None:
    case = make_case("dot", features="-")
    torch.testing.assert_close(case.run().output, expected(case.arguments()).output)


@pytest.mark.parametrize(
    "settings",
    [{"scale": scale} for scale in (0.0, -1.5, 3.0)]
    + [{"softcap": cap, "scale": 2.0} for cap in (0.5, 50.0)]
    + [{"slope": slope} for slope in (0.0, -0.4, 1.7)],
    ids=str,
)
@pytest.mark.parametrize("score", SCORES)
def test_scale_softcap_and_slope(score: str, settings: dict[str, float]) -> None:
    check(make_case(score, bias="eh", **settings))


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batch", [None, 2])
def test_dropout_takes_philox_numbers_by_the_callers_edge_position(
    aggregation: str, normalize: bool, batch: int | None
) -> None:
    settings: dict[str, Any] = {"aggregation": aggregation, "normalize": normalize, "batch": batch}
    case = make_case("dynamic", mask="eh", features="kv", dropout=0.4, **settings)
    torch.manual_seed(11)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    kept = torch.zeros(batch or 1, case.pattern.num_edges, 3, dtype=torch.float64)
    for position, (b, edge, head) in enumerate(product(*map(range, kept.shape))):
        if (philox(position // 4, seed)[position % 4] >> 8) * 2.0**-24 >= 0.4:
            kept[b, edge, head] = 1 / (1 - 0.4)
    assert 0 < kept.sum() < kept.numel() / 0.6

    cotangent = torch.randn_like(case["value"][..., : case.pattern.num_queries, :, :])
    torch.manual_seed(11)
    result = case.run()
    output, weights, _ = expected(case.arguments(), kept)
    torch.testing.assert_close(result.output, output, rtol=1e-11, atol=1e-12)
    # Weights are those before dropout.
    torch.testing.assert_close(result.weights, weights, rtol=1e-11, atol=1e-12)
    ours = torch.autograd.grad(result.output, case.leaves, cotangent)
    theirs = torch.autograd.grad(output, case.leaves, cotangent)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def philox(counter: int, seed: int) -> list[int]:
    """Philox4x32-10 on Python's integers (Salmon et al., 2011)."""
    words = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        low = 0xFFFFFFFF
        words = [(second >> 32) ^ words[1] ^ keys[0], second & low, (first >> 32) ^ words[3] ^ keys[1], first & low]
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return words


def test_the_loops_random_numbers_are_philox() -> None:
    # From the authors' file of known answers, Random123's kat_vectors.
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_more_dropout_keeps_fewer_weights_and_none_keeps_all() -> None:
    edges = [(0, query) for query in range(2000)]
    case = make_case("dot", edges=edges, num_queries=2000, num_keys=1, heads=1)
    kept = []
    for dropout in (0.0, 0.25, 0.75):
        output = case.changed(dropout=dropout).run().output
        kept.append(float((output != 0).double().mean()))
        whole = case["value"][0] / (1 - dropout)
        torch.testing.assert_close(output, torch.where(output != 0, whole, 0.0))
    assert kept[0] == 1.0
    assert kept[1:] == pytest.approx([0.75, 0.25], abs=0.05)


@pytest.mark.parametrize("score", SCORES)
def test_weights_keep_the_callers_edge_order_and_are_averaged_on_request(score: str) -> None:
    case = make_case(score, batch=2)
    by_head = case.run().weights
    assert by_head is not None
    shuffled = torch.randperm(len(_EDGES)).tolist()
    permuted = case.changed(pattern=graph_of([_EDGES[edge] for edge in shuffled])).run().weights
    torch.testing.assert_close(permuted, by_head[:, shuffled])
    assert by_head.shape == (2, 11, 3)
    for asked in ("mean", True):
        torch.testing.assert_close(case.run(return_weights=asked).weights, expected(case.arguments()).weights.mean(-1))
    assert case.run(return_weights=False).weights is None
    assert case.run(return_logsumexp=False).logsumexp is None


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("edges", "num_queries", "num_keys"),
    [([], 3, 2), ([], 0, 0), ([], 0, 3), ([], 3, 0), ([(0, 0)], 1, 1), ([(1, 0)] * 3, 2, 2), ([(2, 1)], 3, 3)],
    ids=str,
)
def test_degenerate_graphs(
    edges: list[tuple[int, int]], num_queries: int, num_keys: int, score: str, normalize: bool, aggregation: str
) -> None:
    sizes = {"edges": edges, "num_queries": num_queries, "num_keys": num_keys}
    settings: dict[str, Any] = {"aggregation": aggregation, "normalize": normalize}
    if num_queries:
        check(make_case(score, bias="eh", features="kv", mask="e", **sizes, **settings))
        check(make_case(score, **sizes, **settings))
    case = make_case(score, batch=2, features="kv", **sizes, **settings)
    result = case.run()
    assert result.output.shape == (2, num_queries, 3, 3)
    assert result.weights.shape == (2, len(edges), 3)
    result.output.backward(torch.randn_like(result.output))
    if not edges:
        assert all(leaf.grad is None or not leaf.grad.any() for leaf in case.tensors.values())
        assert not result.output.any()


@pytest.mark.parametrize("heads", [0, 1])
@pytest.mark.parametrize("batch", [None, 0, 1])
def test_no_heads_and_no_batch_are_sizes_too(heads: int, batch: int | None) -> None:
    case = make_case("dot", heads=heads, batch=batch, features="kv", bias="eh", mask="eh")
    result = case.run()
    lead = () if batch is None else (batch,)
    assert result.output.shape == (*lead, 5, heads, 3)
    assert result.weights.shape == (*lead, 11, heads)
    assert result.logsumexp.shape == (*lead, 5, heads)
    result.output.backward(torch.randn_like(result.output))
    if heads and batch != 0:
        check(case)


def test_duplicate_edges_count_separately() -> None:
    case = make_case("dot", edges=[(0, 0), (1, 0), (0, 0)], num_queries=1, num_keys=2, heads=1)
    weights = case.run().weights.flatten().tolist()
    raw = (case["key"][:, 0] @ case["query"][0, 0] / 2).tolist()
    total = 2 * math.exp(raw[0]) + math.exp(raw[1])
    assert weights == pytest.approx([math.exp(raw[0]) / total, math.exp(raw[1]) / total, math.exp(raw[0]) / total])


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_of_the_maximum_go_to_the_first_edge_with_the_whole_gradient(normalize: bool) -> None:
    query = torch.zeros(1, 1, 2, dtype=torch.float64)
    key = torch.randn(4, 1, 2, dtype=torch.float64)
    value = torch.tensor([1.0, 3.0, 3.0, 3.0], dtype=torch.float64).reshape(4, 1, 1).requires_grad_()
    graph = Graph.from_edge_index(torch.tensor([[0, 2, 1, 3], [0, 0, 0, 0]]), num_queries=1, num_keys=4)
    result = attend(query, key, value, graph, aggregation="max", normalize=normalize)
    share = 0.25 if normalize else 0.5
    assert result.output.item() == pytest.approx(3.0 * share)
    result.output.backward(torch.full_like(result.output, 7.0))
    assert value.grad is not None
    assert value.grad.flatten().tolist() == pytest.approx([0.0, 0.0, 7.0 * share, 0.0])
    mask = torch.tensor([True, False, True, True])
    masked = attend(query, key, value, graph, aggregation="max", normalize=normalize, mask=mask)
    (gradient,) = torch.autograd.grad(masked.output, value, torch.ones_like(masked.output))
    assert gradient.flatten().nonzero().flatten().tolist() == [1]


def test_the_maximum_may_be_negative_and_hidden_edges_do_not_raise_it_to_zero() -> None:
    case = make_case("dot", aggregation="max", mask="eh")
    with torch.no_grad():
        case["value"].copy_(-case["value"].abs() - 1.0)
    check(case)
    assert (case.run().output < 0).any()


def test_logsumexp_is_exact_for_large_scores() -> None:
    case = make_case("dot", scale=1e4)
    result = case.run()
    assert result.output.isfinite().all()
    with torch.no_grad():
        query, key = case["query"], case["key"]
        scores = torch.stack([(query[target] * key[source]).sum(-1) for source, target in _EDGES]) * 1e4
    for i in (0, 2, 3):
        own = [edge for edge, (_, target) in enumerate(_EDGES) if target == i]
        torch.testing.assert_close(result.logsumexp[i], scores[own].logsumexp(0))
