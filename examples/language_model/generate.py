"""New text from a prompt, which is read at once; each byte after it attends to what is kept of those before."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from examples.language_model.model import LanguageModel, Past

__all__ = ["Written", "generate", "speed_of_reading_again"]


class Written(NamedTuple):
    """What a model wrote, the seconds that reading the prompt took, and those of the rest."""

    text: bytes
    reading: float
    writing: float


@torch.no_grad()
def generate(model: LanguageModel, prompt: Tensor, count: int, *, temperature: float = 0.9, seed: int = 0) -> Written:
    """What the model writes after a prompt `(bytes,)`; both together are to be no longer than a passage.

    Cost: a forward pass over the prompt, and one over a single byte for each that is written.
    """
    generator = torch.Generator().manual_seed(seed)
    past, written = Past(model), []
    started = time.monotonic()
    scores = model(prompt[None], past)[0, -1]
    read = time.monotonic()
    while True:
        written.append(torch.multinomial((scores / temperature).softmax(0), 1, generator=generator))
        if len(written) >= count:
            break
        scores = model(written[-1][None], past)[0, -1]
    text = bytes(torch.cat(written)[:count].tolist())
    return Written(text, read - started, time.monotonic() - read)


@torch.no_grad()
def speed_of_reading_again(model: LanguageModel, prompt: Tensor, count: int = 8) -> float:
    """Bytes a second where the whole text is read again for each, as without a past."""
    started = time.monotonic()
    for _ in range(count):
        model(prompt[None])
    return count / (time.monotonic() - started)
