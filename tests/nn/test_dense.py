"""ScaledDotProductAttention and MultiHeadAttention against torch.nn.MultiheadAttention and formulas written out."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from anyattention import AttentionConfig, attend, explain, mask_from_blocked
from anyattention.errors import (
    DimensionMismatchError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    NumericalInstabilityError,
    OutOfMemoryError,
)
from anyattention.nn import MultiHeadAttention, ScaledDotProductAttention

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 12, 3


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def features(*lengths, batch=BATCH, width=WIDTH, dtype=torch.float64):
    drawn = [torch.randn(batch, length, width, dtype=dtype, requires_grad=True) for length in lengths]
    return drawn[0] if len(drawn) == 1 else drawn


def twins(**settings):
    """Our module and PyTorch's, with the same random weights."""
    ours = MultiHeadAttention(WIDTH, HEADS, dropout=0.0, dtype=torch.float64, **settings)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, bias=ours.config.use_bias, batch_first=True, dtype=torch.float64)
    projections = [ours.query_projection, ours.key_projection, ours.value_projection]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        theirs.out_proj.weight.copy_(ours.output_projection.weight)
        if ours.config.use_bias:
            theirs.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
            theirs.out_proj.bias.copy_(ours.output_projection.bias)
    return ours, theirs


def parameter_gradients(ours, theirs):
    """Pairs of gradients of the same parameters."""
    projections = [ours.query_projection, ours.key_projection, ours.value_projection]
    pairs = [
        (torch.cat([projection.weight.grad for projection in projections]), theirs.in_proj_weight.grad),
        (ours.output_projection.weight.grad, theirs.out_proj.weight.grad),
    ]
    if ours.config.use_bias:
        pairs.append((torch.cat([projection.bias.grad for projection in projections]), theirs.in_proj_bias.grad))
        pairs.append((ours.output_projection.bias.grad, theirs.out_proj.bias.grad))
    return pairs


BLOCKED = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) < 0.4
BLOCKED[:, 0] = False
BLOCKED_BATCH = torch.rand(BATCH, QUERIES, KEYS, generator=torch.Generator().manual_seed(2)) < 0.4
BLOCKED_BATCH[..., 1] = False
BLOCKED_KEYS = torch.arange(KEYS) >= torch.tensor([[7], [4], [5]])
BLOCKED_HEADS = torch.rand(BATCH, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(3)) < 0.4
BLOCKED_HEADS[..., 2] = False
BIAS = torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

# What is masked: our arguments, and theirs.
MASKS = {
    "nothing": ({}, {}),
    "rank 1": ({"mask": mask_from_blocked(BLOCKED[0])}, {"attn_mask": BLOCKED[0].expand(QUERIES, KEYS)}),
    "rank 2": ({"mask": mask_from_blocked(BLOCKED)}, {"attn_mask": BLOCKED}),
    "rank 3": (
        {"mask": mask_from_blocked(BLOCKED_BATCH)},
        {"attn_mask": BLOCKED_BATCH.repeat_interleave(HEADS, dim=0)},
    ),
    "rank 4": ({"mask": mask_from_blocked(BLOCKED_HEADS)}, {"attn_mask": BLOCKED_HEADS.flatten(0, 1)}),
    "key padding": ({"mask": mask_from_blocked(BLOCKED_KEYS)[:, None]}, {"key_padding_mask": BLOCKED_KEYS}),
    "bias": ({"bias": BIAS}, {"attn_mask": BIAS}),
    "bias of rank 3": (
        {"bias": BIAS.expand(BATCH, QUERIES, KEYS)},
        {"attn_mask": BIAS.expand(BATCH * HEADS, QUERIES, KEYS)},
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("weights", ["mean", "heads", False])
def test_multi_head_attention_is_pytorchs(name, use_bias, weights):
    ours, theirs = twins(use_bias=use_bias)
    inputs = features(QUERIES, KEYS, KEYS)
    our_mask, their_mask = MASKS[name]
    expected, expected_weights = theirs(
        *inputs, **their_mask, need_weights=weights is not False, average_attn_weights=weights == "mean"
    )
    actual = ours(*inputs, **our_mask, return_weights=weights)
    assert_close(actual.output, expected)
    cotangents = [torch.randn_like(expected)]
    pairs = [(actual.output, expected)]
    if weights:
        assert_close(actual.weights, expected_weights)
        cotangents.append(torch.randn_like(expected_weights))
        pairs.append((actual.weights, expected_weights))
    else:
        assert actual.weights is None
    gradients = []
    for module, results in zip((ours, theirs), zip(*pairs, strict=True), strict=True):
        sum((c * x).sum() for c, x in zip(cotangents, results, strict=True)).backward(
            inputs=[*inputs, *module.parameters()]
        )
        gradients.append([x.grad for x in inputs])
        for x in inputs:
            x.grad = None
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)
    for one, other in parameter_gradients(ours, theirs):
        assert_close(one, other)


@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_is_pytorchs(causal):
    ours, theirs = twins(causal=causal)
    x = features(KEYS)
    blocked = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1) if causal else None
    expected, expected_weights = theirs(x, x, x, attn_mask=blocked)
    output, weights = ours(x)
    assert_close(output, expected)
    assert_close(weights, expected_weights)
    cotangent = torch.randn_like(expected)
    (one,), (other,) = (torch.autograd.grad(result, x, cotangent) for result in (output, expected))
    assert_close(one, other)


