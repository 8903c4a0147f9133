"""NeighborLoader: mini-batches of a large graph, as an iterable for a training loop, in workers if wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from anyattention._checks import Relation, no_graph, require_count
from anyattention.ambient import shielded
from anyattention.errors import GraphStructureError, InvalidInputError
from anyattention.native.neighbour_sampling import NeighbourRows
from anyattention.patterns.graph import Graph
from anyattention.patterns.heterogeneous import HeterogeneousGraph
from anyattention.patterns.sampled import SampledGraph, rows_of, sample_rows
from anyattention.patterns.sampled_heterogeneous import (
    SampledHeterogeneousGraph,
    require_typed_fanouts,
    require_typed_seeds,
    sample_typed_rows,
    typed_rows_of,
)
from anyattention.patterns.sampling import draw_seed, mixed_seed, require_fanouts, require_seeds
from anyattention.shared_buffers import SharedBuffers, shared_buffers

__all__ = ["NeighborLoader"]

# What the loader itself gives to PyTorch's.
_OWN = ("dataset", "sampler", "batch_sampler", "collate_fn")

Batch = tuple[int, np.ndarray]
"""What is sent to a worker: the seed of a batch's draws, and its seeds."""


class NeighborLoader(DataLoader):  # pyright: ignore[reportMissingTypeArgument]  # of what transform makes
    """Batches of seeds with sampled neighbours, epoch after epoch: an ordinary `torch.utils.data.DataLoader`.

        for sampled in NeighborLoader(graph, train_nodes, [15, 10], batch_size=1024, shuffle=True):
            x = features[sampled.nodes]
            for layer, block in zip(layers, sampled.blocks):
                x = layer((x, x[:block.num_queries]), block).output
            loss = cross_entropy(x, labels[sampled.nodes[:sampled.num_seeds]])

    What a batch holds depends on the loader's seed, on `epoch` and on the batch's place in it, and on nothing else: not
    on the number of workers. Each pass over the loader is an epoch, and adds 1 to `epoch`. `epoch` and `seed` may be
    set, for the next pass on. The attributes `batch_size` and `drop_last` are those of a DataLoader that does not
    batch, None and False; `len` is the number of batches.

    Args:
        graph: a Graph, square, or a HeterogeneousGraph; on the CPU.
        seeds: `(seeds,)` integers, each node once; None for all nodes. Of a HeterogeneousGraph a pair (type, seeds), or
            a type for all of its nodes.
        fanouts: for each hop, the most edges of a node; -1 for all. As in `sample`.
        batch_size: the number of seeds in a batch.
        shuffle: whether the seeds come in another order in each epoch.
        drop_last: whether to leave out a last batch of fewer seeds.
        weights: as in `sample`; they are checked once.
        generator: gives one number, the loader's seed; else PyTorch's own does.
        transform: what to make of each SampledGraph or SampledHeterogeneousGraph, in the worker.
        **others: of `DataLoader`: num_workers, persistent_workers, multiprocessing_context, pin_memory ...

    Raises:
        InvalidInputError, GraphStructureError, DimensionMismatchError, UnsupportedError: as `Graph.sample`, and for
            what the loader itself gives to `DataLoader`.

    Cost: that of `Graph.sample` for each batch. Forked workers read the graph where it lies; for spawned ones its rows
    of queries, 16 bytes for each edge, move to shared memory.

    Example:
        >>> graph = Graph.from_edge_index(torch.tensor([[1, 2, 3], [0, 1, 2]]), num_nodes=4)
        >>> for sampled in NeighborLoader(graph, torch.tensor([0, 2, 3]), [-1], batch_size=2):
        ...     print(sampled)
        SampledGraph(num_seeds=2, num_nodes=4, num_edges=(2,))
        SampledGraph(num_seeds=1, num_nodes=1, num_edges=(0,))
    """

    def __init__(
        self,
        graph: Graph | HeterogeneousGraph,
        seeds: Tensor | str | tuple[str, Tensor] | None = None,
        fanouts: Sequence[int] | Mapping[Relation, Sequence[int]] = (15, 10),
        *,
        batch_size: int = 1024,
        shuffle: bool = False,
        drop_last: bool = False,
        weights: Tensor | Mapping[Relation, Tensor] | None = None,
        generator: torch.Generator | None = None,
        transform: Callable[[Any], Any] | None = None,
        **others: Any,
    ) -> None:
        for name in _OWN:
            if name in others:
                raise InvalidInputError(argument=name, expected="none: the loader has its own", actual="one")
        if isinstance(graph, HeterogeneousGraph):
            kind, chosen = _typed_seeds(seeds, graph)
            seeds = _require_each_once(chosen, graph.num_nodes[kind])
            draw = _typed_draw(graph, kind, fanouts, weights)
        elif isinstance(graph, Graph):
            seeds = _require_each_once(seeds, graph.num_queries)
            rows = rows_of(graph, weights).slot_weights()  # pyright: ignore[reportArgumentType]  # it checks them
            draw = partial(_drawn, rows, require_fanouts("fanouts", fanouts))
        else:
            raise no_graph("graph", graph, "a Graph or a HeterogeneousGraph")
        samples = _Samples(draw, transform)
        self.epoch, self.seed = 0, draw_seed(generator)
        self.batches = _Batches(seeds, require_count("batch_size", batch_size, 1), shuffle, drop_last, self.seed)
        # PyTorch's loader draws a number of its own in each epoch, which ours do not depend on.
        own = torch.Generator().manual_seed(self.seed)
        super().__init__(samples, sampler=self.batches, batch_size=None, collate_fn=_as_it_is, generator=own, **others)

    def __iter__(self) -> Any:
        """The batches of the next epoch."""
        epoch, self.batches.seed = require_count("epoch", self.epoch, 0), require_count("seed", self.seed, 0)
        self.batches.epoch, self.epoch = epoch, epoch + 1
        # Workers that are there already have buffers.
        starts = not self.persistent_workers or self._iterator is None
        buffers = (
            shared_buffers(self.num_workers, self.prefetch_factor, self.multiprocessing_context) if starts else None
        )
        samples: Any = self.dataset
        samples.buffers = buffers
        # PyTorch's loader draws its own number with a generator that is on the CPU.
        with torch.device("cpu"):
            made: Any = super().__iter__()
        if buffers is not None:
            samples.buffers, made.buffers = None, buffers
        return made


