"""Memory that a loader's forked workers share with their reader: there a batch's tensors lie when it has been read.

A worker writes tensors into a buffer of its own that is free, and sends all else of the batch through PyTorch's queue.
The reader's tensors are that memory; when the last of them is gone, the buffer is free again. So the reader copies
nothing, and memory is touched for the first time only once.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import mmap
import multiprocessing
import os
import select
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention.ambient import is_plain, lasting, shielded
from anyattention.patterns.graph import Graph
from anyattention.patterns.graph_arrays import fields_of
from anyattention.patterns.heterogeneous import HeterogeneousGraph
from anyattention.patterns.sampled import SampledGraph
from anyattention.patterns.sampled_heterogeneous import SampledHeterogeneousGraph

__all__ = ["SharedBuffers", "shared_buffers"]

# Addresses of a buffer, of which a batch takes as much memory as it has tensors.
_ADDRESSES = 2**30
_ALIGNMENT = 64

# Of a worker: those that it may have ready, one that is read, one that is written.
_BESIDES_READY = 2

# What is taken apart into tensors, which need no check on their way. All else is pickled as PyTorch's loader does.
_PARTS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    Graph: lambda graph: (Graph, (*fields_of(graph), graph.search_radius)),
    HeterogeneousGraph: lambda graph: (
        HeterogeneousGraph,
        (dict(graph.num_nodes), dict(graph.edge_index), dict(graph.num_queries)),
    ),
    SampledGraph: lambda made: (SampledGraph, (made.nodes, made.blocks, made.edges)),
    SampledHeterogeneousGraph: lambda made: (SampledHeterogeneousGraph, (made.nodes, made.blocks, made.edges)),
}


class SharedBuffers:
    """Buffers of each worker of a loader. Make them before the workers are forked, and keep them as long as these.

    Args:
        num_workers: how many workers there will be.
        num_ready: how many batches each may have ready.

    Raises:
        OSError: the system gives none.

    Cost: memory for the largest batch that each buffer has held.
    """

    def __init__(self, num_workers: int, num_ready: int) -> None:
        self.per_worker = num_ready + _BESIDES_READY
        count = num_workers * self.per_worker
        self.is_taken = mmap.mmap(-1, count)
        # It is no file, so it takes no room in /dev/shm, which is small in containers, and no file descriptor.
        self.memory = [mmap.mmap(-1, _ADDRESSES) for _ in range(count)]
        self.key = next(_KEYS)
        _KNOWN[self.key] = self

    def sent(self, made: Any, worker: int) -> Any:
        """In a worker: what to send for a batch. The batch itself where no buffer is free."""
        places = range(worker * self.per_worker, (worker + 1) * self.per_worker)
        # Written from the first that is free on, so that few are touched.
        place = next((place for place in places if not self.is_taken[place]), None)
        if place is None:
            return made
        # Only once, and sent: what PyTorch pickles of a tensor stays open until it is read.
        rest = io.BytesIO()
        writer = _Writer(rest, self.memory[place], _Lent(self.key, place))
        with shielded():
            writer.dump(made)
        self.is_taken[place] = writer.end > 0
        return _Sent(rest.getvalue())


def shared_buffers(num_workers: int, num_ready: int | None, context: Any) -> SharedBuffers | None:
    """Buffers for workers that multiprocessing's context is to start; None where they cannot share any."""
    # To ask for the method is to settle it for the whole process, as PyTorch does where there are workers.
    if num_workers == 0 or (multiprocessing if context is None else context).get_start_method() != "fork":
        return None
    if _are_addresses_limited():
        return None
    try:
        return SharedBuffers(num_workers, num_ready or 0)
    except OSError:
        return None


def _are_addresses_limited() -> bool:
    # Only systems that fork have the module.
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return True
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    return overcommit.exists() and overcommit.read_text().strip() == "2"


