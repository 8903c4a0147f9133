"""The drop-in layers inside PyTorch Geometric's own wrappers: fast there, and the parent's results."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import nn as parent
from torch_geometric.data import HeteroData
from torch_geometric.explain import AttentionExplainer, Explainer, GNNExplainer, HeteroExplanation

from anyattention.interop import pyg

_NAMES = ("GATConv", "GATv2Conv", "TransformerConv")
_SIZES = {"paper": 11, "author": 7}
_EDGES = {
    ("paper", "cites", "paper"): 30,
    ("author", "writes", "paper"): 20,
    ("paper", "written_by", "author"): 20,
}


def make_data() -> tuple[dict[str, Tensor], dict[tuple[str, str, str], Tensor]]:
    """Features of two types of nodes, and edges of three."""
    x = {kind: torch.randn(count, 3, dtype=torch.float64) for kind, count in _SIZES.items()}
    edges = {
        kind: torch.stack([torch.randint(_SIZES[kind[0]], (count,)), torch.randint(_SIZES[kind[2]], (count,))])
        for kind, count in _EDGES.items()
    }
    return x, edges


def watched(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What runs each call of our layers in a model, as explain_forward says it at the call."""
    ran: list[str] = []
    for kind in (pyg.GATConv, pyg.GATv2Conv, pyg.TransformerConv):

        def forward(self: Any, *given: Any, _plain: Any = kind.forward, **named: Any) -> Any:
            ran.append(self.explain_forward(*given, **named).implementation)
            return _plain(self, *given, **named)

        monkeypatch.setattr(kind, "forward", forward)
    return ran


def same_weights(models: list[nn.Module]) -> None:
    with torch.no_grad():
        for mine, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
            right.normal_()
            mine.copy_(right)


