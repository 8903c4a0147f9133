"""Labels of tables: the names of the classes, splits that a column gives, and splits that are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.training.columns import MISSING
from anyattention.training.data import Split
from anyattention.training.delimited import Table, counted, listed
from anyattention.training.reading import ReadOptions

__all__ = ["ReadLabels", "class_names_of", "draw_split", "labels_of_table", "numbered", "split_of_masks", "told_labels"]

# Of each class; the others are for the test.
_TRAIN, _VALIDATION = 0.6, 0.2
_WORDS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
_PARTS = ("train", "validation", "test")


class ReadLabels(NamedTuple):
    """Labels, their classes, and the splits; what to tell, and what to print."""

    labels: Tensor
    class_names: tuple[str, ...]
    splits: tuple[Split, ...]
    notes: tuple[str, ...]
    facts: tuple[str, ...]


def labels_of_table(table: Table, options: ReadOptions, classes: tuple[str, ...] | None) -> ReadLabels:
    """The labels of a table and the split: its own, or a drawn one.

    Args:
        table: of the nodes.
        options: with the seed of what is drawn.
        classes: those of the training, to score a prediction; the labels may be missing then, and no split is read.
            None to train.

    Raises:
        InvalidInputError: to train, no column "label", fewer than two classes, too few labels, or a wrong split.
    """
    if classes is not None:
        values = table.columns.get("label", [""] * table.num_rows)
        unknown = Counter(value for value in values if value and value not in classes)
        told = f"{table.place('label')}: {listed(sorted(unknown))} in {counted(sum(unknown.values()), 'row')} is no "
        notes = (told + "class of the training; these labels are not compared.",) if unknown else ()
        return ReadLabels(numbered(values, classes), classes, (), notes, ())
    values = table.require("label", "it has the classes to learn, and is empty where a node's class is unknown")
    class_names = class_names_of(values)
    if len(class_names) < 2:
        raise table.fault("label", None, "at least two classes", listed(class_names))
    labels = numbered(values, class_names)
    if "split" in table.columns:
        split, notes = _split_of_column(table, table.columns["split"], labels, options.seed)
        how = "as the column 'split' says"
    else:
        split, notes = draw_split(labels, options.seed, table.place("label")), ()
        how = f"drawn by --seed {options.seed}, 60%, 20% and 20% of each class"
    _require_every_class(split, labels, class_names, table)
    facts = told_labels(labels, class_names, (split,), how)
    odd = [name for name in class_names if name in MISSING]
    if odd:
        told = (
            f"{table.place('label')}: {listed(odd)} is a class like others. Where a label is unknown, leave it empty."
        )
        notes = (*notes, told)
    return ReadLabels(labels, class_names, (split,), notes, facts)


def told_labels(labels: Tensor, class_names: Sequence[str], splits: Sequence[Split], how: str) -> tuple[str, ...]:
    """The classes and the parts of the (first) split in sentences, and how the split came about."""
    counts = labels[labels >= 0].bincount(minlength=len(class_names)).tolist()
    shown = [f"{name} ({count:,})" for name, count in zip(class_names, counts, strict=True)]
    more = f" and {len(shown) - 10:,} more" if len(shown) > 10 else ""
    unknown = int((labels < 0).sum())
    train, validation, test = map(len, splits[0])
    return (
        f"{len(class_names):,} classes: {', '.join(shown[:10])}{more}"
        + (f"; {counted(unknown, 'node')} without a label." if unknown else "."),
        f"{train:,} labels are for the training, {validation:,} for the validation and {test:,} for the test, {how}."
        + (f" There are {len(splits)} such splits." if len(splits) > 1 else ""),
    )


def class_names_of(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes of labels, of which an empty one is unknown: in the order of the numbers, if all are, else as text.

    Example:
        >>> class_names_of(["10", "", "9", "10"])
        ('9', '10')
    """
    names = sorted(set(labels) - {""})
    if all(name.isascii() and name.isdigit() and len(name) < 19 for name in names):
        names.sort(key=lambda name: (int(name), name))
    return tuple(names)


