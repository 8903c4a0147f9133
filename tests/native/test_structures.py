"""Records as C structures: those of csrc/anyattention.h, of the library's sizes, and filled with what fits alone."""

import ctypes
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from anyattention.errors import InvalidInputError, UnsupportedError
from anyattention.native import calls, load
from anyattention.native.structures import Order, Pairs, Seed, Untold, layout_of, snake_case, structures
from anyattention.ops.edges.operators import _edge_dot
from anyattention.ops.operator import Operator
from anyattention.ops.runs import run_attention
from records import NAMES, as_list, kind_of, of, tensors_of, with_tensor

pytestmark = pytest.mark.usefixtures("native")

_HEADER = Path(__file__).parents[2] / "csrc" / "anyattention.h"

every_record = pytest.mark.parametrize("name", NAMES)


def header_structures() -> dict[str, list[tuple[str, str]]]:
    """The structures of csrc/anyattention.h by our names: each field's C type, pointers as "*", and name."""
    text = re.sub(r"/\*.*?\*/", "", _HEADER.read_text(), flags=re.DOTALL)
    found = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} anyattention_(\w+);", text, re.DOTALL):
        members: list[tuple[str, str]] = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"(?:const )?(\w+)\s+(.*)", declaration, re.DOTALL).groups()
            for each in (part.strip() for part in names.split(",")):
                if each.startswith("*"):
                    members.append(("*", each.lstrip("*")))
                elif "[" in each:
                    members.append((f"{kind}[{each.split('[')[1]}", each.split("[")[0]))
                else:
                    members.append((kind, each))
        found[name.removesuffix("_call")] = members
    return found


_C_NAMES = {ctypes.c_int64: "int64_t", ctypes.c_int32: "int32_t", ctypes.c_double: "double", ctypes.c_void_p: "*"}


def c_name(kind: Any) -> str:
    if issubclass(kind, ctypes.Array):
        return f"{_C_NAMES[kind._type_]}[{kind._length_}]"
    if kind in _C_NAMES:
        return _C_NAMES[kind]
    (name,) = [name for name, structure in structures.items() if structure is kind]
    return f"anyattention_{name}" + ("_call" if f"anyattention_{name}_call" in _HEADER.read_text() else "")


