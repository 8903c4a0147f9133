"""The checks that every operation shares."""

import contextlib

import pytest
import torch

from anyattention import _checks, ambient, attend
from anyattention._checks import (
    Axes,
    allocation_failures_named,
    require_floating,
    require_mask,
    require_memory,
    require_number,
    require_same_kind,
    require_tensor,
    to_four_axes,
)
from anyattention.errors import (
    DimensionMismatchError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    OutOfMemoryError,
)


def test_axes_bind_sizes_at_first_sight():
    axes = Axes()
    axes.bind("query", torch.ones(2, 3, 5), "batch length width")
    axes.bind("key", torch.ones(2, 7, 5), "batch keys width")
    assert axes.sizes == {"batch": 2, "length": 3, "width": 5, "keys": 7}


def test_axes_say_who_named_a_size():
    axes = Axes()
    axes.bind("query", torch.ones(2, 3), "batch length")
    with pytest.raises(DimensionMismatchError, match=r"^key: expected \(batch=2, keys\), got \(5, 7\)\. ") as caught:
        axes.bind("key", torch.ones(5, 7), "batch keys")
    assert str(caught.value).endswith("batch is 2 in query")
    axes.set("nodes", 11, "the graph")
    with pytest.raises(DimensionMismatchError, match=r"expected \(nodes=11\), got \(13,\)\. nodes is 11 in the graph"):
        axes.bind("x", torch.ones(13), "nodes")


def test_axes_check_the_rank_and_bind_nothing_then():
    axes = Axes()
    with pytest.raises(DimensionMismatchError, match=r"^x: expected \(rows, columns\), got \(3,\)$"):
        axes.bind("x", torch.ones(3), "rows columns")
    assert axes.sizes == {}


def test_axes_hold_one_name_to_one_size_within_a_tensor():
    axes = Axes()
    axes.bind("square", torch.ones(3, 3), "side side")
    with pytest.raises(DimensionMismatchError, match=r"^other: expected \(edge=2, edge=2\), got \(2, 5\)"):
        axes.bind("other", torch.ones(2, 5), "edge edge")


def test_axes_know_size_zero():
    axes = Axes()
    axes.bind("x", torch.ones(0, 3), "rows columns")
    with pytest.raises(DimensionMismatchError, match=r"expected \(rows=0, columns=3\), got \(1, 3\)"):
        axes.bind("y", torch.ones(1, 3), "rows columns")


_SIZES = {"batch": 2, "heads": 3, "query_length": 5, "key_length": 7}


@pytest.mark.parametrize(
    ("given", "viewed"),
    [
        ((7,), (1, 1, 1, 7)),
        ((1,), (1, 1, 1, 1)),
        ((5, 7), (1, 1, 5, 7)),
        ((5, 1), (1, 1, 5, 1)),
        ((1, 7), (1, 1, 1, 7)),
        ((2, 3, 5, 7), (2, 3, 5, 7)),
        ((2, 1, 1, 7), (2, 1, 1, 7)),
        ((1, 3, 5, 1), (1, 3, 5, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_masks_and_biases_are_viewed_with_four_axes(given, viewed, dtype):
    tensor = torch.rand(given).gt(0.5).to(dtype)
    four = to_four_axes("mask", tensor, **_SIZES)
    assert four.shape == viewed
    assert torch.equal(four.expand(2, 3, 5, 7), tensor.expand(2, 3, 5, 7))


@pytest.mark.parametrize("shape", [(), (5,), (7, 5), (2, 7), (3, 2, 5, 7), (2, 3, 5, 0), (1, 2, 3, 5, 7)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bool, InvalidMaskError), (torch.float32, DimensionMismatchError)])
def test_other_shapes_are_refused(shape, dtype, error):
    sizes = r"\(batch=2, heads=3, query_length=5, key_length=7\)"
    with pytest.raises(error, match=f"^bias: expected a shape that broadcasts to {sizes}, got \\("):
        to_four_axes("bias", torch.zeros(shape, dtype=dtype), **_SIZES)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bool, InvalidMaskError), (torch.float32, DimensionMismatchError)])
def test_rank_three_is_ambiguous(dtype, error):
    with pytest.raises(
        error, match=r"^m: expected rank 1, 2 or 4, got rank 3, \(2, 5, 7\)\. .*m\[:, None\].*m\[None\]"
    ):
        to_four_axes("m", torch.zeros(2, 5, 7, dtype=dtype), **_SIZES)


@pytest.mark.parametrize("value", [0, -3, 2.5, 1e308, -1e308, 5e-324, 10**300])
def test_finite_numbers_pass(value):
    require_number("scale", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, True, "1", None, [1.0], 1j])
def test_other_things_are_no_number(value):
    with pytest.raises(InvalidInputError, match=r"^scale: expected a finite number, got "):
        require_number("scale", value)


def test_a_tensor_is_no_number():
    with pytest.raises(InvalidInputError, match=r"^scale: expected a finite number, got tensor\(1\.\)"):
        require_number("scale", torch.tensor(1.0))