def test_defaults_of_key_and_value():
    ours, _ = twins()
    query, key = features(QUERIES, KEYS)
    assert torch.equal(ours(query).output, ours(query, query, query).output)
    assert torch.equal(ours(query, key).output, ours(query, key, key).output)


@pytest.mark.parametrize("name", MASKS)
def test_scaled_dot_product_attention_is_pytorchs_without_projections(name):
    ours = ScaledDotProductAttention(WIDTH, HEADS, dropout=0.0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(WIDTH).repeat(3, 1))
        theirs.out_proj.weight.copy_(torch.eye(WIDTH))
    inputs = features(QUERIES, KEYS, KEYS)
    our_mask, their_mask = MASKS[name]
    expected, expected_weights = theirs(*inputs, **their_mask)
    output, weights = ours(*inputs, **our_mask)
    assert_close(output, expected)
    assert_close(weights, expected_weights)
    cotangent = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(x, inputs, cotangent) for x in (output, expected)), strict=True):
        assert_close(one, other)


def test_masks_that_broadcast_within_rank_3():
    ours, _ = twins()
    inputs = features(QUERIES, KEYS, KEYS)
    padding = mask_from_blocked(BLOCKED_KEYS)
    whole = padding[:, None].expand(BATCH, QUERIES, KEYS)
    for mask in (padding[:, None], padding[:, None, None], whole, whole[:, None]):
        assert_close(ours(*inputs, mask).output, ours(*inputs, whole.clone()).output)


# Positions


def sines(length):
    table = torch.zeros(length, WIDTH, dtype=torch.float64)
    for position in range(length):
        for i in range(0, WIDTH, 2):
            table[position, i] = math.sin(position / 10000 ** (i / WIDTH))
            table[position, i + 1] = math.cos(position / 10000 ** (i / WIDTH))
    return table


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_positions_are_added_to_query_and_key_only(positions):
    placed = MultiHeadAttention(WIDTH, HEADS, dropout=0.0, positions=positions, max_seq_len=KEYS, dtype=torch.float64)
    plain = MultiHeadAttention(WIDTH, HEADS, dropout=0.0, dtype=torch.float64)
    plain.load_state_dict({name: x for name, x in placed.state_dict().items() if "position" not in name})
    table = sines(KEYS) if positions == "sinusoidal" else placed.position_embedding
    query, key, value = features(QUERIES, KEYS, KEYS)
    expected = plain(query + table[:QUERIES], key + table, value)
    actual = placed(query, key, value)
    # The table of sines is kept in float32.
    tolerance = 1e-6 if positions == "sinusoidal" else 1e-12
    assert_close(actual.output, expected.output, tolerance)
    assert_close(actual.weights, expected.weights, tolerance)
    own = placed(query, query, query)
    assert_close(own.output, plain(query + table[:QUERIES], query + table[:QUERIES], query).output, tolerance)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize(("lengths", "argument"), [((8, 7), "query"), ((5, 8), "key")])
