"""The drop-in layers in PyTorch Geometric's own surroundings: weights, models, mini-batches, explainers, hooks."""

import copy
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric import nn as parent
from torch_geometric.explain import AttentionExplainer, Explainer

from anyattention.interop import pyg

_NAMES = ("GATConv", "GATv2Conv", "TransformerConv")


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    ).stdout


def make_layers(name: str, *args: Any, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Our layer and the parent's, with the same weights, float64."""
    ours, theirs = (getattr(home, name)(*args, **settings).double() for home in (pyg, parent))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_graph(num_nodes: int = 11, num_edges: int = 30, width: int = 3) -> tuple[Tensor, Tensor]:
    edge_index = torch.randint(num_nodes, (2, num_edges))
    return torch.randn(num_nodes, width, dtype=torch.float64), edge_index


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("edge_dim", [None, 2])
def test_weights_load_strictly_both_ways(name: str, edge_dim: int | None) -> None:
    ours, theirs = (getattr(home, name)((3, 5), 2, heads=3, edge_dim=edge_dim) for home in (pyg, parent))
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.reset_parameters()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(before)
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in before.items())
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)


class Net(nn.Module):
    """The two-layer network of PyTorch Geometric's introduction, with attention."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.first = layers.GATConv(5, 4, heads=3, dropout=0.0)
        self.second = layers.GATConv(12, 2, heads=1, concat=False, dropout=0.0)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(F.elu(self.first(x, edge_index)), edge_index)


def train(layers: Any) -> list[float]:
    torch.manual_seed(3)
    x, edge_index = make_graph(num_nodes=60, num_edges=240, width=5)
    y = (x[:, 0] > 0).long()
    model = Net(layers).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, edge_index), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_model_trains_alike_after_changing_one_import() -> None:
    ours, theirs = train(pyg), train(parent)
    assert ours[-1] < 0.8 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("name", _NAMES)
def test_mini_batches_of_a_neighbor_loader(name: str) -> None:
    """As the loader gives them: targets are the first of the sources, and layers shrink the graph."""
    ours, theirs = make_layers(name, 3, 4, heads=2)
    x, edge_index = make_graph(num_nodes=13)
    for targets in (7, 5, 2):
        batch = edge_index[:, edge_index[1] < targets]
        nodes = (x, x[:targets])
        call = {"size": (13, targets)} if name == "GATConv" else {}
        assert ours.explain_forward(nodes, batch, **call).implementation != "torch_geometric"
        close(ours(nodes, batch, **call), theirs(nodes, batch, **call))


def test_sizes_are_checked_by_the_parent() -> None:
    ours, theirs = make_layers("GATConv", 3, 4)
    x, edge_index = make_graph()
    for layer in (ours, theirs):
        with pytest.raises(ValueError, match="Encountered tensor with size 11"):
            layer((x, x), edge_index, size=(11, 12))
    assert ours.explain_forward((x, x), edge_index, size=(11, 12)).implementation == "torch_geometric"


@pytest.mark.parametrize("name", _NAMES)
def test_return_attention_weights_has_the_parents_convention(name: str) -> None:
    ours, theirs = make_layers(name, 3, 4, heads=2)
    x, edge_index = make_graph()
    for asked in (None, False, True):
        found, expected = (layer(x, edge_index, return_attention_weights=asked) for layer in (ours, theirs))
        assert isinstance(found, tuple) == isinstance(expected, tuple)
    _, (edges, _) = ours(x, edge_index, return_attention_weights=True)
    _, (expected_edges, _) = theirs(x, edge_index, return_attention_weights=True)
    assert (edges is edge_index) == (expected_edges is edge_index)


def test_edges_that_were_given_out_may_be_changed() -> None:
    ours, _ = make_layers("GATConv", 3, 4)
    x, edge_index = make_graph()
    _, (edges, _) = ours(x, edge_index, return_attention_weights=True)
    expected = edges.clone()
    edges.zero_()
    assert torch.equal(ours(x, edge_index, return_attention_weights=True)[1][0], expected)


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv"])
def test_weights_after_dropout_are_the_parents(name: str) -> None:
    """PyTorch Geometric returns them after dropout: with the same random numbers, and the output is theirs."""
    ours, theirs = make_layers(name, 3, 4, heads=2, dropout=0.5)
    x, edge_index = make_graph()
    assert ours.explain_forward(x, edge_index, return_attention_weights=True).implementation == "cpu"
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        output, (_, weights) = layer(x, edge_index, return_attention_weights=True)
        torch.manual_seed(6)
        by = (torch.randn_like(output), torch.randn_like(weights))
        results.append((output, weights, *torch.autograd.grad((output, weights), list(layer.parameters()), by)))
    assert (results[0][1] == 0).any()
    for mine, right in zip(*results, strict=True):
        close(mine, right)


@pytest.mark.parametrize("name", _NAMES)
def test_dropout_keeps_the_mean_and_rests_in_evaluation(name: str) -> None:
    ours, theirs = make_layers(name, 3, 4, heads=2, dropout=0.3)
    x, edge_index = make_graph()
    with torch.no_grad():
        expected = theirs.eval()(x, edge_index)
        samples = torch.stack([ours(x, edge_index) for _ in range(600)])
        close(ours.eval()(x, edge_index), expected)
    errors = samples.std(0) / 600**0.5
    assert (errors > 0).any()
    assert ((samples.mean(0) - expected).abs() <= 5 * errors + 1e-12).all()


@pytest.mark.parametrize("name", _NAMES)
def test_pickles_and_copies_work_and_hold_no_graph(name: str) -> None:
    ours, _ = make_layers(name, 3, 4, heads=2)
    x, edge_index = make_graph()
    before = set(vars(ours))
    expected = ours(x, edge_index)
    assert set(vars(ours)) == before
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert type(other) is type(ours)
        close(other(x, edge_index), expected)
        other.reset_parameters()
        close(ours(x, edge_index), expected)


@pytest.mark.parametrize(
    "order", [("pyg", "parent"), pytest.param(("parent", "pyg"), marks=pytest.mark.exhaustive)], ids=" ".join
)
def test_explainers_give_what_they_give_with_the_parents_layer(order: tuple[str, str]) -> None:
    """In a fresh process: PyTorch Geometric writes methods into a class when its first object is made."""
    run(f"""
