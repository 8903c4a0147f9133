"""The operators of the package, and records for each of them: what tests of records and of their C structures share."""

import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from anyattention import Graph
from anyattention.native.structures import Kind, Untold, layout_of
from anyattention.ops.dense import torch_kernel
from anyattention.ops.dense.torch_kernel import FusedDense, FusedDenseBackward
from anyattention.ops.edges import dynamic, operators
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.edges.dynamic import DynamicDot, DynamicSums
from anyattention.ops.edges.operators import EdgeArgmax, EdgeDot, EdgeSoftmax, EdgeSpread, EdgeSum, EdgeTotal
from anyattention.ops.graph import operators as graph_operators
from anyattention.ops.graph.operators import GraphAttention, GraphAttentionBackward, GraphAttentionWeights
from anyattention.ops.linear_map_operators import LinearMap, LinearMapByWeight, linear_map, linear_map_by_weight
from anyattention.ops.operator import Operator
from anyattention.ops.points.distance_terms import DistanceTerms, DistanceTermsBackward, _backward, _distance_terms
from anyattention.ops.product_keys.operators import (
    ProductKeyIndices,
    SlotAttention,
    SlotAttentionBackward,
    product_key_indices,
    slot_attention,
    slot_attention_backward,
)
from anyattention.ops.runs import operators as run_operators
from anyattention.ops.runs import runs_of
from anyattention.ops.runs import weights as run_weights
from anyattention.ops.runs.call import RunAttention, RunAttentionBackward
from anyattention.ops.runs.second import RunAttentionDoubleBackward, double_backward
from anyattention.ops.runs.weights import RunAttentionWeights, RunAttentionWeightsBackward
from anyattention.ops.topk.operators import TopkIndices, topk_indices
from anyattention.patterns import Causal, Strided
from anyattention.patterns.spelling import words_of

_F64 = torch.float64

OPERATORS: dict[str, Operator[Any]] = {
    each.name: each
    for each in (
        operators._edge_dot,
        operators._edge_sum,
        operators._edge_total,
        operators._edge_spread,
        operators._edge_softmax,
        operators._edge_argmax,
        dynamic._dynamic_dot,
        dynamic._dynamic_sums,
        graph_operators.graph_attention,
        graph_operators.graph_attention_weights,
        graph_operators.graph_attention_backward,
        run_operators.run_attention,
        run_operators._backward,
        double_backward,
        run_weights.run_attention_weights,
        run_weights._backward,
        topk_indices,
        product_key_indices,
        slot_attention,
        slot_attention_backward,
        _distance_terms,
        _backward,
        torch_kernel.fused_dense,
        torch_kernel._fused_dense_backward,
        linear_map,
        linear_map_by_weight,
    )
}


