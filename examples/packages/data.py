"""The packages of a distribution as a typed graph, read from the file that `examples.packages.apt` writes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention import HeterogeneousGraph
from anyattention.errors import AttentionError, InvalidInputError
from anyattention.files import require_file

__all__ = ["RELATIONS", "Packages", "load_packages"]

RELATIONS = {
    ("package", "depends", "package"),
    ("package", "recommends", "package"),
    ("package", "suggests", "package"),
    ("package", "enhances", "package"),
    ("package", "built_from", "source"),
    ("package", "kept_by", "maintainer"),
}
"""What the file has: in each relation the package of row 0 names the package, source or maintainer of row 1."""

_EXPECTED = "a file as `python -m examples.packages.apt` writes it"


class Packages(NamedTuple):
    """Packages, what they name and what names them.

    Attributes:
        graph: of packages, sources and maintainers, with each relation also the other way round.
        word_offsets, words: the words of the description of package i are
            `words[word_offsets[i]:word_offsets[i + 1]]`, each a number below `num_words`.
        num_words: how many words there are.
        sizes: `(packages, 2)` float32, logarithms of the bytes installed and to be fetched.
        labels: `(packages,)` int64, the section as a number; -1 where it is none of `classes`.
        classes: the names of the sections.
        train, validation, test: int64, numbers of packages.
    """

    graph: HeterogeneousGraph
    word_offsets: Tensor
    words: Tensor
    num_words: int
    sizes: Tensor
    labels: Tensor
    classes: list[str]
    train: Tensor
    validation: Tensor
    test: Tensor


def load_packages(path: Path) -> Packages:
    """Read the file.

    Raises:
        InvalidInputError: there is no such file, or it is another one.
    """
    arrays = _read(path)
    try:
        labels = _whole(arrays["y"])
        num_nodes = {
            "package": len(labels),
            "source": int(arrays["num_sources"]),
            "maintainer": int(arrays["num_maintainers"]),
        }
        edges = {relation: _whole(arrays["__".join(relation)]) for relation in sorted(RELATIONS)}
        offsets, words = _whole(arrays["words_indptr"]), _whole(arrays["words_indices"])
        num_words = int(arrays["words_shape"][1])
        classes = [str(name) for name in arrays["classes"]]
        parts = [_whole(arrays[name]) for name in ("train", "val", "test")]
        sizes = torch.from_numpy(arrays["sizes"].astype(np.float32))
        graph = HeterogeneousGraph.from_edge_index(edges, num_nodes).with_reverse()
    except KeyError as fault:
        raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=f"no array {fault}") from fault
    except (IndexError, TypeError, ValueError, AttentionError) as fault:
        raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=str(fault)) from fault
    packages = Packages(graph, offsets, words, num_words, sizes, labels, classes, *parts)
    mistake = _mistake(packages)
    if mistake:
        raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=mistake)
    return packages


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        require_file(path)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as fault:
        raise InvalidInputError(argument=str(path), expected=_EXPECTED, actual=str(fault)) from fault


def _whole(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ValueError(f"numbers of dtype {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _mistake(packages: Packages) -> str:
    """What does not fit together, or nothing."""
    count, offsets, words = len(packages.labels), packages.word_offsets, packages.words
    if offsets.shape != (count + 1,) or offsets[0] != 0 or offsets[-1] != len(words) or (offsets.diff() < 0).any():
        return "words_indptr that does not divide words_indices among the packages"
    if len(words) and not 0 <= int(words.min()) <= int(words.max()) < packages.num_words:
        return "words_indices outside the words"
    if packages.sizes.shape != (count, 2) or not packages.sizes.isfinite().all():
        return "sizes that are not two finite numbers for each package"
    if count and int(packages.labels.max()) >= len(packages.classes):
        return "y outside the classes"
    for name, part in (("train", packages.train), ("val", packages.validation), ("test", packages.test)):
        if not len(part) or int(part.min()) < 0 or int(part.max()) >= count or (packages.labels[part] < 0).any():
            return f"{name} with none, or with numbers that are not those of packages of a known section"
    return ""
