"""Philox4x32-10 in PyTorch: a counter and a seed give four words, on any device and in any order."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["philox_words"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox_words(counter: Sequence[Tensor], seed: Tensor) -> Tensor:
    """The four 32-bit words `(4, ...)` of each counter of four such words, as int64.

    Source: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    words = list(counter)
    keys = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(_ROUNDS):
        # Products of two 32-bit numbers wrap past 2^63 in int64; the masked halves are right all the same.
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((second >> 32) & _LOW) ^ words[1] ^ keys[0],
            second & _LOW,
            ((first >> 32) & _LOW) ^ words[3] ^ keys[1],
            first & _LOW,
        ]
        keys = [(key + step) & _LOW for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return torch.stack(words)