class TestStructures:
    def test_are_those_of_the_header(self) -> None:
        declared = header_structures()
        assert len(declared) > 15
        assert {name for name in structures if not name.startswith("toy_")} == set(declared)

    @pytest.mark.parametrize("name", sorted(name for name in structures if not name.startswith("toy_")))
    def test_have_the_headers_fields_in_its_order(self, name: str) -> None:
        ours = [(c_name(kind), field) for field, kind in structures[name]._fields_]
        assert ours == header_structures()[name]

    @pytest.mark.parametrize("name", sorted(name for name in structures if not name.startswith("toy_")))
    def test_have_the_size_that_the_library_says(self, native: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        size_of = native.library().anyattention_size_of
        assert size_of(name.encode()) == ctypes.sizeof(structures[name])
        assert size_of(f"{name}_".encode()) == -1
        # One of another size is refused when the library is loaded.
        longer = type("Longer", (structures[name],), {"_fields_": [("more", ctypes.c_int64)]})
        monkeypatch.setitem(structures, name, longer)
        found, about = native._open(None)
        assert found is None
        assert f"its {name} has another size" in about.reason

    @every_record
    def test_hold_what_the_record_holds(self, name: str) -> None:
        op, record = of(name)
        innermost = record
        while (inside := getattr(innermost, "backward", getattr(innermost, "call", None))) is not None:
            innermost = inside
        if snake_case(type(record).__name__) not in structures or len(getattr(innermost, "parts", "1")) != 1:
            return
        bound = calls.bind(record)
        assert_structure_is(bound.structure, record, bound, "")
        assert bound.structure.num_threads == load.num_threads()
        assert bound.structure.is_double == (bound.dtype is torch.float64) == (op.name != "topk_indices")


def assert_structure_is(structure: Any, record: Any, bound: Any, place: str) -> None:
    """Axes, settings and addresses of a C structure, field by field."""
    layout, hints = layout_of(type(record)), get_type_hints(type(record), include_extras=True)
    for axis in layout.axes:
        # Nothing here says the size of an axis whose tensors are absent.
        kinds = [(kind_of(record, path), x) for path, x in tensors_of(record)]
        is_said = any((x is not None or kind.default) and axis in dict(kind.names) for kind, x in kinds)
        assert getattr(structure, axis) == (bound.sizes[axis] if is_said else 0), axis
    for each in fields(record):
        value = getattr(record, each.name)
        if isinstance(value, tuple):
            if not all(map(is_dataclass, value)) or not value:
                assert not hasattr(structure, each.name)
                continue
            (value,) = value
        if is_dataclass(value):
            assert_structure_is(getattr(structure, each.name), value, bound, f"{place}{each.name}.")
            continue
        if each.name == "words" or Untold in getattr(hints[each.name], "__metadata__", ()):
            assert not hasattr(structure, each.name)
            continue
        found = getattr(structure, each.name)
        kind = next(item.kind for item in layout.fields if item.name == each.name)
        if isinstance(kind, Seed):
            assert found == (0 if value is None else int(value))
        elif kind is not None:
            address = (
                getattr(found, "data", getattr(found, "numbers", found))
                if isinstance(found, ctypes.Structure)
                else found
            )
            if value is None and kind.default is not None:
                value = getattr(record, kind.default)
            if value is None:
                assert address is None
            else:
                lying = [value, *(x for x in bound.copies if torch.equal(x, value))]
                assert (address or 0) in [x.data_ptr() for x in lying]
        elif isinstance(value, str):
            assert found == load.score_number(value)
        else:
            assert found == value


# PyTorch runs these; the sparse call without parts reads no tensor.
_UNBOUND = ("edge_spread", "fused_dense", "fused_dense_backward", "linear_map", "linear_map_by_weight")


class TestMisfits:
    """Each tensor of each record, made not to fit: no kernel sees it, and the error says what did not fit."""

    @every_record
    def test_of_dtype_rank_and_device(self, name: str) -> None:
        op, record = of(name)
        if op.name in _UNBOUND or "no parts" in name:
            return
        first = next(x for _, x in tensors_of(record) if x is not None and x.is_floating_point())
        for path, x in tensors_of(record):
            if x is None:
                continue
            other = torch.int32 if x.dtype == torch.int64 else torch.float16
            self.assert_refused(op, record, path, x.detach().to(other))
            self.assert_refused(op, record, path, x.detach()[None])
            if x is first:
                # The first numbers' device is the call's, and nobody reads what the others hold.
                results = as_list(op(with_tensor(record, path, x.detach().to("meta"))))
                assert {each.device.type for each in results if each is not None} == {"meta"}
            else:
                self.assert_refused(op, record, path, x.detach().to("meta"))

    @every_record
    def test_of_a_size(self, name: str) -> None:
        op, record = of(name)
        if op.name in _UNBOUND or "no parts" in name:
            return
        for path, x in tensors_of(record):
            if x is None or x.ndim == 0:
                continue
            for axis in range(x.ndim):
                longer = torch.cat([x.detach()] + [x.detach().narrow(axis, 0, 1)] * 2, axis) if x.shape[axis] else None
                if longer is None or not is_shared(record, path, axis):
                    continue
                self.assert_refused(op, record, path, longer, is_named=False)

    def assert_refused(
        self, op: Operator[Any], record: Any, path: str, wrong: Tensor, *, is_named: bool = True
    ) -> None:
        """Of a size the second that says it is named, and of a dtype or device the second of numbers."""
        with pytest.raises(InvalidInputError) as caught:
            op(with_tensor(record, path, wrong))
        error = caught.value
        names = [each for each, _ in tensors_of(record)]
        assert error.argument in names
        if is_named and error.argument != path:
            assert names.index(error.argument) > names.index(path), (error.argument, path)
        expected = r"expected torch\.\w+(, got .*| on cpu, \(.*\), got torch\.\w+ on \w+, \(.*\))"
        assert re.fullmatch(f"{re.escape(str(error.argument))}: {expected}", str(error)), str(error)

    def test_name_the_axes_with_their_sizes(self) -> None:
        _, record = of("edge_dot")
        with pytest.raises(
            InvalidInputError,
            match=r"^key: expected torch\.float64 on cpu, \(batch=2, num_keys=7, key_heads=\?, width=3\), "
            r"got torch\.float64 on cpu, \(2, 6, 2, 3\)$",
        ):
            _edge_dot(replace(record, key=record.key[:, :6]))
        _, record = of("run_attention: two parts")
        wrong = (record.parts[0], replace(record.parts[1], offsets=record.parts[1].offsets[:-1]))
        with pytest.raises(
            InvalidInputError,
            match=r"^parts\.offsets: expected torch\.int64 on cpu, \(num_queries=9 \+ 1\), got .*\(9,\)$",
        ):
            run_attention(replace(record, parts=wrong))

    def test_a_score_that_the_kernels_do_not_have(self) -> None:
        op, record = of("graph_attention: term, bias")
        with pytest.raises(UnsupportedError, match="the kernels have no score 'Cosine'"):
            op(replace(record, score="Cosine"))

    @pytest.mark.parametrize("mask", [(2, 1, 9, 9), (1, 4, 1, 9), (1, 1, 1, 1)])
    def test_pairs_may_be_broadcast(self, mask: tuple[int, ...]) -> None:
        op, record = of("run_attention: two parts")
        shown = torch.rand(mask) < 0.7
        ours = op(replace(record, mask=shown))
        whole = op(replace(record, mask=shown.expand(2, 4, 9, 9)))
        assert all(map(torch.equal, ours, whole))


def is_shared(record: Any, path: str, axis: int) -> bool:
    """Whether another tensor of the record says the size of this axis."""
    if isinstance(kind_of(record, path), Pairs | Order):
        return True
    name = kind_of(record, path).names[axis][0]
    others = [kind_of(record, other) for other, x in tensors_of(record) if other != path and x is not None]
    return any(name in dict(kind.names) for kind in others if not isinstance(kind, Pairs | Order))


@pytest.mark.parametrize(
    ("name", "expected"), [("GraphAttention", "graph_attention"), ("Part", "part"), ("TopkIndices", "topk_indices")]
)
def test_names_in_c(name: str, expected: str) -> None:
    assert snake_case(name) == expected
