"""An operator is a record: a frozen dataclass whose typed fields are its inputs.

From the fields come, by name, PyTorch's schema, packing and unpacking, the saved tensors, the results' shapes, the
rules of torch.func and the C structure. A kernel is a function of the record, registered for a device. The rule of the
gradient is written once and bound twice: as an `autograd.Function` for eager calls, which torch.func and forward-mode
derivatives know, and by `torch.library.register_autograd` for compilers and modes, which see operators of PyTorch's
dispatcher.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from anyattention import ambient
from anyattention.ambient import Moment
from anyattention.errors import UnsupportedError
from anyattention.native import calls, load
from anyattention.native.structures import Layout, layout_of, snake_case
from anyattention.ops.compile_cache import separate_compiled_graphs
from anyattention.ops.handles import resolved
from anyattention.ops.mapped import mapped_by_autograd, mapped_calls
from anyattention.ops.records import (
    flattened,
    kept_flags,
    late_names,
    num_tensors,
    numbers_of,
    places_of,
    record_of,
    schema_of,
    take_sizes,
    tensors_of,
    versions_of,
    with_tensors,
)

__all__ = ["Operator", "Result", "operator"]

Record = TypeVar("Record")

_library = torch.library.Library("anyattention", "FRAGMENT")
separate_compiled_graphs()


@dataclass(frozen=True)
class Result:
    """One tensor that an operator returns.

    Attributes:
        name: the name.
        axes: its axes, such as "batch num_queries heads", in the dtype of the first numbers among the fields.
        like: instead, a field whose shape and dtype it has; no result where that is None.
        dtype: another dtype, of a result by axes.
        is_sum: at least float32.
    """

    name: str
    axes: str = ""
    like: str | None = None
    dtype: torch.dtype | None = None
    is_sum: bool = False

    def like_of(self, record: Any) -> Tensor | None:
        """The tensor of a record whose shape it has."""
        for name in self._path:
            record = getattr(record, name)
        return record

    @cached_property
    def _path(self) -> tuple[str, ...]:
        return tuple(self.like.split(".")) if self.like is not None else ()

    @cached_property
    def sized(self) -> tuple[str, ...]:
        """The axes by name."""
        return tuple(self.axes.split())

    @cached_property
    def sized_without_batch(self) -> tuple[str, ...]:
        """The same for a record without a batch axis."""
        return tuple([axis for axis in self.sized if axis != "batch"])


# A rule of gradients: the call with the kept tensors, the kept results, the gradients by the results (None where
# there is none) and the names of the fields that need one; answers by name.
Gradient = Callable[[Any, Sequence[Tensor], Sequence[Tensor | None], frozenset[str]], Mapping[str, Tensor | None]]
# A rule of forward derivatives: the call, its results, and the tangents by the fields' names.
Tangent = Callable[[Any, Sequence[Tensor], Mapping[str, Tensor]], Tensor | tuple[Tensor, ...]]


def operator(
    record: type[Record],
    results: Sequence[Result],
    *,
    gradient: Gradient | None = None,
    linear_in: Sequence[str] = (),
    tangent: Tangent | None = None,
    keeps: Sequence[str] | None = None,
    keeps_results: bool = False,
) -> Operator[Record]:
    """Registers `anyattention::<record's name>` and returns the function that calls it.

    Args:
        record: a frozen dataclass; see `native.structures` for its fields.
        results: what is returned, one tensor or a tuple.
        gradient: the rule of the gradient; None is no gradient.
        linear_in: fields in each of which the operator is linear, which gives its forward derivative.
        tangent: the rule of the forward derivative, where it is not linear.
        keeps: the fields whose tensors the gradient reads; None is all.
        keeps_results: whether it reads the results.
    """
    return Operator(record, results, gradient, tuple(linear_in), tangent, keeps, keeps_results)


class Operator(Generic[Record]):
    """What `operator` returns: call it with a record. Final."""

    def __init__(
        self,
        record: type[Record],
        results: Sequence[Result],
        gradient: Gradient | None,
        linear_in: tuple[str, ...],
        tangent: Tangent | None,
        keeps: Sequence[str] | None,
        keeps_results: bool,
    ) -> None:
        self.name = snake_case(record.__name__)
        self.results = tuple(results)
        self._layout = layout_of(record)
        self._gradient, self._linear_in, self._tangent = gradient, linear_in, tangent
        self._keeps = keeps
        self._keeps_results = keeps_results
        self._kernels: dict[str, Callable[[Any], Any]] = {}
        # Where each differentiable field stands among the tensors, and among the schema's arguments.
        self._places, self._arguments = places_of(self._layout)
        self._late, self._num_tensors = late_names(self._layout), num_tensors(self._layout)
        # The device of a call is that of its first numbers.
        self._first = next(iter(self._places.values()))
        # Whether each result has a batch axis, first.
        self._batched = [_begins_with_batch(self._layout, result) for result in results]
        returned = ", ".join(["Tensor"] * len(results))
        schema = ", ".join(schema_of(self._layout, ""))
        _library.define(f"{self.name}({schema}) -> {returned if len(results) == 1 else f'({returned})'}")
        torch.library.register_fake(f"anyattention::{self.name}", self._fake, lib=_library)
        self._dispatched = getattr(torch.ops.anyattention, self.name).default
        self._function: Any = _function_of(self)
        # Function.apply binds defaults of the signature first, which takes longer than a small kernel.
        base: Any = super(torch.autograd.Function, self._function)
        self._apply = base.apply
        if gradient is not None:
            torch.library.register_autograd(
                f"anyattention::{self.name}", self._dispatched_backward, setup_context=self._setup, lib=_library
            )

    def __call__(self, record: Record) -> Any:
        """The results: a tensor, or a tuple of them, None for those that the record does not ask for."""
        if ambient.is_compiling():
            return self._through_dispatcher(record)
        tensors = tensors_of(self._layout, record)
        moment = ambient.moment_of(tensors)
        if moment is Moment.PLAIN:
            if self._gradient is not None and torch.is_grad_enabled():
                for x in tensors:
                    if x is not None and x.requires_grad:
                        return self._apply(moment, record, *tensors)
            kernel = self._kernel_for(tensors)
            if kernel is not None:
                return kernel(record)
        elif moment is Moment.BATCHED:
            # A node of autograd would hang on the batched wrappers, and go with them.
            return mapped_by_autograd(self, self._layout, self._have_batch(record), record, tensors)
        elif moment is not Moment.DISPATCHED:
            return self._function.apply(moment, record, *tensors)
        return self._through_dispatcher(record)

    def _through_dispatcher(self, record: Record) -> Any:
        found = self._dispatched(*flattened(self._layout, record))
        if len(self.results) == 1:
            return found
        return tuple([x if self._is_there(n, record) else None for n, x in enumerate(found)])

    def kernel(
        self, device: str, *, binds: bool = False
    ) -> Callable[[Callable[[Record], Any]], Callable[[Record], Any]]:
        """Registers what computes the operator on a device ("cpu", "cuda"): a function of the record.

        Args:
            device: its type.
            binds: whether it binds the record to its C structure, whose size is then compared at load.
        """
        if binds:
            _ = self._layout.structure

        def register(function: Callable[[Record], Any]) -> Callable[[Record], Any]:
            def flat(*arguments: Any) -> Any:
                record = record_of(self._layout, iter(arguments), resolved if device == "cpu" else None)
                found = function(record)
                return _apart(found, numbers_of(self._layout, record)) if isinstance(found, tuple) else found

            self._kernels[device] = function
            _library.impl(self.name, flat, device.upper())
            return function

        return register

    def c_kernel(self, function: str | None = None, empty: float | None = None) -> None:
        """Registers the C function of the operator's name, or another: it takes the record's structure and the results.

        Args:
            function: its name, without the prefix.
            empty: what the results hold where a size is 0, and C is not called; None calls it all the same.
        """
        name = function or self.name

        @self.kernel("cpu", binds=True)
        def run(record: Record) -> Any:
            bound = calls.bind(record)
            results = self.allocate(record, bound)
            if empty is not None and 0 in bound.sizes.values():
                for result in results:
                    if result is not None:
                        result.fill_(empty)
            else:
                pointers = [None if x is None else x.data_ptr() for x in results]
                status = load.kernel(name, 1 + len(results))(ctypes.byref(bound.structure), *pointers)
                if status:
                    load.check_status(status, name)
            return results[0] if len(results) == 1 else tuple(results)

    def allocate(self, record: Record, bound: calls.Bound) -> list[Tensor | None]:
        """Uninitialised results on the CPU; None for those that the record does not ask for."""
        first, sizes = bound.first, bound.sizes
        assert first is not None
        # None where it is that of the numbers, which takes a microsecond to say.
        of_sums = None if bound.dtype is first.dtype else bound.dtype
        needed = getattr(record, "needed", None)
        results: list[Tensor | None] = []
        for n, result in enumerate(self.results):
            if needed is not None and not needed[n]:
                results.append(None)
                continue
            dtype = of_sums if result.is_sum else result.dtype
            if result.like is not None:
                like, kept = result.like_of(record), torch.contiguous_format
                results.append(None if like is None else torch.empty_like(like, dtype=dtype, memory_format=kept))
            else:
                axes = result.sized if bound.has_batch else result.sized_without_batch
                shape = [sizes[axis] if axis in sizes else getattr(record, axis) for axis in axes]
                results.append(first.new_empty(*shape) if dtype is None else first.new_empty(shape, dtype=dtype))
        return results

    def _kernel_for(self, tensors: Sequence[Tensor | None]) -> Callable[[Any], Any] | None:
        """What computes a call where its first numbers are; None where only the dispatcher may know."""
        first = tensors[self._first]
        assert first is not None
        return self._kernels.get("cpu" if first.is_cpu else first.device.type)

    def _is_there(self, n: int, record: Any) -> bool:
        needed = getattr(record, "needed", None)
        if needed is not None and not needed[n]:
            return False
        result = self.results[n]
        return result.like is None or result.like_of(record) is not None

    def _have_batch(self, record: Any) -> bool:
        """Whether each result that there is has a batch axis."""
        return all(is_batched for n, is_batched in enumerate(self._batched) if self._is_there(n, record))

    def _fake(self, *arguments: Any) -> Any:
        record = record_of(self._layout, iter(arguments))
        first = numbers_of(self._layout, record)
        sizes: dict[str, Any] = {}
        has_batch = take_sizes(self._layout, record, sizes)
        made = []
        for n, result in enumerate(self.results):
            dtype = torch.promote_types(first.dtype, torch.float32) if result.is_sum else result.dtype
            if not self._is_there(n, record):
                shape: Any = 0
            elif result.like is not None:
                like = result.like_of(record)
                assert like is not None
                shape = like.shape
            else:
                axes = result.sized if has_batch else result.sized_without_batch
                shape = [sizes[axis] if axis in sizes else getattr(record, axis) for axis in axes]
            made.append(first.new_empty(shape, dtype=dtype))
        return made[0] if len(made) == 1 else tuple(made)

    # The one rule of the gradient, and its two bindings.

    def _save(self, ctx: Any, record: Any, tensors: Sequence[Tensor | None], output: Any, moment: Moment) -> None:
        """Keeps what the gradient reads, and the forward derivative where the moment may ask for one."""
        results = output if isinstance(output, tuple) else (output,)
        if self._gradient is None:
            ctx.mark_non_differentiable(*[x for x in results if isinstance(x, Tensor)])
            return
        # Zeros for a result that nobody used would cost as much as a gradient.
        ctx.set_materialize_grads(False)
        is_plain = moment is Moment.PLAIN
        # In a plain call autograd has nothing to do with a graph's arrays but to hold them, which the template does.
        ctx.template = with_tensors(self._layout, record, repeat(None), is_plain)
        ctx.versions = versions_of(self._layout, record) if is_plain else None
        if is_plain:
            tensors = tensors_of(self._layout, record, False)
        elif moment is not Moment.DISPATCHED:
            ctx.save_for_forward(*tensors, *results)
        if self._keeps is not None:
            flags = kept_flags(self._layout, self._keeps, not is_plain)
            tensors = [x if is_kept else None for x, is_kept in zip(tensors, flags, strict=True)]
        ctx.save_for_backward(*tensors, *(results if self._keeps_results else ()))

    def _gradients(self, ctx: Any, needs: Sequence[str], by: Sequence[Tensor | None]) -> Mapping[str, Tensor | None]:
        """What the rule answers, for the fields that need it."""
        assert self._gradient is not None
        if all(x is None for x in by):
            return dict.fromkeys(needs)
        saved, is_plain = ctx.saved_tensors, ctx.versions is not None
        results = saved[len(saved) - len(self.results) :] if self._keeps_results else ()
        if is_plain and ctx.versions != versions_of(self._layout, ctx.template):
            raise RuntimeError(f"{self.name}: arrays of the graph were changed in place since the forward")
        call = with_tensors(self._layout, ctx.template, iter(saved), is_plain)
        return self.gradients(call, results, by, needs)

    def gradients(
        self, record: Record, results: Sequence[Tensor], by: Sequence[Tensor | None], needs: Sequence[str]
    ) -> Mapping[str, Tensor | None]:
        """The gradients of some fields by those of the results, inside a backward of the call."""
        assert self._gradient is not None
        if not ambient.has_outer_derivatives(by):
            found = self._gradient(record, results, by, frozenset(needs))
            return {name: found.get(name) for name in needs}
        with torch.enable_grad():
            found = self._gradient(record, results, by, frozenset(needs))
        # Without what was recorded, and with the forward derivatives that it was recorded for: detach drops both.
        return {name: None if (x := found.get(name)) is None else x.clone() for name in needs}

    def _setup(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        record = record_of(self._layout, iter(inputs))
        self._save(ctx, record, tensors_of(self._layout, record), output, Moment.DISPATCHED)

    def _dispatched_backward(self, ctx: Any, *by: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        found = self._gradients(ctx, [name for name, place in self._arguments.items() if needs[place]], by)
        given: list[Any] = [[None] * len(each) if isinstance(each, list | tuple) else None for each in needs]
        for name, gradient in found.items():
            given[self._arguments[name]] = gradient
        return tuple(given)

    def _places_among(self, count: int) -> Mapping[str, int]:
        """Where each differentiable field stands among so many tensors."""
        more = count - self._num_tensors
        if not more or not self._late:
            return self._places
        return {name: place + more if name in self._late else place for name, place in self._places.items()}

    def _without_tangents(self) -> UnsupportedError:
        return UnsupportedError(f"anyattention::{self.name} has no forward derivative")

    def _tangents(self, record: Any, results: Sequence[Tensor], by: Mapping[str, Tensor]) -> Any:
        if self._tangent is not None:
            return self._tangent(record, results, by)
        if not self._linear_in:
            raise self._without_tangents()
        parts = [self(replace(record, **{name: x})) for name, x in by.items() if name in self._linear_in]
        return sum(parts[1:], parts[0])


def _function_of(op: Operator[Any]) -> Any:
    """The operator's `autograd.Function`: of the moment of the call, the record, and its tensors."""

    def forward(moment: Moment, record: Any, *tensors: Tensor | None) -> Any:
        if moment is not Moment.TRANSFORMED:
            kernel = op._kernel_for(tensors)
            return op._through_dispatcher(record) if kernel is None else kernel(record)
        # A transform has taken off one of its wrappers: whether others are left, the next call sees.
        return op(with_tensors(op._layout, record, iter(tensors)))

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        moment, record, *tensors = inputs
        op._save(ctx, record, tensors, output, moment)

    def backward(ctx: Any, *by: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        places = op._places_among(len(needs) - 2)
        found = op._gradients(ctx, [name for name, place in places.items() if needs[2 + place]], by)
        given: list[Any] = [None] * len(needs)
        for name, gradient in found.items():
            given[2 + places[name]] = gradient
        return tuple(given)

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        if op._gradient is None and all(each.dtype is torch.int64 for each in op.results):
            # Indices have no derivative, nor can anything be wanted of it.
            return None if len(op.results) == 1 else (None,) * len(op.results)
        if op._gradient is None:
            raise op._without_tangents()
        places = op._places_among(len(tangents) - 2)
        by = {name: tangents[2 + place] for name, place in places.items() if tangents[2 + place] is not None}
        with ambient.without_tangents(ctx.saved_tensors) as saved:
            record = with_tensors(op._layout, ctx.template, iter(saved))
            return op._tangents(record, saved[len(saved) - len(op.results) :], by)  # pyright: ignore[reportArgumentType]

    def vmap(info: Any, in_dims: Sequence[Any], _: Moment, record: Any, *tensors: Tensor | None) -> Any:
        mapped = [dim is not None for dim in in_dims[2:]]
        given = [
            x if x is None or dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        results = mapped_calls(op, op._layout, op._have_batch(record), record, given, mapped, info.batch_size)
        dims = tuple([None if x is None else 0 for x in results])
        return (results[0], dims[0]) if len(results) == 1 else (results, dims)

    members = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp, "vmap": vmap}
    return type(op.name, (torch.autograd.Function,), {name: staticmethod(rule) for name, rule in members.items()})


def _begins_with_batch(layout: Layout, result: Result) -> bool:
    if result.like is None:
        return result.axes.startswith("batch ")
    *inside, name = result.like.split(".")
    for part in inside:
        layout = next(each.layout for each in layout.fields if each.name == part and each.layout is not None)
    kind = next(each.kind for each in layout.fields if each.name == name)
    return kind is not None and kind.axes.startswith("batch ")


def _apart(results: tuple[Tensor | None, ...], first: Tensor) -> tuple[Tensor, ...]:
    """Results as the dispatcher wants them: each whole in memory of its own, an empty one where there is none."""
    found: list[Tensor] = []
    memory = set()
    for x in results:
        if x is None:
            x = first.new_empty(0)
        elif not x.is_contiguous() or x.untyped_storage().data_ptr() in memory:
            x = x.clone(memory_format=torch.contiguous_format)
        memory.add(x.untyped_storage().data_ptr())
        found.append(x)
    return tuple(found)
