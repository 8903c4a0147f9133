"""Eigenvectors of a graph's Laplacian as positions of its nodes."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention._checks import Axes, require_count, require_floating, require_floating_dtype
from anyattention.ambient import shielded
from anyattention.errors import InvalidInputError, MatrixOperationError, MissingExtraError
from anyattention.patterns import Graph
from anyattention.patterns.graph_arrays import require_one_set
from anyattention.patterns.regular import require_generator
from anyattention.patterns.sizes import Sizes, graph_sizes, require_edges_within

__all__ = ["LaplacianEigenvectors", "laplacian_eigenvectors", "random_signs"]

# Above so many nodes few eigenvectors of a sparse matrix take less time than all of a dense one.
_MOST_DENSE = 1024
# Entries within this share of the largest count as equally large.
_TIE = 1e-6
# Eigenvalues so close to each other count as equal.
_SAME = 1e-10


class LaplacianEigenvectors(NamedTuple):
    """The result of `laplacian_eigenvectors`, smallest eigenvalue first.

    Attributes:
        vectors: `(nodes, k)`, of unit length in each graph.
        values: `(graphs, k)`, in [0, 2].
    """

    vectors: Tensor
    values: Tensor


def laplacian_eigenvectors(
    graph: Graph,
    k: int,
    *,
    sizes: Sizes | None = None,
    batch: Tensor | None = None,
    pad: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LaplacianEigenvectors:
    """The k smoothest eigenvectors of each graph's normalised Laplacian, but for the first.

        L = I - D^(-1/2) A D^(-1/2),   A = (number of edges i -> j + number of edges j -> i) / 2

    The first, of eigenvalue 0, is left out: in a connected graph it says only the degrees. A node without edges has the
    row 0. A graph of several components has the eigenvalue 0 once for each: with a vector that says the degrees in that
    component, larger components first; a lone node is a component. That of the largest is left out.

    An eigenvector's sign is arbitrary. Here the first of its largest entries is positive, so that a call gives the same
    numbers each time; but the same graph with its nodes in another order may get the other sign. Train with
    `random_signs`, or feed the network what has none: `vectors.abs()`, or f(v) + f(-v) (SignNet). Where an eigenvalue
    occurs several times, as in graphs with symmetries, any orthonormal vectors of its space may come, and no choice of
    signs makes them one.

    Args:
        graph: between nodes of one set. Directed edges count half either way.
        k: how many, at least 1, and below the number of nodes of each graph.
        sizes, batch: number of nodes of each graph, or the graph of each node `(nodes,)`, where several are joined.
        pad: take graphs of k nodes or fewer too, with 0 for the vectors and values that they lack.
        dtype: of the result; computed in float64.

    Returns:
        LaplacianEigenvectors(vectors `(nodes, k)`, values `(graphs, k)`), constant: nothing has derivatives.

    Raises:
        InvalidInputError, DimensionMismatchError: an argument does not fit, or k is too large.
        GraphStructureError: queries and keys are different sets, an edge from one graph to another, or a batch that
            falls.
        MatrixOperationError: scipy finds no eigenvectors of a graph of more than 1,024 nodes.
        MissingExtraError: there is such a graph, and scipy is not installed (the extra "graphs").

    Cost: a dense decomposition, O(nodes^3), for each graph of up to 1,024 nodes, those of one size together, and where
    k is half of the nodes or more. Others are cut into their components: those of up to 1,024 nodes are dense, the rest
    goes to scipy's Lanczos method, some hundred products of O(edges + nodes x k) each, until it finds no more.

    Source: Dwivedi et al., 2020; Lim et al., 2023 (SignNet).

    Example:
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=3)
        >>> vectors, values = laplacian_eigenvectors(path, 1)
        >>> vectors.flatten().abs().round(decimals=4), values
        (tensor([0.7071, 0.0000, 0.7071]), tensor([[1.]]))
    """
    require_one_set(graph)
    k = require_count("k", k, 1)
    require_floating_dtype("dtype", dtype)
    own = graph_sizes(graph.num_queries, sizes, batch)
    if not pad and min(own, default=k + 1) <= k:
        number = next(number for number, size in enumerate(own) if size <= k)
        raise InvalidInputError(
            argument="k",
            expected=f"below {own[number]}, the nodes of graph {number}",
            actual=k,
            hint="pad=True gives 0 for what a graph lacks",
        )
    with shielded():
        require_edges_within(graph, own)
        matrix = _Adjacency(graph, own)
        vectors = torch.zeros(graph.num_queries, k, dtype=torch.float64, device="cpu")
        values = torch.zeros(len(own), k, dtype=torch.float64, device="cpu")
        for size in sorted({size for size in own if size > 1}):
            count = min(k, size - 1)
            for graphs in matrix.parts(size):
                # scipy finds not all, and most of them slower than all.
                if size <= _MOST_DENSE or 2 * count >= size:
                    found, of = _dense(matrix, graphs, size, count)
                else:
                    found, of = _sparse(matrix, graphs, size, count)
                nodes = matrix.starts[graphs, None] + torch.arange(size, device="cpu")
                vectors[nodes, :count] = _with_signs(of)
                values[graphs, :count] = found.clamp(0.0, 2.0)
        device = graph.device
        return LaplacianEigenvectors(vectors.to(device, dtype), values.to(device, dtype))


def random_signs(
    vectors: Tensor,
    *,
    sizes: Sizes | None = None,
    batch: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Eigenvectors with random signs, one for each graph and vector: for each step of training, so that none is learnt.

    Args:
        vectors: `(nodes, k)`, floating.
        sizes, batch: number of nodes of each graph, or the graph of each node `(nodes,)`, where several are joined.
        generator: a torch.Generator of the CPU; None is PyTorch's own.

    Returns:
        `(nodes, k)`.

    Raises:
        InvalidInputError, DimensionMismatchError: an argument does not fit.

    Source: Dwivedi et al., 2020.

    Example:
        >>> random_signs(torch.ones(3, 1), generator=torch.Generator().manual_seed(0)).flatten().abs()
        tensor([1., 1., 1.])
    """
    require_floating("vectors", vectors)
    Axes().bind("vectors", vectors, "nodes k")
    require_generator(generator)
    own = torch.tensor(graph_sizes(len(vectors), sizes, batch), dtype=torch.int64, device="cpu")
    drawn = torch.randint(2, (len(own), vectors.shape[1]), generator=generator, device="cpu", dtype=torch.int64)
    signs = (2 * drawn - 1).repeat_interleave(own, dim=0)
    return vectors * signs.to(vectors.device, vectors.dtype)


