"""Attention to memories in a mapped file: 10,000,000 keys and values of width 64, float32, and 8 queries.

`python -m benchmarks.mapped_memory`. The file has 5 GB, keys and values apart, and lies in the page cache. The limits
are how fast the same bytes are read from there by as many threads: where they are mapped (PyTorch's sum), and as they
are copied out of it (pread into a buffer that stays in the cache). MEMORIES=1000000 takes fewer.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyattention import explain
from anyattention.memory import MappedMemory, attend_file, write_memory
from benchmarks.harness import measure, print_table, require_tests, write_result

MEMORIES, QUERIES, WIDTH, K = int(os.environ.get("MEMORIES", "10_000_000")), 8, 64, 32
_PART = 100_000
_BUFFER = 1 << 20


def main() -> None:
    require_tests("tests/memory/test_mapped.py")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        write(path)
        write_result("mapped_memory", measured(path))


def write(path: Path) -> None:
    torch.manual_seed(0)
    write_memory(path, ((torch.randn(_PART, WIDTH), torch.randn(_PART, WIDTH)) for _ in range(MEMORIES // _PART)))


def measured(path: Path) -> dict[str, Any]:
    query, cotangent = torch.randn(QUERIES, WIDTH), torch.randn(QUERIES, WIDTH)
    part = torch.zeros(1, _PART, 1, WIDTH)
    assert explain(query[None, :, None], part, part).implementation == "cpu"
    leaf = query.clone().requires_grad_()
    forward = measure(
        "anyattention",
        {
            "anyattention": lambda: attend_file(query, path),
            "limit: the sum of what is mapped": lambda: summed(path),
            "limit: read by pread": lambda: read(path),
            f"anyattention, the {K} best": lambda: attend_file(query, path, k=K),
        },
        rounds=15,
    )
    backward = measure(
        "anyattention",
        {
            "anyattention": lambda: attend_file(query, path),
            "anyattention, with the gradient": lambda: gradient(leaf, path, cotangent),
        },
        rounds=3,
    )
    size = path.stat().st_size
    print_table(f"{MEMORIES:,} memories", forward)
    print_table("with the gradient", backward)
    rates = {name: round(size / timing.median / 1e9, 1) for name, timing in {**backward, **forward}.items()}
    print(rates)
    cases = {"memories": MEMORIES, "queries": QUERIES, "bytes": size}
    return {**cases, "forward": forward, "with the gradient": backward, "GB a second": rates}


def gradient(query: Tensor, path: Path, cotangent: Tensor) -> Tensor:
    return torch.autograd.grad(attend_file(query, path).output, query, cotangent)[0]


def summed(path: Path) -> Tensor:
    """Each row once, in parts as attention has them; the file is mapped anew."""
    memory = MappedMemory(path)
    total = torch.zeros(())
    for keys, values in zip(memory.keys.split(1 << 20), memory.values.split(1 << 20), strict=True):
        total += keys.sum() + values.sum()
    return total


def read(path: Path) -> None:
    """All bytes, by as many threads as PyTorch has, in turns; os.preadv lets other threads run."""
    threads = torch.get_num_threads()
    number = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda first: _read_every(number, first, threads), range(threads)))
    finally:
        os.close(number)


def _read_every(number: int, first: int, step: int) -> None:
    buffer, place = bytearray(_BUFFER), first * _BUFFER
    while os.preadv(number, [buffer], place):
        place += step * _BUFFER


if __name__ == "__main__":
    main()
