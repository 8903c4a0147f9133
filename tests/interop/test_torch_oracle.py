"""`interop.torch.MultiheadAttention` against `torch.nn.MultiheadAttention` with the same weights, in float64."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyattention import Blocks, Causal, Full, Global, Graph, Pattern, Window
from anyattention.interop.torch import MultiheadAttention

_WIDTH, _HEADS, _BATCH = 6, 3, 2
# A boolean and a float mask together: PyTorch takes them, and warns.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")


@dataclass
class Case:
    """What both modules are built with, and what both calls are given."""

    settings: dict[str, Any]
    rows: list[Tensor]
    masks: dict[str, Tensor]
    call: dict[str, Any]
    leaves: list[Tensor] = field(default_factory=list)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def blocked(*shape: int) -> Tensor:
    """True for some of the keys, but not for all of a query: PyTorch has NaN there."""
    mask = torch.rand(shape) < 0.4
    mask[..., 1] = False
    return mask


def added(*shape: int) -> Tensor:
    """Numbers, and minus infinity for some of the keys."""
    return leaf(*shape).detach().masked_fill(blocked(*shape), float("-inf")).requires_grad_()


def make_rows(inputs: str, is_batched: bool, batch_first: bool) -> tuple[list[Tensor], dict[str, int], int, int]:
    """Query, key and value, the widths that the module must know, and the lengths."""
    num_queries, num_keys = (5, 5) if inputs in ("self", "equal lengths") else (4, 7)
    widths = {"kdim": 5, "vdim": 7} if inputs == "other widths" else {}

    def rows(length: int, width: int) -> Tensor:
        if not is_batched:
            return leaf(length, width)
        return leaf(_BATCH, length, width) if batch_first else leaf(length, _BATCH, width)

    query = rows(num_queries, _WIDTH)
    if inputs == "self":
        return [query] * 3, widths, num_queries, num_keys
    key = rows(num_keys, widths.get("kdim", _WIDTH))
    value = key if inputs == "one memory" else rows(num_keys, widths.get("vdim", _WIDTH))
    return [query, key, value], widths, num_queries, num_keys


def make_attn_mask(kind: str, batch: int, num_queries: int, num_keys: int) -> Tensor:
    kind, _, rank = kind.partition(" of rank ")
    if kind == "causal":
        return torch.ones(num_queries, num_keys).triu(1).bool()
    if kind == "causal float":
        mask = torch.full((num_queries, num_keys), float("-inf"), dtype=torch.float64)
        return mask.triu(1)
    shape = (num_queries, num_keys) if rank == "2" else (batch * _HEADS, num_queries, num_keys)
    return blocked(*shape) if kind == "bool" else added(*shape)


def make_case(
    inputs: str, bias: bool, extra: str, attn_mask: str | None, padding: str | None, weights: str | None, layout: str
) -> Case:
    is_batched, batch_first = layout != "unbatched", layout == "batch first"
    batch = _BATCH if is_batched else 1
    rows, widths, num_queries, num_keys = make_rows(inputs, is_batched, batch_first)
    settings = {
        "bias": bias,
        "add_bias_kv": "bias_kv" in extra,
        "add_zero_attn": "zero" in extra,
        "batch_first": batch_first,
        **widths,
    }
    masks = {}
    if attn_mask is not None:
        masks["attn_mask"] = make_attn_mask(attn_mask, batch, num_queries, num_keys)
    if padding is not None:
        shape = (batch, num_keys) if is_batched else (num_keys,)
        masks["key_padding_mask"] = blocked(*shape) if padding == "bool" else added(*shape)
    if attn_mask is not None and attn_mask.startswith("causal") and "key_padding_mask" in masks:
        # The first query has the first key alone.
        masks["key_padding_mask"] = masks["key_padding_mask"].detach()
        masks["key_padding_mask"][..., 0] = 0
    call = {"need_weights": weights is not None, "average_attn_weights": weights != "heads"}
    leaves = [x for x in masks.values() if x.requires_grad]
    unique = {id(x): x for x in rows}
    return Case(settings, rows, masks, call, [*unique.values(), *leaves])


def make_pair(settings: dict[str, Any], **ours: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Our module and PyTorch's, with the same random weights."""
    attention = MultiheadAttention(_WIDTH, _HEADS, **settings, **ours).double()
    theirs = nn.MultiheadAttention(_WIDTH, _HEADS, **settings).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    attention.load_state_dict(theirs.state_dict(), strict=True)
    return attention, theirs