class _Adjacency:
    """D^(-1/2) A D^(-1/2) of each graph, on the CPU in float64, by its entries."""

    def __init__(self, graph: Graph, sizes: tuple[int, ...]) -> None:
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.graph_of = torch.arange(len(sizes), device="cpu").repeat_interleave(self.sizes)
        edges = graph.edge_index.cpu()
        self.rows, self.columns = torch.cat([edges, edges.flip(0)], dim=1)
        halves = torch.full((len(self.rows),), 0.5, dtype=torch.float64, device="cpu")
        degree = torch.zeros(graph.num_queries, dtype=torch.float64, device="cpu").index_add_(0, self.rows, halves)
        self.has_edges = degree > 0
        self.roots = torch.where(self.has_edges, degree, 1.0).sqrt()
        self.entries = 0.5 / (self.roots[self.rows] * self.roots[self.columns])
        self.components = _components(graph.num_queries, self.rows, self.columns)
        self.num_components = torch.bincount(self.graph_of[self.components.unique()], minlength=len(sizes))

    def parts(self, size: int) -> list[Tensor]:
        """The graphs of a size: as many at a time as one large graph would take memory for."""
        graphs = (self.sizes == size).nonzero()[:, 0]
        return list(graphs.split(max(1, (_MOST_DENSE // size) ** 2)))

    def zeros(self, graph: Tensor, size: int, most: int) -> Tensor:
        """A graph's eigenvectors of eigenvalue 0, `(size, most or fewer)`: D^(1/2) 1 in each component."""
        nodes = self.starts[graph] + torch.arange(size, device="cpu")
        _, of_node, sizes = self.components[nodes].unique(return_inverse=True, return_counts=True)
        largest_first = sizes.argsort(descending=True, stable=True)[:most]
        vectors = (of_node[:, None] == largest_first) * self.roots[nodes, None]
        return vectors / vectors.norm(dim=0)

    def dense(self, graphs: Tensor, size: int) -> Tensor:
        """The Laplacians of graphs of one size, `(graphs, size, size)`."""
        place, rows, columns, entries = self._of(graphs)
        flat = torch.zeros(len(graphs) * size * size, dtype=torch.float64, device="cpu")
        flat.index_add_(0, (place * size + rows) * size + columns, -entries)
        found = flat.view(len(graphs), size, size)
        nodes = self.starts[graphs, None] + torch.arange(size, device="cpu")
        found.diagonal(dim1=1, dim2=2).add_(self.has_edges[nodes].to(torch.float64))
        return found

    def sparse(self, graphs: Tensor, size: int) -> Any:
        """I + D^(-1/2) A D^(-1/2) of a graph, whose largest eigenvalues are the Laplacian's smallest, for scipy."""
        _, rows, columns, entries = (each.numpy() for each in self._of(graphs))
        sparse = _scipy("scipy.sparse")
        nodes = self.starts[graphs] + torch.arange(size, device="cpu")
        # A node without edges has 0 in the Laplacian.
        ones = np.where(self.has_edges[nodes].numpy(), 1.0, 2.0)
        return sparse.csr_array((entries, (rows, columns)), shape=(size, size)) + sparse.diags_array(ones)

    def _of(self, graphs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The entries of some graphs: the graph's place among them, row and column in it, and the number."""
        place = torch.full((len(self.sizes),), -1, dtype=torch.int64, device="cpu")
        place[graphs] = torch.arange(len(graphs), device="cpu")
        graph = self.graph_of[self.rows]
        is_wanted = place[graph] >= 0
        graph, rows, columns = graph[is_wanted], self.rows[is_wanted], self.columns[is_wanted]
        starts = self.starts[graph]
        return place[graph], rows - starts, columns - starts, self.entries[is_wanted]


def _components(num_nodes: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The smallest node of each node's component, of edges that go both ways."""
    smallest = torch.arange(num_nodes, device="cpu")
    while True:
        # The smallest of the neighbours', and then its own: so paths are halved in each round.
        reached = smallest.scatter_reduce(0, rows, smallest[columns], "amin")
        reached = reached.scatter_reduce(0, smallest, reached, "amin")
        reached = reached[reached]
        if torch.equal(reached, smallest):
            return smallest
        smallest = reached


def _dense(matrix: _Adjacency, graphs: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Values `(graphs, count)` and vectors `(graphs, size, count)` of graphs of one size."""
    values, vectors = torch.linalg.eigh(matrix.dense(graphs, size))
    for place in (matrix.num_components[graphs] > 1).nonzero()[:, 0].tolist():
        zeros = matrix.zeros(graphs[place], size, count + 1)
        values[place, : zeros.shape[1]], vectors[place, :, : zeros.shape[1]] = 0.0, zeros
    return values[:, 1 : count + 1], vectors[..., 1 : count + 1]


def _sparse(matrix: _Adjacency, graph: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """The same of one graph, component by component: Lanczos' method alone would miss some of equal eigenvalues."""
    whole, of_zero = matrix.sparse(graph, size), matrix.zeros(graph, size, count + 1).numpy()
    lacking = count + 1 - of_zero.shape[1]
    values, vectors = [np.zeros(of_zero.shape[1])], [of_zero]
    for zero in of_zero.T:
        nodes = np.flatnonzero(zero)
        if lacking > 0 and len(nodes) > 1:
            some, of_nodes = _of_component(whole[nodes][:, nodes], zero[nodes], min(lacking, len(nodes) - 1))
            own = np.zeros((size, len(some)))
            own[nodes] = of_nodes
            values.append(some)
            vectors.append(own)
    found = np.concatenate(values)
    order = np.argsort(found, kind="stable")[1 : count + 1]
    return torch.from_numpy(found[order])[None], torch.from_numpy(np.column_stack(vectors)[:, order])[None]


def _of_component(matrix: Any, zero: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest eigenvalues of a component's Laplacian but for 0, and their vectors, from 2 less the Laplacian."""
    size = len(zero)
    if size <= _MOST_DENSE or 2 * count >= size:
        values, vectors = np.linalg.eigh(2.0 * np.eye(size) - matrix.toarray())
        return values[1 : count + 1], vectors[:, 1 : count + 1]
    random, asked = np.random.default_rng(0), count
    values, vectors = np.zeros(0), np.zeros((size, 0))
    while True:
        known = np.column_stack([zero, vectors])
        more = _largest(matrix, known, asked, random.standard_normal(size))
        # Lanczos' method sees one vector of a repeated eigenvalue, and others by rounding alone. So it goes on, without
        # those that it has, until the next is no smaller.
        if len(values) and 2.0 - np.vdot(more, matrix @ more) >= values[count - 1] - _SAME:
            return values[:count], vectors[:, :count]
        basis = np.linalg.qr(np.column_stack([known, more]))[0][:, 1:]
        values, turn = np.linalg.eigh(2.0 * np.eye(basis.shape[1]) - basis.T @ (matrix @ basis))
        vectors, asked = basis @ turn, 1


def _largest(matrix: Any, known: np.ndarray, count: int, start: np.ndarray) -> np.ndarray:
    """Eigenvectors of the largest eigenvalues of a matrix from 0 to 2, besides those that are known."""
    linalg = _scipy("scipy.sparse.linalg")

    def product(vector: np.ndarray) -> np.ndarray:
        # The known ones go below 0.
        return matrix @ vector - 2.0 * (known @ (known.T @ vector))

    others = linalg.LinearOperator(matrix.shape, matvec=product, dtype=np.float64)
    try:
        return linalg.eigsh(others, count, which="LA", v0=start)[1]
    except linalg.ArpackError as fault:
        raise MatrixOperationError(
            f"no eigenvectors of a graph of {matrix.shape[0]} nodes: {fault}", argument="graph"
        ) from fault


def _with_signs(vectors: Tensor) -> Tensor:
    """Vectors `(graphs, nodes, k)` whose first entry among the largest is positive."""
    sizes = vectors.abs()
    first = (sizes >= (1 - _TIE) * sizes.amax(1, keepdim=True)).to(torch.int64).argmax(1, keepdim=True)
    return vectors * vectors.gather(1, first).sign()


def _scipy(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise MissingExtraError(
            f"eigenvectors of graphs of more than {_MOST_DENSE} nodes need scipy: pip install 'anyattention[graphs]'",
            argument="graph",
        ) from missing
