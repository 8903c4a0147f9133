"""PyTorch Geometric's own models of points on our searches, against the same models with edges by brute force."""

import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric
from torch import Tensor, nn
from torch_geometric import nn as parent
from torch_geometric.data import Batch, Data
from torch_geometric.nn.models import visnet
from torch_geometric.transforms import KNNGraph, RadiusGraph

from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.interop.pyg import knn_graph, provide_neighbours, radius, radius_graph
from neighbour_oracle import brute_force


@pytest.fixture(autouse=True)
def _provided() -> None:
    assert provide_neighbours()


def edges_within(
    pos: Tensor, r: float, batch: Tensor | None = None, loop: bool = False, most: int | None = None
) -> Tensor:
    """Neighbours in row 0, points in row 1, in torch_cluster's order."""
    rows = brute_force(pos.detach(), key_cloud=batch, reach=r)
    pairs = [(query, key) for query, key, _, distance in rows if distance < r]
    pairs = sorted(pairs + [(i, i) for i in range(len(pos)) if loop])
    kept = [pair for _, group in groupby(pairs, key=lambda pair: pair[0]) for pair in list(group)[:most]]
    return torch.tensor(kept).reshape(-1, 2).T.flip(0)


def edges_to_nearest(x: Tensor, k: int, batch: Tensor | None = None, loop: bool = True) -> Tensor:
    """As `edges_within`, for the k nearest, the point itself among them."""
    rows = brute_force(x.detach(), key_cloud=batch, reach=1e9)
    rows = rows + [(i, i, (), 0.0) for i in range(len(x)) if loop]
    found = []
    for _, group in groupby(sorted(rows, key=lambda row: (row[0], row[3], row[1])), key=lambda row: row[0]):
        found += [(query, key) for query, key, _, _ in list(group)[:k]]
    return torch.tensor(found).T.flip(0)


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(output, inputs, torch.randn_like(output), allow_unused=True))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def cloud(*sizes: int, dim: int = 3, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return spread * torch.randn(len(batch), dim, dtype=torch.float64), batch


class Edges(nn.Module):
    """What SchNet takes as its interaction graph."""

    def __init__(self, r: float, most: int | None) -> None:
        super().__init__()
        self.r, self.most = r, most

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        edges = edges_within(pos, self.r, batch, most=self.most)
        return edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=-1)


