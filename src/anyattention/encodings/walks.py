"""Random walks that come back, as features of the nodes they start from."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention._checks import require_count, require_floating_dtype
from anyattention.ambient import shielded
from anyattention.ops import edge_sum
from anyattention.patterns import Graph
from anyattention.patterns.graph_arrays import require_one_set
from anyattention.patterns.sizes import Sizes, graph_sizes, require_edges_within

__all__ = ["random_walk_probabilities"]

# Numbers that are held at a time: those of all nodes for some starts.
_NUMBERS = 2**24


def random_walk_probabilities(
    graph: Graph,
    steps: int,
    *,
    sizes: Sizes | None = None,
    batch: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """How likely a random walk from each node is back after 1, 2, ... steps.

        p_ik = (P^k)_ii,   P_ij = number of edges from i to j / number of edges from i

    A walk goes along an edge from its source to its target, each of a node's edges equally likely; one that comes to a
    node without edges ends.

    Args:
        graph: between nodes of one set.
        steps: how many, at least 1.
        sizes, batch: number of nodes of each graph, or the graph of each node `(nodes,)`, where several are joined: the
            walks from one node of each are computed together.
        dtype: of the result; computed in float64.

    Returns:
        `(nodes, steps)`, in [0, 1], constant: nothing has derivatives.

    Raises:
        InvalidInputError, DimensionMismatchError: an argument does not fit.
        GraphStructureError: queries and keys are different sets, an edge from one graph to another, or a batch that
            falls.

    Cost: O(steps x edges x nodes of the largest graph) time.

    Source: Dwivedi et al., 2022 (random walk positional encoding).

    Example:
        >>> pair_and_path = Graph.from_edge_index(torch.tensor([[0, 1, 2, 3, 3, 4], [1, 0, 3, 2, 4, 3]]), num_nodes=5)
        >>> random_walk_probabilities(pair_and_path, 2, sizes=[2, 3])[:, 1]
        tensor([1.0000, 1.0000, 0.5000, 1.0000, 0.5000])
    """
    require_one_set(graph)
    steps = require_count("steps", steps, 1)
    require_floating_dtype("dtype", dtype)
    own = graph_sizes(graph.num_queries, sizes, batch)
    with shielded():
        require_edges_within(graph, own)
        shares = 1.0 / graph.key_offsets.diff().to(torch.float64)
        weights = shares[graph.key_index].unsqueeze(-1)
        counts = torch.tensor(own, dtype=torch.int64, device=graph.device)
        nodes = torch.arange(graph.num_queries, device=graph.device)
        # The place of each node in its graph: walks from those of one place do not meet.
        places = nodes - (counts.cumsum(0) - counts).repeat_interleave(counts)
        largest, width = max(own, default=0), max(1, _NUMBERS // max(1, graph.num_queries))
        found = torch.zeros(graph.num_queries, steps, dtype=torch.float64, device=graph.device)
        for first in range(0, largest, width):
            starts = nodes[(places >= first) & (places < first + width)]
            columns = places[starts] - first
            shape = (graph.num_queries, min(width, largest - first))
            walks = torch.zeros(shape, dtype=torch.float64, device=graph.device)
            walks[starts, columns] = 1.0
            for step in range(steps):
                walks = edge_sum(weights, walks.unsqueeze(1), graph).squeeze(1)
                found[starts, step] = walks[starts, columns]
        return found.to(dtype)
