"""An operator is a record: its schema, its way to PyTorch and back, what it keeps, returns and refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from anyattention import Graph
from anyattention.native.structures import Indices, Numbers, Part, layout_of
from anyattention.ops import records as module
from anyattention.ops.edges.arrays import GraphArrays, arrays_of
from anyattention.ops.edges.dynamic import DynamicSums
from anyattention.ops.edges.operators import EdgeDot
from anyattention.ops.graph.operators import graph_attention
from anyattention.ops.operator import Operator, Result, operator
from anyattention.ops.runs import RunAttention, RunPart
from anyattention.ops.runs.call import RunAttentionBackward
from anyattention.ops.runs.weights import RunAttentionWeights
from records import NAMES, OPERATORS, as_list, kind_of, leaf, numbers, of, records, tensors_of

pytestmark = pytest.mark.usefixtures("native")

every_record = pytest.mark.parametrize("name", NAMES)


def test_every_operator_of_the_package_is_a_record_here() -> None:
    assert sorted(records()) == sorted(NAMES)
    assert {name.split(":")[0] for name in NAMES} == set(OPERATORS)
    known = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("anyattention::")
    }
    # They take no numbers, and so are none; but for the first they are there where `interop.pyg` was imported.
    others = {"pattern_edges", "remembered_graph", "remembered_joint_graph", "nearest_pairs", "radius_pairs"}
    assert {name for name in known if not name.startswith("toy_")} - others == set(OPERATORS)


class TestSchema:
    @every_record
    def test_pytorch_finds_nothing_wrong(self, name: str, opcheck: Any) -> None:
        opcheck(*of(name))

    def test_has_the_fields_by_name(self) -> None:
        arrays = ", ".join(f"Tensor graph_{each.name}" for each in fields(GraphArrays))
        assert str(torch.ops.anyattention.edge_dot.default._schema) == (
            f"anyattention::edge_dot({arrays}, Tensor query, Tensor key) -> Tensor"
        )
        assert str(torch.ops.anyattention.graph_attention.default._schema) == (
            f"anyattention::graph_attention(float scale, float softcap, {arrays}, Tensor query, Tensor key, "
            "Tensor? value, Tensor? vector, Tensor? term, Tensor? bias, Tensor? seed, str score, bool normalize, "
            "float negative_slope, float dropout) -> (Tensor, Tensor, Tensor)"
        )

    def test_records_inside_bring_their_own_name_and_a_tuple_of_them_is_one_list(self) -> None:
        call = (
            "float call_scale, float call_softcap, Tensor call_query, Tensor call_key, Tensor call_value, "
            "Tensor? call_mask, Tensor? call_bias, Tensor? call_seed, Tensor[] call_parts, float call_dropout, "
            "bool call_is_dense, str call_words"
        )
        assert str(torch.ops.anyattention.run_attention_backward.default._schema) == (
            f"anyattention::run_attention_backward({call}, Tensor output, Tensor largest, Tensor log_sum, "
            "Tensor grad_output, Tensor? grad_log_sum, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)"
        )


def assert_same_record(one: Any, other: Any) -> None:
    """Equal settings, and the very same tensors."""
    assert type(one) is type(other)
    for each in fields(one):
        ours, theirs = getattr(one, each.name), getattr(other, each.name)
        if is_dataclass(ours):
            assert_same_record(ours, theirs)
        elif isinstance(ours, tuple) and ours and is_dataclass(ours[0]):
            assert len(ours) == len(theirs)
            for part, its in zip(ours, theirs, strict=True):
                assert_same_record(part, its)
        elif isinstance(ours, Tensor) or ours is None:
            assert ours is theirs
        else:
            assert (type(ours), ours) == (type(theirs), theirs)


class TestFlattening:
    @every_record
    def test_goes_to_the_schema_and_back(self, name: str) -> None:
        _, record = of(name)
        layout = layout_of(type(record))
        flat = module.flattened(layout, record)
        assert len(flat) == len(module.schema_of(layout, ""))
        assert_same_record(module.record_of(layout, iter(flat)), record)

    @every_record
    def test_tensors_come_out_in_order_and_go_in_again(self, name: str) -> None:
        _, record = of(name)
        layout = layout_of(type(record))
        tensors = module.tensors_of(layout, record)
        filled = module.with_tensors(layout, record, iter(tensors))
        assert_same_record(filled, record)
        # Without tensors the settings stay, and none is left over.
        empty = module.with_tensors(layout, record, iter([None] * len(tensors)))
        assert all(x is None for _, x in tensors_of(empty))
        assert_same_record(module.with_tensors(layout, empty, iter(tensors)), record)

    @pytest.mark.parametrize("count", [0, 1, 2, 3])
    def test_of_a_tuple_of_records(self, count: int) -> None:
        _, record = of("run_attention: two parts")
        parts = tuple([RunPart(*(torch.full((1,), 10 * n + k) for k in range(5))) for n in range(count)])
        record = replace(record, parts=parts)
        layout = layout_of(RunAttention)
        flat = module.flattened(layout, record)
        assert [int(x) for x in flat[8]] == [10 * n + k for n in range(count) for k in range(5)]
        assert_same_record(module.record_of(layout, iter(flat)), record)
        tensors = module.tensors_of(layout, record)
        assert len(tensors) == 6 + 5 * count
        assert_same_record(module.with_tensors(layout, record, iter(tensors)), record)

    def test_the_differentiable_fields_are_found_inside_records_too(self) -> None:
        for record, first in ((DynamicSums, "call.vector"), (RunAttentionBackward, "call.query"), (EdgeDot, "query")):
            layout = layout_of(record)
            places, arguments = module.places_of(layout)
            assert set(places) == set(arguments)
            assert first in places
            assert not any("graph" in name or "parts" in name or "seed" in name for name in places)
        for case in ("dynamic_sums: all", "run_attention_backward: two parts", "run_attention_backward: no parts"):
            record = of(case)[1]
            layout = layout_of(type(record))
            tensors, flat = module.tensors_of(layout, record), module.flattened(layout, record)
            places, arguments = module.places_of(layout)
            by_name, later = dict(tensors_of(record)), len(tensors) - module.num_tensors(layout)
            for name in places:
                place = places[name] + (later if name in module.late_names(layout) else 0)
                assert tensors[place] is by_name[name]
                assert flat[arguments[name]] is by_name[name]

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_fields_after_a_tuple_of_records_come_later_by_what_it_holds(self, count: int) -> None:
        record = of("run_attention_weights: two parts")[1]
        record = replace(record, call=replace(record.call, parts=record.call.parts[:count]))
        layout = layout_of(RunAttentionWeights)
        tensors, late, by_name = module.tensors_of(layout, record), module.late_names(layout), dict(tensors_of(record))
        assert late == {"largest", "log_sum"}
        more = len(tensors) - module.num_tensors(layout)
        for name, place in module.places_of(layout)[0].items():
            assert tensors[place + more if name in late else place] is by_name[name]


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        yield found


def storages(tensors: list[Tensor | None]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors if x is not None and x.numel()}


class TestKept:
    @pytest.mark.parametrize(
        ("name", "fields_kept", "results_kept"),
        [
            ("edge_dot", None, False),
            ("edge_sum", None, False),
            ("edge_softmax", (), True),
            ("edge_total: transposed", (), False),
            ("edge_spread", (), False),
            ("dynamic_dot: features", None, False),
            ("graph_attention: dynamic, dropout", None, True),
            ("graph_attention: value is the key", None, True),
            ("run_attention: two parts", None, True),
            ("run_attention: one part, mask, bias, dropout", None, True),
            ("distance_terms: radial", None, False),
            ("fused_dense: causal, bias", None, True),
        ],
    )
    def test_is_what_the_gradient_reads(self, name: str, fields_kept: Any, results_kept: bool) -> None:
        op, record = of(name)
        with kept() as found:
            results = op(record)
        results = list(results) if isinstance(results, tuple) else [results]
        # Arrays of indices stay with the record: nobody differentiates them.
        expected = [
            x
            for path, x in tensors_of(record)
            if (fields_kept is None or path.split(".")[0] in fields_kept)
            and not isinstance(kind_of(record, path), Indices)
        ]
        assert storages(found) == storages([*expected, *(results if results_kept else [])])
        # No gradient, no tensors kept.
        with kept() as found, torch.no_grad():
            op(record)
        assert not found

    def test_is_let_go_after_the_backward(self) -> None:
        op, record = of("edge_softmax")
        result = op(record)
        result.backward(torch.randn_like(result))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            result.backward(torch.randn_like(result))

    @pytest.mark.parametrize("through_pytorch", [False, True])
    @pytest.mark.parametrize(
        "name", ["edge_dot", "edge_total: transposed", "graph_attention: term, bias", "run_attention: two parts"]
    )
    def test_an_array_of_the_graph_must_not_be_changed_before_the_backward(
        self, name: str, through_pytorch: bool
    ) -> None:
        op, record = of(name)
        result = as_list((call_through_pytorch if through_pytorch else type(op).__call__)(op, record))[0]
        assert result is not None
        array = next(x for _, x in tensors_of(record) if x is not None and x.dtype is torch.int64 and x.numel())
        array.add_(0)
        with pytest.raises(RuntimeError, match=r"changed in place since|modified by an inplace operation"):
            result.sum().backward()

    def test_a_result_that_was_kept_must_not_be_changed(self) -> None:
        op, record = of("edge_softmax")
        result = op(record)
        result.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def call_through_pytorch(op: Operator[Any], record: Any) -> Any:
    """The call as a mode sees it."""

    class See(TorchDispatchMode):
        names: tuple[str, ...] = ()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names += (str(function),)
            return function(*args, **(kwargs or {}))

    with See() as see:
        results = op(record)
    assert f"anyattention.{op.name}.default" in see.names
    return results


class TestResults:
    @every_record
    def test_are_the_same_by_pytorchs_dispatcher(self, name: str) -> None:
        op, record = of(name)
        ours, theirs = as_list(op(record)), as_list(call_through_pytorch(op, record))
        assert len(ours) == len(op.results)
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (one.dtype == other.dtype and torch.equal(one, other))

    @every_record
    def test_have_the_shapes_and_dtypes_that_fake_ones_have(self, name: str) -> None:
        op, record = of(name)
        real = as_list(op(record))
        layout = layout_of(type(record))
        with FakeTensorMode() as mode:
            tensors = [None if x is None else mode.from_tensor(x) for x in module.tensors_of(layout, record)]
            fakes = as_list(op(module.with_tensors(layout, record, iter(tensors))))
        assert [x if x is None else (x.shape, x.dtype) for x in fakes] == [
            x if x is None else (x.shape, x.dtype) for x in real
        ]

    def test_are_absent_where_the_field_is_or_where_nobody_needs_them(self) -> None:
        present = {
            "graph_attention_backward: dynamic, dropout": "yyyynn",
            "graph_attention_backward: term, bias": "yyynyy",
            "graph_attention_backward: value is the key": "yynnnn",
            "run_attention_backward: two parts": "yyyn",
            "run_attention_backward: one part, mask, bias, dropout": "yyyy",
            "run_attention_double_backward: two parts": "yynynn",
            "run_attention_double_backward: one part, mask, bias, dropout": "yynnyy",
            "dynamic_sums: all": "yyyyy",
            "dynamic_sums: some": "nyynn",
            "distance_terms_backward": "yyy",
            "distance_terms_backward: some": "nyn",
        }
        for name, expected in present.items():
            op, record = of(name)
            for results in (op(record), call_through_pytorch(op, record)):
                assert "".join("n" if x is None else "y" for x in results) == expected, name

    def test_share_no_memory_for_the_dispatcher(self) -> None:
        # In eager calls gradients of columns are columns of one matrix.
        op, record = of("graph_attention_backward: term, bias")
        whole = numbers(2, 5, 3 * 6 * 3)
        graph = arrays_of(Graph.from_edge_index(torch.randint(5, (2, 23)), num_nodes=5))
        columns = [x.unflatten(-1, (6, 3)) for x in whole.split(18, dim=-1)]
        call = replace(record.call, graph=graph, **dict(zip(("query", "key", "value"), columns, strict=True)))
        output, largest, log_sum = graph_attention(call)
        record = replace(
            record,
            call=call,
            output=output,
            largest=largest,
            log_sum=log_sum,
            grad_output=torch.randn_like(output),
            grad_log_sum=None,
        )
        ours, theirs = op(record), call_through_pytorch(op, record)
        assert len(storages(list(ours[:3]))) == 1
        assert len(storages(list(theirs))) == len([x for x in theirs if x is not None])
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)

    @pytest.mark.parametrize(
        "name",
        [name for name in NAMES if OPERATORS[name.split(":")[0]]._gradient is not None and "no parts" not in name],
    )
    def test_without_a_gradient_give_none(self, name: str) -> None:
        op, record = of(name)
        leaves = [x for _, x in tensors_of(record) if x is not None and x.requires_grad]
        assert leaves
        undefined = [torch._C._functions.UndefinedGrad()(x) for x in as_list(op(record)) if x is not None]
        by = [torch.randn_like(x) for x in undefined]
        assert torch.autograd.grad(undefined, leaves, by, allow_unused=True) == (None,) * len(leaves)

    def test_one_that_nobody_used_has_no_gradient(self) -> None:
        for name, used in product(
            ("graph_attention: term, bias", "run_attention: one part, mask, bias, dropout", "fused_dense: plain"),
            (0, -1),
        ):
            op, record = of(name)
            leaves = [x for _, x in tensors_of(record) if x is not None and x.requires_grad]
            results = op(record)
            by = [torch.zeros_like(x) for x in results]
            by[used] = torch.randn_like(results[used])
            alone = torch.autograd.grad(results[used], leaves, by[used], retain_graph=True, materialize_grads=True)
            torch.testing.assert_close(alone, torch.autograd.grad(results, leaves, by), rtol=1e-12, atol=1e-12)


class TestRefusals:
    """What has no rule says so."""

    @pytest.mark.parametrize(
        "name",
        ["graph_attention: term, bias", "run_attention: two parts", "distance_terms: radial", "fused_dense: plain"],
    )
    def test_of_forward_derivatives(self, name: str) -> None:
        op, record = of(name)
        layout = layout_of(type(record))
        with forward_ad.dual_level():
            tensors = [
                forward_ad.make_dual(x, torch.randn_like(x)) if x is not None and x.requires_grad else x
                for x in module.tensors_of(layout, record)
            ]
            duals = module.with_tensors(layout, record, iter(tensors))
            with pytest.raises(NotImplementedError, match=f"anyattention::{op.name} has no forward derivative"):
                op(duals)

    @pytest.mark.parametrize("name", ["edge_argmax", "topk_indices", "graph_attention_weights: term, bias"])
    def test_of_any_derivative(self, name: str) -> None:
        op, record = of(name)
        for _, x in tensors_of(record):
            if x is not None and x.is_floating_point():
                x.requires_grad_()
        assert not any(x.requires_grad for x in as_list(op(record)) if x is not None)

    def test_of_a_device_without_a_kernel(self) -> None:
        op, record = of("graph_attention: value is the key")
        layout = layout_of(type(record))
        tensors = [None if x is None else x.to("meta") for x in module.tensors_of(layout, record)]
        # The meta device has the shapes alone.
        output, *rows = op(module.with_tensors(layout, record, iter(tensors)))
        assert (output.shape, [x.shape for x in rows], output.device.type) == ((2, 5, 6, 3), [(2, 5, 6)] * 2, "meta")


@dataclass(frozen=True, eq=False)
class ToyPart(Part):
    """A record inside."""

    places: Annotated[Tensor, Indices("rows")]
    shift: Annotated[Tensor | None, Numbers("width")]


@dataclass(frozen=True, eq=False)
class ToyInside:
    """Another, which has an optional record's worth of settings."""

    x: Annotated[Tensor, Numbers("batch rows width")]
    part: ToyPart
    power: int
    name: str


