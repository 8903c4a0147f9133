"""The one call: attention over any pattern, by any score."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from anyattention._checks import as_out_of_memory, require_tensor
from anyattention.ambient import is_autocast_enabled, is_compiling
from anyattention.errors import InvalidInputError
from anyattention.ops.arguments import Arguments
from anyattention.ops.dense import dense_attention, explain_dense
from anyattention.ops.dispatch import Explanation
from anyattention.ops.graph import explain_graph, graph_attention
from anyattention.ops.sinks import with_sinks
from anyattention.ops.sparse import explain_sparse, sparse_attention
from anyattention.ops.spread import spread
from anyattention.ops.topk import explain_topk, topk_attention
from anyattention.output import AttentionResult, spread_by
from anyattention.patterns import Causal, Full, Graph, Pattern, TopK

__all__ = ["attend", "explain"]

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def _taking(
    record: Callable[Parameters, Arguments],
) -> Callable[[Callable[[Arguments], Returned]], Callable[Parameters, Returned]]:
    """A function of a record as one of the record's fields, which is its signature too."""

    def taking(function: Callable[[Arguments], Returned]) -> Callable[Parameters, Returned]:
        fields, returned = inspect.signature(record), inspect.signature(function).return_annotation
        named = {name: each.default for name, each in fields.parameters.items() if each.kind is each.KEYWORD_ONLY}

        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
            if is_compiling():
                # torch.compile reads no default of a record that is an object, as Dot() is.
                return function(record(*args, **{**named, **kwargs}))
            try:
                arguments = record(*args, **kwargs)
            except TypeError as fault:
                try:
                    fields.bind(*args, **kwargs)
                except TypeError as misfit:
                    raise TypeError(f"{function.__name__}(): {misfit}") from None
                raise fault
            try:
                return function(arguments)
            except (MemoryError, RuntimeError) as failure:
                named_failure = as_out_of_memory(failure)
                if named_failure is None:
                    raise
                if arguments.weights is not None:
                    named_failure.args = (f"{named_failure}. return_weights=False spares the weights",)
                if named_failure is failure:
                    raise
                raise named_failure from failure

        call.__signature__ = fields.replace(return_annotation=returned)  # pyright: ignore[reportAttributeAccessIssue]
        call.__annotations__ = {
            **{name: each.annotation for name, each in fields.parameters.items()},
            "return": returned,
        }
        del call.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]  # its signature is not this one's
        return call

    return taking


