"""Checks of arguments: axis names bound across tensors, masks, numbers, and memory before it is allocated."""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from anyattention.ambient import is_compiling
from anyattention.errors import (
    AttentionError,
    DimensionMismatchError,
    InvalidInputError,
    InvalidMaskError,
    OutOfMemoryError,
)

_LARGEST = sys.float_info.max
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Asking the system how much memory is free costs 50 us, so small requests are not checked.
_CHECKED_FROM_BYTES = 1 << 26


class Axes:
    """Binds axis names to sizes over several tensors, and says which tensor disagrees with which.

    Example:
        >>> import torch
        >>> axes = Axes()
        >>> axes.bind("query", torch.ones(2, 5), "length width")
        >>> axes.bind("key", torch.ones(3, 4), "keys width")
        Traceback (most recent call last):
        anyattention.errors.DimensionMismatchError: key: expected (keys=3, width=5), got (3, 4). width is 5 in query
    """

    def __init__(self, named_by: str = "", **sizes: int) -> None:
        self.sizes: dict[str, int] = sizes
        # Who names an axis is looked up in the order of the bindings, and only for an error.
        self._bound: list[tuple[str, Sequence[str]]] = [(named_by, tuple(sizes))]

    def bind(self, argument: str, tensor: Tensor, names: str) -> None:
        """Check the rank and every size that is already bound; bind the others."""
        if not isinstance(tensor, Tensor) or tensor.is_nested:
            require_tensor(argument, tensor)
        axes, shape, sizes = names.split(), tensor.shape, self.sizes
        if len(shape) != len(axes):
            raise self._mismatch(argument, tensor, axes)
        self._bound.append((argument, axes))
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise self._mismatch(argument, tensor, axes, axis)

    def bind_keys(self, argument: str, tensor: Tensor, names: str) -> None:
        """`bind` for a tensor whose `key_heads` are shared by groups of `heads`, bound before: they divide them."""
        self.bind(argument, tensor, names)
        heads, key_heads = self.sizes["heads"], self.sizes["key_heads"]
        if heads != key_heads and (heads == 0 or key_heads == 0 or heads % key_heads):
            raise DimensionMismatchError(
                argument=argument,
                expected=f"a number of key_heads that divides heads={heads}",
                actual=describe_shape(tensor),
                hint=f"heads is {heads} in {self._named_by('heads')}",
            )

    def set(self, axis: str, size: int, named_by: str) -> None:
        """Bind a size that no tensor carries, such as a graph's number of nodes."""
        self.sizes[axis] = size
        self._bound.insert(0, (named_by, (axis,)))

    def _named_by(self, axis: str) -> str:
        return next(argument for argument, axes in self._bound if axis in axes)

    def _mismatch(
        self, argument: str, tensor: Tensor, axes: list[str], axis: str | None = None
    ) -> DimensionMismatchError:
        known = [f"{name}={self.sizes[name]}" if name in self.sizes else name for name in axes]
        hint = axis and f"{axis} is {self.sizes[axis]} in {self._named_by(axis)}"
        return DimensionMismatchError(
            argument=argument,
            expected=f"({', '.join(known)})",
            actual=describe_shape(tensor),
            hint=hint,
        )


def describe_shape(tensor: Tensor) -> str:
    """The shape as text, `(2, 3)`."""
    return str(tuple(int(size) for size in tensor.shape))


def require_tensor(argument: str, value: object) -> None:
    """Raise unless the argument is a tensor with a shape."""
    if not isinstance(value, Tensor):
        raise InvalidInputError(
            argument=argument, expected="a torch.Tensor", actual=type(value).__name__, hint=conversion_of(value)
        )
    if value.is_nested:
        raise InvalidInputError(
            argument=argument,
            expected="a torch.Tensor of one shape",
            actual="a nested (ragged) tensor",
            hint="pad it, and hide the padding with a mask",
        )


