"""Graphs of points: each attends to those within a radius, or to the nearest ones by a measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from anyattention.geometry.nearest import nearest_neighbours
from anyattention.geometry.neighbours import radius_neighbours
from anyattention.geometry.products import Index, Measure
from anyattention.patterns.edges import EdgePattern
from anyattention.patterns.graph_arrays import neighbour_arrays

if TYPE_CHECKING:
    from anyattention.patterns.graph import Graph

__all__ = ["PointPattern"]


class PointPattern(EdgePattern):
    """The constructors of a Graph from points; abstract."""

    @classmethod
    def radius(
        cls,
        positions: Tensor,
        r: float,
        batch: Tensor | None = None,
        *,
        cell: Tensor | None = None,
        periodic: bool | Sequence[bool] | None = None,
        queries: Tensor | None = None,
        query_batch: Tensor | None = None,
        max_neighbours: int | None = None,
    ) -> Graph:
        """Each point attends to all points at a distance of at most r, and not to itself.

            |(x_key - x_query) + shift @ cell| <= r

        Exact: compared in float64, the coordinates as they are, r rounded to their dtype first (as PyTorch does in
        `distance <= r`), so that a distance of exactly r is in. Without queries the graph is symmetric.

        Args:
            positions: `(points, dim)`, floating, finite: the keys, and the queries where none are given.
            r: the radius, above 0, in the positions' unit.
            batch: `(points,)` int64, the cloud of each point, from 0 and never falling; clouds do not see each other.
            cell: `(dim, dim)`, in each row a vector along which the points repeat, of any shape and shorter than r if
                need be; or `(clouds, dim, dim)`. Each image of a key is a neighbour of its own, a point's own images
                among them; `graph.shifts` tells them apart. Points may lie outside of the cell.
            periodic: which vectors of the cell repeat, all or one bool for each; all where a cell is given.
            queries: `(queries, dim)`, other points that attend to positions; one at a key's place attends to it.
            query_batch: `(queries,)` int64, the cloud of each query; together with batch.
            max_neighbours: raise where a query has more. Nothing is ever cut off.

        Returns:
            The Graph, on the positions' device, edges by query, then key, then shift; `shifts` where a cell is given,
            and r as `search_radius`. No points: no edges.

        Raises:
            InvalidInputError, DimensionMismatchError: points above 1e150, infinite or NaN, and what does not fit.
            GraphStructureError: more than max_neighbours; a batch that falls.
            MatrixOperationError: the vectors that repeat are not independent.
            MissingExtraError: vesin or scipy is not installed (the extra "geometry").

        Cost: O(points + edges) time and memory for one cloud in up to 3 dimensions (vesin's cell list); scipy's k-d
        tree for others, O(points log points + edges). On the CPU, whatever the device.

        Example:
            >>> import torch
            >>> from anyattention import Graph
            >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 0.0]])
            >>> Graph.radius(points, 5.0).edge_index
            tensor([[1, 0],
                    [0, 1]])
            >>> Graph.radius(points, 1.0, cell=torch.diag(torch.tensor([10.0, 10.0]))).shifts
            tensor([[-1,  0],
                    [ 1,  0]])
        """
        found = radius_neighbours(positions, r, batch, cell, periodic, queries, query_batch, max_neighbours)
        return _graph()(*neighbour_arrays(found, len(positions), positions.device), search_radius=float(r))

    @classmethod
    def nearest(
        cls,
        positions: Tensor,
        k: int,
        batch: Tensor | None = None,
        *,
        cell: Tensor | None = None,
        periodic: bool | Sequence[bool] | None = None,
        queries: Tensor | None = None,
        query_batch: Tensor | None = None,
        measure: Measure = "euclidean",
        index: Index | None = None,
    ) -> Graph:
        """Each point attends to the k nearest other points of its cloud; to all of them where there are fewer.

            euclidean: least |x_query - x_key|,   cosine: largest x_query . x_key / (|x_query| |x_key|),
            dot: largest x_query . x_key

        Distances are those of `radius`; cosines are compared in float64 as distances of the points at length 1.
        Products ("dot") are compared as they are summed in float32. Between equal ones the lower key, then the lower
        shift, is the nearer. Without queries no point is its own neighbour, whatever its product with itself.

        Args:
            positions: `(points, dim)`, as in `radius`; latent vectors of any dimension too.
            k: number of neighbours, at least 1. In a periodic cell every image counts.
            batch, cell, periodic, queries, query_batch: as in `radius`, which also raises the same errors. A cell is
                for "euclidean" alone.
            measure: by which the nearest are chosen. A point at the origin has no direction: under "cosine" it has no
                neighbours and is nobody's.
            index: finds them in place of the exact search: an `interfaces.MemoryIndex`, or any object with
                `search(queries (n, dim), k) -> (ids (n, k) int64, scores)`, the best first. Its keys are the positions,
                id i the point i; -1 is left out. Its measure, where it has that attribute, has to be the one that is
                asked for. Not with batch or cell.

        Returns:
            The Graph, on the positions' device, edges by query, then key, then shift: not by distance.

        Raises:
            InvalidInputError: no measure; an index with a batch or a cell, of another measure, or whose ids are none.
            DimensionMismatchError: the index is of another dimension.

        Cost: in fewer than 10 dimensions, and in a cell, scipy's k-d tree, O(points log points + edges); ties at the
        k-th place look further. From 10 dimensions on, and for "dot", the products of every pair, O(queries x points x
        dim) time and O(points x dim + edges) memory: 10 is where these became the faster ones for 10,000 and 40,000
        Gaussian or uniform points (2 to 6 times, 8 times at 12), and about where for points near a surface of three
        dimensions. The neighbours are the same. On the CPU, whatever the device.

        Example:
            >>> import torch
            >>> from anyattention import Graph
            >>> points = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
            >>> Graph.nearest(points, 1).edge_index  # 0 and 2 are equally near to 1
            tensor([[1, 0, 1, 2],
                    [0, 1, 2, 3]])
            >>> latent = torch.tensor([[3.0, 0.0], [1.0, 0.1], [0.0, 2.0]])
            >>> Graph.nearest(latent, 1, measure="cosine").edge_index
            tensor([[1, 0, 1],
                    [0, 1, 2]])
        """
        found = nearest_neighbours(positions, k, batch, cell, periodic, queries, query_batch, measure, index)
        return _graph()(*neighbour_arrays(found, len(positions), positions.device))


def _graph() -> type[Graph]:
    from anyattention.patterns.graph import Graph

    return Graph
