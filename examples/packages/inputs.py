"""What the network reads of a package: words, guesses of its section, and along each kind of link those of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention import Graph, HeterogeneousGraph, SampledHeterogeneousGraph, edge_sum
from anyattention.training.extras import import_demo
from examples.packages.data import Packages

__all__ = ["Batch", "Fold", "Inputs", "Link", "Relation", "Rows", "Table", "prepare_inputs", "product", "role_of"]

Relation = tuple[str, str, str]


class Rows(NamedTuple):
    """Rows of a sparse matrix: `graph` has an edge from a column to each row that has it, with `values` `(edges,)`."""

    graph: Graph
    values: Tensor


def product(rows: Rows, values: Tensor) -> Tensor:
    """The product of sparse rows and `(columns, width)`."""
    return edge_sum(rows.values[:, None], values[:, None], rows.graph)[:, 0]


class Table(NamedTuple):
    """A sparse matrix: row i has `columns[offsets[i]:offsets[i + 1]]`, int64, with as many `values`."""

    offsets: Tensor
    columns: Tensor
    values: Tensor
    num_columns: int

    def entries(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of some rows: the column of each entry, the place of its row among `nodes`, and its value."""
        counts = self.offsets.diff()[nodes]
        row = torch.arange(len(nodes)).repeat_interleave(counts)
        within = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        places = self.offsets[nodes][row] + within
        return self.columns[places], row, self.values[places]

    def rows(self, nodes: Tensor) -> Rows:
        """Some rows."""
        columns, row, values = self.entries(nodes)
        edges = torch.stack([columns, row])
        return Rows(Graph.from_edge_index(edges, num_queries=len(nodes), num_keys=self.num_columns), values)


class Link(NamedTuple):
    """What packages read along one relation: the words of the nodes at its other end, and who reads which of them."""

    words: Rows
    readers: Rows


class Fold(NamedTuple):
    """Packages to learn from, and by type guesses `(nodes, classes)` by one that has not seen their sections."""

    seeds: Tensor
    guesses: Mapping[str, Tensor]


class Batch(NamedTuple):
    """What a forward pass reads.

    Attributes:
        seeds: `(seeds,)`, the packages that are to be classified.
        own: by type the words of the seeds and of those that they attend to. The first packages are the seeds.
        links: by relation what these packages read.
        numbers: `(packages, numbers)`: their sizes and degrees.
        guesses: by type how probable each section is for the nodes of `own`, `(nodes, classes)`; packages have beside
            their own, `(packages, (1 + relations) classes)`, the mean along each relation. Or nothing.
        attended: by relation whom the seeds attend to, as numbers among the nodes of `own`.
        block: the edges along which they do, from these: each relation's sources are a type of its own, of its name.
    """

    seeds: Tensor
    own: Mapping[str, Rows]
    links: Mapping[Relation, Link]
    numbers: Tensor
    guesses: Mapping[str, Tensor]
    attended: Mapping[Relation, Tensor]
    block: HeterogeneousGraph


