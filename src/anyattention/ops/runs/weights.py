"""The weights of attention over runs: an operator over its results, and its gradient.

The gradient is fused; where it is differentiated again, it is that of the same weights in the primitives of graphs,
over the pairs as edges.

Axes: B batch, L query_length, S key_length, H heads, E pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from anyattention.ambient import is_differentiated_again
from anyattention.native import calls, large_empty
from anyattention.native.structures import Numbers
from anyattention.ops.operator import Result, operator
from anyattention.ops.runs.call import RunAttention, of_rows, with_parts, with_single_parts
from anyattention.ops.runs.composed import at_edges, graph_of_parts
from anyattention.ops.runs.pairs import bias_of_edges, pairs_at_edges

__all__ = ["RunAttentionWeights", "RunAttentionWeightsBackward", "run_attention_weights", "run_weights"]


@dataclass(frozen=True, eq=False)
class RunAttentionWeights:
    """The weights before dropout of all pairs of positions, 0 for those that the parts do not have.

    Attributes:
        call: whose weights they are.
        largest, log_sum: its results; the largest scores are constants, of which log_sum holds the gradient.
        weight_heads: H, or 1 for the mean over the heads.
    """

    call: RunAttention
    largest: Annotated[Tensor, Numbers("batch num_queries heads")]
    log_sum: Annotated[Tensor, Numbers("batch num_queries heads")]
    weight_heads: int


@dataclass(frozen=True, eq=False)
class RunAttentionWeightsBackward:
    """The gradients of query, key and, where needed, bias, with log_sum held, and of log_sum."""

    call: RunAttention
    largest: Annotated[Tensor, Numbers("batch num_queries heads")]
    log_sum: Annotated[Tensor, Numbers("batch num_queries heads")]
    grad_weights: Annotated[Tensor, Numbers("batch weight_heads num_queries num_keys")]
    needed: tuple[bool, ...]


def run_weights(call: RunAttention, largest: Tensor, log_sum: Tensor, *, mean: bool) -> Tensor:
    """The weights `(B, H, L, S)`, or their mean over heads `(B, L, S)`, which is summed up without them.

    Args:
        call: the record of `run_attention`, and `largest`, `log_sum` two of its results `(B, L, H)`.
        mean: over the heads.
    """
    heads = call.query.shape[2]
    # What dropout leaves of the weights is no business of theirs.
    plain = replace(call, seed=None, dropout=0.0) if call.seed is not None else call
    weights = run_attention_weights(RunAttentionWeights(plain, largest, log_sum, 1 if mean else heads))
    return weights.squeeze(1) if mean else weights


def _gradient(
    record: RunAttentionWeights, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    (grad_weights,) = by
    assert grad_weights is not None
    if is_differentiated_again():
        return _composed_gradients(record, grad_weights, needs)
    needed = (True, True, True, "call.bias" in needs)
    by_query, by_key, by_log_sum, by_bias = _backward(
        RunAttentionWeightsBackward(record.call, record.largest, record.log_sum, grad_weights, needed)
    )
    return {"log_sum": by_log_sum, **_of_call(record.call, {"query": by_query, "key": by_key, "bias": by_bias})}


def _of_call(call: RunAttention, found: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Gradients by the call's fields, as those of the record that has it."""
    return {f"call.{name}": x for name, x in of_rows(call, found).items()}


def _composed_gradients(
    record: RunAttentionWeights, grad_weights: Tensor, needs: frozenset[str]
) -> Mapping[str, Tensor | None]:
    """Those of the weights as a function of query, key and bias alone: of log_sum nothing is left."""
    call, heads = record.call, record.call.query.shape[2]
    graph = graph_of_parts(call)
    by_edges = pairs_at_edges(grad_weights, graph)
    if record.weight_heads != heads:
        by_edges = (by_edges / heads).expand(-1, -1, heads)
    own = frozenset([name.removeprefix("call.") for name in needs])
    found = dict(at_edges(call, graph, None).gradients((None, None, by_edges), own))
    found["bias"] = bias_of_edges(call.bias, graph, found.get("bias"))
    return _of_call(call, found)


run_attention_weights = operator(
    RunAttentionWeights, [Result("weights", "batch weight_heads num_queries num_keys", is_sum=True)], gradient=_gradient
)
_backward = operator(
    RunAttentionWeightsBackward,
    [
        Result("grad_query", like="call.query", is_sum=True),
        Result("grad_key", like="call.key", is_sum=True),
        Result("grad_log_sum", like="log_sum"),
        Result("grad_bias", like="call.bias", is_sum=True),
    ],
)


@run_attention_weights.kernel("cpu", binds=True)
def _run(record: RunAttentionWeights) -> Tensor:
    record = with_parts(record)
    query, key = record.call.query, record.call.key
    shape = (len(query), record.weight_heads, query.shape[1], key.shape[1])
    if not record.call.parts:
        return record.log_sum.new_zeros(shape)
    weights: Tensor | None = None
    for number, single in enumerate(with_single_parts(record)):
        bound = calls.bind(single)
        weights = large_empty(record.log_sum, shape) if weights is None else weights
        calls.run("run_attention_weights", bound, number > 0, weights)
    assert weights is not None
    return weights


@_backward.kernel("cpu", binds=True)
def _run_backward(record: RunAttentionWeightsBackward) -> tuple[Tensor | None, ...]:
    record = with_parts(record)
    results: list[Tensor | None] = []
    if not record.call.parts:
        inputs = (record.call.query, record.call.key, record.log_sum, record.call.bias)
        return tuple([None if x is None else record.log_sum.new_zeros(x.shape) for x in inputs])
    for number, single in enumerate(with_single_parts(record)):
        bound = calls.bind(single)
        results = results or _backward.allocate(record, bound)
        given = calls.pairs(results[3], bound)
        calls.run("run_attention_weights_backward", bound, number > 0, *results[:3], given)
    return tuple(results)