@dataclass(frozen=True, eq=False)
class ToyScale:
    """`scale x[places]`, with a default for an absent tensor, and results that may be absent."""

    inside: ToyInside
    y: Annotated[Tensor | None, Numbers("batch rows width", default="inside")]
    scale: float
    needed: tuple[bool, ...]


def _toy_gradient(call: ToyScale, _: Any, by: Any, needs: frozenset[str]) -> dict[str, Tensor]:
    assert needs <= {"inside.x", "inside.part.shift", "y"}
    place = call.inside.part.places
    return {"inside.x": call.scale * torch.zeros_like(call.inside.x).index_add(1, place, by[0])}


@pytest.fixture(scope="module")
def toy() -> Operator[Any]:
    """An operator with records two deep, and a kernel in PyTorch."""
    made = operator(
        ToyScale,
        [Result("moved", like="inside.x"), Result("total", "batch width power", is_sum=True)],
        gradient=_toy_gradient,
    )

    @made.kernel("cpu")
    def run(call: ToyScale) -> tuple[Tensor | None, ...]:
        moved = call.scale * call.inside.x[:, call.inside.part.places]
        total = moved.sum(1)[..., None].expand(-1, -1, call.inside.power).contiguous() if call.needed[1] else None
        return moved, total

    return made


class TestToy:
    """A record two deep: nothing of a record is known to the operator but its fields."""

    def record(self, **changes: Any) -> ToyScale:
        part = ToyPart(torch.tensor([2, 0, 1]), None)
        inside = ToyInside(leaf(2, 3, 4), part, 5, "a name")
        return replace(ToyScale(inside, None, 0.5, (True, True)), **changes)

    def test_schema(self, toy: Operator[Any]) -> None:
        assert str(torch.ops.anyattention.toy_scale.default._schema) == (
            "anyattention::toy_scale(Tensor inside_x, Tensor inside_part_places, Tensor? inside_part_shift, "
            "SymInt inside_power, str inside_name, Tensor? y, float scale, bool[] needed) -> (Tensor, Tensor)"
        )

    def test_calls_and_gradients(self, toy: Operator[Any], opcheck: Any) -> None:
        record = self.record()
        x, places = record.inside.x, record.inside.part.places
        for moved, total in (toy(record), call_through_pytorch(toy, record)):
            torch.testing.assert_close(moved, 0.5 * x[:, places])
            assert total.shape == (2, 4, 5)
            (found,) = torch.autograd.grad(moved, x, torch.ones_like(moved))
            torch.testing.assert_close(found, torch.full_like(x, 0.5))

    def test_absent_results(self, toy: Operator[Any]) -> None:
        record = self.record(needed=(True, False))
        assert toy(record)[1] is None
        assert call_through_pytorch(toy, record)[1] is None
