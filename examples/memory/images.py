"""Fashion-MNIST: 28 x 28 images of ten kinds of clothes, from its own files or an .npz."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.files import require_file

__all__ = ["CLASSES", "SIDE", "Data", "Images", "load_data", "read_idx"]

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28
_UNSIGNED_BYTES = 0x08
_HINT = "Debian's package dataset-fashion-mnist brings the files; --data takes their folder, or an .npz"


class Images(NamedTuple):
    """Images uint8 `(count, 28, 28)`, 0 is the background, and labels int64 `(count,)`, numbers of `CLASSES`."""

    pixels: Tensor
    labels: Tensor

    def chosen(self, which: Tensor) -> Images:
        """Those at some places, or where a mask is true."""
        return Images(self.pixels[which], self.labels[which])


class Data(NamedTuple):
    """The images to remember, from which the encoder learns too, and those of the test."""

    train: Images
    test: Images


def load_data(path: Path) -> Data:
    """Read the four files of Fashion-MNIST in a folder, or an .npz.

    Args:
        path: a folder with `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz` and the same of `t10k`; or an
            .npz with `train_images`, `train_labels`, `test_images` and `test_labels`.

    Raises:
        InvalidInputError: a file is missing, cut short or of another kind.
    """
    if path.is_dir():
        parts = {
            part: Images(
                read_idx(path / f"{name}-images-idx3-ubyte.gz", 3), read_idx(path / f"{name}-labels-idx1-ubyte.gz", 1)
            )
            for part, name in (("train", "train"), ("test", "t10k"))
        }
    else:
        parts = _read_npz(path)
    return Data(**{part: _checked(images, f"{path}, {part}") for part, images in parts.items()})


def read_idx(path: Path, axes: int) -> Tensor:
    """A compressed idx file of unsigned bytes with so many axes, as uint8.

    The format: two bytes 0, the type, the number of axes, the size of each axis in four bytes (big-endian), the data.

    Raises:
        InvalidInputError: the file is missing, cut short or of another kind.
    """
    try:
        with gzip.open(path) as file:
            head = file.read(4 + 4 * axes)
            expected = bytes([0, 0, _UNSIGNED_BYTES, axes])
            if head[:4] != expected or len(head) < 4 + 4 * axes:
                raise _fault(path, f"an idx file of unsigned bytes with {axes} axes", f"it begins with {head[:4]!r}")
            sizes = struct.unpack(f">{axes}I", head[4:])
            content = file.read()
    except (OSError, EOFError, zlib.error) as fault:
        raise _fault(path, "a whole gzip file", getattr(fault, "strerror", None) or fault) from fault
    if len(content) != math.prod(sizes):
        raise _fault(path, f"{math.prod(sizes):,} bytes after the head, for sizes {sizes}", f"{len(content):,}")
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(sizes)


def _read_npz(path: Path) -> dict[str, Images]:
    names = [f"{part}_{kind}" for part in ("train", "test") for kind in ("images", "labels")]
    try:
        require_file(path)
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise _fault(path, "an .npz file", "an .npy")
            missing = [name for name in names if name not in archive]
            if missing:
                raise _fault(path, f"arrays {', '.join(names)}", f"none named {missing[0]}")
            arrays = [np.ascontiguousarray(archive[name]) for name in names]
    except InvalidInputError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as fault:
        raise _fault(path, "a whole .npz file", getattr(fault, "strerror", None) or fault) from fault
    for name, array in zip(names, arrays, strict=True):
        if array.dtype != np.uint8:
            raise _fault(path, f"{name} of uint8", array.dtype)
    tensors = [torch.from_numpy(array) for array in arrays]
    return {"train": Images(*tensors[:2]), "test": Images(*tensors[2:])}


def _checked(images: Images, where: str) -> Images:
    """The images, labels as int64; raises InvalidInputError where they are none of these clothes."""
    pixels, labels = images
    if pixels.ndim != 3 or tuple(pixels.shape[1:]) != (SIDE, SIDE) or len(pixels) == 0:
        raise _fault(where, f"images of {SIDE} x {SIDE}", f"an array of {tuple(pixels.shape)}")
    if labels.shape != pixels.shape[:1]:
        raise _fault(where, f"a label for each of {len(pixels):,} images", f"an array of {tuple(labels.shape)}")
    if labels.max() >= len(CLASSES):
        raise _fault(where, f"labels below {len(CLASSES)}", int(labels.max()))
    return Images(pixels, labels.long())


def _fault(where: Path | str, expected: str, actual: object) -> InvalidInputError:
    return InvalidInputError(argument=str(where), expected=expected, actual=actual, hint=_HINT)
