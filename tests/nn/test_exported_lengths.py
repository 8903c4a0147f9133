"""torch.export of the dense modules with any batch and any length: the program gives what the module does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exports import MODULES, SIZES, Exported, exhaustive, inputs, shapes, some
from torch.export import ExportedProgram

from anyattention import Causal, Pattern, Strided, TopK, Window, nn

pytestmark = pytest.mark.usefixtures("native")


def check(module: torch.nn.Module, *, strict: bool = False, **kinds: Any) -> ExportedProgram:
    """Export, and compare at every size."""
    given = inputs(*SIZES[0], **kinds)
    program = torch.export.export(module, (), given, dynamic_shapes=shapes(given), strict=strict)
    for sizes in SIZES:
        other = inputs(*sizes, **kinds)
        torch.testing.assert_close(program.module()(**other), module(**other), rtol=0, atol=0)
    return program


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=exhaustive)])
@some(list(MODULES))
def test_any_batch_and_length(name: str, strict: bool) -> None:
    check(Exported(MODULES[name]()), strict=strict)


@pytest.mark.parametrize("weights", [False, "heads"])
@some(list(MODULES))
def test_with_a_mask(name: str, weights: Any) -> None:
    check(Exported(MODULES[name](), return_weights=weights), has_mask=True)


@pytest.mark.parametrize(
    "pattern", [None, *[pytest.param(x, marks=exhaustive) for x in (Causal("bottom_right"), Window(2, 1, "top_left"))]]
)
def test_with_other_keys(pattern: Pattern | None) -> None:
    module = nn.MultiHeadAttention(16, 2, pattern=pattern, positions="sinusoidal")
    check(Exported(module), more_keys=3)


@exhaustive
def test_the_best_keys() -> None:
    check(Exported(nn.SparseAttention(16, 2, sparsity_pattern="top_k", top_k=3)))
    check(Exported(nn.MultiHeadAttention(16, 2, pattern=TopK(2))))


@exhaustive
def test_a_file_of_it(tmp_path: Path) -> None:
    module = Exported(nn.MultiHeadAttention(16, 2, pattern=Strided(4, 1) & Causal()), return_weights=True)
    torch.export.save(check(module), tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2").module()
    given = inputs(3, 77)
    torch.testing.assert_close(loaded(**given), module(**given), rtol=0, atol=0)
