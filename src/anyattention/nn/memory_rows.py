"""The arguments and results of attention to memories that are rows of one table."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention._checks import Axes, require_dense, require_device, require_floating
from anyattention.ambient import is_autocast_enabled, is_compiling, is_readable, shielded, values_of
from anyattention.config import MemoryAttentionConfig
from anyattention.errors import InvalidInputError, UnsupportedError
from anyattention.memory import ClusterIndex, FaissIndex, UsearchIndex
from anyattention.memory.approximate import ApproximateIndex, IndexedRows
from anyattention.memory.exact import SearchedKeys
from anyattention.memory.ids import require_id_tensor, require_ids_of
from anyattention.nn.matrices import weights_at

__all__ = [
    "excluded_rows",
    "fault_of",
    "index_of",
    "is_same_memory",
    "over_memories",
    "read_table",
    "require_input",
    "require_query_kind",
    "searched_rows",
    "without_excluded",
]


def index_of(config: MemoryAttentionConfig) -> ApproximateIndex:
    """An approximate index without memories."""
    width, measure = config.get_key_dim(), config.measure
    if config.index == "clusters":
        return ClusterIndex(width, measure=measure, num_probes=config.num_probes)
    if config.index == "faiss":
        return FaissIndex(width, measure=measure, ef_search=config.get_ef_search())
    dtype = getattr(torch, config.index_dtype)
    return UsearchIndex(width, measure=measure, ef_search=config.get_ef_search(), dtype=dtype)


def searched_rows(config: MemoryAttentionConfig, keys: Tensor, ids: Tensor) -> SearchedKeys | IndexedRows:
    """What finds rows of the keys, by the index of a config."""
    if config.index == "exact":
        return SearchedKeys(keys, config.measure)
    if is_compiling() or not is_readable(keys):
        raise UnsupportedError(
            f"index={config.index!r} is built where the keys can be read: neither compiled nor under vmap",
            argument="index",
        )
    with shielded():
        return IndexedRows(index_of(config), values_of(keys), values_of(ids))


def require_input(x: Tensor, width: int) -> None:
    """Raise unless x is `(batch, length, d_model)` or `(queries, d_model)`."""
    require_floating("x", x)
    require_dense("x", x)
    axes = Axes("the module", d_model=width)
    axes.bind("x", x, "batch length d_model" if x.ndim == 3 else "queries d_model")


def require_query_kind(x: Tensor, keys: Tensor) -> None:
    """Raise unless x, which is the query as it is, has the device of the keys, and their dtype but for autocast."""
    require_device("x", x, keys.device, "the memories")
    if x.dtype != keys.dtype and not is_autocast_enabled(x.device):
        raise InvalidInputError(argument="x", expected=f"{keys.dtype}, as the memories", actual=x.dtype)


def read_table(argument: str, given: Tensor, own: Tensor) -> Tensor:
    """Keys or values of a call, in place of a module's own: of its device and dtype."""
    require_floating(argument, given)
    require_dense(argument, given)
    require_device(argument, given, own.device, "the module")
    if given.dtype != own.dtype and not is_autocast_enabled(given.device):
        raise InvalidInputError(argument=argument, expected=f"{own.dtype}, as the module", actual=given.dtype)
    return given.to(own.dtype)


def excluded_rows(exclude: Tensor, x: Tensor, known: Tensor) -> Tensor:
    """`(queries,)`: the row of the memory that each query does not attend to, -1 for none.

    Args:
        exclude: ids, of x's shape without its width.
        x: `(batch, length, d_model)` or `(queries, d_model)`.
        known: the ids of the memories, ascending.
    """
    require_id_tensor("exclude", exclude)
    require_device("exclude", exclude, x.device, "x")
    axes = Axes()
    names = "batch length" if x.ndim == 3 else "queries"
    axes.bind("x", x, f"{names} d_model")
    axes.bind("exclude", exclude, names)
    return require_ids_of("exclude", exclude.flatten(), known)


def without_excluded(found: Tensor, excluded: Tensor) -> Tensor:
    """The first k of k + 1 rows `(queries, k + 1)` but for the one of each query that is excluded, -1 for none."""
    is_excluded = (found == excluded[:, None]) & (found >= 0)
    order = is_excluded.to(torch.uint8).sort(dim=1, stable=True).indices[:, :-1]
    return torch.where(is_excluded, -1, found).gather(1, order)


def over_memories(weights: Tensor, rows: Tensor, count: int, by_head: bool) -> Tensor:
    """Weights `(..., length, heads, k)` as a sparse tensor `(..., heads, length, count)`, or the mean over heads."""
    weights, rows = weights.transpose(-3, -2), rows.transpose(-3, -2)
    is_used = rows >= 0
    *places, _ = is_used.nonzero(as_tuple=True)
    places, size = torch.stack([*places, rows[is_used]]), (*weights.shape[:-1], count)
    found = weights_at(places, weights[is_used], size)
    if by_head:
        return found
    head = len(size) - 3
    without = [axis for axis in range(len(size)) if axis != head]
    sums = found.values().to(torch.promote_types(weights.dtype, torch.float32)) / size[head]
    mean = weights_at(found.indices()[without], sums, tuple([size[axis] for axis in without]))
    return mean.to(weights.dtype)


def fault_of(keys: Tensor, values: Tensor, ids: Tensor, next_id: Tensor) -> str | None:
    """What is wrong with the memories of a state_dict, apart from their widths."""
    if len({tuple(x.shape[:1]) for x in (keys, values, ids)}) != 1 or ids.ndim != 1 or next_id.ndim != 0:
        return "keys, values and ids are of different numbers of memories"
    if ids.dtype != torch.int64 or next_id.dtype != torch.int64:
        return "ids are not int64"
    if ids.is_meta:
        return None
    if len(ids) and not (ids[0] >= 0 and bool((ids[1:] > ids[:-1]).all()) and ids[-1] < next_id):
        return "they do not ascend from 0 to below next_id"
    return None


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    about = [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in (one, other)]
    return about[0] == about[1]
