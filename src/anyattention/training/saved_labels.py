"""Labels and splits of what `save_data` wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyattention.training.data import Split
from anyattention.training.delimited import counted, listed
from anyattention.training.reading import Reading, ReadOptions
from anyattention.training.saved_data import SavedGraph, fault_of_array
from anyattention.training.splits import ReadLabels, draw_split, split_of_masks, told_labels

__all__ = ["read_labels"]

_MASKS = ("train_mask", "val_mask", "test_mask")


def read_labels(
    path: Path, saved: SavedGraph, target: str, options: ReadOptions, reading: Reading | None, to_train: bool
) -> ReadLabels:
    """The labels of the target's nodes, their classes, and, to train, the splits: those of the masks, or a drawn one.

    Raises:
        InvalidInputError: y or a mask has another shape, dtype or value than it needs, or there are too few classes.
    """
    count, own = saved.num_nodes[target], saved.nodes[target]
    y = own.get("y")
    if y is None:
        if to_train:
            raise fault_of_array(path, target, "y", "class numbers", "none")
        numbers = torch.full((count,), -1, dtype=torch.int64, device="cpu")
    else:
        numbers = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if numbers.shape != (count,) or numbers.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise fault_of_array(path, target, "y", f"({count},) int64", f"{y.dtype} {tuple(y.shape)}")
        numbers = numbers.to(torch.int64)
        if bool((numbers < -1).any()):
            raise fault_of_array(path, target, "y", "class numbers from 0, or -1 where unknown", int(numbers.min()))
    found = sorted(set(numbers.tolist()) - {-1})
    names = saved.class_names
    if names is not None and found and found[-1] >= len(names):
        raise fault_of_array(
            path, target, "y", f"class numbers below {len(names)}, the number of class names", found[-1]
        )
    by_number = {number: str(number) if names is None else names[number] for number in found}
    classes = reading.classes if reading is not None else tuple(by_number.values())
    places = {name: place for place, name in enumerate(classes)}
    labels = torch.tensor(
        [-1 if number < 0 else places.get(by_number[number], -1) for number in numbers.tolist()],
        dtype=torch.int64,
        device="cpu",
    )
    if not to_train:
        unknown = Counter(by_number[n] for n in numbers.tolist() if n >= 0 and by_number[n] not in places)
        return ReadLabels(labels, classes, (), _told_unknown(path, target, unknown), ())
    if len(classes) < 2:
        raise fault_of_array(path, target, "y", "at least two classes", listed(classes))
    splits, how = _read_splits(path, own, target, labels, classes, options)
    return ReadLabels(labels, classes, splits, (), told_labels(labels, classes, splits, how))


def _told_unknown(path: Path, target: str, unknown: Counter[str]) -> tuple[str, ...]:
    if not unknown:
        return ()
    told = f"{path}, {target!r}, y: {listed(sorted(unknown))} in {counted(sum(unknown.values()), 'row')} is no "
    return (told + "class of the training; these labels are not compared.",)


def _read_splits(
    path: Path,
    own: dict[str, Tensor],
    target: str,
    labels: Tensor,
    classes: tuple[str, ...],
    options: ReadOptions,
) -> tuple[tuple[Split, ...], str]:
    there = [key for key in _MASKS if key in own]
    if not there:
        split = draw_split(labels, options.seed, f"{path}, nodes {target!r}, y")
        return (split,), f"drawn by --seed {options.seed}, 60%, 20% and 20% of each class"
    masks: dict[str, np.ndarray] = {}
    for key in _MASKS:
        if key not in own:
            raise fault_of_array(path, target, key, "the masks of all three parts, or of none", "none")
        mask = own[key][:, None] if own[key].ndim == 1 else own[key]
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] != len(labels) or not mask.shape[1]:
            expected = f"({len(labels)},) or ({len(labels)}, splits), boolean"
            raise fault_of_array(path, target, key, expected, f"{mask.dtype} {tuple(own[key].shape)}")
        if own[key].shape != own[there[0]].shape:
            expected = f"{tuple(own[there[0]].shape)}, as {there[0]}"
            raise fault_of_array(path, target, key, expected, tuple(own[key].shape))
        masks[key] = mask.numpy()
    splits = []
    for number in range(masks[there[0]].shape[1]):
        split = split_of_masks({key: mask[:, number] for key, mask in masks.items()}, labels)
        untold = sorted(set(range(len(classes))) - set(labels[split.train].tolist()))
        if untold:
            raise fault_of_array(path, target, "train_mask", "a node of each class", f"none of {classes[untold[0]]!r}")
        splits.append(split)
    return tuple(splits), "as the masks say"
