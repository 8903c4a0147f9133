"""NaN and Inf in one number: which numbers of outputs and gradients they spoil, the same in every implementation.

The oracle knows sets alone, of the terms that the formulas have: a number that is not finite spoils every sum over the
visible pairs that has it in a term.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import attend
from anyattention.patterns import Causal, Graph, Window

pytestmark = pytest.mark.usefixtures("native")

_BATCH, _HEADS = 2, 2


def _shapes(length: int) -> dict[str, tuple[int, ...]]:
    # A graph's rows of 8 channels stay in registers.
    widths = (3, 3, 4) if length < 10 else (8, 8, 8)
    names = ("query", "key", "value")
    return {name: (_BATCH, length, _HEADS, width) for name, width in zip(names, widths, strict=True)}


def _pairs(kind: str, length: int) -> Tensor:
    """Which pairs `(batch, heads, queries, keys)` are visible."""
    generator = torch.Generator().manual_seed(5)
    every = torch.ones(_BATCH, _HEADS, length, length, dtype=torch.bool)
    if kind in ("mask", "graph"):
        shape = every.shape if kind == "mask" else every.shape[2:]
        some = torch.rand(shape, generator=generator) < 0.5
        some[..., 3, :] = False  # a query without keys
        some[..., :, 2] = False  # a key that nobody sees
        return every & some
    if kind in ("causal", "causal mask"):
        padding = torch.arange(length) < (5 if kind == "causal mask" else length)
        return every.tril() & padding
    return every.tril(1).triu(-2) if kind == "window" else every


def _settings(kind: str, length: int) -> dict[str, Any]:
    pairs = _pairs(kind, length)
    if kind == "mask":
        return {"mask": pairs}
    if kind == "graph":
        queries, keys = pairs[0, 0].nonzero().T
        return {"pattern": Graph.from_edge_index(torch.stack([keys, queries]), num_nodes=length)}
    if kind == "causal mask":
        return {"pattern": Causal(), "mask": pairs[0, 0, -1]}
    return {"full": {}, "causal": {"pattern": Causal()}, "window": {"pattern": Window(2, 1)}}[kind]


def _expected(kind: str, length: int, name: str, slot: tuple[int, ...]) -> dict[str, Tensor]:
    """Which numbers of the output and of each gradient are spoiled."""
    pairs, (b, n, h, channel) = _pairs(kind, length)[slot[0], slot[2]], slot
    found = {each: torch.zeros(shape, dtype=torch.bool) for each, shape in _shapes(length).items()}
    found["output"] = torch.zeros(_shapes(length)["value"], dtype=torch.bool)
    users = torch.arange(length) == n if name == "query" else pairs[:, n]
    users = users & pairs.any(1)
    reached = pairs[users].any(0)  # by gradients: the keys that share a softmax with the number
    found["output"][b, users, h] = name != "value"
    if name == "value":
        found["output"][b, users, h, channel] = True
    found["query"][b, users, h] = True
    found["key"][b, reached, h] = True
    found["value"][b, reached, h] = name != "value"
    return found


def _found(kind: str, inputs: dict[str, Tensor], softcap: float | None, implementation: str) -> dict[str, Tensor]:
    length = inputs["query"].shape[1]
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    output = attend(**leaves, **_settings(kind, length), softcap=softcap, implementation=implementation).output
    by = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), by)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.pairwise
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("length", [7, 150], ids=["one tile", "some tiles"])
@pytest.mark.parametrize("kind", ["full", "mask", "causal", "causal mask", "window", "graph"])
def test_a_number_spoils_the_sums_that_have_it(
    kind: str,
    length: int,
    implementation: str,
    name: str,
    number: float,
    dtype: torch.dtype,
    softcap: float | None,
) -> None:
    inputs = {each: torch.randn(shape).to(dtype) for each, shape in _shapes(length).items()}
    clean = _found(kind, inputs, softcap, implementation)["output"]
    for position in (0, 2, 3, 5, length - 1):
        slot = (1, position, 1, 2)
        broken = inputs | {name: inputs[name].clone()}
        broken[name][slot] = number
        found, expected = _found(kind, broken, softcap, implementation), _expected(kind, length, name, slot)
        for each, spoiled in expected.items():
            assert torch.equal(~found[each].isfinite(), spoiled), (position, each)
        untouched = ~expected["output"]
        torch.testing.assert_close(found["output"][untouched], clean[untouched])


def test_a_saturated_softcap_does_not_hide_a_broken_key() -> None:
    found = []
    for implementation in ("cpu", "reference"):
        inputs = {name: torch.full((1, 3, 1, 2), 30.0) for name in ("query", "key", "value")}
        inputs["key"][0, 1] = torch.nan
        leaves = [x.requires_grad_() for x in inputs.values()]
        output = attend(*leaves, softcap=2.0, implementation=implementation).output
        found.append([x.isfinite() for x in torch.autograd.grad(output, leaves, torch.ones_like(output))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.cat(found[0][:2]).any()
