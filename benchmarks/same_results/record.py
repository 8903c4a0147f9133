"""Runs every call with the package that this interpreter has and writes the numbers: `record FILE`."""

# ruff: noqa: C408 (settings are keyword arguments, and read best as such)
from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import anyattention as aa
from benchmarks.same_results.compare import PACKAGE
from benchmarks.same_results.drawn import GRAPHS, PATTERNS, Numbers
from benchmarks.same_results.layers import geometry_cases, layer, layer_cases
from benchmarks.same_results.operations import SCORES, attention, attention_cases, edge_operation, large_cases, merged

__all__ = ["calls", "record", "run_call"]

THREADS = (1, 2)
BOTH = ("float32", "float64")


def calls() -> dict[str, tuple[Callable[[Numbers], Any], tuple[str, ...]]]:
    """Every call by its name, and the dtypes that it runs in."""
    found: dict[str, tuple[Callable[[Numbers], Any], tuple[str, ...]]] = {}

    def add(name: str, call: Callable[[Numbers], Any], dtypes: tuple[str, ...] = BOTH) -> None:
        assert name not in found, f"two calls are named {name}"
        found[name] = (call, dtypes)

    for settings in (*attention_cases(), *large_cases()):
        name = "attend " + ", ".join(f"{key}={value}" for key, value in settings.items())
        if name in found:
            continue
        add(name, partial(attention, **settings))
        logsumexp = settings.get("normalize", True)
        asked = dict(return_weights="heads", return_logsumexp=logsumexp) | settings
        add(f"{name}, all", partial(attention, **asked), ("float64",) if settings.get("queries") == 300 else BOTH)
    for pattern, score in product((*PATTERNS, "random", "bipartite"), SCORES):
        settings = dict(pattern=pattern, score=score, return_weights="mean", return_logsumexp=True)
        add(f"half {pattern} {score}", partial(attention, **settings), ("bfloat16", "float16"))
        add(f"autocast {pattern} {score}", partial(attention, autocast=True, **settings), BOTH)
    for pattern, implementation, parts in product(("causal top_left",), (None, "reference", "cpu"), (1, 2, 3)):
        add(
            f"merge {implementation} {parts}",
            partial(merged, pattern=pattern, parts=parts, implementation=implementation),
        )
    kinds = product(("edge_dot", "edge_sum", "edge_softmax"), GRAPHS, ((), (2,)), (1, 2), (None, "reference"))
    for name, graph, batch, groups, implementation in kinds:
        call = partial(
            edge_operation, name=name, graph=graph, batch=batch, groups=groups, implementation=implementation
        )
        if not (implementation and graph in ("hub", "large")) and not (name == "edge_softmax" and groups > 1):
            add(f"{name} {graph} {batch} groups={groups} {implementation}", call)
    for (name, make, inputs, method), mode in product(tuple(layer_cases()), ("eval", "train", "backward")):
        if mode != "backward" or (method == "forward" and name[:3] != "pyg"):
            add(f"layer {name}, {mode}", partial(layer, make=make, inputs=inputs, method=method, mode=mode))
    for name, call in geometry_cases().items():
        add(f"geometry {name}", call)
    return found


def flatten(result: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a result by name, dense."""
    if isinstance(result, Tensor):
        yield name, result.to_dense() if result.layout != torch.strided else result
    elif isinstance(result, aa.Graph):
        names = "edge_index query_offsets keys_by_query edges_by_query key_offsets queries_by_key edges_by_key"
        yield from flatten({name: getattr(result, name) for name in (*names.split(), "values", "shifts")})
    elif isinstance(result, Mapping):
        for key, part in result.items():
            yield from flatten(part, key)
    elif hasattr(result, "_asdict"):
        yield from flatten(result._asdict())
    elif isinstance(result, list | tuple):
        yield from flatten({f"{name} {place}": part for place, part in enumerate(result)})
    elif hasattr(result, "__dataclass_fields__"):
        yield from flatten(vars(result))


def run_call(name: str, call: Callable[[Numbers], Any], dtype: str) -> Iterator[tuple[str, Any]]:
    """What the call computes, by kind and name: outputs, first gradients and, in float64, second ones."""
    for order in ("first", "second") if dtype == "float64" else ("first",):
        numbers, step = Numbers(name, dtype), "output"
        is_second = order == "second"
        try:
            torch.manual_seed(numbers.seed)
            outputs = dict(flatten(call(numbers)))
            if not is_second:
                yield from ((f"output | {key}", value) for key, value in (numbers.facts | outputs).items())
            step, leaves = order, numbers.leaves
            outputs = {key: value for key, value in outputs.items() if value.requires_grad}
            if not outputs:
                return
            cotangents = {f"cotangent {key}": numbers.normal(*one.shape).to(one.dtype) for key, one in outputs.items()}
            ends = [one.requires_grad_(is_second) for one in cotangents.values()]
            gradients = torch.autograd.grad(
                [*outputs.values()], [*leaves.values()], ends, create_graph=is_second, allow_unused=True
            )
            if is_second:
                # In primitives that have gradients of their own, not by the kernels of the first ones.
                again = zip(leaves, gradients, strict=True)
                yield from ((f"second | first of {key}", one) for key, one in again if one is not None)
                leaves = leaves | cotangents
                bent = [one for one in gradients if one is not None and one.requires_grad]
                factors = [numbers.normal(*one.shape) for one in bent]
                gradients = torch.autograd.grad(bent, [*leaves.values()], factors, allow_unused=True)
            yield from (
                (f"{order} | {key}", one) for key, one in zip(leaves, gradients, strict=True) if one is not None
            )
        except Exception as error:
            yield f"error | {step}", f"{type(error).__name__}: {error}"
            return


def record(path: Path) -> None:
    """Run every call and write its numbers, by "call | dtype, threads | kind | name"."""
    warnings.simplefilter("ignore")
    arrays = {PACKAGE: np.array(aa.__file__)}
    for threads in THREADS:
        torch.set_num_threads(threads)
        for name, (call, dtypes) in calls().items():
            for dtype in dtypes:
                for key, value in run_call(name, call, dtype):
                    arrays[f"{name} | {dtype}, {threads} | {key}"] = _as_array(value)
    np.savez(path, **arrays)


def _as_array(value: Tensor | str) -> np.ndarray:
    """With its dtype in a field's name where numpy has none such."""
    if isinstance(value, str):
        return np.array(value)
    if value.dtype == torch.bfloat16:
        return value.detach().float().numpy().astype([("bfloat16", np.float32)])
    return value.detach().numpy()


if __name__ == "__main__":
    record(Path(sys.argv[1]))
