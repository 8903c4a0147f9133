"""Queries without pairs, and where NaN and Inf go: never out of a hidden slot, always out of a used one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import attend
from anyattention.patterns import Graph
from cases import AGGREGATIONS, SCORES, Call, make_call

_POISONS = (math.nan, math.inf, -math.inf)
_HEADS = 2

# Edge 2 comes from key 3 and is the only one that does; key 5 and query 1 are in no edge; query 4 has edge 5 only.
_EDGES = torch.tensor([[0, 1, 3, 2, 4, 2, 0], [0, 0, 0, 2, 2, 4, 3]])
_GRAPH = Graph.from_edge_index(_EDGES, num_queries=5, num_keys=6)


def make_inputs(score: str) -> dict[str, Tensor]:
    call = make_call(_GRAPH, score, heads=_HEADS, width=3, value_dim=4, bias="eh", features="kv")
    return {name: tensor.detach() for name, tensor in call.tensors.items()}


def run(score: str, inputs: dict[str, Tensor], **settings: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Output, weights and logsumexp, and the gradients of a random loss on all of them."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    result = Call(leaves, {"pattern": _GRAPH, **settings}, score).run()
    results = [each for each in result[:3] if each is not None]
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in results]
    gradients = torch.autograd.grad(
        results, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return [each.detach() for each in results], dict(zip(leaves, gradients, strict=True))


def assert_untouched(score: str, slots: dict[str, Any], poison: float, **settings: Any) -> None:
    """Poison in the slots changes no bit of any result or gradient, and its own gradient is 0."""
    clean = make_inputs(score)
    poisoned = {name: tensor.clone() for name, tensor in clean.items()}
    for name, slot in slots.items():
        poisoned[name][slot] = poison
    expected, expected_gradients = run(score, clean, **settings)
    actual, gradients = run(score, poisoned, **settings)
    for ours, theirs in zip(actual, expected, strict=True):
        assert not ours.isnan().any()
        assert torch.equal(ours, theirs)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name
        assert name not in slots or not gradient[slots[name]].any(), name


def hidden(*slots: tuple[int, int | slice]) -> Tensor:
    mask = torch.ones(7, _HEADS, dtype=torch.bool)
    for slot in slots:
        mask[slot] = False
    return mask


@pytest.mark.pairwise
@pytest.mark.parametrize("poison", _POISONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
class TestHiddenSlotsNeverLeak:
    def test_nodes_that_no_edge_names(self, score: str, normalize: bool, aggregation: str, poison: float) -> None:
        slots = {"query": 1, "key": 5, "value": 5}
        settings: dict[str, Any] = {"normalize": normalize, "aggregation": aggregation}
        assert_untouched(score, slots, poison, **settings)
        assert_untouched(score, slots, poison, **settings, mask=hidden((2, 0)), softcap=3.0)

    def test_a_masked_edge(self, score: str, normalize: bool, aggregation: str, poison: float) -> None:
        slots = {"key": 3, "value": 3, "bias": 2, "features": 2}
        mask = hidden((2, slice(None)))
        settings: dict[str, Any] = {"normalize": normalize, "aggregation": aggregation}
        assert_untouched(score, slots, poison, **settings, mask=mask)
        assert_untouched(score, slots, poison, **settings, mask=mask[:, 0])

    def test_an_edge_masked_in_one_head(self, score: str, normalize: bool, aggregation: str, poison: float) -> None:
        slots = {"key": (3, 0), "value": (3, 0), "bias": (2, 0)}
        settings: dict[str, Any] = {"normalize": normalize, "aggregation": aggregation}
        assert_untouched(score, slots, poison, **settings, mask=hidden((2, 0)))

    def test_a_query_all_of_whose_edges_are_masked(
        self, score: str, normalize: bool, aggregation: str, poison: float
    ) -> None:
        slots = {"query": 4, "bias": 5, "features": 5}
        settings: dict[str, Any] = {"normalize": normalize, "aggregation": aggregation}
        assert_untouched(score, slots, poison, **settings, mask=hidden((5, slice(None))))

    def test_an_edge_feature_reaches_only_the_heads_that_see_its_edge(
        self, score: str, normalize: bool, aggregation: str, poison: float
    ) -> None:
        settings: dict[str, Any] = {"normalize": normalize, "aggregation": aggregation, "mask": hidden((2, 0))}
        clean = make_inputs(score)
        poisoned = clean | {"features": clean["features"].index_fill(0, torch.tensor([2]), poison)}
        expected, expected_gradients = run(score, clean, **settings)
        actual, gradients = run(score, poisoned, **settings)
        assert torch.equal(actual[0][:, 0], expected[0][:, 0])
        assert not actual[0][0, 1].isfinite().all()
        for name in ("key_weight", "value_weight"):
            assert torch.equal(gradients[name][0], expected_gradients[name][0])
            assert not gradients[name][0].isnan().any()


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
class TestUsedSlotsShow:
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("poison", _POISONS)
    @pytest.mark.parametrize(("name", "slot"), [("query", (0, 1, 0)), ("key", (3, 1, 0))])
    def test_in_queries_and_keys(
        self,
        score: str,
        normalize: bool,
        aggregation: str,
        name: str,
        slot: tuple[int, ...],
        poison: float,
        softcap: float | None,
    ) -> None:
        inputs = make_inputs(score)
        settings: dict[str, Any] = {"normalize": normalize, "aggregation": aggregation, "softcap": softcap}
        expected, _ = run(score, inputs, **settings)
        inputs[name][slot] = poison
        (output, weights, *_), gradients = run(score, inputs, **settings)
        # Query 0 is the only one to read either slot, in head 1.
        assert output[0, 1].isnan().all()
        assert weights[2, 1].isnan()
        assert torch.equal(output[:, 0], expected[0][:, 0])
        assert torch.equal(output[1:], expected[0][1:])
        assert gradients[name][slot].isnan()

    @pytest.mark.parametrize("name", ["features", "bias"])
    def test_in_edge_features_and_biases(self, score: str, normalize: bool, aggregation: str, name: str) -> None:
        inputs = make_inputs(score)
        expected, _ = run(score, inputs, normalize=normalize, aggregation=aggregation)
        inputs[name][2] = math.nan
        (output, weights, *_), _ = run(score, inputs, normalize=normalize, aggregation=aggregation)
        assert output[0].isnan().all()
        assert weights[2].isnan().all()
        assert torch.equal(output[1:], expected[0][1:])

    @pytest.mark.parametrize("poison", _POISONS)
    def test_in_values(self, score: str, normalize: bool, aggregation: str, poison: float) -> None:
        inputs = make_inputs(score)
        settings: dict[str, Any] = {"normalize": normalize, "aggregation": aggregation}
        expected, _ = run(score, inputs, **settings)
        # Key 2 is one of query 2's and the only one of query 4.
        inputs["value"][2, 1, 3] = poison
        (output, *_), _ = run(score, inputs, **settings)
        assert not output[4, 1, 3].isfinite()
        # -inf is no maximum where there is another value.
        if aggregation != "max" or poison != -math.inf:
            assert not output[2, 1, 3].isfinite()
        untouched = torch.ones_like(output, dtype=torch.bool)
        untouched[[2, 4], 1, 3] = False
        assert torch.equal(output[untouched], expected[0][untouched])


@pytest.mark.pairwise
@pytest.mark.parametrize("way", ["no edges", "mask", "bias"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_a_query_without_pairs_gets_zero(score: str, normalize: bool, aggregation: str, way: str) -> None:
    query = 1 if way == "no edges" else 4
    inputs = make_inputs(score)
    settings: dict[str, Any] = {"normalize": normalize, "aggregation": aggregation}
    if way == "mask":
        settings["mask"] = hidden((5, slice(None)))
    if way == "bias":
        inputs["bias"][5] = -math.inf
    (output, weights, *logsumexp), gradients = run(score, inputs, **settings)
    assert not output[query].any()
    assert not gradients["query"][query].any()
    assert not any(gradient.isnan().any() for gradient in gradients.values())
    if way != "no edges":
        assert not weights[5].any()
        assert not gradients["features"][5].any()
        assert not gradients["bias"][5].any()
    if normalize:
        assert (logsumexp[0][query] == -math.inf).all()
        assert logsumexp[0][[0, 2, 3]].isfinite().all()


def test_weights_beside_a_large_bias_sum_to_one() -> None:
    inputs = [torch.randn(3, _HEADS, 4, requires_grad=True) for _ in range(3)]
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [0, 0, 0]]), num_nodes=3)
    settings: dict[str, Any] = {"return_weights": "heads", "implementation": "reference"}
    result = attend(*inputs, graph, bias=torch.full((3,), -1e9), **settings)
    # float32 has no digits left for the scores beside such a bias: all edges are alike.
    torch.testing.assert_close(result.weights, torch.full((3, _HEADS), 1 / 3))
    torch.testing.assert_close(result.output[0], inputs[2].mean(0))
    (gradient,) = torch.autograd.grad(result.output[0].sum(), inputs[2])
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / 3))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_a_bias_of_minus_infinity_is_a_mask(score: str, aggregation: str) -> None:
    inputs = make_inputs(score)
    mask = hidden((2, 0), (3, 1), (5, slice(None)))
    expected, expected_gradients = run(score, inputs, mask=mask, aggregation=aggregation)
    inputs["bias"] = inputs["bias"].masked_fill(~mask, -math.inf)
    actual, gradients = run(score, inputs, aggregation=aggregation)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name
