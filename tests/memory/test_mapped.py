"""Attention over a file against dense attention, and files that are broken, cut short or written half."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.memory import ExactIndex, MappedMemory, attend_file, mapped, write_memory

_MEASURES = ("dot", "cosine", "euclidean")


def _numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.safetensors"


def _written(path, keys, values, part=100):
    write_memory(path, zip(keys.split(part), values.split(part), strict=True))
    return path


def _scores(query, keys, measure):
    """By the definition, in the query's dtype."""
    keys = keys.to(query.dtype)
    if measure == "euclidean":
        return -(query.unsqueeze(-2) - keys).square().sum(-1)
    if measure == "cosine":
        query, keys = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300) for x in (query, keys))
    return query @ keys.T


def _expected(query, keys, values, measure="dot", scale=None, k=None):
    """Output, logsumexp, weights and rows."""
    scale = (query.shape[-1] ** -0.5 if measure == "dot" else 1.0) if scale is None else scale
    scores = _scores(query, keys, measure) * scale
    rows = torch.arange(len(keys)).expand(scores.shape)
    if k is not None:
        rows = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        scores = scores.gather(-1, rows)
    weights = scores.softmax(-1)
    output = (weights.unsqueeze(-1) * values.to(query.dtype)[rows]).sum(-2)
    return output, scores.logsumexp(-1), weights, rows


@pytest.mark.parametrize("measure", _MEASURES)
@pytest.mark.parametrize("k", [None, 1, 7])
@pytest.mark.parametrize("part_size", [1, 64, 100, 5000])
def test_a_file_is_attended_as_dense_keys_are(path, measure, k, part_size):
    keys, values = _numbers(257, 11), _numbers(257, 5, seed=1)
    query = _numbers(2, 3, 11, seed=2, dtype=torch.float64).requires_grad_()
    found = attend_file(query, _written(path, keys, values), k=k, measure=measure, part_size=part_size)
    output, logsumexp, weights, rows = _expected(query, keys, values, measure, k=k)
    torch.testing.assert_close(found.output, output)
    torch.testing.assert_close(found.logsumexp, logsumexp)
    torch.testing.assert_close(sum(found.normalizer), logsumexp)
    ours, theirs = [found.output, found.logsumexp], [output, logsumexp]
    if k is None:
        assert (found.weights, found.indices) == (None, None)
    else:
        assert torch.equal(found.indices, rows)
        torch.testing.assert_close(found.weights, weights)
        ours.append(found.weights)
        theirs.append(weights)
    cotangents = [_numbers(*x.shape, seed=n, dtype=torch.float64) for n, x in enumerate(ours)]
    (grad,) = torch.autograd.grad(ours, query, cotangents)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, query, cotangents)[0])


@pytest.mark.parametrize("count", [1, 8, 9, 70])
def test_parts_of_many_rows_for_few_queries_and_many(path, count):
    keys, values = _numbers(5003, 64), _numbers(5003, 64, seed=1)
    query = _numbers(count, 64, seed=2).requires_grad_()
    found = attend_file(query, _written(path, keys, values), part_size=2000)
    exact = query.detach().double().requires_grad_()
    output, logsumexp, _, _ = _expected(exact, keys, values)
    torch.testing.assert_close(found.output.double(), output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logsumexp.double(), logsumexp, atol=1e-5, rtol=1e-5)
    cotangent = _numbers(count, 64, seed=3)
    (grad,) = torch.autograd.grad(found.output, query, cotangent)
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(output, exact, cotangent.double())[0], atol=1e-5, rtol=1e-4
    )


def test_derivatives(path):
    keys, values = _numbers(23, 3), _numbers(23, 2, seed=1)
    memory = MappedMemory(_written(path, keys, values))
    query = _numbers(4, 3, seed=2, dtype=torch.float64).requires_grad_()
    for measure in _MEASURES:

        def run(x, measure=measure, **more):
            found = attend_file(x, memory, measure=measure, part_size=5, **more)
            return tuple(part for part in (found.output, found.logsumexp, found.weights) if part is not None)

        assert torch.autograd.gradcheck(run, query)
        assert torch.autograd.gradcheck(lambda x, run=run: run(x, k=4), query)
        assert torch.autograd.gradgradcheck(lambda x, run=run: run(x, k=4), query)


def test_a_second_derivative_over_the_whole_file_is_refused(path):
    memory = _written(path, _numbers(9, 3), _numbers(9, 2))
    query = _numbers(4, 3, seed=2).requires_grad_()
    with pytest.raises(UnsupportedError, match="a second derivative of attention over a whole file: give k"):
        torch.autograd.grad(attend_file(query, memory).output.sum(), query, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [None, 3])
