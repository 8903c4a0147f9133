"""What the layers have in common: their edges, their heads, and the arguments of `attend`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch_geometric.inspector import Inspector
from torch_geometric.nn import Linear
from torch_geometric.utils import add_self_loops, remove_self_loops

from anyattention import AttentionResult, EdgeFeatures, Graph, attend, edge_sum, explain
from anyattention.ambient import is_compiling
from anyattention.interop.pyg.compiled import named_graph
from anyattention.interop.pyg.edge_lists import with_weights
from anyattention.interop.pyg.remembered import prepared_graph
from anyattention.ops.dispatch import Explanation
from anyattention.ops.linear_maps import add_bias
from anyattention.scores import Score

__all__ = [
    "argument_types",
    "attended",
    "attention_arguments",
    "columns",
    "edge_weight",
    "edges_and_weights",
    "explanation",
    "finished",
    "graph_and_features",
    "graph_of",
    "has_lazy_widths",
    "joined_heads",
    "pair_of",
    "take_widths",
    "with_heads",
    "with_widths",
    "without_autocast",
]


def argument_types(layer: type, method: str) -> dict[str, type]:
    """The types of a layer's own arguments of `propagate` or `edge_updater`.

    PyTorch Geometric reads them from the class's source text, and keeps that text by the class's name, which ours
    share with their parents.
    """
    found = Inspector(layer).get_params_from_method_call(method, exclude=[0, "edge_index", "size"])
    return {name: parameter.type for name, parameter in found.items()}


def explanation(refusal: str | None, arguments: Callable[[], dict[str, Any]]) -> Explanation:
    """What runs a call: the parent's forward for a reason, else what `attend` chooses for its arguments."""
    if refusal is not None:
        return Explanation("torch_geometric", (("anyattention", refusal),))
    with torch.no_grad():
        given = arguments()
        with without_autocast():
            return explain(**given)


def without_autocast() -> AbstractContextManager[Any]:
    """Where every operation on the CPU keeps its tensors' dtypes; nothing where autocast is off."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def attended(arguments: dict[str, Any], *, weights_after_dropout: bool = False) -> AttentionResult:
    """`attend` of `attention_arguments`, whose dtypes stay as they are under autocast too.

    Args:
        weights_after_dropout: return those, which PyTorch's dropout draws, as the parent does; they cost another pass.
    """
    with without_autocast():
        if not weights_after_dropout or not arguments["return_weights"] or not arguments["dropout"]:
            return attend(**arguments)
        weights = attend(**{**arguments, "dropout": 0.0}).weights
        assert weights is not None
        weights = F.dropout(weights, arguments["dropout"])
        graph, implementation = arguments["pattern"], arguments["implementation"]
        return AttentionResult(edge_sum(weights, arguments["value"], graph, implementation=implementation), weights)


def attention_arguments(
    layer: Any,
    rows: tuple[Tensor, Tensor, Tensor],
    graph: Graph,
    score: Score,
    features: EdgeFeatures | None,
    needs_weights: Any,
) -> dict[str, Any]:
    """The arguments of `attend`, of query, key and value with heads.

    Autocast makes them of several dtypes; the parent's products and sums make one of these, in which its result is.
    """
    dtypes = {x.dtype for x in (*rows, *score.operands[:1], *_tensors(features)) if x is not None}
    if len(dtypes) > 1:
        rows, score, features = _in_one_dtype(rows, score, features)
    return {
        **dict(zip(("query", "key", "value"), rows, strict=True)),
        "pattern": graph,
        "score": score,
        "edges": features,
        "dropout": float(getattr(layer, "dropout", 0.0)) if layer.training else 0.0,
        "return_weights": "heads" if needs_weights else False,
        # Nothing but the kernels reads what a compiled program has of a graph.
        "implementation": "cpu" if is_compiling() else None,
    }


def _in_one_dtype(
    rows: tuple[Tensor, Tensor, Tensor], score: Score, features: EdgeFeatures | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Score, EdgeFeatures | None]:
    """The arguments in the dtype of the parent's result, that of its products of rows and vector."""
    (query, key, value), (vector, _) = rows, score.operands
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in (*rows, vector) if x is not None])
    cast = key.to(dtype)
    # A value that is the key stays one.
    rows = (query.to(dtype), cast, cast if value is key else value.to(dtype))
    if features is not None:
        features = EdgeFeatures(*[None if x is None else x.to(dtype) for x in _tensors(features)])  # pyright: ignore[reportArgumentType]  # the first is there
    return rows, score.cast(lambda x: x.to(dtype)), features


def _tensors(features: EdgeFeatures | None) -> tuple[Tensor | None, ...]:
    return () if features is None else (features.features, features.key_weight, features.value_weight)


def has_lazy_widths(layer: Any) -> bool:
    """Whether a projection gets its width from its first input; a compiler leaves that to the parent."""
    # Before every call, and so without the generators of torch.nn.
    return not is_compiling() and any(
        child is not None and "_hook" in child.__dict__ for child in layer._modules.values()
    )