@pytest.mark.parametrize(
    ("bounds", "passing", "refused", "text"),
    [
        ({"above": 0.0}, (5e-324, 3), (0, 0.0, -1), "a finite number above 0"),
        ({"at_least": 0.0}, (0, 5e-324), (-5e-324, -1), "a finite number at least 0"),
        ({"below": 1.0}, (-5, 1 - 2**-53), (1, 1.5), "a finite number below 1"),
        ({"at_least": 0.0, "below": 1.0}, (0, 0.5), (-0.5, 1.0), "a finite number at least 0 and below 1"),
    ],
)
def test_bounds(bounds, passing, refused, text):
    for value in passing:
        require_number("dropout", value, **bounds)
    for value in refused:
        with pytest.raises(InvalidConfigError, match=f"^dropout: expected {text}, got {value}$"):
            require_number("dropout", value, error=InvalidConfigError, **bounds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_attention_dtypes_pass(dtype):
    require_floating("x", torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(
        InvalidInputError, match=f"^x: expected a floating-point dtype of 16, 32 or 64 bits, got {dtype}"
    ):
        require_floating("x", torch.ones(2).to(dtype))


def test_kind_is_dtype_device_and_layout():
    x = torch.ones(2, 2)
    require_same_kind("y", torch.zeros(5), "x", x)
    for other, text in [
        (x.double(), r"torch\.float32, as x, got torch\.float64"),
        (x.to("meta"), "device cpu, as x, got meta"),
        (x.to_sparse(), r"a dense tensor, got torch\.sparse_coo"),
        ([1.0], r"a torch\.Tensor, got list"),
    ]:
        with pytest.raises(InvalidInputError, match=f"^y: expected {text}$"):
            require_same_kind("y", other, "x", x)


def test_ragged_tensors_have_no_shape():
    ragged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(5, 3)], layout=torch.jagged)
    with pytest.raises(InvalidInputError, match=r"^x: expected .* one shape, got a nested .*pad it, and hide"):
        require_tensor("x", ragged)


def test_masks_are_boolean():
    require_mask("mask", torch.ones(2, dtype=torch.bool))
    for mask, got in [(torch.ones(2), r"torch\.float32"), (torch.ones(2).int(), r"torch\.int32"), ([True], "list")]:
        with pytest.raises(InvalidMaskError, match=f"^mask: .*'may attend', got {got}.*anyattention.mask_from_blocked"):
            require_mask("mask", mask)


def test_meta_tensors_have_no_autocast():
    with torch.autocast("cpu"):
        assert ambient.is_autocast_enabled(_CPU)
        assert not ambient.is_autocast_enabled(torch.device("meta"))
    assert not ambient.is_autocast_enabled(_CPU)
    x = torch.empty(2, 5, 3, 7, device="meta")
    assert attend(x, x[:, :2], x[:, :2, :, :3]).output.shape == (2, 5, 3, 3)


_CPU = torch.device("cpu")


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(_checks, "_free_memory", lambda device: 2**33)
    require_memory(2**33, "the scores", _CPU)
    with pytest.raises(
        OutOfMemoryError, match=r"^the scores would take 12\.00 GiB; 8\.00 GiB are free on cpu"
    ) as caught:
        require_memory(12 * 2**30, "the scores", _CPU)
    assert caught.value.size == 12 * 2**30


def test_unknown_memory_and_small_requests_pass(monkeypatch):
    monkeypatch.setattr(_checks, "_free_memory", lambda device: None)
    require_memory(2**60, "the scores", _CPU)
    monkeypatch.setattr(_checks, "_free_memory", lambda device: 0)
    require_memory(2**26 - 1, "the scores", _CPU)
    with pytest.raises(OutOfMemoryError, match=r"0.06 GiB; 0.00 GiB are free"):
        require_memory(2**26, "the scores", _CPU)


def test_free_memory_is_read_from_the_system():
    free = _checks._free_memory(_CPU)
    assert free is None or 2**20 < free < 2**50
    assert _checks._free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("failure", "size"),
    [
        (MemoryError(), None),
        (torch.OutOfMemoryError("CUDA out of memory"), None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), 4096),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."), 4096),
    ],
)
def test_allocator_failures_get_a_name(failure, size):
    with pytest.raises(OutOfMemoryError, match=r"^memory ran out") as caught, allocation_failures_named():
        raise failure
    assert caught.value.size == size
    assert caught.value.__cause__ is failure


@pytest.mark.parametrize(
    "failure", [RuntimeError("shape"), ValueError("memory"), OutOfMemoryError("ours", size=3), KeyboardInterrupt()]
)
def test_other_failures_pass_unchanged(failure):
    caught = None
    with contextlib.suppress(type(failure)):
        try:
            with allocation_failures_named():
                raise failure
        except BaseException as passed:
            caught = passed
            raise
    assert caught is failure
