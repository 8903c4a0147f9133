"""A process of its own: what a step over a graph takes at its peak, in numbers per edge and head.

python peak_of_a_step.py SCORE AGGREGATION FEATURES ORDER, with FEATURES none, key or value and ORDER first or second.
"""

import sys

import torch

from anyattention import Additive, Dot, Dynamic, EdgeFeatures, Graph, attend
from benchmarks.peak_memory import peak_memory

EDGES, NODES, HEADS, CHANNELS = 400_000, 1_000, 2, 128


def step(graph: Graph, score: str, aggregation: str, features: str, order: str) -> None:
    """Forward and backward, of order "second" with the gradients' gradients."""
    head_dim = 1 if score == "additive" else CHANNELS
    shapes = [(graph.num_queries, HEADS, width) for width in (head_dim, head_dim, CHANNELS)]
    shapes += [(HEADS, head_dim)] if score == "dynamic" else []
    shapes += [] if features == "none" else [(graph.num_edges, 2), (HEADS, CHANNELS, 2)]
    leaves = [torch.randn(*shape).requires_grad_() for shape in shapes]
    edges = None
    if features != "none":
        edges = EdgeFeatures(leaves[-2], **{f"{features}_weight": leaves[-1]})
    kind = {"dot": Dot(), "additive": Additive()}.get(score) or Dynamic(leaves[3])
    query, key, value = leaves[:3]
    output = attend(
        query, key, value, graph, score=kind, edges=edges, aggregation=aggregation, implementation="cpu"
    ).output
    gradients = torch.autograd.grad(output, leaves, torch.randn_like(output), create_graph=order == "second")
    if order == "second":
        torch.autograd.grad(gradients, leaves, [torch.randn_like(each) for each in gradients])


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Code, thread pools and allocator are there before the measurement.
    step(Graph.from_edge_index(torch.randint(50, (2, 99)), num_nodes=50), *sys.argv[1:])
    whole = Graph.from_edge_index(torch.randint(NODES, (2, EDGES)), num_nodes=NODES)
    taken = peak_memory(lambda: step(whole, *sys.argv[1:]))
    assert taken is not None
    print(taken / (EDGES * HEADS * 4))
