"""The settings, the encoder that makes keys of images, and the memory of keys with labels.

Axes: N images, D key_dim, C classes, k memories that a query attends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn

from anyattention.errors import InvalidConfigError
from anyattention.nn import MemoryAttention
from examples.memory.images import CLASSES, SIDE
from examples.settings import About, check_settings

__all__ = ["Encoder", "Settings", "empty_memory", "label_values"]

# The mean and the standard deviation of the pixels of Fashion-MNIST's training images.
_MEAN, _SPREAD = 0.2860, 0.3530


@dataclass(frozen=True)
class Settings:
    """The size of the encoder, the attention, and how to train.

    Raises:
        InvalidConfigError: a value is out of range.
    """

    steps: Annotated[int, About("steps of the training")] = 480
    batch: Annotated[int, About("images in a step, which attend to each other", least=2)] = 500
    k: Annotated[int, About("memories that a query attends to, fewer than the batch")] = 32
    scale: Annotated[float, About("what the cosines are multiplied with before the softmax")] = 16.0
    key_dim: Annotated[int, About("width of the keys")] = 32
    channels: Annotated[int, About("channels of the encoder's first convolution; the others have twice as many")] = 16
    learning_rate: Annotated[float, About("AdamW's highest learning rate")] = 3e-3
    held_out: Annotated[int, About("the class that a second encoder never sees, from 0 to 9", least=0)] = 8
    seed: Annotated[int, About("seed of the initial weights and the batches", least=0)] = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.k >= self.batch:
            raise InvalidConfigError(argument="k", expected=f"less than batch={self.batch}", actual=self.k)
        if self.held_out >= len(CLASSES):
            raise InvalidConfigError(argument="held_out", expected="a class from 0 to 9", actual=self.held_out)


class Encoder(nn.Module):
    """A small convolutional network from images to keys.

    Args:
        settings: the size.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        widths = [1, settings.channels, 2 * settings.channels, 2 * settings.channels]
        blocks = [_convolution(narrow, wide) for narrow, wide in pairwise(widths)]
        left = SIDE // 2 ** len(blocks)
        self.layers = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(widths[-1] * left**2, settings.key_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        """Keys `(N, D)` of images, uint8 `(N, 28, 28)`."""
        weight = next(self.parameters())
        return self.layers((pixels.to(weight.dtype) / 255 - _MEAN).unsqueeze(1) / _SPREAD)


def _convolution(narrow: int, wide: int) -> nn.Module:
    convolution = nn.Conv2d(narrow, wide, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2))


def empty_memory(settings: Settings) -> MemoryAttention:
    """Attention whose output is the probability of each class: the weights of the memories, added up by their label."""
    return MemoryAttention(
        settings.key_dim,
        1,
        value_dim=len(CLASSES),
        k=settings.k,
        measure="cosine",
        scale=settings.scale,
        project=False,
    )


def label_values(labels: Tensor) -> Tensor:
    """The values `(N, C)` of memories with these labels: 1 at the label, else 0."""
    return nn.functional.one_hot(labels, len(CLASSES)).to(torch.get_default_dtype())
