"""Tables of edges: their ends, and the features that columns become."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from anyattention.training.columns import Column, measure_columns, not_used, read_columns
from anyattention.training.delimited import Table, counted
from anyattention.training.edges import ListedEdges
from anyattention.training.reading import ReadOptions

__all__ = ["ENDS", "edge_columns", "read_edges", "told_repeated"]

ENDS = ("source", "target")
"""Columns of a table of edges that have a meaning of their own."""


def edge_columns(
    table: Table, options: ReadOptions, columns: tuple[Column, ...] | None
) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """The columns of the edges' features, and what is to be told; columns: those of the training, None to train."""
    names = [name for name in table.columns if name not in ENDS]
    if columns is not None:
        return columns, not_used(table, names, columns)
    table.refuse_other_capitals(ENDS, options.ignored)
    return measure_columns(table, names, categories=options.categories, ignored=options.ignored)


def read_edges(
    table: Table, sources: Mapping[str, int], targets: Mapping[str, int], columns: tuple[Column, ...]
) -> tuple[ListedEdges, tuple[str, ...]]:
    """The edges between rows of the tables of nodes, with their features."""
    ends = np.empty((2, table.num_rows), dtype=np.int64)
    for place, (column, ids) in enumerate(zip(ENDS, (sources, targets), strict=True)):
        values = table.require(column)
        ends[place] = [ids.get(value, -1) for value in values]
        if (ends[place] < 0).any():
            row = int(np.argmax(ends[place] < 0))
            actual = repr(values[row]) if values[row] else "nothing"
            near = values[row].removesuffix(".0")
            hint = f"the nodes have {near!r}: write the column as whole numbers" if near in ids else None
            raise table.fault(column, row, "an id of the nodes", actual, hint=hint)
    if not columns:
        return ListedEdges(ends), ()
    features, notes = read_columns(table, columns)
    return ListedEdges(ends, features), notes


def told_repeated(table: Table, repeated: int, directed: bool) -> tuple[str, ...]:
    """What is to be told of edges that are listed again."""
    if not repeated:
        return ()
    how = "" if directed else ", either way round"
    return (f"{table.source}: {counted(repeated, 'edge')} listed again{how}: each counts once.",)
