"""An operator is a record: a frozen dataclass whose typed fields are its inputs.

From the fields come, by name, PyTorch's schema, packing and unpacking, the saved tensors, the results' shapes, the rules of
torch.func and the C structure. A kernel is a function of the record, registered for a device. The rule of the gradient is
written once and bound twice: as an `autograd.Function` for eager calls, which torch.func and forward-mode derivatives
know, and by `torch.library.register_autograd` for compilers and modes, which see operators of PyTorch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from anyattention import ambient
from anyattention.ambient import Moment
from anyattention.native import calls
from anyattention.native.structures import Kind, Layout, Order, Pairs, layout_of, snake_case

__all__ = ["Operator", "Result", "operator"]

Record = TypeVar("Record")

_library = torch.library.Library("anyattention", "FRAGMENT")
_SCHEMA = {float: "float", bool: "bool", int: "SymInt", str: "str"}


@dataclass(frozen=True)
class Result:
    """One tensor that an operator returns.

    Attributes:
        name: the name.
        axes: its axes, such as "batch num_queries heads", in the dtype of the first numbers among the fields.
        like: instead, a field whose shape it has; no result where that is None.
        dtype: another dtype.
        is_sum: at least float32.
    """

    name: str
    axes: str = ""
    like: str | None = None
    dtype: torch.dtype | None = None
    is_sum: bool = False


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
        self._keeps = None if keeps is None else _kept_flags(self._layout, keeps)
        self._keeps_results = keeps_results
        self._kernels: dict[str, Callable[[Any], Any]] = {}
        # Where each differentiable field stands among the tensors, and among the schema's arguments.
        self._places, self._arguments = _places_of(self._layout)
        # Whether each result has a batch axis, first.
        self._batched = [_begins_with_batch(self._layout, result) for result in results]
        returned = ", ".join(["Tensor"] * len(results))
        schema = ", ".join(_schema(self._layout, ""))
        _library.define(f"{self.name}({schema}) -> {returned if len(results) == 1 else f'({returned})'}")
        torch.library.register_fake(f"anyattention::{self.name}", self._fake, lib=_library)
        self._dispatched = getattr(torch.ops.anyattention, self.name).default
        self._function: Any = _function_of(self)
        # Function.apply binds defaults of the signature first, which takes longer than a small kernel.
        self._apply = super(torch.autograd.Function, self._function).apply
        if gradient is not None:
            torch.library.register_autograd(
                f"anyattention::{self.name}", self._dispatched_backward, setup_context=self._setup, lib=_library
            )

    def __call__(self, record: Record) -> Any:
        """The results: a tensor, or a tuple of them, None for those that the record does not ask for."""
        tensors = _tensors_of(self._layout, record)
        moment = ambient.moment_of(tensors)
        if moment is Moment.PLAIN:
            if self._gradient is not None and torch.is_grad_enabled():
                for x in tensors:
                    if x is not None and x.requires_grad:
                        return self._apply(moment, record, *tensors)
            return self._run(record, tensors)
        if moment is not Moment.DISPATCHED:
            return self._function.apply(moment, record, *tensors)
        found = self._dispatched(*_flattened(self._layout, record))
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
                record = _record_of(self._layout, iter(arguments))
                found = function(record)
                return _apart(found, _numbers_of(self._layout, record)) if isinstance(found, tuple) else found

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
                calls.run(name, bound, *results)
            return results[0] if len(results) == 1 else tuple(results)

    def allocate(self, record: Record, bound: calls.Bound) -> list[Tensor | None]:
        """Uninitialised results on the CPU; None for those that the record does not ask for."""
        results: list[Tensor | None] = []
        for n, result in enumerate(self.results):
            if not self._is_there(n, record):
                results.append(None)
                continue
            like = None if result.like is None else bound.tensors[result.like]
            shape = like.shape if like is not None else _shape(result, record, bound.sizes)
            results.append(torch.empty(shape, dtype=result.dtype or bound.dtype, device="cpu"))
        return results

    def _run(self, record: Record, tensors: Sequence[Tensor | None]) -> Any:
        """The kernel of the numbers' device, or the dispatcher's answer where there is none."""
        numbers = map(tensors.__getitem__, self._places.values())
        device = next(x.device.type for x in numbers if x is not None)
        kernel = self._kernels.get(device)
        return self._dispatched(*_flattened(self._layout, record)) if kernel is None else kernel(record)

    def _is_there(self, n: int, record: Any) -> bool:
        needed = getattr(record, "needed", None)
        if needed is not None and not needed[n]:
            return False
        like = self.results[n].like
        return like is None or _at(record, like) is not None

    def _fake(self, *arguments: Any) -> Any:
        record = _record_of(self._layout, iter(arguments))
        first = _numbers_of(self._layout, record)
        sizes: dict[str, Any] = {}
        _take_sizes(self._layout, record, sizes)
        made = []
        for n, result in enumerate(self.results):
            dtype = torch.promote_types(first.dtype, torch.float32) if result.is_sum else result.dtype
            if not self._is_there(n, record):
                shape: Any = 0
            elif result.like is not None:
                shape = _at(record, result.like).shape
            else:
                shape = _shape(result, record, sizes)
            made.append(first.new_empty(shape, dtype=dtype))
        return made[0] if len(made) == 1 else tuple(made)

    # The one rule of the gradient, and its two bindings.

    def _save(self, ctx: Any, record: Any, tensors: Sequence[Tensor | None], output: Any, forward: bool) -> None:
        results = output if isinstance(output, tuple) else (output,)
        if self._gradient is None:
            ctx.mark_non_differentiable(*[x for x in results if isinstance(x, Tensor)])
            return
        # Zeros for a result that nobody used would cost as much as a gradient.
        ctx.set_materialize_grads(False)
        ctx.template = _filled(self._layout, record, repeat(None))
        if forward:
            ctx.save_for_forward(*tensors, *results)
        if self._keeps is not None:
            tensors = [x if kept else None for x, kept in zip(tensors, self._keeps, strict=True)]
        ctx.save_for_backward(*tensors, *(results if self._keeps_results else ()))

    def _gradients(self, ctx: Any, needs: Sequence[str], by: Sequence[Tensor | None]) -> Mapping[str, Tensor | None]:
        """What the rule answers, for the fields that need it."""
        assert self._gradient is not None
        if all([x is None for x in by]):
            return dict.fromkeys(needs)
        saved = ctx.saved_tensors
        results = saved[len(saved) - len(self.results) :] if self._keeps_results else ()
        found = self._gradient(_filled(self._layout, ctx.template, iter(saved)), results, by, frozenset(needs))
        return {name: found.get(name) for name in needs}

    def _setup(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        record = _record_of(self._layout, iter(inputs))
        self._save(ctx, record, _tensors_of(self._layout, record), output, False)

    def _dispatched_backward(self, ctx: Any, *by: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        found = self._gradients(ctx, [name for name, place in self._arguments.items() if needs[place]], by)
        given: list[Any] = [[None] * len(each) if isinstance(each, list | tuple) else None for each in needs]
        for name, gradient in found.items():
            given[self._arguments[name]] = gradient
        return tuple(given)

    def _tangents(self, record: Any, results: Sequence[Tensor], by: Mapping[str, Tensor]) -> Any:
        if self._tangent is not None:
            return self._tangent(record, results, by)
        if not self._linear_in:
            raise NotImplementedError(f"anyattention::{self.name} has no forward derivative")
        parts = [self(replace(record, **{name: x})) for name, x in by.items() if name in self._linear_in]
        return sum(parts[1:], parts[0])


def _function_of(op: Operator[Any]) -> Any:
    """The operator's `autograd.Function`: of the moment of the call, the record, and its tensors."""

    def forward(moment: Moment, record: Any, *tensors: Tensor | None) -> Any:
        if moment is not Moment.TRANSFORMED:
            return op._run(record, tensors)
        # A transform has taken off one of its wrappers: whether others are left, the next call sees.
        return op(_filled(op._layout, record, iter(tensors)))

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        moment, record, *tensors = inputs
        op._save(ctx, record, tensors, output, moment is not Moment.PLAIN)

    def backward(ctx: Any, *by: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        found = op._gradients(ctx, [name for name, place in op._places.items() if needs[2 + place]], by)
        given: list[Any] = [None] * len(needs)
        for name, gradient in found.items():
            given[2 + op._places[name]] = gradient
        return tuple(given)

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        by = {name: tangents[2 + place] for name, place in op._places.items() if tangents[2 + place] is not None}
        with ambient.without_tangents(ctx.saved_tensors) as saved:
            record = _filled(op._layout, ctx.template, iter(saved))
            return op._tangents(record, saved[len(saved) - len(op.results) :], by)  # pyright: ignore[reportArgumentType]

    def vmap(info: Any, in_dims: Sequence[Any], _: Moment, record: Any, *tensors: Tensor | None) -> Any:
        mapped = [
            x if x is None or dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        is_mapped = [dim is not None for dim in in_dims[2:]]
        kinds = _kinds_of(op._layout, record)
        axes = [kind.names[0][0] if kind.names and not isinstance(kind, Pairs) else "" for kind in kinds]
        if all(op._batched) and all(axis == "batch" for axis, one in zip(axes, is_mapped, strict=True) if one):
            folded = [
                x
                if x is None or axis != "batch"
                else (x if is_one else x.expand(info.batch_size, *x.shape)).flatten(0, 1)
                for x, axis, is_one in zip(mapped, axes, is_mapped, strict=True)
            ]
            found = op(_filled(op._layout, record, iter(folded)))
            results = found if isinstance(found, tuple) else (found,)
            results = tuple([None if x is None else x.unflatten(0, (info.batch_size, -1)) for x in results])
        else:
            each = []
            for n in range(info.batch_size):
                some = [x[n] if is_one and x is not None else x for x, is_one in zip(mapped, is_mapped, strict=True)]
                found = op(_filled(op._layout, record, iter(some)))
                each.append(found if isinstance(found, tuple) else (found,))
            results = tuple([None if x[0] is None else torch.stack(x) for x in zip(*each, strict=True)])
        dims = tuple([None if x is None else 0 for x in results])
        return (results[0], dims[0]) if len(results) == 1 else (results, dims)

    members = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp, "vmap": vmap}
    return type(op.name, (torch.autograd.Function,), {name: staticmethod(rule) for name, rule in members.items()})


# Records and their parts. A tuple of records inside is one list of tensors for the schema.


def _schema(layout: Layout, prefix: str) -> list[str]:
    """The arguments of the schema."""
    found: list[str] = []
    for each in layout.fields:
        name = prefix + each.name
        if each.is_many:
            found.append(f"Tensor[] {name}")
        elif each.layout is not None:
            found += _schema(each.layout, f"{name}_")
        elif each.kind is not None:
            found.append(f"Tensor{'?' if each.optional else ''} {name}")
        else:
            found.append(f"bool[] {name}" if each.is_tuple else f"{_SCHEMA[each.type]} {name}")
    return found


def _places_of(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Where each field of numbers stands among the tensors of a record, and among the schema's arguments."""
    places: dict[str, int] = {}
    arguments: dict[str, int] = {}
    tensors = given = 0
    for each in layout.fields:
        if each.is_many:
            given += 1
        elif each.layout is not None:
            for own, found, first in zip((places, arguments), _places_of(each.layout), (tensors, given), strict=True):
                own.update({f"{each.name}.{name}": first + place for name, place in found.items()})
            tensors += _num_tensors(each.layout)
            given += len(_schema(each.layout, ""))
        else:
            if each.kind is not None and each.kind.dtype is None:
                places[each.name], arguments[each.name] = tensors, given
            tensors += each.kind is not None
            given += 1
    return places, arguments


def _num_tensors(layout: Layout) -> int:
    """How many tensors a record has; one without tuples of records."""
    return sum(
        1 if each.kind is not None else _num_tensors(each.layout) if each.layout else 0 for each in layout.fields
    )


def _tensors_of(layout: Layout, record: Any) -> list[Tensor | None]:
    """The tensors of a record, in order, absent ones too."""
    found: list[Tensor | None] = []
    for each in layout.fields:
        if each.kind is not None:
            found.append(getattr(record, each.name))
        elif each.layout is not None:
            value = getattr(record, each.name)
            for part in value if each.is_many else (value,):
                found += _tensors_of(each.layout, part)
    return found


def _kept_flags(layout: Layout, keeps: Sequence[str]) -> list[bool]:
    """Which of a record's tensors are kept; a record without tuples of records."""
    counts = [1 if each.kind is not None else _num_tensors(each.layout) if each.layout else 0 for each in layout.fields]
    return [each.name in keeps for each, count in zip(layout.fields, counts, strict=True) for _ in range(count)]


def _flattened(layout: Layout, record: Any) -> list[Any]:
    """The schema's arguments."""
    found: list[Any] = []
    for each in layout.fields:
        value = getattr(record, each.name)
        if each.is_many:
            assert each.layout is not None
            found.append([x for part in value for x in _tensors_of(each.layout, part)])
        elif each.layout is not None:
            found += _flattened(each.layout, value)
        else:
            found.append(list(value) if each.is_tuple else value)
    return found


def _record_of(layout: Layout, arguments: Iterator[Any]) -> Any:
    """The record of the schema's arguments."""
    values = {}
    for each in layout.fields:
        if each.is_many:
            assert each.layout is not None
            tensors, size = next(arguments), len(each.layout.fields)
            parts = [tensors[first : first + size] for first in range(0, len(tensors), size)]
            values[each.name] = tuple([each.layout.record(*part) for part in parts])
        elif each.layout is not None:
            values[each.name] = _record_of(each.layout, arguments)
        else:
            value = next(arguments)
            values[each.name] = tuple(value) if each.is_tuple else value
    return layout.record(**values)


def _filled(layout: Layout, template: Any, tensors: Iterator[Tensor | None]) -> Any:
    """A record with the template's settings, and tensors in order."""
    made = object.__new__(layout.record)
    values = made.__dict__
    for each in layout.fields:
        if each.kind is not None:
            values[each.name] = next(tensors)
        elif each.layout is None:
            values[each.name] = getattr(template, each.name)
        elif each.is_many:
            values[each.name] = tuple([_filled(each.layout, part, tensors) for part in getattr(template, each.name)])
        else:
            values[each.name] = _filled(each.layout, getattr(template, each.name), tensors)
    return made


def _kinds_of(layout: Layout, record: Any) -> list[Kind]:
    """What each of a record's tensors is."""
    found: list[Kind] = []
    for each in layout.fields:
        if each.kind is not None:
            found.append(each.kind)
        elif each.layout is not None:
            value = getattr(record, each.name)
            for part in value if each.is_many else (value,):
                found += _kinds_of(each.layout, part)
    return found


def _shape(result: Result, record: Any, sizes: Mapping[str, Any]) -> list[Any]:
    """The sizes of a result's axes; an axis may be a setting of the record."""
    return [sizes[axis] if axis in sizes else getattr(record, axis) for axis in result.axes.split()]


def _at(record: Any, path: str) -> Any:
    """The field of a dotted path."""
    for name in path.split("."):
        record = getattr(record, name)
    return record


def _numbers_of(layout: Layout, record: Any) -> Tensor:
    """The first tensor of numbers."""
    kinds = _kinds_of(layout, record)
    tensors = zip(kinds, _tensors_of(layout, record), strict=True)
    return next(x for kind, x in tensors if x is not None and kind.dtype is None)


def _take_sizes(layout: Layout, record: Any, sizes: dict[str, Any]) -> None:
    """The sizes of a record's axes, from its tensors."""
    for each in layout.fields:
        value = getattr(record, each.name)
        if each.layout is not None:
            for part in value if each.is_many else (value,):
                _take_sizes(each.layout, part, sizes)
        elif each.kind is not None and not isinstance(each.kind, Pairs | Order):
            value = getattr(record, each.kind.default) if value is None and each.kind.default else value
            if value is not None:
                for size, (axis, more) in zip(value.shape, each.kind.names, strict=True):
                    sizes.setdefault(axis, size - more if more else size)


def _begins_with_batch(layout: Layout, result: Result) -> bool:
    if result.like is None:
        return result.axes.startswith("batch ")
    *inside, name = result.like.split(".")
    for part in inside:
        layout = next(each.layout for each in layout.fields if each.name == part and each.layout is not None)
    kind = next(each.kind for each in layout.fields if each.name == name)
    return kind is not None and kind.axes.startswith("batch ")


def _apart(results: tuple[Tensor | None, ...], first: Tensor) -> tuple[Tensor, ...]:
    """Results as the dispatcher wants them: each with memory of its own, an empty one where there is none."""
    found: list[Tensor] = []
    memory = set()
    for x in results:
        if x is None:
            x = first.new_empty(0)
        elif x.untyped_storage().data_ptr() in memory:
            x = x.clone(memory_format=torch.contiguous_format)
        memory.add(x.untyped_storage().data_ptr())
        found.append(x)
    return tuple(found)
