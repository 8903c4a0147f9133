"""Calls of the operations: `attend` by every pattern, score and option, `merge`, and what edges are made of."""

# ruff: noqa: C408 (settings are keyword arguments, and read best as such)
from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor

import anyattention as aa
from benchmarks.same_results.drawn import GRAPHS, LENGTHS, PATTERNS, Numbers

__all__ = ["SCORES", "attention", "attention_cases", "edge_operation", "large_cases", "merged"]

SCORES = ("dot", "additive", "dynamic")


def attention(
    numbers: Numbers,
    *,
    pattern: str = "full",
    batch: int | None = 2,
    queries: int = 13,
    keys: int = 13,
    heads: int = 2,
    key_heads: int | None = None,
    width: int = 8,
    value_width: int | None = None,
    score: str = "dot",
    mask: str | None = None,
    bias: str | None = None,
    hides: bool = False,
    relative: str | None = None,
    features: str = "",
    layout: str | None = None,
    autocast: bool = False,
    **options: Any,
) -> Any:
    """One call of `attend`; the shapes of mask and bias are letters: b, h, n, m, e or 1."""
    made = (GRAPHS | PATTERNS | LENGTHS)[pattern](numbers)
    if isinstance(made, aa.Graph):
        queries, keys = made.num_queries, made.num_keys
    key_heads, value_width = key_heads or heads, width if value_width is None else value_width
    width = 1 if score == "additive" else width
    leading = () if batch is None else (batch,)
    if layout == "columns":
        joined = numbers.leaf("joined", *leading, queries, heads, 2 * width + value_width)
        query, key, value = joined.split([width, width, value_width], -1)
    else:
        query = numbers.rows("query", (*leading, queries, heads, width), layout)
        key = numbers.rows("key", (*leading, keys, key_heads, width), layout)
        value = numbers.rows("value", (*leading, keys, key_heads, value_width), layout)
    sizes = {"1": 1, "b": batch, "h": heads, "n": queries, "m": keys, "e": getattr(made, "num_edges", 0)}
    if score != "dot":
        vector = numbers.leaf("vector", heads, width) if score == "dynamic" else None
        options["score"] = aa.Additive(0.3) if vector is None else aa.Dynamic(vector, 0.1)
    if mask is not None:
        options["mask"] = numbers.flags(*(sizes[letter] for letter in mask))
        if mask.endswith("nm"):
            options["mask"][..., 1, :] = False
    if bias is not None:
        options["bias"] = numbers.leaf("bias", *(sizes[letter] for letter in bias))
        if hides:
            options["bias"].data[numbers.flags(*options["bias"].shape)] = -torch.inf
    if relative == "alibi":
        options["bias"] = aa.RelativeBias.alibi(heads, max(queries, keys), align="bottom_right")
    elif relative == "table":
        options["bias"] = aa.RelativeBias(numbers.leaf("bias", heads, 9), -5, align="top_left")
    if features:
        key_weight = numbers.leaf("key_weight", heads, width, 3) if "key" in features else None
        value_weight = numbers.leaf("value_weight", heads, value_width, 3) if "value" in features else None
        options["edges"] = aa.EdgeFeatures(numbers.leaf("features", sizes["e"], 3), key_weight, value_weight)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        numbers.facts["runs"] = aa.explain(query, key, value, made, **options).implementation
        return aa.attend(query, key, value, made, **options)


def merged(numbers: Numbers, pattern: str = "full", parts: int = 2, **options: Any) -> Any:
    query = numbers.leaf("query", 2, 5, 2, 8)
    results = []
    for part, keys in enumerate((7, 3, 0)[:parts]):
        key, value = (numbers.leaf(f"{name} {part}", 2, keys, 2, 8) for name in ("key", "value"))
        results.append(aa.attend(query, key, value, LENGTHS[pattern](numbers), return_logsumexp=True, **options))
    return aa.merge(results)


