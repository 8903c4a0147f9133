"""Protocols: which module is what, checked by isinstance."""

import pytest
import torch

from anyattention import AttentionOutput, interfaces
from anyattention.nn import (
    DistanceAttention,
    EquivariantAttention,
    GraphAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
    SparseAttention,
)

_SEQUENCE = torch.ones(2, 5, 8)
_NODES = torch.ones(4, 3)
_EDGE_INDEX = torch.tensor([[0, 1, 0], [2, 2, 3]])

_MODULES = [
    ScaledDotProductAttention(8, 2),
    MultiHeadAttention(8, 2),
    GraphAttention(8, 2, in_features=3),
    SparseAttention(8, 2, local_window=1),
    DistanceAttention(8, 2, geometric_dim=2),
    EquivariantAttention(8, 2, geometric_dim=2, radius=1.5),
]
_CLAIMED = {
    "ScaledDotProductAttention": {"Attention", "TrainableAttention"},
    "MultiHeadAttention": {"Attention", "TrainableAttention"},
    "GraphAttention": {"Attention", "TrainableAttention", "GraphAttention"},
    "SparseAttention": {"Attention", "TrainableAttention", "SparseAttention"},
    "DistanceAttention": {"Attention", "TrainableAttention", "GeometricAttention"},
    "EquivariantAttention": {"Attention", "TrainableAttention", "GeometricAttention"},
}


@pytest.mark.parametrize("module", _MODULES, ids=lambda module: module.name)
@pytest.mark.parametrize("protocol", interfaces.__all__)
def test_modules_are_what_they_claim_and_nothing_else(module, protocol):
    is_one = isinstance(module, getattr(interfaces, protocol))
    assert is_one == (protocol in _CLAIMED[module.name])


@pytest.mark.parametrize("protocol", interfaces.__all__)
def test_other_modules_are_no_attention(protocol):
    for other in (torch.nn.Linear(8, 8), torch.nn.MultiheadAttention(8, 2), object()):
        assert not isinstance(other, getattr(interfaces, protocol))


@pytest.mark.parametrize("module", _MODULES, ids=lambda module: module.name)
def test_common_properties(module):
    assert (module.d_model, module.name, module.supports_masking) == (8, type(module).__name__, True)


@pytest.mark.parametrize("module", _MODULES, ids=lambda module: module.name)
def test_a_call_returns_output_and_weights(module):
    is_graph = isinstance(module, interfaces.GraphAttention)
    is_geometric = isinstance(module, interfaces.GeometricAttention)
    second = _EDGE_INDEX if is_graph else torch.ones(2, 5, 2) if is_geometric else None
    called = module(_NODES if is_graph else _SEQUENCE, *(() if second is None else (second,)))
    assert type(called) is AttentionOutput
    output, weights = called
    assert output.shape[-1] == 8
    assert (weights is None) == (is_graph or is_geometric or isinstance(module, interfaces.SparseAttention))


def test_masking_is_supported():
    hidden = torch.tensor([True, False, True, True, True])
    for module in _MODULES[:2]:
        weights = module.eval()(_SEQUENCE, mask=hidden).weights
        assert (weights[:, :, 1] == 0).all()
        assert (weights[:, :, 0] > 0).all()
    edges = torch.tensor([True, False, True])
    weights = _MODULES[2](_NODES, _EDGE_INDEX, mask=edges, return_weights=True).weights
    assert torch.equal(weights != 0, edges)


def test_graph_properties():
    plain, featured = GraphAttention(8, 2, in_features=3), GraphAttention(8, 2, in_features=3, edge_dim=5)
    assert plain.num_graph_heads == featured.num_graph_heads == 2
    assert (plain.supports_edge_features, featured.supports_edge_features) == (False, True)
    assert not plain.supports_heterogeneous


def test_graph_calls_return_weights_of_edges_and_heads():
    module = _MODULES[2]
    adjacency = torch.zeros(4, 4)
    adjacency[_EDGE_INDEX[1], _EDGE_INDEX[0]] = 1.0  # rows attend to columns
    by_edges = module.graph_forward(_NODES, _EDGE_INDEX)
    by_matrix = module.sparse_forward(_NODES, adjacency)
    assert by_edges.weights.shape == by_matrix.weights.shape == (3, 2)


def test_sparse_properties_and_weights():
    module = _MODULES[3]
    assert (module.max_attended_positions, module.supports_dynamic_sparsity) == (3, False)
    assert 0 < module.sparsity_ratio < 1
    connectivity = torch.eye(5).to_sparse()
    output, weights = module.sparse_forward(_SEQUENCE, _SEQUENCE, _SEQUENCE, connectivity)
    assert (output.shape, weights.shape, weights.is_sparse) == ((2, 5, 8), (2, 5, 5), True)
    hidden = torch.tensor([True, False, True, True, True])
    weights = module.eval()(_SEQUENCE, mask=hidden, return_weights=True).weights
    assert torch.equal(weights[0] > 0, hidden[module.pattern.to_graph(5, 5).key_index])


@pytest.mark.parametrize("module", _MODULES[4:], ids=lambda module: module.name)
def test_geometric_calls_return_weights(module):
    places = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
    assert (module.geometric_dim, module.is_rotation_equivariant, module.is_translation_invariant) == (2, True, True)
    output, weights = module.geometric_forward(places[:2], places, torch.ones(3, 8))
    assert (output.shape, weights.shape) == ((2, 8), (2, 3))
    output, weights = module.distance_attention(places, torch.ones(3, 8), 1.2)
    assert (output.shape, weights.shape, weights.is_sparse) == ((3, 8), (3, 3), True)
    assert weights.indices().T.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2]]
    hidden = torch.tensor([True, False, True])
    weights = module.eval()(torch.ones(3, 8), places, mask=hidden, return_weights=True).weights
    assert (weights[:, 1] == 0).all()


@pytest.mark.parametrize("protocol", interfaces.__all__)
def test_a_stranger_with_the_members_is_one(protocol):
    kind = getattr(interfaces, protocol)
    given = {name for base in kind.__mro__ if base.__module__ == kind.__module__ for name in vars(base)}
    names = {name for name in given if not name.startswith("_")} | given & {"__call__", "__len__"}
    members = {name: (lambda *arguments: None) for name in names}
    assert isinstance(type("Stranger", (), members)(), kind)
    for name in members:
        lacking = {other: member for other, member in members.items() if other != name}
        assert not isinstance(type("Lacking", (), lacking)(), kind), name