class _Writer(ForkingPickler):
    """Pickles what a batch is, and writes its tensors into a buffer."""

    def __init__(self, rest: io.BytesIO, memory: mmap.mmap, lent: _Lent) -> None:
        super().__init__(rest)
        self.memory, self.lent, self.end = memory, lent, 0
        # By where their memory is, tensors that were written.
        self.written: dict[int, list[Tensor]] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Graphs and samples by their tensors, and tensors by where they are in the buffer, or as parts of others."""
        if type(obj) in _PARTS:
            return _PARTS[type(obj)](obj)
        x = _dense(obj) if type(obj) is Tensor else None
        if x is None:
            return NotImplemented
        shape, own = tuple(x.shape), self.written.setdefault(x.untyped_storage().data_ptr(), [])
        for other in own:
            first = x.storage_offset() - other.storage_offset()
            if other.dtype is x.dtype and first >= 0 and first + x.numel() <= other.numel():
                return _part, (other, first, shape)
        begin = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        if begin + x.nbytes > _ADDRESSES:
            return NotImplemented
        # As bytes, since PyTorch copies no numbers of some dtypes.
        _numbers(self.memory, begin, torch.uint8, (x.nbytes,)).copy_(x.view(-1).view(torch.uint8))
        self.end = begin + x.nbytes
        if x is obj:
            own.append(x)
        return _numbers, (self.lent, begin, x.dtype, shape)


def _dense(x: Tensor) -> Tensor | None:
    """A tensor whose memory a buffer can hold instead, contiguous; None where it has to be pickled."""
    if not x.is_cpu or x.layout is not torch.strided or x.is_nested or x.is_quantized or x.requires_grad:
        return None
    if x.is_conj() or x.is_neg():
        # Of a view that is computed when it is read PyTorch sends what it is a view of.
        x = x.resolve_conj().resolve_neg().contiguous()
    return x if x.numel() > 0 and x.is_contiguous() and is_plain(x) else None


def _numbers(memory: Any, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)


def _part(whole: Tensor, first: int, shape: tuple[int, ...]) -> Tensor:
    return whole.view(-1)[first : first + torch.Size(shape).numel()].view(shape)


class _Sent:
    """A batch on its way; the reader gets the batch."""

    def __init__(self, rest: bytes) -> None:
        self.rest = rest

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.rest,)


def _received(rest: bytes) -> Any:
    _forks.free_waiting()
    # What comes from this process's own workers, through the loader's queue; no file is read like this.
    with lasting():
        return ForkingPickler.loads(rest)  # pyright: ignore[reportAttributeAccessIssue]


class _Lent:
    """A worker's buffer that it has written into; the reader gets its numbers."""

    def __init__(self, *where: int) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Any, ...]:
        return _lease, self.where


class _Forks:
    """The processes that were forked from this one since it read a batch, and may read that memory too.

    Attributes:
        count: grows with each fork.
        has_read: whether this process has read a batch.
    """

    def __init__(self) -> None:
        self.count, self.has_read = 0, False
        self._alive: list[tuple[int, int | None]] = []
        self._waiting: list[_Place] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child)

    def free(self, place: _Place) -> None:
        """Free a buffer that is not read here any more, once no process has it that was forked meanwhile."""
        if place.num_forks == self.count:
            place.free()
        else:
            self._waiting.append(place)

    def free_waiting(self) -> None:
        """Free those buffers whose other readers have ended."""
        if self._waiting:
            self._forget_ended()
            waiting, self._waiting = self._waiting, []
            for place in waiting:
                if any(number > place.num_forks for number, _ in self._alive):
                    self._waiting.append(place)
                else:
                    place.free()

    def _forget_ended(self) -> None:
        self._alive = [each for each in self._alive if not _has_ended(each[1])]

    def _before(self) -> None:
        # The new process and its own have the other end of a pipe: it is at its end when they have ended. Before the
        # fork, since other hooks and other threads may drop a batch between the fork and a note of it.
        self.count += 1
        self._other_end: int | None = None
        if self.has_read:
            self._forget_ended()
            try:
                end, self._other_end = os.pipe()
            except OSError:
                end = None
            self._alive.append((self.count, end))

    def _in_parent(self) -> None:
        if self._other_end is not None:
            os.close(self._other_end)

    def _in_child(self) -> None:
        for _, end in self._alive:
            if end is not None:
                os.close(end)
        self._alive, self._waiting = [], []


def _has_ended(end: int | None) -> bool:
    """Whether all processes have ended that have the other end of a pipe, which then is closed here too."""
    if end is None:
        return False
    poll = select.poll()
    poll.register(end)
    if not poll.poll(0):
        return False
    os.close(end)
    return True


_forks = _Forks()


class _Place(NamedTuple):
    """A buffer that is read."""

    is_taken: mmap.mmap
    number: int
    process: int
    num_forks: int

    def free(self) -> None:
        self.is_taken[self.number] = False


class _Lease(ctypes.Array):
    """The numbers of a buffer that is read: tensors hold it, and the buffer is free when they are gone."""

    _type_ = ctypes.c_byte  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    _length_ = _ADDRESSES  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    place: _Place

    def __del__(self, forks: _Forks = _forks) -> None:
        if self.place.process == os.getpid():
            forks.free(self.place)


def _lease(key: int, number: int) -> _Lease:
    buffers = _KNOWN[key]
    _forks.has_read = True
    lease = _Lease.from_buffer(buffers.memory[number])
    lease.place = _Place(buffers.is_taken, number, os.getpid(), _forks.count)
    return lease


_KEYS = itertools.count()
_KNOWN: weakref.WeakValueDictionary[int, SharedBuffers] = weakref.WeakValueDictionary()
