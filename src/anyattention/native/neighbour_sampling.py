"""Neighbours drawn without replacement from compressed rows: the kernels, or PyTorch and numpy where they cannot run.

Both draw the same: draw t of row r is a number of Philox4x32-10 under the seed, whose counter has the words t / 2,
stream, r and r / 2^32.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anyattention import ambient
from anyattention.errors import IndexRangeError, InvalidInputError
from anyattention.native import load
from anyattention.native.philox import philox_words

__all__ = ["NeighbourRows", "enter_nodes", "numbered_nodes", "sampled_offsets", "sampled_rows"]

_LOW = 0xFFFFFFFF
_INT32_NODES = 2**31 - 1


@dataclass(frozen=True)
class NeighbourRows:
    """What neighbours are drawn from: compressed rows on the CPU.

    Attributes:
        offsets, columns, edges: the rows, as those of `CompressedRows`.
        num_columns: how many there are.
        weights: `(num_edges,)` float32 or float64, finite and not negative; None for none. Subnormal ones count as 0,
            since some threads may flush them.
        has_slot_weights: whether the weights are in the order of the slots, else in that of the edges.

    Raises:
        InvalidInputError: arrays of other dtypes, sizes or devices, or not contiguous: kernels get their pointers.
    """

    offsets: Tensor
    columns: Tensor
    edges: Tensor
    num_columns: int
    weights: Tensor | None = None
    has_slot_weights: bool = False

    def __post_init__(self) -> None:
        dtypes = (torch.int64,)
        _require_array("offsets", self.offsets, dtypes, None)
        for name in ("columns", "edges"):
            _require_array(name, getattr(self, name), dtypes, len(self.edges))
        if self.weights is not None:
            _require_array("weights", self.weights, (torch.float32, torch.float64), len(self.edges))

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.offsets) - 1

    def slot_weights(self) -> NeighbourRows:
        """These rows, with weights in the order of the slots, which are read faster."""
        if self.weights is None or self.has_slot_weights:
            return self
        return NeighbourRows(self.offsets, self.columns, self.edges, self.num_columns, self.weights[self.edges], True)


def sampled_offsets(rows: NeighbourRows, nodes: Tensor, fanout: int, first: int) -> Tensor:
    """`(nodes + 1,)` int64 from `first` on: what is drawn of each listed row goes between its place and the next.

    As many as the row has, those of weight 0 aside, and at most `fanout` unless that is -1.

    Raises:
        IndexRangeError: a row that is not there.

    Cost: O(nodes), with weights O(the rows' slots).
    """
    offsets = torch.empty(len(nodes) + 1, dtype=torch.int64, device="cpu")
    offsets[0] = first
    if _runs(rows, nodes):
        given = (rows.offsets.data_ptr(), rows.num_rows, len(rows.columns), *_weights(rows))
        listed = (nodes.data_ptr(), len(nodes), fanout, load.num_threads())
        load.run("sampled_offsets", *given, *listed, offsets.data_ptr())
        return offsets
    _require_below(nodes, rows.num_rows, "sampled_offsets")
    slots, sizes = _slots(rows, nodes)
    if rows.weights is not None:
        row = torch.arange(len(nodes), device="cpu").repeat_interleave(sizes)
        sizes = torch.zeros_like(sizes).index_add_(0, row, (_weights_of(rows, slots) > 0).to(torch.int64))
    offsets[1:] = first + (sizes if fanout < 0 else sizes.clamp(max=fanout)).cumsum(0)
    return offsets


def sampled_rows(
    rows: NeighbourRows,
    nodes: Tensor,
    offsets: Tensor,
    seed: int,
    stream: int,
    first: int,
    columns: Tensor,
    positions: Tensor,
    edges: Tensor,
) -> None:
    """What is drawn of each listed row, in the order of the row, into the places that `sampled_offsets` gave.

    Args:
        rows, nodes, offsets: as they were there.
        seed, stream: the key of all draws, and a number that tells apart draws of the same row, below 2^32.
        first: the position of the first listed row.
        columns, positions, edges: `(places,)` int64: of each drawn slot the column, the position of its row, its edge.

    Raises:
        IndexRangeError: a place that is not there: the rows have changed.
        OutOfMemoryError: there is no memory for the workspace.

    Cost: O(nodes + what is drawn), with weights O(the rows' slots).
    """
    if _runs(rows, nodes):
        arrays = (rows.offsets.data_ptr(), rows.columns.data_ptr(), rows.edges.data_ptr())
        sizes = (rows.num_rows, rows.num_columns, len(rows.columns))
        listed = (nodes.data_ptr(), len(nodes), offsets.data_ptr(), len(columns), first)
        results = (columns.data_ptr(), positions.data_ptr(), edges.data_ptr())
        load.run("sampled_rows", *arrays, *sizes, *_weights(rows), *listed, seed, stream, load.num_threads(), *results)
        return
    begin, sizes = rows.offsets[nodes], offsets.diff()
    lengths = rows.offsets[nodes + 1] - begin
    drawn = [
        _drawn(rows, int(node), int(start), int(length), int(size), seed, stream)
        for node, start, length, size in zip(nodes, begin, lengths, sizes, strict=True)
    ]
    slots = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *drawn])
    place = int(offsets[0])
    columns[place:] = rows.columns[slots]
    edges[place:] = rows.edges[slots]
    positions[place:] = first + torch.arange(len(nodes), device="cpu").repeat_interleave(sizes)


def numbered_nodes(ids: Tensor, num_nodes: int, found: Tensor, count: int, kind: int = 0) -> int:
    """Numbers nodes in the order in which they are found; those that are known keep theirs.

    Args:
        ids: `(ids,)` int64, nodes below num_nodes; each becomes its number.
        found: `(capacity,)` int64, the node of each number; new ones are written after the first `count`.
        kind: which of several sets of nodes these are, each with numbers of its own; a walk over them must not be
            interleaved with another of the same thread.

    Returns:
        How many numbers there are now.

    Raises:
        IndexRangeError: a node that is not there.

    Cost: O(ids); each thread keeps 4 bytes for each node of the largest graph that it has sampled, 8 from 2^31 nodes.
    """
    if ambient.moment_of((ids, found)) is ambient.Moment.PLAIN and load.available():
        places = _places(kind, num_nodes)
        known = ctypes.c_int64(count)
        arrays = (places.data_ptr(), places.dtype is torch.int64, found.data_ptr())
        load.run("numbered_nodes", ids.data_ptr(), len(ids), num_nodes, *arrays, len(found), ctypes.byref(known))
        return known.value
    _require_below(ids, num_nodes, "numbered_nodes")
    numbers = {node: number for number, node in reversed(list(enumerate(found[:count].tolist())))}
    for place, node in enumerate(ids.tolist()):
        if node not in numbers:
            numbers[node] = count
            found[count] = node
            count += 1
        ids[place] = numbers[node]
    return count


def enter_nodes(nodes: Tensor, num_nodes: int, kind: int = 0) -> None:
    """Enters nodes, some of them several times, as the first of `found` of `numbered_nodes`: the first place counts."""
    numbers = nodes.clone()
    numbered_nodes(numbers, num_nodes, torch.empty_like(nodes), 0, kind)
    is_first = numbers > torch.cat([numbers.new_full((1,), -1), numbers.cummax(0).values])[:-1]
    if load.available():
        places = _places(kind, num_nodes)
        places[nodes[is_first]] = is_first.nonzero().flatten().to(places.dtype)


_kept = threading.local()


def _places(kind: int, num_nodes: int) -> Tensor:
    """The workspace of `numbered_nodes`, whatever is in it; a thread's own, kept for its next graph."""
    kept: dict[int, Tensor] = vars(_kept).setdefault("places", {})
    places = kept.get(kind)
    dtype = torch.int32 if num_nodes <= _INT32_NODES else torch.int64
    if places is None or len(places) < num_nodes or places.dtype is not dtype:
        with ambient.shielded():
            places = kept[kind] = torch.zeros(max(num_nodes, 1), dtype=dtype, device="cpu")
        load.run("prefer_large_pages", places.data_ptr(), places.numel() * places.element_size())
    return places


def _runs(rows: NeighbourRows, nodes: Tensor) -> bool:
    """Whether a kernel can read these; what a mode or a transform looks at goes by way of PyTorch."""
    arrays = (rows.offsets, rows.columns, rows.edges, rows.weights, nodes)
    return ambient.moment_of(arrays) is ambient.Moment.PLAIN and load.available()


def _weights(rows: NeighbourRows) -> tuple[int | None, int | None, bool]:
    """The weights as a kernel takes them."""
    if rows.weights is None:
        return None, None, False
    places = None if rows.has_slot_weights else rows.edges.data_ptr()
    return rows.weights.data_ptr(), places, rows.weights.dtype is torch.float64


def _require_array(name: str, array: Tensor, dtypes: tuple[torch.dtype, ...], size: int | None) -> None:
    fits = array.dtype in dtypes and array.is_cpu and array.ndim == 1 and array.is_contiguous()
    if not fits or (len(array) == 0 if size is None else len(array) != size):
        raise InvalidInputError(
            argument=name,
            expected=f"{dtypes[-1]} on the cpu, contiguous, ({'rows + 1' if size is None else size},)",
            actual=f"{array.dtype} on {array.device}, {tuple(array.shape)}",
        )


def _require_below(nodes: Tensor, count: int, function: str) -> None:
    if len(nodes) and not (int(nodes.min()) >= 0 and int(nodes.max()) < count):
        raise IndexRangeError(f"{function}: a node that does not exist", argument="nodes")


def _slots(rows: NeighbourRows, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of the listed rows, one row after the other, and how many each has."""
    begin = rows.offsets[nodes]
    sizes = rows.offsets[nodes + 1] - begin
    ends = sizes.cumsum(0)
    slots = torch.arange(int(sizes.sum()), device="cpu")
    return slots + (begin - ends + sizes).repeat_interleave(sizes), sizes


def _weights_of(rows: NeighbourRows, slots: Tensor) -> Tensor:
    assert rows.weights is not None
    weights = rows.weights[slots if rows.has_slot_weights else rows.edges[slots]]
    return weights.where(weights >= torch.finfo(weights.dtype).tiny, 0)


def _draws(count: int, row: int, seed: int, stream: int) -> np.ndarray:
    """The first draws of a row, as uint64."""
    blocks = torch.arange((count + 1) // 2, device="cpu")
    words = [blocks, *(torch.full_like(blocks, word) for word in (stream, row & _LOW, row >> 32))]
    low0, high0, low1, high1 = philox_words(words, torch.tensor(seed, dtype=torch.int64, device="cpu")).numpy()
    draws = np.stack(
        [
            low0.astype(np.uint64) | high0.astype(np.uint64) << 32,
            low1.astype(np.uint64) | high1.astype(np.uint64) << 32,
        ],
        1,
    )
    return draws.reshape(-1)[:count]


def _waiting_times(uniform: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """As the kernel's: relative to the largest weight, and where they could be infinite numbers that rise with them."""
    least_rate, far, log_far = 2.0**-990, 2.0**996, 690.3745
    largest = weights.max(initial=0)
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        waits, rates = -np.log(uniform), weights / largest
        logs = np.log(waits) - np.log(weights) + np.log(largest)
        late = np.where(logs < log_far, np.exp(logs), far * (1 + logs - log_far))
        return np.where(rates >= least_rate, waits / rates, late)


def _drawn(rows: NeighbourRows, row: int, begin: int, length: int, size: int, seed: int, stream: int) -> Tensor:
    """The slots that are drawn of one row, ascending: those that wait the shortest time, or Floyd's choice."""
    if rows.weights is not None:
        weights = _weights_of(rows, torch.arange(begin, begin + length, device="cpu")).to(torch.float64).numpy()
        there = weights.nonzero()[0]
        uniform = ((_draws(length, row, seed, stream)[there] >> 11).astype(np.float64) + 1) * 2.0**-53
        chosen = there[np.argsort(_waiting_times(uniform, weights[there]), kind="stable")[:size]]
        return begin + torch.from_numpy(np.sort(chosen))
    if size == length:
        return torch.arange(begin, begin + length, device="cpu")
    drawn: set[int] = set()
    for last, draw in zip(range(length - size, length), _draws(size, row, seed, stream).tolist(), strict=True):
        slot = draw * (last + 1) >> 64
        drawn.add(last if slot in drawn else slot)
    return torch.tensor([begin + slot for slot in sorted(drawn)], dtype=torch.int64, device="cpu")
