"""Attention to a million memories of width 64: 1,000 queries, the 32 most alike, exact and by an approximate index.

`python -m benchmarks.memory [case ...]` runs the named cases (all by default) and keeps each one's result as soon as it
is there: exact approximate. An environment variable takes the place of the number of memories: MEMORIES=100000.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from usearch.index import Index

from anyattention import TopK, attend, explain
from anyattention.memory import ClusterIndex, UsearchIndex
from anyattention.native import large_empty
from anyattention.nn import MemoryAttention
from benchmarks.figures import OURS
from benchmarks.harness import RESULTS, Timing, keep_freed_memory, measure, print_table, require_tests, write_result

MEMORIES, QUERIES, WIDTH, K = int(os.environ.get("MEMORIES", "1_000_000")), 1_000, 64, 32
# Of usearch: the recall that decides how many candidates a search keeps, and the latent space that keys come from.
RECALL, CANDIDATES, LATENT = 0.95, (32, 48, 64, 96, 128, 192, 256), 12


def main(names: list[str]) -> None:
    cases: dict[str, Callable[[], dict[str, Any]]] = {"exact": exact, "approximate": approximate}
    require_tests("tests/memory", "tests/nn/test_memory_attention.py", "-m", "not exhaustive")
    path = RESULTS / "memory.json"
    known: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    results = {name: known[name] for name in cases if name in known}
    for name in names or cases:
        print(f"\n== {name}: {(cases[name].__doc__ or '').splitlines()[0]}", flush=True)
        results[name] = cases[name]()
        for title, found in results[name].items():
            if all(isinstance(each, Timing) for each in found.values()):
                print_table(title, found)
            else:
                print(title, json.dumps(found, indent=1))
        write_result("memory", results)


def exact() -> dict[str, Any]:
    """An exact memory beside TopK over the same keys; the gradients of a memory that is fixed, and that is trained."""
    torch.manual_seed(0)
    query, cotangent = torch.randn(QUERIES, WIDTH), torch.randn(QUERIES, WIDTH)
    keys, values = torch.randn(2, MEMORIES, WIDTH)
    given = query[None, :, None], keys[None, :, None], values[None, :, None]
    assert explain(*given, TopK(K)).implementation == "cpu"
    fixed, trained, sparse = (
        of_module(keys, values, **settings)
        for settings in ({}, {"trainable": True}, {"trainable": True, "sparse_grad": True})
    )
    expected = attend(*given, TopK(K)).output[0, :, 0]
    with torch.no_grad():
        torch.testing.assert_close(fixed(query).output, expected, rtol=1e-4, atol=1e-5)
    leaf = query.clone().requires_grad_()

    def both(memory: MemoryAttention) -> Callable[[], object]:
        leaves = [leaf, *memory.parameters()]
        return lambda: torch.autograd.grad(memory(leaf).output, leaves, cotangent)

    def forward() -> Tensor:
        with torch.no_grad():
            return fixed(query).output

    def fresh_zeros() -> tuple[Tensor, ...]:
        attend(*given, TopK(K))
        return tuple(large_empty(x, x.shape).zero_() for x in (keys, values))

    contestants: dict[str, Callable[[], object]] = {
        "TopK, forward": lambda: attend(*given, TopK(K)).output,
        "limit: TopK, forward, and zeros as large as dense gradients": fresh_zeros,
        OURS: forward,
        "anyattention, gradient to the queries": both(fixed),
        "anyattention, sparse gradients to keys and values too": both(sparse),
        "anyattention, dense gradients to keys and values too": both(trained),
    }
    keep_freed_memory()
    return {"forward, and with gradients": measure("anyattention", contestants, rounds=9)}


def approximate() -> dict[str, Any]:
    """Clusters and usearch's graph beside an exact memory: keys of a 12-dimensional latent space, and Gaussian ones."""
    found: dict[str, Any] = {}
    indexes: dict[str, dict[str, Any]] = {
        OURS: {"index": "clusters"},
        "usearch, bfloat16": {"index": "usearch", "index_dtype": "bfloat16"},
        "usearch": {"index": "usearch"},
    }
    cases = (
        ("keys of 12 dimensions mapped to 64", from_latent, MEMORIES, list(indexes)),
        ("Gaussian keys", gaussian, MEMORIES // 10, list(indexes)[:2]),
        ("Gaussian keys", gaussian, MEMORIES, list(indexes)[:1]),
    )
    for title, drawn, count, names in cases:
        torch.manual_seed(0)
        title = f"{title}, {count:,}"
        keys, query = drawn(count)
        values = torch.randn(count, WIDTH)
        memories: dict[str, MemoryAttention] = {}
        limits: dict[str, Callable[[], object]] = {"limit: all keys read once": keys.sum}
        for name in names:
            memories[name] = memory = of_module(keys, values, **indexes[name])
            found[f"{title}, {name}"] = about = built(memory, query)
            if indexes[name].get("index_dtype") == "bfloat16":
                rows = torch.randint(count, (QUERIES * int(about["keys compared by a query"]),))
                limits["limit of usearch, bfloat16: index_select of what it compares"] = partial(
                    keys.bfloat16().index_select, 0, rows
                )
        memories[f"{OURS}, exact"] = of_module(keys, values)
        with torch.no_grad():
            for several, some, bounds in (("", query, limits), (", one query", query[:1], {})):
                calls = {name: forward_of(memory, some) for name, memory in memories.items()}
                found[f"{title}{several}"] = measure(OURS, {**calls, **bounds}, rounds=9)
    return found


def built(memory: MemoryAttention, query: Tensor) -> dict[str, float]:
    """What it takes to build a memory's index; usearch's keeps as few candidates as RECALL allows from then on."""
    started = time.perf_counter()
    memory.search(query[:1])
    about = {"seconds to build": round(time.perf_counter() - started, 1)}
    index = memory.index
    if isinstance(index, ClusterIndex):
        about["keys compared by a query"] = round(index.num_probes * len(index) / index.num_clusters)
    if isinstance(index, UsearchIndex):
        for index.ef_search in CANDIDATES:
            if memory.recall(query) >= RECALL:
                break
        graph = Index.restore(index.to_bytes())
        assert graph is not None
        graph.expansion_search = index.ef_search
        about["keys compared by a query"] = graph.search(query.numpy(), K).computed_distances // QUERIES
    return {**about, "recall at 32": round(memory.recall(query), 4)}


def of_module(keys: Tensor, values: Tensor, **settings: Any) -> MemoryAttention:
    memory = MemoryAttention(WIDTH, 1, project=False, value_dim=values.shape[1], k=K, **settings)
    memory.append(keys, values)
    return memory.eval()


def forward_of(memory: MemoryAttention, query: Tensor) -> Callable[[], Tensor]:
    return lambda: memory(query).output


def from_latent(count: int) -> tuple[Tensor, Tensor]:
    """Keys and queries of the same kind, of a few dimensions that a random network maps to 64."""
    first, second = torch.randn(LATENT, 4 * LATENT) / LATENT**0.5, torch.randn(4 * LATENT, WIDTH) / (4 * LATENT) ** 0.5
    rows = torch.nn.functional.normalize((torch.randn(count + QUERIES, LATENT) @ first).tanh() @ second, dim=1)
    return rows[:count].clone(), rows[count:].clone()


def gaussian(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, WIDTH), torch.randn(QUERIES, WIDTH)


if __name__ == "__main__":
    main(sys.argv[1:])
