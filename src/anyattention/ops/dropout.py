"""Counter-based random numbers: a position and a seed give a number, on any device and in any order."""

import math

import torch
from torch import Tensor

from anyattention.ambient import Moment, moment_of
from anyattention.native import load
from anyattention.native.philox import philox_words

__all__ = ["draw_seed", "keep_factors"]

_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 seed from PyTorch's generator, so that manual_seed and checkpointing govern dropout."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def keep_factors(shape: tuple[int, ...], dropout: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 with probability `dropout`, else 1 / (1 - dropout), for each position of a row-major array.

    Position n takes word n % 4 of Philox4x32-10 at counter n // 4 under the key `seed`; its upper 24 bits make a
    uniform number u in [0, 1), and the position is kept when u >= dropout. On the CPU a kernel computes them;
    in traces, in other dtypes and on other devices PyTorch does.

    Source: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    has_kernel = dtype in (torch.float32, torch.float64) and seed.is_cpu
    if has_kernel and moment_of([seed]) is Moment.PLAIN and load.available():
        factors = torch.empty(shape, dtype=dtype, device="cpu")
        given = factors.numel(), int(seed), dropout, load.num_threads(), dtype is torch.float64
        load.run("keep_factors", *given, factors.data_ptr())
        return factors
    return factors_by_formula(shape, dropout, seed, dtype)


def factors_by_formula(shape: tuple[int, ...], dropout: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """`keep_factors` in PyTorch, which every kernel agrees with."""
    size = math.prod(shape)
    blocks = torch.arange((size + 3) // 4, device=seed.device)
    uniform = philox(blocks, seed).T.reshape(-1)[:size].reshape(shape) >> 8
    kept = uniform.to(torch.float64) * 2.0**-24 >= dropout
    return kept.to(dtype) * (1.0 / (1.0 - dropout))


def philox(counter: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10: the four 32-bit words `(4, ...)` of each 64-bit counter, as int64."""
    none = torch.zeros_like(counter)
    return philox_words((counter & _LOW, (counter >> 32) & _LOW, none, none), seed)