def conversion_of(value: object) -> str | None:
    """What makes ours of another library's object, as a hint."""
    by_library = {
        "networkx": "Graph.from_networkx(...) makes a Graph of it",
        "scipy": "Graph.from_adjacency(...) makes a Graph of it",
        "pandas": "Graph.from_adjacency(...) makes a Graph of it",
        "dgl": "Graph.from_edge_index(torch.stack(graph.edges()), graph.num_nodes()) makes a Graph of it",
        "torch_geometric": "Graph.from_edge_index(data.edge_index, data.num_nodes) makes a Graph of it",
        "numpy": "torch.from_numpy(...) makes a tensor of it",
    }
    libraries = [base.__module__.partition(".")[0] for base in type(value).__mro__]
    return next((by_library[library] for library in libraries if library in by_library), None)


def no_graph(argument: str, value: object, expected: str = "a Graph") -> InvalidInputError:
    """The error for what is given in place of a Graph."""
    hint = conversion_of(value)
    if isinstance(value, Tensor):
        hint = "Graph.from_edge_index(...) makes a Graph of an edge list, Graph.from_adjacency(...) of a matrix"
    return InvalidInputError(argument=argument, expected=expected, actual=type(value).__name__, hint=hint)


Relation = tuple[str, str, str]
"""Edges of one kind: type of the sources (keys), name, type of the targets (queries)."""


def require_relation(argument: str, key: object, error: type[AttentionError]) -> Relation:
    """A relation as given by a caller: three strings, else an error of the class."""
    if not isinstance(key, tuple | list) or len(key) != 3 or not all(isinstance(part, str) for part in key):
        raise error(
            argument=argument,
            expected="relations (type of sources, name, type of targets) of three strings",
            actual=repr(key),
        )
    return (key[0], key[1], key[2])


def require_dense(argument: str, tensor: Tensor) -> None:
    """Raise unless the argument is a tensor that keeps all its elements, not a sparse one."""
    require_tensor(argument, tensor)
    if tensor.layout != torch.strided:
        raise InvalidInputError(argument=argument, expected="a dense tensor", actual=tensor.layout)


def require_floating(argument: str, tensor: Tensor) -> None:
    """Raise unless the argument is a floating-point tensor."""
    require_tensor(argument, tensor)
    require_floating_dtype(argument, tensor.dtype)


def require_floating_dtype(argument: str, dtype: torch.dtype) -> None:
    """Raise unless the dtype is one that attention is computed in."""
    if dtype not in FLOATING:
        raise InvalidInputError(
            argument=argument, expected="a floating-point dtype of 16, 32 or 64 bits", actual=repr(dtype)
        )


def require_same_kind(argument: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are dense and have one dtype and one device."""
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested:
        dtype = tensor.dtype
        if dtype in FLOATING and dtype is other.dtype and tensor.device == other.device:
            return
    require_dense(argument, tensor)
    require_floating(argument, tensor)
    if tensor.dtype != other.dtype:
        raise InvalidInputError(argument=argument, expected=f"{other.dtype}, as {other_name}", actual=tensor.dtype)
    require_device(argument, tensor, other.device, other_name)


def require_device(argument: str, tensor: Tensor, device: torch.device, named_by: str) -> None:
    """Raise unless the tensor is on the device."""
    if tensor.device != device:
        raise InvalidInputError(argument=argument, expected=f"device {device}, as {named_by}", actual=tensor.device)


def plain(value: Any) -> Any:
    """numpy's scalars and arrays as Python's numbers and lists, in lists and tuples too; anything else as it is."""
    kind = type(value)
    if kind is int or kind is float:
        return value
    if kind is list or kind is tuple:
        return kind([plain(item) for item in value])
    return value.tolist() if kind.__module__ == "numpy" and hasattr(value, "tolist") else value


def keep_plain(record: object, name: str) -> Any:
    """A field of a frozen dataclass as a plain number, which the field is from now on."""
    value = getattr(record, name)
    if type(value) not in (int, float, bool, str, NoneType):
        value = plain(value)
        object.__setattr__(record, name, value)
    return value


def keep_all_plain(record: object) -> None:
    """`keep_plain` of all fields."""
    for name in list(vars(record)):
        keep_plain(record, name)


def require_count(argument: str, count: Any, at_least: int) -> int:
    """The count as a plain int; raise unless it is one of at least so many."""
    count = plain(count)
    if isinstance(count, bool) or not isinstance(count, int) or count < at_least:
        raise InvalidInputError(argument=argument, expected=f"an int of at least {at_least}", actual=repr(count))
    return count


def require_number(
    argument: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    error: type[AttentionError] = InvalidInputError,
) -> Any:
    """The value as a plain number, finite and in the range; raise unless it is one."""
    value = plain(value)
    is_number = isinstance(value, int | float | torch.SymInt | torch.SymFloat)
    is_bool = isinstance(value, bool)
    # Not math.isfinite, which overflows on an integer that no float can hold.
    if is_number and not is_bool and -_LARGEST <= value <= _LARGEST and above < value and at_least <= value < below:
        return value
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("above", above), ("at least", at_least), ("below", below))
        if math.isfinite(bound)
    ]
    expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
    raise error(argument=argument, expected=expected, actual=value if is_number and not is_bool else repr(value))


def require_mask(argument: str, mask: Tensor) -> None:
    """Raise unless the mask is boolean; the error names the helper that converts other conventions."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise InvalidMaskError(
            argument=argument,
            expected="a torch.bool tensor in which True means 'may attend'",
            actual=mask.dtype if isinstance(mask, Tensor) else type(mask).__name__,
            hint=f"{argument}.bool() is one where 1 means 'may attend', as in Hugging Face's attention_mask;"
            " anyattention.mask_from_blocked converts masks in which True or 1 means 'masked out'",
        )
    require_dense(argument, mask)