def edge_operation(
    numbers: Numbers, name: str, graph: str, batch: tuple[int, ...], groups: int, implementation: str | None
) -> Tensor:
    made, heads, width = GRAPHS[graph](numbers), 4, 5
    on_edges, of_keys = (*batch, made.num_edges, heads), (*batch, made.num_keys, heads // groups, width)
    if name == "edge_softmax":
        return aa.edge_softmax(numbers.leaf("scores", *on_edges), made, implementation=implementation)
    if name == "edge_sum":
        weights, value = numbers.leaf("weights", *on_edges), numbers.leaf("value", *of_keys)
        return aa.edge_sum(weights, value, made, implementation=implementation)
    query = numbers.leaf("query", *batch, made.num_queries, heads, width)
    return aa.edge_dot(query, numbers.leaf("key", *of_keys), made, implementation=implementation)


def attention_cases() -> Iterator[dict[str, Any]]:
    """The settings of the calls of `attention`."""
    plain = ("random", "bipartite", "by rows", "loops", "batch", "no edges", "one edge")
    yield from (dict(pattern=p, score=s) for p, s in product((*PATTERNS, *plain), SCORES))
    for pattern, lengths in product(("full", *LENGTHS), ((5, 9), (9, 5), (1, 7), (5, 0), (0, 5))):
        if pattern in ("full", "causal top_left", "causal bottom_right", "window bottom_right"):
            yield dict(pattern=pattern, queries=lengths[0], keys=lengths[1])
    for score, heads, width in product(SCORES, (1, 2, 4, 8), (8, 16, 32, 64)):
        yield dict(pattern="random", score=score, heads=heads, width=width)
    odd = ((1, 1), (3, 5), (5, 3), (7, 17), (2, 100), (6, 0))
    for pattern, (heads, width) in product(("full", "window", "top-k", "random"), (*odd, (1, 32), (8, 64))):
        yield dict(pattern=pattern, heads=heads, width=width)
        yield dict(pattern=pattern, heads=heads, width=width, score="dynamic", value_width=width + 2)
    for score, aggregation, normalize in product(SCORES, ("sum", "mean", "max"), (True, False)):
        settings = dict(pattern="random", score=score, aggregation=aggregation, normalize=normalize)
        yield from (settings, settings | dict(features="key and value", key_heads=1), settings | dict(batch=None))
        yield settings | dict(mask="eh", dropout=0.3, scale=0.7)
    for score, features in product(SCORES, ("key", "value", "key and value")):
        yield dict(pattern="bipartite", score=score, features=features, heads=3, width=5, value_width=4)
    for score, pattern in product(SCORES, ("full", "window", "big bird", "top-k", "window & top-k", "random")):
        if score != "dot" and "top-k" in pattern:
            continue
        settings = dict(pattern=pattern, score=score)
        for option in (dict(scale=-0.6), dict(softcap=0.8, scale=2.0), dict(dropout=0.3), dict(key_heads=1, heads=4)):
            yield settings | option
        for implementation in ("cpu", "torch", "graph", "reference"):
            yield settings | dict(implementation=implementation)
        yield settings | dict(dropout=0.3, softcap=1.5, implementation="reference")
    letters = ("m", "1", "nm", "n1", "b11m", "1h11", "bhnm", "b1nm")
    for pattern, shape in product(("full", "causal", "window", "random blocks", "top-k"), letters):
        yield dict(pattern=pattern, mask=shape)
        yield dict(pattern=pattern, bias=shape)
    for pattern, shape in product(("full", "causal", "strided", "window & top-k", "top-k"), ("nm", "bhnm", "m")):
        yield dict(pattern=pattern, bias=shape, hides=True)
        yield dict(pattern=pattern, bias=shape, mask="nm", score="dynamic")
    for score, shape in product(SCORES, ("e", "eh", "beh")):
        settings = dict(pattern="random", score=score)
        yield from (settings | dict(mask=shape), settings | dict(bias=shape), settings | dict(bias=shape, hides=True))
    for relative, pattern in product(("alibi", "table"), ("full", "causal", "window", "big bird", "top-k", "random")):
        yield dict(pattern=pattern, relative=relative)
        yield dict(pattern=pattern, relative=relative, implementation="reference")
    for layout, pattern in product(("transposed", "strided", "expanded", "columns"), ("full", "window", "random")):
        yield from (dict(pattern=pattern, layout=layout, score=score) for score in SCORES)
    for pattern in ("full", "window", "top-k", "random"):
        yield from (dict(pattern=pattern, **kind) for kind in (dict(batch=1), dict(batch=0), dict(batch=None)))
    wrong = dict(softcap=-1.0), dict(dropout=1.0), dict(scale="one"), dict(implementation="gpu"), dict(normalize=False)
    wrong += dict(aggregation="median"), dict(aggregation="max"), dict(return_weights="none"), dict(key_heads=3)
    wrong += dict(mask="mm"), dict(bias="e"), dict(features="key"), dict(mask="bnm"), dict(return_logsumexp=1)
    yield from (dict(pattern=p, queries=5) | kind for p, kind in product(("full", "window", "top-k", "random"), wrong))


def large_cases() -> Iterator[dict[str, Any]]:
    """Calls that are large enough for several threads and for what long rows do."""
    for pattern, score in product(("hub", "large"), SCORES):
        yield dict(pattern=pattern, score=score, batch=1, heads=2, width=16)
    yield dict(pattern="large", features="key and value", batch=None, heads=2, width=8, dropout=0.2)
    yield dict(pattern="large", aggregation="max", batch=None, heads=2, width=8)
    for pattern in ("full", "causal bottom_right", "wide window", "wide top-k"):
        yield dict(pattern=pattern, queries=300, keys=300, batch=1, heads=2, width=16)
        yield dict(pattern=pattern, queries=300, keys=300, batch=1, heads=1, width=8, score="dynamic", dropout=0.1)
