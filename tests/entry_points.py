"""The kernels that take threads, and a call of each whose work has several pieces: what the tests of teams share.

`python -m entry_points` prints, as JSON, how many threads each starts and a hash of its results.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyattention import Graph
from anyattention.native.clusters import largest_in_clusters
from anyattention.native.compressed_rows import compressed_rows, sort_rows, symmetric_rows
from anyattention.native.neighbour_sampling import NeighbourRows, sampled_offsets, sampled_rows
from anyattention.ops import linear_products
from anyattention.ops.dropout import keep_factors
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.edges.dynamic import DynamicDot, DynamicSums
from anyattention.ops.edges.operators import EdgeArgmax, EdgeDot, EdgeSoftmax, EdgeSum, EdgeTotal
from anyattention.ops.graph.operators import GraphAttention, GraphAttentionBackward, GraphAttentionWeights
from anyattention.ops.points.distance_terms import DistanceTerms, DistanceTermsBackward
from anyattention.ops.product_keys.operators import ProductKeyIndices, SlotAttention, SlotAttentionBackward
from anyattention.ops.product_keys.used_slots import slot_rows, used_slots
from anyattention.ops.runs import runs_of
from anyattention.ops.runs.call import RunAttention, RunAttentionBackward
from anyattention.ops.runs.second import RunAttentionDoubleBackward
from anyattention.ops.runs.weights import RunAttentionWeights, RunAttentionWeightsBackward
from anyattention.ops.topk.operators import TopkIndices
from anyattention.patterns import Causal, Strided
from records import OPERATORS, as_list

_HEADER = Path(__file__).parents[1] / "csrc" / "anyattention.h"
# Takes a call, and only counts.
_WITHOUT_THREADS = {"run_attention_tiles"}

Results = Sequence[Tensor | None]


def entry_points() -> set[str]:
    """The functions of csrc/anyattention.h that are told a number of threads."""
    text = re.sub(r"/\*.*?\*/", "", _HEADER.read_text(), flags=re.DOTALL)
    functions = dict(re.findall(r"ANYATTENTION_EXPORT\s+\w+\s+anyattention_(\w+)\((.*?)\);", text, re.DOTALL))
    return {
        name for name, given in functions.items() if re.search(r"_call \*|\bnum_threads\b", given)
    } - _WITHOUT_THREADS


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape)


def calls() -> dict[str, Callable[[], Results]]:
    """A call by its entry point; each time the same numbers."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    found |= _of_edges()
    found |= _of_runs()
    found["topk_indices"] = TopkIndices(numbers(1, 9, 4, 5), numbers(1, 70, 4, 5), None, None, None, None, 0.5, 3)
    terms = DistanceTerms(numbers(9_000, 3), numbers(2), numbers(4, 3), 9.0, 9.0, 1e-6)
    found["distance_terms"] = terms
    found["distance_terms_backward"] = DistanceTermsBackward(terms, numbers(9_000, 4), (True,) * 3)
    found["product_key_indices"] = ProductKeyIndices(numbers(90, 3, 2, 5), numbers(2, 3, 40, 5), 7)
    slots = torch.randint(1_600, (900, 3, 7))
    slots[::2] %= 7  # of which some are used by more entries than a piece has
    keys = numbers(900, 3, 2, 5), numbers(2, 3, 40, 5)
    attention = SlotAttention(*keys, numbers(1_600, 9), slots, numbers(900, 3, 7), None, False, False)
    found["slot_attention"] = attention
    weights, by = torch.rand(900, 3, 7), numbers(900, 9)
    found["slot_attention_backward"] = SlotAttentionBackward(attention, weights, by, numbers(900, 3, 7), (True,) * 3)
    made = {name: _call(name, record) for name, record in found.items()}
    x, weight, grad = numbers(3_000, 9), numbers(11, 9), numbers(3_000, 11)
    rows, columns = torch.randint(1_000, (2, 70_000))
    pairs = torch.stack([rows, (rows + 1 + columns % 999) % 1_000], dim=1)
    neighbours = NeighbourRows(*compressed_rows(rows, columns, 1_000, 1_000), 1_000, torch.rand(70_000))
    nodes, query = torch.randperm(1_000), numbers(70, 5)
    clustered = numbers(500, 5), torch.arange(0, 501, 50), torch.stack([torch.randperm(10)[:4] for _ in range(70)])
    return made | {
        "cluster_search": lambda: [largest_in_clusters(query, *clustered, 7)],
        "compressed_rows": lambda: compressed_rows(rows, columns, 1_000, 1_000),
        "symmetric_rows": lambda: symmetric_rows(pairs, 1_000),
        "keep_factors": lambda: [keep_factors((3, 5_000), 0.3, torch.tensor(5), torch.float32)],
        "slot_rows": lambda: [slot_rows(used_slots(slots, 1_600), weights, by)],
        "sorted_rows": _sorted(rows, columns),
        "sampled_offsets": lambda: [sampled_offsets(neighbours, nodes, 9, 0)],
        "sampled_rows": lambda: [_sampled(neighbours, nodes)],
        "linear_map": lambda: linear_products._products([x], weight.T, None, [8, 3]),
        "linear_map_by_matrix": lambda: linear_products._gradients_by_matrix([grad], x, weight, True),
    }


