"""Decoding a token over a cache that lies as caches do: `attend`, beside PyTorch's own, bare, where that sees all keys.

The cache is contiguous float32, the same with heads first, the first part of a longer one (`cache[:, :n]`), or
bfloat16. None is copied: a window costs what the keys that it sees cost, however long the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention import Full, Pattern, Window, attend, explain
from benchmarks.harness import Timing, measure, print_table, require_tests, write_result

HEADS, HEAD_DIM = 8, 64


def main() -> None:
    require_tests("tests/ops/test_strides.py", "tests/ops/test_few_queries.py")
    cases: dict[str, dict[str, Timing]] = {}
    for batch in (1, 8):
        window = Window(256, 0, align="bottom_right")
        cases[f"Window(256) over 100,000 keys, batch {batch}"] = token(batch, 100_000, window)
        cases[f"all of 4,096 keys, batch {batch}"] = token(batch, 4_096, Full())
        cases[f"all of 4,096 keys, heads first, batch {batch}"] = beside_torch(batch, 4_096)
    for title, results in cases.items():
        print_table(title, results)
    write_result("decode", cases)


def token(batch: int, length: int, pattern: Pattern) -> dict[str, Timing]:
    query = torch.randn(batch, 1, HEADS, HEAD_DIM)
    longer = torch.randn(2, batch, length + 64, HEADS, HEAD_DIM)
    whole = longer[:, :, :length].contiguous()
    contestants = {
        "anyattention": call(query, whole, pattern),
        "anyattention, heads first": call(query, turned(whole), pattern),
        "anyattention, cache[:, :n]": call(query, longer[:, :, :length], pattern),
        "anyattention, bfloat16": call(query.bfloat16(), whole.bfloat16(), pattern),
    }
    with torch.no_grad():
        return measure("anyattention", contestants)


def beside_torch(batch: int, length: int) -> dict[str, Timing]:
    """A cache as PyTorch's own attention takes it, `(batch, heads, length, head_dim)`; ours reads a view of it."""
    query = torch.randn(batch, 1, HEADS, HEAD_DIM)
    cache = turned(torch.randn(2, batch, length, HEADS, HEAD_DIM))
    heads_first = [x.transpose(1, 2) for x in (query, *cache)]
    contestants = {
        "anyattention": call(query, cache, Full()),
        "torch SDPA, bare": lambda: F.scaled_dot_product_attention(*heads_first),
        "reading keys and values": lambda: cache.sum(),
    }
    with torch.no_grad():
        return measure("anyattention", contestants)


def turned(cache: Tensor) -> Tensor:
    """The same numbers, those of a head side by side."""
    return cache.transpose(2, 3).contiguous().transpose(2, 3)


def call(query: Tensor, cache: Tensor, pattern: Pattern) -> Callable[[], object]:
    assert explain(query, *cache, pattern).implementation == "cpu"
    return lambda: attend(query, *cache, pattern).output


if __name__ == "__main__":
    main()
