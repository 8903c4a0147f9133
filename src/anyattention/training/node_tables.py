"""Tables of nodes: ids, and the features that columns become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention.training.columns import Column, measure_columns, not_used, read_columns
from anyattention.training.delimited import Table
from anyattention.training.features import Look, look_at, rows_normalised, to_sparse
from anyattention.training.reading import NodeReading, ReadOptions

__all__ = ["NOT_FEATURES", "ReadNodes", "ids_of_table", "read_nodes"]

NOT_FEATURES = ("id", "label", "split")
"""Columns of a table of nodes that have a meaning of their own."""


def ids_of_table(table: Table) -> dict[str, int]:
    """The row of each id.

    Raises:
        InvalidInputError: no row, an empty id, or one that is there twice.
    """
    values = table.require("id")
    if not values:
        raise table.fault(None, None, "at least one node", "none")
    ids = {name: row for row, name in enumerate(values)}
    if "" in ids:
        raise table.fault("id", list(values).index(""), "an id", "nothing")
    if len(ids) < len(values):
        first: dict[str, int] = {}
        for row, name in enumerate(values):
            if name in first:
                expected = f"each id once; {table.row_word} {table.rows[first[name]]} has it already"
                raise table.fault("id", row, expected, repr(name))
            first[name] = row
    return ids


class ReadNodes(NamedTuple):
    """Features of nodes, None where there is the structure alone; how they were read, what they are, what to tell."""

    features: Tensor | None
    columns: tuple[Column, ...]
    look: Look
    notes: tuple[str, ...]


def read_nodes(table: Table, options: ReadOptions, reading: NodeReading | None) -> ReadNodes:
    """The features of a table of nodes; reading: how that of the training was read, None to train."""
    names = [name for name in table.columns if name not in NOT_FEATURES]
    if reading is not None:
        if not reading.columns and reading.kind != "structure":
            raise table.fault(None, None, "arrays of features, as in the training", "a table")
        columns, look = reading.columns, Look(reading.kind, "the training had such")
        notes = not_used(table, names, columns)
    else:
        table.refuse_other_capitals(NOT_FEATURES, options.ignored)
        columns, notes = measure_columns(table, names, categories=options.categories, ignored=options.ignored)
        look = Look("structure", "there are no features") if not columns else _look_at_columns(table, columns)
    if look.kind == "structure":
        return ReadNodes(None, columns, look, notes)
    features, more = read_columns(table, columns, as_they_are=look.kind == "words")
    if look.kind == "words":
        return ReadNodes(rows_normalised(to_sparse(features)), columns, look, (*notes, *more))
    return ReadNodes(torch.from_numpy(features), columns, look, (*notes, *more))


def _look_at_columns(table: Table, columns: Sequence[Column]) -> Look:
    """What the features of columns are; numbers decide, where there are any."""
    features, _ = read_columns(table, columns, as_they_are=True)
    is_number = np.repeat([column.kind == "number" for column in columns], [column.width for column in columns])
    look = look_at(features)
    if is_number.any() and look.kind == "words":
        return look_at(features[:, is_number])
    return look
