"""The drop-in layers against PyTorch Geometric's with the same weights, in float64."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import nn as parent

from anyattention.interop import pyg

_SEEDS = range(240)
_LAYERS = {
    "GATConv": (pyg.GATConv, parent.GATConv),
    "GATv2Conv": (pyg.GATv2Conv, parent.GATv2Conv),
    "TransformerConv": (pyg.TransformerConv, parent.TransformerConv),
}


@dataclass
class Case:
    """One random graph, one random layer for it, and what the call is given."""

    in_channels: int | tuple[int, int]
    settings: dict[str, Any]
    x: Tensor | tuple[Tensor, Tensor | None]
    edge_index: Tensor
    edge_attr: Tensor | None
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Tensor]:
        nodes = [each for each in self.x if each is not None] if isinstance(self.x, tuple) else [self.x]
        return nodes if self.edge_attr is None else [*nodes, self.edge_attr]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def make_edges(choice: random.Random, sources: int, targets: int) -> Tensor:
    """Few nodes are named often: duplicates, hubs, self-loops and isolated nodes."""
    count = choice.choice([0, 1, 3, 13, 30, 30])
    edges = torch.stack([torch.randint(max(each - 1, 1), (count,)) for each in (sources, targets)])
    if choice.random() < 0.3:
        loops = torch.arange(min(sources, targets)).expand(2, -1)
        edges = torch.cat([edges, loops, edges[:, :2]], dim=1)
    if choice.random() < 0.3:
        # As a transposed list of pairs: rows that are not contiguous.
        edges = edges.T.contiguous().T
    return edges


def make_case(name: str, seed: int) -> Case:
    torch.manual_seed(seed)
    choice = random.Random(f"{name} {seed}")
    sources = choice.choice([1, 2, 5, 7, 11])
    kind = choice.choice(["one", "pair", "bipartite", "one width, two sides"])
    targets = choice.choice([1, 3, 5, 13]) if kind in ("pair", "bipartite") else sources
    widths = (choice.choice([1, 3, 5]), choice.choice([2, 3, 7]))
    in_channels = widths if kind == "bipartite" else (widths[0], widths[0]) if kind.startswith("one w") else widths[0]
    target_width = widths[1] if kind == "bipartite" else widths[0]
    x: Any = leaf(sources, widths[0])
    if kind in ("pair", "bipartite"):
        x = (x, leaf(targets, target_width))
    edge_index = make_edges(choice, sources, targets)
    edge_dim = choice.choice([None, None, 1, 3])
    # A column of features may come without its second axis.
    flat = edge_dim == 1 and name != "TransformerConv" and choice.random() < 0.5
    shape = (edge_index.shape[1],) if flat else (edge_index.shape[1], edge_dim or 0)
    settings: dict[str, Any] = {
        "out_channels": choice.choice([1, 2, 3, 7]),
        "heads": choice.choice([1, 2, 3, 5]),
        "concat": choice.random() < 0.6,
        "edge_dim": edge_dim,
        "bias": choice.random() < 0.6,
    }
    call: dict[str, Any] = {}
    if name == "TransformerConv":
        settings |= {"beta": choice.random() < 0.5, "root_weight": choice.random() < 0.7}
    else:
        settings |= {
            "residual": choice.random() < 0.5,
            "negative_slope": choice.choice([0.2, 0.0, 0.7]),
            "add_self_loops": choice.random() < 0.6,
            "fill_value": choice.choice(["mean", "add", "min", "max", "mul", 0.3, torch.tensor(0.7)]),
        }
    if name == "GATv2Conv":
        settings["share_weights"] = kind != "bipartite" and choice.random() < 0.4
    if name == "GATConv" and choice.random() < 0.3:
        call["size"] = (sources, targets)
    if name == "GATConv" and isinstance(x, tuple) and choice.random() < 0.3:
        x, call["size"] = (x[0], None), (sources, targets)
    return Case(in_channels, settings, x, edge_index, leaf(*shape) if edge_dim else None, call)


def make_pair(name: str, case: Case) -> tuple[nn.Module, nn.Module]:
    """Our layer and the parent's, with the same random weights."""
    ours, theirs = (kind(case.in_channels, **case.settings).double() for kind in _LAYERS[name])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def refused(case: Case) -> bool:
    """PyTorch Geometric fills loops by reduction into min(sources, targets) rows, too few for the other targets."""
    if case.edge_attr is None or not case.settings.get("add_self_loops"):
        return False
    if not isinstance(case.settings["fill_value"], str) or case.edge_index.numel() == 0:
        return False
    target = case.x[1] if isinstance(case.x, tuple) else case.x
    targets = case.call["size"][1] if target is None else target.shape[0]
    sources = case.inputs[0].shape[0]
    proper = case.edge_index[:, case.edge_index[0] != case.edge_index[1]]
    return proper.numel() > 0 and int(proper[1].max()) >= min(sources, targets)


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.exhaustive) for block in range(1, 8))])
@pytest.mark.parametrize("name", list(_LAYERS))
def test_outputs_weights_and_all_gradients_equal_the_parents(name: str, block: int, native: Any) -> None:
    for seed in _SEEDS[block::8]:
        case = make_case(name, seed)
        assert_equal_to_parent(name, case, f"{name} {seed}")