def test_max_seq_len_is_enforced_where_positions_are(positions, lengths, argument):
    module = MultiHeadAttention(WIDTH, HEADS, positions=positions, max_seq_len=7)
    with pytest.raises(DimensionMismatchError, match=f"{argument}: expected a length of at most max_seq_len=7.*got 8"):
        module(*features(*lengths, dtype=torch.float32))
    assert MultiHeadAttention(WIDTH, HEADS, max_seq_len=7)(*features(8, 9, dtype=torch.float32)).output.shape[1] == 8


def test_odd_widths_have_sines_too():
    module = MultiHeadAttention(5, 1, positions="sinusoidal", max_seq_len=3, dropout=0.0)
    assert module(torch.randn(2, 3, 5)).output.isfinite().all()


# Settings


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_query_and_key_are_normalised_by_their_root_mean_square(eps):
    module = MultiHeadAttention(WIDTH, HEADS, dropout=0.0, qk_norm=True, eps=eps, dtype=torch.float64)
    with torch.no_grad():
        module.query_norm.weight.copy_(torch.randn(4))
        module.key_norm.weight.copy_(torch.randn(4))
    inputs = features(QUERIES, KEYS, KEYS)
    query, key, value = (
        projection(x).reshape(BATCH, -1, HEADS, 4)
        for projection, x in zip(
            (module.query_projection, module.key_projection, module.value_projection), inputs, strict=True
        )
    )
    query = query / (query.square().mean(-1, keepdim=True) + eps).sqrt() * module.query_norm.weight
    key = key / (key.square().mean(-1, keepdim=True) + eps).sqrt() * module.key_norm.weight
    weights = (torch.einsum("blhd,bshd->bhls", query, key) / 2).softmax(-1)
    output = module.output_projection(torch.einsum("bhls,bshd->blhd", weights, value).flatten(2))
    actual = module(*inputs, return_weights="heads")
    assert_close(actual.output, output)
    assert_close(actual.weights, weights)


