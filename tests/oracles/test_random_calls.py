"""Thousands of random calls of `attend` against masked attention in plain PyTorch, in float64: results and gradients.

A failure names the seed of its call; `draw_call(seed)` is that call.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_calls import RandomCall, allowed_pairs, draw_call, draw_views_like
from torch import Tensor

from anyattention import AttentionResult, Causal, Full, Graph
from anyattention.errors import InvalidInputError, UnsupportedError
from oracle import expected

_CALLS, _AT_ONCE = 20_000, 200


def exact_leaves(call: RandomCall) -> dict[str, Tensor]:
    """Copies in float64, with zeros in place of what is hidden from all."""
    copies = {
        name: x.detach().double().clone(memory_format=torch.contiguous_format) for name, x in call.tensors.items()
    }
    if call.hidden_keys is not None:
        for name in ("key", "value"):
            copies[name][call.hidden_keys] = 0.0
    return {name: x.requires_grad_(call.tensors[name].requires_grad) for name, x in copies.items()}


def exact_results(call: RandomCall, tensors: dict[str, Tensor], indices: Tensor | None) -> tuple[Tensor, ...]:
    """Output, weights as `attend` gives those of all heads, and logsumexp."""
    if isinstance(call.pattern, Graph):
        settings = {name: x for name, x in call.settings.items() if name not in ("implementation", "dropout")}
        query = tensors["query"]
        shape = (*query.shape[:-3], call.pattern.num_edges, query.shape[-2])
        kept = call.kept(shape)
        return expected({**tensors, **settings}, kept if query.ndim == 4 else kept[None])
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    scale = call.settings.get("scale")
    scores = torch.einsum("blhd,bshd->bhls", query, key) * (max(query.shape[3], 1) ** -0.5 if scale is None else scale)
    if "softcap" in call.settings:
        scores = call.settings["softcap"] * torch.tanh(scores / call.settings["softcap"])
    if "bias" in tensors:
        scores = scores + tensors["bias"].masked_fill(tensors["bias"].detach() == -math.inf, 0.0)
    if call.relative is not None:
        scores = scores + _by_distance(call, tensors["numbers"])
    allowed = allowed_pairs(call)
    assert allowed is not None
    if indices is not None:
        allowed = _chosen(call, scores.detach(), allowed, indices)
    logits = scores.masked_fill(~allowed, -math.inf)
    if "sinks" in tensors:
        logits = torch.cat([logits, tensors["sinks"][:, None, None].expand(*logits.shape[:3], 1)], -1)
    is_empty = (logits.detach() == -math.inf).all(-1)
    shown = logits.masked_fill(is_empty[..., None], 0.0)
    weights = shown.softmax(-1)[..., : key.shape[1]].masked_fill(~allowed, 0.0)
    logsumexp = shown.exp().sum(-1).clamp(min=1e-300).log().masked_fill(is_empty, -math.inf)
    output = torch.einsum("bhls,bshe->blhe", weights * _kept(call, weights, indices), value)
    return output, _as_returned(call, weights, indices), logsumexp.transpose(1, 2)


def _by_distance(call: RandomCall, numbers: Tensor) -> Tensor:
    assert call.relative is not None
    first, align = call.relative
    queries, keys = call.lengths
    offset = keys - queries if align == "bottom_right" else 0
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - offset - first
    return numbers[:, distance.clamp(0, numbers.shape[1] - 1)]


def _chosen(call: RandomCall, scores: Tensor, allowed: Tensor, indices: Tensor) -> Tensor:
    """The pairs that a selection names, once they are seen to be the best: as many as there are, none twice."""
    keys = allowed.shape[-1]
    table = scores.new_zeros(*allowed.shape[:3], keys + 1)
    places = torch.where(indices < 0, keys, indices).transpose(1, 2)
    counts = table.scatter_add(-1, places, torch.ones_like(places, dtype=scores.dtype))[..., :keys]
    chosen = counts == 1
    assert (counts <= 1).all()
    assert (chosen <= allowed).all()
    assert torch.equal(chosen.sum(-1), allowed.sum(-1).clamp(max=call.pattern.k))
    worst = scores.masked_fill(~chosen, math.inf).amin(-1) if keys else scores.sum(-1)
    best = scores.masked_fill(~(allowed & ~chosen), -math.inf).amax(-1) if keys else scores.sum(-1)
    assert (worst >= best - 1e-4 * (1 + best.abs().clamp(max=1e3))).all()
    return chosen


def _kept(call: RandomCall, weights: Tensor, indices: Tensor | None) -> Tensor:
    """Dropout's factors `(batch, heads, queries, keys)`, drawn as the weights of all heads are numbered."""
    batch, heads, queries, keys = weights.shape
    if "dropout" not in call.settings:
        return torch.ones((), dtype=weights.dtype)
    if indices is not None:
        table = weights.new_zeros(batch, heads, queries, keys + 1)
        places = torch.where(indices < 0, keys, indices).transpose(1, 2)
        return table.scatter(-1, places, call.kept(tuple(indices.shape)).transpose(1, 2))[..., :keys]
    if call.pattern is None or isinstance(call.pattern, Full | Causal):
        return call.kept((batch, heads, queries, keys))
    graph = call.pattern.to_graph(queries, keys)
    table = weights.new_zeros(batch, queries, keys, heads)
    factors = call.kept((batch, graph.num_edges, heads))
    return table.index_put((torch.arange(batch)[:, None], graph.query_index, graph.key_index), factors).permute(
        0, 3, 1, 2
    )


