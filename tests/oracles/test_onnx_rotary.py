"""ONNX's cases of the operator RotaryEmbedding, whose heads are turned as those of positions="rope"."""

from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention.nn.positions import rotated

NAMES = ("X", "cos_cache", "sin_cache", "position_ids")


@pytest.fixture(scope="module")
def cases(require: Any) -> list[Any]:
    require("onnx.backend.test.case.node.rotaryembedding")
    node = require("onnx.backend.test.case.node")
    found = [case for case in node._NodeTestCases if case.model.graph.node[0].op_type == "RotaryEmbedding"]
    return [case for case in found if len(case.model.graph.node) == 1]


def test_every_case(cases: list[Any], require: Any) -> None:
    onnx = require("onnx")
    assert len(cases) >= 8
    for case in cases:
        (node,) = case.model.graph.node
        settings = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        ((inputs, (expected,)),) = case.data_sets
        given = {name: torch.tensor(x) for name, x in zip(NAMES, inputs, strict=False)}
        try:
            torch.testing.assert_close(_turned(settings, **given), torch.tensor(expected), rtol=1e-5, atol=1e-5)
        except AssertionError as fault:
            raise AssertionError(case.name) from fault


def _turned(
    settings: dict[str, Any], X: Tensor, cos_cache: Tensor, sin_cache: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """The operator by `rotated`; pairs of other channels are put in its order, and channels beyond the pairs stay."""
    heads = X.unflatten(-1, (settings["num_heads"], -1)) if X.ndim == 3 else X.transpose(1, 2)
    angles = [x if position_ids is None else x[position_ids] for x in (cos_cache, sin_cache)]
    cosines, sines = (x[..., None, :] for x in angles)
    width = settings.get("rotary_embedding_dim") or heads.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    if settings.get("interleaved"):
        halves = rotated(torch.cat([turned[..., ::2], turned[..., 1::2]], -1), cosines, sines).chunk(2, -1)
        turned = torch.stack(halves, -1).flatten(-2)
    else:
        turned = rotated(turned, cosines, sines)
    found = torch.cat([turned, rest], -1)
    return found.flatten(-2) if X.ndim == 3 else found.transpose(1, 2)
