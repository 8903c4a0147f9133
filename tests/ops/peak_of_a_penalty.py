"""A process of its own: what a gradient penalty takes at its peak, in numbers for each of those of the query.

python peak_of_a_penalty.py LENGTH
"""

import sys

import torch

from anyattention import Causal, attend
from benchmarks.peak_memory import peak_memory

HEADS, CHANNELS = 2, 32


def step(length: int) -> None:
    """The gradients of a gradient's square."""
    leaves = [torch.randn(1, length, HEADS, CHANNELS).requires_grad_() for _ in range(3)]
    output = attend(*leaves, Causal(), implementation="cpu").output
    gradients = torch.autograd.grad(output, leaves, torch.randn_like(output), create_graph=True)
    torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Code, thread pools and allocator are there before the measurement.
    step(100)
    whole = int(sys.argv[1])
    taken = peak_memory(lambda: step(whole))
    assert taken is not None
    print(taken / (whole * HEADS * CHANNELS * 4))
