"""`interop.torch.MultiheadAttention` in PyTorch's own surroundings: weights, layers, modes, transforms, copies."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyattention import Causal, Graph, TopK, Window
from anyattention.interop.torch import MultiheadAttention, convert

_NESTED = "ignore:The PyTorch API of nested tensors:UserWarning"


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_encoder_layer(**settings: Any) -> nn.TransformerEncoderLayer:
    settings = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": True, "dtype": torch.float64} | settings
    return nn.TransformerEncoderLayer(8, 2, **settings)


def window_mask(length: int, reach: int = 1) -> Tensor:
    """What PyTorch's own attention takes for `Window(reach, reach)`."""
    return ~Window(reach, reach).to_dense(length, length)


def test_weights_load_strictly_both_ways() -> None:
    for settings in ({}, {"bias": False}, {"kdim": 3, "vdim": 5}, {"add_bias_kv": True, "add_zero_attn": True}):
        ours, theirs = MultiheadAttention(8, 2, **settings), nn.MultiheadAttention(8, 2, **settings)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_the_same_seed_gives_the_same_weights() -> None:
    torch.manual_seed(3)
    ours = MultiheadAttention(8, 2, add_bias_kv=True)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_its_repr_shows_the_pattern() -> None:
    assert "Window(left=1, right=2" in repr(MultiheadAttention(8, 2, pattern=Window(1, 2)))


# In evaluation without gradients PyTorch's encoder layers read the weights of `self_attn` and do not call it.


def replaced(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    layer = copy.deepcopy(layer)
    ours = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, pattern=Window(1, 1))
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    return layer


