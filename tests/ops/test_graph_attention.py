"""attend over a Graph against a loop over its edges, in float64: values, and gradients of every input."""

import math
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import EdgeFeatures, attend
from anyattention.patterns import Graph
from anyattention.scores import Additive, Dot, Dynamic

_SCORES = ("dot", "additive", "dynamic")
_AGGREGATIONS = ("sum", "mean", "max")


@dataclass
class Case:
    """The arguments of one call; tensors are leaves in float64."""

    edges: list[tuple[int, int]]
    num_queries: int
    num_keys: int
    tensors: dict[str, Tensor]
    score: str = "dot"
    slope: float = 0.2
    mask: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    aggregation: str = "sum"
    normalize: bool = True
    factors: dict[tuple[int, int, int], float] = field(default_factory=dict)


# Duplicates (0, 2), a self-loop (3, 3), key 6 and queries 1 and 4 alone; (key, query).
_EDGES = [(0, 2), (3, 3), (5, 0), (0, 2), (2, 0), (1, 3), (4, 2), (0, 0), (5, 2), (2, 3), (0, 2)]


def make_case(
    score: str = "dot",
    *,
    batch: int | None = None,
    heads: int = 3,
    mask_shape: str | None = None,
    bias_shape: str | None = None,
    features: str = "",
    edges: list[tuple[int, int]] = _EDGES,
    num_queries: int = 5,
    num_keys: int = 7,
    **settings: Any,
) -> Case:
    head_dim, value_dim, edge_dim = (1 if score == "additive" else 4), 3, 2
    lead = () if batch is None else (batch,)
    shapes = {"e": (len(edges),), "eh": (len(edges), heads), "beh": (*lead, len(edges), heads)}

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    tensors = {
        "query": leaf(*lead, num_queries, heads, head_dim),
        "key": leaf(*lead, num_keys, heads, head_dim),
        "value": leaf(*lead, num_keys, heads, value_dim),
    }
    if score == "dynamic":
        tensors["vector"] = leaf(heads, head_dim)
    if bias_shape:
        tensors["bias"] = leaf(*shapes[bias_shape])
    if features:
        tensors["features"] = leaf(len(edges), edge_dim)
    if "k" in features:
        tensors["key_weight"] = leaf(heads, head_dim, edge_dim)
    if "v" in features:
        tensors["value_weight"] = leaf(heads, value_dim, edge_dim)
    mask = torch.rand(shapes[mask_shape]) < 0.6 if mask_shape else None
    return Case(edges, num_queries, num_keys, tensors, score=score, mask=mask, **settings)


def run(case: Case, **asked: Any) -> Any:
    """`attend` on a case."""
    tensors = case.tensors
    edge_index = torch.tensor(case.edges, dtype=torch.int64).reshape(-1, 2).T
    graph = Graph.from_edge_index(edge_index, num_queries=case.num_queries, num_keys=case.num_keys)
    score = {"dot": Dot(), "additive": Additive(case.slope)}.get(case.score)
    features = None
    if "features" in tensors:
        features = EdgeFeatures(tensors["features"], tensors.get("key_weight"), tensors.get("value_weight"))
    asked = {"return_weights": "heads", "return_logsumexp": case.normalize} | asked
    return attend(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        graph,
        score=score or Dynamic(tensors["vector"], case.slope),
        mask=case.mask,
        bias=tensors.get("bias"),
        edges=features,
        scale=case.scale,
        softcap=case.softcap,
        dropout=case.dropout,
        aggregation=case.aggregation,  # pyright: ignore[reportArgumentType]
        normalize=case.normalize,
        **asked,
    )