CHANGES = {
    "dropout": {"dropout": 0.5},
    "scale": {"scale": 0.9},
    "causal": {"causal": True},
    "use_bias": {"use_bias": False},
    "positions": {"positions": "sinusoidal"},
    "learned positions": {"positions": "learned"},
    "qk_norm": {"qk_norm": True},
    "eps": {"qk_norm": True, "eps": 0.3},
    "num_heads": {"num_heads": 2},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_setting_changes_what_is_computed(name):
    base = {"d_model": WIDTH, "num_heads": HEADS, "dropout": 0.0}
    if name == "eps":
        base["qk_norm"] = True
    modules = [MultiHeadAttention(**settings, dtype=torch.float64) for settings in (base, {**base, **CHANGES[name]})]
    with torch.no_grad():
        for module in modules:
            module.load_state_dict(
                {k: v for k, v in modules[0].state_dict().items() if k in module.state_dict()}, strict=False
            )
            if module.config.use_bias:
                module.value_projection.bias.fill_(0.7)
    x = features(QUERIES)
    one, other = (module(x).output for module in modules)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("change", [{"dropout": 0.5}, {"scale": 0.9}, {"causal": True}, {"num_heads": 2}], ids=str)
def test_each_setting_of_scaled_dot_product_attention_changes_what_is_computed(change):
    base = {"d_model": WIDTH, "num_heads": HEADS, "dropout": 0.0}
    x = features(QUERIES)
    one, other = (ScaledDotProductAttention(**settings)(x).output for settings in (base, {**base, **change}))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("module_class", [MultiHeadAttention, ScaledDotProductAttention])
def test_dropout_is_for_training_only_and_leaves_the_weights(module_class):
    module = module_class(WIDTH, HEADS, dropout=0.5)
    x = features(QUERIES, dtype=torch.float32)
    trained = [module(x) for _ in range(2)]
    assert not torch.equal(trained[0].output, trained[1].output)
    assert torch.equal(trained[0].weights, trained[1].weights)
    module.eval()
    assert torch.equal(module(x).output, module(x).output)
    assert torch.equal(module(x).weights, trained[0].weights)


@pytest.mark.parametrize("module_class", [MultiHeadAttention, ScaledDotProductAttention])
def test_check_finite_names_what_broke(module_class):
    x = torch.randn(2, 3, WIDTH)
    x[1, 2, 0] = torch.nan
    assert module_class(WIDTH, HEADS).eval()(x).output.isnan().any()
    checked = module_class(WIDTH, HEADS, check_finite=True).eval()
    with pytest.raises(NumericalInstabilityError, match=f"{module_class.__name__} output: .* NaN or Inf among 72"):
        checked(x)
    assert checked(x[:1]).output.isfinite().all()


@pytest.mark.parametrize("module_class", [MultiHeadAttention, ScaledDotProductAttention])
def test_causal_needs_equal_lengths(module_class):
    with pytest.raises(DimensionMismatchError, match="causal: expected as many queries as keys"):
        module_class(WIDTH, HEADS, causal=True)(*features(QUERIES, KEYS, dtype=torch.float32))


def test_settings_that_cannot_be_used_are_refused():
    for change in ({"use_bias": False}, {"qk_norm": True}, {"eps": 1e-3}, {"positions": "learned"}, {"max_seq_len": 9}):
        (name,) = change
        with pytest.raises(InvalidConfigError, match=f"{name}: expected its default"):
            ScaledDotProductAttention.from_config(AttentionConfig(WIDTH, HEADS, **change))


BAD_CALLS = [
    ("rank", (torch.zeros(3, WIDTH),), {}, DimensionMismatchError, r"query: expected \(batch, query_length, d"),
    ("width", (torch.zeros(2, 3, 11),), {}, DimensionMismatchError, "d_model is 12 in the module"),
    ("batch", (torch.zeros(2, 3, WIDTH), torch.zeros(1, 3, WIDTH)), {}, DimensionMismatchError, "batch is 2 in query"),
    ("integers", (torch.zeros(2, 3, WIDTH).long(),), {}, InvalidInputError, "query: expected a floating-point dtype"),
    ("no tensor", ("x",), {}, InvalidInputError, "query: expected a torch.Tensor, got str"),
    ("integer mask", (torch.zeros(2, 3, WIDTH),), {"mask": torch.ones(3)}, InvalidMaskError, "mask_from_blocked"),
    ("mask", (torch.zeros(2, 3, WIDTH),), {"mask": torch.ones(4) > 0}, InvalidMaskError, "broadcasts to"),
    ("weights", (torch.zeros(2, 3, WIDTH),), {"return_weights": 1.5}, InvalidInputError, "return_weights: expected"),
]  # fmt: skip


@pytest.mark.parametrize("module_class", [MultiHeadAttention, ScaledDotProductAttention])
@pytest.mark.parametrize(
    ("arguments", "settings", "error", "match"), [call[1:] for call in BAD_CALLS], ids=[call[0] for call in BAD_CALLS]
)
def test_a_bad_call_says_what_is_wrong(module_class, arguments, settings, error, match):
    with pytest.raises(error, match=match):
        module_class(WIDTH, HEADS)(*arguments, **settings)


# The module as a module


@pytest.mark.parametrize("positions", ["none", "sinusoidal", "learned"])
def test_state_dict_and_deepcopy(positions):
    settings = {"positions": positions, "qk_norm": True, "max_seq_len": 9, "dropout": 0.0}
    module, other = (MultiHeadAttention(WIDTH, HEADS, **settings) for _ in range(2))
    x = features(QUERIES, dtype=torch.float32)
    assert not torch.equal(module(x).output, other(x).output)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x).output, other(x).output)
    twin = copy.deepcopy(module)
    assert torch.equal(module(x).output, twin(x).output)
    with torch.no_grad():
        twin.query_projection.weight.zero_()
    assert torch.equal(module(x).output, other(x).output)


