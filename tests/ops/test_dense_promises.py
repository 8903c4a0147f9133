"""What dense attention promises beside its value: empty rows, NaN, errors, memory, bits, dropout."""

import math

import pytest
import torch

from anyattention import Additive, Causal, Dynamic, EdgeFeatures, Full, attend, native
from anyattention.errors import (
    DimensionMismatchError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    OutOfMemoryError,
    UnsupportedError,
)
from anyattention.ops.dropout import draw_seed, keep_factors

IMPLEMENTATIONS = ("cpu", "torch", "reference") if native.available() else ("torch", "reference")
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def tensors(query_length=5, key_length=7, dtype=torch.float64):
    return [
        torch.randn(2, length, 3, 4, dtype=dtype, requires_grad=True)
        for length in (query_length, key_length, key_length)
    ]


def gradients(result, inputs, rows=slice(None)):
    """Gradients of a random combination of the output and finite logsumexp of some queries; the graph stays."""
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(result.output.shape, generator=generator, dtype=torch.float64)
    logsumexp = torch.where(result.logsumexp > -torch.inf, result.logsumexp, 0.0)
    loss = (cotangent * result.output)[:, rows].sum() + (cotangent[..., 0] * logsumexp)[:, rows].sum()
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def spoiled(tensor, where, number):
    """A copy with one feature of the positions `where` set to a number."""
    copy = tensor.detach().clone()
    copy[(*where, 1)] = number
    return copy.requires_grad_()


# Empty rows


@both
@pytest.mark.parametrize("by", ["mask", "bias"])
@pytest.mark.parametrize("pattern", [None, Causal("bottom_right")], ids=str)
def test_an_empty_row_is_zero_with_gradient_zero(implementation, by, pattern):
    inputs = tensors()
    mask = torch.rand(5, 7) < 0.7
    mask[2] = False
    mask[[0, 1, 3, 4], 0] = True
    hidden = {"mask": mask} if by == "mask" else {"bias": torch.zeros(5, 7).masked_fill(~mask, -torch.inf)}
    result = attend(*inputs, pattern, **hidden, return_logsumexp=True, implementation=implementation)
    is_empty = torch.arange(5) == 2
    assert (result.output[:, is_empty] == 0).all()
    assert (result.logsumexp[:, is_empty] == -torch.inf).all()
    assert result.output[:, ~is_empty].abs().min() > 0
    assert result.logsumexp[:, ~is_empty].isfinite().all()
    by_query, *others = gradients(result, inputs)
    assert (by_query[:, is_empty] == 0).all()
    assert by_query[:, ~is_empty].abs().min() > 0
    assert all(gradient.isfinite().all() for gradient in others)
    for gradient in gradients(result, inputs, rows=[2]):
        assert (gradient == 0).all()


@both
def test_a_broken_cotangent_of_an_empty_row_goes_nowhere(implementation):
    inputs = tensors()
    mask = torch.ones(5, 1, dtype=torch.bool)
    mask[2] = False
    output = attend(*inputs, mask=mask, implementation=implementation).output
    cotangent = torch.randn_like(output)
    cotangent[:, 2] = torch.nan
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output, inputs, cotangent))


def test_the_weights_of_an_empty_row_are_zero():
    inputs = tensors()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    weights = attend(*inputs, mask=mask, return_weights="heads").weights
    assert (weights[:, :, 2] == 0).all()
    rows = weights.sum(-1)[:, :, [0, 1, 3, 4]]
    torch.testing.assert_close(rows, torch.ones_like(rows))
    gradient = torch.autograd.grad(weights, inputs[:2], torch.randn_like(weights))[0]
    assert (gradient[:, 2] == 0).all()
    assert gradient.isfinite().all()


@both
def test_everything_hidden(implementation):
    inputs = tensors()
    hidden = torch.zeros(1, dtype=torch.bool)
    result = attend(*inputs, mask=hidden, return_logsumexp=True, implementation=implementation)
    assert (result.output == 0).all()
    assert (result.logsumexp == -torch.inf).all()
    assert all((gradient == 0).all() for gradient in gradients(result, inputs))


