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
    require_tests("tests/ops/test_strides.py")
    cases: dict[str, dict[str, Timing]] = {}
    for batch in (1, 8):
        cases[f"Window(256) over 100,000 keys, batch {batch}"] = token(
            batch, 100_000, Window(256, 0, align="bottom_right")
        )
        cases[f"all of 4,096 keys, batch {batch}"] = token(batch, 4_096, Full())
    for title, results in cases.items():
        print_table(title, results)
    write_result("decode", cases)


def token(batch: int, length: int, pattern: Pattern) -> dict[str, Timing]:
    query = torch.randn(batch, 1, HEADS, HEAD_DIM)
    longer = torch.randn(2, batch, length + 64, HEADS, HEAD_DIM)
    whole = longer[:, :, :length].contiguous()
    heads_first = whole.transpose(2, 3).contiguous().transpose(2, 3)
    contestants: dict[str, Callable[[], object]] = {
        "contiguous": call(query, whole, pattern),
        "heads first": call(query, heads_first, pattern),
        "cache[:, :n]": call(query, longer[:, :, :length], pattern),
        "bfloat16": call(query.bfloat16(), whole.bfloat16(), pattern),
    }
    if isinstance(pattern, Full):
        turned = [x.transpose(1, 2) for x in (query, *heads_first)]
        contestants["torch SDPA, heads first"] = lambda: F.scaled_dot_product_attention(*turned)
    with torch.no_grad():
        return measure("contiguous", contestants)


def call(query: Tensor, cache: Tensor, pattern: Pattern) -> Callable[[], object]:
    assert explain(query, *cache, pattern).implementation == "cpu"
    return lambda: attend(query, *cache, pattern).output


if __name__ == "__main__":
    main()
