"""One graph attention call after its checks: what every implementation of it receives.

Axes: ... batch or nothing, N queries, M keys, E edges, H heads, G key heads, D head_dim, C value_dim, F edge_dim.
"""

from dataclasses import dataclass

from torch import Tensor

from anyattention.ops.arguments import Aggregation
from anyattention.patterns import Graph
from anyattention.scores import EdgeFeatures, Score

__all__ = ["GraphCall"]


@dataclass(frozen=True, eq=False)
class GraphCall:
    """Checked arguments of graph attention.

    Attributes:
        query, key, value: `(..., N, H, D)`, `(..., M, G, D)`, `(..., M, G, C)`, one dtype and device; G divides H.
        graph: the pairs.
        score: how an edge is scored.
        edges: features `(E, F)` with their weights `(H, D, F)` and `(H, C, F)`, or None.
        mask: boolean `(E, 1)`, `(E, H)` or `(..., E, H)`; None allows every edge.
        bias: floating, shapes as the mask; None adds nothing.
        scale: the factor of the raw score.
        softcap: c in c tanh(score / c), or None.
        dropout: probability with which a weight is dropped.
        seed: 0-d int64, None without dropout.
        aggregation: "sum", "mean" or "max".
        normalize: softmax over a query's edges, or a sigmoid of each.
        needs_weights, needs_logsumexp: what to return besides the output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    graph: Graph
    score: Score
    edges: EdgeFeatures | None
    mask: Tensor | None
    bias: Tensor | None
    scale: float
    softcap: float | None
    dropout: float
    seed: Tensor | None
    aggregation: Aggregation
    normalize: bool
    needs_weights: bool
    needs_logsumexp: bool