def _as_returned(call: RandomCall, weights: Tensor, indices: Tensor | None) -> Tensor:
    """Weights `(batch, heads, queries, keys)` as `attend` returns them."""
    if indices is not None:
        padded = torch.nn.functional.pad(weights, (0, 1))
        return padded.gather(-1, torch.where(indices < 0, weights.shape[-1], indices).transpose(1, 2)).transpose(1, 2)
    if call.pattern is None or isinstance(call.pattern, Full | Causal):
        return weights
    graph = call.pattern.to_graph(*call.lengths)
    return weights[:, :, graph.query_index, graph.key_index].transpose(1, 2)


def attended(call: RandomCall) -> AttentionResult:
    """The result, of the implementation that was drawn if it can run the call."""
    try:
        return call.attend()
    except (UnsupportedError, InvalidInputError) as refused:
        if refused.argument != "implementation":
            raise
        return replace(call, settings={**call.settings, "implementation": None}).attend()


def fault_of(seed: int) -> str | None:
    """How a call differs from what it should give; None where it does not."""
    call = draw_call(seed)
    result = attended(call)
    leaves = exact_leaves(call)
    wanted = exact_results(call, leaves, result.indices)
    found: dict[str, Tensor] = {"output": result.output}
    exact = {"output": wanted[0]}
    if call.asked["return_weights"]:
        assert result.weights is not None
        found["weights"], exact["weights"] = result.weights, wanted[1]
        if call.asked["return_weights"] == "mean" and result.indices is None:
            is_dense = call.pattern is None or isinstance(call.pattern, Full | Causal)
            exact["weights"] = wanted[1].mean(1 if is_dense else -1)
    if call.asked["return_logsumexp"]:
        assert result.logsumexp is not None
        found["logsumexp"], exact["logsumexp"] = result.logsumexp, wanted[2]
    own = {name: x for name, x in call.tensors.items() if x.requires_grad}
    inputs, theirs = list(own.values()), [leaves[name] for name in own]
    ours, others, step = dict(found), dict(exact), ""
    # In half precision the gradients are rounded before they are differentiated again.
    orders = 2 if seed % 4 == 0 and call.tensors["query"].dtype.itemsize > 2 else 1
    for order in range(orders if own else 0):
        by, again = draw_views_like(call, ours, order), order + 1 < orders
        ours = _gradients(ours, own, inputs, by, f"{step}gradient of ", again)
        others = _gradients(others, own, theirs, by, f"{step}gradient of ", again)
        found |= ours
        exact |= others
        step = f"{step}gradient by the "
    return _difference(call, found, exact)


def _gradients(
    results: dict[str, Tensor],
    names: Iterable[str],
    inputs: list[Tensor],
    by: dict[str, Tensor],
    prefix: str,
    again: bool,
) -> dict[str, Tensor]:
    """The gradients of the results times `by`, by name; `again`: to be differentiated once more."""
    differentiable = [name for name, x in results.items() if x.requires_grad]
    if not differentiable:
        return {prefix + name: torch.zeros_like(x) for name, x in zip(names, inputs, strict=True)}
    found = torch.autograd.grad(
        [results[name] for name in differentiable],
        inputs,
        [by[name].to(results[name].dtype) for name in differentiable],
        allow_unused=True,
        materialize_grads=True,
        create_graph=again,
    )
    return {prefix + name: x for name, x in zip(names, found, strict=True)}


def _difference(call: RandomCall, found: dict[str, Tensor], exact: dict[str, Tensor]) -> str | None:
    of_query = call.tensors["query"].dtype
    for name, one in found.items():
        # Results in a wider dtype have the roundings of the query's.
        dtype = max(one.dtype, of_query, key=lambda each: torch.finfo(each).eps)
        step = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 16 * torch.finfo(dtype).eps)
        other = exact[name].detach()
        finite = other[other.isfinite()].abs()
        size = max(1.0, float(finite.max())) if finite.numel() else 1.0
        try:
            assert one.shape == other.shape, f"{tuple(one.shape)} in place of {tuple(other.shape)}"
            torch.testing.assert_close(one.detach().double(), other, rtol=step, atol=step * size)
        except AssertionError as fault:
            return f"{name}: {fault}\n{call}"
    return None


def faults_of(first: int) -> list[str]:
    faults = []
    for seed in range(first, first + _AT_ONCE):
        try:
            fault = fault_of(seed)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}\n{draw_call(seed)}"
        if fault is not None:
            faults.append(fault)
    return faults


_QUICK = 400


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[] if first < _QUICK else pytest.mark.exhaustive)
        for first in range(0, _CALLS, _AT_ONCE)
    ],
)
def test_random_calls(native: Any, first: int) -> None:
    faults = faults_of(first)
    assert not faults, f"{len(faults)} of {_AT_ONCE} calls\n" + "\n".join(faults[:5])