@pytest.mark.parametrize("positions", ["none", "sinusoidal", "learned"])
def test_device_and_dtype_of_the_parameters(positions):
    settings = {"positions": positions, "qk_norm": True, "max_seq_len": 9}
    module = MultiHeadAttention(WIDTH, HEADS, **settings, device="meta", dtype=torch.bfloat16)
    for tensor in (*module.parameters(), *module.buffers()):
        assert tensor.device.type == "meta"
        assert tensor.dtype == torch.bfloat16
    low = MultiHeadAttention.from_config(module.config, dtype=torch.bfloat16)
    assert low(torch.randn(2, 3, WIDTH, dtype=torch.bfloat16)).output.dtype == torch.bfloat16


@pytest.mark.parametrize("return_weights", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_compiles_whole(return_weights):
    torch._dynamo.reset()
    module = MultiHeadAttention(WIDTH, HEADS, dropout=0.0, causal=True, positions="learned", qk_norm=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 7):
        x = features(length, dtype=torch.float32)
        mask = torch.ones(length, length, dtype=torch.bool)
        expected, actual = (m(x, mask=mask, return_weights=return_weights).output for m in (module, compiled))
        assert_close(actual, expected, 1e-5)
        cotangent = torch.randn_like(expected)
        one, other = (torch.autograd.grad(y, [x, *module.parameters()], cotangent) for y in (actual, expected))
        for ours, theirs in zip(one, other, strict=True):
            assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("module_class", [MultiHeadAttention, ScaledDotProductAttention])
@pytest.mark.parametrize("return_weights", [True, False])
def test_autocast(module_class, return_weights):
    module = module_class(WIDTH, HEADS, dropout=0.0)
    x = features(QUERIES, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = module(x, return_weights=return_weights)
    assert result.output.dtype == torch.bfloat16
    torch.testing.assert_close(result.output.float(), module(x).output, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("return_weights", [True, False])
def test_calls_from_several_threads_give_the_same_bits(return_weights):
    module = MultiHeadAttention(64, 4, dropout=0.0, positions="learned")
    inputs = [torch.randn(2, 37, 64) for _ in range(4)]
    cotangent = torch.randn(2, 37, 64)

    def call(x):
        x = x.clone().requires_grad_()
        output, cache = module.cached_forward(x, return_weights=return_weights)
        gradient = torch.autograd.grad(module(x, return_weights=return_weights).output, x, cotangent)[0]
        return output.output, cache.output, gradient

    expected = [call(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(call, inputs * 8))
    for position, results in enumerate(actual):
        for one, other in zip(results, expected[position % 4], strict=True):
            assert torch.equal(one, other)


def test_weights_that_cannot_fit_are_refused_before_they_are_allocated():
    length = 1 << 24
    x = torch.zeros(1, 1, 1).expand(1, length, 1)
    module = ScaledDotProductAttention(1, 1, dropout=0.0)
    with pytest.raises(OutOfMemoryError, match="the matrix of weights") as caught:
        module(x)
    assert caught.value.size == 4 * length**2


def test_weights_never_force_a_slow_path_when_they_are_spared():
    x = features(QUERIES, dtype=torch.float32).unflatten(-1, (HEADS, -1))
    assert explain(x, x, x).implementation in ("cpu", "torch")
    module = ScaledDotProductAttention(WIDTH, HEADS, dropout=0.0)
    assert torch.equal(module(x.flatten(2), return_weights=False).output, attend(x, x, x).output.flatten(2))
