"""Features of nodes that have none: where they are in the graph, told by random walks and names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from anyattention.nn.feature_rows import sparse_csr
from anyattention.patterns import Graph

__all__ = ["STRUCTURE_WIDTH", "structure_features"]

_SIGNS = 128
_STEPS = (2, 4)
STRUCTURE_WIDTH = _SIGNS * len(_STEPS) + 1
"""Number of features of `structure_features`."""


def structure_features(graph: Graph, names: Sequence[str]) -> Tensor:
    """Features of the structure alone.

        signs_i = 128 numbers of 1 and -1, drawn by a hash of the node's name
        walk(t) = (D^-1 (A + A^T))^t signs, each row divided by its root mean square
        features = [walk(2), walk(4), log(1 + degree) / 8]

    Row i of walk(t) is a random projection of where a walk of t steps from node i ends, so that nodes with the same
    surroundings have similar rows. It depends on names and edges and on nothing else: not on the order of the nodes,
    and little on what is far away, so that a graph that has grown gives its old nodes nearly the old features.

    Args:
        graph: over the nodes; edges count in both directions.
        names: of the nodes, different ones.

    Returns:
        `(nodes, 257)` float32.

    Cost: O((nodes + edges) x 128).

    Source: random projections of powers of the walk, Chen et al., 2019 (FastRP).

    Example:
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), num_nodes=2).with_self_loops()
        >>> structure_features(graph, ["a", "b"]).shape
        torch.Size([2, 257])
    """
    count = len(names)
    both = Graph.from_edge_index(torch.cat([graph.edge_index, graph.edge_index.flip(0)], 1), count)
    degrees = both.query_offsets.diff()
    shares = torch.repeat_interleave(1.0 / degrees.clamp(min=1), degrees).float()
    walk = sparse_csr(both.query_offsets, both.keys_by_query, shares, (count, count))
    x, parts = _signs(names), []
    for step in range(1, max(_STEPS) + 1):
        x = walk @ x
        if step in _STEPS:
            parts.append(x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12))
    return torch.cat([*parts, (degrees[:, None].float().log1p() / 8)], 1)


def _signs(names: Sequence[str]) -> Tensor:
    digests = b"".join(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_SIGNS // 8).digest() for name in names
    )
    bits = np.unpackbits(np.frombuffer(digests, np.uint8)).reshape(len(names), _SIGNS)
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)