def loop(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The same by loops: output, weights by edge and head, logsumexp."""
    tensors = case.tensors
    has_batch = tensors["query"].ndim == 4
    query, key, value = (tensors[name] if has_batch else tensors[name][None] for name in ("query", "key", "value"))
    batch, _, heads, _ = query.shape
    outputs, weights, logs = [], [], []
    for b, h in product(range(batch), range(heads)):
        scores, values = [], []
        for edge, (source, target) in enumerate(case.edges):
            k, v = key[b, source, h], value[b, source, h]
            if "key_weight" in tensors:
                k = k + tensors["key_weight"][h] @ tensors["features"][edge]
            if "value_weight" in tensors:
                v = v + tensors["value_weight"][h] @ tensors["features"][edge]
            scores.append(_score(case, query[b, target, h], k, h) + _entry(tensors.get("bias"), b, edge, h, 0.0))
            values.append(v)
        p = {}
        for i in range(case.num_queries):
            visible = [
                edge
                for edge, (_, target) in enumerate(case.edges)
                if target == i and bool(_entry(case.mask, b, edge, h, True))
            ]
            if visible:
                stacked = torch.stack([scores[edge] for edge in visible])
                shares = stacked.softmax(0) if case.normalize else 1 / (1 + torch.exp(-stacked))
                p.update(zip(visible, shares.unbind(), strict=True))
                logs.append(stacked.exp().sum().log())
            else:
                logs.append(torch.tensor(-math.inf, dtype=torch.float64))
            messages = [p[edge] * case.factors.get((b, edge, h), 1.0) * values[edge] for edge in visible]
            outputs.append(_aggregate(messages, case.aggregation, value.shape[-1]))
        zero = torch.zeros((), dtype=torch.float64)
        weights += [p.get(edge, zero) for edge in range(len(case.edges))]
    output = torch.stack(outputs).reshape(batch, heads, case.num_queries, -1).transpose(1, 2)
    flat = torch.stack(weights) if weights else torch.zeros(0, dtype=torch.float64)
    by_edge = flat.reshape(batch, heads, len(case.edges)).transpose(1, 2)
    logsumexp = torch.stack(logs).reshape(batch, heads, case.num_queries).transpose(1, 2)
    return (output, by_edge, logsumexp) if has_batch else (output[0], by_edge[0], logsumexp[0])


def _score(case: Case, query: Tensor, key: Tensor, head: int) -> Tensor:
    total = query + key
    if case.score == "dot":
        raw = torch.dot(query, key)
    elif case.score == "additive":
        raw = torch.where(total > 0, total, case.slope * total)[0]
    else:
        raw = torch.dot(case.tensors["vector"][head], torch.where(total > 0, total, case.slope * total))
    default = 1 / math.sqrt(query.shape[0]) if case.score == "dot" else 1.0
    raw = raw * (default if case.scale is None else case.scale)
    return raw if case.softcap is None else case.softcap * torch.tanh(raw / case.softcap)


def _entry(table: Tensor | None, b: int, edge: int, head: int, default: Any) -> Any:
    if table is None:
        return default
    return table[(edge, (edge, head), (b, edge, head))[table.ndim - 1]]


def _aggregate(messages: list[Tensor], aggregation: str, value_dim: int) -> Tensor:
    if not messages:
        return torch.zeros(value_dim, dtype=torch.float64)
    if aggregation == "max":
        best = messages[0]
        for message in messages[1:]:
            best = torch.where(message > best, message, best)
        return best
    total = torch.stack(messages).sum(0)
    return total / len(messages) if aggregation == "mean" else total


def check(case: Case) -> None:
    """Values, and gradients by every leaf of one random loss on output, weights and logsumexp together."""
    result, expected = run(case), list(loop(case))
    actual = [result.output, result.weights, result.logsumexp]
    if not case.normalize:
        assert actual.pop() is None
        expected.pop()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        assert ours.requires_grad
    # A logsumexp of -inf is a constant.
    cotangents = [torch.randn_like(each).masked_fill(each == -math.inf, 0.0) for each in expected]
    leaves = list(case.tensors.values())

    def gradients(results: list[Tensor]) -> list[Tensor]:
        loss = torch.zeros(())
        for each, cotangent in zip(results, cotangents, strict=True):
            loss = loss + (each.masked_fill(each == -math.inf, 0.0) * cotangent).sum()
        if not loss.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True))

    for name, ours, theirs in zip(case.tensors, gradients(actual), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.pairwise
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("aggregation", _AGGREGATIONS)
@pytest.mark.parametrize("score", _SCORES)
def test_every_score_and_aggregation(score: str, aggregation: str, normalize: bool) -> None:
    check(make_case(score, aggregation=aggregation, normalize=normalize))
    everything = make_case(
        score,
        aggregation=aggregation,
        normalize=normalize,
        batch=2,
        mask_shape="beh",
        bias_shape="beh",
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
    check(make_case("dynamic", batch=batch, mask_shape=mask_shape, bias_shape=bias_shape))


@pytest.mark.pairwise
@pytest.mark.parametrize("mask_shape", [None, "e", "eh", "beh"])
@pytest.mark.parametrize("features", ["k", "v", "kv"])
@pytest.mark.parametrize("score", _SCORES)
def test_edge_features_reach_keys_and_values(score: str, features: str, mask_shape: str | None) -> None:
    check(make_case(score, features=features, mask_shape=mask_shape, batch=2 if mask_shape == "beh" else None))


def test_edge_features_without_weights_change_nothing() -> None:
    case = make_case("dot", features="-")
    torch.testing.assert_close(run(case).output, loop(case)[0])


@pytest.mark.parametrize(
    "settings",
    [{"scale": scale} for scale in (0.0, -1.5, 3.0)]
    + [{"softcap": cap, "scale": 2.0} for cap in (0.5, 50.0)]
    + [{"slope": slope} for slope in (0.0, -0.4, 1.7)],
    ids=str,
)
@pytest.mark.parametrize("score", _SCORES)
def test_scale_softcap_and_slope(score: str, settings: dict[str, float]) -> None:
    check(make_case(score, bias_shape="eh", **settings))


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", _AGGREGATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batch", [None, 2])
def test_dropout_takes_philox_numbers_by_the_callers_edge_position(
    aggregation: str, normalize: bool, batch: int | None
) -> None:
    settings: dict[str, Any] = {"aggregation": aggregation, "normalize": normalize, "batch": batch}
    case = make_case("dynamic", mask_shape="eh", features="kv", dropout=0.4, **settings)
    torch.manual_seed(11)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    heads, edges = 3, len(case.edges)
    for b, edge, head in product(range(batch or 1), range(edges), range(heads)):
        position = (b * edges + edge) * heads + head
        kept = (philox(position // 4, seed)[position % 4] >> 8) * 2.0**-24 >= 0.4
        case.factors[b, edge, head] = 1 / (1 - 0.4) if kept else 0.0
    assert 0 < sum(case.factors.values()) < len(case.factors) / 0.6

    cotangent = torch.randn_like(case.tensors["value"][..., : case.num_queries, :, :])
    torch.manual_seed(11)
    result = run(case)
    output, weights, _ = loop(case)
    torch.testing.assert_close(result.output, output, rtol=1e-11, atol=1e-12)
    # Weights are those before dropout.
    torch.testing.assert_close(result.weights, weights, rtol=1e-11, atol=1e-12)
    leaves = list(case.tensors.values())
    ours = torch.autograd.grad(result.output, leaves, cotangent)
    theirs = torch.autograd.grad(output, leaves, cotangent)
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
        output = run(replace(case, dropout=dropout)).output
        kept.append(float((output != 0).double().mean()))
        expected = case.tensors["value"][0] / (1 - dropout)
        torch.testing.assert_close(output, torch.where(output != 0, expected, 0.0))
    assert kept[0] == 1.0
    assert kept[1:] == pytest.approx([0.75, 0.25], abs=0.05)


@pytest.mark.parametrize("score", _SCORES)
def test_weights_keep_the_callers_edge_order_and_are_averaged_on_request(score: str) -> None:
    case = make_case(score, batch=2)
    by_head = run(case).weights
    shuffled = torch.randperm(len(case.edges)).tolist()
    permuted = run(replace(case, edges=[case.edges[edge] for edge in shuffled])).weights
    torch.testing.assert_close(permuted, by_head[:, shuffled])
    assert by_head.shape == (2, 11, 3)
    for asked in ("mean", True):
        torch.testing.assert_close(run(case, return_weights=asked).weights, loop(case)[1].mean(-1))
    assert run(case, return_weights=False).weights is None
    assert run(case, return_logsumexp=False).logsumexp is None


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", _AGGREGATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", _SCORES)
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
        check(make_case(score, bias_shape="eh", features="kv", mask_shape="e", **sizes, **settings))
        check(make_case(score, **sizes, **settings))
    case = make_case(score, batch=2, features="kv", **sizes, **settings)
    result = run(case)
    assert result.output.shape == (2, num_queries, 3, 3)
    assert result.weights.shape == (2, len(edges), 3)
    result.output.backward(torch.randn_like(result.output))
    if not edges:
        assert all(leaf.grad is None or not leaf.grad.any() for leaf in case.tensors.values())
        assert not result.output.any()


@pytest.mark.parametrize("heads", [0, 1])
@pytest.mark.parametrize("batch", [None, 0, 1])
def test_no_heads_and_no_batch_are_sizes_too(heads: int, batch: int | None) -> None:
    case = make_case("dot", heads=heads, batch=batch, features="kv", bias_shape="eh", mask_shape="eh")
    result = run(case)
    lead = () if batch is None else (batch,)
    assert result.output.shape == (*lead, 5, heads, 3)
    assert result.weights.shape == (*lead, 11, heads)
    assert result.logsumexp.shape == (*lead, 5, heads)
    result.output.backward(torch.randn_like(result.output))
    if heads and batch != 0:
        check(case)


def test_duplicate_edges_count_separately() -> None:
    case = make_case("dot", edges=[(0, 0), (1, 0), (0, 0)], num_queries=1, num_keys=2, heads=1)
    weights = run(case).weights.flatten().tolist()
    raw = (case.tensors["key"][:, 0] @ case.tensors["query"][0, 0] / 2).tolist()
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
    case = make_case("dot", aggregation="max", mask_shape="eh")
    with torch.no_grad():
        case.tensors["value"].copy_(-case.tensors["value"].abs() - 1.0)
    check(case)
    assert (run(case).output < 0).any()


def test_logsumexp_is_exact_for_large_scores() -> None:
    case = make_case("dot", scale=1e4)
    result = run(case)
    assert result.output.isfinite().all()
    with torch.no_grad():
        query, key = case.tensors["query"], case.tensors["key"]
        scores = torch.stack([(query[target] * key[source]).sum(-1) for source, target in case.edges]) * 1e4
    for i in (0, 2, 3):
        own = [edge for edge, (_, target) in enumerate(case.edges) if target == i]
        torch.testing.assert_close(result.logsumexp[i], scores[own].logsumexp(0))
