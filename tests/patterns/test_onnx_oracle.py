"""Windows against the operator Attention of ONNX with its own window, run by ONNX's reference evaluator."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anyattention import Causal, Pattern, Window, attend
from anyattention.patterns.base import Align

BATCH, HEADS, HEAD_DIM, VALUE_DIM = 2, 6, 5, 3


def by_onnx(
    onnx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    past: int = 0,
    mask: Tensor | None = None,
    **attributes: int,
) -> Tensor:
    """The operator's output for tensors of ours, `(batch, length, heads, head_dim)`; the first `past` keys as a cache.

    A query stands at its own index, behind the cache: top_left without one, bottom_right where all else is cached.
    """
    arrays = {name: x.transpose(1, 2).numpy() for name, x in (("Q", query), ("K", key), ("V", value))}
    inputs = ["Q", "K", "V"]
    if mask is not None:
        arrays["attn_mask"] = mask.numpy()
    if mask is not None or past:
        inputs.append("attn_mask" if mask is not None else "")
    outputs = ["Y"]
    if past:
        arrays |= {f"past_{name}": arrays[name][:, :, :past] for name in "KV"}
        arrays |= {name: arrays[name][:, :, past:] for name in "KV"}
        inputs += ["past_K", "past_V"]
        outputs += ["present_K", "present_V"]
    helper = onnx.helper
    node = helper.make_node("Attention", inputs, outputs, **attributes)

    def described(name: str) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(arrays[name].dtype)
        return helper.make_tensor_value_info(name, kind, arrays[name].shape)

    kind = helper.np_dtype_to_tensor_dtype(arrays["Q"].dtype)
    results = [helper.make_tensor_value_info(name, kind, ["batch", "heads", "length", "width"]) for name in outputs]
    graph = helper.make_graph([node], "attention", [described(name) for name in inputs if name], results)
    # The version of the standard that gave Attention its window.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    onnx.checker.check_model(model)
    output = onnx.reference.ReferenceEvaluator(model).run(None, arrays)[0]
    return torch.from_numpy(np.ascontiguousarray(output)).transpose(1, 2)


def rows(num_queries: int, num_keys: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((num_queries, HEADS, HEAD_DIM), (num_keys, key_heads, HEAD_DIM), (num_keys, key_heads, VALUE_DIM))
    return [torch.randn(BATCH, *shape, dtype=dtype) for shape in shapes]


@pytest.fixture(scope="module")
def onnx(require: Any) -> Any:
    require("onnx.reference")
    return require("onnx")


def assert_same(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Both sides, one side, itself alone, wider than the sequence.
_WIDTHS = [(2, 1), (3, 0), (0, 4), (0, 0), (90, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(11, 11), (5, 13), (13, 5)])
@pytest.mark.parametrize(("left", "right"), _WIDTHS)
def test_a_window(
    onnx: Any,
    left: int,
    right: int,
    num_queries: int,
    num_keys: int,
    causal: bool,
    key_heads: int,
    dtype: torch.dtype,
) -> None:
    """Its `left_window_size` and `right_window_size`, alone and with `is_causal`; a query without keys gets 0."""
    query, key, value = rows(num_queries, num_keys, key_heads, dtype)
    pattern: Pattern = Window(left, right, "top_left")
    if causal:
        pattern = pattern & Causal("top_left")
    sizes = {"left_window_size": left, "right_window_size": right}
    expected = by_onnx(onnx, query, key, value, is_causal=int(causal), **sizes)
    assert_same(attend(query, key, value, pattern).output, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("left", "right"), _WIDTHS)
def test_a_window_behind_a_cache(onnx: Any, left: int, right: int, causal: bool) -> None:
    """Its `past_key` and `past_value`, behind which the queries stand."""
    query, key, value = rows(4, 13, 2, torch.float64)
    align: Align = "bottom_right"
    pattern = Window(left, right, align) & Causal(align) if causal else Window(left, right, align)
    sizes = {"left_window_size": left, "right_window_size": right}
    expected = by_onnx(onnx, query, key, value, past=9, is_causal=int(causal), **sizes)
    assert_same(attend(query, key, value, pattern).output, expected)


def test_a_window_under_a_mask(onnx: Any) -> None:
    """A boolean `attn_mask` joins the window with "and"."""
    query, key, value = rows(11, 11, 6, torch.float64)
    mask = torch.rand(BATCH, 1, 11, 11) < 0.6
    mask[0, 0, 3] = False
    expected = by_onnx(onnx, query, key, value, mask=mask, left_window_size=3, right_window_size=2)
    assert_same(attend(query, key, value, Window(3, 2), mask=mask).output, expected)


def test_a_causal_window_of_the_standards_own_test(onnx: Any) -> None:
    """Its test case attention_bidirectional_window, whose numbers the standard writes down."""
    zeros, value = torch.zeros(1, 5, 1, 1), torch.arange(5.0).reshape(1, 5, 1, 1)
    written = torch.tensor([1.0, 1.5, 2.5, 3.0, 3.5])
    assert_same(attend(zeros, zeros, value, Window(1, 2)).output.flatten(), written)
    assert_same(by_onnx(onnx, zeros, zeros, value, left_window_size=1, right_window_size=2).flatten(), written)
