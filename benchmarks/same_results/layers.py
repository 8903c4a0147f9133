"""Calls of the layers, and of what geometry they use."""

# ruff: noqa: C408 (settings are keyword arguments, and read best as such)
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import anyattention as aa
from anyattention import geometry, nn
from benchmarks.same_results.drawn import GRAPHS, PATTERNS, Numbers

__all__ = ["geometry_cases", "layer", "layer_cases"]


def layer(
    numbers: Numbers, make: Callable[[], Any], inputs: Callable[[Numbers], Mapping[str, Any]], *, method: str, mode: str
) -> Any:
    module = numbers.module(make, mode == "train")
    if mode == "backward":
        result, cache = module.cached_forward(**inputs(numbers))
        gradients = module.backward(numbers.normal(*result.output.shape), cache)
        return [result.output.detach(), gradients.parameters, *gradients.inputs.values()]
    return getattr(module, method)(**inputs(numbers))


def cloud(
    n: Numbers, *, batch: tuple[int, ...] = (), graph: str = "", vectors: bool = False, shown: bool = True
) -> dict[str, Any]:
    """The inputs of a geometric layer for 9 points."""
    positions = n.leaf("positions", *batch, 9, 3)
    inputs: dict[str, Any] = {"x": n.leaf("x", *batch, 9, 16), "positions": positions, "return_weights": "heads"}
    if graph == "cell":
        inputs["cell"] = n.leaf("cell", 3, 3, spread=0.1, shift=3 * torch.eye(3, dtype=n.dtype))
        inputs["graph"] = aa.Graph.radius(positions.detach(), 2.0, cell=inputs["cell"].detach())
    elif graph:
        found = getattr(aa.Graph, graph)(positions.detach(), {"radius": 2.0, "nearest": 3}[graph])
        inputs["graph"] = found.with_self_loops()
    if vectors:
        inputs["vectors"] = n.leaf("vectors", *batch, 9, 4, 3)
    if not shown:
        inputs["mask"] = n.flags(9)
    return inputs


def layer_cases() -> Iterator[tuple[str, Callable[[], Any], Callable[[Numbers], Mapping[str, Any]], str]]:
    """Name, what makes the module, its inputs, and the method that is called."""

    def tokens(n: Numbers, mask: str = "", weights: Any = "heads") -> dict[str, Any]:
        masks = {"mask": n.flags(11, 11)} if mask == "pairs" else {"mask": n.flags(2, 1, 1, 11)} if mask else {}
        return {"query": n.leaf("query", 2, 11, 16), "return_weights": weights, **masks}

    def others(n: Numbers) -> dict[str, Any]:
        return {
            "query": n.leaf("query", 2, 7, 16),
            "key": n.leaf("key", 2, 11, 16),
            "value": n.leaf("value", 2, 11, 16),
        }

    def biased(n: Numbers) -> dict[str, Any]:
        return {"query": n.leaf("query", 2, 11, 16), "bias": n.leaf("bias", 1, 4, 11, 11)}

    def nodes(n: Numbers, edge_dim: int = 0, batch: tuple[int, ...] = (), kind: str = "") -> dict[str, Any]:
        graph = n.graph(7, 12, 40) if kind == "bipartite" else n.graph(11, 11, 40)
        x: Any = n.leaf("x", *batch, 11, 6)
        if kind == "bipartite":
            x = n.leaf("source", 12, 6), n.leaf("target", 7, 5)
        elif kind == "sparse":
            x = (n.normal(11, 6) * n.flags(11, 6)).to_sparse_csr()
        inputs = {"x": x, "graph": graph.edge_index if kind == "list" else graph, "return_weights": "heads"}
        if edge_dim:
            inputs["edge_attr"] = n.leaf("edge_attr", 40, edge_dim)
        return inputs | ({"mask": n.flags(40)} if kind == "mask" else {})

    for causal, pattern in product((False, True), (None, aa.Window(2, 3), aa.TopK(3))):
        settings: dict[str, Any] = dict(d_model=16, num_heads=4, dropout=0.2, causal=causal, pattern=pattern)
        yield f"scaled causal={causal} {pattern}", partial(nn.ScaledDotProductAttention, **settings), tokens, "forward"
        yield f"multi-head causal={causal} {pattern}", partial(nn.MultiHeadAttention, **settings), tokens, "forward"
    for extra in (dict(positions="learned"), dict(positions="sinusoidal"), dict(qk_norm=True), dict(use_bias=False)):
        make = partial(nn.MultiHeadAttention, 16, 4, dropout=0.2, max_seq_len=20, **extra)
        yield f"multi-head {extra}", make, partial(tokens, weights=True), "forward"
    make = partial(nn.MultiHeadAttention, 16, 4, dropout=0.2, scale=0.4)
    for name, inputs in (("others", others), ("bias", biased), ("mask", partial(tokens, mask="pairs"))):
        yield f"multi-head {name}", make, inputs, "forward"
    kinds = dict(
        local=dict(local_window=2),
        strided=dict(block_size=4, local_window=1),
        fixed=dict(block_size=4, num_global_tokens=2),
        block=dict(block_size=4),
        top_k=dict(top_k=3),
    )
    kinds["global"] = dict(local_window=2, num_global_tokens=2)
    for (kind, settings), causal in product(kinds.items(), (False, True)):
        make = partial(nn.SparseAttention, 16, 4, sparsity_pattern=kind, causal=causal, dropout=0.2, **settings)
        yield f"sparse {kind} causal={causal}", make, partial(tokens, mask="keys" if causal else ""), "forward"
    for score, concat, residual in product(("additive", "dynamic", "dot"), (True, False), (True, False)):
        make = partial(nn.GraphAttention, 16, 4, in_features=6, score=score, dropout=0.2)
        make = partial(make, concat=concat, residual=residual)
        yield f"graph {score} concat={concat} residual={residual}", make, nodes, "forward"
        if concat and residual:
            edged = partial(make, edge_dim=3)
            yield f"graph {score} edges", edged, partial(nodes, edge_dim=3), "forward"
            yield f"graph {score} edges mean", partial(edged, aggregation="mean"), partial(nodes, edge_dim=3), "forward"
            pair = partial(make, in_features=(6, 5))
            yield f"graph {score} bipartite", pair, partial(nodes, kind="bipartite"), "forward"
            for kind in ("sparse", "list", "mask"):
                yield f"graph {score} {kind}", make, partial(nodes, kind=kind), "forward"
            gated = partial(make, aggregation="max", normalize=False)
            yield f"graph {score} batch", gated, partial(nodes, batch=(2,)), "forward"
    for basis, radius in product(("gaussian", "bessel"), (None, 2.0)):
        common = dict(radius=radius, radial_range=2.5, radial_basis=basis, num_radial=5, dropout=0.2)
        distance = partial(nn.DistanceAttention, 16, 4, **common)
        equivariant = partial(nn.EquivariantAttention, 16, 4, vector_channels=4, **common)
        for place in (
            dict(),
            dict(batch=(2,)),
            dict(shown=False),
            *(dict(graph=g) for g in ("radius", "nearest", "cell")),
        ):
            name = f"{basis} radius={radius} {place}"
            yield f"distance {name}", distance, partial(cloud, **place), "forward"
            inputs = partial(cloud, vectors="graph" not in place or place["graph"] != "nearest", **place)
            yield f"equivariant {name}", equivariant, inputs, "equivariant_forward"
        for name, make in (("distance", distance), ("equivariant", equivariant)):
            yield f"{name} {basis} radius={radius} search", make, _searched, "distance_attention"
            yield f"{name} {basis} radius={radius} others", make, _placed, "geometric_forward"
    yield from _pyg_cases()