def numbers(*shape: int, dtype: torch.dtype = _F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def leaf(*shape: int) -> Tensor:
    return numbers(*shape).requires_grad_()


def random_graph() -> Graph:
    """Bipartite, 5 queries, 7 keys and 23 edges, with duplicates; query 1 and key 2 are in no edge."""
    ends = [torch.tensor([0, 1, 3, 4, 5, 6]), torch.tensor([0, 2, 3, 4])]
    edge_index = torch.stack([side[torch.randint(len(side), (23,))] for side in ends])
    return Graph.from_edge_index(edge_index, num_queries=5, num_keys=7)


def records() -> dict[str, Any]:
    """Records by the operator's name and what is special about them; those with a gradient have leaves."""
    graph = arrays_of(random_graph())
    query, key, value = leaf(2, 5, 6, 3), leaf(2, 7, 2, 3), leaf(2, 7, 2, 4)
    edges, vector = leaf(2, 23, 6), leaf(6, 3)
    settings = {"normalize": True, "scale": 0.5, "softcap": 1.5, "negative_slope": 0.2}
    whole = GraphAttention(
        graph, query, key, value, vector, None, None, torch.tensor(5), score="Dynamic", dropout=0.3, **settings
    )
    attention = {
        "dynamic, dropout": whole,
        "term, bias": replace(whole, vector=None, term=edges, bias=leaf(2, 23, 6), seed=None, score="Dot", dropout=0.0),
        "value is the key": replace(whole, value=None, vector=None, seed=None, score="Dot", dropout=0.0),
    }
    weight, features = leaf(2, 6, 3), leaf(23, 2)
    base = [x.detach() for x in (query, key, weight, features)]
    scores = {
        "features": DynamicDot(graph, 0.2, vector, query, key, weight, features, *base),
        "nodes": DynamicDot(graph, 0.2, vector, query, key, None, None, *base[:2], None, None),
        "a key's direction": DynamicDot(graph, 0.2, vector, None, key, None, None, *base),
    }
    rows = [leaf(2, 9, 4, 3), leaf(2, 9, 2, 3), leaf(2, 9, 2, 5)]
    mask = torch.rand(2, 1, 9, 9) < 0.7
    parts = runs_of(Strided(4, 1) & Causal(), 9, 9)
    assert len(parts) == 2
    runs = {
        "two parts": RunAttention(*rows, None, None, None, parts, 0.0, False, scale=0.5, softcap=0.0),
        "one part, mask, bias, dropout": RunAttention(
            *rows, mask, leaf(4, 17), torch.tensor(3), (replace(parts[0]),), 0.2, True, scale=0.5, softcap=2.0
        ),
        "bias of pairs": RunAttention(*rows, None, leaf(1, 4, 9, 9), None, parts, 0.0, False, scale=0.5, softcap=0.0),
        "no parts but words": RunAttention(
            *rows, mask, leaf(4, 17), torch.tensor(3), (), 0.2, False, words_of(Strided(4, 1)), scale=0.5, softcap=2.0
        ),
        "no parts": RunAttention(*rows, None, None, None, (), 0.0, False, scale=0.5, softcap=0.0),
    }
    singles = [numbers(2, 5, 4, 3, dtype=torch.float32), numbers(2, 7, 2, 3, dtype=torch.float32)]
    bounds = torch.zeros(5, dtype=torch.int64), torch.full((5,), 6)
    pairs = torch.rand(1, 1, 5, 7) < 0.5, numbers(2, 4, 1, 7, dtype=torch.float32)
    terms = {
        "radial": DistanceTerms(leaf(6, 3), leaf(2), leaf(4, 3), 9.0, 9.0, 1e-6),
        "decay alone": DistanceTerms(leaf(6, 3), leaf(2), None, 0.0, 1.0, 1e-6),
    }
    dense = [leaf(2, 3, 4, 5), leaf(2, 6, 4, 5), leaf(2, 6, 4, 5)]
    fused = {
        "plain": FusedDense(*dense, None, False, 0.4),
        "causal, bias": FusedDense(*dense, numbers(1, 4, 3, 6), True, 0.4),
    }
    halves = leaf(5, 2, 2, 3), leaf(2, 2, 4, 3)
    slots = SlotAttention(*halves, leaf(16, 7), torch.randint(16, (5, 2, 3)), numbers(5, 2, 3), None, False, False)
    chosen = {"plain": slots, "keep": replace(slots, keep=torch.rand(5, 2, 3, dtype=_F64))}
    found: dict[str, Any] = {
        "product_key_indices": ProductKeyIndices(numbers(5, 2, 2, 3), numbers(2, 2, 4, 3), 6),
        "edge_dot": EdgeDot(graph, query, key),
        "edge_dot: transposed": EdgeDot(graph.transposed, leaf(2, 7, 6, 3), leaf(2, 5, 2, 3)),
        "edge_sum": EdgeSum(graph, edges, key),
        "edge_softmax": EdgeSoftmax(graph, edges),
        "edge_total: transposed": EdgeTotal(graph.transposed, edges),
        "edge_spread": EdgeSpread(graph, leaf(2, 5, 6)),
        "edge_argmax": EdgeArgmax(graph, *(x.detach() for x in (edges, key, features)), numbers(6, 3, 2)),
        "edge_argmax: without features": EdgeArgmax(graph, edges.detach(), key.detach(), None, None),
        "linear_map": LinearMap(leaf(7, 5), leaf(3, 5), leaf(3)),
        "linear_map: no bias": LinearMap(leaf(7, 5), leaf(3, 5), None),
        "linear_map_by_weight": LinearMapByWeight(leaf(7, 3), leaf(7, 5)),
        "topk_indices": TopkIndices(*singles, None, None, None, None, 0.5, 3),
        "topk_indices: mask, bias": TopkIndices(*singles, *bounds, *pairs, 0.5, 3),
    }
    for name, made in (
        ("graph_attention", attention), ("dynamic_dot", scores), ("run_attention", runs), ("distance_terms", terms),
        ("fused_dense", fused), ("slot_attention", chosen),
    ):  # fmt: skip
        found |= {f"{name}: {case}": record for case, record in made.items()}
    for case, call in attention.items():
        plain = detached(call)
        output, largest, log_sum = graph_operators.graph_attention(plain)
        found[f"graph_attention_weights: {case}"] = GraphAttentionWeights(plain, largest, log_sum)
        by = torch.randn_like(output), None if call.value is None else torch.randn_like(log_sum)
        found[f"graph_attention_backward: {case}"] = GraphAttentionBackward(plain, output, largest, log_sum, *by)
    for case, call in runs.items():
        plain = detached(call)
        results = run_operators.run_attention(plain)
        needed = (True, True, True, call.bias is not None)
        by = torch.randn_like(results[0]), None if call.mask is None else torch.randn_like(results[2])
        backward = RunAttentionBackward(plain, *results, *by, needed)
        found[f"run_attention_backward: {case}"] = replace(backward, call=call, grad_output=leaf(*results[0].shape))
        again = [torch.randn_like(plain.query), None, torch.randn_like(plain.value), None]
        if plain.bias is not None:
            again = [None, torch.randn_like(plain.key), None, torch.randn_like(plain.bias)]
        wanted = (True, True, False, call.mask is None, call.bias is not None, True)
        found[f"run_attention_double_backward: {case}"] = RunAttentionDoubleBackward(backward, *again, wanted)
        heads = 1 if call.mask is None else 4
        of_leaves = results[1], results[2].clone().requires_grad_()
        found[f"run_attention_weights: {case}"] = RunAttentionWeights(call, *of_leaves, heads)
        given = *results[1:], numbers(2, heads, 9, 9), (True, True, True, call.bias is not None)
        found[f"run_attention_weights_backward: {case}"] = RunAttentionWeightsBackward(plain, *given)
    for case, call in fused.items():
        plain = detached(call)
        output, logsumexp = torch_kernel.fused_dense(plain)
        by = torch.randn_like(output), torch.randn_like(logsumexp) if call.causal else None
        found[f"fused_dense_backward: {case}"] = FusedDenseBackward(plain, output, logsumexp, *by)
    for case, call in chosen.items():
        plain = detached(call)
        _, weights = slot_attention(plain)
        by = numbers(5, 7), None if call.keep is None else numbers(5, 2, 3)
        needed = (True, call.keep is None, True)
        found[f"slot_attention_backward: {case}"] = SlotAttentionBackward(plain, weights, *by, needed)
    found |= {
        "dynamic_sums: all": DynamicSums(scores["features"], leaf(2, 23, 6), (True,) * 5),
        "dynamic_sums: some": DynamicSums(scores["nodes"], leaf(2, 23, 6), (False, True, True, False, False)),
        "distance_terms_backward": DistanceTermsBackward(detached(terms["radial"]), numbers(6, 4), (True,) * 3),
        "distance_terms_backward: some": DistanceTermsBackward(
            detached(terms["decay alone"]), numbers(6, 2), (False, True, True)
        ),
    }
    return found


def detached(record: Any) -> Any:
    """The record without leaves."""
    return replace(
        record,
        **{each.name: x.detach() for each in fields(record) if isinstance(x := getattr(record, each.name), Tensor)},
    )


NAMES = [
    "edge_dot", "edge_dot: transposed", "edge_sum", "edge_softmax", "edge_total: transposed", "edge_spread",
    "edge_argmax", "edge_argmax: without features", "topk_indices", "topk_indices: mask, bias", "dynamic_sums: all",
    "dynamic_sums: some", "distance_terms_backward", "distance_terms_backward: some",
    "linear_map", "linear_map: no bias", "linear_map_by_weight", "product_key_indices",
    *[
        f"{name}: {case}"
        for names, cases in (
            (
                ("graph_attention", "graph_attention_weights", "graph_attention_backward"),
                ("dynamic, dropout", "term, bias", "value is the key"),
            ),
            (("dynamic_dot",), ("features", "nodes", "a key's direction")),
            (
                (
                    "run_attention", "run_attention_backward", "run_attention_double_backward",
                    "run_attention_weights", "run_attention_weights_backward",
                ),
                ("two parts", "one part, mask, bias, dropout", "bias of pairs", "no parts", "no parts but words"),
            ),
            (("distance_terms",), ("radial", "decay alone")),
            (("fused_dense", "fused_dense_backward"), ("plain", "causal, bias")),
            (("slot_attention", "slot_attention_backward"), ("plain", "keep")),
        )
        for name in names
        for case in cases
    ],
]  # fmt: skip


def of(name: str) -> tuple[Operator[Any], Any]:
    """The operator and the record of a name of `records`."""
    return OPERATORS[name.split(":")[0]], records()[name]


def tensors_of(record: Any) -> Iterator[tuple[str, Tensor | None]]:
    """Tensors that a record may have, by their dotted names; those of a tuple of records once."""
    hints = typing.get_type_hints(type(record), include_extras=True)
    for each in fields(record):
        value = getattr(record, each.name)
        if is_dataclass(value):
            yield from ((f"{each.name}.{name}", x) for name, x in tensors_of(value))
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            yield from ((f"{each.name}.{name}", x) for name, x in tensors_of(value[0]))
        elif typing.get_origin(hints[each.name]) is Annotated and Untold not in typing.get_args(hints[each.name]):
            yield each.name, value


def with_tensor(record: Any, path: str, x: Tensor | None) -> Any:
    """The record with another tensor at a dotted path; of a tuple of records, in the first."""
    name, _, rest = path.partition(".")
    if not rest:
        return replace(record, **{name: x})
    inside = getattr(record, name)
    if isinstance(inside, tuple):
        return replace(record, **{name: (with_tensor(inside[0], rest, x), *inside[1:])})
    return replace(record, **{name: with_tensor(inside, rest, x)})


def kind_of(record: Any, path: str) -> Kind:
    """What the tensor at a dotted path is."""
    layout = layout_of(type(record))
    *inside, name = path.split(".")
    for part in inside:
        layout = next(each.layout for each in layout.fields if each.name == part)
    return next(each.kind for each in layout.fields if each.name == name)


def as_list(results: Any) -> list[Tensor | None]:
    return list(results) if isinstance(results, tuple) else [results]