def test_dtypes_of_file_and_query(path, dtype, query_dtype, k):
    keys, values = _numbers(61, 6, dtype=dtype), _numbers(61, 4, seed=1, dtype=dtype)
    query = _numbers(5, 6, seed=2, dtype=query_dtype)
    found = attend_file(query, _written(path, keys, values, 13), k=k, part_size=20)
    output, logsumexp, _, rows = _expected(query.double(), keys, values, k=k)
    assert found.output.dtype == query_dtype
    assert found.logsumexp.dtype == torch.promote_types(query_dtype, torch.float32)
    torch.testing.assert_close(found.output, output.to(query_dtype))
    torch.testing.assert_close(found.logsumexp.double(), logsumexp, atol=1e-5, rtol=1e-5)
    assert k is None or torch.equal(found.indices, rows)


def test_keys_as_values(path):
    keys = _numbers(30, 4)
    write_memory(path, keys.split(7))
    query = _numbers(3, 4, seed=1)
    found = attend_file(query, path, value="keys")
    torch.testing.assert_close(found.output, _expected(query, keys, keys)[0])
    with pytest.raises(InvalidInputError, match="expected a tensor 'values', got the tensors 'keys'"):
        attend_file(query, path)


def test_equal_keys_of_several_parts_go_to_the_lower_row(path):
    keys = _numbers(10, 4).repeat(7, 1)
    query = _numbers(6, 4, seed=1)
    for measure in _MEASURES:
        found = attend_file(query, _written(path, keys, keys), k=12, measure=measure, part_size=8)
        expected = _expected(query, keys, keys, measure, k=12)[3]
        assert torch.equal(found.indices, expected)


@pytest.mark.parametrize("measure", _MEASURES)
def test_the_best_are_those_of_an_exact_index(path, measure):
    keys, values = _numbers(300, 16), _numbers(300, 3, seed=1)
    index = ExactIndex(16, measure=measure)
    index.append(keys)
    query = _numbers(9, 16, seed=2)
    found = attend_file(query, _written(path, keys, values), k=5, measure=measure, part_size=70)
    assert torch.equal(found.indices, index.search(query, 5).ids)


def test_slots_beyond_the_file_are_not_used(path):
    keys, values = _numbers(4, 3), _numbers(4, 2, seed=1)
    query = _numbers(5, 3, seed=2).requires_grad_()
    found = attend_file(query, _written(path, keys, values), k=6)
    assert found.indices.shape == found.weights.shape == (5, 6)
    assert (found.indices[:, 4:] == -1).all()
    assert (found.weights[:, 4:] == 0).all()
    torch.testing.assert_close(found.output, attend_file(query, path).output)


@pytest.mark.parametrize("k", [None, 2])
def test_shapes_of_the_query(path, k):
    memory = MappedMemory(_written(path, _numbers(9, 3), _numbers(9, 2, seed=1)))
    for shape in ((3,), (0, 3), (2, 0, 3), (1, 2, 2, 3)):
        found = attend_file(torch.zeros(shape), memory, k=k)
        assert found.output.shape == (*shape[:-1], 2)
        assert found.logsumexp.shape == shape[:-1]
        assert k is None or found.indices.shape == (*shape[:-1], k)


def test_large_scores_keep_their_digits(path):
    keys = _numbers(50, 3) * 1e-3
    keys[:, 0] = 1e4
    query = torch.tensor([[1e4, 1.0, -2.0]], dtype=torch.float64).requires_grad_()
    found = attend_file(query, _written(path, keys, keys), scale=1.0, part_size=7)
    output = _expected(query, keys, keys, scale=1.0)[0]
    torch.testing.assert_close(found.output, output)
    (grad,) = torch.autograd.grad(found.output[:, 1:].sum(), query)
    torch.testing.assert_close(grad, torch.autograd.grad(output[:, 1:].sum(), query)[0], atol=1e-9, rtol=1e-5)


def test_the_same_bits_on_any_number_of_threads(path):
    keys, values = _numbers(4000, 64), _numbers(4000, 64, seed=1)
    query, before = _numbers(8, 64, seed=2), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attend_file(query, _written(path, keys, values), part_size=1500).output)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nothing_is_read_into_memory_as_a_whole(path):
    """Rows of the file that is mapped are attended where they lie."""
    keys = _numbers(100, 8)
    memory = MappedMemory(_written(path, keys, keys))
    first = memory.keys.data_ptr()
    file = mapped._File(memory, "dot", 1.0, 30, torch.float32, None)
    places = [part.data_ptr() - first for _, part, _ in file.parts()]
    assert places == [0, 30 * 32, 60 * 32, 90 * 32]


# The bar and Ctrl-C


def test_a_bar_counts_the_rows(path, capsys):
    memory = _written(path, _numbers(90, 3), _numbers(90, 2))
    query = _numbers(4, 3, seed=2).requires_grad_()
    found = attend_file(query, memory, part_size=40, progress=True)
    assert "memories: 100%" in capsys.readouterr().err
    found.output.sum().backward()
    attend_file(query, memory)
    assert capsys.readouterr().err == ""