class Inputs(NamedTuple):
    """What batches are made of.

    Attributes:
        graph: the relations that end in packages.
        own: by type the words of each node, each row of length 1. A source or maintainer has those of its packages.
        read: by relation the words of its sources as they are summed: of a package, ones.
        links: by relation the nodes at the other ends, with a factor that makes the sum of their words a row of
            length 1.
        numbers: `(packages, numbers)` float32: sizes, and logarithms of the degrees, each with mean 0 and deviation 1.
        guesses: by type `(nodes, classes)`, how probable each section is, or nothing: `with_guesses` adds them.
        folds: of the packages to learn from, each with the guesses that are to be read of it. None without guesses.
    """

    graph: HeterogeneousGraph
    own: Mapping[str, Table]
    read: Mapping[Relation, Table]
    links: Mapping[Relation, Table]
    numbers: Tensor
    guesses: Mapping[str, Tensor]
    folds: Sequence[Fold]

    def whole_batch(self, seeds: Tensor) -> Batch:
        """The batch of some packages with all of their edges."""
        return self.batch(self.graph.sample({"package": seeds}, [-1]))

    def batch(self, sampled: SampledHeterogeneousGraph) -> Batch:
        """The batch of a sample of one hop: what packages attend to is sampled, the words that they read are not."""
        packages, count = sampled.nodes["package"], sampled.num_seeds["package"]
        links, guesses = {}, {kind: [each[sampled.nodes[kind]]] for kind, each in self.guesses.items()}
        for relation, table in self.links.items():
            sources, row, factors = table.entries(packages)
            read, places = sources.unique(return_inverse=True)
            graph = Graph.from_edge_index(torch.stack([places, row]), num_queries=len(packages), num_keys=len(read))
            links[relation] = Link(self.read[relation].rows(read), Rows(graph, factors))
            if guesses:
                counts = row.bincount(minlength=len(packages)).clamp(min=1)
                shares = Rows(graph, counts.to(factors).reciprocal()[row])
                guesses["package"].append(product(shares, self.guesses[relation[0]][read]))
        attended, edges, num_nodes = {}, {}, {"package": count}
        for relation, (sources, targets) in sampled.blocks[0].edge_index.items():
            attended[relation], places = sources.unique(return_inverse=True)
            num_nodes[relation[1]] = len(attended[relation])
            edges[role_of(relation)] = torch.stack([places, targets])
        own = {kind: self.own[kind].rows(nodes) for kind, nodes in sampled.nodes.items()}
        block = HeterogeneousGraph.from_edge_index(edges, num_nodes)
        together = {kind: torch.cat(each, 1) for kind, each in guesses.items()}
        return Batch(packages[:count], own, links, self.numbers[packages], together, attended, block)


def role_of(relation: Relation) -> Relation:
    """A relation whose sources are a type of its own."""
    return (relation[1], relation[1], relation[2])


def prepare_inputs(packages: Packages) -> Inputs:
    """What all batches are made of, without guesses.

    Raises:
        MissingExtraError: scipy, which scikit-learn brings, is not installed.
    """
    sparse = import_demo("scipy.sparse", "the sum of the words of neighbours")
    counts = packages.graph.num_nodes
    edges = {relation: each for relation, each in packages.graph.edge_index.items() if relation[2] == "package"}

    words = sparse.csr_matrix(
        (torch.ones(len(packages.words)).numpy(), packages.words.numpy(), packages.word_offsets.numpy()),
        (counts["package"], packages.num_words),
    )
    own, read, links, degrees = {"package": _unit_rows(words)}, {}, {}, []
    for relation, (sources, targets) in edges.items():
        shape = (counts["package"], counts[relation[0]])
        ones = torch.ones(len(sources)).numpy()
        adjacency = sparse.csr_matrix((ones, (targets.numpy(), sources.numpy())), shape)
        if relation[0] == "package":
            read[relation] = _table(words)
            links[relation] = _scaled(adjacency, _inverse_lengths(adjacency @ words))
            degrees.append(torch.from_numpy(adjacency.sum(1)).flatten().float().log1p())
        else:
            own[relation[0]] = read[relation] = _unit_rows(adjacency.T.tocsr() @ words)
            links[relation] = _table(adjacency)
    numbers = torch.cat([packages.sizes, torch.stack(degrees, 1)], 1)
    numbers = (numbers - numbers.mean(0)) / numbers.std(0).clamp(min=1e-6)
    return Inputs(HeterogeneousGraph.from_edge_index(edges, counts), own, read, links, numbers, {}, ())


def _unit_rows(matrix: Any) -> Table:
    return _scaled(matrix, _inverse_lengths(matrix))


def _inverse_lengths(matrix: Any) -> Tensor:
    """1 over the length of each row, 0 of a row of zeros."""
    squares = torch.from_numpy(matrix.multiply(matrix).sum(1)).flatten().float()
    return torch.where(squares > 0, squares.rsqrt(), torch.zeros_like(squares))


def _scaled(matrix: Any, factors: Tensor) -> Table:
    """A matrix with a factor for each row."""
    table = _table(matrix)
    return table._replace(values=table.values * factors.repeat_interleave(table.offsets.diff()))


def _table(matrix: Any) -> Table:
    offsets, columns = torch.from_numpy(matrix.indptr).long(), torch.from_numpy(matrix.indices).long()
    return Table(offsets, columns, torch.from_numpy(matrix.data), matrix.shape[1])
