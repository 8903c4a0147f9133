"""What `interop.torch.MultiheadAttention` leaves to PyTorch's own forward, and refuses where there is a pattern."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyattention import Graph, Window
from anyattention.errors import AttentionError, DimensionMismatchError, InvalidConfigError, InvalidInputError
from anyattention.errors import UnsupportedError as Unsupported
from anyattention.interop.torch import MultiheadAttention

_X = torch.linspace(-1, 1, 80).reshape(2, 5, 8)
_NESTED = "ignore:The PyTorch API of nested tensors:UserWarning"


def make(pattern: Any = None, **settings: Any) -> MultiheadAttention:
    return MultiheadAttention(8, 2, batch_first=True, pattern=pattern, **settings)


def refuse(attention: MultiheadAttention, error: type[AttentionError], says: str, *given: Any, **more: Any) -> None:
    """Both the call and the explanation of it."""
    for call in (attention, attention.explain_forward):
        with pytest.raises(error, match=says):
            call(*given, **more)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"query": None}, InvalidInputError, r"query: expected a torch\.Tensor, got NoneType"),
        ({"attn_mask": [True]}, InvalidInputError, r"attn_mask: expected a torch\.Tensor, got list"),
        ({"query": _X[0, 0]}, DimensionMismatchError, r"query: expected \(length, batch, width\), .*, got \(8,\)"),
        ({"query": _X[None]}, DimensionMismatchError, r"query: expected \(length, batch, width\)"),
        ({"query": _X[..., :7]}, DimensionMismatchError, r"query: expected \(2, 5, 8\), got \(2, 5, 7\)"),
        ({"key": _X[0]}, DimensionMismatchError, r"key: expected of 3 axes, as query, got \(5, 8\)"),
        ({"key": _X[..., :7]}, DimensionMismatchError, r"key: expected \(2, 5, 8\), got \(2, 5, 7\)"),
        ({"key": _X[:1]}, DimensionMismatchError, r"key: expected \(2, 5, 8\), got \(1, 5, 8\)"),
        ({"value": _X[:, :4]}, DimensionMismatchError, r"value: expected \(2, 5, 8\), got \(2, 4, 8\)"),
        ({"query": _X.long()}, InvalidInputError, r"query: expected a dense floating-point tensor, got torch\.int64"),
        ({"query": _X.to_sparse()}, InvalidInputError, "query: expected a dense floating-point tensor, got .*sparse"),
        (
            {"key": _X.double()},
            InvalidInputError,
            "key: expected torch.float32, as in_proj_weight, got",
        ),
        ({"query": _X.to("meta")}, InvalidInputError, "key: expected on meta, as query, got on cpu"),
        ({"attn_mask": torch.zeros(4, 5)}, DimensionMismatchError, r"attn_mask: expected \(5, 5\) or \(4, 5, 5\), got"),
        ({"attn_mask": torch.zeros(2, 5, 5)}, DimensionMismatchError, r"attn_mask: .* got \(2, 5, 5\)"),
        ({"attn_mask": torch.zeros(2, 2, 5, 5)}, DimensionMismatchError, r"attn_mask: .* got \(2, 2, 5, 5\)"),
        ({"attn_mask": torch.zeros(5, 5).int()}, InvalidInputError, "attn_mask: expected boolean or floating, got"),
        ({"key_padding_mask": torch.zeros(2, 4)}, DimensionMismatchError, r"key_padding_mask: expected \(2, 5\), got"),
        ({"key_padding_mask": torch.zeros(2, 5).byte()}, InvalidInputError, "key_padding_mask: expected boolean or"),
        ({"is_causal": True}, InvalidInputError, "is_causal: expected False without attn_mask"),
    ],
)
def test_a_wrong_argument_is_a_typed_error_with_a_pattern(
    given: dict[str, Any], error: type[AttentionError], says: str
) -> None:
    arguments = {"query": _X, "key": _X, "value": _X} | given
    refuse(make(Window(1, 1)), error, says, **arguments)
    # Without one it is PyTorch's own, and the explanation says that PyTorch runs.
    attention = make()
    assert attention.explain_forward(**arguments).implementation == "torch.nn"


def test_without_a_pattern_errors_are_pytorchs() -> None:
    ours, theirs = make(), nn.MultiheadAttention(8, 2, batch_first=True)
    for wrong in ({"attn_mask": torch.zeros(4, 5)}, {"attn_mask": torch.zeros(5, 5).int()}, {"is_causal": True}):
        texts = []
        for module in (ours, theirs):
            with pytest.raises((RuntimeError, AssertionError)) as caught:
                module(_X, _X, _X, **wrong)
            texts.append((type(caught.value), str(caught.value)))
        assert texts[0] == texts[1]


def test_the_explanation_says_what_runs() -> None:
    assert make().explain_forward(_X, _X, _X).implementation == "cpu"
    assert make(Window(1, 1)).explain_forward(_X, _X, _X).implementation == "cpu"
    explained = make(dropout=1.0).explain_forward(_X, _X, _X)
    assert explained.implementation == "torch.nn"
    assert explained.refusals == (("anyattention", "dropout is 1.0, not in [0, 1)"),)
    assert make(dropout=1.0).eval().explain_forward(_X, _X, _X).implementation == "cpu"
    meta = _X.to("meta")
    assert make(device="meta").explain_forward(meta, meta, meta).implementation == "torch.nn"


def test_a_call_that_is_left_to_pytorch_equals_its() -> None:
    ours, theirs = make(dropout=1.0), nn.MultiheadAttention(8, 2, dropout=1.0, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    for mine, right in zip(ours(_X, _X, _X), theirs(_X, _X, _X), strict=True):
        assert torch.equal(mine, right)


def test_pytorchs_forward_does_not_run_in_place_of_a_pattern() -> None:
    says = r"dropout: expected in \[0, 1\), got 1\.0\. PyTorch's own forward, .* knows no pattern"
    refuse(make(Window(1, 1), dropout=1.0), InvalidInputError, says, _X, _X, _X)


def test_pytorchs_forward_does_not_run_in_place_of_another_out_proj() -> None:
    attention = make(dropout=1.0)
    handle = attention.out_proj.register_forward_hook(lambda *_: None)
    says = "reads the weight of out_proj and does not call it"
    refuse(attention, InvalidInputError, says, _X, _X, _X)
    handle.remove()
    assert attention.explain_forward(_X, _X, _X).implementation == "torch.nn"
    attention.out_proj = nn.Sequential(attention.out_proj)  # pyright: ignore[reportAttributeAccessIssue]  # as adapters
    refuse(attention, InvalidInputError, says, _X, _X, _X)


def nested(*lengths: int, **layout: Any) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(length, 8) for length in lengths], **layout)


@pytest.mark.filterwarnings(_NESTED)
@pytest.mark.parametrize("pattern", [None, Window(1, 1)])
def test_nested_tensors(pattern: Window | None) -> None:
    attention, x = make(pattern), nested(5, 3)
    assert attention.explain_forward(x, x, x, need_weights=False).implementation == "cpu"
    output, weights = attention(x, x, x, need_weights=False)
    assert output.is_nested
    assert weights is None
    wrong: list[tuple[tuple[Tensor, ...], dict[str, Any], type[AttentionError], str]] = [
        ((x, x, x), {}, Unsupported, "need_weights=False"),
        ((x, x, x), {"need_weights": False, "attn_mask": torch.zeros(5, 5)}, Unsupported, "without masks"),
        ((x, nested(5, 3), x), {"need_weights": False}, Unsupported, "one nested tensor"),
        ((_X, x, x), {"need_weights": False}, Unsupported, "one nested tensor"),
        ((nested(5, 3, layout=torch.jagged),) * 3, {"need_weights": False}, Unsupported, "one nested tensor"),
        ((torch.nested.nested_tensor([_X[0, :, :7]]),) * 3, {"need_weights": False}, DimensionMismatchError, "length"),
    ]
    for given, more, error, says in wrong:
        if pattern is not None:
            refuse(attention, error, says, *given, **more)
        else:
            assert attention.explain_forward(*given, **more).implementation == "torch.nn"
    if pattern is not None:
        refuse(MultiheadAttention(8, 2, pattern=pattern), Unsupported, "batch_first", x, x, x, need_weights=False)


def test_a_pattern_that_is_none_is_refused() -> None:
    for wrong in ("window", 3, Window):
        with pytest.raises(InvalidConfigError, match="pattern: expected a pattern"):
            make(wrong)
    attention = make()
    attention.pattern = "window"  # pyright: ignore[reportAttributeAccessIssue]
    refuse(attention, InvalidInputError, "pattern: expected a pattern", _X, _X, _X)


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    graph = Graph.from_edge_index(torch.zeros(2, 3, dtype=torch.int64), 7)
    says = "pattern: expected a Graph of 5 queries and 5 keys, got 7 and 7"
    for extra in ({}, {"add_zero_attn": True}):
        for mask in (None, torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 5)):
            refuse(make(graph, **extra), DimensionMismatchError, says, _X, _X, _X, key_padding_mask=mask)
    refuse(make(Window(1, 1)), DimensionMismatchError, "give align='top_left'", _X, _X[:, :4], _X[:, :4])


@pytest.mark.parametrize("pattern", [None, Window(1, 1)])
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty_inputs(pattern: Window | None, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    output, weights = make(pattern)(x, x, x)
    assert output.shape == shape
    assert weights.shape == (*shape[:2], shape[1])


def test_no_keys_give_the_bias_of_out_proj() -> None:
    attention = make()
    nn.init.normal_(attention.out_proj.bias)
    output, weights = attention(_X, _X[:, :0], _X[:, :0])
    assert torch.equal(output, attention.out_proj.bias.expand(2, 5, 8))
    assert weights.shape == (2, 5, 0)
