"""`interop.torch.convert`: what it changes, what it keeps, what it refuses; and which forward runs a call."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from anyattention import Full, Window
from anyattention.errors import DimensionMismatchError, InvalidConfigError, InvalidInputError, UnsupportedError
from anyattention.interop.torch import MultiheadAttention, convert


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Own(nn.MultiheadAttention):
    def forward(self, *given: Any, **settings: Any) -> Any:
        raise AssertionError


def test_each_object_and_parameter_stays() -> None:
    model: Any = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    model.shared = model.encoder.layers[0].self_attn  # under two names
    model.decoder.layers[0].self_attn.in_proj_weight = model.encoder.layers[0].self_attn.in_proj_weight  # tied
    model.encoder.layers[1].self_attn.in_proj_bias.requires_grad_(False)
    model.encoder.layers[0].eval()
    modules, parameters, state = list(model.modules()), list(model.parameters()), model.state_dict()
    modes = [(module, module.training) for module in modules]
    assert convert(model, Window(2, 2)) is model
    assert [module for module in model.modules() if type(module).__name__ != "AlwaysHooked"] == modules
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(module.training == mode for module, mode in modes)
    assert not model.encoder.layers[1].self_attn.in_proj_bias.requires_grad
    found = [module for module in modules if isinstance(module, nn.MultiheadAttention)]
    assert [type(module) for module in found] == [MultiheadAttention] * 6
    assert {module.pattern for module in found} == {Window(2, 2)}


def test_hooks_stay_and_can_be_removed() -> None:
    calls: list[str] = []
    model = nn.MultiheadAttention(8, 2)
    handles = [
        model.register_forward_hook(lambda *_: calls.append("forward")),
        model.register_forward_pre_hook(lambda *_: calls.append("before")),
        model.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    x = torch.randn(5, 2, 8, requires_grad=True)
    convert(model)(x, x, x)[0].sum().backward()
    assert calls == ["before", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(x, x, x)
    assert len(calls) == 3


def test_parametrised_and_pruned() -> None:
    x = torch.randn(5, 2, 8)
    model: Any = nn.MultiheadAttention(8, 2)
    parametrize.register_parametrization(model, "in_proj_weight", Halved())
    parametrize.register_parametrization(model.out_proj, "weight", Halved())
    expected = model(x, x, x)[0]
    kind = type(convert(model))
    assert issubclass(kind, MultiheadAttention)
    assert kind.__name__ == "ParametrizedMultiheadAttention"
    for each in (model, copy.deepcopy(model)):
        torch.testing.assert_close(each(x, x, x)[0], expected)
    model(x, x, x)[0].sum().backward()
    assert model.parametrizations.in_proj_weight.original.grad is not None
    parametrize.remove_parametrizations(model, "in_proj_weight")
    assert type(model) is MultiheadAttention
    torch.testing.assert_close(model(x, x, x)[0], expected)
    parametrize.register_parametrization(model, "in_proj_weight", Halved())
    convert(model, Window(1, 1))
    assert model.explain_forward(x, x, x, need_weights=False).implementation == "cpu"

    pruned = nn.MultiheadAttention(8, 2)
    prune.l1_unstructured(pruned, "in_proj_weight", 0.5)
    expected = pruned(x, x, x)[0]
    torch.testing.assert_close(convert(pruned)(x, x, x)[0], expected)


def test_patterns_of_what_is_converted_already() -> None:
    model = convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False))
    layers: Any = model.layers
    convert(layers[0], Window(1, 1))
    convert(model)
    assert [layer.self_attn.pattern for layer in layers] == [Window(1, 1), None]
    convert(model, Full())
    assert [layer.self_attn.pattern for layer in layers] == [Full(), Full()]

    class Ours(MultiheadAttention):
        pass

    ours = Ours(8, 2)
    assert type(convert(ours, Window(1, 1))) is Ours
    assert ours.pattern == Window(1, 1)


def test_an_attention_itself() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    assert isinstance(convert(model, Window(1, 1)), MultiheadAttention)


def replaced_forward() -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(8, 2)
    module.forward = lambda *_: (_[0], None)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Own(8, 2), r"model: 1 is a .*\.Own, a subclass of nn\.MultiheadAttention"),
        (lambda: torch.ao.nn.quantizable.MultiheadAttention(8, 2), r"model: 1 is a torch\.ao\.nn\.quantizable"),
        (replaced_forward, "model: 1 has a forward of its own"),
    ],
)
def test_nothing_is_converted_where_one_cannot_be(make: Any, reason: str) -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), make(), convert(nn.MultiheadAttention(8, 2))])
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedError, match=reason):
        convert(model, Window(1, 1))
    assert [type(module) for module in model.modules()] == kinds
    assert model[2].pattern is None


def test_what_is_no_model_or_pattern() -> None:
    with pytest.raises(InvalidInputError, match=r"model: expected a torch\.nn\.Module, got list"):
        convert([nn.MultiheadAttention(8, 2)])  # pyright: ignore
    with pytest.raises(
        InvalidInputError, match=r"model: expected a model with a torch\.nn\.MultiheadAttention, got Linear"
    ):
        convert(nn.Linear(2, 2))
    model = nn.MultiheadAttention(8, 2)
    with pytest.raises(InvalidConfigError, match="pattern: expected a pattern"):
        convert(model, "window")  # pyright: ignore
    assert type(model) is nn.MultiheadAttention
    with pytest.raises(InvalidConfigError, match="pattern: expected a pattern"):
        MultiheadAttention(8, 2, pattern=3)  # pyright: ignore


_X = torch.randn(5, 2, 8)
# What is given, why our forward does not run it, and the error where there is a pattern.
_CALLS: list[tuple[dict[str, Any], str, type[Exception]]] = [
    ({"query": _X[None]}, r"query is \(1, 5, 2, 8\), not \(length, batch, width\)", DimensionMismatchError),
    ({"key": _X[0]}, "key is (2, 8), not of 3 axes, as query", DimensionMismatchError),
    ({"key": _X[:3]}, r"value is (5, 2, 8), not (3, 2, 8)", DimensionMismatchError),
    ({"query": _X[..., :6]}, "query is (5, 2, 6), not (5, 2, 8)", DimensionMismatchError),
    ({"query": _X.double()}, "query is torch.float64, not torch.float32, as in_proj_weight", InvalidInputError),
    ({"query": _X.to_sparse()}, "not a dense floating-point tensor", InvalidInputError),
    ({"query": [1.0]}, "query is list, not a torch.Tensor", InvalidInputError),
    ({"key": _X.to("meta")}, "key is on meta, not on cpu, as query", InvalidInputError),
    ({"attn_mask": torch.zeros(5, 4)}, "attn_mask is (5, 4), not (5, 5) or (4, 5, 5)", DimensionMismatchError),
    ({"attn_mask": torch.zeros(5, 5).int()}, "attn_mask is torch.int32, not boolean or floating", InvalidInputError),
    ({"key_padding_mask": torch.zeros(2, 4)}, "key_padding_mask is (2, 4), not (2, 5)", DimensionMismatchError),
    ({"is_causal": True}, "is_causal is True, not False without attn_mask", InvalidInputError),
]


@pytest.mark.parametrize(("change", "reason", "error"), _CALLS, ids=[call[1] for call in _CALLS])
def test_a_call_that_does_not_fit(change: dict[str, Any], reason: str, error: type[Exception]) -> None:
    """PyTorch's forward says so in its own words, unless it would leave out a pattern, or an adapter."""
    given = {"query": _X, "key": _X, "value": _X, **change}
    ours = MultiheadAttention(8, 2)
    explanation = ours.explain_forward(**given)
    assert explanation.implementation == "torch.nn"
    assert reason.replace("\\", "") in explanation.refusals[0][1]
    theirs = nn.MultiheadAttention(8, 2)
    with pytest.raises(Exception) as expected:  # noqa: PT011  # whichever it is
        theirs(**given)
    with pytest.raises(type(expected.value)):
        ours(**given)
    windowed, adapted = MultiheadAttention(8, 2, pattern=Window(1, 1)), MultiheadAttention(8, 2)
    adapt(adapted)
    for call in (windowed, windowed.explain_forward, adapted, adapted.explain_forward):
        with pytest.raises(error, match="PyTorch's own forward, which runs such calls"):
            call(**given)


