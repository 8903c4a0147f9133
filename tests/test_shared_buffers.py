"""Buffers that a loader's workers share with their reader: batches come whole, and stay while a part is held."""

import mmap
import multiprocessing
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Graph, HeterogeneousGraph, NeighborLoader, SampledGraph, shared_buffers
from anyattention.nn import GraphAttention
from anyattention.patterns.graph_arrays import fields_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")

resource: Any = pytest.importorskip("resource")

SEEDS = 600


def loader(transform: Any = None, workers: int = 1, **others: Any) -> NeighborLoader:
    """One of more batches than there are buffers."""
    edges = torch.randint(SEEDS, (2, 9_000), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    given = {"multiprocessing_context": "fork"} if workers else {}
    return NeighborLoader(
        Graph.from_edge_index(edges, SEEDS), None, [4, 3], batch_size=20, shuffle=True, generator=generator,
        transform=transform, num_workers=workers, **{**given, **others},
    )  # fmt: skip


def arrays_of(sampled: SampledGraph) -> list[Any]:
    blocks = [array for block in sampled.blocks for array in fields_of(block)]
    return [sampled.nodes, *sampled.edges, *blocks]


def require_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(arrays_of(one), arrays_of(other), strict=True):
            assert a is b is None or (a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b))


def num_taken(made: Any) -> int:
    return sum(made.buffers.is_taken[:])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_that_are_all_held_stay(workers: int, persistent: bool) -> None:
    found = loader(workers=workers, persistent_workers=persistent)
    expected = loader(workers=0)
    for _ in range(2):
        require_same(list(found), list(expected))


def test_a_buffer_is_free_when_the_last_part_of_its_batch_is_gone() -> None:
    made = iter(loader(prefetch_factor=1))
    part = next(made).blocks[0].edge_index[1, :5]
    expected = part.clone()
    for _ in range(8):
        next(made)
    assert num_taken(made) >= 1
    assert torch.equal(part, expected)
    deque(made, maxlen=0)
    assert num_taken(made) == 1
    del part
    assert num_taken(made) == 0


def test_memory_is_used_again() -> None:
    found = loader(prefetch_factor=2)
    places = {sampled.nodes.data_ptr() for sampled in found}
    assert len(places) <= 4 < len(found)


def test_a_fork_keeps_what_it_has_read() -> None:
    made = iter(loader(prefetch_factor=1))
    held = [next(made)]
    expected = [array.clone() for array in arrays_of(held[0]) if array is not None]
    context = multiprocessing.get_context("fork")
    read, told = context.Event(), context.Queue()

    def look() -> None:
        read.wait()
        found = [array for array in arrays_of(held[0]) if array is not None]
        told.put(all(map(torch.equal, found, expected)))

    process = context.Process(target=look)
    process.start()
    held.clear()
    deque(made, maxlen=0)
    read.set()
    assert told.get()
    process.join()


def test_a_buffer_is_used_again_when_its_other_readers_have_ended() -> None:
    """As where the last batch of an epoch is held while other workers start: no buffer is lost by that."""
    train = loader(prefetch_factor=1, persistent_workers=True)
    buffers = iter(train).buffers
    num_open = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for _ in range(8):
        for sampled in train:
            last = sampled
        require_same(list(loader(workers=2)), list(loader(workers=0)))
        assert last.num_seeds == 20
    del last, sampled
    deque(train, maxlen=0)
    assert sum(buffers.is_taken[:]) == 0
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= num_open + 1


def test_a_fork_of_a_fork_keeps_it_too() -> None:
    made = iter(loader(prefetch_factor=1))
    held = [next(made)]
    expected = held[0].nodes.clone()
    told, tell = os.pipe()
    waits, wake = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os.read(waits, 1)
            os.write(tell, b"same" if torch.equal(held[0].nodes, expected) else b"other")
        os._exit(0)
    os.waitpid(child, 0)
    held.clear()
    deque(made, maxlen=0)
    os.write(wake, b".")
    assert os.read(told, 10) == b"same"
    for end in (told, tell, waits, wake):
        os.close(end)


