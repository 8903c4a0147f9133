"""What attention returns: results of ops, outputs of modules, and the records of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from anyattention.errors import InvalidInputError

__all__ = [
    "AttentionCache",
    "AttentionGradients",
    "AttentionOutput",
    "AttentionResult",
    "EquivariantOutput",
    "HeterogeneousOutput",
    "MemoryOutput",
    "SearchResult",
    "spread_by",
]

# How the weights that were returned, as long as they are there, spread over all pairs. Not an attribute of theirs,
# which would go into files that hold them.
_SPREADS: MutableMapping[Tensor, Callable[[Tensor], Tensor]] = WeakIdKeyDictionary()


def spread_by(weights: Tensor, spread: Callable[[Tensor], Tensor]) -> None:
    """Have a result's `to_dense` know how its weights spread over all pairs."""
    _SPREADS[weights] = spread


def _dense(weights: Tensor | None) -> Tensor:
    if weights is None:
        raise InvalidInputError(
            argument="weights", expected="weights", actual="None", hint="ask for them: return_weights=True or 'heads'"
        )
    if weights.is_sparse:
        return weights.to_dense()
    spread = _SPREADS.get(weights)
    if spread is None:
        raise InvalidInputError(
            argument="weights",
            expected="the very tensor that was returned, which is known to be of certain pairs",
            actual="another: a copy, or one from a compiled function",
            hint="pattern.to_graph(num_queries, num_keys) has the pairs in the order of their weights",
        )
    return spread(weights)


class AttentionResult(NamedTuple):
    """What `attend` returns; a field that was not asked for is None.

    Attributes:
        output: `(batch, query_length, heads, value_dim)`, or without batch over a Graph.
        weights: probabilities before dropout. Dense: "mean" `(batch, query_length, key_length)`, "heads"
            `(batch, heads, query_length, key_length)`. Graph: `(..., edges)` or `(..., edges, heads)`, in the
            caller's edge order.
        logsumexp: natural log of the softmax denominator, `(..., queries, heads)`, at least float32.
        indices: the keys a selection picked; None for patterns without one.
        normalizer: with logsumexp, which is their sum: a pair (largest, log_sum) of tensors of its shape. `largest` is
            the largest score of each row, a constant to autograd; `log_sum`, which has the gradient of logsumexp, is
            the log of the row's sum of exp(score - largest). A weight is exp((score - largest) - log_sum): beside a
            score of 1e9 logsumexp itself has no digits left for the logarithm. A row without keys has -inf and 0;
            beside a NaN or an infinite score `largest` may be anything. From "torch", which does not tell the largest
            score, `largest` is logsumexp, and `log_sum` what its rounding left. None with sinks, which a merge would
            count once for each part.

    Example:
        >>> import torch
        >>> from anyattention import attend
        >>> x = torch.ones(1, 2, 1, 4)
        >>> result = attend(x, x, x, return_logsumexp=True)
        >>> result.logsumexp.shape, result.weights is None
        (torch.Size([1, 2, 1]), True)
        >>> largest, log_sum = result.normalizer
        >>> log_sum.exp().flatten()
        tensor([2., 2.])
    """

    output: Tensor
    weights: Tensor | None = None
    logsumexp: Tensor | None = None
    indices: Tensor | None = None
    normalizer: tuple[Tensor, Tensor] | None = None

    def to_dense(self) -> Tensor:
        """The weights of every pair, 0 where there is none, whatever the pattern: to look at, or to compare.

        Returns:
            `(batch, heads, query_length, key_length)`, or their mean over heads `(batch, query_length, key_length)`
            where that was asked for; over a Graph without batch the same without it. Those of a selection are always
            of all heads. Differentiable. The weights of an edge that a Graph repeats are added.

        Raises:
            InvalidInputError: no weights were asked for, or these are not the ones that `attend` returned: copies, or
                from a compiled function, where the pairs' places are not known.
            OutOfMemoryError: they would not fit in memory.

        Cost: the memory of all pairs.

        Example:
            >>> import torch
            >>> from anyattention import Window, attend
            >>> x = torch.zeros(1, 3, 1, 4)
            >>> attend(x, x, x, Window(1, 0), return_weights=True).to_dense()
            tensor([[[1.0000, 0.0000, 0.0000],
                     [0.5000, 0.5000, 0.0000],
                     [0.0000, 0.5000, 0.5000]]])
        """
        return _dense(self.weights)


class AttentionOutput(NamedTuple):
    """What a module returns: `output, weights = module(query, key, value, mask)`.

    Attributes:
        output: `(batch, query_length, d_model)`, over a graph `(..., nodes, d_model)`.
        weights: probabilities before dropout, or None where they were not asked for.

    Example:
        >>> import torch
        >>> from anyattention.nn import ScaledDotProductAttention
        >>> output, weights = ScaledDotProductAttention(4, 2).eval()(torch.ones(1, 2, 4))
        >>> weights
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """

    output: Tensor
    weights: Tensor | None = None

    def to_dense(self) -> Tensor:
        """The weights of every pair, 0 where there is none; see `AttentionResult.to_dense`."""
        return _dense(self.weights)


