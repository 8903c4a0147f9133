"""Attention over the keys and values of a file, in parts: the file may be larger than memory.

Axes: n queries, N rows of the file, R rows of a part, k chosen ones, D key_dim, C value_dim.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from anyattention._checks import (
    describe_shape,
    require_count,
    require_dense,
    require_device,
    require_floating,
    require_number,
)
from anyattention.ambient import Moment, moment_of, without_autocast
from anyattention.errors import DimensionMismatchError, UnsupportedError
from anyattention.memory.mapped_file import MappedMemory
from anyattention.memory.measures import Measure, alike, read_measure, rows_of_keys, rows_of_queries, sampled_centre
from anyattention.ops import attend, merge
from anyattention.ops.normalizer import normalizer_of, with_normalizer
from anyattention.ops.topk import topk_search
from anyattention.output import AttentionResult

__all__ = ["attend_file"]

# Rows that are copied, to another dtype or to be normalised, or whose weights are formed, stay in the cache.
_COPIED_ROWS = 1 << 14


def attend_file(
    query: Tensor,
    memory: str | os.PathLike[str] | MappedMemory,
    *,
    key: str = "keys",
    value: str = "values",
    k: int | None = None,
    measure: Measure = "dot",
    scale: float | None = None,
    part_size: int = 1 << 20,
    progress: bool = False,
) -> AttentionResult:
    """Attention over keys and values in a safetensors file that may be larger than memory.

        p_j = softmax over j of scale measure(query, key_j),   output = sum over j of p_j value_j

    over all rows of the file, or over the k best of each query. The file is mapped and attended in parts, whose results
    are joined as `merge` does; a part is read from the file where it is used, and the system may forget it after.

    Args:
        query: `(..., key_dim)`, floating, on the CPU; all share the memory.
        memory: a path, or a `MappedMemory`, which is opened once for many calls.
        key, value: names of the file's tensors, `(N, key_dim)` and `(N, value_dim)`, float32, bfloat16 or float16; the
            same name where keys are the values too. Of a `MappedMemory` they are known.
        k: attend to the k best keys alone; None for all.
        measure: "dot" (q . k), "cosine" (both at length 1; a vector of zeros has cosine 0 to all) or "euclidean"
            (-|q - k|^2).
        scale: the factor of the measure; None is 1 / sqrt(key_dim) for "dot" and 1 for the others.
        part_size: rows that are attended at a time. No memory is taken for float32 rows that are compared by "dot";
            others are copied a few thousand at a time.
        progress: show a bar on stderr where tqdm is installed (the extra "demo").

    Returns:
        AttentionResult with output `(..., value_dim)` of the query's dtype, logsumexp and normalizer `(...)`, at least
        float32; with k also weights `(..., k)` and indices `(..., k)` int64, rows of the file, the best first, of equal
        ones the lower row first, -1 and weight 0 where there are fewer. Computed in float32, in float64 where the query
        is.

    Gradients: of output, weights and logsumexp to query, exact: the backward reads the file once more, part by part.
    With k they are differentiable to any order, else once.

    Raises:
        InvalidInputError: the file is none, is cut short or broken (see `MappedMemory`); a setting out of range; a
            query that is no dense floating-point tensor on the CPU.
        DimensionMismatchError: the query's width is not that of the keys.
        UnsupportedError: a call under a compiler or a transform; a second derivative without k.

    Cost: O(n x N x (D + C)) time, with k O(n x N x D), or that of reading the file; memory O(n x (C + k)), and for the
    parts as said. Up to 8 queries are read for at the pace of the file.

    Source: Milakov and Gimelshein, 2018 (online softmax).

    Example:
        >>> import tempfile
        >>> from anyattention.memory import write_memory
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_memory(f"{folder}/m.safetensors", [(torch.eye(3), torch.tensor([[0.0], [1.0], [2.0]]))])
        ...     result = attend_file(torch.tensor([[0.0, 0.0, 9.0]]), f"{folder}/m.safetensors", k=2, scale=1.0)
        >>> result.indices, result.output
        (tensor([[2, 0]]), tensor([[1.9998]]))
    """
    mapped = memory if isinstance(memory, MappedMemory) else MappedMemory(memory, key, value)
    _require_query(query, mapped)
    measure = read_measure(measure)
    part_size = require_count("part_size", part_size, 1)
    k = None if k is None else require_count("k", k, 1)
    width = query.shape[-1]
    usual = 1 / math.sqrt(width) if measure == "dot" else 1.0
    factor: float = usual if scale is None else require_number("scale", scale)
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = query.reshape(-1, width).to(dtype)
    with without_autocast(query.device), _bar(progress, len(mapped)) as shown:
        mapped.will_read(in_order=True)
        file = _File(mapped, measure, factor, part_size, dtype, shown)
        result = _over_all(rows, file) if k is None else _over_best(rows, file, min(k, len(mapped)), k)
        file.shown = None  # a backward shows nothing
    return _shaped(result, query, mapped.values.shape[1])


def _require_query(query: Tensor, mapped: MappedMemory) -> None:
    require_dense("query", query)
    require_floating("query", query)
    require_device("query", query, torch.device("cpu"), "the file's rows")
    if query.ndim == 0 or query.shape[-1] != mapped.keys.shape[1]:
        raise DimensionMismatchError(
            argument="query",
            expected=f"(..., key_dim={mapped.keys.shape[1]}), as the keys of the file",
            actual=describe_shape(query),
        )
    if moment_of((query,)) is not Moment.PLAIN:
        raise UnsupportedError(
            "a file is attended in plain calls: neither compiled nor under a transform or mode", argument="query"
        )


def _shaped(result: AttentionResult, query: Tensor, value_dim: int) -> AttentionResult:
    """The results `(n, ...)` with the leading axes of the query."""
    lead = query.shape[:-1]
    assert result.normalizer is not None
    largest, log_sum = (x.view(lead) for x in result.normalizer)
    weights, indices = (None if x is None else x.view(*lead, x.shape[1]) for x in (result.weights, result.indices))
    shaped = AttentionResult(
        result.output.reshape(*lead, value_dim).to(query.dtype),
        None if weights is None else weights.to(query.dtype),
        indices=indices,
    )
    return with_normalizer(shaped, largest, log_sum)


class _File:
    """A file's rows as they are compared, part by part.

    Attributes:
        scale: of the products of `rows_of_queries` and the keys of a part.
        dtype: what all is computed in.
    """

    def __init__(
        self, mapped: MappedMemory, measure: Measure, scale: float, part_size: int, dtype: torch.dtype, shown: Any
    ) -> None:
        self.mapped, self.scale, self.dtype, self.shown = mapped, scale, dtype, shown
        self.measure: Measure = measure
        self.is_copied = measure != "dot" or mapped.keys.dtype != dtype or mapped.values.dtype != dtype
        self.part_size = min(part_size, _COPIED_ROWS) if self.is_copied else part_size
        self.centre = sampled_centre(mapped.keys, dtype) if measure == "euclidean" else None

    def compared(self, query: Tensor) -> Tensor:
        """The queries, whose products with the keys of a part rank them."""
        return rows_of_queries(query, self.measure, self.centre)

    def parts(self, rows: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The first row of each part, its keys as they are compared, and its values."""
        size = self.part_size if rows is None else min(self.part_size, rows)
        for first in range(0, len(self.mapped), size):
            keys, values = (x[first : first + size].to(self.dtype) for x in (self.mapped.keys, self.mapped.values))
            yield first, rows_of_keys(keys, self.measure, self.centre), values
            if self.shown is not None:
                self.shown.update(len(keys))

    def chosen(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(..., D)` and `(..., C)` of some rows."""
        self.mapped.will_read(in_order=False)
        keys, values = (x[ids.flatten()].view(*ids.shape, x.shape[1]) for x in (self.mapped.keys, self.mapped.values))
        self.mapped.will_read(in_order=True)
        return keys.to(self.dtype), values.to(self.dtype)


def _over_all(query: Tensor, file: _File) -> AttentionResult:
    """Over all rows."""
    output, largest, log_sum = _OverAll.apply(file.compared(query), file)
    if file.centre is not None:
        # The same for all keys of a query, which products leave out.
        length = -file.scale * (query - file.centre).square().sum(1)
        largest, log_sum = largest + length.detach(), log_sum + (length - length.detach())
    return with_normalizer(AttentionResult(output), largest, log_sum)


class _OverAll(torch.autograd.Function):
    """Queries over all keys of a file, whose rows are read once more for the gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, file: _File) -> tuple[Tensor, Tensor, Tensor]:
        whole: AttentionResult | None = None
        for _, keys, values in file.parts():
            in_batch = query[None, :, None], keys[None, :, None], values[None, :, None]
            part = attend(*in_batch, scale=file.scale, return_logsumexp=True)
            whole = part if whole is None else merge([whole, part])
        assert whole is not None
        assert whole.normalizer is not None
        output, largest, log_sum = (x[0, :, 0].contiguous() for x in (whole.output, *whole.normalizer))
        ctx.save_for_backward(query, output, largest, log_sum)
        ctx.file = file
        ctx.mark_non_differentiable(largest)
        return output, largest, log_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor, grad_log_sum: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "a second derivative of attention over a whole file: give k, whose result has derivatives of any order",
                argument="query",
            )
        query, output, largest, log_sum = ctx.saved_tensors
        file: _File = ctx.file
        delta = (grad * output).sum(1) - grad_log_sum
        total = torch.zeros_like(query)
        with without_autocast(query.device):
            for _first, keys, values in file.parts(_COPIED_ROWS):
                scores = query @ keys.T
                weights = scores.mul_(file.scale).sub_(largest[:, None]).sub_(log_sum[:, None]).exp_()
                slopes = (grad @ values.T).sub_(delta[:, None]).mul_(weights)
                total.addmm_(slopes, keys)
        return total.mul_(file.scale), None


def _over_best(query: Tensor, file: _File, count: int, k: int) -> AttentionResult:
    """Over the best rows of each query."""
    with torch.no_grad():
        ids = _best(query, file, count)
    keys, values = file.chosen(ids)
    scores = _shown(alike(query, keys, file.measure) * file.scale)
    largest, log_sum = normalizer_of(scores)
    weights = ((scores - largest[:, None]) - log_sum[:, None]).exp()
    output = (weights.unsqueeze(-1) * values).sum(1)
    missing = k - count
    result = AttentionResult(
        output,
        torch.nn.functional.pad(weights, (0, missing)),
        indices=torch.nn.functional.pad(ids, (0, missing), value=-1),
    )
    return with_normalizer(result, largest, log_sum)


def _best(query: Tensor, file: _File, count: int) -> Tensor:
    """The rows `(n, count)` of the best keys, the best first."""
    compared = file.compared(query) * file.scale  # which may be negative
    found = compared.float()
    best = query.new_full((len(query), 0), -torch.inf)
    ids = torch.empty(len(query), 0, dtype=torch.int64, device="cpu")
    for first, keys, _ in file.parts():
        places = topk_search(found, keys.float(), min(count, len(keys)))
        scores = _shown((compared.unsqueeze(1) * keys[places]).sum(-1))
        best, ids = torch.cat([best, scores], 1), torch.cat([ids, places + first], 1)
        # The rows of earlier parts come first among equal ones.
        order = best.sort(dim=1, descending=True, stable=True).indices[:, :count]
        best, ids = best.gather(1, order), ids.gather(1, order)
    return ids


def _shown(scores: Tensor) -> Tensor:
    """The scores, NaN where they are infinite: such a key comes before all others, and shows in the output."""
    return scores + scores * 0


def _bar(progress: bool, total: int) -> AbstractContextManager[Any]:
    """tqdm's, or nothing."""
    if not progress:
        return nullcontext()
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return nullcontext()
    # A log file is not redrawn in place, so it gets a line now and then.
    pause = 0.1 if sys.stderr.isatty() else 5.0
    return tqdm(total=total, desc="memories", unit="row", unit_scale=True, mininterval=pause, file=sys.stderr)