def converted(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    return convert(copy.deepcopy(layer), Window(1, 1))


def deep_copied(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    return copy.deepcopy(converted(layer))


def pickled(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    return pickle.loads(pickle.dumps(replaced(layer)))


def saved_and_loaded(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    file = io.BytesIO()
    torch.save(converted(layer), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def converted_and_cast(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    return converted(layer).to(torch.float32).to(torch.float64)


def hooks_removed(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    layer = converted(layer)
    handles = [module.register_forward_hook(lambda *_: None) for module in layer.modules()]
    for handle in handles:
        handle.remove()
    for module in layer.modules():
        module._forward_hooks.clear()
    return layer


_WAYS = [replaced, converted, deep_copied, pickled, saved_and_loaded, converted_and_cast, hooks_removed]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", _WAYS, ids=lambda way: way.__name__)
def test_evaluation_does_not_leave_out_the_pattern(way: Callable[..., nn.Module], mode: Callable[..., Any]) -> None:
    layer = make_encoder_layer()
    x = rows(2, 7, 8)
    expected, full = layer(x, src_mask=window_mask(7)), layer(x)
    ours = way(layer)
    # As far as a layer was cast, it is as exact as that.
    tolerance = 1e-5 if way is converted_and_cast else 1e-10
    close(ours(x), expected, tolerance)
    ours.eval()
    close(ours(x), expected, tolerance)
    with mode():
        output = ours(x)
    close(output.clone(), expected, tolerance)
    assert (output - full).abs().max() > 0.01


@pytest.mark.filterwarnings(_NESTED)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", _WAYS, ids=lambda way: way.__name__)
def test_an_encoder_with_nested_tensors_keeps_the_pattern(way: Callable[..., Any], mode: Callable[..., Any]) -> None:
    layer = make_encoder_layer()
    x = rows(3, 7, 8)
    is_padding = torch.arange(7) >= torch.tensor([7, 4, 1])[:, None]
    ours = nn.TransformerEncoder(way(layer), 2)
    theirs = nn.TransformerEncoder(layer, 2)
    mask = window_mask(7)
    tolerance = 1e-5 if way is converted_and_cast else 1e-10
    # The last sequence has rows whose keys are all padding, which PyTorch has as NaN.
    is_row = ~is_padding
    expected = theirs(x, mask=mask, src_key_padding_mask=is_padding)[is_row]
    close(ours(x, src_key_padding_mask=is_padding)[is_row], expected, tolerance)
    for module in (ours, theirs):
        module.eval()
    with mode():
        output = ours(x, src_key_padding_mask=is_padding)
        full = theirs(x, src_key_padding_mask=is_padding)
    close(output.clone()[is_row], expected, tolerance)
    assert (output[is_row] - full[is_row]).abs().max() > 0.01
    # PyTorch pads its nested tensors with 0.
    assert not output[is_padding].any()


@pytest.mark.filterwarnings(_NESTED)
def test_a_whole_encoder_with_nested_tensors_equals_pytorchs() -> None:
    theirs = nn.TransformerEncoder(make_encoder_layer(), 3, norm=nn.LayerNorm(8, dtype=torch.float64)).eval()
    ours = convert(copy.deepcopy(theirs))
    x = rows(4, 7, 8)
    is_padding = torch.arange(7) >= torch.tensor([7, 4, 1, 5])[:, None]
    with torch.no_grad():
        close(ours(x, src_key_padding_mask=is_padding), theirs(x, src_key_padding_mask=is_padding))
        nested = torch.nested.nested_tensor([each[:length] for each, length in zip(x, [7, 4, 1, 5], strict=True)])
        result = ours.layers[0](nested)
        assert result.is_nested
        close(result.to_padded_tensor(0.0), theirs.layers[0](nested).to_padded_tensor(0.0))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", _NESTED)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_equals_pytorchs(batch_first: bool, norm_first: bool, is_training: bool) -> None:
    theirs = nn.Transformer(
        8, 2, 2, 2, 12, dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    ).train(is_training)
    ours = convert(copy.deepcopy(theirs))
    assert sum(isinstance(module, MultiheadAttention) for module in ours.modules()) == 6
    source, target = rows(2, 7, 8), rows(2, 5, 8)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    is_padding = torch.arange(7) >= torch.tensor([7, 4])[:, None]
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        "src_key_padding_mask": is_padding,
        "memory_key_padding_mask": is_padding,
    }
    results, gradients = [], []
    cotangent = torch.randn_like(target)
    for model in (ours, theirs):
        leaves = [source.clone().requires_grad_(), target.clone().requires_grad_()]
        result = model(*leaves, **masks)
        results.append(result)
        gradients.append(torch.autograd.grad(result, [*leaves, *model.parameters()], cotangent))
    close(*results)
    for mine, right in zip(*gradients, strict=True):
        close(mine, right, 1e-9)
    with torch.no_grad():
        close(ours(source, target, **masks), theirs(source, target, **masks))


@pytest.mark.parametrize("is_training", [True, False])
def test_a_decoder_layer_with_a_pattern_in_its_self_attention_alone(is_training: bool) -> None:
    theirs = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    convert(ours.self_attn, Causal() & Window(2, 2))
    target, memory = rows(2, 5, 8), rows(2, 7, 8)
    mask = ~(Causal() & Window(2, 2)).to_dense(5, 5)
    close(ours.train(is_training)(target, memory), theirs.train(is_training)(target, memory, tgt_mask=mask))
    assert type(ours.multihead_attn) is nn.MultiheadAttention


def test_top_k_keeps_the_strongest_pairs() -> None:
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    ours = convert(copy.deepcopy(theirs), TopK(3))
    x = rows(2, 7, 8)
    _, weights = theirs(x, x, x, average_attn_weights=False)
    # The strongest three, among themselves.
    kept = weights.where(weights >= weights.topk(3).values[..., -1:], 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    output, found = ours(x, x, x, average_attn_weights=False)
    close(found, kept)
    value = torch.nn.functional.linear(x, *(each.chunk(3)[2] for each in (theirs.in_proj_weight, theirs.in_proj_bias)))
    heads = kept @ value.unflatten(-1, (2, 4)).transpose(1, 2)
    close(output, theirs.out_proj(heads.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("hint", [True, False])
@pytest.mark.parametrize("among", [None, Window(3, 1)])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_top_k_among_other_pairs(extra: dict[str, bool], among: Window | None, hint: bool) -> None:
    theirs = nn.MultiheadAttention(8, 2, **extra, dtype=torch.float64)
    ours = convert(copy.deepcopy(theirs), TopK(2, among=among))
    x, mask = rows(7, 3, 8), torch.ones(7, 7).triu(1).bool() if hint else torch.rand(7, 7) < 0.3
    mask.diagonal().fill_(False)
    own = mask if among is None else mask | ~among.to_dense(7, 7)
    _, weights = theirs(x, x, x, attn_mask=own, average_attn_weights=False)
    kept = weights.where(weights >= weights.topk(2).values[..., -1:], 0.0)
    output, found = ours(x, x, x, attn_mask=mask, is_causal=hint, average_attn_weights=False)
    close(found, kept / kept.sum(-1, keepdim=True))
    close(ours(x, x, x, attn_mask=mask, is_causal=hint)[1], found.mean(1))
    close(ours(x, x, x, attn_mask=mask, is_causal=hint, need_weights=False)[0], output)


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_at_the_edges_of_a_graph(batch_first: bool) -> None:
    theirs = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64)
    key = torch.tensor([1, 2, 3, 4, 0, 0, 1, 2, 3, 4])
    graph = Graph.from_edge_index(torch.stack([key, torch.arange(5).repeat(2)]), 5)
    ours = convert(copy.deepcopy(theirs), graph)
    x = rows(3, 5, 8) if batch_first else rows(5, 3, 8)
    own = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~graph.to_dense(5, 5), float("-inf"))
    added, padding = rows(6, 5, 5), rows(3, 5)
    output, weights = ours(x, x, x, attn_mask=added, key_padding_mask=padding)
    expected, expected_weights = theirs(x, x, x, attn_mask=added + own, key_padding_mask=padding)
    close(output, expected)
    close(weights, expected_weights)


def test_a_row_without_keys_has_the_bias_of_out_proj() -> None:
    ours = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    nn.init.normal_(ours.out_proj.bias)
    x = rows(2, 5, 8).requires_grad_()
    blocked = torch.zeros(5, 5, dtype=torch.bool)
    blocked[2] = True
    for mask in (blocked, torch.zeros(5, 5, dtype=torch.float64).masked_fill(blocked, float("-inf"))):
        output, weights = ours(x, x, x, attn_mask=mask)
        assert weights is not None
        assert torch.equal(output[:, 2], ours.out_proj.bias.expand(2, 8))
        assert torch.equal(weights[:, 2], torch.zeros(2, 5, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(output, x, torch.randn_like(output))
        assert gradient.isfinite().all()
    padded = torch.tensor([False, True])[:, None].expand(2, 5)
    output, _ = ours(x, x, x, key_padding_mask=padded, need_weights=False)
    assert torch.equal(output[1], ours.out_proj.bias.expand(5, 8))
    with torch.no_grad():
        output, _ = ours.eval()(x, x, x, key_padding_mask=padded, need_weights=False)
    assert torch.equal(output[1], ours.out_proj.bias.expand(5, 8))


def test_dropout_keeps_the_mean_and_the_weights_before_it() -> None:
    ours = MultiheadAttention(8, 2, dropout=0.4, batch_first=True, dtype=torch.float64, pattern=Window(2, 2))
    x = rows(1, 7, 8)
    expected, weights = ours.eval()(x, x, x)
    ours.train()
    draws = [ours(x, x, x) for _ in range(600)]
    outputs = torch.stack([output for output, _ in draws])
    assert all(torch.equal(drawn, weights) for _, drawn in draws)
    deviation = outputs.std(0)
    assert deviation.min() > 0.001
    assert ((outputs.mean(0) - expected).abs() < 5 * deviation / 600**0.5).all()
    torch.manual_seed(1)
    first, _ = ours(x, x, x)
    torch.manual_seed(1)
    assert torch.equal(ours(x, x, x)[0], first)


class Adapter(nn.Module):
    """Around a projection, and no `nn.Linear`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * self.inner(x)


@pytest.mark.parametrize("pattern", [None, Window(1, 1)])
def test_out_proj_is_called_as_a_module(pattern: Window | None) -> None:
    ours = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, pattern=pattern)
    x = rows(2, 5, 8)
    plain, _ = ours(x, x, x)
    hook = ours.out_proj.register_forward_hook(lambda module, args, output: 3 * output)
    close(ours(x, x, x)[0], 3 * plain)
    hook.remove()
    torch.nn.utils.parametrizations.weight_norm(ours.out_proj)
    close(ours(x, x, x)[0], plain)
    ours.out_proj = Adapter(ours.out_proj)  # pyright: ignore[reportArgumentType]  # as PEFT does
    for is_training in (True, False):
        with torch.set_grad_enabled(is_training):
            close(ours.train(is_training)(x, x, x)[0], 2 * plain)
    assert ours.out_proj.calls == 2


def test_hooks_of_the_module_are_called() -> None:
    ours = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = rows(2, 5, 8)
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("before"))
    ours.register_forward_hook(lambda module, args, output: seen.append("after"))
    ours(x, x, x)
    assert seen == ["before", "after"]


@pytest.mark.parametrize("pattern", [None, Window(1, 1), TopK(2)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_compile_makes_one_graph(pattern: Window | TopK | None, need_weights: bool) -> None:
    ours = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, pattern=pattern)
    x, mask = rows(2, 5, 8), torch.rand(2, 5) < 0.3

    def call(x: Tensor, mask: Tensor) -> Tensor:
        output, weights = ours(x, x, x, key_padding_mask=mask, need_weights=need_weights)
        return output if weights is None else output * weights.square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = [each(leaf, mask) for each, leaf in zip((compiled, call), leaves, strict=True)]
    close(*results)
    cotangent = torch.randn_like(results[0])
    close(*(torch.autograd.grad(result, leaf, cotangent)[0] for result, leaf in zip(results, leaves, strict=True)))


def test_a_compiled_encoder_layer_keeps_the_pattern_in_evaluation() -> None:
    layer = make_encoder_layer()
    x = rows(2, 5, 8)
    expected = layer(x, src_mask=window_mask(5))
    ours = convert(layer, Window(1, 1)).eval()
    with torch.no_grad():
        close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_an_exported_or_traced_encoder_layer_keeps_the_pattern_in_evaluation() -> None:
    layer = make_encoder_layer()
    x = rows(2, 5, 8)
    expected = layer(x, src_mask=window_mask(5))
    ours = convert(layer, Window(1, 1)).eval()
    with torch.no_grad():
        close(torch.export.export(ours, (x,)).module()(x), expected)
        close(torch.jit.trace(ours, (x,))(x), expected)


@pytest.mark.parametrize("pattern", [None, Window(1, 1)])
def test_autocast_runs_in_bfloat16(pattern: Window | None) -> None:
    ours = MultiheadAttention(8, 2, batch_first=True, pattern=pattern)
    x = torch.randn(2, 5, 8)
    expected, _ = ours(x, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = ours(x, x, x)
        assert ours.explain_forward(x, x, x).implementation == "cpu"
    assert output.dtype == torch.bfloat16
    assert weights is not None
    close(output.float(), expected, 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [None, Window(1, 1)])
def test_low_precision_is_as_exact_as_pytorchs(pattern: Window | None, dtype: torch.dtype) -> None:
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=dtype)
    ours = convert(copy.deepcopy(theirs), pattern)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(2, 13, 8).to(dtype)
    mask = None if pattern is None else window_mask(13)
    assert ours.explain_forward(x, x, x).implementation == "cpu"
    expected, _ = exact(*[x.double()] * 3, attn_mask=mask)
    errors = [
        (module(x, x, x, **more)[0].double() - expected).abs().max()
        for module, more in ((ours, {}), (theirs, {"attn_mask": mask}))
    ]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("pattern", [None, Window(1, 1)])
def test_functional_call_and_vmap_over_models(pattern: Window | None) -> None:
    models = [MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, pattern=pattern) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(models)  # pyright: ignore[reportArgumentType]  # a list of modules
    x = rows(2, 5, 8)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], parameters, (x, x, x), {"need_weights": False})[0]

    expected = torch.stack([model(x, x, x)[0] for model in models])
    close(call(dict(models[1].named_parameters()), x), expected[1])
    close(torch.func.vmap(call, in_dims=(0, None))(parameters, x), expected)
    many = rows(3, 2, 5, 8)
    close(
        torch.func.vmap(call, in_dims=(None, 0))(dict(models[0].named_parameters()), many),
        torch.stack([models[0](each, each, each)[0] for each in many]),
    )
    cotangent = rows(2, 5, 8)
    gradient = torch.func.grad(lambda x: (call(dict(models[0].named_parameters()), x) * cotangent).sum())(x)
    leaf = x.clone().requires_grad_()
    close(gradient, torch.autograd.grad(models[0](leaf, leaf, leaf)[0], leaf, cotangent)[0])


def test_derivatives_to_the_second_order() -> None:
    ours = MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64, pattern=Window(1, 1))
    x = rows(1, 3, 4).requires_grad_()

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return ours(x, x, x)

    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))