DROPPED_BY_A_HOOK = """
import os
held, begin = [], os.pipe()
os.register_at_fork(after_in_parent=lambda: held.clear())

import torch
from anyattention import Graph, NeighborLoader

edges = torch.randint(200, (2, 4_000), generator=torch.Generator().manual_seed(0))
graph = Graph.from_edge_index(edges, 200)
made = iter(NeighborLoader(graph, None, [4], batch_size=10, num_workers=1, multiprocessing_context="fork"))
held.append(next(made).nodes)
expected = held[0].clone()
child = os.fork()
if child == 0:
    os.read(begin[0], 1)
    os._exit(0 if torch.equal(held[0], expected) else 3)
for _ in made:
    pass
os.write(begin[1], b"1")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_keeps_what_a_hook_of_the_fork_drops() -> None:
    finished = subprocess.run([sys.executable, "-c", DROPPED_BY_A_HOOK], check=True, capture_output=True, text=True)
    assert finished.stdout == "0\n"


def everything(sampled: SampledGraph) -> dict[str, Any]:
    x = torch.arange(24.0).view(4, 6) + float(sampled.nodes[0])
    kinds = (torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
    return {
        "sampled": [sampled, (sampled.blocks[0], "text")],
        "whole": x,
        "again": x,
        "rows": x[1:3],
        "column": x[:, 1],
        "turned": x.t(),
        "zero-dimensional": x[2, 2],
        "empty": x[:0],
        "repeated": x[0].expand(3, 6),
        "complex": torch.view_as_complex(x.view(4, 3, 2)).conj(),
        "negative": torch.view_as_complex(x.view(4, 3, 2)).conj().imag,
        "negative and turned": torch.view_as_complex(x.view(4, 3, 2)).conj().imag.t(),
        "sparse": x.to_sparse(),
        "parameter": torch.nn.Parameter(x),
        "asks for gradients": x.clone().requires_grad_(),
        **{str(kind): (x % 2).to(kind) for kind in kinds},
    }


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_whatever_a_batch_becomes_comes_whole() -> None:
    for found, expected in zip(loader(everything), loader(everything, workers=0), strict=True):
        assert found.keys() == expected.keys()
        require_same([found["sampled"][0]], [expected["sampled"][0]])
        assert found["sampled"][1][0] is found["sampled"][0].blocks[0]
        assert found["sampled"][1][1] == "text"
        assert found["again"] is found["whole"]
        for name, tensor in expected.items():
            if isinstance(tensor, Tensor):
                other = found[name]
                assert type(other) is type(tensor)
                assert (other.dtype, other.layout, other.requires_grad) == (
                    tensor.dtype, tensor.layout, tensor.requires_grad,
                )  # fmt: skip
                assert torch.equal(other.to_dense(), tensor.to_dense()), name
        # Parts are parts there too: what is written to one shows in the other.
        found["whole"][1, 0] = -1
        assert found["rows"][0, 0] == -1
        assert found["whole"]._version == found["rows"]._version


def test_typed_batches() -> None:
    edges = torch.stack([torch.randint(count, (300,)) for count in (40, 23)])
    graph = HeterogeneousGraph.from_edge_index({("a", "to", "b"): edges}, {"a": 40, "b": 23})

    def of(workers: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(3)
        return iter(NeighborLoader(graph, "b", [3, 2], batch_size=6, num_workers=workers, generator=generator))

    for found, expected in zip(of(1), of(0), strict=True):
        assert found.num_seeds == expected.num_seeds
        assert repr(found) == repr(expected)
        for one, other in zip(found.blocks, expected.blocks, strict=True):
            assert (one.num_nodes, one.num_queries) == (other.num_nodes, other.num_queries)
            assert torch.equal(one.edge_index["a", "to", "b"], other.edge_index["a", "to", "b"])
        for kind, nodes in expected.nodes.items():
            assert torch.equal(found.nodes[kind], nodes)


def test_a_batch_that_is_read_in_inference_mode_trains() -> None:
    layer = GraphAttention(4, 2, in_features=3)
    with torch.inference_mode():
        sampled = next(iter(loader()))
    block = sampled.blocks[0]
    x = torch.randn(block.num_keys, 3)
    layer((x, x[: block.num_queries]), block).output.square().sum().backward()
    assert not sampled.nodes.is_inference()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_that_are_read_inside_a_derivative(workers: int) -> None:
    def read(x: Tensor) -> Tensor:
        require_same(list(found), expected)
        return x.sum()

    found, expected = loader(workers=workers), list(loader(workers=0))
    assert torch.func.grad(read)(torch.ones(2)).tolist() == [1.0, 1.0]


def test_a_tensor_that_does_not_fit_comes_as_from_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(shared_buffers.SharedBuffers):
        def __init__(self, *counts: int) -> None:
            super().__init__(*counts)
            monkeypatch.setattr(shared_buffers, "_ADDRESSES", 5_000)

    monkeypatch.setattr(shared_buffers, "SharedBuffers", Small)
    found = list(loader())
    require_same(found, list(loader(workers=0)))
    # PyTorch says of its own shared memory that it is shared.
    arrays = [array for sampled in found for array in arrays_of(sampled) if array is not None and array.numel()]
    assert {array.is_shared() for array in arrays} == {True, False}


def refuse(*_: Any) -> None:
    raise OSError("no memory")


def test_a_system_without_such_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", refuse)
    made = iter(loader())
    assert not hasattr(made, "buffers")
    require_same(list(made), list(loader(workers=0)))


def test_limited_addresses_are_left_to_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")
    assert shared_buffers.shared_buffers(1, 2, fork) is not None
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**34, resource.RLIM_INFINITY))
    assert shared_buffers.shared_buffers(1, 2, fork) is None


def test_workers_that_are_not_forked_have_none() -> None:
    assert shared_buffers.shared_buffers(1, 2, multiprocessing.get_context("spawn")) is None


def test_without_workers_the_start_method_stays_open() -> None:
    class Context:
        def get_start_method(self) -> str:
            raise AssertionError("the method is settled by the question")

    assert shared_buffers.shared_buffers(0, None, Context()) is None


def num_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_buffers_take_no_file_descriptors() -> None:
    before = num_descriptors()
    made = shared_buffers.SharedBuffers(2, 3)
    assert len(made.memory) == 10
    assert num_descriptors() == before


def parameter(sampled: SampledGraph) -> Any:
    return torch.nn.Parameter(torch.ones(3)), num_descriptors()


def test_what_pytorch_sends_of_a_tensor_is_closed_when_it_has_been_read() -> None:
    counts = [count for _, count in loader(parameter)]
    # Some of the last batches are on their way.
    assert counts[-1] - counts[0] < len(counts) // 2


def without_plain_numbers(sampled: SampledGraph) -> Any:
    parts = [torch.ones(2, 3), torch.zeros(1, 3)]
    return torch.nested.nested_tensor(parts), torch.arange(7, dtype=torch.uint8).view(torch.uint4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_pytorch_reads_and_copies_in_ways_of_their_own() -> None:
    nested, small = next(iter(loader(without_plain_numbers)))
    assert [part.tolist() for part in nested.unbind()] == [[[1.0] * 3] * 2, [[0.0] * 3]]
    assert small.dtype is torch.uint4
    assert small.view(torch.uint8).tolist() == list(range(7))


def test_an_error_of_a_transform_names_itself() -> None:
    def fail(sampled: SampledGraph) -> Any:
        return sampled, lambda: 0

    with pytest.raises((AttributeError, RuntimeError), match=r"[Pp]ickl"):
        list(loader(fail))
