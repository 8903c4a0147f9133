"""`interop.torch.convert`: what stays as it was, what changes, and what is refused as a whole."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from anyattention import Full, Window
from anyattention.errors import InvalidConfigError, InvalidInputError, UnsupportedError
from anyattention.interop.torch import MultiheadAttention, convert


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def make_attention(**settings: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **settings)


def rows() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64)


WINDOW = ~Window(1, 1).to_dense(5, 5)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Other(nn.MultiheadAttention):
    """May compute anything."""


class Ours(MultiheadAttention):
    """Of our class, and a user's."""


def test_objects_and_their_settings_stay() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True).eval()
    layer.self_attn.in_proj_bias.requires_grad_(False)
    layer.multihead_attn.train()
    modules, parameters = dict(layer.named_modules()), dict(layer.named_parameters())
    settings = {name: (module.training, module._forward_hooks) for name, module in modules.items()}
    assert convert(layer, Window(1, 1)) is layer
    for name, module in modules.items():
        assert layer.get_submodule(name) is module
        assert module.training == settings[name][0]
        assert module._forward_hooks is settings[name][1]
    assert list(parameters) == [name for name, _ in layer.named_parameters()]
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert not layer.self_attn.in_proj_bias.requires_grad
    for attention in (layer.self_attn, layer.multihead_attn):
        assert type(attention) is MultiheadAttention
        assert attention.pattern == Window(1, 1)


def test_hooks_stay() -> None:
    attention, seen = make_attention(), []
    attention.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    attention.register_full_backward_hook(lambda *_: seen.append("backward"))
    attention.register_state_dict_post_hook(lambda *_: seen.append("state"))
    x = rows().requires_grad_()
    convert(attention)(x, x, x)[0].sum().backward()
    attention.state_dict()
    assert seen == [MultiheadAttention, "backward", "state"]


def test_an_optimizer_goes_on() -> None:
    theirs = make_attention()
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.1) for module in (ours, theirs)]
    for step in range(4):
        if step == 2:
            convert(ours)
        x, cotangent = rows(), rows()
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            module(x, x, x, need_weights=False)[0].backward(cotangent)
            optimizer.step()
    for mine, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)


def test_tied_parameters_stay_tied() -> None:
    model = nn.ModuleList([make_attention(), make_attention()])
    model[1].in_proj_weight = model[0].in_proj_weight
    convert(model)
    assert model[1].in_proj_weight is model[0].in_proj_weight
    x = rows()
    sum(attention(x, x, x)[0].sum() for attention in model).backward()
    assert len(list(model.parameters())) == 7


def test_one_module_under_several_names() -> None:
    attention = make_attention()
    model = nn.ModuleDict({"a": attention, "b": nn.ModuleList([attention])})
    convert(model, Window(1, 1))
    assert model["a"] is model["b"][0] is attention
    assert type(attention) is MultiheadAttention


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias", "bias_k"])
def test_parametrisations_stay(name: str) -> None:
    theirs = make_attention(add_bias_kv=True)
    nn.init.normal_(theirs.in_proj_bias)
    parametrize.register_parametrization(theirs, name, Double())
    ours = convert(copy.deepcopy(theirs))
    x = rows()
    assert isinstance(ours, MultiheadAttention)
    assert isinstance(theirs, nn.MultiheadAttention)
    assert not isinstance(theirs, MultiheadAttention)
    assert ours.explain_forward(x, x, x).implementation == "cpu"
    close(ours(x, x, x)[0], theirs(x, x, x)[0])
    close(copy.deepcopy(ours)(x, x, x)[0], theirs(x, x, x)[0])
    convert(ours, Window(1, 1))
    parametrize.register_parametrization(ours, "in_proj_weight", Double())
    parametrize.register_parametrization(theirs, "in_proj_weight", Double())
    close(ours(x, x, x)[0], theirs(x, x, x, attn_mask=WINDOW)[0])
    for each in {name, "in_proj_weight"}:
        for module in (ours, theirs):
            parametrize.remove_parametrizations(module, each)
    assert type(ours) is MultiheadAttention
    close(ours(x, x, x)[0], theirs(x, x, x, attn_mask=WINDOW)[0])


