"""A process of its own: what attention over few edges takes at its peak, forward and backward, in numbers per edge and
head.

python peak_of_many_heads.py SCORE
"""

import sys

import torch

from anyattention import Additive, Dot, Graph, attend
from benchmarks.peak_memory import peak_memory

EDGES, NODES, HEADS = 5, 3, 300_000


def step(heads: int, score: str) -> None:
    """Forward and backward of rows of one number for each head."""
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 0, 2], [0, 0, 0, 1, 2]]), num_nodes=NODES)
    leaves = [torch.randn(NODES, heads, 1).requires_grad_() for _ in range(3)]
    kind = Dot() if score == "dot" else Additive()
    output = attend(*leaves, graph, score=kind, implementation="cpu").output
    torch.autograd.grad(output, leaves, torch.randn_like(output))


if __name__ == "__main__":
    torch.set_num_threads(1)
    step(3, *sys.argv[1:])
    taken = peak_memory(lambda: step(HEADS, *sys.argv[1:]))
    assert taken is not None
    print(taken / (EDGES * HEADS * 4))
