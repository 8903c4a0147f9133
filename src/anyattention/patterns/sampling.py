"""Neighbour sampling: from seeds to their neighbours, and on to theirs, at most so many of each node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anyattention._checks import Relation, describe_shape, plain, require_dense, require_device
from anyattention.ambient import is_readable, shielded, values_of
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError, UnsupportedError
from anyattention.native.compressed_rows import CompressedRows
from anyattention.native.neighbour_sampling import (
    NeighbourRows,
    enter_nodes,
    numbered_nodes,
    sampled_offsets,
    sampled_rows,
)
from anyattention.native.philox import philox_words

__all__ = ["Drawn", "Found", "draw_seed", "mixed_seed", "neighbour_rows", "require_fanouts", "require_seeds", "walk"]

_CPU = torch.device("cpu")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Each row of Philox's counter that tells draws apart has 32 bits.
_STREAMS = 2**32
_LOW = 0xFFFFFFFF


class Found:
    """The nodes of one type that a walk has found, in order.

    Attributes:
        counts: how many were known at first, and after each hop.
    """

    def __init__(self, seeds: Tensor, num_nodes: int, kind: int, is_repeated: bool) -> None:
        self._num_nodes, self._kind = num_nodes, kind
        self._nodes, self._count = seeds.clone(), len(seeds)
        if is_repeated:
            enter_nodes(seeds, num_nodes, kind)
        else:
            self._count = numbered_nodes(seeds.clone(), num_nodes, self._nodes, 0, kind)
            if self._count < len(seeds):
                raise GraphStructureError(
                    argument="seeds",
                    expected="each node once",
                    actual=f"{self._count} different nodes in {len(seeds)}",
                    hint="seeds.unique(return_inverse=True) gives each once, and where it was",
                )
        self.counts = [self._count]

    @property
    def nodes(self) -> Tensor:
        """`(found,)` int64: their ids."""
        nodes = self._nodes[: self._count]
        # Edges that lead to known nodes leave most of the memory unused.
        return nodes.clone() if 2 * self._count < len(self._nodes) else nodes

    def frontier(self) -> tuple[int, Tensor]:
        """The number of the first node that was found in the last hop, and those nodes."""
        first = self.counts[-2] if len(self.counts) > 1 else 0
        return first, self._nodes[first : self.counts[-1]]

    def number(self, ids: Tensor) -> None:
        """Puts numbers in place of ids, new ones for nodes that are new."""
        capacity = self._count + min(len(ids), self._num_nodes)
        if capacity > len(self._nodes):
            self._nodes = _grown(self._nodes[: self._count], capacity)
        self._count = numbered_nodes(ids, self._num_nodes, self._nodes, self._count, self._kind)

    def end_hop(self) -> None:
        """What was found up to here are the next hop's nodes."""
        self.counts.append(self._count)


class Drawn:
    """The edges of one relation that a walk has drawn, by query.

    Attributes:
        edge_index: `(2, drawn)` int64; row 0 = keys, row 1 = queries, by their numbers.
        edges: `(drawn,)` int64, their positions in the whole graph.
        offsets: `(queries + 1,)` int64, the edges of each query.
        counts: how many there were after each hop.
    """

    def __init__(self, rows: NeighbourRows) -> None:
        self._rows = rows
        self.edge_index = torch.empty(2, 0, dtype=torch.int64, device="cpu")
        self.edges = torch.empty(0, dtype=torch.int64, device="cpu")
        self.offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.counts: list[int] = []

    def extend(self, queries: Found, keys: Found, fanout: int, seed: int, stream: int) -> None:
        """Draws edges of the queries that were found in the last hop."""
        first, nodes = queries.frontier()
        known = len(self.edges)
        offsets = sampled_offsets(self._rows, nodes, fanout, known)
        total = int(offsets[-1])
        self.edge_index, self.edges = _grown(self.edge_index, total), _grown(self.edges, total)
        ids, positions = self.edge_index
        sampled_rows(self._rows, nodes, offsets, seed, stream, first, ids, positions, self.edges)
        keys.number(ids[known:])
        self.offsets = torch.cat([self.offsets, offsets[1:]])
        self.counts.append(total)


def walk(
    rows: Mapping[Relation, NeighbourRows],
    seeds: Mapping[str, Tensor],
    num_nodes: Mapping[str, int],
    fanouts: Mapping[Relation, Sequence[int]],
    seed: int,
    *,
    is_repeated: bool = False,
) -> tuple[dict[str, Found], dict[Relation, Drawn]]:
    """From seeds along relations, against their direction: in each hop from the nodes that the hop before has found.

    Args:
        rows: of each relation, by target.
        seeds: nodes of each type, known to be there.
        num_nodes: of each type.
        fanouts: of each relation as many as there are hops, 0 too.
        seed: of all draws.
        is_repeated: whether seeds may be there several times, each with edges of its own; edges lead to the first.
    """
    found = {
        kind: Found(seeds[kind], count, place, is_repeated) for place, (kind, count) in enumerate(num_nodes.items())
    }
    drawn = {relation: Drawn(each) for relation, each in rows.items()}
    for hop in range(max(map(len, fanouts.values()), default=0)):
        for place, (relation, edges) in enumerate(drawn.items()):
            source, _, target = relation
            stream = (hop * len(drawn) + place) % _STREAMS
            edges.extend(found[target], found[source], fanouts[relation][hop], seed, stream)
        for each in found.values():
            each.end_hop()
    return found, drawn


