"""Why a layer leaves a call to PyTorch Geometric's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedParameter
from torch_geometric.nn import Linear
from torch_geometric.nn.aggr import SumAggregation

from anyattention import native
from anyattention.ambient import Moment, is_compiling, moment_of
from anyattention.interop.pyg.edge_lists import declared_sizes, edges_refusal, is_matrix
from anyattention.nn.bare import is_method, is_untouched

__all__ = ["call_refusal", "is_plain", "layer_refusal", "moment_refusal"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_METHODS = ("message", "edge_update", "aggregate", "update", "message_and_aggregate", "propagate", "edge_updater")
_HOOKS = tuple(
    f"_{method}_forward_{kind}"
    for method in ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
    for kind in ("pre_hooks", "hooks")
)
# As they were before anybody put others in their place.
_LINEAR_FORWARD, _SUM_FORWARD, _REDUCE = Linear.forward, SumAggregation.forward, SumAggregation.reduce


def call_refusal(
    layer: Any,
    ours: type,
    nodes: Sequence[Any],
    edge_index: Any,
    edge_attr: Any,
    folded: Sequence[nn.Module | None],
    unread: Sequence[str] = (),
) -> str | None:
    """Why the parent's forward runs a call; None where ours does.

    Args:
        layer: a layer of class `ours`, or of a subclass.
        nodes: source features, and target features where there are any.
        folded: the projections whose weight is read without calling them; no other part of a layer is passed over.
        unread: the names of parts that the call does not need.
    """
    return (
        moment_refusal(edge_index)
        or layer_refusal(layer, ours)
        or edges_refusal(edge_index, getattr(layer, "add_self_loops", False))
        or _features_refusal(layer, nodes, edge_index, edge_attr)
        or _dtypes_refusal(layer, [*nodes, edge_attr], unread)
        or _projection_refusal(layer, folded, unread)
    )


def moment_refusal(edge_index: Any) -> str | None:
    """Why the moment leaves a call over these edges to the parent's forward."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if is_compiling():
        # First, so that an exported program has PyTorch's operators and none of ours.
        if torch.compiler.is_exporting():
            return "torch.export is tracing"
        if not native.available():
            return "torch.compile is tracing, and no kernels are compiled (see `anyattention info`)"
        is_plain = type(edge_index) is Tensor and edge_index.layout == torch.strided
        return None if is_plain else "torch.compile is tracing, and edge_index is no plain tensor"
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]  # documented
        return "torch.jit is tracing"
    if moment_of(()) is not Moment.PLAIN:
        return "a mode of PyTorch's dispatcher is on"
    return None


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection does nothing but multiply by its weight, so that this may be read without a call."""
    if not is_untouched(linear, Linear, _LINEAR_FORWARD):
        return False
    return linear.bias is None and type(linear.weight) in (nn.Parameter, Tensor)


def layer_refusal(layer: Any, ours: type) -> str | None:
    """Why a layer of class `ours`, or of a subclass, is left to the parent's forward, whatever the call."""
    if layer.explain:
        return "an explainer is at work (explain=True)"
    for hooks in _HOOKS:
        if getattr(layer, hooks):
            return f"a hook is registered ({hooks.removeprefix('_').removesuffix('s')})"
    overridden = _overridden(layer, ours)
    if overridden is not None:
        return f"{type(layer).__name__} overrides {overridden}"
    if layer.flow != "source_to_target":
        return f"flow={layer.flow!r}"
    if layer.node_dim != 0:
        return f"node_dim={layer.node_dim}"
    if layer.decomposed_layers != 1:
        return f"decomposed_layers={layer.decomposed_layers}"
    aggregation = layer.aggr_module
    if type(aggregation) is not SumAggregation:
        return f"the aggregation is {aggregation}, not a sum"
    if not is_method(aggregation.reduce, _REDUCE) or not is_untouched(aggregation, SumAggregation, _SUM_FORWARD):
        return "the aggregation has hooks or another forward"
    dropout = getattr(layer, "dropout", 0.0)
    if layer.training and not 0.0 <= dropout < 1.0:
        return "dropout drops every weight, or is no probability"
    return None


def _overridden(layer: Any, ours: type) -> str | None:
    """A step of message passing that a subclass, or the instance, does in its own way."""
    kinds = type(layer).__mro__
    for kind in kinds[: kinds.index(ours)]:
        for name in _METHODS:
            own = kind.__dict__.get(name)
            # PyTorch Geometric puts generated functions there, of a module named after the class.
            if own is not None and not own.__module__.startswith(f"{kind.__module__}_{kind.__name__}"):
                return name
    # `propagate` is there after an explanation: PyTorch Geometric's own again. Read from the object, so that a compiled
    # program sees a method that is put there later.
    for name in _METHODS[:-2]:
        if not is_method(getattr(layer, name), getattr(type(layer), name)):
            return name
    return None


def _features_refusal(layer: Any, nodes: Sequence[Any], edge_index: Tensor, edge_attr: Any) -> str | None:
    named: list[tuple[str, Any]] = list(zip(("x_source", "x_target"), nodes, strict=False))
    if edge_attr is not None:
        named.append(("edge_attr", edge_attr))
    for name, features in named:
        if type(features) not in (Tensor, nn.Parameter) or features.layout != torch.strided:
            return f"{name} is not a plain dense tensor"
        if features.device.type != "cpu":
            return f"{name} is on {features.device}"
        if features.dtype not in _DTYPES:
            return f"{name} is {features.dtype}"
        if features.ndim != 2:
            return f"{name} has {features.ndim} axes"
    if edge_attr is not None:
        num_edges = edge_index._nnz() if is_matrix(edge_index) else edge_index.shape[1]
        if edge_attr.shape[0] != num_edges:
            return f"edge_attr has {edge_attr.shape[0]} rows for {num_edges} edges"
        if is_matrix(edge_index) and getattr(layer, "add_self_loops", False):
            return "edge_attr is given beside a sparse matrix whose self-loops are replaced"
    for features, size in zip(nodes, declared_sizes(edge_index), strict=False):
        if size is not None and features.shape[0] != size:
            return f"edge_index says {size} nodes for {features.shape[0]} rows of features"
    return None


def _dtypes_refusal(layer: Any, features: Sequence[Tensor | None], unread: Sequence[str]) -> str | None:
    """Of dtypes that differ, but for what autocast makes one of."""
    names = ("x_source", "x_target")[: len(features) - 1]
    given = [(name, x.dtype) for name, x in zip((*names, "edge_attr"), features, strict=True) if x is not None]
    casts = torch.is_autocast_enabled("cpu")
    for name, parameter in layer.named_parameters():
        if name.split(".")[0] in unread:
            continue
        if isinstance(parameter, UninitializedParameter):
            return f"{name} gets its size from the first call"
        for argument, dtype in given:
            # Autocast leaves float64 as it is.
            if dtype != parameter.dtype and not (casts and torch.float64 not in (dtype, parameter.dtype)):
                return f"{argument} is {dtype} and {name} {parameter.dtype}"
    return None


def _projection_refusal(layer: Any, folded: Sequence[nn.Module | None], unread: Sequence[str]) -> str | None:
    for name, linear in layer.named_children():
        if name not in unread and any(linear is each for each in folded) and not is_plain(linear):
            return f"{name} has hooks or is no plain Linear"
    return None