def adapt(module: nn.MultiheadAttention) -> None:
    module.out_proj.register_forward_hook(lambda _, given, output: output)


def test_a_dropout_of_all_weights() -> None:
    ours = MultiheadAttention(8, 2, dropout=1.0)
    explanation = ours.explain_forward(_X, _X, _X)
    assert str(explanation) == "runs: torch.nn\nnot anyattention: dropout is 1.0, not in [0, 1)"
    torch.testing.assert_close(ours(_X, _X, _X)[0], ours.out_proj.bias.expand(5, 2, 8))
    assert ours.eval().explain_forward(_X, _X, _X).implementation == "cpu"


def test_other_devices_have_no_kernels_of_ours() -> None:
    x = _X.to("meta")
    ours = MultiheadAttention(8, 2, device="meta")
    assert (
        ours.explain_forward(x, x, x).refusals[0][1] == "query is on meta, not on the CPU, for which there are kernels"
    )
    assert ours(x, x, x)[0].shape == x.shape
    ours.pattern = Window(1, 1)
    assert ours(x, x, x)[1].shape == (2, 5, 5)
    ours.pattern = None
    adapt(ours)
    assert ours.explain_forward(x, x, x).implementation == "reference"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_that_are_not_padded(layout: torch.layout) -> None:
    x = torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)], layout=layout)
    ours = MultiheadAttention(8, 2, batch_first=True).eval()
    assert ours.explain_forward(x, x, x).implementation == "torch.nn"
    if layout == torch.strided:
        with torch.no_grad():
            assert ours(x, x, x)[0].is_nested
    ours.pattern = Window(1, 1)
    with pytest.raises(UnsupportedError, match="query: expected"):
        ours(x, x, x)
    later = MultiheadAttention(8, 2)
    assert later.explain_forward(x, x, x, need_weights=False).implementation == "torch.nn"