# NaN and Inf


@pytest.mark.pairwise
@both
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_broken_used_input_shows(implementation, number, position, masked):
    inputs = tensors()
    inputs[0] = inputs[0].detach().abs()  # an infinite key then has an infinite score
    inputs[1] = inputs[1].detach().abs()
    inputs[position] = spoiled(inputs[position], (1, 3, 2), number)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0, 3] = not masked
    output = attend(*inputs, mask=mask if masked else None, implementation=implementation).output
    users = [3] if position == 0 else range(1, 5) if masked else range(5)
    assert not output[1, list(users), 2].isfinite().all(-1).any()
    assert output[0].isfinite().all()
    assert output[1, :, :2].isfinite().all()


@pytest.mark.pairwise
@both
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("pattern", [None, Causal("bottom_right"), Causal("top_left")], ids=str)
@pytest.mark.parametrize("position", [0, 1, 2], ids=["query", "key", "value"])
def test_a_row_of_nothing_but_broken_scores_shows(implementation, number, pattern, position):
    inputs = [x.detach() for x in tensors(key_length=601)]
    # The fused kernel goes by blocks of keys; the first one is broken throughout.
    inputs[position][1, :512, 2] = -number
    output = attend(*inputs, pattern, implementation=implementation).output
    assert not output[1, :, 2].isfinite().any()
    assert output[0].isfinite().all()
    assert output[:, :, :2].isfinite().all()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bias_below_the_range_of_half_precision_hides_nothing(implementation, dtype):
    inputs = [torch.randn(2, 5, 3, 8).to(dtype).requires_grad_() for _ in range(3)]
    bias = torch.full((5, 5), -1e5)
    bias[3, 1:] = torch.finfo(torch.float32).min
    result = attend(*inputs, bias=bias, return_logsumexp=True, implementation=implementation)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = attend(*wide, bias=bias, return_logsumexp=True, implementation="reference")
    tolerance = {"rtol": 2e-2, "atol": 3e-2}
    torch.testing.assert_close(result.output.double(), expected.output, **tolerance)
    torch.testing.assert_close(result.logsumexp.double(), expected.logsumexp, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(result.output.shape)
    found = torch.autograd.grad(result.output, inputs, cotangent.to(dtype))
    for one, other in zip(found, torch.autograd.grad(expected.output, wide, cotangent.double()), strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)


@both
def test_a_bias_below_the_range_of_the_sums_hides_its_pair(implementation):
    x = torch.randn(2, 5, 3, 8)
    bias = torch.zeros(5, 5, dtype=torch.float64)
    bias[1], bias[2, 3] = -1e300, -1e300
    infinite = torch.where(bias < 0, -torch.inf, bias).float()
    result, expected = (attend(x, x, x, bias=b, implementation=implementation).output for b in (bias, infinite))
    assert torch.equal(result, expected)
    assert (result[:, 1] == 0).all()


@both
def test_a_broken_bias_shows(implementation):
    inputs = [x.detach() for x in tensors()]
    bias = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    bias[0, 1, 2] = torch.nan
    bias[0, 1, 3, 4] = torch.nan
    bias[0, 1, 4] = torch.inf
    bias[0, 0, 1] = -torch.inf
    output = attend(*inputs, bias=bias, implementation=implementation).output
    assert output[:, 2:, 1].isnan().all()
    assert output[:, :2].isfinite().all()
    assert output[:, :, [0, 2]].isfinite().all()


@both
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_padding_never_leaks(implementation, number):
    query, key, value = tensors()
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    clean = (query, key, value)
    broken = [query, *(spoiled(x, (1, slice(4, None)), number) for x in (key, value))]
    settings = {"mask": mask, "return_logsumexp": True, "implementation": implementation}
    one, other = attend(*clean, **settings), attend(*broken, **settings)
    assert torch.equal(one.output, other.output)
    assert torch.equal(one.logsumexp, other.logsumexp)
    for expected, actual in zip(gradients(one, clean), gradients(other, broken), strict=True):
        assert torch.equal(expected, actual)
    for gradient in gradients(other, broken)[1:]:
        assert (gradient[1, 4:] == 0).all()


@both
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_padding_of_one_head_only_never_leaks(implementation, number):
    query, key, value = tensors()
    mask = torch.rand(1, 3, 5, 7) < 0.7
    mask[0, 2, :, 5] = False
    clean = (query, key, value)
    broken = [query, *(spoiled(x, (slice(None), 5, 2), number) for x in (key, value))]
    settings = {"mask": mask, "return_logsumexp": True, "implementation": implementation}
    one, other = attend(*clean, **settings), attend(*broken, **settings)
    assert torch.equal(one.output, other.output)
    for expected, actual in zip(gradients(one, clean), gradients(other, broken), strict=True):
        assert torch.equal(expected, actual)


@both
@pytest.mark.parametrize("pattern", [Causal("top_left"), None], ids=str)
def test_keys_behind_the_last_query_and_hidden_queries_never_leak(implementation, pattern):
    query, key, value = tensors()
    mask = torch.ones(5, 7, dtype=torch.bool)
    if pattern is None:
        mask[:, 5:] = False
        mask[3] = False
        query = spoiled(query, (slice(None), 3), torch.nan)
    broken = [query, *(spoiled(x, (slice(None), slice(5, None)), torch.nan) for x in (key, value))]
    settings = {"mask": None if pattern else mask, "return_logsumexp": True, "implementation": implementation}
    result = attend(*broken, pattern, **settings)
    assert result.output.isfinite().all()
    assert not result.logsumexp.isnan().any()
    for gradient in gradients(result, broken):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("score", [None, Additive(), Dynamic(torch.ones(3, 4, dtype=torch.float64))], ids=repr)
def test_the_reference_keeps_what_is_hidden_from_some_to_the_others(number, position, score):
    query, key, value = tensors(7, 7)
    if isinstance(score, Additive):
        query, key = (x[..., :2].detach()[..., 1:].clone().requires_grad_() for x in (query, key))
    inputs = [query, key, value]
    broken = list(inputs)
    copy = inputs[position].detach().clone()
    copy[:, 4] = number
    broken[position] = copy.requires_grad_()
    settings = {"return_logsumexp": True, "return_weights": "heads", "implementation": "reference"}
    settings |= {} if score is None else {"score": score}
    one, other = attend(*inputs, Causal(), **settings), attend(*broken, Causal(), **settings)
    assert torch.equal(one.output[:, :4], other.output[:, :4])
    assert torch.equal(one.weights[:, :, :4], other.weights[:, :, :4])
    assert torch.equal(one.logsumexp[:, :4], other.logsumexp[:, :4])
    assert other.output[:, 4:].isnan().all()
    if position == 1:
        assert other.logsumexp[:, 4:].isnan().all()
        assert (other.weights[:, :, 4:].isnan() == torch.ones(7, 7).tril()[4:].bool()).all()
    expected, actual = (gradients(x, y)[0][:, :4] for x, y in ((one, inputs), (other, broken)))
    torch.testing.assert_close(expected, actual, rtol=0, atol=0)


# Dropout


def test_dropout_multiplies_the_weights_by_its_factors():
    inputs = tensors()
    mask = torch.rand(2, 1, 5, 7) < 0.8
    torch.manual_seed(5)
    result = attend(*inputs, mask=mask, dropout=0.3, return_weights="heads", return_logsumexp=True)
    torch.manual_seed(5)
    factors = keep_factors((2, 3, 5, 7), 0.3, draw_seed(torch.device("cpu")), torch.float64)
    plain = attend(*inputs, mask=mask, return_weights="heads", return_logsumexp=True)
    expected = torch.einsum("bhls,bshe->blhe", plain.weights * factors, inputs[2])
    torch.testing.assert_close(result.output, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(result.weights, plain.weights)
    assert torch.equal(result.logsumexp, plain.logsumexp)
    cotangent = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(result.output, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_dropout_repeats_after_manual_seed_and_not_otherwise():
    inputs = tensors()

    def draw():
        return attend(*inputs, Causal("top_left"), dropout=0.5).output

    torch.manual_seed(11)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)


def test_dropout_is_right_on_average():
    inputs = [x.detach() for x in tensors()]
    expected = attend(*inputs).output
    draws = torch.stack([attend(*inputs, dropout=0.4).output for _ in range(200)])
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= 4 * standard_error).all()
    assert (standard_error > 0).all()


# Bits


def _bits(implementation, kind, dtype):
    """Output, logsumexp and gradients of one call that is large enough to be cut among threads."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(131, 257, generator=generator) < 0.5 if kind == "mask" else None
    pattern = Causal("top_left") if kind == "causal" else None
    inputs = [
        torch.randn(2, length, 5, 16, generator=generator).to(dtype).requires_grad_() for length in (131, 257, 257)
    ]
    result = attend(*inputs, pattern, mask=mask, return_logsumexp=True, implementation=implementation)
    cotangent = torch.randn(result.output.shape, generator=generator).to(dtype)
    return [result.output, result.logsumexp, *torch.autograd.grad(result.output, inputs, cotangent)]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["full", "causal", "mask"])
def test_the_same_bits_run_after_run_and_on_one_thread_or_two(implementation, kind, dtype):
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            runs.append(_bits(implementation, kind, dtype))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*runs[:2], strict=True))
    # PyTorch's own softmax has other bits on another number of threads, going backward in float32.
    compared = 2 if implementation == "reference" else 5
    for one, other in zip(runs[0][:compared], runs[2][:compared], strict=True):
        assert torch.equal(one, other)


# Alignment and errors


def test_alignment_is_never_guessed():
    query, key, value = tensors()
    with pytest.raises(DimensionMismatchError, match=r"5 queries and 7 keys\. give align='top_left'"):
        attend(query, key, value, Causal())
    with pytest.raises(InvalidConfigError, match="align: expected 'top_left', 'bottom_right' or None, got 'left'"):
        Causal("left")
    top_left = attend(query, key, value, Causal("top_left"), return_weights=True).weights
    bottom_right = attend(query, key, value, Causal("bottom_right"), return_weights=True).weights
    assert torch.equal(top_left > 0, torch.ones(2, 5, 7).tril().bool())
    assert torch.equal(bottom_right > 0, torch.ones(2, 5, 7).tril(2).bool())


X = torch.zeros(2, 5, 3, 4)
BAD_CALLS = [
    ("query of rank 3", (X[0], X, X), {}, DimensionMismatchError, r"query: expected \(batch, query_length, heads"),
    ("key of another batch", (X, X[:1], X), {}, DimensionMismatchError, r"key: .*batch=2.*got \(1, 5, 3, 4\)"),
    ("key of other heads", (X, X[:, :, :2], X), {}, DimensionMismatchError, r"key: .*heads is 3 in query"),
    ("key of another width", (X, X[..., :3], X), {}, DimensionMismatchError, r"head_dim is 4 in query"),
    ("value of another length", (X, X, X[:, :3]), {}, DimensionMismatchError, r"value: .*key_length is 5 in key"),
    ("query no tensor", ([1.0], X, X), {}, InvalidInputError, "query: expected a torch.Tensor, got list"),
    ("integer query", (X.long(), X, X), {}, InvalidInputError, "query: expected a floating-point dtype"),
    ("two dtypes", (X, X.double(), X), {}, InvalidInputError, "key: expected torch.float32, as query"),
    ("two devices", (X, X, X.to("meta")), {}, InvalidInputError, "value: expected device cpu, as query, got meta"),
    ("pattern a tensor", (X, X, X, X > 0), {}, InvalidInputError, "pattern: .* a boolean tensor is given as mask="),
    ("score a name", (X, X, X), {"score": "dot"}, InvalidInputError, r"score: expected Dot\(\), Additive\(\)"),
    ("additive of vectors", (X, X, X), {"score": Additive()}, DimensionMismatchError, "head_dim 1 with the score"),
    ("dynamic of other heads", (X, X, X), {"score": Dynamic(X[0, :2])}, DimensionMismatchError, "score.vector: "),
    ("integer mask", (X, X, X), {"mask": torch.ones(5, 5, dtype=torch.long)}, InvalidMaskError, "mask_from_blocked"),
    ("mask no tensor", (X, X, X), {"mask": [True]}, InvalidMaskError, "True means 'may attend', got list"),
    ("mask of rank 3", (X, X, X), {"mask": X[..., 0] > 0}, InvalidMaskError, r"mask\[:, None\] for .* or mask\[None\]"),
    ("mask of another length", (X, X, X), {"mask": torch.ones(5, 4) > 0}, InvalidMaskError, r"key_length=5\), got"),
    ("mask of rank 5", (X, X, X), {"mask": torch.ones(1, 1, 1, 1, 1) > 0}, InvalidMaskError, "broadcasts to"),
    ("mask of rank 0", (X, X, X), {"mask": torch.tensor(True)}, InvalidMaskError, r"broadcasts to .* got \(\)"),
    ("integer bias", (X, X, X), {"bias": torch.ones(5, 5).long()}, InvalidInputError, "bias: expected a floating"),
    ("bias of rank 3", (X, X, X), {"bias": X[..., 0]}, DimensionMismatchError, r"bias\[:, None\]"),
    ("bias of another length", (X, X, X), {"bias": torch.ones(4)}, DimensionMismatchError, "bias: expected a shape"),
    ("dropout of 1", (X, X, X), {"dropout": 1.0}, InvalidInputError, "dropout: .*at least 0 and below 1, got 1.0"),
    ("scale NaN", (X, X, X), {"scale": math.nan}, InvalidInputError, "scale: expected a finite number, got nan"),
    ("softcap of 0", (X, X, X), {"softcap": 0.0}, InvalidInputError, "softcap: expected a finite number above 0"),
    ("aggregation", (X, X, X), {"aggregation": "mean"}, UnsupportedError, "the pattern Full has only"),
    ("aggregation's name", (X, X, X), {"aggregation": "min"}, InvalidInputError, "aggregation: expected 'sum', 'mean'"),
    ("no softmax", (X, X, X), {"normalize": False}, UnsupportedError, "normalize=False: the pattern Full"),
    ("edges", (X, X, X, Full()), {"edges": EdgeFeatures(X)}, InvalidInputError, "edges: expected None with"),
    ("weights' name", (X, X, X), {"return_weights": "all"}, InvalidInputError, "return_weights: .* 'mean' or 'heads'"),
    ("implementation's name", (X, X, X), {"implementation": "gpu"}, InvalidInputError, "'torch', 'reference', got"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "match"), [call[1:] for call in BAD_CALLS], ids=[call[0] for call in BAD_CALLS]
)
def test_a_bad_call_says_what_is_wrong(arguments, settings, error, match):
    with pytest.raises(error, match=match):
        attend(*arguments, **settings)


def test_weights_that_cannot_fit_are_refused_before_they_are_allocated():
    length = 1 << 24
    x = torch.zeros(1, 1, 1, 1).expand(1, length, 1, 1)
    with pytest.raises(OutOfMemoryError, match=r"the matrix of weights would take 1048576\.00 GiB") as caught:
        attend(x, x, x, return_weights=True)
    assert caught.value.size == 4 * length**2
    assert isinstance(caught.value, MemoryError)


def test_an_allocators_failure_is_named():
    length = 1 << 24
    x = torch.zeros(1, 1, 1, 1).expand(1, length, 1, 1)
    with pytest.raises(OutOfMemoryError, match=r"memory ran out: .*allocate memory") as caught:
        attend(x, x[:, :-1], x[:, :-1], Causal("bottom_right"))
    assert caught.value.size == length * (length - 1)
    assert type(caught.value.__cause__) is RuntimeError
