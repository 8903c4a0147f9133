"""Every part of a layer is called as the parent calls it, whatever was done to it; layers get their memory later."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize
from torch_geometric import nn as parent

from anyattention.interop import pyg

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "GATConv": ("GATConv", {"edge_dim": 2, "residual": True}),
    "GATConv for two sides": ("GATConv", {"in_channels": (8, 8), "edge_dim": 2}),
    "GATv2Conv": ("GATv2Conv", {"edge_dim": 2, "residual": True}),
    "GATv2Conv of shared weights": ("GATv2Conv", {"share_weights": True}),
    "TransformerConv": ("TransformerConv", {"edge_dim": 2, "beta": True}),
}


def make(which: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """Our layer, the parent's of the same weights, and arguments; features are as wide as the heads."""
    name, settings = SETTINGS[which]
    settings = {"in_channels": 8, "out_channels": 4, "heads": 2, **settings}
    ours, theirs = (getattr(home, name)(**settings).double() for home in (pyg, parent))
    ours.load_state_dict(theirs.state_dict())
    x, edge_index = torch.randn(7, 8, dtype=torch.float64), torch.randint(7, (2, 20))
    edge_attr = (torch.randn(20, 2, dtype=torch.float64),) if "edge_dim" in settings else ()
    return ours, theirs, (x, edge_index, *edge_attr)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def parts_of(which: str) -> list[str]:
    return [name for name, _ in make(which)[0].named_children()]


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2.0 * output


def patch(part: Any) -> None:
    plain = part.forward
    part.forward = lambda *given, **named: 2.0 * plain(*given, **named)


def patch_reduce(part: Any) -> None:
    if hasattr(part, "reduce"):
        plain = part.reduce
        part.reduce = lambda *given, **named: 2.0 * plain(*given, **named)


def retype(part: Any) -> None:
    kind = type(part)
    part.__class__ = type(
        "Other", (kind,), {"forward": lambda self, *x, **named: 2.0 * kind.forward(self, *x, **named)}
    )


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def parametrise(part: Any) -> None:
    if "weight" in part._parameters:
        parametrize.register_parametrization(part, "weight", Twice(), unsafe=True)


def normalise(part: Any) -> None:
    if "weight" in part._parameters:
        parametrizations.weight_norm(part)


def add_bias(part: Any) -> None:
    if part._parameters.get("bias", part) is None:
        part.bias = nn.Parameter(torch.arange(1.0, 1.0 + part.out_channels, dtype=torch.float64))


CHANGES: dict[str, Callable[[Any], object]] = {
    "forward hook": lambda part: part.register_forward_hook(doubled),
    "patched forward": patch,
    "patched reduction": patch_reduce,
    "subclass": retype,
    "parametrisation": parametrise,
    "weight norm": normalise,
    "a bias where there was none": add_bias,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", SETTINGS)
def test_a_change_of_any_part_counts_as_it_does_with_the_parent(which: str, change: str) -> None:
    for name in parts_of(which):
        ours, theirs, given = make(which)
        for layer in (ours, theirs):
            CHANGES[change](layer.get_submodule(name))
        close(ours(*given), theirs(*given))


@pytest.mark.parametrize("which", SETTINGS)
def test_another_module_in_any_projections_place(which: str) -> None:
    for name in parts_of(which):
        if name == "aggr_module":
            continue
        ours, theirs, given = make(which)
        wide = given[-1].shape[-1] if name == "lin_edge" else theirs.get_submodule(name).in_channels
        other = nn.Sequential(nn.Linear(wide, 3), nn.Linear(3, theirs.get_submodule(name).out_channels)).double()
        for layer in (ours, theirs):
            setattr(layer, name, other)
        close(ours(*given), theirs(*given))


@pytest.mark.parametrize("which", SETTINGS)
def test_hooks_of_all_modules_see_what_they_see_of_the_parent(which: str) -> None:
    ours, theirs, given = make(which)
    seen: list[str] = []
    counts = []
    for layer in (ours, theirs):
        names = {part: name for name, part in layer.named_modules()}
        with_names = register_module_forward_hook(lambda module, *_, names=names: seen.append(names[module]))
        layer(*given)
        with_names.remove()
        counts.append(sorted(seen))
        seen.clear()
    assert counts[0] == counts[1]
    assert "aggr_module" in counts[0]
    handle = register_module_forward_hook(doubled)
    close(ours(*given), theirs(*given))
    handle.remove()


def test_a_hook_of_the_aggregation_is_the_reason() -> None:
    ours, _, given = make("GATConv")
    ours.aggr_module.register_forward_hook(doubled)
    reason = "the aggregation has hooks or another forward"
    assert ours.explain_forward(*given).refusals == (("anyattention", reason),)


@pytest.mark.parametrize("which", SETTINGS)
def test_a_layer_built_on_meta_equals_one_built_directly(which: str) -> None:
    name, settings = SETTINGS[which]
    settings = {"in_channels": 8, "out_channels": 4, "heads": 2, **settings}
    _, _, given = make(which)
    given = tuple(x.float() if x.is_floating_point() else x for x in given)
    torch.manual_seed(7)
    direct = getattr(pyg, name)(**settings)
    for how in ("reset", "assigned"):
        with torch.device("meta"):
            layer = getattr(pyg, name)(**settings)
        if how == "assigned":
            layer.load_state_dict(direct.state_dict(), assign=True)
        else:
            layer.to_empty(device="cpu")
            for each in (layer, direct):
                torch.manual_seed(8)
                each.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
        assert torch.equal(layer(*given), direct(*given))
