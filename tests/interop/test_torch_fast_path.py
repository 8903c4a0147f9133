"""In evaluation PyTorch's encoders read the weights of `self_attn` and call a kernel of their own: not so of ours."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from anyattention import Documents, Window
from anyattention.errors import DimensionMismatchError
from anyattention.interop.torch import MultiheadAttention, convert

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

_WINDOW = Window(1, 1)
_PADDING = torch.tensor([[False] * 9, [False] * 6 + [True] * 3])


def plain(layers: int = 2) -> Any:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, layers)


def converted(model: Any) -> Any:
    return convert(model, _WINDOW)


def replaced(model: Any) -> Any:
    for layer in model.layers:
        ours = MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64, pattern=_WINDOW)
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
    return model


def replaced_after_a_call(model: Any) -> Any:
    with torch.no_grad():
        model.eval()(torch.randn(2, 9, 16, dtype=torch.float64), src_key_padding_mask=_PADDING)
    return replaced(model)


def built_of_a_converted_layer(model: Any) -> Any:
    return nn.TransformerEncoder(convert(model.layers[0], _WINDOW), len(model.layers))


def deep_copied(model: Any) -> Any:
    return copy.deepcopy(converted(model))


def hooks_of_all_modules_cleared(model: Any) -> Any:
    for module in converted(model).modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


_ORDERS = [
    converted,
    replaced,
    replaced_after_a_call,
    built_of_a_converted_layer,
    deep_copied,
    hooks_of_all_modules_cleared,
]


def results(model: Any, x: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Of training, and of evaluation without gradients."""
    trained = model.train()(x, **settings)
    with torch.no_grad():
        return trained.detach(), model.eval()(x, **settings)


@pytest.mark.parametrize("settings", [{}, {"src_key_padding_mask": _PADDING}], ids=["plain", "padded"])
@pytest.mark.parametrize("order", _ORDERS)
def test_evaluation_keeps_the_window(order: Callable[[Any], Any], settings: dict[str, Any]) -> None:
    model = plain()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    _, full = results(model, x, **settings)
    trained, evaluated = results(order(model), x, **settings)
    is_real = ~_PADDING
    torch.testing.assert_close(evaluated[is_real], trained[is_real], rtol=1e-10, atol=1e-10)
    assert (evaluated - full)[is_real].abs().max() > 0.1


def test_the_fast_path_would_be_taken_otherwise() -> None:
    """That the tests above test something: an unconverted layer does not call its attention."""
    model, x = plain(1), torch.randn(2, 9, 16, dtype=torch.float64)
    for make, is_called in ((lambda model: model, False), (converted, True)):
        model = make(model).eval()
        attention = model.layers[0].self_attn
        with torch.no_grad(), mock.patch.object(type(attention), "forward", autospec=True) as forward:
            forward.return_value = (x, None)
            model(x)
        assert forward.called == is_called


def test_without_a_pattern_results_are_those_of_the_fast_path() -> None:
    """Padding too, which encoders that nest their input fill with 0."""
    model, x = plain(), torch.randn(2, 9, 16, dtype=torch.float64)
    for settings in ({}, {"src_key_padding_mask": _PADDING}):
        expected = results(model, x, **settings)[1]
        found = results(convert(copy.deepcopy(model)), x, **settings)[1]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_layer_of_ours_between_others() -> None:
    model, x = plain(3), torch.randn(2, 9, 16, dtype=torch.float64)
    convert(model.layers[1], _WINDOW)
    trained, evaluated = results(model, x, src_key_padding_mask=_PADDING)
    torch.testing.assert_close(evaluated[~_PADDING], trained[~_PADDING], rtol=1e-10, atol=1e-10)


def test_nested_tensors_have_gradients() -> None:
    attention = convert(nn.MultiheadAttention(16, 4, batch_first=True), _WINDOW)
    rows = [torch.randn(length, 16, requires_grad=True) for length in (5, 3)]
    nested = torch.nested.as_nested_tensor(rows)
    output, weights = attention(nested, nested, nested, need_weights=False)
    assert weights is None
    for found, x in zip(output.unbind(), rows, strict=True):
        torch.testing.assert_close(found, attention(x, x, x)[0])
    sum(each.square().sum() for each in output.unbind()).backward()
    assert all(x.grad is not None and bool(x.grad.any()) for x in rows)
    assert attention.explain_forward(nested, nested, nested, need_weights=False).implementation == "cpu"


def test_a_pattern_of_one_length_says_so_of_a_nested_tensor() -> None:
    """It was cut to its longest sequence: PyTorch's encoder tells nobody the length before."""
    model, x = convert(plain(), Documents((5, 4))), torch.randn(2, 9, 16, dtype=torch.float64)
    padding = _PADDING | _PADDING[1]
    model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad(), pytest.raises(DimensionMismatchError, match="Documents: expected 9 queries"):
        model.eval()(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("settings", [{}, {"src_key_padding_mask": _PADDING}], ids=["plain", "padded"])
@pytest.mark.parametrize("is_training", [True, False])
def test_compiled_whole(is_training: bool, settings: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, x = converted(plain()).train(is_training), torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.set_grad_enabled(is_training):
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x, **settings)
        expected = model(x, **settings)
    torch.testing.assert_close(found[~_PADDING], expected[~_PADDING], rtol=1e-10, atol=1e-10)