def take_widths(inputs: Sequence[tuple[Any, Any]]) -> None:
    """Gives projections that have no width yet that of their inputs, in the order in which the parent calls them.

    None where one of them has more hooks, which may change its input.

    Args:
        inputs: projections and their inputs, either of which may be None.
    """
    lazy = [
        (linear, x)
        for linear, x in inputs
        if type(linear) is Linear and isinstance(linear.weight, UninitializedParameter) and isinstance(x, Tensor)
    ]
    if all(len(linear._forward_pre_hooks) == 1 for linear, _ in lazy):
        for linear, x in lazy:
            linear.initialize_parameters(linear, (x,))


def with_widths(layer: Any, inputs: Callable[[Any], Sequence[tuple[Any, Any]]]) -> Any:
    """The layer, or a copy that has the widths which a call would give it."""
    if not has_lazy_widths(layer):
        return layer
    layer = copy.deepcopy(layer)
    with torch.random.fork_rng(devices=[]):
        take_widths(inputs(layer))
    return layer


def graph_and_features(
    layer: Any, edge_index: Tensor, edge_attr: Tensor | None, sizes: tuple[int, int], needs_weights: Any
) -> tuple[Graph, Tensor | None]:
    """The Graph and its edges' features, with the self-loops that the layer adds."""
    if not layer.add_self_loops:
        return graph_of(layer, edge_index, *sizes), edge_attr
    num_loops = min(sizes)
    if is_compiling():
        num_edges = edge_index.shape[1] + num_loops
        if edge_attr is not None or needs_weights:
            # Where there are numbers for each edge, their number counts, and is seen at run time alone.
            looped, edge_attr = remove_self_loops(edge_index, edge_attr)
            looped, edge_attr = add_self_loops(looped, edge_attr, fill_value=layer.fill_value, num_nodes=num_loops)
            num_edges = looped.shape[1]
        return named_graph(edge_index, *sizes, num_loops, num_edges), edge_attr
    prepared = prepared_graph(layer, edge_index, *sizes, num_loops)
    if edge_attr is not None:
        kept = edge_attr if prepared.kept is None else edge_attr[prepared.kept]
        own = prepared.graph.edge_index[:, : prepared.graph.num_edges - num_loops]
        # PyTorch Geometric's own function fills in the features of the loops.
        _, edge_attr = add_self_loops(own, kept, fill_value=layer.fill_value, num_nodes=num_loops)
    return prepared.graph, edge_attr


def graph_of(layer: Any, edge_index: Tensor, num_sources: int, num_targets: int) -> Graph:
    """The Graph of the edges as they are."""
    if is_compiling():
        return named_graph(edge_index, num_sources, num_targets, None, edge_index.shape[1])
    return prepared_graph(layer, edge_index, num_sources, num_targets, None).graph


def edges_and_weights(layer: Any, edge_index: Tensor, graph: Graph, weights: Tensor) -> tuple[Any, Tensor]:
    """Attention weights and the edges that they belong to: the caller's own, or new ones with the self-loops."""
    if type(edge_index) is Tensor and edge_index.layout == torch.strided and not is_compiling():
        # Whoever gets it may change it, and the Graph is used again.
        return (graph.edge_index.clone() if layer.add_self_loops else edge_index), weights
    return with_weights(layer, edge_index, weights, (graph.num_keys, graph.num_queries))


def finished(layer: Any, output: Tensor, target: Tensor | None) -> Tensor:
    """The heads joined, the residual and the bias."""
    output = joined_heads(layer, output)
    if layer.res is not None and target is not None:
        output = output + layer.res(target)
    bias = layer.bias
    return output if bias is None else add_bias(output, bias)


def joined_heads(layer: Any, output: Tensor) -> Tensor:
    """The heads side by side, or their mean."""
    return output.flatten(1) if layer.concat else output.mean(dim=1)


def pair_of(x: Any) -> tuple[Any, Any]:
    """Source and target features; anything else twice, for the parent to refuse."""
    return (x[0], x[1]) if isinstance(x, tuple | list) and len(x) == 2 else (x, x)


def columns(edge_attr: Any) -> Any:
    """Edge features of one axis as a column."""
    return edge_attr.view(-1, 1) if isinstance(edge_attr, Tensor) and edge_attr.ndim == 1 else edge_attr


def with_heads(layer: Any, rows: Tensor) -> Tensor:
    """Rows `(nodes, heads * channels)` as `(nodes, heads, channels)`."""
    return rows.unflatten(-1, (layer.heads, layer.out_channels))


def edge_weight(layer: Any) -> Tensor:
    """The projection of edge features, `(heads, channels, edge_dim)`."""
    return layer.lin_edge.weight.unflatten(0, (layer.heads, layer.out_channels))
