"""A process of its own: the peak memory of training on forces, in numbers per edge and head.

python peak_of_forces.py KIND ORDER, with ORDER first (energy and forces) or second (a step of training on forces).
"""

import sys

import torch

from anyattention import Graph, nn
from benchmarks.peak_memory import peak_memory

EDGES, POINTS, HEADS = 400_000, 1_000, 4
WIDTH = 128 * HEADS


def step(points: int, edges: int, kind: str, order: str) -> None:
    """Energy, forces and, for the second order, the gradient of their loss."""
    graph = Graph.from_edge_index(torch.randint(points, (2, edges)), num_nodes=points)
    module = getattr(nn, kind)(WIDTH, HEADS, radius=2.0, num_radial=8, dropout=0.0)
    x, positions = torch.randn(points, WIDTH), torch.rand(points, 3).requires_grad_()
    energy = module(x, positions, graph=graph).output.square().sum()
    (forces,) = torch.autograd.grad(energy, positions, create_graph=order == "second")
    if order == "second":
        forces.square().sum().backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Code, thread pools and allocator are there before the measurement.
    step(50, 99, *sys.argv[1:])
    taken = peak_memory(lambda: step(POINTS, EDGES, *sys.argv[1:]))
    assert taken is not None
    print(taken / (EDGES * HEADS * 4))
