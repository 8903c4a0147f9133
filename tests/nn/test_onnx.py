"""The dense modules in ONNX, at other sizes than the exported ones: onnxruntime computes what the module does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from exports import MODULES, SIZES, Exported, exhaustive, inputs, shapes, some
from torch import Tensor

from anyattention import Blocks, Causal, Documents, Global, Graph, RandomBlocks, RelativeBias, TopK, Window, attend, nn
from anyattention.ambient import is_exported_to_onnx

# Of a size that two inputs share.
pytestmark = pytest.mark.filterwarnings("ignore:# The axis name. \\w+ will not be used:UserWarning")

_LENGTH = SIZES[0][1]


def check(module: torch.nn.Module, folder: Path, sizes: Sequence[tuple[int, int]] = SIZES, **kinds: Any) -> None:
    """Export, and compare onnxruntime's results at every size."""
    given = inputs(*sizes[0], **kinds)
    dynamic = shapes(given)
    if len({length for _, length in sizes}) == 1:
        dynamic = {name: {0: each[0]} for name, each in dynamic.items()}
    path = folder / "module.onnx"
    program = torch.onnx.export(module, kwargs=given, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert program is not None
    program.save(path)
    assert {node.domain for node in program.model.graph} <= {"", "pkg.onnxscript.torch_lib.common"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for each in sizes:
        tensors = inputs(*each, **kinds)
        expected = module(**tensors)
        found = session.run(None, {name: x.numpy() for name, x in tensors.items()})
        torch.testing.assert_close([torch.from_numpy(x) for x in found], expected, rtol=1e-4, atol=1e-5)


@some(list(MODULES))
def test_any_batch_and_length(name: str, tmp_path: Path) -> None:
    check(Exported(MODULES[name]()), tmp_path)


@pytest.mark.parametrize("weights", [pytest.param(False, marks=exhaustive), "heads"])
@some(list(MODULES))
def test_with_a_mask_that_leaves_a_query_nothing(name: str, weights: Any, tmp_path: Path) -> None:
    check(Exported(MODULES[name](), return_weights=weights), tmp_path, has_mask=True)


def test_a_row_without_keys_is_0(tmp_path: Path) -> None:
    module = Exported(nn.ScaledDotProductAttention(16, 2))
    given = inputs(*SIZES[0], has_mask=True)
    path = tmp_path / "module.onnx"
    program = torch.onnx.export(module, kwargs=given, dynamo=True, dynamic_shapes=shapes(given), verbose=False)
    assert program is not None
    program.save(path)
    given = inputs(3, 7, has_mask=True)
    given["query"][:, -1] = torch.nan  # a key that no query sees; its own row is broken
    feed = {name: x.numpy() for name, x in given.items()}
    output, weights = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)
    assert (output[:, 0] == 0).all()
    assert (weights[:, 0] == 0).all()
    assert torch.from_numpy(output[:, :-1]).isfinite().all()


@exhaustive
@pytest.mark.parametrize("pattern", [None, Causal("bottom_right"), Window(2, 1, "top_left")], ids=str)
def test_with_other_keys(pattern: Any, tmp_path: Path) -> None:
    module = nn.MultiHeadAttention(16, 2, pattern=pattern, positions="sinusoidal")
    check(Exported(module), tmp_path, more_keys=3)


@pytest.mark.parametrize(
    "module",
    [
        nn.SparseAttention(16, 2, sparsity_pattern="top_k", top_k=3),
        pytest.param(nn.MultiHeadAttention(16, 2, pattern=TopK(2), causal=True), marks=exhaustive),
        pytest.param(nn.ScaledDotProductAttention(16, 2, pattern=Window(3, 3) & TopK(2)), marks=exhaustive),
    ],
    ids=["top_k", "causal", "window"],
)
def test_the_best_keys(module: torch.nn.Module, tmp_path: Path) -> None:
    check(Exported(module), tmp_path)
    check(Exported(module), tmp_path, has_mask=True)


class Ties(torch.nn.Module):
    """The best keys where several are as good."""

    def forward(self, query: Tensor) -> list[Tensor]:
        x = query[:, :, None, :4].sign()
        result = attend(x, x, query[:, :, None], TopK(2), return_weights=True)
        assert result.indices is not None
        return [result.output, result.indices]


@exhaustive
def test_the_first_of_equal_keys_are_the_best(tmp_path: Path) -> None:
    check(Ties().eval(), tmp_path)


@exhaustive
@pytest.mark.parametrize("bias", [RelativeBias.alibi(2, 512), RelativeBias(torch.randn(1, 9), -4)])
@pytest.mark.parametrize("pattern", [None, Window(3, 3) | Global((0, 5)), RandomBlocks(2, seed=1, size=4)], ids=str)
def test_with_a_bias_by_distance(pattern: Any, bias: RelativeBias, tmp_path: Path) -> None:
    check(Exported(nn.MultiHeadAttention(16, 2, pattern=pattern), bias=bias), tmp_path)


@exhaustive
@pytest.mark.parametrize(
    "pattern",
    [
        Documents((5, _LENGTH - 5)),
        Blocks(torch.eye(3) > 0, 4) | Window(1, 1),
        Graph.from_edge_index(torch.randint(_LENGTH, (2, 40)), num_nodes=_LENGTH),
    ],
    ids=lambda pattern: type(pattern).__name__,
)
def test_patterns_of_one_length(pattern: Any, tmp_path: Path) -> None:
    module = Exported(nn.MultiHeadAttention(16, 2, pattern=pattern), return_weights=True)
    check(module, tmp_path, [(batch, _LENGTH) for batch in (4, 2, 1)])


def test_only_an_export_to_onnx_takes_the_reference(native: None) -> None:
    seen: list[bool] = []

    class Asks(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(is_exported_to_onnx())
            return x + 1

    given = (torch.randn(2, 3),)
    torch.export.export(Asks(), given)
    assert not any(seen)
    torch.onnx.export(Asks().eval(), given, dynamo=True, verbose=False)
    assert seen[-1]
    assert not is_exported_to_onnx()
    program = torch.export.export(Exported(nn.ScaledDotProductAttention(16, 2)), (), inputs(2, 3))
    assert any("anyattention" in str(node.target) for node in program.graph.nodes)
