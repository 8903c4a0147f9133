"""Random regular graphs: expanders, made of random Hamiltonian cycles."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention._checks import require_count
from anyattention.ambient import shielded
from anyattention.errors import InvalidInputError

__all__ = ["regular_edges", "require_generator"]


def regular_edges(sizes: tuple[int, ...], degree: int, generator: torch.Generator | None) -> Tensor:
    """`(2, edges)`: degree / 2 random Hamiltonian cycles through each graph's nodes, each edge both ways.

    A node of a graph of two nodes or more has `degree` edges to it and from it; a single node has none.

    Raises:
        InvalidInputError: an odd degree, or one below 2; a generator of another device than the CPU.
    """
    degree = require_count("degree", degree, 2)
    if degree % 2:
        raise InvalidInputError(
            argument="degree", expected="an even int: a cycle gives each node two edges", actual=degree
        )
    require_generator(generator)
    with shielded():
        counts = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        nodes = int(counts.sum())
        of_node = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
        starts = (counts.cumsum(0) - counts)[of_node]
        after = torch.arange(1, nodes + 1, device="cpu")
        # The last node of a graph is followed by its first.
        after = torch.where(after == starts + counts[of_node], starts, after)
        is_alone = (counts == 1)[of_node]
        edges = []
        for _ in range(degree // 2):
            order = torch.randperm(nodes, generator=generator, device="cpu")
            order = order[torch.argsort(of_node[order], stable=True)]
            ahead = torch.stack([order, order[after]])[:, ~is_alone]
            edges += [ahead, ahead.flip(0)]
        return torch.cat(edges, dim=1)


def require_generator(generator: object) -> None:
    """Raise unless it is a generator of the CPU, or None."""
    is_usable = isinstance(generator, torch.Generator) and generator.device.type == "cpu"
    if generator is not None and not is_usable:
        raise InvalidInputError(
            argument="generator",
            expected="a torch.Generator of the CPU, or None",
            actual=getattr(generator, "device", type(generator).__name__),
        )
