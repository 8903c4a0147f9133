"""The drop-in layers inside PyTorch Geometric's models, wrappers and batches.

Each is compared with the same model of PyTorch Geometric's own layers and the same weights, in value and gradient.
"""

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric import nn as parent
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn.models import basic_gnn
from torch_geometric.utils import get_embeddings, unbatch

from pyg_pairs import NAMES, close, compare, gradients, graph, pair


@pytest.mark.pairwise
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("jk", [None, "cat", "max", "lstm"])
@pytest.mark.parametrize("norm", [None, "batch", "graph"])
@pytest.mark.parametrize("edge_dim", [None, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_the_model_gat(
    v2: bool, jk: str | None, norm: str | None, edge_dim: int | None, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(home: Any) -> nn.Module:
        for name in NAMES[:2]:
            monkeypatch.setattr(basic_gnn, name, getattr(home, name))
        settings = {"v2": v2, "heads": 2, "jk": jk, "norm": norm, "edge_dim": edge_dim, "residual": residual}
        return parent.GAT(5, 6, num_layers=3, out_channels=7, **settings)

    x, edge_index = graph()
    edge_attr = torch.randn(30, 3, dtype=torch.float64, requires_grad=True) if edge_dim else None
    inputs = [x] if edge_attr is None else [x, edge_attr]
    compare(pair(build), lambda model: model(x, edge_index, edge_attr=edge_attr), inputs, layers=3)


def test_the_model_gat_trims_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after NeighborLoader: each layer has fewer nodes and edges than the one before."""

    def build(home: Any) -> nn.Module:
        monkeypatch.setattr(basic_gnn, "GATConv", home.GATConv)
        return parent.GAT(5, 6, num_layers=2, out_channels=7)

    x, _ = graph()
    # Two nodes, their 3 neighbours, and the 6 of these.
    edge_index = torch.tensor([[2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 3], [0, 0, 1, 0, 2, 2, 3, 3, 4, 4, 4]])
    sampled = {"num_sampled_nodes_per_hop": [2, 3, 6], "num_sampled_edges_per_hop": [4, 7]}
    models = pair(build)
    trimmed = compare(models, lambda model: model(x, edge_index, **sampled), [x], layers=2)[0]
    close(trimmed[:2], models[0](x, edge_index)[:2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", ["res+", "res", "dense", "plain"])
def test_deep_gcn_layers(name: str, block: str) -> None:
    x, edge_index = graph(width=6)
    models = pair(lambda home: deep_gcn(home, name, block))
    compare(models, lambda model: through(model, x, edge_index), [x], layers=3)


@pytest.mark.parametrize("name", NAMES)
def test_deep_gcn_layers_that_run_again_backward(name: str) -> None:
    """PyTorch Geometric checkpoints them in a way that `.backward()` alone can use."""
    x, edge_index = graph(width=6)
    results = []
    for model in pair(lambda home: deep_gcn(home, name, "res+", ckpt_grad=True)):
        own = x.detach().clone().requires_grad_()
        output = through(model, own, edge_index)
        torch.manual_seed(1)
        output.backward(torch.randn_like(output))
        results.append([output, own.grad, *[parameter.grad for parameter in model.parameters()]])
    close(results[0], results[1])


def deep_gcn(home: Any, name: str, block: str, **settings: Any) -> nn.Module:
    layers, width = nn.ModuleList(), 6
    for _ in range(3):
        conv, norm = getattr(home, name)(width, 3, heads=2), nn.LayerNorm(width if block == "res+" else 6)
        layers.append(parent.DeepGCNLayer(conv, norm, nn.ReLU(), block=block, **settings))
        width += 6 if block == "dense" else 0
    return layers


def through(layers: Any, x: Tensor, edge_index: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, edge_index)
    return x


class Jumping(nn.Module):
    def __init__(self, home: Any, mode: str) -> None:
        super().__init__()
        self.first = home.GATv2Conv(5, 3, heads=2)
        self.second = home.TransformerConv(6, 3, heads=2, beta=True)
        self.jump = parent.JumpingKnowledge(mode, channels=6, num_layers=2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        first = F.elu(self.first(x, edge_index))
        return self.jump([first, self.second(first, edge_index)])


@pytest.mark.parametrize("mode", ["cat", "max", "lstm"])
def test_jumping_knowledge(mode: str) -> None:
    x, edge_index = graph()
    compare(pair(lambda home: Jumping(home, mode)), lambda model: model(x, edge_index), [x], layers=2)


class Classifier(nn.Module):
    """Of whole graphs."""

    def __init__(self, home: Any, name: str) -> None:
        super().__init__()
        self.first = getattr(home, name)(5, 3, heads=2, edge_dim=2)
        self.second = getattr(home, name)(6, 4)

    def forward(self, data: Any) -> tuple[Tensor, Tensor]:
        nodes = F.elu(self.first(data.x, data.edge_index, data.edge_attr))
        nodes = self.second(nodes, data.edge_index)
        return nodes, parent.global_mean_pool(nodes, data.batch)


def molecules() -> list[Data]:
    """Graphs of several sizes; one without edges, one of a single node."""
    sizes = [(7, 13), (1, 0), (5, 0), (2, 3), (11, 40)]
    return [
        Data(
            x=torch.randn(nodes, 5, dtype=torch.float64),
            edge_index=torch.randint(nodes, (2, edges)),
            edge_attr=torch.randn(edges, 2, dtype=torch.float64),
        )
        for nodes, edges in sizes
    ]


@pytest.mark.parametrize("name", NAMES)
def test_mini_batches_of_graphs(name: str) -> None:
    models = pair(lambda home: Classifier(home, name))
    for batch in DataLoader(molecules(), batch_size=2):
        compare(models, lambda model, batch=batch: model(batch), [], layers=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_taken_apart_is_each_graph(name: str) -> None:
    ours, _ = pair(lambda home: Classifier(home, name))
    graphs = molecules()
    batch: Any = Batch.from_data_list(list[Any](graphs))
    nodes, pooled = ours(batch)
    alone = [ours(Batch.from_data_list([one])) for one in graphs]
    close(list(unbatch(nodes, batch.batch)), [of_nodes for of_nodes, _ in alone])
    close(pooled, torch.cat([of_graph for _, of_graph in alone]))
    close([one.x for one in batch.to_data_list()], [one.x for one in graphs])


def test_sequential() -> None:
    def build(home: Any) -> nn.Module:
        return parent.Sequential(
            "x, edge_index, batch",
            [
                (nn.Dropout(p=0.0), "x -> x"),
                (home.GATConv(5, 3, heads=2), "x, edge_index -> x1"),
                nn.ReLU(inplace=True),
                (home.GATv2Conv(6, 6), "x1, edge_index -> x2"),
                (lambda x1, x2: [x1, x2], "x1, x2 -> xs"),
                (parent.JumpingKnowledge("cat", 6, num_layers=2), "xs -> x"),
                (parent.global_add_pool, "x, batch -> x"),
                nn.Linear(12, 2),
            ],
        )

    x, edge_index = graph()
    batch = torch.tensor([0] * 4 + [1] * 7)
    compare(pair(build), lambda model: model(x, edge_index, batch), [x], layers=2)


@pytest.mark.parametrize("name", NAMES)
def test_gps_conv(name: str) -> None:
    x, edge_index = graph(width=6)
    batch = torch.tensor([0] * 4 + [1] * 7)

    def build(home: Any) -> nn.Module:
        return parent.GPSConv(6, getattr(home, name)(6, 3, heads=2), heads=2, norm="layer_norm")

    compare(pair(build), lambda model: model(x, edge_index, batch), [x], layers=1)


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_of_one_layer(name: str) -> None:
    x, edge_index = graph(width=6)

    def directed(home: Any) -> nn.Module:
        loops = {} if name == "TransformerConv" else {"add_self_loops": False}
        return parent.DirGNNConv(getattr(home, name)(6, 6, **loops))

    def antisymmetric(home: Any) -> nn.Module:
        return parent.AntiSymmetricConv(6, getattr(home, name)(6, 6), num_iters=3)

    for build, layers in ((directed, 2), (antisymmetric, 3)):
        compare(pair(build), lambda model: model(x, edge_index), [x], layers)


@pytest.mark.parametrize("name", NAMES)
def test_reversible_groups(name: str) -> None:
    """Whose layers run again backward, from inputs that are made of outputs."""
    x, edge_index = graph(width=6)

    def build(home: Any) -> nn.Module:
        return parent.GroupAddRev(getattr(home, name)(3, 3), num_groups=2)

    results = []
    for model in pair(build):
        own = x.detach().clone().requires_grad_()
        # It frees the memory of what it is given.
        output = model(own * 1, edge_index)
        results.append([output.detach().clone(), *gradients([output], model, [own])])
    close(results[0], results[1])


@pytest.mark.parametrize("name", NAMES)
def test_pooling_by_attention(name: str) -> None:
    x, edge_index = graph()
    batch = torch.tensor([0] * 4 + [1] * 7)
    edge_index = edge_index[:, batch[edge_index[0]] == batch[edge_index[1]]]

    def build(home: Any) -> nn.Module:
        return parent.SAGPooling(5, ratio=0.5, GNN=getattr(home, name))

    def call(model: nn.Module) -> Tensor:
        return model(x, edge_index, batch=batch)[0]

    compare(pair(build), call, [x], layers=1)


def test_the_summary_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # What lays out the table is no part of the tests' environment.
    table = SimpleNamespace(tabulate=lambda rows, **_layout: str(rows))
    monkeypatch.setitem(sys.modules, "tabulate", table)
    x, edge_index = graph()
    ours, theirs = pair(lambda home: Jumping(home, "cat"))
    summary = parent.summary(ours, x, edge_index)
    assert summary == parent.summary(theirs, x, edge_index)
    assert "(first)GATv2Conv', '[11, 5], [2, 30]', '[11, 6]', '84'" in summary
    assert parent.summary(ours, x, edge_index, leaf_module=None, max_depth=5) == parent.summary(
        theirs, x, edge_index, leaf_module=None, max_depth=5
    )


def test_embeddings_of_each_layer() -> None:
    x, edge_index = graph()
    ours, theirs = pair(lambda home: Jumping(home, "cat"))
    found = get_embeddings(ours, x, edge_index)
    assert [embedding.shape for embedding in found] == [(11, 6), (11, 6)]
    close(found, get_embeddings(theirs, x, edge_index))


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_reset(name: str) -> None:
    """What `to_hetero`, ensembles and grid searches do."""
    x, edge_index = graph()
    ours, theirs = pair(lambda home: Classifier(home, name))
    data = Data(x=x, edge_index=edge_index, edge_attr=torch.randn(30, 2).double(), batch=torch.zeros(11).long())
    ours(data)
    copied = copy.deepcopy(ours)
    close(copied(data), theirs(data))
    for model in (copied, theirs):
        torch.manual_seed(3)
        for layer in model.children():
            layer.reset_parameters()
    close(copied(data), theirs(data))
    assert not torch.allclose(copied(data)[0], ours(data)[0])


@pytest.mark.parametrize("name", NAMES)
def test_training_over_a_loader(name: str) -> None:
    losses = []
    graphs = molecules()
    for model in pair(lambda home: Classifier(home, name)):
        optimizer, of_model = torch.optim.Adam(model.parameters(), lr=0.02), []
        for _ in range(10):
            for batch in DataLoader(graphs, batch_size=2):
                loss = (model(batch)[1] - batch.num_graphs).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                of_model.append(loss.item())
        losses.append(of_model)
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert losses[0][-3] < losses[0][0]