def make_pattern(name: str, num_queries: int, num_keys: int) -> Pattern:
    if name == "graph":
        is_edge = torch.rand(num_queries, num_keys) < 0.5
        # Key 1 is the one that masks leave.
        is_edge[:, 1] = True
        query, key = is_edge.nonzero()[torch.randperm(int(is_edge.sum()))].T
        return Graph.from_edge_index(torch.stack([key, query]), num_queries=num_queries, num_keys=num_keys)
    of_blocks = torch.rand((num_queries + 1) // 2, (num_keys + 1) // 2) < 0.6
    of_blocks[:, 0] = True
    return {
        "full": Full(),
        "causal": Causal(align="top_left"),
        "window": Window(1, 1, align="bottom_right"),
        "composed": Window(1, 0, align="top_left") | Global(2, align="top_left"),
        "blocks": Blocks(of_blocks, 2),
    }[name]


def close(actual: Tensor, expected: Tensor, label: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{label}: {text}")


@pytest.mark.pairwise
@pytest.mark.parametrize("layout", ["batch first", "length first", "unbatched"])
@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize(
    "attn_mask",
    [None, "bool of rank 2", "float of rank 2", "bool of rank 3", "float of rank 3", "causal", "causal float"],
)
@pytest.mark.parametrize("extra", ["", "bias_kv", "zero", "bias_kv and zero"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", ["self", "equal lengths", "one memory", "cross", "other widths"])
def test_output_weights_and_all_gradients_equal_pytorchs(
    inputs: str,
    bias: bool,
    extra: str,
    attn_mask: str | None,
    padding: str | None,
    weights: str | None,
    layout: str,
    native: Any,
) -> None:
    case = make_case(inputs, bias, extra, attn_mask, padding, weights, layout)
    ours, theirs = make_pair(case.settings)
    is_hinted = attn_mask is not None and attn_mask.startswith("causal")
    # With the hint PyTorch takes extra keys for later ones, and hides them where there is no need for the weights.
    hints = ({"is_causal": is_hinted}, {"is_causal": is_hinted and not extra})
    assert ours.explain_forward(*case.rows, **case.masks, **case.call, **hints[0]).implementation == "cpu"
    results = [
        [x for x in module(*case.rows, **case.masks, **case.call, **hint) if x is not None]
        for module, hint in zip((ours, theirs), hints, strict=True)
    ]
    assert len(results[0]) == len(results[1]) == (1 if weights is None else 2)
    for label, mine, right in zip(("output", "weights"), *results, strict=False):
        close(mine, right, label)
    cotangents = [torch.randn_like(x) for x in results[1]]
    gradients = [
        torch.autograd.grad(result, [*case.leaves, *module.parameters()], cotangents, materialize_grads=True)
        for result, module in zip(results, (ours, theirs), strict=True)
    ]
    names = [*(f"leaf {n}" for n in range(len(case.leaves))), *(name for name, _ in theirs.named_parameters())]
    for name, mine, right in zip(names, *gradients, strict=True):
        close(mine, right, f"gradient of {name}")


@pytest.mark.parametrize("layout", ["batch first", "length first", "unbatched"])
@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize("padding", [None, "bool"])
def test_evaluation_without_gradients_equals_pytorchs(weights: str | None, padding: str | None, layout: str) -> None:
    """PyTorch runs another kernel there."""
    case = make_case("self", True, "", None, padding, weights, layout)
    ours, theirs = (module.eval() for module in make_pair(case.settings))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for mine, right in zip(*(m(*case.rows, **case.masks, **case.call) for m in (ours, theirs)), strict=True):
                assert (mine is None) == (right is None)
                if right is not None:
                    close(mine, right, mode.__name__)


@pytest.mark.pairwise
@pytest.mark.parametrize("layout", ["batch first", "length first", "unbatched"])
@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("attn_mask", [None, "bool of rank 2", "float of rank 3", "causal"])
@pytest.mark.parametrize("extra", ["", "bias_kv", "zero", "bias_kv and zero"])
@pytest.mark.parametrize("inputs", ["self", "cross"])
@pytest.mark.parametrize("name", ["full", "causal", "window", "composed", "blocks", "graph"])
def test_a_pattern_equals_pytorchs_with_its_mask(
    name: str,
    inputs: str,
    extra: str,
    attn_mask: str | None,
    padding: str | None,
    weights: str | None,
    layout: str,
    native: Any,
) -> None:
    case = make_case(inputs, True, extra, attn_mask, padding, weights, layout)
    axis = 1 if layout == "batch first" else 0
    lengths = case.rows[0].shape[axis], case.rows[1].shape[axis]
    pattern = make_pattern(name, *lengths)
    ours, theirs = make_pair(case.settings, pattern=pattern)
    hint = {"is_causal": attn_mask == "causal"}
    assert ours.explain_forward(*case.rows, **case.masks, **case.call, **hint).implementation == "cpu"
    own = pattern.to_dense(*lengths)
    given = case.masks.get("attn_mask")
    masks = dict(case.masks)
    if given is None or given.dtype == torch.bool:
        masks["attn_mask"] = ~own if given is None else given | ~own
    else:
        masks["attn_mask"] = given.masked_fill(~own, float("-inf"))
    results = [
        [x for x in module(*case.rows, **given, **case.call, **more) if x is not None]
        for module, given, more in ((ours, case.masks, hint), (theirs, masks, {}))
    ]
    # A query without keys: 0 before out_proj, where PyTorch has NaN. Masks of each head may leave it some in others.
    at_rows = {"output": theirs.out_proj.bias, "weights": torch.zeros((), dtype=torch.float64)}
    for (label, right), mine in zip(zip(at_rows, results[1], strict=False), results[0], strict=True):
        empty = right.isnan()
        close(mine[~empty], right[~empty], label)
        if attn_mask != "float of rank 3":
            close(mine[empty], at_rows[label].expand_as(mine)[empty], f"{label} without keys")
    if any(bool(right.isnan().any()) for right in results[1]):
        return
    cotangents = [torch.randn_like(x) for x in results[1]]
    gradients = [
        torch.autograd.grad(result, [*case.leaves, *module.parameters()], cotangents, materialize_grads=True)
        for result, module in zip(results, (ours, theirs), strict=True)
    ]
    for number, (mine, right) in enumerate(zip(*gradients, strict=True)):
        close(mine, right, f"gradient {number}")