@_taking(Arguments)
def attend(arguments: Arguments) -> AttentionResult:
    """Attention of queries to the keys that a pattern allows.

    For each allowed pair (i, j), with k' = k_j + key_weight e and v' = v_j + value_weight e where edge features
    are given:

        raw    = q_i . k'  (Dot),  LeakyReLU(q_i + k')  (Additive),  vector . LeakyReLU(q_i + k')  (Dynamic)
        score  = softcap(scale raw) + bias,  softcap(x) = c tanh(x / c)
        p      = softmax of the scores over the query's pairs;  sigmoid(score) with normalize=False
        output = sum of dropout(p) v';  over max(pairs, 1) for "mean";  elementwise maximum for "max"

    With sinks the denominator of p has exp(sink of the head) beside the pairs' exp(score).

    A query without pairs gets output 0, gradient 0 and logsumexp -inf, or with sinks the head's sink.

    Args:
        query: `(batch, query_length, heads, head_dim)`; with a Graph also without batch, `(queries, heads, head_dim)`.
        key: `(batch, key_length, key_heads, head_dim)`, or `(keys, key_heads, head_dim)`.
        value: `(batch, key_length, key_heads, value_dim)`, or `(keys, key_heads, value_dim)`. All three of one floating
            dtype and device; float16 and bfloat16 are summed in float32. key_heads is heads or a divisor of it: each
            key head serves heads / key_heads heads in a row (grouped and multi-query attention).
        pattern: which pairs exist: Full() (also None), Causal(), Window, Strided, Fixed, Global, RandomBlocks,
            Documents, Blocks, what `&` and `|` make of them, a Graph. For all but Full and Causal the weights are those
            of the pairs, `(batch, edges)` or `(batch, edges, heads)`, in the order of `pattern.to_graph(...)`.
            TopK(k) keeps the k best of each query's keys in each head, `pattern & TopK(k)` those of a pattern's; the
            weights are then `(batch, query_length, heads, k)`, beside `indices` of that shape, -1 for an unused slot.
        score: Dot(), Additive(negative_slope) (head_dim 1) or Dynamic(vector, negative_slope).
        mask: boolean, True = may attend. Rank 1, 2 or 4, broadcast to (batch, heads, query_length, key_length);
            with a Graph `(edges,)`, `(edges, heads)` or `(batch, edges, heads)`.
        bias: floating, added to the score; shapes as the mask. -inf hides the pair, as a mask does. Or RelativeBias, by
            distance, for all patterns but a Graph.
        edges: features of a Graph's edges, for keys and values.
        scale: the factor of the raw score; None is 1 / sqrt(head_dim) for Dot, 1 for the others.
        softcap: c > 0 bounds the scaled score to (-c, c).
        sinks: floating `(heads,)`, a logit of each head that is in the denominator and has no value, so that the
            weights of a row sum to less than 1. -inf is none. Not with normalize=False.
        dropout: probability in [0, 1) with which a weight is dropped; the others are divided by 1 - dropout.
        aggregation: "sum", "mean" or "max" of the weighted values. A Graph only.
        normalize: False gates each edge by itself, with a sigmoid. A Graph only; no logsumexp then.
        return_weights: "mean" (or True) over heads, or "heads"; False returns none.
        return_logsumexp: also return the natural log of the softmax denominator, and without sinks its two parts
            (normalizer), which `merge` needs.
        implementation: force "cpu", "torch" (dense attention), "graph" (other patterns, over their pairs as edges) or
            "reference"; None takes the first that can run the call. See `explain`.

    Returns:
        AttentionResult(output, weights, logsumexp, indices, normalizer); what was not asked for is None. The output
        has the query's rank and dtype, and the weights are differentiable.

    Raises:
        DimensionMismatchError, InvalidInputError, InvalidMaskError: an argument does not fit the others.
        UnsupportedError: the forced implementation cannot run the call, or the pattern lacks the setting.
        OutOfMemoryError: the weights would not fit in memory.

    Cost: dense O(batch x heads x query_length x key_length x head_dim) time; "cpu" and "torch" take memory linear in
    the lengths, "reference" and weights quadratic. Graph: O(edges x heads x head_dim) time; "cpu" takes memory for each
    edge and head, "reference" for each channel too. Other patterns: time for their pairs and memory linear in the
    lengths, or that of a Graph. TopK: the time of dense attention, memory for queries x heads x k.

    Source: Vaswani et al., 2017 (Dot); Velickovic et al., 2018 (Additive); Brody et al., 2022 (Dynamic); OpenAI, 2025,
    gpt-oss (sinks).

    Example:
        >>> query = torch.zeros(1, 2, 1, 4)
        >>> value = torch.arange(3.0).reshape(1, 3, 1, 1)
        >>> result = attend(query, torch.ones(1, 3, 1, 4), value, return_weights=True)
        >>> result.output.flatten()
        tensor([1., 1.])
        >>> result.weights.shape
        torch.Size([1, 2, 3])
    """
    if not isinstance(arguments.query, Tensor):
        require_tensor("query", arguments.query)
    if is_autocast_enabled(arguments.query.device):
        with torch.autocast(arguments.query.device.type, enabled=False):
            return _run(arguments.under_autocast())
    return _run(arguments)


def _run(arguments: Arguments) -> AttentionResult:
    operation = _operation(arguments.pattern)[0]
    result = operation(arguments) if arguments.sinks is None else with_sinks(operation, arguments)
    if result.weights is not None and not is_compiling():
        pattern, lengths = arguments.pattern, (arguments.query.shape[-3], arguments.key.shape[-3])
        assert pattern is not None
        of_pairs = functools.partial(spread, pattern, lengths, arguments.weights == "heads", result.indices)
        spread_by(result.weights, of_pairs)
    return result


def _of_modules(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """`explain`, which a module may be given to in place of the tensors, with the arguments of its forward."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        if not args or not isinstance(args[0], torch.nn.Module):
            return function(*args, **kwargs)
        module, *given = args
        explain_forward = getattr(module, "explain_forward", None)
        if explain_forward is None:
            raise InvalidInputError(
                argument="query",
                expected="a torch.Tensor, or a module that has explain_forward",
                actual=type(module).__name__,
            )
        return explain_forward(*given, **kwargs)

    return call


@_of_modules
@_taking(Arguments)
def explain(arguments: Arguments) -> Explanation:
    """Which implementation `attend` would run for the same arguments, and why each faster one does not.

    Args: as `attend`. Or a module, and the arguments of its forward: `explain(module, x)` is
        `module.explain_forward(x)`.

    Returns:
        Explanation(implementation, refusals, notes); print it.

    Raises: as `attend`; nothing is computed.

    Example:
        >>> x = torch.ones(1, 2, 1, 4)
        >>> print(explain(x, x, x, implementation="reference"))
        runs: reference
    """
    require_tensor("query", arguments.query)
    if is_autocast_enabled(arguments.query.device):
        arguments = arguments.under_autocast()
    return _operation(arguments.pattern)[1](arguments)


def _operation(
    pattern: Pattern | TopK | None,
) -> tuple[Callable[[Arguments], AttentionResult], Callable[[Arguments], Explanation]]:
    """The operation that a pattern is for, and what explains it."""
    if isinstance(pattern, TopK):
        return topk_attention, explain_topk
    if isinstance(pattern, Graph):
        return graph_attention, explain_graph
    if isinstance(pattern, Full | Causal):
        return dense_attention, explain_dense
    return sparse_attention, explain_sparse
