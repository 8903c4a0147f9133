"""Edges in every form that PyTorch Geometric takes: ours runs, and equals the parent's layer with the same weights."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric import nn as parent

from anyattention.interop import pyg

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

_NAMES = ("GATConv", "GATv2Conv", "TransformerConv")


def make_layers(name: str, *args: Any, **settings: Any) -> tuple[Any, Any]:
    ours, theirs = (getattr(home, name)(*args, **settings).double() for home in (pyg, parent))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def coo(edge_index: Tensor, sizes: tuple[int, int], *width: int) -> Tensor:
    """The transposed adjacency, entries in the caller's order, duplicates included."""
    values = torch.randn(edge_index.shape[1], *width, dtype=torch.float64)
    return torch.sparse_coo_tensor(edge_index.flip(0), values, (sizes[1], sizes[0], *width), is_coalesced=False)


def compressed(edge_index: Tensor, sizes: tuple[int, int], layout: torch.layout, dtype: torch.dtype) -> Tensor:
    """The same as CSR or CSC, by hand: nothing is added up."""
    sources, targets = edge_index
    rows, columns, count = (targets, sources, sizes[1]) if layout == torch.sparse_csr else (sources, targets, sizes[0])
    order = torch.argsort(rows, stable=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=count).cumsum(0)])
    columns, values = columns[order], torch.randn(len(order), dtype=torch.float64)
    shape = (sizes[1], sizes[0])
    given = (offsets.to(dtype), columns.to(dtype), values)
    # Duplicates are against PyTorch's rules, which it does not check unless asked to.
    return torch.sparse_compressed_tensor(*given, shape, layout=layout, check_invariants=False)


_FORMS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "int32": lambda edges, _: edges.int(),
    "EdgeIndex": lambda edges, _: EdgeIndex(edges),
    "EdgeIndex of int32": lambda edges, _: EdgeIndex(edges.int()),
    "EdgeIndex with sizes": lambda edges, sizes: EdgeIndex(edges, sparse_size=sizes),
    "EdgeIndex by column": lambda edges, sizes: EdgeIndex(edges, sparse_size=sizes).sort_by("col").values,
    "EdgeIndex by row": lambda edges, _: EdgeIndex(edges).sort_by("row").values,
    "coo": coo,
    "coalesced coo": lambda edges, sizes: coo(edges, sizes).coalesce(),
    "csr": lambda edges, sizes: compressed(edges, sizes, torch.sparse_csr, torch.int64),
    "csr of int32": lambda edges, sizes: compressed(edges, sizes, torch.sparse_csr, torch.int32),
    "csc": lambda edges, sizes: compressed(edges, sizes, torch.sparse_csc, torch.int64),
}


def edges_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert (found.layout, found.shape) == (expected.layout, expected.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left, right = ((each.to_dense() if each.layout != torch.strided else each) for each in (found, expected))
    torch.testing.assert_close(torch.Tensor(left).double(), torch.Tensor(right).double(), rtol=1e-10, atol=1e-10)


def check(layers: tuple[Any, Any], x: Any, edge_index: Any, *edge_attr: Tensor) -> None:
    """Outputs, weights, their edges and all gradients."""
    nodes = list(x) if isinstance(x, tuple) else [x]
    leaves = [each.requires_grad_() for each in (*nodes, *edge_attr) if each is not None]
    ours, theirs = layers
    assert ours.explain_forward(x, edge_index, *edge_attr).implementation == "cpu"
    results, gradients = [], []
    for layer in layers:
        given = edge_index
        if layer is theirs and edge_index.layout == torch.sparse_coo:
            # The parent marks its matrix as coalesced, which it may not be.
            given = edge_index.clone()
        elif layer is theirs and edge_index.dtype == torch.int32:
            # PyTorch Geometric's own gradients with int32 are other ones: of TransformerConv, and of edge features.
            given = edge_index.long() if type(edge_index) is Tensor else EdgeIndex(edge_index.as_tensor().long())
        elif layer is theirs and edge_index.layout == torch.sparse_csr:
            parts = (edge_index.crow_indices().long(), edge_index.col_indices().long(), edge_index.values())
            given = torch.sparse_csr_tensor(*parts, edge_index.shape, check_invariants=False)
        elif layer is theirs and edge_index.layout == torch.sparse_csc:
            # The parent's compiled steps know CSR and COO alone.
            offsets, rows = edge_index.ccol_indices(), edge_index.row_indices()
            given = torch.stack([torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff()), rows])
        output, (edges, weights) = layer(x, given, *edge_attr, return_attention_weights=True)
        results.append((output, edges, weights))
        torch.manual_seed(7)
        by = (torch.randn_like(output), torch.randn_like(weights))
        given = [*leaves, *layer.parameters()]
        gradients.append(torch.autograd.grad((output, weights), given, by, allow_unused=True, materialize_grads=True))
    (output, edges, weights), (expected, expected_edges, alpha) = results
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights, alpha, rtol=1e-10, atol=1e-10)
    if edge_index.layout != torch.sparse_csc:
        edges_equal(edges, expected_edges)
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours(x, edge_index, *edge_attr), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("form", list(_FORMS))
@pytest.mark.parametrize("name", _NAMES)
def test_each_form_runs_ours(name: str, form: str, loops: bool) -> None:
    adds_loops = loops and name != "TransformerConv"
    if form == ("csc" if adds_loops else "coo"):
        # The parent raises: see below.
        form = "coalesced coo"
    settings = {} if name == "TransformerConv" else {"add_self_loops": loops}
    layers = make_layers(name, 3, 4, heads=2, **settings)
    # Self-loops and duplicates among them.
    edge_index = torch.randint(7, (2, 30))
    check(layers, torch.randn(7, 3, dtype=torch.float64), _FORMS[form](edge_index, (7, 7)))


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("form", list(_FORMS))
@pytest.mark.parametrize("name", _NAMES)
def test_each_form_between_two_sides(name: str, form: str, loops: bool) -> None:
    adds_loops = loops and name != "TransformerConv"
    if form == ("csc" if adds_loops else "coo"):
        # The parent raises: see below.
        form = "coalesced coo"
    settings = {} if name == "TransformerConv" else {"add_self_loops": loops}
    layers = make_layers(name, (3, 5), 4, heads=2, concat=False, **settings)
    edge_index = torch.stack([torch.randint(11, (30,)), torch.randint(7, (30,))])
    x = (torch.randn(11, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64))
    check(layers, x, _FORMS[form](edge_index, (11, 7)))


