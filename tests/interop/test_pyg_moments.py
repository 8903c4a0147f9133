"""The drop-in layers in a first call that decides widths, and under autocast: ours runs, and gives the parent's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import nn as parent
from torch_geometric.nn import Linear

from anyattention.interop import pyg

_NAMES = ("GATConv", "GATv2Conv", "TransformerConv")


def make_graph(width: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(7, width), torch.randint(7, (2, 20))


def settings_of(name: str) -> dict[str, Any]:
    return {"beta": True} if name == "TransformerConv" else {"residual": True}


@pytest.mark.parametrize("edge_dim", [None, 2, -1])
@pytest.mark.parametrize("in_channels", [-1, (-1, -1)])
@pytest.mark.parametrize("name", _NAMES)
def test_the_first_call_decides_the_widths(name: str, in_channels: Any, edge_dim: int | None) -> None:
    """And draws the same weights as the parent's, for the same seed."""
    (x, edge_index), call = make_graph(), ()
    nodes = x if in_channels == -1 else (x, torch.randn(7, 5))
    if edge_dim is not None:
        call = (torch.randn(20, 2),)
    layers = []
    for home in (pyg, parent):
        torch.manual_seed(1)
        layers.append(getattr(home, name)(in_channels, 4, heads=2, edge_dim=edge_dim, **settings_of(name)))
    ours, theirs = layers
    state = torch.get_rng_state()
    assert ours.explain_forward(nodes, edge_index, *call).implementation == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
    assert "UninitializedParameter" in str([type(each) for each in ours.parameters()])
    results = []
    for layer in layers:
        torch.manual_seed(2)
        results.append(layer(nodes, edge_index, *call))
    torch.testing.assert_close(*results)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert ours.explain_forward(nodes, edge_index, *call).implementation == "cpu"
    assert all(type(each) is nn.Parameter for each in ours.parameters())


@pytest.mark.parametrize("name", _NAMES)
def test_a_hook_that_changes_the_width_has_its_say(name: str) -> None:
    """The parent's forward runs the first call of a projection whose input another hook changes."""
    x, edge_index = make_graph()
    part = {"GATConv": "lin", "GATv2Conv": "lin_l", "TransformerConv": "lin_query"}[name]
    layers = []
    for home in (pyg, parent):
        torch.manual_seed(1)
        layer = getattr(home, name)(-1, 4)
        getattr(layer, part).register_forward_pre_hook(lambda _, given: (given[0][:, :2],), prepend=True)
        layers.append(layer)
    assert "weight gets its size from the first call" in str(layers[0].explain_forward(x, edge_index))
    results = []
    for layer in layers:
        torch.manual_seed(2)
        results.append(layer(x, edge_index))
    torch.testing.assert_close(*results)
    assert getattr(layers[0], part).weight.shape[1] == 2


def test_widths_that_a_call_does_not_need() -> None:
    x, edge_index = make_graph()
    ours = pyg.GATConv((-1, -1), 4, edge_dim=-1)
    assert ours.explain_forward((x, None), edge_index).implementation == "cpu"
    theirs = parent.GATConv((-1, -1), 4, edge_dim=-1)
    theirs((x, None), edge_index)
    ours((x, None), edge_index)
    for part in ("lin_dst", "lin_edge"):
        assert isinstance(getattr(ours, part).weight, nn.UninitializedParameter)
        assert isinstance(getattr(theirs, part).weight, nn.UninitializedParameter)


def test_a_lazy_layer_copied_before_its_first_call() -> None:
    x, edge_index = make_graph()
    ours = pyg.GATConv(-1, 4)
    other = copy.deepcopy(ours)
    ours(x, edge_index)
    other(x[:, :2], edge_index)
    assert isinstance(other.lin, Linear)
    assert other.lin.weight.shape == (4, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("name", _NAMES)
def test_autocast(name: str, features: bool, dtype: torch.dtype) -> None:
    """The parent's dtypes, and no further from float64 than the parent is."""
    x, edge_index = make_graph()
    call = (torch.randn(20, 2),) if features else ()
    settings = {"edge_dim": 2 if features else None, "heads": 2, **settings_of(name)}
    ours, theirs = (getattr(home, name)(3, 4, **settings) for home in (pyg, parent))
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    expected, (_, alpha) = exact(x.double(), edge_index, *[e.double() for e in call], return_attention_weights=True)
    by = torch.randn_like(expected)
    exact_gradients = torch.autograd.grad(expected, list(exact.parameters()), by)
    found = []
    for layer in (ours, theirs):
        with torch.autocast("cpu", dtype=dtype):
            output, (_, weights) = layer(x, edge_index, *call, return_attention_weights=True)
            if layer is ours:
                assert ours.explain_forward(x, edge_index, *call).implementation == "cpu"
        gradients = torch.autograd.grad(output, list(layer.parameters()), by.to(output.dtype))
        found.append((output, weights, *gradients))
    for mine, right, true in zip(*found, (expected, alpha, *exact_gradients), strict=True):
        assert mine.dtype == right.dtype
        step = torch.finfo(dtype).eps * true.abs().max()
        assert (mine - true).abs().max() <= 2 * (right - true).abs().max() + step


@pytest.mark.parametrize("name", _NAMES)
def test_autocast_leaves_float64(name: str) -> None:
    x, edge_index = make_graph()
    ours, theirs = (getattr(home, name)(3, 4, heads=2).double() for home in (pyg, parent))
    ours.load_state_dict(theirs.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.explain_forward(x.double(), edge_index).implementation == "cpu"
        torch.testing.assert_close(ours(x.double(), edge_index), theirs(x.double(), edge_index), rtol=1e-10, atol=1e-10)
        assert "x_source is torch.float32 and" in str(ours.explain_forward(x, edge_index))


@pytest.mark.parametrize("name", _NAMES)
def test_autocast_takes_features_of_another_dtype(name: str) -> None:
    """As the result of a layer before, in autocast's dtype."""
    x, edge_index = make_graph()
    ours, theirs = (getattr(home, name)(3, 4, heads=2) for home in (pyg, parent))
    ours.load_state_dict(theirs.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.explain_forward(x.bfloat16(), edge_index).implementation == "cpu"
        found, expected = (layer(x.bfloat16(), edge_index) for layer in (ours, theirs))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.03, atol=0.03)
    assert "x_source is torch.bfloat16" in str(ours.explain_forward(x.bfloat16(), edge_index))