def to_four_axes(
    argument: str,
    tensor: Tensor,
    batch: int,
    heads: int,
    query_length: int,
    key_length: int,
) -> Tensor:
    """View a dense mask or bias of rank 1, 2 or 4 as `(batch | 1, heads | 1, query_length | 1, key_length | 1)`."""
    error = InvalidMaskError if tensor.dtype == torch.bool else DimensionMismatchError
    if tensor.ndim == 3:
        raise error(
            argument=argument,
            expected="rank 1, 2 or 4",
            actual=f"rank 3, {describe_shape(tensor)}",
            hint=f"write {argument}[:, None] for (batch, query_length, key_length) "
            f"or {argument}[None] for (heads, query_length, key_length)",
        )
    full = (batch, heads, query_length, key_length)
    sizes = (1,) * (4 - tensor.ndim) + tuple(tensor.shape) if tensor.ndim in (1, 2, 4) else ()
    if not sizes or any(size not in (1, whole) for size, whole in zip(sizes, full, strict=True)):
        hint = None
        if tuple(tensor.shape) == (batch, key_length):
            hint = f"for padding, (batch, key_length), write {argument}[:, None, None], in a module {argument}[:, None]"
        raise error(
            argument=argument,
            expected=f"a shape that broadcasts to (batch={batch}, heads={heads}, "
            f"query_length={query_length}, key_length={key_length})",
            actual=describe_shape(tensor),
            hint=hint,
        )
    return tensor.reshape(sizes)


def require_memory(size: int, what: str, device: torch.device) -> None:
    """Raise `OutOfMemoryError` when `size` bytes are more than the device has free."""
    if is_compiling() or size < _CHECKED_FROM_BYTES:
        return
    free = _free_memory(device)
    if free is not None and size > free:
        raise OutOfMemoryError(
            f"{what} would take {size / 2**30:.2f} GiB; {free / 2**30:.2f} GiB are free on {device}",
            size=size,
        )


def _free_memory(device: torch.device) -> int | None:
    """Bytes free on the device, or None where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


@contextmanager
def allocation_failures_named() -> Iterator[None]:
    """Turn an allocator's failure into `OutOfMemoryError`; every other error passes."""
    try:
        yield
    except (MemoryError, RuntimeError) as failure:
        named = as_out_of_memory(failure)
        if named is None or named is failure:
            raise
        raise named from failure


def as_out_of_memory(failure: Exception) -> OutOfMemoryError | None:
    """An allocator's failure as an error of ours, which may be it itself; None for everything else."""
    if isinstance(failure, OutOfMemoryError):
        return failure
    text = str(failure)
    is_allocation = isinstance(failure, MemoryError | torch.OutOfMemoryError)
    if not (is_allocation or "can't allocate memory" in text or "not enough memory" in text):
        return None
    digits = "".join(char if char.isdigit() else " " for char in text).split()
    size = max((int(number) for number in digits), default=None)
    return OutOfMemoryError(f"memory ran out: {text}", size=size)
