"""nn.GraphAttention against PyTorch Geometric's layers with the same weights, in float64.

Our parameters are written as functions of theirs, so that one backward pass gives the gradients of both by
PyTorch Geometric's own parameters.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric import nn as pyg

from anyattention.errors import InvalidInputError
from anyattention.nn import GraphAttention
from anyattention.patterns import Graph

_SEEDS = range(36)


@dataclass
class Setting:
    """One random graph and one random layer for it."""

    heads: int
    d_k: int
    widths: int | tuple[int, int]
    edge_dim: int | None
    concat: bool
    bias: bool
    residual: bool
    slope: float
    edge_index: Tensor
    x: Tensor | tuple[Tensor, Tensor]
    edge_attr: Tensor | None

    @property
    def inputs(self) -> list[Tensor]:
        nodes = list(self.x) if isinstance(self.x, tuple) else [self.x]
        return nodes if self.edge_attr is None else [*nodes, self.edge_attr]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def make_setting(seed: int) -> Setting:
    """The first seeds take the corners in turn; the others are random."""
    torch.manual_seed(seed)
    choice = random.Random(seed)
    sources = choice.choice([1, 2, 5, 7, 11])
    kind = ("one", "shared pair", "bipartite")[seed % 3]
    targets = sources if kind == "one" else choice.choice([1, 3, 5, 13])
    num_edges = 0 if seed % 9 == 4 else choice.choice([1, 3, 13, 30])
    # Few nodes are named often: duplicates, hubs and isolated nodes.
    key = torch.randint(max(sources - 1, 1), (num_edges,))
    query = torch.randint(max(targets - 1, 1), (num_edges,))
    edge_index = torch.stack([key, query])
    if seed % 4 == 1:
        loops = torch.arange(min(sources, targets)).expand(2, -1)
        edge_index = torch.cat([edge_index, loops, edge_index[:, :2]], dim=1)
    source_width, target_width = choice.choice([1, 3, 5]), choice.choice([2, 3, 7])
    widths = (source_width, target_width) if kind == "bipartite" else source_width
    target_width = target_width if kind == "bipartite" else source_width
    x = leaf(sources, source_width) if kind == "one" else (leaf(sources, source_width), leaf(targets, target_width))
    edge_dim = choice.choice([1, 3]) if seed % 2 else None
    return Setting(
        heads=choice.choice([1, 2, 3, 5]),
        d_k=choice.choice([1, 2, 3, 7]),
        widths=widths,
        edge_dim=edge_dim,
        concat=choice.random() < 0.6,
        bias=choice.random() < 0.6,
        residual=choice.random() < 0.5,
        slope=choice.choice([0.2, 0.0, 0.7]),
        edge_index=edge_index,
        x=x,
        edge_attr=leaf(edge_index.shape[1], edge_dim) if edge_dim else None,
    )


def gat(setting: Setting) -> tuple[nn.Module, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    conv = pyg.GATConv(
        setting.widths,
        setting.d_k,
        heads=setting.heads,
        concat=setting.concat,
        negative_slope=setting.slope,
        add_self_loops=False,
        edge_dim=setting.edge_dim,
        bias=setting.bias,
        residual=setting.residual,
    )

    def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"key_vector": theirs["att_src"][0], "query_vector": theirs["att_dst"][0]}
        found["value_projection.weight"] = theirs.get("lin.weight", theirs.get("lin_src.weight"))  # pyright: ignore[reportArgumentType]
        if "lin_dst.weight" in theirs:
            found["query_projection.weight"] = theirs["lin_dst.weight"]
        if "lin_edge.weight" in theirs:
            by_head = theirs["lin_edge.weight"].unflatten(0, (setting.heads, setting.d_k))
            found["edge_weight"] = torch.einsum("hc,hcf->hf", theirs["att_edge"][0], by_head)[:, None]
        return found | renamed(theirs, {"bias": "bias", "res.weight": "residual_projection.weight"})

    return conv, ours


def gatv2(setting: Setting) -> tuple[nn.Module, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    conv = pyg.GATv2Conv(
        setting.widths,
        setting.d_k,
        heads=setting.heads,
        concat=setting.concat,
        negative_slope=setting.slope,
        add_self_loops=False,
        edge_dim=setting.edge_dim,
        bias=setting.bias,
        share_weights=False,
        residual=setting.residual,
    )

    def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"score_vector": theirs["att"][0]} | by_head_edge_weight(theirs, setting)
        names = {"lin_l": "key_projection", "lin_r": "query_projection", "res": "residual_projection"}
        return found | renamed(theirs, {"bias": "bias"} | with_parts(names))

    return conv, ours


def transformer(setting: Setting) -> tuple[nn.Module, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    conv = pyg.TransformerConv(
        setting.widths,
        setting.d_k,
        heads=setting.heads,
        concat=setting.concat,
        edge_dim=setting.edge_dim,
        bias=setting.bias,
        root_weight=setting.residual,
    )

    def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {f"lin_{part}": f"{part}_projection" for part in ("query", "key", "value")}
        found = by_head_edge_weight(theirs, setting) | renamed(theirs, with_parts(names))
        if setting.residual:
            found["residual_projection.weight"] = theirs["lin_skip.weight"]
        return found

    return conv, ours


def with_parts(names: dict[str, str]) -> dict[str, str]:
    return {f"{old}.{part}": f"{new}.{part}" for old, new in names.items() for part in ("weight", "bias")}


def renamed(theirs: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {new: theirs[old] for old, new in names.items() if old in theirs}


def by_head_edge_weight(theirs: dict[str, Tensor], setting: Setting) -> dict[str, Tensor]:
    if "lin_edge.weight" not in theirs:
        return {}
    return {"edge_weight": theirs["lin_edge.weight"].unflatten(0, (setting.heads, setting.d_k))}


def make_layer(score: str, setting: Setting) -> GraphAttention:
    slope = {} if score == "dot" else {"negative_slope": setting.slope}
    return GraphAttention(
        setting.heads * setting.d_k,
        setting.heads,
        in_features=setting.widths,
        score=score,  # pyright: ignore[reportArgumentType]
        concat=setting.concat,
        residual=setting.residual,
        edge_dim=setting.edge_dim,
        dropout=0.0,
        use_bias=setting.bias,
        dtype=torch.float64,
        **slope,  # pyright: ignore[reportArgumentType]
    )


_LAYERS: dict[str, Any] = {"additive": gat, "dynamic": gatv2, "dot": transformer}


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize("score", list(_LAYERS))
def test_outputs_weights_and_all_gradients_equal_pyg(score: str, seed: int) -> None:
    setting = make_setting(seed)
    conv, ours_from = _LAYERS[score](setting)
    conv = conv.double()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_()
        if score == "dot":
            # Our residual has no bias of its own.
            for name, parameter in conv.named_parameters():
                if name == "lin_skip.bias":
                    parameter.zero_()
    theirs = {name: parameter for name, parameter in conv.named_parameters() if not name.startswith("lin_skip.bias")}
    layer = make_layer(score, setting)
    mapped = ours_from(theirs)
    assert {name: value.shape for name, value in mapped.items()} == {
        name: value.shape for name, value in layer.named_parameters()
    }

    expected, (_, alpha) = conv(setting.x, setting.edge_index, setting.edge_attr, return_attention_weights=True)
    given = (setting.x, setting.edge_index, setting.edge_attr)
    output, weights = functional_call(layer, mapped, given, {"return_weights": "heads"})
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights, alpha, rtol=1e-10, atol=1e-10)

    cotangents = [torch.randn_like(output), torch.randn_like(weights)]
    leaves = [*setting.inputs, *theirs.values()]
    names = [*(f"input {n}" for n in range(len(setting.inputs))), *theirs]
    found = [
        torch.autograd.grad(each, leaves, cotangents, materialize_grads=True, allow_unused=True)
        for each in ((output, weights), (expected, alpha))
    ]
    for name, mine, right in zip(names, *found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_the_random_settings_cover_every_case() -> None:
    settings = [make_setting(seed) for seed in _SEEDS]

    def duplicated(setting: Setting) -> bool:
        return len(set(zip(*setting.edge_index.tolist(), strict=True))) < setting.edge_index.shape[1]

    def isolated(setting: Setting) -> bool:
        nodes = (setting.x[1] if isinstance(setting.x, tuple) else setting.x).shape[0]
        return setting.edge_index[1].unique().numel() < nodes

    cases: dict[str, Callable[[Setting], bool]] = {
        "empty": lambda each: each.edge_index.shape[1] == 0,
        "self-loops": lambda each: bool((each.edge_index[0] == each.edge_index[1]).any()),
        "duplicates": duplicated,
        "isolated": isolated,
        "edge features": lambda each: each.edge_dim is not None,
        "bipartite": lambda each: isinstance(each.widths, tuple),
        "heads joined": lambda each: each.concat and each.heads > 1,
        "heads averaged": lambda each: not each.concat and each.heads > 1,
        "residual": lambda each: each.residual,
        "no bias": lambda each: not each.bias,
    }
    assert all(sum(case(each) for each in settings) >= 3 for case in cases.values()), {
        name: sum(case(each) for each in settings) for name, case in cases.items()
    }


@pytest.mark.parametrize(("score", "conv_class"), [("additive", pyg.GATConv), ("dynamic", pyg.GATv2Conv)])
def test_self_loops_on_request_equal_pygs(score: str, conv_class: type[nn.Module]) -> None:
    conv = conv_class(3, 5, heads=2, bias=False).double()
    theirs = dict(conv.named_parameters())
    names = {"lin": "value_projection", "lin_l": "key_projection", "lin_r": "query_projection"}
    vectors = {"att_src": "key_vector", "att_dst": "query_vector", "att": "score_vector"}
    mapped = renamed(theirs, with_parts(names))
    mapped |= {name: vector[0] for name, vector in renamed(theirs, vectors).items()}
    layer = GraphAttention(10, 2, in_features=3, score=score, use_bias=False, dropout=0.0, dtype=torch.float64)  # pyright: ignore[reportArgumentType]
    assert set(mapped) == {name for name, _ in layer.named_parameters()}
    x = leaf(7, 3)
    edge_index = torch.tensor([[0, 1, 2, 5, 5, 3], [1, 1, 0, 2, 2, 3]])
    graph = Graph.from_edge_index(edge_index, num_nodes=7).with_self_loops()
    output, _ = functional_call(layer, mapped, (x, graph))
    torch.testing.assert_close(output, conv(x, edge_index), rtol=1e-10, atol=1e-10)


def test_a_batch_of_features_which_pyg_refuses() -> None:
    x, edge_index = torch.randn(2, 5, 3), torch.tensor([[0, 1], [2, 2]])
    with pytest.raises(AssertionError, match="Static graphs not supported in 'GATConv'"):
        pyg.GATConv(3, 5, heads=2, add_self_loops=False)(x, edge_index)
    layer = GraphAttention(10, 2, in_features=3, score="additive", dropout=0.0)
    output = layer(x, edge_index).output
    torch.testing.assert_close(output, torch.stack([layer(each, edge_index).output for each in x]))


def test_edge_features_that_are_forgotten_which_pyg_lets_pass() -> None:
    x, edge_index = torch.randn(5, 3), torch.tensor([[0, 1], [2, 2]])
    assert pyg.GATConv(3, 5, edge_dim=2, add_self_loops=False)(x, edge_index).isfinite().all()
    with pytest.raises(InvalidInputError, match=r"edge_attr: expected \(edges, edge_dim=2\), got None"):
        GraphAttention(5, 1, in_features=3, score="additive", edge_dim=2)(x, edge_index)
