"""`radius`, `radius_graph`, `knn` and `knn_graph` against all pairs, written from torch_cluster's documentation."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.jit import script

from anyattention import Graph
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError, UnsupportedError
from anyattention.interop.pyg import knn, knn_graph, radius, radius_graph

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
_EMPTY = [[], []]

Pairs = list[tuple[int, int]]


def distances(x: Tensor, y: Tensor, cosine: bool = False) -> np.ndarray:
    """`(queries, points)` float64."""
    keys, queries = (points.double().numpy() for points in (x, y))
    if not cosine:
        return np.sqrt(((keys[None] - queries[:, None]) ** 2).sum(-1))
    keys, queries = (points / np.linalg.norm(points, axis=1, keepdims=True) for points in (keys, queries))
    return 1 - queries @ keys.T


def of_one_example(batch_x: Tensor | None, batch_y: Tensor | None, i: int, j: int) -> bool:
    return batch_x is None or batch_y is None or int(batch_x[j]) == int(batch_y[i])


def brute_radius(
    x: Tensor,
    y: Tensor,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    most: int | None = None,
    ignore_same_index: bool = False,
) -> Pairs:
    apart, found = distances(x, y), []
    for i in range(len(y)):
        near = [
            j
            for j in range(len(x))
            if apart[i, j] < r and of_one_example(batch_x, batch_y, i, j) and not (ignore_same_index and i == j)
        ]
        found += [(i, j) for j in near[:most]]
    return found


def brute_knn(
    x: Tensor,
    y: Tensor,
    k: int,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    cosine: bool = False,
    ignore_same_index: bool = False,
) -> Pairs:
    apart, found = distances(x, y, cosine), []
    for i in range(len(y)):
        others = [
            j for j in range(len(x)) if of_one_example(batch_x, batch_y, i, j) and not (ignore_same_index and i == j)
        ]
        found += [(i, j) for j in sorted(others, key=lambda j: (apart[i, j], j))[:k]]
    return found


def listed(pairs: Tensor) -> Pairs:
    assert pairs.dtype == torch.int64
    assert pairs.shape[0] == 2
    return [(i, j) for i, j in pairs.T.tolist()]


def lattice(count: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Points of a small lattice: many coincide, and many distances are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (count, dim), generator=generator).to(dtype)


def examples(*sizes: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 5])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("most", [None, 0, 3])
@pytest.mark.parametrize("ignore_same_index", [False, True])
@pytest.mark.parametrize("r", [0, 2, 2.5, float("inf")])
def test_radius_is_all_pairs(
    dtype: torch.dtype, dim: int, batched: bool, most: int | None, ignore_same_index: bool, r: float
) -> None:
    x, y = lattice(23, dim, dtype), lattice(17, dim, dtype, seed=1)
    # Example 1 has no point of x, and 3 none of y.
    batches = (examples(7, 0, 5, 11), examples(5, 3, 9)) if batched else (None, None)
    found = radius(x, y, r, *batches, max_num_neighbors=most, ignore_same_index=ignore_same_index)
    assert listed(found) == brute_radius(x, y, r, *batches, most, ignore_same_index)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 5])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("most", [None, 0, 3])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_radius_graph_is_all_pairs(
    dtype: torch.dtype, dim: int, batched: bool, most: int | None, loop: bool, flow: str
) -> None:
    x = lattice(23, dim, dtype)
    batch = examples(7, 0, 5, 11) if batched else None
    found = radius_graph(x, 2, batch, loop, most, flow)
    pairs = brute_radius(x, x, 2, batch, batch, most, ignore_same_index=not loop)
    assert listed(found if flow == "target_to_source" else found.flip(0)) == pairs


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 5])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("k", [1, 2, 7, 100])
def test_knn_is_the_nearest_of_all_pairs(dtype: torch.dtype, dim: int, batched: bool, k: int) -> None:
    x, y = lattice(23, dim, dtype), lattice(17, dim, dtype, seed=1)
    batches = (examples(7, 0, 5, 11), examples(5, 3, 9)) if batched else (None, None)
    assert listed(knn(x, y, k, *batches)) == brute_knn(x, y, k, *batches)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 5])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("k", [1, 2, 7, 100])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_knn_graph_is_the_nearest_of_all_pairs(
    dtype: torch.dtype, dim: int, batched: bool, k: int, loop: bool, flow: str
) -> None:
    x = lattice(23, dim, dtype)
    batch = examples(7, 0, 5, 11) if batched else None
    found = knn_graph(x, k, batch, loop, flow)
    pairs = brute_knn(x, x, k, batch, batch, ignore_same_index=not loop)
    assert listed(found if flow == "target_to_source" else found.flip(0)) == pairs


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_points_in_any_examples(data: st.DataObject) -> None:
    dim = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4))
    batch_x, batch_y = examples(*[size for size, _ in sizes]), examples(*[size for _, size in sizes])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x, y = (torch.randn(len(batch), dim, generator=generator).double() for batch in (batch_x, batch_y))
    r, k = data.draw(st.floats(0.1, 4)), data.draw(st.integers(1, 8))
    assert listed(radius(x, y, r, batch_x, batch_y)) == brute_radius(x, y, r, batch_x, batch_y)
    assert listed(knn(x, y, k, batch_x, batch_y)) == brute_knn(x, y, k, batch_x, batch_y)
    assert listed(radius(x, x, r, batch_x, batch_x)) == brute_radius(x, x, r, batch_x, batch_x)


def test_a_distance_of_exactly_the_radius_is_out() -> None:
    """As in torch_cluster; `Graph.radius` has it in."""
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert radius_graph(x, 5.0).tolist() == _EMPTY
    assert radius_graph(x, 5.000001).tolist() == [[1, 0], [0, 1]]
    assert Graph.radius(x, 5.0).edge_index.tolist() == [[1, 0], [0, 1]]
    # 0.1 in float32 is above 0.1, as the coordinate is.
    assert radius_graph(torch.tensor([0.0, 0.1]), 0.1).tolist() == _EMPTY


def test_nothing_is_cut_unless_asked() -> None:
    x = torch.randn(50, 3)
    everything = radius_graph(x, 100.0)
    assert everything.shape[1] == 50 * 49
    some = radius_graph(x, 100.0, max_num_neighbors=32)
    assert torch.bincount(some[1]).tolist() == [32] * 50
    assert set(listed(some)) < set(listed(everything))
    assert max(some[0].tolist()) == 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batched", [False, True])
def test_nearest_by_cosine(dtype: torch.dtype, batched: bool) -> None:
    x, y = torch.randn(23, 3, dtype=dtype), torch.randn(17, 3, dtype=dtype)
    batches = (examples(7, 0, 5, 11), examples(5, 3, 9)) if batched else (None, None)
    assert listed(knn(x, y, 4, *batches, cosine=True)) == brute_knn(x, y, 4, *batches, cosine=True)
    found = knn_graph(x, 4, batches[0], cosine=True)
    assert listed(found.flip(0)) == brute_knn(x, x, 4, batches[0], batches[0], True, ignore_same_index=True)
    # Lengths do not count, not even those whose squares are 0 or infinite.
    scales = torch.tensor([1e-30, 1e30, 1.0], dtype=dtype).repeat(8)[:23, None]
    assert torch.equal(knn(x * scales, y, 4, *batches, cosine=True), knn(x, y, 4, *batches, cosine=True))


def test_a_point_at_the_origin_has_no_direction() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert listed(knn(x, x, 4, cosine=True)) == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 1), (2, 3), (3, 3), (3, 2), (3, 1)]
    assert listed(knn_graph(x, 1, cosine=True)) == [(2, 1), (1, 2), (2, 3)]
    assert knn_graph(torch.zeros(5, 2), 1, cosine=True).tolist() == _EMPTY


@pytest.mark.parametrize(
    "points", [torch.empty(0, 3), torch.empty(0), torch.empty(4, 0), torch.empty(0, 3, dtype=torch.int32)]
)
def test_no_points(points: Tensor) -> None:
    some = torch.zeros(2, *points.shape[1:], dtype=points.dtype)
    batch = torch.zeros(len(points), dtype=torch.int64)
    for found in (
        radius(points, some, 1.0),
        radius(some, points, 1.0),
        knn(points, some, 3),
        knn(some, points, 3),
        radius_graph(points, 1.0, batch, loop=True),
        knn_graph(points, 3, batch),
        knn_graph(points, 3, cosine=True),
    ):
        assert found.tolist() == _EMPTY
        assert found.dtype == torch.int64


def test_a_lone_point_has_no_neighbour_but_itself() -> None:
    x = torch.ones(1, 2)
    assert knn_graph(x, 3).tolist() == radius_graph(x, 1.0).tolist() == _EMPTY
    assert knn_graph(x, 3, loop=True).tolist() == radius_graph(x, 1.0, loop=True).tolist() == [[0], [0]]


def test_a_point_among_coincident_ones_gets_k_others() -> None:
    """torch_cluster gives k + 1 to those that are not among their own k + 1 nearest."""
    found = knn_graph(torch.zeros(5, 2), 2)
    assert listed(found.flip(0)) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]


def test_a_batch_may_be_missing_where_it_says_nothing() -> None:
    x, y, zeros = torch.randn(7, 2), torch.randn(5, 2), torch.zeros(7, dtype=torch.int64)
    assert torch.equal(radius(x, y, 1.0, zeros), radius(x, y, 1.0))
    assert torch.equal(knn(y, x, 3, None, zeros), knn(y, x, 3))


def test_settings_that_change_nothing() -> None:
    x = torch.randn(11, 3)
    batch = examples(5, 6)
    assert torch.equal(radius_graph(x, 1.0, batch, batch_size=2, num_workers=4), radius_graph(x, 1.0, batch))
    assert torch.equal(knn_graph(x, 2, batch.int(), batch_size=7, num_workers=0), knn_graph(x, 2, batch))
    assert torch.equal(knn_graph(x, np.int64(2)), knn_graph(x, 2))  # pyright: ignore[reportArgumentType]
    assert torch.equal(radius_graph(x, np.float32(0.5)), radius_graph(x, 0.5))  # pyright: ignore[reportArgumentType]
    assert torch.equal(radius_graph(x.T.contiguous().T, 1.0), radius_graph(x, 1.0))


def test_a_radius_that_a_dtype_cannot_hold() -> None:
    x = lattice(7, 2, torch.float16)
    assert radius_graph(x, 1e6).shape[1] == 42
    assert radius_graph(x, 1e-12, loop=True).tolist() == _EMPTY
    assert radius_graph(x.double() * 1e149, 1e200).shape[1] == 42


@pytest.mark.parametrize("find", [lambda x: radius_graph(x, 1.0), lambda x: knn_graph(x, 3)])
def test_points_under_derivatives_and_modes(find: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(11, 3, requires_grad=True)
    expected = find(x.detach())
    found = find(x)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(find(x), expected)
    with torch.device("meta"):
        assert torch.equal(find(x), expected)
    with torch.autocast("cpu"):
        assert torch.equal(find(x), expected)

    def energy(positions: Tensor) -> Tensor:
        source, target = find(positions)
        return (positions[source] - positions[target]).square().sum()

    source, target = expected
    apart = 2 * (x[source] - x[target]).detach()
    gradient = torch.zeros(11, 3).index_add(0, source, apart).index_add(0, target, -apart)
    torch.testing.assert_close(torch.func.grad(energy)(x.detach()), gradient)
    hessian: Any = torch.func.hessian(energy)(x.detach())
    assert hessian.shape == (11, 3, 11, 3)
    assert hessian.abs().max() > 1
    with pytest.raises(UnsupportedError, match="each entry has a graph of its own"):
        torch.func.vmap(find)(torch.randn(2, 5, 3))


@pytest.mark.parametrize(
    "find",
    [
        lambda x, batch: radius_graph(x, 1.0, batch, loop=True, max_num_neighbors=3),
        lambda x, batch: radius(x, x[:5], 1.5, batch, batch[:5]),
        lambda x, batch: knn_graph(x, 3, batch, flow="target_to_source"),
        lambda x, batch: knn(x, x[:5], 2, batch, batch[:5], cosine=True),
    ],
)
def test_compiled_whole(find: Callable[[Tensor, Tensor], Tensor]) -> None:
    compiled = torch.compile(find, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ((7, 4), (5, 8, 3)):
        x, batch = torch.randn(sum(sizes), 3), examples(*sizes)
        assert torch.equal(compiled(x, batch), find(x, batch))


def test_operators_pass_the_check_of_pytorch() -> None:
    x, y = torch.randn(7, 2), torch.randn(5, 2)
    batches = examples(4, 3), examples(2, 3)
    operators = torch.ops.anyattention
    for given_points in ((x, y), (x, None)):
        of_y = None if given_points[1] is None else batches[1]
        torch.library.opcheck(operators.radius_pairs.default, (*given_points, 1.0, batches[0], of_y, None, None, False))
        torch.library.opcheck(operators.nearest_pairs.default, (*given_points, 2, batches[0], of_y, False, None, True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("function", "given_points"),
    [(radius, 2), (radius_graph, 1), (knn, 2), (knn_graph, 1)],
)
def test_scripted(function: Callable[..., Tensor], given_points: int) -> None:
    points = [torch.randn(7, 2) for _ in range(given_points)]
    assert torch.equal(script(function)(*points, 2), function(*points, 2))


def test_neighbours_of_real_molecules(data_folder: Path) -> None:
    with np.load(data_folder / "qm9_small.npz") as data:
        offsets = data["offsets"][:201]
        positions = torch.from_numpy(data["positions"][: offsets[-1]].astype(np.float32))
    batch = examples(*np.diff(offsets).tolist())
    molecules = [(int(start), positions[start:end]) for start, end in itertools.pairwise(offsets)]

    def of_each(search: Callable[[Tensor], Pairs]) -> Pairs:
        return [(start + i, start + j) for start, points in molecules for i, j in search(points)]

    for r in (2.0, 10.0):
        expected = of_each(lambda points, r=r: brute_radius(points, points, r, ignore_same_index=True))
        assert len(expected) > 10 * 200
        assert listed(radius_graph(positions, r, batch).flip(0)) == expected
    expected = of_each(lambda points: brute_knn(points, points, 5, ignore_same_index=True))
    assert listed(knn_graph(positions, 5, batch).flip(0)) == expected


_X, _BATCH = torch.zeros(3, 2), torch.tensor([0, 0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: radius_graph(_X, -1.0), InvalidInputError, "r: expected a number of at least 0, got -1.0"),
        (lambda: radius_graph(_X, float("nan")), InvalidInputError, "r: expected a number of at least 0, got nan"),
        (lambda: radius(_X, _X, "1"), InvalidInputError, "r: expected a number of at least 0, got '1'"),
        (lambda: radius_graph(_X, 1.0, max_num_neighbors=-1), InvalidInputError, "max_num_neighbors: .* got -1"),
        (lambda: radius(_X, _X, 1.0, max_num_neighbors=2.5), InvalidInputError, "max_num_neighbors: .* got 2.5"),
        (lambda: radius_graph(_X, 1.0, batch_size=0), InvalidInputError, "batch_size: .*at least 1, got 0"),
        (
            lambda: radius_graph(_X, 1.0, _BATCH, batch_size=1),
            InvalidInputError,
            "batch_size: .*at least 2, for the examples of batch, got 1",
        ),
        (lambda: radius_graph(_X, 1.0, batch_size=2), InvalidInputError, "batch: .*as batch_size=2, got None"),
        (lambda: radius_graph(_X, 1.0, flow="up"), InvalidInputError, "flow: .* got 'up'"),
        (lambda: knn_graph(_X, 1, flow="up"), InvalidInputError, "flow: .* got 'up'"),
        (lambda: knn_graph(_X, 0), InvalidInputError, "k: expected an int of at least 1, got 0"),
        (lambda: knn(_X, _X, 1.5), InvalidInputError, "k: expected an int of at least 1, got 1.5"),
        (lambda: radius_graph(_X.numpy(), 1.0), InvalidInputError, "x: expected a torch.Tensor, got ndarray"),
        (lambda: knn(_X, None, 1), InvalidInputError, "y: expected a torch.Tensor, got NoneType"),
        (lambda: knn_graph(_X, 1, [0, 0, 1]), InvalidInputError, "batch: expected a torch.Tensor, got list"),
        (lambda: radius(_X, _X, 1.0, 3), InvalidInputError, "batch_x: expected a torch.Tensor, got int"),
        (lambda: radius_graph(_X.bool(), 1.0), InvalidInputError, "x: .*or integers, got torch.bool"),
        (lambda: radius_graph(_X[None], 1.0), DimensionMismatchError, r"x: .* got \(1, 3, 2\)"),
        (lambda: radius_graph(_X.to_sparse(), 1.0), InvalidInputError, "x: expected a dense tensor"),
        (lambda: radius_graph(_X / 0, 1.0), InvalidInputError, "x: expected finite coordinates, .*6 others among 6"),
        (lambda: knn_graph(torch.tensor([2**53]), 1), InvalidInputError, "x: .*below 9.0072e.15"),
        (lambda: radius(_X, _X.double(), 1.0), InvalidInputError, "y: expected torch.float32, as x"),
        (lambda: knn(_X, _X[:, :1], 1), DimensionMismatchError, r"y: .*2 coordinates, as x, got \(3, 1\)"),
        (lambda: radius(_X, _X, 1.0, _BATCH), InvalidInputError, "batch_y: .*as batch_x has several, got None"),
        (lambda: knn(_X, _X, 1, None, _BATCH), InvalidInputError, "batch_x: .*as batch_y has several, got None"),
        (lambda: radius_graph(_X, 1.0, _BATCH[:2]), DimensionMismatchError, r"batch: expected \(3,\).* got \(2,\)"),
        (lambda: radius_graph(_X, 1.0, _BATCH.float()), InvalidInputError, "batch: expected integers, got torch.f"),
        (
            lambda: radius_graph(_X, 1.0, _BATCH.to("meta")),
            InvalidInputError,
            "x: expected points and batches on a .*got meta",
        ),
        (lambda: radius_graph(_X.to("meta"), 1.0), InvalidInputError, "x: expected points and batches on a .*got meta"),
        (lambda: knn_graph(_X, 1, _BATCH.flip(0)), GraphStructureError, r"batch: .* never fall .*\[1, 0, 0\]"),
        (lambda: knn_graph(_X, 1, _BATCH - 1), GraphStructureError, "batch: expected examples from 0"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