def numbered(labels: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """The number of each label among the classes `(nodes,)` int64; -1 where it is empty or none of them."""
    places = {name: place for place, name in enumerate(class_names)}
    return torch.tensor([places.get(label, -1) for label in labels], dtype=torch.int64, device="cpu")


def _split_of_column(table: Table, words: Sequence[str], labels: Tensor, seed: int) -> tuple[Split, tuple[str, ...]]:
    """The split that a table's column "split" gives, and what is to be told of it.

    Without any node for the validation, a quarter of the training nodes of each class becomes it.

    Raises:
        InvalidInputError: an unknown word, a node without a label in a part, or no node for the training or the test.
    """
    parts = np.array([_WORDS.get(word.lower(), -1) for word in words], dtype=np.int64)
    known = labels.numpy() >= 0
    for row in np.flatnonzero(parts < 0).tolist():
        if words[row]:
            raise table.fault("split", row, "train, validation (or val), test, or nothing", repr(words[row]))
    for row in np.flatnonzero((parts >= 0) & ~known).tolist():
        raise table.fault("split", row, "nothing for a node without a label", repr(words[row]))
    notes = []
    if not (parts == 1).any() and (parts == 0).any():
        moved = _shares(np.where(parts == 0, labels.numpy(), -1), seed, 0.75, 0.25)[1]
        parts[moved] = 1
        notes.append(
            f"{table.place('split')}: no node is for the validation, so {len(moved):,} of the training nodes are, a "
            "quarter of each class, drawn by --seed."
        )
    for part, name in enumerate(_PARTS):
        if not (parts == part).any():
            hint = "without the column `train` draws the parts"
            raise table.fault("split", None, f"at least one node for {name}", "none", hint=hint)
    unused = int((known & (parts < 0)).sum())
    if unused:
        notes.append(f"{table.place('split')}: {counted(unused, 'node')} with a label in no part: not used.")
    return Split(*(torch.from_numpy(np.flatnonzero(parts == part)) for part in range(3))), tuple(notes)


def split_of_masks(masks: Mapping[str, np.ndarray], labels: Tensor) -> Split:
    """A split of masks (or counts) over the nodes, by the names of its parts; a node is in one part, once.

    Raises:
        InvalidInputError: a node in two parts, one without a label, or an empty part.
    """
    total = np.sum([mask.astype(np.int64) for mask in masks.values()], axis=0)
    if (total > 1).any():
        raise InvalidInputError(
            argument="splits",
            expected="each node in one part, once",
            actual=f"node {int(np.argmax(total > 1))} repeated",
        )
    for key, mask in masks.items():
        if not mask.any():
            raise InvalidInputError(argument=key, expected="at least one node", actual="none")
        if mask[labels.numpy() == -1].any():
            raise InvalidInputError(argument=key, expected="labelled nodes", actual="a node without a label")
    return Split(*(torch.from_numpy(np.flatnonzero(mask)) for mask in masks.values()))


def draw_split(labels: Tensor, seed: int, source: str) -> Split:
    """A split of the labelled nodes, class by class: 60% for the training, 20% for the validation, 20% for the test.

    A class has at least one node in the training.

    Args:
        labels: `(nodes,)` int64, -1 where it is unknown.
        seed: the same gives the same split.
        source: what is named in an error.

    Raises:
        InvalidInputError: so few labels that a part is empty.
    """
    parts = _shares(labels.numpy(), seed, _TRAIN, _VALIDATION)
    for part, nodes in zip(_PARTS, parts, strict=True):
        if not len(nodes):
            raise InvalidInputError(
                argument=source,
                expected=f"labels enough that some can be drawn for {part}, beside one of each class to train on",
                actual=f"{int((labels >= 0).sum())} labels of {int(labels.max()) + 1} classes",
            )
    return Split(*(torch.from_numpy(np.sort(nodes)) for nodes in parts))


def _require_every_class(split: Split, labels: Tensor, class_names: Sequence[str], table: Table) -> None:
    """Raise InvalidInputError, which names the first line that has it, where no training label is of a class."""
    untold = set(range(len(class_names))) - set(labels[split.train].tolist())
    if untold:
        label = min(untold)
        row = int((labels == label).nonzero()[0])
        raise table.fault(
            "label",
            row,
            "at least one training node of each class",
            f"none of {listed([class_names[label]])}",
            hint="leave the label empty where a class is not to be learnt",
        )


def _shares(labels: np.ndarray, seed: int, train: float, validation: float) -> list[np.ndarray]:
    """The nodes of three parts, of each class the same shares, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator, device="cpu").numpy()
    parts: list[list[np.ndarray]] = [[], [], []]
    owed = 0.0
    for label in range(int(labels.max(initial=-1)) + 1):
        nodes = order[labels[order] == label]
        first = max(1, round(train * len(nodes)))
        # What rounding takes from the validation of one class is given back in another.
        exact = validation / (1 - train) * (len(nodes) - first) + owed
        second = min(max(round(exact + 1e-9), 0), len(nodes) - first)
        owed = exact - second
        for part, own in zip(
            parts, (nodes[:first], nodes[first : first + second], nodes[first + second :]), strict=True
        ):
            part.append(own)
    return [np.concatenate(part) if part else order[:0] for part in parts]
