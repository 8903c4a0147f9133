"""The one call: attention over any pattern, by any score."""

from collections.abc import Callable

import torch
from torch import Tensor

from anyattention._checks import allocation_failures_named, is_autocast_enabled, require_tensor
from anyattention._dispatch import Explanation
from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Aggregation, Arguments, pattern_or_full, read_weights
from anyattention.ops.dense import dense_attention, explain_dense
from anyattention.ops.graph import explain_graph, graph_attention
from anyattention.ops.sparse import explain_sparse, sparse_attention
from anyattention.ops.topk import explain_topk, topk_attention
from anyattention.output import AttentionResult
from anyattention.patterns import Causal, Full, Graph, Pattern, TopK
from anyattention.scores import Dot, EdgeFeatures, Score

__all__ = ["attend", "explain"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | TopK | None = None,
    *,
    score: Score = Dot(),  # noqa: B008  # a frozen dataclass without fields
    mask: Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    edges: EdgeFeatures | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    aggregation: Aggregation = "sum",
    normalize: bool = True,
    return_weights: bool | str = False,
    return_logsumexp: bool = False,
    implementation: str | None = None,
) -> AttentionResult:
    """Attention of queries to the keys that a pattern allows.

    For each allowed pair (i, j), with k' = k_j + key_weight e and v' = v_j + value_weight e where edge features
    are given:

        raw    = q_i . k'  (Dot),  LeakyReLU(q_i + k')  (Additive),  vector . LeakyReLU(q_i + k')  (Dynamic)
        score  = softcap(scale raw) + bias,  softcap(x) = c tanh(x / c)
        p      = softmax of the scores over the query's pairs;  sigmoid(score) with normalize=False
        output = sum of dropout(p) v';  over max(pairs, 1) for "mean";  elementwise maximum for "max"

    A query without pairs gets output 0, gradient 0 and logsumexp -inf.

    Args:
        query: `(batch, query_length, heads, head_dim)`; with a Graph also without batch, `(queries, heads, head_dim)`.
        key: `(batch, key_length, heads, head_dim)`, or `(keys, key_heads, head_dim)`.
        value: `(batch, key_length, heads, value_dim)`, or `(keys, key_heads, value_dim)`. All three of one floating
            dtype and device; float16 and bfloat16 are summed in float32. Except with Full and Causal, key_heads may be
            a divisor of heads: each key head then serves heads / key_heads heads in a row.
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
        dropout: probability in [0, 1) with which a weight is dropped; the others are divided by 1 - dropout.
        aggregation: "sum", "mean" or "max" of the weighted values. A Graph only.
        normalize: False gates each edge by itself, with a sigmoid. A Graph only; no logsumexp then.
        return_weights: "mean" (or True) over heads, or "heads"; False returns none.
        return_logsumexp: also return the natural log of the softmax denominator.
        implementation: force "cpu", "torch" (dense attention), "graph" (other patterns, over their pairs as edges) or
            "reference"; None takes the first that can run the call. See `explain`.

    Returns:
        AttentionResult(output, weights, logsumexp, indices); what was not asked for is None. The output has the
        query's rank and dtype, and the weights are differentiable.

    Raises:
        DimensionMismatchError, InvalidInputError, InvalidMaskError: an argument does not fit the others.
        UnsupportedError: the forced implementation cannot run the call, or the pattern lacks the setting.
        OutOfMemoryError: the weights would not fit in memory.

    Cost: dense O(batch x heads x query_length x key_length x head_dim) time; "cpu" and "torch" take memory linear in
    the lengths, "reference" and weights quadratic. Graph: O(edges x heads x head_dim) time; "cpu" takes memory for each
    edge and head, "reference" for each channel too. Other patterns: time for their pairs and memory linear in the
    lengths, or that of a Graph. TopK: the time of dense attention, memory for queries x heads x k.

    Source: Vaswani et al., 2017 (Dot); Velickovic et al., 2018 (Additive); Brody et al., 2022 (Dynamic).

    Example:
        >>> query = torch.zeros(1, 2, 1, 4)
        >>> value = torch.arange(3.0).reshape(1, 3, 1, 1)
        >>> result = attend(query, torch.ones(1, 3, 1, 4), value, return_weights=True)
        >>> result.output.flatten()
        tensor([1., 1.])
        >>> result.weights.shape
        torch.Size([1, 2, 3])
    """
    arguments = Arguments(
        query=query,
        key=key,
        value=value,
        pattern=pattern_or_full(pattern),
        score=score,
        mask=mask,
        bias=bias,
        edges=edges,
        scale=scale,
        softcap=softcap,
        dropout=dropout,
        aggregation=aggregation,
        normalize=normalize,
        weights=read_weights(return_weights),
        return_logsumexp=return_logsumexp,
        implementation=implementation,
    )
    require_tensor("query", query)
    if not is_autocast_enabled(query.device):
        return _attend(arguments)
    arguments = arguments.under_autocast()
    with torch.autocast(query.device.type, enabled=False):
        return _attend(arguments)


def _attend(arguments: Arguments) -> AttentionResult:
    run = _operation(arguments.pattern)[0]
    if torch.compiler.is_compiling():
        return run(arguments)
    with allocation_failures_named():
        return run(arguments)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | TopK | None = None,
    *,
    score: Score = Dot(),  # noqa: B008  # a frozen dataclass without fields
    mask: Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    edges: EdgeFeatures | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    aggregation: Aggregation = "sum",
    normalize: bool = True,
    return_weights: bool | str = False,
    return_logsumexp: bool = False,
    implementation: str | None = None,
) -> Explanation:
    """Which implementation `attend` would run for the same arguments, and why each faster one does not.

    Args: as `attend`.

    Returns:
        Explanation(implementation, refusals, notes); print it.

    Raises: as `attend`; nothing is computed.

    Example:
        >>> x = torch.ones(1, 2, 1, 4)
        >>> print(explain(x, x, x, implementation="reference"))
        runs: reference
    """
    arguments = Arguments(
        query=query,
        key=key,
        value=value,
        pattern=pattern_or_full(pattern),
        score=score,
        mask=mask,
        bias=bias,
        edges=edges,
        scale=scale,
        softcap=softcap,
        dropout=dropout,
        aggregation=aggregation,
        normalize=normalize,
        weights=read_weights(return_weights),
        return_logsumexp=return_logsumexp,
        implementation=implementation,
    )
    require_tensor("query", query)
    if is_autocast_enabled(query.device):
        arguments = arguments.under_autocast()
    return _operation(arguments.pattern)[1](arguments)


def _operation(
    pattern: Pattern | TopK,
) -> tuple[Callable[[Arguments], AttentionResult], Callable[[Arguments], Explanation]]:
    """The operation that a pattern is for, and what explains it."""
    if isinstance(pattern, TopK):
        return topk_attention, explain_topk
    if isinstance(pattern, Graph):
        return graph_attention, explain_graph
    if isinstance(pattern, Full | Causal):
        return dense_attention, explain_dense
    return sparse_attention, explain_sparse