import warnings; warnings.filterwarnings("ignore", ".torch.jit", DeprecationWarning)
import torch
from torch_geometric import nn as parent
from anyattention.interop import pyg
from torch_geometric.explain import Explainer, GNNExplainer
torch.set_num_threads(1)
torch.manual_seed(0)
config = dict(mode="regression", task_level="node", return_type="raw")
x, edge_index = torch.randn(7, 3, dtype=torch.float64), torch.randint(7, (2, 20))
for name in {_NAMES}:
    layers = [getattr(home, name)(3, 2, heads=2).double() for home in ({order[0]}, {order[1]})]
    layers[0].load_state_dict(layers[1].state_dict())
    masks = []
    for layer in layers:
        torch.manual_seed(0)
        explainer = Explainer(layer, GNNExplainer(epochs=5), "model", edge_mask_type="object",
            node_mask_type="attributes", model_config=config)
        masks.append(explainer(x, edge_index, index=2))
    assert masks[0].edge_mask.any()
    for kind in ("edge_mask", "node_mask"):
        torch.testing.assert_close(masks[0][kind], masks[1][kind], rtol=1e-9, atol=1e-9)
    ours = layers[{order.index("pyg")}]
    assert ours.explain_forward(x, edge_index).implementation != "torch_geometric"