class EquivariantOutput(NamedTuple):
    """What `EquivariantAttention.equivariant_forward` returns.

    Attributes:
        output: scalar features `(..., points, d_model)`, which no motion of the points changes.
        positions: `(..., points, dim)`, which move with the points.
        vectors: `(..., points, channels, dim)`, which rotate with the points.
        weights: probabilities before dropout, or None where they were not asked for.

    Example:
        >>> import torch
        >>> from anyattention.nn import EquivariantAttention
        >>> layer = EquivariantAttention(8, 2)
        >>> result = layer.equivariant_forward(torch.zeros(4, 8), torch.randn(4, 3))
        >>> result.positions.shape, result.vectors.shape
        (torch.Size([4, 3]), torch.Size([4, 2, 3]))
    """

    output: Tensor
    positions: Tensor
    vectors: Tensor
    weights: Tensor | None = None


class HeterogeneousOutput(NamedTuple):
    """What `HeterogeneousGraphAttention` returns.

    Attributes:
        output: `(nodes, d_model)` of each type of nodes that relations end in.
        weights: probabilities before dropout by relation, `(edges,)` or `(edges, heads)`, or None where they were not
            asked for.
        relation_weights: the learned weight of each relation among those that end in its type, 0-d; None where the
            softmax goes over all edges of a node.

    Example:
        >>> import torch
        >>> from anyattention.nn import HeterogeneousGraphAttention
        >>> layer = HeterogeneousGraphAttention(4, 2, in_features={"a": 3}, relations=[("a", "to", "a")])
        >>> output, weights, _ = layer({"a": torch.ones(2, 3)}, {("a", "to", "a"): torch.tensor([[0], [1]])})
        >>> output["a"].shape, weights
        (torch.Size([2, 4]), None)
    """

    output: Mapping[str, Tensor]
    weights: Mapping[tuple[str, str, str], Tensor] | None = None
    relation_weights: Mapping[tuple[str, str, str], Tensor] | None = None


class MemoryOutput(NamedTuple):
    """What `MemoryAttention.memory_forward` returns.

    Attributes:
        output: `(..., d_model)`.
        weights: probabilities of the chosen memories before dropout, `(..., heads, k)`, 0 in an unused slot.
        indices: the ids of the chosen memories, int64 `(..., heads, k)`, the best first; -1 in an unused slot.

    Example:
        >>> import torch
        >>> from anyattention.nn import MemoryAttention
        >>> memory = MemoryAttention(2, 1, project=False, k=1)
        >>> ids = memory.append(torch.eye(2), 5 * torch.eye(2))
        >>> memory.memory_forward(torch.tensor([[0.0, 1.0]]))
        MemoryOutput(output=tensor([[0., 5.]]), weights=tensor([[[1.]]]), indices=tensor([[[1]]]))
    """

    output: Tensor
    weights: Tensor
    indices: Tensor


class SearchResult(NamedTuple):
    """What a search of an index returns: `ids, scores = index.search(queries, k)`.

    Attributes:
        ids: int64 `(queries, k)`, the best first; -1 where there are fewer than k.
        scores: `(queries, k)`, how alike they are; -inf beside an id of -1.

    Example:
        >>> import torch
        >>> from anyattention.memory import ExactIndex
        >>> index = ExactIndex(2)
        >>> ids = index.append(torch.eye(2))
        >>> index.search(torch.tensor([[3.0, 4.0]]), k=2)
        SearchResult(ids=tensor([[1, 0]]), scores=tensor([[4., 3.]]))
    """

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class AttentionCache:
    """What `module.cached_forward` keeps for `module.backward`.

    Attributes:
        inputs: the floating-point tensors among the arguments, by name, cut from the caller's graph.
        output: the module's output, connected to `inputs` and to the parameters; by type where that is.

    Example:
        >>> import torch
        >>> from anyattention.nn import MultiHeadAttention
        >>> _, cache = MultiHeadAttention(4, 2).cached_forward(torch.ones(1, 3, 4))
        >>> list(cache.inputs), cache.output.shape
        (['query'], torch.Size([1, 3, 4]))
    """

    inputs: Mapping[str, Tensor]
    output: Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class AttentionGradients:
    """What `module.backward` returns.

    Attributes:
        inputs: the gradient of each tensor in `AttentionCache.inputs`, by the same name and of its shape.
        parameters: one flat vector in the order of `module.get_parameters()`.

    Example:
        >>> import torch
        >>> from anyattention.nn import MultiHeadAttention
        >>> module = MultiHeadAttention(4, 2)
        >>> _, cache = module.cached_forward(torch.ones(1, 3, 4))
        >>> gradients = module.backward(torch.ones(1, 3, 4), cache)
        >>> gradients.inputs["query"].shape, len(gradients.parameters) == module.parameter_count()
        (torch.Size([1, 3, 4]), True)
    """

    inputs: Mapping[str, Tensor]
    parameters: Tensor