def draw_seed(generator: torch.Generator | None) -> int:
    """One int64 of a generator of PyTorch's, the default one if None, so that manual_seed governs what is drawn.

    Raises:
        InvalidInputError: no generator.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InvalidInputError(argument="generator", expected="a torch.Generator", actual=type(generator).__name__)
    device = _CPU if generator is None else generator.device
    with shielded():
        return int(torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64, device=device))


def mixed_seed(seed: int, first: int, second: int = 0) -> int:
    """A seed of 63 bits for each pair of numbers of 64 bits: one seed gives different ones, as do different seeds."""
    with shielded():
        parts = [each >> shift & _LOW for each in (first, second) for shift in (0, 32)]
        *words, key = torch.tensor([*parts, seed % 2**63], dtype=torch.int64, device=_CPU)
        low, high, *_ = philox_words(words, key)
        return int(low) | (int(high) & _LOW >> 1) << 32


def neighbour_rows(rows: CompressedRows, num_keys: int, weights: Tensor | None, argument: str) -> NeighbourRows:
    """A graph's rows of queries with a caller's weights, checked.

    Raises:
        InvalidInputError: weights that are no floating-point numbers, negative or not finite, or on another device.
        DimensionMismatchError: not a weight for each edge.
        UnsupportedError: the graph is not on the CPU, or it or the weights are hidden by a compiler, a mode or a vmap.
    """
    if rows.offsets.device != _CPU or not is_readable(*rows):
        raise UnsupportedError(
            argument="graph",
            expected="a graph on the CPU, outside of compiled and traced code",
            actual="a compiled or traced call" if rows.offsets.device == _CPU else f"a graph on {rows.offsets.device}",
            hint="sample before, and move what was sampled with .to(device)",
        )
    rows = CompressedRows(*[array.contiguous() for array in rows])
    if weights is None:
        return NeighbourRows(*rows, num_keys)
    require_dense(argument, weights)
    require_device(argument, weights, _CPU, "the graph")
    if not weights.is_floating_point():
        raise InvalidInputError(argument=argument, expected="floating-point numbers", actual=weights.dtype)
    if weights.shape != rows.edges.shape:
        expected = f"(edges={len(rows.edges)},)"
        raise DimensionMismatchError(argument=argument, expected=expected, actual=describe_shape(weights))
    _require_readable(argument, weights)
    with shielded():
        weights = values_of(weights)
        weights = weights.to(torch.float64 if weights.dtype == torch.float64 else torch.float32).contiguous()
        if not _are_weights(weights):
            # Another thread may mend the caller's.
            weights = weights.clone()
            bad = (~((weights >= 0) & weights.isfinite())).nonzero().flatten().tolist()
            if bad:
                actual = f"{float(weights[bad[0]])} at edge {bad[0]}"
                raise InvalidInputError(argument=argument, expected="finite numbers of at least 0", actual=actual)
    return NeighbourRows(*rows, num_keys, weights)


def _are_weights(weights: Tensor) -> bool:
    if not len(weights):
        return True
    low, high = weights.aminmax()
    # NaN is in no range.
    return bool(low >= 0 and high < float("inf"))


def _require_readable(argument: str, x: Tensor) -> None:
    if not is_readable(x):
        raise UnsupportedError(
            argument=argument,
            expected="a tensor outside of compiled and traced code, of torch.func.vmap and of fake tensors",
            actual="a tensor whose numbers cannot be read",
        )


def require_seeds(argument: str, seeds: object, num_nodes: int) -> Tensor:
    """The seeds `(seeds,)` as int64 on the CPU; raise unless they are nodes.

    Raises:
        InvalidInputError: no integers, or on another device.
        DimensionMismatchError: not of one dimension.
        UnsupportedError: hidden by a compiler, a mode or a vmap.
        GraphStructureError: no nodes.
    """
    require_dense(argument, seeds)  # pyright: ignore[reportArgumentType]  # it checks that
    assert isinstance(seeds, Tensor)
    if seeds.dtype not in _INTEGERS:
        hint = "mask.nonzero().flatten() are the nodes of a mask" if seeds.dtype == torch.bool else None
        raise InvalidInputError(argument=argument, expected="a tensor of integers", actual=seeds.dtype, hint=hint)
    if seeds.ndim != 1:
        raise DimensionMismatchError(argument=argument, expected="(seeds,)", actual=describe_shape(seeds))
    require_device(argument, seeds, _CPU, "the graph")
    _require_readable(argument, seeds)
    with shielded():
        # A copy, which no other thread changes.
        seeds = values_of(seeds).to(torch.int64, copy=True).contiguous()
        bad = ((seeds < 0) | (seeds >= num_nodes)).nonzero().flatten().tolist()
        if bad:
            raise GraphStructureError(
                argument=argument,
                expected=f"nodes from 0 to {num_nodes - 1}",
                actual=f"{int(seeds[bad[0]])} at position {bad[0]}",
            )
    return seeds


def require_fanouts(argument: str, fanouts: object, at_least: int = 1) -> tuple[int, ...]:
    """The fanouts as plain ints; raise unless each is -1 or at least 1 (or 0, where that is allowed)."""
    given = plain(fanouts.tolist() if isinstance(fanouts, Tensor) else fanouts)
    if not isinstance(given, list | tuple) or not given:
        raise InvalidInputError(
            argument=argument, expected="a list of a number of neighbours for each hop", actual=repr(given)
        )
    for place, fanout in enumerate(given):
        is_count = isinstance(fanout, int) and not isinstance(fanout, bool)
        if not is_count or not (fanout == -1 or fanout >= at_least) or fanout >= 2**63:
            raise InvalidInputError(
                argument=f"{argument}[{place}]",
                expected=f"an int of at least {at_least}, or -1 for all neighbours",
                actual=repr(fanout),
            )
    return tuple(given)


def _grown(array: Tensor, size: int) -> Tensor:
    """The array with more room along its last axis, whose new numbers are any."""
    grown = array.new_empty(*array.shape[:-1], size)
    grown[..., : array.shape[-1]] = array
    return grown