""")


def test_the_attention_explainer_sees_the_weights() -> None:
    torch.manual_seed(1)
    models = [Net(layers).double() for layers in (pyg, parent)]
    models[0].load_state_dict(models[1].state_dict())
    x, edge_index = make_graph(width=5)
    config = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    masks = []
    for model in models:
        explainer = Explainer(model, AttentionExplainer(), "model", edge_mask_type="object", model_config=config)
        masks.append(explainer(x, edge_index).edge_mask)
    assert masks[0].unique().numel() > 5
    close(*masks)


def test_explain_mode_runs_the_parents_forward() -> None:
    ours, theirs = make_layers("GATConv", 3, 4)
    x, edge_index = make_graph()
    mask = torch.randn(30, dtype=torch.float64)
    for layer in (ours, theirs):
        layer.explain, layer._edge_mask = True, mask
        layer._loop_mask = edge_index[0] != edge_index[1]
    assert "an explainer is at work" in str(ours.explain_forward(x, edge_index))
    close(ours(x, edge_index), theirs(x, edge_index))
    masked = ours(x, edge_index)
    for layer in (ours, theirs):
        layer.explain = False
    assert ours.explain_forward(x, edge_index).implementation != "torch_geometric"
    close(ours(x, edge_index), theirs(x, edge_index))
    assert not torch.equal(ours(x, edge_index), masked)


@pytest.mark.parametrize("method", ["propagate", "message", "aggregate", "edge_update"])
@pytest.mark.parametrize("when", ["pre_hook", "hook"])
def test_a_hook_runs_with_the_parents_forward(method: str, when: str) -> None:
    ours, theirs = make_layers("GATv2Conv", 3, 4)
    x, edge_index = make_graph()
    seen = []
    handle = getattr(ours, f"register_{method}_forward_{when}")(lambda *_: seen.append(method))
    assert ours.explain_forward(x, edge_index).refusals == (
        ("anyattention", f"a hook is registered ({method}_forward_{when})"),
    )
    close(ours(x, edge_index), theirs(x, edge_index))
    assert seen == [method]
    handle.remove()
    close(ours(x, edge_index), theirs(x, edge_index))
    assert seen == [method]
    assert ours.explain_forward(x, edge_index).implementation != "torch_geometric"


class LouderMessages(pyg.GATConv):
    def message(self, x_j: Tensor, alpha: Tensor) -> Tensor:
        return 2.0 * super().message(x_j, alpha)


class Renamed(pyg.GATConv):
    """A subclass that changes nothing about the attention."""


def test_a_subclass_keeps_its_own_messages() -> None:
    loud, plain = LouderMessages(3, 4, bias=False).double(), Renamed(3, 4, bias=False).double()
    loud.load_state_dict(plain.state_dict())
    x, edge_index = make_graph()
    assert "LouderMessages overrides message" in str(loud.explain_forward(x, edge_index))
    assert plain.explain_forward(x, edge_index).implementation != "torch_geometric"
    close(loud(x, edge_index), 2.0 * plain(x, edge_index))


def test_a_method_replaced_on_the_object_is_used() -> None:
    ours, _ = make_layers("GATConv", 3, 4, bias=False)
    x, edge_index = make_graph()
    plain, message = ours(x, edge_index), ours.message
    ours.message = lambda **given: 3.0 * message(**given)
    assert "GATConv overrides message" in str(ours.explain_forward(x, edge_index))
    close(ours(x, edge_index), 3.0 * plain)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        *((name, {"flow": "target_to_source"}, "flow='target_to_source'") for name in _NAMES),
        *((name, {"aggr": "max"}, "the aggregation is MaxAggregation(), not a sum") for name in _NAMES),
        ("TransformerConv", {"aggr": "mean"}, "the aggregation is MeanAggregation(), not a sum"),
    ],
)
def test_other_message_passing_is_the_parents(name: str, settings: dict[str, Any], reason: str) -> None:
    ours, theirs = make_layers(name, 3, 4, heads=2, **settings)
    x, edge_index = make_graph()
    assert ours.explain_forward(x, edge_index).refusals == (("anyattention", reason),)
    close(ours(x, edge_index), theirs(x, edge_index))


@pytest.mark.parametrize("name", _NAMES)
def test_decomposed_layers_which_the_parent_cannot_run_either(name: str) -> None:
    for layer in make_layers(name, 3, 4, decomposed_layers=2):
        with pytest.raises(
            (AttributeError, RuntimeError), match=r"'tuple' object has no attribute|must match the size"
        ):
            layer(*make_graph())
