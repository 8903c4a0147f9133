"""Dense attention against softmax written out row by row in float64, for every implementation and shared case."""

import math

import pytest
import torch
import torch.nn.functional as F

import anyattention
from anyattention import Causal, Dynamic, Graph, attend, explain, native
from anyattention.errors import UnsupportedError
from anyattention.testing.cases import DENSE_CASES
from oracle import expected, pairs_of

IMPLEMENTATIONS = ("cpu", "torch", "reference") if native.available() else ("torch", "reference")
CASES = {case.name: case for case in DENSE_CASES}


def four_axes(tensor, shape):
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape)).expand(shape)


def oracle(**arguments):
    """Output, weights `(batch, heads, queries, keys)` and logsumexp."""
    output, of_pairs, logsumexp = expected(arguments)
    (batch, num_queries, heads, _), num_keys = arguments["query"].shape, arguments["key"].shape[1]
    query, key = pairs_of(arguments.get("pattern"), num_queries, num_keys)
    weights = of_pairs.new_zeros(batch, heads, num_queries, num_keys)
    weights[:, :, query, key] = of_pairs.transpose(1, 2)
    return output, weights, logsumexp


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def leaves(arguments, implementation):
    """The tensors of a call that can have a gradient there, made leaves in place; by name."""
    found = {name: arguments[name] for name in ("query", "key", "value")}
    if implementation == "reference" and "bias" in arguments:
        found["bias"] = arguments["bias"]
    if isinstance(arguments.get("score"), Dynamic):
        found["score.vector"] = arguments["score"].vector
    for tensor in found.values():
        tensor.requires_grad_()
    return found