def _sorted(rows: Tensor, columns: Tensor) -> Callable[[], Results]:
    found, sorted_columns = compressed_rows(rows, columns, 1_000, 1_000), torch.empty_like(columns)

    def call() -> Results:
        # Where the edges lie; once sorted, they stay.
        sort_rows(found.offsets, found.edges, [columns], [sorted_columns])
        return found.edges, sorted_columns

    return call


def _sampled(rows: NeighbourRows, nodes: Tensor) -> Tensor:
    # Rows have more edges than these: nothing needs to be counted.
    offsets = torch.arange(len(nodes) + 1) * 9
    found = torch.empty(3, int(offsets[-1]), dtype=torch.int64)
    sampled_rows(rows, nodes, offsets, 5, 0, 0, *found)
    return found


def _call(name: str, record: Any) -> Callable[[], Results]:
    others = {
        "run_attention_forward": "run_attention",
        "run_attention_double_backward_sums": "run_attention_double_backward",
    }
    operator = others.get(name, name)
    return lambda: as_list(OPERATORS[operator](record))


def _of_edges() -> dict[str, Any]:
    graph = arrays_of(Graph.from_edge_index(torch.randint(500, (2, 4_000)), num_nodes=500))
    query, key, edges, vector = numbers(1, 500, 2, 3), numbers(1, 500, 2, 3), numbers(1, 4_000, 2), numbers(2, 3)
    weight, features = numbers(2, 2, 3), numbers(4_000, 2)
    scores = DynamicDot(graph, 0.2, vector, query, key, weight, features, query, key, weight, features)
    attention = GraphAttention(
        graph, query, key, numbers(1, 500, 2, 5), vector, None, None, torch.tensor(5), score="Dynamic", dropout=0.3,
        normalize=True, scale=0.5, softcap=0.0, negative_slope=0.2,
    )  # fmt: skip
    results = OPERATORS["graph_attention"](attention)
    return {
        "edge_dot": EdgeDot(graph, query, key),
        "edge_sum": EdgeSum(graph, edges, key),
        "edge_softmax": EdgeSoftmax(graph, edges),
        "edge_total": EdgeTotal(graph, edges),
        "edge_argmax": EdgeArgmax(graph, edges, key, features, numbers(2, 3, 2)),
        "dynamic_dot": scores,
        "dynamic_sums": DynamicSums(scores, edges, (True,) * 5),
        "graph_attention": attention,
        "graph_attention_weights": GraphAttentionWeights(attention, *results[1:]),
        # Large scores: their rest counts.
        "graph_attention_backward": GraphAttentionBackward(
            large := replace(attention, vector=100 * vector, seed=None, dropout=0.0),
            *OPERATORS["graph_attention"](large), numbers(1, 500, 2, 5), numbers(1, 500, 2),
        ),
    }  # fmt: skip


def _of_runs() -> dict[str, Any]:
    rows = [numbers(2, 40, 4, 3), numbers(2, 40, 2, 3), numbers(2, 40, 2, 5)]
    call = RunAttention(
        *rows, None, numbers(4, 79), torch.tensor(3), runs_of(Causal(), 40, 40), 0.2, True, scale=0.5, softcap=2.0
    )
    results = OPERATORS["run_attention"](call)
    by = numbers(2, 40, 4, 5), numbers(2, 40, 4)
    parts = replace(call, parts=runs_of(Strided(4, 1) & Causal(), 40, 40), bias=None, seed=None, dropout=0.0)
    again = [torch.randn_like(x) for x in rows]

    def second(of: RunAttention) -> RunAttentionDoubleBackward:
        backward = RunAttentionBackward(of, *OPERATORS["run_attention"](of), *by, (True,) * 3 + (of.bias is not None,))
        by_bias = None if of.bias is None else torch.randn_like(of.bias)
        return RunAttentionDoubleBackward(backward, *again, by_bias, (True,) * 6)

    return {
        "run_attention_forward": call,
        "run_attention_backward": RunAttentionBackward(call, *results, *by, (True,) * 4),
        "run_attention_double_backward": second(call),
        "run_attention_double_backward_sums": second(parts),
        "run_attention_weights": RunAttentionWeights(call, *results[1:], 1),
        "run_attention_weights_backward": RunAttentionWeightsBackward(
            call, *results[1:], numbers(2, 1, 40, 40), (True,) * 4
        ),
    }


def digest(results: Results) -> str:
    found = hashlib.sha256()
    for x in results:
        found.update(b"" if x is None else x.contiguous().numpy().tobytes())
    return found.hexdigest()


def started(call: Callable[[], object]) -> int:
    """How many threads a call starts and keeps, by the system's list.

    A thread of Python's own asks for it: OpenMP keeps a team for each thread that started one.
    """
    found: list[int] = []

    def run() -> None:
        before = set(os.listdir("/proc/self/task"))
        call()
        found.append(len(set(os.listdir("/proc/self/task")) - before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (only,) = found
    return only


def main() -> None:
    torch.set_num_threads(1)
    made = calls()
    torch.set_num_threads(2)
    print(json.dumps({name: [started(call), digest(call())] for name, call in made.items()}))


if __name__ == "__main__":
    main()
