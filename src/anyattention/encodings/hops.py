"""How many edges a node has, and how many steps lead from one to another."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention._checks import require_count, require_memory
from anyattention.ambient import lasting, shielded
from anyattention.ops import edge_sum
from anyattention.patterns import Graph
from anyattention.patterns.graph_arrays import require_one_set

__all__ = ["degrees", "hop_distances"]

# Numbers that are held at a time: those of all nodes for some starts.
_NUMBERS = 2**24


def degrees(graph: Graph) -> Tensor:
    """The number of edges to and from each node.

    Args:
        graph: between nodes of one set. Duplicates count each, a self-loop once either way.

    Returns:
        `(nodes, 2)` int64: edges to the node, which it attends along, and edges from it. They are indices of learned
        features (`nn.Embedding`), or features as `degrees(graph).log1p()`.

    Raises:
        InvalidInputError: not a Graph.
        GraphStructureError: queries and keys are different sets.

    Source: Ying et al., 2021 (Graphormer, centrality encoding), section 3.1.1.

    Example:
        >>> degrees(Graph.from_edge_index(torch.tensor([[0, 1], [2, 2]]), num_nodes=3))
        tensor([[0, 1],
                [0, 1],
                [2, 0]])
    """
    require_one_set(graph)
    with lasting(graph.edge_index):
        return torch.stack([graph.query_offsets.diff(), graph.key_offsets.diff()], dim=1)


def hop_distances(graph: Graph, max_distance: int) -> Tensor:
    """The number of edges of the shortest path between any two nodes, up to a largest one.

    Args:
        graph: between nodes of one set; several joined graphs too, between which no path leads.
        max_distance: at least 1.

    Returns:
        `(nodes, nodes)` int64: entry (i, j) is the distance of query i and key j, along edges from j to i: 0 on the
        diagonal, max_distance + 1 where it is larger or there is no path.

    Raises:
        InvalidInputError: not a Graph, or max_distance is out of range.
        GraphStructureError: queries and keys are different sets.
        OutOfMemoryError: nodes x nodes numbers do not fit.

    Cost: O(max_distance x nodes x edges) time, O(nodes^2) memory.

    Source: Ying et al., 2021 (Graphormer, spatial encoding), section 3.1.2.

    Example:
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 3]]), num_nodes=4)
        >>> hop_distances(path, 2)
        tensor([[0, 3, 3, 3],
                [1, 0, 3, 3],
                [2, 1, 0, 3],
                [3, 2, 1, 0]])
    """
    require_one_set(graph)
    largest = require_count("max_distance", max_distance, 1)
    nodes = graph.num_queries
    require_memory(8 * nodes * nodes, "the distances", graph.device)
    with shielded():
        ones = torch.ones(graph.num_edges, 1, dtype=torch.float32, device=graph.device)
        found = torch.full((nodes, nodes), largest + 1, dtype=torch.int64, device=graph.device)
        width = max(1, _NUMBERS // max(1, nodes))
        for first in range(0, nodes, width):
            part = found[:, first : first + width]
            part.diagonal(-first).fill_(0)
            frontier = (part == 0).to(torch.float32)
            for distance in range(1, largest + 1):
                reached = edge_sum(ones, frontier.unsqueeze(1), graph).squeeze(1)
                is_new = (reached > 0) & (part > largest)
                if not is_new.any():
                    break
                part[is_new] = distance
                frontier = is_new.to(torch.float32)
        return found