def assert_equal_to_parent(name: str, case: Case, label: str) -> None:
    ours, theirs = make_pair(name, case)
    given = (case.x, case.edge_index, case.edge_attr)
    if refused(case):
        for layer in (ours, theirs):
            with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
                layer(*given, **case.call)
        return
    ran = ours.explain_forward(*given, **case.call, return_attention_weights=True).implementation
    assert ran == "cpu", label
    results = [layer(*given, **case.call, return_attention_weights=True) for layer in (ours, theirs)]
    (output, (edges, weights)), (expected, (expected_edges, alpha)) = results
    assert torch.equal(edges, expected_edges), label
    close(output, expected, f"{label}: output")
    close(weights, alpha, f"{label}: weights")
    close(ours(*given, **case.call), expected, f"{label}: output alone")
    cotangents = [torch.randn_like(output), torch.randn_like(weights)]
    gradients = []
    for layer, result in ((ours, (output, weights)), (theirs, (expected, alpha))):
        leaves = [*case.inputs, *layer.parameters()]
        gradients.append(torch.autograd.grad(result, leaves, cotangents, allow_unused=True, materialize_grads=True))
    names = [*(f"input {n}" for n in range(len(case.inputs))), *(name for name, _ in theirs.named_parameters())]
    for leaf_name, mine, right in zip(names, *gradients, strict=True):
        close(mine, right, f"{label}: gradient of {leaf_name}")


def close(actual: Tensor, expected: Tensor, label: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{label}: {text}")


@pytest.mark.parametrize("name", list(_LAYERS))
def test_the_random_cases_cover_every_setting(name: str) -> None:
    cases = [make_case(name, seed) for seed in _SEEDS]
    has_loops = [bool((case.edge_index[0] == case.edge_index[1]).any()) for case in cases]
    counts = {
        "empty": sum(case.edge_index.shape[1] == 0 for case in cases),
        "self-loops": sum(has_loops),
        "duplicates": sum(
            len(set(zip(*case.edge_index.tolist(), strict=True))) < case.edge_index.shape[1] for case in cases
        ),
        "isolated": sum(case.edge_index[1].unique().numel() < case.inputs[0].shape[0] for case in cases),
        "bipartite": sum(isinstance(case.x, tuple) for case in cases),
        "edge features": sum(case.edge_attr is not None for case in cases),
        "not contiguous": sum(not case.edge_index.is_contiguous() for case in cases),
    }
    for setting in ("concat", "bias", "residual", "beta", "root_weight", "share_weights", "add_self_loops"):
        values = [case.settings[setting] for case in cases if setting in case.settings]
        if values:
            counts[setting], counts[f"no {setting}"] = sum(values), values.count(False)
    if name != "TransformerConv":
        replaced = zip(cases, has_loops, strict=True)
        counts["loops replaced"] = sum(case.settings["add_self_loops"] and loops for case, loops in replaced)
        filled = [case for case in cases if case.edge_attr is not None and case.settings["add_self_loops"]]
        counts["loops filled"] = sum(not refused(case) for case in filled)
        assert {str(case.settings["fill_value"]) for case in filled} >= {"mean", "add", "min", "max", "mul", "0.3"}
    if name == "GATConv":
        counts["size"] = sum("size" in case.call for case in cases)
        counts["no target features"] = sum(isinstance(case.x, tuple) and case.x[1] is None for case in cases)
    assert min(counts.values()) >= 8, counts
    # At least 200 settings are compared in full.
    assert sum(not refused(case) for case in cases) >= 200