def test_pruned_weights_stay_pruned() -> None:
    attention, x = make_attention(), rows()
    prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    expected = attention(x, x, x)[0]
    close(convert(attention)(x, x, x)[0], expected)
    assert not attention.in_proj_weight.all()


def test_a_compiled_module_runs_as_converted() -> None:
    attention, x = make_attention(), rows()
    expected, full = attention(x, x, x, attn_mask=WINDOW)[0], attention(x, x, x)[0]
    attention.compile(backend="eager")
    close(attention(x, x, x)[0], full)
    convert(attention, Window(1, 1))
    close(attention(x, x, x)[0], expected)


def test_a_module_alone_and_a_second_conversion() -> None:
    attention, x = make_attention(), rows()
    expected, full = attention(x, x, x, attn_mask=WINDOW)[0], attention(x, x, x)[0]
    assert convert(attention) is attention
    close(attention(x, x, x)[0], full)
    inside = attention.always_hooked
    convert(attention, Window(1, 1))
    close(attention(x, x, x)[0], expected)
    # None leaves the pattern there is.
    assert convert(attention).pattern == Window(1, 1)
    assert convert(attention, Full()).pattern == Full()
    close(attention(x, x, x)[0], full)
    assert attention.always_hooked is inside


def test_a_users_subclass_of_ours_keeps_its_class() -> None:
    model = nn.ModuleList([Ours(8, 2), nn.MultiheadAttention(8, 2)])
    convert(model, Window(1, 1))
    assert [type(each) for each in model] == [Ours, MultiheadAttention]
    assert all(each.pattern == Window(1, 1) for each in model)


def with_a_forward_of_its_own() -> nn.MultiheadAttention:
    attention = make_attention()
    attention.forward = lambda *args, **settings: None  # pyright: ignore[reportAttributeAccessIssue]
    return attention


def parametrised_other() -> nn.MultiheadAttention:
    return parametrize.register_parametrization(Other(8, 2), "in_proj_weight", Double())  # pyright: ignore[reportReturnType]


def quantizable() -> nn.MultiheadAttention:
    return torch.ao.nn.quantizable.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Other(8, 2), r"model: last is a .*\.Other, a subclass of nn\.MultiheadAttention that may compute"),
        (parametrised_other, "last is a .*ParametrizedOther, a subclass"),
        (quantizable, r"last is a torch\.ao.*MultiheadAttention, a subclass"),
        (with_a_forward_of_its_own, "last has a forward of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_nothing_is_converted_where_one_is_unknown(make: Callable[[], nn.Module], says: str) -> None:
    ours = MultiheadAttention(8, 2)
    model = nn.ModuleDict({"first": make_attention(), "ours": ours, "last": make()})
    with pytest.raises(UnsupportedError, match=says):
        convert(model, Window(1, 1))
    assert type(model["first"]) is nn.MultiheadAttention
    assert not hasattr(model["first"], "always_hooked")
    assert ours.pattern is None


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"model: expected a model with a torch\.nn\.MultiheadAttention, got"):
        convert(nn.Linear(2, 2))
    for wrong in ([make_attention()], None, MultiheadAttention):
        with pytest.raises(InvalidInputError, match=r"model: expected a torch\.nn\.Module, got (list|NoneType|type)"):
            convert(wrong)  # pyright: ignore[reportArgumentType]
    attention = make_attention()
    for wrong in ("window", 3, WINDOW, Window):
        with pytest.raises(InvalidConfigError, match=r"pattern: expected a pattern \(Causal, Window, Graph"):
            convert(attention, wrong)  # pyright: ignore[reportArgumentType]
    assert type(attention) is nn.MultiheadAttention
