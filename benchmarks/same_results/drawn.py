"""The random numbers, graphs and patterns of a call, drawn from its name."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import anyattention as aa

__all__ = ["GRAPHS", "LENGTHS", "PATTERNS", "Numbers"]


class Numbers:
    """The random numbers of one call, drawn from its name; floating ones are leaves that get gradients."""

    def __init__(self, name: str, dtype: str) -> None:
        self.seed = zlib.crc32(name.encode())
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.leaves: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}
        self._generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)

    def leaf(self, name: str, *shape: int, spread: float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
        self.leaves[name] = (shift + spread * self.normal(*shape)).to(self.dtype).requires_grad_()
        return self.leaves[name]

    def rows(self, name: str, shape: tuple[int, ...], layout: str | None) -> Tensor:
        """Rows (..., nodes, heads, width), as a view of a leaf that lies otherwise in memory where asked for."""
        if layout == "transposed":
            return self.leaf(name, *shape[:-3], shape[-2], shape[-3], shape[-1]).transpose(-3, -2)
        if layout == "strided":
            return self.leaf(name, *shape[:-1], 2 * shape[-1])[..., ::2]
        if layout == "expanded":
            return self.leaf(name, 1, *shape[1:]).expand(shape)
        return self.leaf(name, *shape)

    def flags(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator) < 0.6

    def graph(self, queries: int, keys: int, edges: int, **settings: Any) -> aa.Graph:
        """Random edges, repeated ones among them; the last query and the last key have none."""
        ends = [torch.randint(n - 1, (edges,), generator=self._generator) for n in (keys, queries)]
        return aa.Graph.from_edge_index(torch.stack(ends), num_queries=queries, num_keys=keys, **settings)

    def hub(self) -> aa.Graph:
        """One query with 2,500 edges among 9, another with 40."""
        key = torch.randint(60, (2540,), generator=self._generator)
        query = torch.where(torch.arange(2540) % 63 == 5, 7, 3)
        return aa.Graph.from_edge_index(torch.stack([key, query]), num_queries=9, num_keys=61)

    def module(self, make: Callable[[], Any], training: bool) -> Any:
        """The module, its initial parameters recorded, then drawn anew: zeros would hide what they multiply."""
        torch.manual_seed(self.seed)
        module = make().to(self.dtype).train(training)
        for name, parameter in module.named_parameters():
            self.facts[f"initial {name}"] = parameter.detach().clone()
            parameter.data = self.normal(*parameter.shape) / 2
            self.leaves[name] = parameter
        torch.manual_seed(self.seed)
        return module


GRAPHS: dict[str, Callable[[Numbers], aa.Graph]] = {
    "random": lambda n: n.graph(11, 11, 40),
    "bipartite": lambda n: n.graph(7, 12, 50),
    "by rows": lambda n: aa.Graph.from_adjacency(n.flags(11, 11)),
    "loops": lambda n: n.graph(11, 11, 30).with_self_loops(),
    "batch": lambda n: aa.Graph.batch([n.graph(5, 5, 9), n.graph(6, 6, 20)]),
    "no edges": lambda n: n.graph(5, 5, 0),
    "one edge": lambda n: n.graph(2, 2, 1),
    "hub": lambda n: n.hub(),
    "large": lambda n: n.graph(500, 500, 20_000),
}
# For 13 queries and keys.
PATTERNS: dict[str, Callable[[Numbers], Any]] = {
    "full": lambda n: aa.Full(),
    "causal": lambda n: aa.Causal(),
    "window": lambda n: aa.Window(3, 2),
    "strided": lambda n: aa.Strided(4, 1),
    "fixed": lambda n: aa.Fixed(4, 1),
    "global": lambda n: aa.Global(2),
    "global places": lambda n: aa.Global((1, 5, 6)),
    "random blocks": lambda n: aa.RandomBlocks(2, seed=1, size=3),
    "documents": lambda n: aa.Documents((5, 0, 6, 2)),
    "blocks": lambda n: aa.Blocks(n.flags(4, 4), 4),
    "strided & causal": lambda n: aa.Strided(4, 1) & aa.Causal(),
    "big bird": lambda n: aa.RandomBlocks(1, size=3) | aa.Window(2, 2) | aa.Global(1),
    "graph & causal": lambda n: aa.Graph.from_adjacency(n.flags(13, 13)) & aa.Causal(),
    "top-k": lambda n: aa.TopK(3),
    "window & top-k": lambda n: aa.Window(4, 4) & aa.TopK(3),
    "blocks & top-k": lambda n: aa.Blocks(n.flags(4, 4), 4) & aa.TopK(5),
    "graph & top-k": lambda n: aa.Graph.from_adjacency(n.flags(13, 13)) & aa.TopK(2),
}
# For any lengths.
LENGTHS: dict[str, Callable[[Numbers], Any]] = {
    "causal top_left": lambda n: aa.Causal("top_left"),
    "causal bottom_right": lambda n: aa.Causal("bottom_right"),
    "window bottom_right": lambda n: aa.Window(5, 1, "bottom_right"),
    "wide window": lambda n: aa.Window(64, 0),
    "wide top-k": lambda n: aa.Causal() & aa.TopK(16),
}