def test_without_tqdm_there_is_no_bar(path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    attend_file(_numbers(4, 3), _written(path, _numbers(9, 3), _numbers(9, 2)), progress=True)
    assert capsys.readouterr().err == ""


def test_an_interrupted_call_leaves_the_file_and_can_be_repeated(path, monkeypatch):
    memory = MappedMemory(_written(path, _numbers(90, 3), _numbers(90, 2)))
    query = _numbers(4, 3, seed=2)
    expected = attend_file(query, memory, part_size=5).output
    plain, calls = mapped.attend, []

    def interrupted(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return plain(*arguments, **settings)

    monkeypatch.setattr(mapped, "attend", interrupted)
    # A process that a shell started in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            attend_file(query, memory, part_size=5, progress=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.equal(attend_file(query, memory, part_size=5).output, expected)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_is_what_safetensors_reads_and_writes(tmp_path, dtype):
    keys, values = _numbers(57, 6, dtype=dtype), _numbers(57, 4, seed=1, dtype=dtype)
    ours = _written(tmp_path / "ours.safetensors", keys, values, 10)
    read = safetensors.torch.load_file(ours)
    assert torch.equal(read["keys"], keys)
    assert torch.equal(read["values"], values)
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({"a": keys, "b": torch.zeros(3, dtype=torch.int64), "c": values}, theirs)
    memory = MappedMemory(theirs, "a", "c")
    assert torch.equal(memory.keys, keys)
    assert torch.equal(memory.values, values)
    assert len(memory) == 57
    assert sorted(os.listdir(tmp_path)) == ["ours.safetensors", "theirs.safetensors"]


def test_a_mapped_file_may_be_replaced(path):
    keys = _numbers(20, 3)
    memory = MappedMemory(_written(path, keys, keys))
    _written(path, keys + 1, keys)
    assert torch.equal(memory.keys, keys)
    assert torch.equal(MappedMemory(path).keys, keys + 1)


def _parts_that_end(error, keys):
    yield keys, keys
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no more"), SystemExit()])
def test_a_write_that_ends_early_leaves_the_old_file(tmp_path, path, error):
    keys = _numbers(20, 3)
    _written(path, keys, keys)
    with pytest.raises(type(error)):
        write_memory(path, _parts_that_end(error, keys + 1))
    assert torch.equal(MappedMemory(path).keys, keys)
    assert os.listdir(tmp_path) == ["memory.safetensors"]


def test_every_file_that_is_cut_short_is_refused(path, tmp_path):
    keys = _numbers(9, 3)
    whole = _written(path, keys, keys).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in [0, 1, 7, 8, 9, 300, *np.random.default_rng(0).integers(0, len(whole), 200).tolist(), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(InvalidInputError, match=f"cut.safetensors: expected .*{size} bytes"):
            attend_file(torch.zeros(1, 3), cut)


def _headed(path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    return path


def _about(**changes):
    return {"keys": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


@pytest.mark.parametrize(
    ("header", "error", "match"),
    [
        (b"not JSON", InvalidInputError, "whose header is JSON"),
        (b"\xff\xfe", InvalidInputError, "whose header is JSON"),
        (b"[" * 200_000, InvalidInputError, "whose header is JSON"),
        ([1, 2], InvalidInputError, "whose header names tensors"),
        ({}, InvalidInputError, "a tensor 'keys', got the tensors none"),
        ({"__metadata__": {}, "b": 1}, InvalidInputError, "a tensor 'keys', got the tensors 'b'"),
        ({"keys": 3}, InvalidInputError, "dtype, shape and data_offsets of 'keys', got 3"),
        ({"keys": {"dtype": "F32"}}, InvalidInputError, "dtype, shape and data_offsets of 'keys'"),
        (_about(data_offsets=[0]), InvalidInputError, "dtype, shape and data_offsets of 'keys'"),
        (_about(shape=[2, -3]), InvalidInputError, "dtype, shape and data_offsets of 'keys'"),
        (_about(shape=[2, 3.0]), InvalidInputError, "dtype, shape and data_offsets of 'keys'"),
        (_about(dtype="I32"), InvalidInputError, "'keys' of dtype F32, BF16 or F16, got I32"),
        (_about(dtype=["F32"]), InvalidInputError, "dtype, shape and data_offsets of 'keys'"),
        (_about(shape=[6]), DimensionMismatchError, r"'keys' of .*: expected \(rows, width\), got \(6,\)"),
        (_about(shape=[6, 0], data_offsets=[0, 0]), DimensionMismatchError, r"expected \(rows, width\)"),
        (_about(shape=[0, 3], data_offsets=[0, 0]), InvalidInputError, "expected one row or more, got none"),
        (_about(data_offsets=[0, 20]), InvalidInputError, r"data_offsets of 'keys' that fit F32 \(2, 3\), got 0 to 20"),
        (_about(shape=[20, 3], data_offsets=[0, 240]), InvalidInputError, "a file that is cut short"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(path, header, error, match):
    with pytest.raises(error, match=match):
        MappedMemory(_headed(path, header), value="keys")


def test_what_is_no_file_is_refused(path, tmp_path):
    with pytest.raises(InvalidInputError, match=r"memory\.safetensors: expected a file, got No such file or directory"):
        attend_file(torch.zeros(1, 3), path)
    with pytest.raises(InvalidInputError, match="expected a file, got not a file"):
        attend_file(torch.zeros(1, 3), tmp_path)
    with pytest.raises(InvalidInputError, match="folder: expected a path, got 3"):
        attend_file(torch.zeros(1, 3), 3)


def test_as_many_values_as_keys(path):
    safetensors.torch.save_file({"keys": torch.zeros(3, 2), "values": torch.zeros(4, 2)}, path)
    with pytest.raises(DimensionMismatchError, match="expected as many values as keys, 3, got 4"):
        MappedMemory(path)


@pytest.mark.parametrize(
    ("query", "given", "error", "match"),
    [
        (torch.zeros(2, 4), {}, DimensionMismatchError, r"query: expected \(..., key_dim=3\), as the keys of the file"),
        (torch.tensor(1.0), {}, DimensionMismatchError, "query: expected"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, InvalidInputError, "query: expected"),
        (torch.zeros(2, 3, device="meta"), {}, InvalidInputError, "query: expected device cpu"),
        (torch.zeros(2, 3), {"k": 0}, InvalidInputError, "k: expected an int of at least 1, got 0"),
        (torch.zeros(2, 3), {"part_size": 0}, InvalidInputError, "part_size: expected an int of at least 1, got 0"),
        (torch.zeros(2, 3), {"measure": "l2"}, InvalidInputError, "measure: expected one of"),
        (torch.zeros(2, 3), {"scale": "1"}, InvalidInputError, "scale: expected"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(path, query, given, error, match):
    with pytest.raises(error, match=match):
        attend_file(query, _written(path, _numbers(9, 3), _numbers(9, 2)), **given)


def test_a_call_under_a_transform_is_refused(path):
    memory = _written(path, _numbers(9, 3), _numbers(9, 2))
    with pytest.raises(UnsupportedError, match="a file is attended in plain calls"):
        torch.func.vmap(lambda x: attend_file(x, memory).output)(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ([], InvalidInputError, "parts: expected one row or more, got none"),
        ([torch.zeros(0, 3)], InvalidInputError, "parts: expected one row or more, got none"),
        ([torch.zeros(2, 3).double()], InvalidInputError, r"parts\[0\]\[0\]: expected float32, bfloat16 or float16"),
        (
            [torch.zeros(2, 3), torch.zeros(2, 3).half()],
            InvalidInputError,
            r"parts\[1\]\[0\]: expected .* as all parts",
        ),
        ([(torch.zeros(2, 3), torch.zeros(2, 3).half())], InvalidInputError, r"parts\[0\]\[1\]: expected float32"),
        ([torch.zeros(6)], DimensionMismatchError, r"parts\[0\]\[0\]: expected \(rows, width\)"),
        ([(torch.zeros(2, 3), torch.zeros(3, 3))], DimensionMismatchError, "as many values as keys"),
        (
            [torch.zeros(2, 3), torch.zeros(2, 4)],
            DimensionMismatchError,
            r"the first part, \(3,\), got \(4,\)",
        ),
        (
            [torch.zeros(2, 3), (torch.zeros(2, 3),) * 2],
            DimensionMismatchError,
            r"part, \(3,\), got \(3, 3\)",
        ),
        ([(torch.zeros(2, 3),) * 3], InvalidInputError, "keys, or keys and values, got 3 things"),
        ([7], InvalidInputError, r"parts\[0\]\[0\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, path, parts, error, match):
    with pytest.raises(error, match=match):
        write_memory(path, parts)
    assert os.listdir(tmp_path) == []


def test_names_that_do_not_fit_are_refused(path):
    part = [torch.zeros(2, 3)]
    for name in ("keys", "__metadata__"):
        with pytest.raises(InvalidInputError, match="value: expected another name"):
            write_memory(path, part, value=name)
    with pytest.raises(InvalidInputError, match="key: expected shorter names of tensors, got 606"):
        write_memory(path, part, key="k" * 600)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="expected a writable file, got No such file or directory"):
        write_memory(tmp_path / "none" / "memory.safetensors", [torch.zeros(2, 3)])