@pytest.mark.parametrize("form", [form for form in _FORMS if form not in ("csc", "coo")])
@pytest.mark.parametrize("name", _NAMES)
def test_features_of_edges(name: str, form: str) -> None:
    """Beside a sparse matrix in the order of its entries, where no self-loops are added."""
    is_matrix = "co" in form or "cs" in form
    is_matrix &= "EdgeIndex" not in form
    settings = {"add_self_loops": not is_matrix} if name != "TransformerConv" else {}
    layers = make_layers(name, 3, 4, heads=2, edge_dim=2, **settings)
    edges = _FORMS[form](torch.randint(7, (2, 30)), (7, 7))
    count = edges._nnz() if is_matrix else edges.shape[1]
    check(layers, torch.randn(7, 3, dtype=torch.float64), edges, torch.randn(count, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", _NAMES)
def test_a_matrix_of_features(name: str) -> None:
    """Rows of numbers in a sparse matrix are the features of its edges."""
    settings = {"add_self_loops": False} if name != "TransformerConv" else {}
    layers = make_layers(name, 3, 4, heads=2, edge_dim=2, **settings)
    x = torch.randn(7, 3, dtype=torch.float64)
    matrix = coo(torch.randint(7, (2, 30)), (7, 7), 2).coalesce()
    ours, theirs = layers
    assert ours.explain_forward(x, matrix).implementation == "cpu"
    torch.testing.assert_close(ours(x, matrix), theirs(x, matrix), rtol=1e-10, atol=1e-10)
    other = torch.sparse_coo_tensor(matrix.indices(), 2.0 * matrix.values(), matrix.shape, is_coalesced=True)
    assert not torch.allclose(ours(x, matrix), ours(x, other))
    found = [
        torch.autograd.grad(layer(x, each.requires_grad_()).square().sum(), each)[0].to_dense()
        for layer, each in zip(layers, (matrix.clone(), matrix.clone()), strict=True)
    ]
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_without_features_of_the_targets() -> None:
    layers = make_layers("GATConv", (3, 5), 4, heads=2)
    x = (torch.randn(7, 3, dtype=torch.float64), None)
    for form in ("csr", "coo", "EdgeIndex with sizes", "int32"):
        check(layers, x, _FORMS[form](torch.randint(7, (2, 30)), (7, 7)))


def fault_of(layer: Any, given: tuple[Any, ...]) -> str:
    with pytest.raises((ValueError, AssertionError, RuntimeError)) as fault:
        layer(*given)
    return repr(fault.value)


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv"])
def test_what_the_parent_refuses_stays_its_own(name: str) -> None:
    x, edge_index = torch.randn(7, 3, dtype=torch.float64), torch.randint(7, (2, 20))
    edge_attr = torch.randn(20, 2, dtype=torch.float64)
    wrong: list[tuple[dict[str, Any], tuple[Any, ...], str]] = [
        ({}, (x, _FORMS["csc"](edge_index, (7, 7))), "a sparse CSC matrix, to which"),
        ({"add_self_loops": False}, (x, _FORMS["coo"](edge_index, (7, 7))), "not coalesced"),
        ({}, (x, _FORMS["csr"](edge_index, (8, 7))), "edge_index says 8 nodes for 7 rows"),
        ({"add_self_loops": False}, (x, EdgeIndex(edge_index, sparse_size=(7, 8))), "says 8 nodes for 7 rows"),
        ({"edge_dim": 2}, (x, _FORMS["csr"](edge_index, (7, 7)), edge_attr), "whose self-loops are replaced"),
    ]
    for settings, given, reason in wrong:
        ours, theirs = make_layers(name, 3, 4, **settings)
        assert reason in str(ours.explain_forward(*given))
        assert fault_of(ours, given) == fault_of(theirs, given)


@pytest.mark.parametrize("form", list(_FORMS))
def test_a_change_in_place_is_seen(form: str) -> None:
    """Of the indices inside, which another library may share."""
    name = "GATConv" if form == "coo" else "TransformerConv"
    ours, _ = make_layers(name, 3, 4, heads=2)
    x, edge_index = torch.randn(7, 3, dtype=torch.float64), torch.randint(7, (2, 30))
    edges = _FORMS[form](edge_index, (7, 7))
    first = ours(x, edges)
    assert torch.equal(ours(x, edges), first)
    if edges.layout == torch.sparse_coo:
        inside = edges._indices()[0]
    elif edges.layout == torch.sparse_csr:
        inside = edges.col_indices()
    elif edges.layout == torch.sparse_csc:
        inside = edges.row_indices()
    else:
        inside = (edges.as_tensor() if isinstance(edges, EdgeIndex) else edges)[0]
    numbers = inside.detach().numpy()
    numbers[:] = numbers[::-1].copy()
    fresh, _ = make_layers(name, 3, 4, heads=2)
    fresh.load_state_dict(ours.state_dict())
    second = ours(x, edges)
    assert torch.equal(second, fresh(x, edges.clone()))
    assert not torch.allclose(first, second)