def _searched(n: Numbers) -> dict[str, Any]:
    return {"positions": n.leaf("positions", 9, 3), "features": n.leaf("features", 9, 16), "radius": 1.8}


def _placed(n: Numbers) -> dict[str, Any]:
    places = {"query_pos": n.leaf("query_pos", 2, 5, 3), "key_pos": n.leaf("key_pos", 2, 9, 3)}
    return {**places, "features": n.leaf("features", 2, 9, 16)}


def _pyg_cases() -> Iterator[tuple[str, Callable[[], Any], Callable[[Numbers], Mapping[str, Any]], str]]:
    from anyattention.interop import pyg

    def nodes(n: Numbers, edge_dim: int | None) -> dict[str, Any]:
        inputs = {"x": n.leaf("x", 11, 6), "edge_index": n.graph(11, 11, 40).edge_index}
        if edge_dim:
            inputs["edge_attr"] = n.leaf("edge_attr", 40, edge_dim)
        return inputs | {"return_attention_weights": True}

    for kind, concat, edge_dim in product(("GATConv", "GATv2Conv", "TransformerConv"), (True, False), (None, 3)):
        make = partial(getattr(pyg, kind), 6, 8, heads=2, concat=concat, edge_dim=edge_dim, dropout=0.2)
        yield f"pyg {kind} concat={concat} edges={edge_dim}", make, partial(nodes, edge_dim=edge_dim), "forward"


def geometry_cases() -> dict[str, Callable[[Numbers], Any]]:
    """Functions of distances and positions, the searches, and the pairs of each pattern."""

    def displaced(n: Numbers) -> Tensor:
        inputs = cloud(n, graph="cell")
        return inputs["graph"].displacements(inputs["positions"], cell=inputs["cell"])

    def lengths(n: Numbers) -> Tensor:
        return n.leaf("distance", 40, spread=0.3, shift=1.2)

    cases: dict[str, Callable[[Numbers], Any]] = {
        "safe_distance": lambda n: geometry.safe_distance(n.leaf("squared", 40), 0.1),
        "gaussian_basis": lambda n: geometry.gaussian_basis(lengths(n), 2.0, 5),
        "bessel_basis": lambda n: geometry.bessel_basis(lengths(n), 2.0, 5),
        "cutoff_envelope": lambda n: geometry.cutoff_envelope(lengths(n), 2.0),
        "log_cutoff_envelope": lambda n: geometry.log_cutoff_envelope(lengths(n), 2.0),
        "displacements": displaced,
        "principal_components": lambda n: geometry.principal_components(n.normal(20, 4), 2),
        "radius": lambda n: aa.Graph.radius(n.normal(50, 3), 0.9),
        "nearest": lambda n: aa.Graph.nearest(n.normal(50, 3), 4),
    }
    cases |= {f"graph {name}": make for name, make in GRAPHS.items()}
    pairs = {name: make for name, make in PATTERNS.items() if "top-k" not in name}
    return cases | {f"pairs of {name}": lambda n, make=make: make(n).to_graph(13, 13) for name, make in pairs.items()}