def check(models: list[nn.Module], call: Any, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Results and gradients of two models, and that ours runs the kernels in so many calls of layers."""
    same_weights(models)
    ran = watched(models[0], monkeypatch)
    results = [call(model) for model in models]
    assert ran == ["cpu"] * calls
    by = [torch.randn_like(each) for each in results[0]]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [
        torch.autograd.grad(result, list(model.parameters()), by, allow_unused=True, materialize_grads=True)
        for model, result in zip(models, results, strict=True)
    ]
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


def settings_of(name: str) -> dict[str, Any]:
    # Self-loops of edges between two types are none.
    return {} if name == "TransformerConv" else {"add_self_loops": False}


@pytest.mark.parametrize("in_channels", [3, (-1, -1)])
@pytest.mark.parametrize("name", _NAMES)
def test_hetero_conv(name: str, in_channels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, edges = make_data()
    models: list[nn.Module] = []
    for home in (pyg, parent):
        layers = {kind: getattr(home, name)(in_channels, 4, heads=2, **settings_of(name)) for kind in _EDGES}
        models.append(parent.HeteroConv(layers, aggr="sum").double())
    if in_channels != 3:
        # The first call runs ours too.
        ran = watched(models[0], monkeypatch)
        for model in models:
            model(x, edges)
        assert ran == ["cpu"] * 3
        monkeypatch.undo()
    check(models, lambda model: list(model(x, edges).values()), monkeypatch, 3)


class Net(nn.Module):
    def __init__(self, layers: Any, name: str) -> None:
        super().__init__()
        self.first = getattr(layers, name)((-1, -1), 4, heads=2, **settings_of(name))
        self.second = getattr(layers, name)((-1, -1), 2, heads=1, **settings_of(name))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


@pytest.mark.parametrize("name", _NAMES)
def test_to_hetero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, edges = make_data()
    metadata = (list(_SIZES), list(_EDGES))
    models: list[nn.Module] = [parent.to_hetero(Net(home, name), metadata).double() for home in (pyg, parent)]
    ran = watched(models[0], monkeypatch)
    for model in models:
        model(x, edges)
    assert ran == ["cpu"] * 6
    monkeypatch.undo()
    check(models, lambda model: list(model(x, edges).values()), monkeypatch, 6)


class Square(nn.Module):
    """Of widths that are known, as bases have it."""

    def __init__(self, layers: Any, name: str) -> None:
        super().__init__()
        self.only = getattr(layers, name)(5, 4, heads=2, **settings_of(name))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.only(x, edge_index)


@pytest.mark.parametrize("name", _NAMES)
def test_to_hetero_with_bases_which_the_parent_cannot_run_either(name: str) -> None:
    """Its hooks want messages of two axes, and these layers' have three. A hook must not be skipped."""
    x, edges = make_data()
    metadata = (list(_SIZES), list(_EDGES))
    for home in (pyg, parent):
        model = parent.to_hetero_with_bases(Square(home, name), metadata, num_bases=2, in_channels={"x": 5}).double()
        with pytest.raises(ValueError, match="Number of messages"):
            model(x, edges)


@pytest.mark.parametrize("name", _NAMES)
def test_sequential(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, edge_index = torch.randn(11, 3, dtype=torch.float64), torch.randint(11, (2, 30))
    models: list[nn.Module] = []
    for home in (pyg, parent):
        steps = [
            (getattr(home, name)(-1, 4, heads=2), "x, edge_index -> x"),
            nn.ReLU(),
            (getattr(home, name)(8, 2), "x, edge_index -> x"),
        ]
        models.append(parent.Sequential("x, edge_index", steps).double())
        models[-1](x, edge_index)
    check(models, lambda model: [model(x, edge_index)], monkeypatch, 2)


@pytest.mark.parametrize("name", _NAMES)
def test_gps_conv(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, edge_index = torch.randn(11, 8, dtype=torch.float64), torch.randint(11, (2, 30))
    edge_attr = torch.randn(30, 2, dtype=torch.float64)
    batch = torch.tensor([0] * 5 + [1] * 6)
    models: list[nn.Module] = []
    for home in (pyg, parent):
        layer = getattr(home, name)(8, 4, heads=2, edge_dim=2)
        models.append(parent.GPSConv(8, layer, heads=2, dropout=0.0).double())
    check(models, lambda model: [model(x, edge_index, batch, edge_attr=edge_attr)], monkeypatch, 1)


def explained(model: nn.Module, algorithm: Any, data: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = {"mode": "regression", "task_level": "node", "return_type": "raw"}
    explainer = Explainer(model, algorithm, "model", edge_mask_type="object", model_config=config, **settings)
    return explainer(*data, index=2)


class HeteroNet(nn.Module):
    def __init__(self, layers: Any, name: str) -> None:
        super().__init__()
        convs = {kind: getattr(layers, name)(3, 4, heads=2, **settings_of(name)) for kind in _EDGES}
        self.conv = parent.HeteroConv(convs, aggr="sum")
        self.last = nn.Linear(8, 1)

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[Any, Tensor]) -> Tensor:
        found = self.conv(x_dict, edge_index_dict)
        return torch.cat([self.last(found["paper"]), self.last(found["author"])])


@pytest.mark.parametrize("kind", ["gnn", "attention"])
@pytest.mark.parametrize("name", _NAMES)
def test_heterogeneous_explanations_are_the_parents(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, edges = make_data()
    models: list[nn.Module] = [HeteroNet(home, name).double() for home in (pyg, parent)]
    same_weights(models)
    found = []
    for model in models:
        if kind == "gnn":
            found.append(explained(model, GNNExplainer(epochs=4), (x, edges), node_mask_type="attributes"))
        else:
            found.append(explained(model, AttentionExplainer(), (x, edges)))
    assert isinstance(found[0], HeteroExplanation)
    for edge_type in _EDGES:
        mine, right = (each[edge_type].edge_mask for each in found)
        torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-8)
        assert mine.any() or kind == "gnn"
    # And after it the layers are fast again.
    check(models, lambda model: [model(x, edges)], monkeypatch, 3)


def test_hetero_data_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x, edges = make_data()
    data = HeteroData()
    for kind, features in x.items():
        data[kind].x = features
    for kind, edge_index in edges.items():
        data[kind].edge_index = edge_index
    models: list[nn.Module] = [HeteroNet(home, "GATv2Conv").double() for home in (pyg, parent)]
    check(models, lambda model: [model(data.x_dict, data.edge_index_dict)], monkeypatch, 3)