def schnets(cutoff: float, most: int | None, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """SchNet with its own search, and with brute force."""
    sizes = {"hidden_channels": 8, "num_filters": 5, "num_interactions": 2, "num_gaussians": 7, "cutoff": cutoff}
    found = parent.SchNet(**sizes, max_num_neighbors=most, **settings).double()  # pyright: ignore[reportArgumentType]
    given = parent.SchNet(**sizes, interaction_graph=Edges(cutoff, most), **settings).double()
    given.load_state_dict(found.state_dict())
    return found, given


def compare(found: nn.Module, given: nn.Module, numbers: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
    """Energies, and their gradients in the positions and all parameters."""
    results = []
    for model in (found, given):
        own = pos.clone().requires_grad_()
        energy = model(numbers, own, batch)
        results.append([energy, *gradients(energy, own, *model.parameters())])
    close(results[0], results[1])
    assert results[0][1].abs().max() > 1e-3
    return results[0][0]


@pytest.mark.parametrize("most", [None, 32, 3])
def test_schnet(most: int | None) -> None:
    pos, batch = cloud(45, 1, 12, spread=1.0)
    found, given = schnets(10.0, most)
    compare(found, given, torch.randint(1, 9, (58,)), pos, batch)
    # 45 points that all see each other: a cut at 32 shows.
    assert found.interaction_graph(pos, batch)[0].shape[1] == sum(n * min(n - 1, most or n) for n in (45, 1, 12))


def test_schnet_of_real_molecules(data_folder: Path) -> None:
    with np.load(data_folder / "qm9_small.npz") as data:
        offsets = data["offsets"][:201]
        pos = torch.from_numpy(data["positions"][: offsets[-1]]).double()
        numbers = torch.from_numpy(data["numbers"][: offsets[-1]]).long()
    batch = torch.repeat_interleave(torch.arange(200), torch.from_numpy(np.diff(offsets)))
    energy = compare(*schnets(10.0, None, readout="mean"), numbers, pos, batch)
    assert energy.shape == (200, 1)
    assert energy.std() > 0


def test_schnet_takes_our_search_as_its_interaction_graph() -> None:
    """Without `provide_neighbours`."""

    def graph(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        source, target = edges = radius_graph(pos, 4.0, batch)
        return edges, (pos[source] - pos[target]).norm(dim=-1)

    _, given = schnets(4.0, None)
    found = parent.SchNet(8, 5, 2, 7, 4.0, interaction_graph=graph).double()
    found.load_state_dict(given.state_dict())
    pos, batch = cloud(11, 7)
    compare(found, given, torch.randint(1, 9, (18,)), pos, batch)


@pytest.mark.parametrize("most", [32, 4])
def test_visnet(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Energies, forces, and the gradient of energies in all parameters; that of forces is NaN in ViSNet itself."""
    pos, batch = cloud(9, 1, 6)
    numbers = torch.randint(1, 9, (16,))
    model = parent.ViSNet(
        hidden_channels=8, num_heads=2, num_layers=2, num_rbf=5, cutoff=5.0, max_num_neighbors=most, derivative=True
    )

    def results() -> list[Tensor]:
        energy, forces = model(numbers, pos.float(), batch)
        return [energy, forces, *gradients(energy, *model.parameters())]

    found = results()
    calls = []

    def brute(x: Tensor, r: float, batch: Tensor, loop: bool, max_num_neighbors: int) -> Tensor:
        calls.append(r)
        return edges_within(x, r, batch, loop, max_num_neighbors)

    monkeypatch.setattr(visnet, "radius_graph", brute)
    torch.testing.assert_close(found, results())
    assert calls == [5.0]
    assert found[1].abs().max() > 1e-4


@pytest.mark.parametrize("batched", [False, True])
def test_dynamic_edge_conv(batched: bool) -> None:
    x, batch = cloud(13, 7, dim=5)
    mlp = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    given_batch = batch if batched else None
    own = x.clone().requires_grad_()
    dynamic, static = parent.DynamicEdgeConv(mlp, k=4), parent.EdgeConv(mlp)
    found, expected = dynamic(own, given_batch), static(own, edges_to_nearest(x, 4, given_batch))
    close(found, expected)
    close(gradients(found, own, *mlp.parameters()), gradients(expected, own, *mlp.parameters()))


def test_dynamic_edge_conv_between_two_sets() -> None:
    (x, batch_x), (y, batch_y) = cloud(13, 7, dim=5), cloud(3, 4, dim=5)
    mlp = nn.Linear(10, 3).double()
    dynamic, static = parent.DynamicEdgeConv(mlp, k=2), parent.EdgeConv(mlp)
    rows = brute_force(x, y, key_cloud=batch_x, query_cloud=batch_y, reach=1e9)
    pairs = [
        (query, key)
        for query, group in groupby(rows, key=lambda row: row[0])
        for _, key, _, _ in sorted(group, key=lambda row: row[3])[:2]
    ]
    close(dynamic((x, y), (batch_x, batch_y)), static((x, y), torch.tensor(pairs).T.flip(0)))


def test_gravnet_conv() -> None:
    x, batch = cloud(13, 7, dim=5)
    layer = parent.GravNetConv(5, 4, space_dimensions=2, propagate_dimensions=3, k=4).double()
    edges = edges_to_nearest(layer.lin_s(x), 4, batch)
    apart = (layer.lin_s(x)[edges[0]] - layer.lin_s(x)[edges[1]]).square().sum(-1)
    messages = layer.lin_h(x)[edges[0]] * torch.exp(-10 * apart)[:, None]
    by_point = messages.unflatten(0, (20, 4))
    together = torch.cat([by_point.mean(1), by_point.amax(1)], dim=1)
    close(layer(x, batch), layer.lin_out1(x) + layer.lin_out2(together))


def test_x_conv_of_two_clouds_is_that_of_each() -> None:
    pos, batch = cloud(13, 7)
    x = torch.randn(20, 5, dtype=torch.float64)
    layer = parent.XConv(5, 4, dim=3, kernel_size=3, dilation=2).double().eval()
    apart = torch.cat([layer(x[some], pos[some]) for some in (slice(0, 13), slice(13, 20))])
    close(layer(x, pos, batch), apart)
    assert not torch.allclose(layer(x, pos), apart)


def test_point_net() -> None:
    """The two kinds of PyTorch Geometric's examples: among all points, and from all to some (here the first few)."""
    (pos, batch), x = cloud(13, 7), torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    mlp = nn.Linear(8, 3).double()
    layer = parent.PointNetConv(mlp, add_self_loops=False)
    found = layer(x, pos, knn_graph(pos, 4, batch, loop=True))
    expected = layer(x, pos, edges_to_nearest(pos, 4, batch))
    close([found, *gradients(found, x, mlp.weight)], [expected, *gradients(expected, x, mlp.weight)])

    some = torch.tensor([0, 1, 2, 13, 14])
    target, source = radius(pos, pos[some], 2.0, batch, batch[some], max_num_neighbors=64)
    within = edges_within(pos, 2.0, batch, loop=True)
    place = torch.full((20,), -1).index_copy(0, some, torch.arange(5))
    expected_edges = torch.stack([within[0], place[within[1]]])[:, place[within[1]] >= 0]
    nodes = (x, None), (pos, pos[some])
    close(layer(*nodes, torch.stack([source, target])), layer(*nodes, expected_edges))


def test_functions_and_transforms() -> None:
    pos, batch = cloud(13, 7)
    close(parent.radius_graph(pos, 2.0, batch, loop=True, max_num_neighbors=None), edges_within(pos, 2.0, batch, True))
    close(parent.radius_graph(pos, 2.0, batch, max_num_neighbors=2), edges_within(pos, 2.0, batch, most=2))
    close(parent.radius(pos, pos, 2.0, batch, batch), edges_within(pos, 2.0, batch, True).flip(0))
    close(parent.knn(pos, pos, 3, batch, batch), edges_to_nearest(pos, 3, batch).flip(0))
    # PyTorch Geometric looks for k + 1, and leaves out the point itself.
    close(parent.knn_graph(pos, 3, batch), edges_to_nearest(pos, 3, batch, loop=False))
    data = Batch.from_data_list([Data(pos=pos[:13]), Data(pos=pos[13:])])
    close(RadiusGraph(2.0)(data).edge_index, edges_within(pos, 2.0, batch))
    close(KNNGraph(3)(data).edge_index, edges_to_nearest(pos, 3, batch, loop=False))
    directions = pos / pos.norm(dim=1, keepdim=True)
    close(KNNGraph(3, cosine=True)(data).edge_index, edges_to_nearest(directions, 3, batch, loop=False))


def test_interpolation_from_the_nearest() -> None:
    (x, batch_x), (y, batch_y) = cloud(13, 7), cloud(4, 5)
    values = torch.randn(20, 2, dtype=torch.float64)
    weights = 1 / torch.cdist(y, x).square()
    weights[batch_y[:, None] != batch_x] = 0
    weights[weights < weights.topk(3).values[:, -1:]] = 0
    expected = weights @ values / weights.sum(1, keepdim=True)
    close(parent.knn_interpolate(values, x, y, batch_x, batch_y, k=3), expected)


def test_what_needs_more_still_says_so() -> None:
    pos, batch = cloud(7)
    with pytest.raises(ImportError, match="'fps' requires 'pyg-lib"):
        parent.fps(pos, batch)
    model = parent.DimeNet(4, 2, 1, 2, num_spherical=2, num_radial=2)
    with pytest.raises(ImportError, match="'SparseTensor' requires 'torch-sparse'"):
        model(torch.ones(7, dtype=torch.int64), pos.float(), batch)


def test_compiled_whole() -> None:
    mlp = nn.Linear(6, 3).double()
    layer = parent.DynamicEdgeConv(mlp, k=3)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    pos, _ = cloud(13)
    own = pos.clone().requires_grad_()
    close(gradients(compiled(own), own, mlp.weight), gradients(layer(own), own, mlp.weight))


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_before_and_after() -> None:
    code = """
import torch, torch_geometric
from anyattention.interop.pyg import provide_neighbours
x = torch.tensor([[0.0], [1.0], [5.0]])
try:
    torch_geometric.nn.knn_graph(x, 1)
except ImportError as missing:
    print(missing)
print(provide_neighbours(), provide_neighbours())
print(torch_geometric.nn.knn_graph(x, 1).tolist())
"""
    assert run(code).splitlines() == ["'knn_graph' requires 'pyg-lib>=0.6.0'", "True True", "[[1, 0, 1], [0, 1, 2]]"]


def test_the_searches_of_pyg_lib_are_left_alone() -> None:
    code = """
import torch
library = torch.library.Library("pyg", "DEF")
library.define("radius(Tensor x) -> Tensor")
library.impl("radius", lambda x: x + 1, "CPU")
from anyattention.interop.pyg import provide_neighbours
print(provide_neighbours())
print(torch.ops.pyg.radius(torch.zeros(1)).tolist(), hasattr(torch.ops.pyg, "knn"))
import torch_geometric.typing
print(torch_geometric.typing.WITH_RADIUS, torch_geometric.typing.WITH_KNN)
"""
    assert run(code).splitlines() == ["False", "[1.0] False", "False False"]


def test_an_earlier_torch_geometric_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch_geometric.typing, "WITH_KNN")
    with pytest.raises(UnsupportedError, match=r"torch_geometric: expected version 2\.8 or later"):
        provide_neighbours()


def test_what_does_not_fit_is_named() -> None:
    x, ptr = torch.zeros(3, 2), torch.tensor([0, 1, 3])
    for wrong in ([0, 1, 2], [1, 3], [0, 4, 3], []):
        with pytest.raises(DimensionMismatchError, match="ptr_x: expected offsets that rise from 0 to 3"):
            torch.ops.pyg.radius(x, x, torch.tensor(wrong, dtype=torch.int64), ptr)
    with pytest.raises(DimensionMismatchError, match="ptr_y: expected offsets"):
        torch.ops.pyg.knn(x, x, ptr, ptr[:2])
    with pytest.raises(InvalidInputError, match=r"r: expected a number of at least 0, got -1\.0"):
        torch.ops.pyg.radius(x, x, r=-1.0)
    with pytest.raises(InvalidInputError, match="max_num_neighbors: expected at least 0, got -1"):
        torch.ops.pyg.radius(x, x, max_num_neighbors=-1)
    with pytest.raises(InvalidInputError, match="k: expected an int of at least 1, got 0"):
        torch.ops.pyg.knn(x, x, k=0)