def gradients(result, found):
    """Gradients of a random combination of the tensors in `result`; a logsumexp of -inf is left out."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in result:
        cotangent = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        loss = loss + (cotangent * tensor)[tensor > -torch.inf].sum()
    if not loss.requires_grad:  # nothing was computed: a size is 0
        return [torch.zeros_like(tensor) for tensor in found.values()]
    return torch.autograd.grad(loss, list(found.values()), materialize_grads=True)


def runs(case, implementation):
    """Whether an implementation has what the case needs."""
    is_plain = case.score == "dot" and (implementation == "cpu" or case.softcap is None)
    sizes = (case.batch, case.query_length, case.key_length, case.heads, case.head_dim, case.value_dim)
    return implementation == "reference" or (is_plain and 0 not in sizes)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_agrees_with_softmax_row_by_row(implementation, name):
    case = CASES[name]
    arguments = case.arguments()
    if not runs(case, implementation):
        reason = rf"implementation='{implementation}' cannot run this call: (it|tiles|a size)"
        with pytest.raises(UnsupportedError, match=reason):
            attend(**arguments, implementation=implementation)
        assert explain(**arguments).implementation == next(each for each in IMPLEMENTATIONS if runs(case, each))
        return
    found = leaves(arguments, implementation)
    settings = {**arguments, "return_logsumexp": True, "implementation": implementation}
    assert explain(**settings).implementation == implementation
    result = attend(**settings)
    output, _, logsumexp = oracle(**arguments)
    assert_close(result.output, output)
    assert_close(result.logsumexp, logsumexp)
    assert result.weights is None
    assert result.indices is None
    for ours, theirs in zip(
        gradients((result.output, result.logsumexp), found), gradients((output, logsumexp), found), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_weights_agree_with_softmax_row_by_row(name):
    arguments = CASES[name].arguments()
    found = leaves(arguments, "reference")
    expected = oracle(**arguments)
    by_head = attend(**arguments, return_weights="heads", return_logsumexp=True)
    for ours, theirs in zip((by_head.output, by_head.weights, by_head.logsumexp), expected, strict=True):
        assert_close(ours, theirs)
    actual = gradients((by_head.output, by_head.weights, by_head.logsumexp), found)
    for ours, theirs in zip(actual, gradients(expected, found), strict=True):
        assert_close(ours, theirs)
    if CASES[name].heads:
        for asked in ("mean", True):
            assert_close(attend(**arguments, return_weights=asked).weights, expected[1].mean(1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_agrees_with_scaled_dot_product_attention(implementation, is_causal):
    query, key, value = torch.randn(3, 2, 13, 5, 8, dtype=torch.float64).unbind()
    bias = None if is_causal else torch.randn(2, 5, 13, 13, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=bias, is_causal=is_causal, scale=0.3
    )
    pattern = Causal() if is_causal else None
    actual = attend(query, key, value, pattern, bias=bias, scale=0.3, implementation=implementation)
    assert_close(actual.output, expected.transpose(1, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [-1.3, -0.0, 0.0, 0.7])
@pytest.mark.parametrize("lengths", [(7, 7), (7, 2), (2, 7)])
def test_any_scale_is_one_of_causal_attention_too(implementation, scale, lengths):
    shapes = ((2, lengths[0], 3, 4), (2, lengths[1], 3, 4), (2, lengths[1], 3, 5))
    query, key, value = inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    later = torch.ones(lengths, dtype=torch.bool).triu(1)
    scores = (scale * torch.einsum("blhd,bshd->bhls", query, key)).masked_fill(later, -torch.inf)
    expected = torch.einsum("bhls,bshe->blhe", scores.softmax(-1), value), scores.logsumexp(-1).transpose(1, 2)
    pattern = Causal("top_left")
    found = attend(query, key, value, pattern, scale=scale, return_logsumexp=True, implementation=implementation)
    actual = found.output, found.logsumexp
    cotangents = [torch.randn_like(x) for x in expected]
    for each in ((actual, expected), [torch.autograd.grad(x, inputs, cotangents) for x in (actual, expected)]):
        for ours, theirs in zip(*each, strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logsumexp_is_that_of_the_scores(implementation):
    query = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 7, 2, 5, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 7, 2, 3, dtype=torch.float64)
    expected = torch.logsumexp(torch.einsum("blhd,bshd->blhs", query, key) / math.sqrt(5), -1)
    actual = attend(query, key, value, return_logsumexp=True, implementation=implementation).logsumexp
    assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (query, key), cotangent),
        torch.autograd.grad(expected, (query, key), cotangent),
        strict=True,
    ):
        assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (5, 5)])
def test_a_pattern_its_mask_its_graph_and_its_matrix_agree(implementation, align, lengths):
    pattern = Causal(align)
    query = torch.randn(2, lengths[0], 3, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, lengths[1], 3, 4, dtype=torch.float64).unbind()
    tensors = [x.requires_grad_() for x in (query, key, value)]
    mask = pattern.to_dense(*lengths)
    patterns = {
        "pattern": (pattern, {"implementation": implementation}),
        "mask": (None, {"implementation": implementation, "mask": mask}),
        "graph": (pattern.to_graph(*lengths), {}),
        "adjacency": (Graph.from_adjacency(mask.to_sparse_csr().double()), {}),
    }
    cotangent = torch.randn_like(query)
    results = {}
    for name, (chosen, settings) in patterns.items():
        result = attend(*tensors, chosen, return_logsumexp=True, **settings)
        finite = torch.where(result.logsumexp > -torch.inf, result.logsumexp, 0.0)
        loss = (result.output * cotangent).sum() + (finite * cotangent[..., 0]).sum()
        results[name] = (result.output, result.logsumexp, *torch.autograd.grad(loss, tensors))
    for name in ("mask", "graph", "adjacency"):
        for one, other in zip(results["pattern"], results[name], strict=True):
            assert_close(one, other)


def test_edge_weights_align_with_the_patterns_graph():
    pattern = Causal("bottom_right")
    query = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 7, 3, 4, dtype=torch.float64).unbind()
    graph = pattern.to_graph(5, 7)
    dense = attend(query, key, value, pattern, return_weights="heads").weights
    sparse = attend(query, key, value, graph, return_weights="heads").weights
    assert_close(sparse, dense[:, :, graph.query_index, graph.key_index].transpose(1, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_masks_and_biases_that_broadcast_are_as_if_expanded(implementation, dtype):
    query = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 7, 3, 4, dtype=torch.float64).unbind()
    argument = "mask" if dtype == torch.bool else "bias"
    for shape in [(7,), (1,), (5, 7), (1, 7), (5, 1), (2, 1, 1, 7), (1, 3, 5, 1), (1, 1, 1, 1), (2, 3, 5, 7)]:
        given = torch.randn(shape, dtype=torch.float64)
        given = given > -0.5 if dtype == torch.bool else given
        whole = four_axes(given, (2, 3, 5, 7)).contiguous()
        one, other = (
            attend(query, key, value, **{argument: x}, implementation=implementation).output for x in (given, whole)
        )
        assert_close(one, other)


def test_the_fastest_that_can_is_chosen_and_explained():
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    bias = torch.randn(5, 5, requires_grad=True)
    reasons = [
        ("cpu", "tiles are products, and the score is Dynamic", {"score": Dynamic(torch.randn(3, 4))}),
        ("torch", "it has no softcap", {"softcap": 3.0}),
        ("torch", "it has no dropout", {"dropout": 0.5}),
        ("torch", "it never forms the weights", {"return_weights": True}),
        ("torch", "it never forms the weights", {"return_weights": True, "bias": bias}),
        ("torch", "it has no gradient for the bias", {"bias": bias}),
        ("torch", "it scores by dot product, not by Dynamic", {"score": Dynamic(torch.randn(3, 4))}),
    ]
    assert explain(x, x, x, Causal(), softcap=3.0, dropout=0.5).implementation == "cpu"
    assert explain(x, x, x, bias=bias.detach(), return_weights="heads").implementation == "cpu"
    assert explain(x, x, x, bias=bias, return_weights="heads").implementation == "cpu"
    for implementation, reason, settings in reasons:
        explanation = explain(x, x, x, **settings)
        assert explanation.implementation == ("reference" if "score" in settings else "cpu")
        if explanation.implementation == "reference":
            assert [name for name, _ in explanation.refusals] == ["cpu", "torch"]
            assert dict(explanation.refusals)[implementation].startswith(reason)
            assert f"not {implementation}: {reason}" in str(explanation)
        refused = f"implementation='{implementation}' cannot run this call: {reason}"
        with pytest.raises(UnsupportedError, match=refused):
            attend(x, x, x, **settings, implementation=implementation)
        with pytest.raises(UnsupportedError, match=refused):
            explain(x, x, x, **settings, implementation=implementation)


def test_a_forced_implementation_is_the_one_that_runs(monkeypatch):
    x = torch.randn(2, 5, 3, 4)
    fused = []
    module = anyattention.ops.dense.torch_fused
    original = module.fused_dense
    monkeypatch.setattr(module, "fused_dense", lambda call: fused.append(1) or original(call))
    attend(x, x, x, implementation="reference")
    assert not fused
    attend(x, x, x)
    assert not fused
    attend(x, x, x, implementation="torch")
    assert len(fused) == 1


def test_explain_says_what_the_fused_kernel_does_not_hold():
    x = torch.randn(2, 5, 3, 4)
    assert "NaN" in str(explain(x, x, x, Causal(), implementation="torch"))
    assert "NaN" not in str(explain(x, x, x, Causal()))


def test_explain_draws_no_random_number():
    x = torch.randn(2, 5, 3, 4)
    torch.manual_seed(3)
    expected = attend(x, x, x, dropout=0.5).output
    torch.manual_seed(3)
    explain(x, x, x, dropout=0.5)
    assert torch.equal(attend(x, x, x, dropout=0.5).output, expected)
