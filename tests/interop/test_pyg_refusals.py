"""Calls that the drop-in layers leave to PyTorch Geometric: the reason, and the parent's result."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch_geometric import nn as parent

from anyattention.errors import DimensionMismatchError, GraphStructureError
from anyattention.interop import pyg

_NAMES = ("GATConv", "GATv2Conv", "TransformerConv")


def make_layers(name: str, *args: Any, **settings: Any) -> tuple[Any, Any]:
    ours, theirs = (getattr(home, name)(*args, **settings).double() for home in (pyg, parent))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_graph() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 3, dtype=torch.float64), torch.randint(7, (2, 20))


def assert_parent_runs(name: str, x: Any, edge_index: Any, reason: str, **settings: Any) -> None:
    ours, theirs = make_layers(name, 3, 4, heads=2, **settings)
    explanation = ours.explain_forward(x, edge_index)
    assert (explanation.implementation, explanation.refusals) == ("torch_geometric", (("anyattention", reason),))
    torch.testing.assert_close(ours(x, edge_index), theirs(x, edge_index), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("name", _NAMES)
def test_sparse_features(name: str) -> None:
    x, edge_index = make_graph()
    assert_parent_runs(name, x.to_sparse_csr(), edge_index, "x_source is not a plain dense tensor")


@pytest.mark.parametrize("name", _NAMES)
def test_an_edge_list_of_another_dtype(name: str) -> None:
    x, edge_index = make_graph()
    ours, theirs = make_layers(name, 3, 4, heads=2)
    reason = "edge_index is torch.int16 of shape (2, 20), not int64 or int32 of shape (2, edges)"
    assert ours.explain_forward(x, edge_index.short()).refusals == (("anyattention", reason),)
    assert fault_of(ours, (x, edge_index.short())) == fault_of(theirs, (x, edge_index.short()))
    if name != "TransformerConv":
        # The self-loops make it int64.
        torch.testing.assert_close(ours(x, edge_index.short()), theirs(x, edge_index))


@pytest.mark.parametrize("name", _NAMES)
def test_forward_mode_and_transforms(name: str) -> None:
    ours, theirs = make_layers(name, 3, 4, heads=2)
    x, edge_index = make_graph()
    transforms: list[Callable[[Any], Any]] = [
        lambda layer: torch.func.jacrev(lambda x: layer(x, edge_index))(x),
        lambda layer: torch.func.jvp(lambda x: layer(x, edge_index), (x,), (x.cos(),))[1],
        lambda layer: torch.func.vmap(lambda x: layer(x, edge_index))(torch.stack([x, -x])),
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-10, atol=1e-10)
    with forward_ad.dual_level():
        assert "forward-mode differentiation is on" in str(ours.explain_forward(x, edge_index))
        tangents = [
            forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()), edge_index)).tangent
            for layer in (ours, theirs)
        ]
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-10)
    assert ours.explain_forward(x, edge_index).implementation != "torch_geometric"


@pytest.mark.parametrize("name", _NAMES)
def test_compiled_models_trace_the_parents_forward_whole(name: str) -> None:
    ours, theirs = make_layers(name, 3, 4, heads=2)
    x, edge_index = make_graph()
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, edge_index), theirs(x, edge_index), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(compiled(x, edge_index), ours(x, edge_index), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "child"),
    [("GATConv", "lin"), ("GATConv", "lin_edge"), ("GATv2Conv", "lin_edge"), ("TransformerConv", "lin_edge")],
)
def test_a_projection_that_does_more_than_multiply(name: str, child: str) -> None:
    ours, theirs = make_layers(name, 3, 4, heads=2, edge_dim=2)
    x, edge_index = make_graph()
    edge_attr = torch.randn(20, 2, dtype=torch.float64)
    before = ours(x, edge_index, edge_attr)
    for layer in (ours, theirs):
        getattr(layer, child).register_forward_hook(lambda _, __, output: 2.0 * output)
    reason = f"{child} has hooks or is no plain Linear"
    assert ours.explain_forward(x, edge_index, edge_attr).refusals == (("anyattention", reason),)
    after = ours(x, edge_index, edge_attr)
    torch.testing.assert_close(after, theirs(x, edge_index, edge_attr), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(("name", "child"), [("GATv2Conv", "lin_l"), ("TransformerConv", "lin_value")])
def test_hooks_of_other_projections_run(name: str, child: str) -> None:
    ours, theirs = make_layers(name, 3, 4, heads=2)
    x, edge_index = make_graph()
    for layer in (ours, theirs):
        getattr(layer, child).register_forward_hook(lambda _, __, output: 2.0 * output)
    assert ours.explain_forward(x, edge_index).implementation != "torch_geometric"
    torch.testing.assert_close(ours(x, edge_index), theirs(x, edge_index), rtol=1e-10, atol=1e-10)


def test_another_kind_of_projection_is_called_as_it_is() -> None:
    ours, theirs = make_layers("GATConv", 3, 4)
    wide = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4, bias=False)).double()
    ours.lin = theirs.lin = wide
    x, edge_index = make_graph()
    assert "lin has hooks or is no plain Linear" in str(ours.explain_forward(x, edge_index))
    torch.testing.assert_close(ours(x, edge_index), theirs(x, edge_index), rtol=1e-10, atol=1e-10)


def test_everything_dropped() -> None:
    ours, _ = make_layers("GATConv", 3, 4, dropout=1.0, bias=False)
    x, edge_index = make_graph()
    assert "dropout drops every weight" in str(ours.explain_forward(x, edge_index))
    assert torch.equal(ours(x, edge_index), torch.zeros(7, 4, dtype=torch.float64))
    assert ours.eval().explain_forward(x, edge_index).implementation != "torch_geometric"


def fault_of(layer: nn.Module, given: tuple[Any, ...]) -> str | None:
    try:
        layer(*given)
    except Exception as fault:
        return repr(fault)
    return None


@pytest.mark.parametrize("name", _NAMES)
def test_the_parents_complaints_stay_its_own(name: str) -> None:
    x, edge_index = make_graph()
    wrong: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        ({}, (x.float(), edge_index)),
        ({}, (x[:, :2], edge_index)),
        ({}, (x, edge_index[:1])),
        ({}, (x[0], edge_index)),
        ({"edge_dim": 2}, (x, edge_index, x[:3, :2])),
    ]
    if name != "GATConv":
        wrong.append(({}, (x, edge_index, torch.ones(20, 2).double())))
    for settings, given in wrong:
        ours, theirs = (fault_of(layer, given) for layer in make_layers(name, 3, 4, **settings))
        assert ours == theirs
        assert ours is not None


@pytest.mark.parametrize("name", _NAMES)
def test_our_own_complaints_name_the_argument(name: str) -> None:
    x, edge_index = make_graph()
    layer, _ = make_layers(name, 3, 4, edge_dim=2)
    with pytest.raises(GraphStructureError, match=r"target \(query\): expected indices from 0 to 6 \(7 nodes\), got 9"):
        layer(x, torch.tensor([[0, 1], [1, 9]]), x[:2, :2])
    with pytest.raises(DimensionMismatchError, match=r"edges\.key_weight: expected"):
        layer(x, edge_index, torch.ones(20, 3, dtype=torch.float64))


def test_without_torch_geometric_the_error_names_the_extra() -> None:
    code = """
import sys
sys.modules["torch_geometric"] = None
from anyattention.errors import MissingExtraError
try:
    import anyattention.interop.pyg
except MissingExtraError as fault:
    print(fault)
"""
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'anyattention[pyg]'" in finished.stdout


def test_interop_alone_imports_no_other_library() -> None:
    code = "import sys, anyattention, anyattention.interop; print('torch_geometric' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert finished.stdout.strip() == "False"


def test_features_of_another_width_are_the_parents_to_refuse() -> None:
    ours, theirs = make_layers("GATConv", 3, 4, heads=2)
    x, edge_index = torch.randn(7, 2, dtype=torch.float64), make_graph()[1]
    assert ours.explain_forward(x, edge_index).refusals == (("anyattention", "x has 2 features, not 3"),)
    for layer in (ours, theirs):
        with pytest.raises(RuntimeError, match="7x2 and 3x8"):
            layer(x, edge_index)
