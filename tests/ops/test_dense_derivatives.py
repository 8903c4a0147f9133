"""Dense attention's derivatives, dtypes, symmetries, and its life under torch.compile and autocast."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from anyattention import Additive, Causal, Dynamic, attend, explain, native
from anyattention.ops.dense.torch_kernel import FusedDense, FusedDenseBackward, _fused_dense_backward, fused_dense

FUSED = ["cpu", "torch"] if native.available() else ["torch"]
both = pytest.mark.parametrize("implementation", [*FUSED, "reference"])
PATTERNS = [None, Causal("bottom_right")]


def tensors(batch=2, query_length=3, key_length=5, heads=2, head_dim=3, value_dim=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((query_length, head_dim), (key_length, head_dim), (key_length, value_dim))
    return [
        torch.randn(batch, length, heads, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for length, width in shapes
    ]


MASK = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
SETTINGS = {
    "plain": {},
    "causal": {"pattern": Causal("bottom_right")},
    "causal, as many queries as keys": {"pattern": Causal()},
    "more queries than keys": {"pattern": Causal("bottom_right")},
    "mask with an empty row": {"mask": MASK},
    "mask, bias and scale": {"mask": MASK, "bias": torch.linspace(-1, 1, 5, dtype=torch.float64), "scale": 0.8},
}


def lengths(name):
    return {"more queries than keys": (5, 3), "causal, as many queries as keys": (5, 5)}.get(name, (3, 5))


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_that_can_be_differentiated_are_those_that_cannot(implementation, name):
    # Each is computed in its own way, and gradgradcheck holds the first against itself only.
    inputs = tensors(2, *lengths(name))
    result = attend(*inputs, **SETTINGS[name], implementation=implementation, return_logsumexp=True)
    is_empty = result.logsumexp == -torch.inf
    outputs = (result.output, torch.where(is_empty, 0.0, result.logsumexp))
    for cotangents in ([torch.randn_like(x) for x in outputs], [None, torch.randn_like(outputs[1])]):
        used = [(x, cotangent) for x, cotangent in zip(outputs, cotangents, strict=True) if cotangent is not None]
        ways = [
            torch.autograd.grad(
                [x for x, _ in used],
                inputs,
                [c for _, c in used],
                create_graph=way,
                retain_graph=True,
                materialize_grads=True,
            )
            for way in (False, True)
        ]
        for one, other in zip(*ways, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.pairwise
@both
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("with_weights", [False, True])
def test_gradcheck_and_gradgradcheck(implementation, name, with_weights):
    if with_weights and implementation == "torch":
        assert dict(explain(*tensors(), return_weights=True, implementation=None).refusals) == {}
        implementation = None
    inputs = tensors(1, *lengths(name))
    settings = {**SETTINGS[name], "implementation": implementation, "return_logsumexp": True}
    if not with_weights:
        assert explain(*inputs, **settings).implementation == implementation

    def function(*inputs):
        result = attend(*inputs, return_weights="heads" if with_weights else False, **settings)
        logsumexp = result.logsumexp[result.logsumexp > -torch.inf]
        return (result.output, logsumexp, result.weights) if with_weights else (result.output, logsumexp)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["bias", "softcap", "additive", "dynamic"])
def test_gradcheck_and_gradgradcheck_of_what_only_the_reference_has(name):
    query, key, value = tensors(1, head_dim=1 if name == "additive" else 3)
    extra = torch.randn(2, 3, 5, dtype=torch.float64) if name == "bias" else torch.randn(2, 3, dtype=torch.float64)

    def function(query, key, value, extra):
        settings = {
            "bias": {"bias": extra[None]},
            "softcap": {"softcap": 0.7},
            "additive": {"score": Additive(0.3)},
            "dynamic": {"score": Dynamic(extra, 0.3)},
        }[name]
        result = attend(query, key, value, mask=MASK, return_logsumexp=True, return_weights=True, **settings)
        return result.output, result.weights, result.logsumexp[:, [0, 2]]

    inputs = [query, key, value, extra.requires_grad_(name in ("bias", "dynamic"))]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("causal", "bias_shape"), [(False, None), (True, None), (False, (1, 1, 3, 5)), (False, (2, 2, 3, 1))]
)
def test_the_operators_keep_pytorchs_contract(opcheck, causal, bias_shape):
    query, key, value = tensors(value_dim=3)
    bias = None if bias_shape is None else torch.randn(bias_shape, dtype=torch.float64)
    opcheck(fused_dense, FusedDense(query, key, value, bias, causal, 0.4))
    with torch.no_grad():
        call = FusedDense(*(x.detach() for x in (query, key, value)), bias, causal, 0.4)
        output, logsumexp = fused_dense(call)
        grads = torch.randn_like(output), torch.randn_like(logsumexp)
        for grad_logsumexp in (None, grads[1]):
            opcheck(_fused_dense_backward, FusedDenseBackward(call, output, logsumexp, grads[0], grad_logsumexp))


@pytest.mark.parametrize(
    ("implementation", "pattern", "masked"),
    [
        pytest.param(
            implementation,
            pattern,
            pattern is not None,
            marks=[] if implementation == FUSED[0] and pattern else pytest.mark.exhaustive,
        )
        for implementation in (*FUSED, "reference")
        for pattern in (None, Causal("bottom_right"))
    ],
    ids=str,
)
def test_compiles_whole_with_dynamic_lengths(implementation, pattern, masked):
    torch._dynamo.reset()
    counter, compilations = CompileCounterWithBackend("aot_eager"), []

    def function(query, key, value, mask):
        result = attend(query, key, value, pattern, mask=mask, return_logsumexp=True, implementation=implementation)
        return result.output, result.logsumexp

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((5, 7), (3, 11), (13, 17)):
        inputs = tensors(2, *lengths)
        mask = torch.rand(*lengths) < 0.9 if masked else None
        if masked:
            mask[:, 0] = True
        expected, actual = function(*inputs, mask), compiled(*inputs, mask)
        cotangents = [torch.randn_like(x) for x in expected]
        pairs = [*zip(expected, actual, strict=True)]
        pairs += zip(*(torch.autograd.grad(x, inputs, cotangents) for x in (expected, actual)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0


@pytest.mark.exhaustive
def test_compiles_to_machine_code():
    torch._dynamo.reset()
    inputs = tensors(2, 5, 7, dtype=torch.float32)

    def function(*inputs):
        return attend(*inputs, Causal("top_left"), dropout=0.5, return_weights=True)

    compiled = torch.compile(function, fullgraph=True)
    torch.manual_seed(4)
    expected = function(*inputs)
    torch.manual_seed(4)
    actual = compiled(*inputs)
    torch.testing.assert_close(actual.weights, expected.weights)
    assert not torch.equal(actual.output, attend(*inputs, Causal("top_left")).output)
    cotangent = torch.randn_like(expected.weights)
    for one, other in zip(
        torch.autograd.grad(actual.weights, inputs[:2], cotangent),
        torch.autograd.grad(expected.weights, inputs[:2], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@both
def test_a_second_derivative_under_compile_raises(implementation):
    torch._dynamo.reset()
    inputs = tensors()

    def function(*inputs):
        return attend(*inputs, implementation=implementation).output

    output = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    grads = torch.autograd.grad(output, inputs, torch.randn_like(output), create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grads[0].backward(torch.randn_like(grads[0]))


@both
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_autocast_casts_once(implementation, pattern):
    inputs = tensors(2, 7, 11, 3, 8, 8, dtype=torch.float32)
    settings = {"implementation": implementation, "return_logsumexp": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attend(*inputs, pattern, **settings)
    cast = attend(*(x.to(torch.bfloat16) for x in inputs), pattern, **settings)
    assert result.output.dtype == torch.bfloat16
    assert result.logsumexp.dtype == torch.float32
    assert torch.equal(result.output, cast.output)
    assert torch.equal(result.logsumexp, cast.logsumexp)
    plain = attend(*inputs, pattern, **settings)
    torch.testing.assert_close(result.output.float(), plain.output, rtol=0.03, atol=0.03)
    cotangent = torch.randn_like(plain.output)
    grads = torch.autograd.grad(result.output, inputs, cotangent.to(torch.bfloat16))
    for ours, exact in zip(grads, torch.autograd.grad(plain.output, inputs, cotangent), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.05)


@both
def test_autocast_leaves_float64_alone(implementation):
    inputs = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attend(*inputs, implementation=implementation)
    assert torch.equal(result.output, attend(*inputs, implementation=implementation).output)


def softmax_attention(query, key, value, hidden, bias, scale):
    """The plain way, in the dtype of its inputs."""
    scores = torch.einsum("blhd,bshd->bhls", query, key) * scale + bias
    return torch.einsum("bhls,bshe->blhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "bias"])
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(implementation, dtype, kind):
    inputs = tensors(2, 64, 64, 3, 16, 16, dtype)
    generator = torch.Generator().manual_seed(6)
    bias = torch.randn(64, generator=generator).to(dtype) if kind == "bias" else torch.zeros(64, dtype=dtype)
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1) if kind == "causal" else torch.zeros(64, 64).bool()
    cotangent = torch.randn(2, 64, 3, 16, generator=generator).to(dtype)

    def run(function, as_dtype):
        cast = [x.detach().to(as_dtype).requires_grad_() for x in inputs]
        output = function(*cast)
        return [output, *torch.autograd.grad(output, cast, cotangent.to(as_dtype))]

    def ours(*inputs):
        settings = {"bias": bias} if kind == "bias" else {}
        return attend(*inputs, Causal() if kind == "causal" else None, implementation=implementation, **settings).output

    def plain(query, key, value):
        return softmax_attention(query, key, value, hidden, bias.to(query.dtype), 0.25)

    exact = run(plain, torch.float64)
    for one, other, truth in zip(run(ours, dtype), run(plain, dtype), exact, strict=True):
        assert one.dtype == dtype
        # PyTorch's fused kernel takes an exponential that is right to 2^-20, in float32 too. Tiles take each weight's
        # from a score and a logsumexp, both rounded.
        relative = 2.0**-20 if implementation != "reference" and dtype == torch.float32 else torch.finfo(dtype).eps
        step = relative * truth.abs().max()
        ours_error, plain_error = ((x.double() - truth).abs().max() for x in (one, other))
        assert ours_error <= 2 * plain_error + step


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logsumexp_is_float32_for_small_dtypes(implementation, dtype):
    inputs = [x.detach() for x in tensors(2, 13, 17, dtype=dtype)]
    logsumexp = attend(*inputs, return_logsumexp=True, implementation=implementation).logsumexp
    query, key = (x.double() for x in inputs[:2])
    exact = torch.logsumexp(torch.einsum("blhd,bshd->blhs", query, key) / math.sqrt(3), -1)
    assert logsumexp.dtype == torch.float32
    torch.testing.assert_close(logsumexp.double(), exact, rtol=5e-5, atol=5e-5)


@both
@pytest.mark.parametrize("by", ["pattern", "mask", "bias"])
def test_the_jacobian_is_zero_outside_the_pattern_and_nowhere_else(implementation, by):
    inputs = tensors(1, 3, 5, 1)
    pairs = Causal("bottom_right").to_dense(3, 5) if by == "pattern" else MASK
    bias = torch.zeros(3, 5, dtype=torch.float64).masked_fill(~MASK, -torch.inf)
    settings = {"pattern": {"pattern": Causal("bottom_right")}, "mask": {"mask": MASK}, "bias": {"bias": bias}}[by]

    def function(*inputs):
        return attend(*inputs, **settings, implementation=implementation).output

    by_query, by_key, by_value = torch.autograd.functional.jacobian(function, tuple(inputs))
    for jacobian in (by_key, by_value):
        reached = (jacobian != 0).any(dim=(0, 2, 3, 4, 6, 7))
        assert torch.equal(reached, pairs)
    assert torch.equal((by_query != 0).any(dim=(0, 2, 3, 4, 6, 7)), torch.diag(pairs.sum(1) > 1))


@both
def test_heads_and_batch_do_not_mix(implementation):
    inputs = tensors(2, 2, 3, 3)

    def function(*inputs):
        return attend(*inputs, implementation=implementation).output

    for jacobian in torch.autograd.functional.jacobian(function, tuple(inputs)):
        reached = (jacobian != 0).any(dim=(1, 3, 5, 7))
        expected = torch.einsum("ac,bd->abcd", torch.eye(2), torch.eye(3)).bool()
        assert torch.equal(reached, expected)


@both
def test_permuting_keys_changes_nothing_and_permuting_queries_permutes(implementation):
    query, key, value = tensors(2, 7, 11, 3)
    mask, bias = torch.rand(7, 11) < 0.7, torch.randn(2, 1, 7, 11, dtype=torch.float64)
    queries, keys = torch.randperm(7), torch.randperm(11)
    settings = {"return_logsumexp": True, "implementation": implementation}
    expected = attend(query, key, value, mask=mask, bias=bias, **settings)
    mask, bias = (x[..., queries, :][..., keys] for x in (mask, bias))
    actual = attend(query[:, queries], key[:, keys], value[:, keys], mask=mask, bias=bias, **settings)
    torch.testing.assert_close(actual.output, expected.output[:, queries], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(actual.logsumexp, expected.logsumexp[:, queries], rtol=1e-12, atol=1e-13)


@both
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_batch_is_a_loop_over_it(implementation, pattern):
    inputs = tensors(5, 7, 11)
    mask = torch.rand(5, 2, 7, 11) < 0.7
    settings = {"implementation": implementation}
    whole = attend(*inputs, pattern, mask=mask, **settings).output
    parts = [attend(*(x[b : b + 1] for x in inputs), pattern, mask=mask[b : b + 1], **settings) for b in range(5)]
    looped = torch.cat([part.output for part in parts])
    torch.testing.assert_close(whole, looped, rtol=1e-13, atol=1e-14)
    cotangent = torch.randn_like(whole)
    for one, other in zip(
        torch.autograd.grad(whole, inputs, cotangent), torch.autograd.grad(looped, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_second(x):
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def one_row_for_all(x):
    return x[:, :1, :1].expand(x.shape)


def from_one_block(x):
    return torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, : x.shape[2]]


@pytest.mark.pairwise
@both
@pytest.mark.parametrize("rearrange", [heads_first, every_second, one_row_for_all, from_one_block])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_the_layout_in_memory_does_not_matter(implementation, rearrange, pattern, biased):
    inputs = tensors(2, 5, 7, 3, 4, 4)
    strided = [rearrange(x) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    packed = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in strided]
    bias = torch.randn(7, 5, dtype=torch.float64).T if biased else None
    settings = {"return_logsumexp": True, "implementation": implementation}
    actual = attend(*strided, pattern, bias=bias, **settings)
    expected = attend(*packed, pattern, bias=bias.contiguous() if biased else None, **settings)
    torch.testing.assert_close(actual.output, expected.output, rtol=1e-13, atol=1e-14)
    cotangent = every_second(torch.randn_like(expected.output))
    for one, other in zip(
        torch.autograd.grad(actual.output, strided, cotangent),
        torch.autograd.grad(expected.output, packed, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