class _Samples(Dataset):  # pyright: ignore[reportMissingTypeArgument]
    """What is sent to workers once, and makes a batch there."""

    def __init__(self, draw: Callable[[Tensor, int], Any], transform: Callable[[Any], Any] | None) -> None:
        self.draw, self.transform = draw, transform
        # Of workers, from when they are forked.
        self.buffers: SharedBuffers | None = None

    def __getitem__(self, batch: Batch) -> Any:
        seed, seeds = batch
        sampled = self.draw(torch.from_numpy(seeds), seed)
        made = sampled if self.transform is None else self.transform(sampled)
        worker = get_worker_info()
        return made if self.buffers is None or worker is None else self.buffers.sent(made, worker.id)


def _drawn(rows: NeighbourRows, fanouts: Sequence[int], seeds: Tensor, seed: int) -> SampledGraph:
    return sample_rows(rows, seeds, fanouts, seed)


def _typed_draw(graph: HeterogeneousGraph, kind: str, fanouts: Any, weights: Any) -> Callable[[Tensor, int], Any]:
    rows = {relation: each.slot_weights() for relation, each in typed_rows_of(graph, weights).items()}
    wanted = require_typed_fanouts(fanouts, graph.relations)
    return partial(_drawn_of_types, rows, dict(graph.num_nodes), wanted, kind)


def _drawn_of_types(
    rows: Mapping[Relation, NeighbourRows],
    num_nodes: Mapping[str, int],
    fanouts: Mapping[Relation, Sequence[int]],
    kind: str,
    seeds: Tensor,
    seed: int,
) -> SampledHeterogeneousGraph:
    return sample_typed_rows(rows, num_nodes, require_typed_seeds({kind: seeds}, num_nodes), fanouts, seed)


class _Batches(Sampler[Batch]):
    """The batches of an epoch, which are sent to workers one by one."""

    def __init__(self, seeds: Tensor, batch_size: int, shuffle: bool, drop_last: bool, seed: int) -> None:
        # As arrays, which no mode or transform sees.
        self.seeds, self.batch_size = seeds.numpy(), batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return (len(self.seeds) + (0 if self.drop_last else self.batch_size - 1)) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        # PyTorch's loader asks for more iterators than it uses, and for the next epoch's before this one has ended.
        return self._of_epoch(self.epoch)

    def _of_epoch(self, epoch: int) -> Iterator[Batch]:
        with shielded():
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            numbers = torch.randint(2**63 - 1, (len(self),), generator=generator, dtype=torch.int64, device="cpu")
            order = torch.randperm(len(self.seeds), generator=generator, device="cpu").numpy() if self.shuffle else None
        for place, number in enumerate(numbers.tolist()):
            part: Any = slice(place * self.batch_size, (place + 1) * self.batch_size)
            # As an array of its own: a tensor would go through shared memory, with all seeds.
            yield number, self.seeds[part if order is None else order[part]].copy()


def _typed_seeds(seeds: object, graph: HeterogeneousGraph) -> tuple[str, Any]:
    """A type of the graph, and a caller's seeds of it, None for all."""
    kind, chosen = (seeds, None) if isinstance(seeds, str) else seeds if _is_pair(seeds) else (None, None)
    if not isinstance(kind, str) or kind not in graph.num_nodes:
        raise InvalidInputError(
            argument="seeds",
            expected="a type, or a pair (type, seeds), of " + ", ".join(map(repr, graph.node_types)),
            actual=repr(kind) if isinstance(kind, str) else type(seeds).__name__,
        )
    return kind, chosen


def _is_pair(seeds: object) -> TypeGuard[tuple[Any, Any]]:
    return isinstance(seeds, tuple | list) and len(seeds) == 2


def _require_each_once(seeds: Any, num_nodes: int) -> Tensor:
    if seeds is None:
        return torch.arange(num_nodes, device="cpu")
    seeds = require_seeds("seeds", seeds, num_nodes)
    is_there = torch.zeros(num_nodes, dtype=torch.bool, device="cpu")
    is_there[seeds] = True
    different = int(is_there.sum())
    if different < len(seeds):
        raise GraphStructureError(
            argument="seeds", expected="each node once", actual=f"{different} different nodes in {len(seeds)}"
        )
    return seeds


def _as_it_is(made: Any) -> Any:
    return made
