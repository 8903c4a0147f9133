"""Neighbour sampling from a graph of 2 million nodes and 60 million edges: one thread beside DGL, and loaders' workers.

`python -m benchmarks.sampling [case ...]` runs the named cases (all by default) and keeps each one's result as soon as
it is there: batches workers.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattention import Graph, NeighborLoader
from benchmarks.graph import dgl, random_graph
from benchmarks.harness import RESULTS, Timing, measure, print_table, require_tests, write_result

NODES, EDGES, SEEDS, FANOUTS = 2_000_000, 60_000_000, 1_024, (15, 10)
BATCHES = 100


def main(names: list[str]) -> None:
    cases = {"batches": batches, "workers": workers}
    require_tests("tests/patterns/test_sampling.py")
    torch.set_num_threads(1)
    path = RESULTS / "sampling.json"
    results: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    results |= {"nodes": NODES, "edges": EDGES, "seeds": SEEDS}
    for name in names or cases:
        print(f"\n== {name}: {(cases[name].__doc__ or '').splitlines()[0]}", flush=True)
        results[name] = cases[name]()
        for title, timings in results[name].items():
            print_table(title, timings)
        write_result("sampling", results)


def batches() -> dict[str, dict[str, Timing]]:
    """A batch of 1,024 seeds, fanout 15, 10, on one thread: nodes, and rows and columns of both layers' edges."""
    edge_index = random_graph(NODES, EDGES)
    graph = Graph.from_edge_index(edge_index, NODES)
    seeds = torch.randperm(NODES, generator=torch.Generator().manual_seed(1))
    uniform: dict[str, Callable[[], object]] = {"anyattention": batch_after_batch(seeds, graph.sample)}
    weights = torch.rand(EDGES, generator=torch.Generator().manual_seed(2))
    sampler = NeighborLoader(graph, seeds[:1], FANOUTS, weights=weights).dataset
    weighted: dict[str, Callable[[], object]] = {
        "anyattention": numbered(seeds, lambda number, part: sampler[number, part.numpy()])
    }
    library = dgl()
    if library is not None:
        library.utils.set_num_threads(1)
        theirs = library.graph((edge_index[0], edge_index[1]), num_nodes=NODES).formats("csc")
        theirs.edata["weight"] = weights
        theirs.create_formats_()
        # The first of its numbers is the first layer's, which is the last hop's.
        reverse = list(FANOUTS[::-1])
        own = library.dataloading.NeighborSampler(reverse)
        by_weight = library.dataloading.NeighborSampler(reverse, prob="weight")
        uniform["DGL"] = batch_after_batch(seeds, lambda part, _: own.sample_blocks(theirs, part))
        uniform["DGL, fused"] = batch_after_batch(seeds, lambda part, _: fused_blocks(library, theirs, part))
        weighted["DGL"] = batch_after_batch(seeds, lambda part, _: by_weight.sample_blocks(theirs, part))
    del edge_index
    gc.collect()
    return {
        "uniform": measure("anyattention", uniform, rounds=25, seconds=0.1),
        "by weight": measure("anyattention", weighted, rounds=15, seconds=0.1),
    }


def workers() -> dict[str, dict[str, Timing]]:
    """Such batches from a loader's workers, of one thread each."""
    graph = Graph.from_edge_index(random_graph(NODES, EDGES), NODES)
    gc.collect()
    seeds = torch.randperm(NODES, generator=torch.Generator().manual_seed(1))[: SEEDS * BATCHES]

    def loader(count: int) -> Callable[[], object]:
        given = {"num_workers": count, "persistent_workers": count > 0}
        made = NeighborLoader(graph, seeds, FANOUTS, batch_size=SEEDS, shuffle=True, **given)
        return lambda: sum(len(sampled.nodes) for sampled in made)

    contestants = {
        "anyattention": loader(2),
        "anyattention, 1 worker": loader(1),
        "anyattention, no workers": loader(0),
    }
    return {f"{BATCHES} batches from 2 workers": measure("anyattention", contestants, rounds=7)}


def batch_after_batch(seeds: Tensor, sample: Callable[[Tensor, Any], object]) -> Callable[[], object]:
    """A call that samples the next seeds each time."""
    return numbered(seeds, lambda _, part: sample(part, FANOUTS))


def numbered(seeds: Tensor, sample: Callable[[int, Tensor], object]) -> Callable[[], object]:
    """The same of calls that get their number too."""
    places = itertools.cycle(enumerate(seeds.split(SEEDS)[:-1]))
    return lambda: sample(*next(places))


def fused_blocks(library: Any, graph: Any, seeds: Tensor) -> list[Any]:
    """What DGL's NeighborSampler does on several threads."""
    blocks, kept = [], vars(graph).setdefault("_kept_by_fused", {})
    for fanout in FANOUTS:
        block = library.sampling.sample_neighbors_fused(graph, seeds, fanout, mapping=kept)
        seeds = block.srcdata[library.NID]
        blocks.insert(0, block)
    return blocks


if __name__ == "__main__":
    main(sys.argv[1:])
