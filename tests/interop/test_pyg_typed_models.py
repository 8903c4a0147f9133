"""The drop-in layers in PyTorch Geometric's models of several node and edge types, beside its own layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric import nn as parent
from torch_geometric.data import HeteroData

from anyattention.interop import pyg
from pyg_pairs import NAMES, compare, pair


class Hetero(nn.Module):
    """What `to_hetero` takes: widths that the first call says."""

    def __init__(self, home: Any, name: str) -> None:
        super().__init__()
        loops = {} if name == "TransformerConv" else {"add_self_loops": False}
        self.first = getattr(home, name)((-1, -1), 3, heads=2, **loops)
        self.skip = parent.Linear(-1, 6)
        self.second = getattr(home, name)((-1, -1), 4, heads=1, **loops)

    def forward(self, x: Any, edge_index: Any) -> Any:
        x = F.elu(self.first(x, edge_index) + self.skip(x))
        return self.second(x, edge_index)


def typed_graph() -> HeteroData:
    data = HeteroData()
    data["paper"].x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    data["author"].x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    sizes = {"paper": 7, "author": 5}
    for source, relation, target, edges in (
        ("author", "writes", "paper", 13),
        ("paper", "written_by", "author", 11),
        ("paper", "cites", "paper", 17),
    ):
        ends = [torch.randint(sizes[each], (edges,)) for each in (source, target)]
        data[source, relation, target].edge_index = torch.stack(ends)
    return data


def lazy_pair(build: Callable[[Any], nn.Module], call: Callable[[nn.Module], Any]) -> tuple[nn.Module, nn.Module]:
    """As `pair`, after a first call that gives the widths."""
    ours, theirs = (build(home).double() for home in (pyg, parent))
    with torch.no_grad():
        call(ours), call(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("aggr", ["sum", "mean", "max"])
def test_to_hetero(name: str, aggr: str) -> None:
    data = typed_graph()

    def build(home: Any) -> nn.Module:
        return parent.to_hetero(Hetero(home, name), data.metadata(), aggr)

    def call(model: nn.Module) -> Any:
        return model(data.x_dict, data.edge_index_dict)

    # Two layers of three relations.
    compare(lazy_pair(build, call), call, list(data.x_dict.values()), layers=6)


@pytest.mark.parametrize("name", NAMES)
def test_the_hook_of_to_hetero_with_bases_is_called(name: str) -> None:
    """It changes each message, and refuses those of these layers, which have heads: the parent's, and so ours."""
    data = typed_graph()

    class Net(nn.Module):
        def __init__(self, home: Any) -> None:
            super().__init__()
            self.conv = getattr(home, name)((6, 6), 3, heads=2)

        def forward(self, x: Any, edge_index: Any) -> Any:
            return self.conv(x, edge_index)

    for home in (pyg, parent):
        model = parent.to_hetero_with_bases(Net(home), data.metadata(), num_bases=2, in_channels={"x": 6}).double()
        with pytest.raises(ValueError, match="Number of messages"):
            model(data.x_dict, data.edge_index_dict)


@pytest.mark.parametrize("aggr", ["sum", "mean", "max", "cat"])
def test_hetero_conv(aggr: str) -> None:
    data = typed_graph()

    def build(home: Any) -> nn.Module:
        layers = {
            ("author", "writes", "paper"): home.GATConv((3, 5), 4, add_self_loops=False),
            ("paper", "written_by", "author"): home.GATv2Conv((5, 3), 4, add_self_loops=False),
            ("paper", "cites", "paper"): home.TransformerConv(5, 2, heads=2),
        }
        return parent.HeteroConv(layers, aggr=aggr)

    inputs = list(data.x_dict.values())
    compare(pair(build), lambda model: model(data.x_dict, data.edge_index_dict), inputs, layers=3)
