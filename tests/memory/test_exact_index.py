"""The exact index against brute force: what it finds, what it forgets, what it refuses."""

import random

import pytest
import torch
from torch import Tensor

from anyattention import interfaces
from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.memory import ExactIndex

MEASURES = ("dot", "cosine", "euclidean")


def likeness(queries: Tensor, keys: Tensor, measure: str) -> Tensor:
    """`(n, M)` in float64, by the definitions."""
    queries, keys = queries.double(), keys.double()
    if measure == "euclidean":
        return -torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
    if measure == "cosine":
        return torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=-1)
    return queries @ keys.T


def brute_force(queries: Tensor, keys: Tensor, ids: Tensor, k: int, measure: str) -> tuple[Tensor, Tensor]:
    scores = likeness(queries, keys, measure)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    found, best = ids[order], scores.gather(1, order)
    missing = max(k - len(ids), 0)
    pad = torch.nn.functional.pad
    return pad(found, (0, missing), value=-1), pad(best, (0, missing), value=-torch.inf)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("count", "k"), [(1, 1), (7, 3), (7, 7), (5, 11), (700, 32)])
def test_finds_what_brute_force_finds(measure, count, k):
    index = ExactIndex(5, measure=measure)
    keys, queries = torch.randn(count, 5), torch.randn(13, 5)
    ids = index.append(keys)
    found, scores = index.search(queries, k)
    expected, best = brute_force(queries, keys, ids, k, measure)
    assert torch.equal(found, expected)
    torch.testing.assert_close(scores.double(), best, rtol=1e-5, atol=1e-5)
    assert isinstance(index, interfaces.MemoryIndex)
    assert len(index) == count


@pytest.mark.parametrize("measure", MEASURES)
def test_the_first_of_equal_keys_is_taken(measure):
    index = ExactIndex(3, measure=measure)
    index.append(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]).repeat(300, 1))
    found, scores = index.search(torch.tensor([[2.0, 0.0, 0.5]]), 4)
    assert found.tolist() == [[1, 3, 5, 7]]
    assert (scores == scores[:, :1]).all()


def test_far_from_the_origin_distances_keep_their_digits():
    index = ExactIndex(3, measure="euclidean")
    keys = 1e4 + torch.randn(200, 3)
    queries = 1e4 + torch.randn(7, 3)
    ids = index.append(keys)
    assert torch.equal(index.search(queries, 5).ids, brute_force(queries, keys, ids, 5, "euclidean")[0])


def test_a_vector_of_zeros_has_cosine_0_to_all():
    index = ExactIndex(2, measure="cosine")
    index.append(torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    assert index.search(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), 3).scores.tolist() == [[1, 0, -1], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keys_keep_their_dtype(dtype):
    index = ExactIndex(3, dtype=dtype)
    keys = torch.randn(5, 3, dtype=dtype)
    ids = index.append(keys)
    assert torch.equal(index.gather(ids), keys)
    assert index.search(keys, 2).scores.dtype == dtype


def test_gather_has_zeros_for_no_memory():
    index = ExactIndex(3)
    assert torch.equal(index.gather(torch.full((2, 2), -1)), torch.zeros(2, 2, 3))
    keys = torch.randn(5, 3)
    index.append(keys)
    index.delete([1])
    assert torch.equal(
        index.gather(torch.tensor([[4, -1], [0, 2]])), torch.stack([keys[4], keys[0] * 0, *keys[[0, 2]]]).view(2, 2, 3)
    )


def test_an_empty_index_finds_nothing():
    found, scores = ExactIndex(3, measure="euclidean").search(torch.randn(2, 3), 2)
    assert found.tolist() == [[-1, -1]] * 2
    assert scores.tolist() == [[-torch.inf] * 2] * 2


def run_operations(count: int, measure: str, seed: int) -> None:
    """Random appends, deletes and searches beside a dictionary of what should be there."""
    choose, there = random.Random(seed), {}
    index, next_id = ExactIndex(3, measure=measure), 0
    for _ in range(count):
        kind = choose.random()
        if kind < 0.4:
            keys = torch.randn(choose.choice([0, 1, 2, 7]), 3).round(decimals=1)
            ids = index.append(keys)
            assert ids.tolist() == list(range(next_id, next_id + len(keys)))
            there.update(zip(ids.tolist(), keys, strict=True))
            next_id += len(keys)
        elif kind < 0.6:
            ids = choose.sample(sorted(there), min(len(there), choose.choice([0, 1, 3, 9])))
            index.delete(torch.tensor(ids, dtype=torch.int64))
            for each in ids:
                del there[each]
        else:
            queries, k = torch.randn(2, 3), choose.choice([1, 2, 5])
            found, scores = index.search(queries, k)
            assert len(index) == len(there)
            keys = torch.stack(list(there.values())) if there else torch.zeros(0, 3)
            # Of keys that round to the same score the chosen ones are as good.
            best = brute_force(queries, keys, torch.tensor(list(there), dtype=torch.int64), k, measure)[1]
            torch.testing.assert_close(scores.double(), best, rtol=1e-4, atol=1e-4)
            for row, these in zip(queries, found, strict=True):
                used = [int(each) for each in these if each >= 0]
                assert len(set(used)) == len(used) == min(k, len(there))
                own = likeness(row[None], torch.stack([there[each] for each in used]), measure) if used else best[:0]
                assert (own.diff() <= 1e-4).all()
    assert index.ids.tolist() == sorted(there)


@pytest.mark.parametrize("measure", MEASURES)
def test_random_operations(measure):
    run_operations(150, measure, 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("seed", range(2))
def test_ten_thousand_random_operations(measure, seed):
    run_operations(10_000, measure, seed)


def test_deleting_what_is_not_there_deletes_nothing():
    index = ExactIndex(2)
    index.append(torch.ones(3, 2))
    for ids, message in (
        ([0, 3], "ids: expected ids of the 3 memories, got 1 that are not there, such as 3"),
        ([1, 1], "ids: expected each id once, got one of them twice"),
        ([-1], "ids: expected ids of memories, got -1"),
        (torch.tensor([1.0]), "ids: expected torch.int64, got torch.float32"),
        ("all", "ids: expected int64 ids, got str"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            index.delete(ids)
        assert len(index) == 3
    with pytest.raises(DimensionMismatchError, match=r"ids: expected \(count,\), got \(1, 1\)"):
        index.delete(torch.tensor([[1]]))


def test_bad_input_is_named():
    index = ExactIndex(2)
    index.append(torch.ones(3, 2))
    with pytest.raises(DimensionMismatchError, match=r"keys: expected \(count=1, key_dim=2\), got \(1, 3\)"):
        index.append(torch.ones(1, 3))
    with pytest.raises(DimensionMismatchError, match=r"queries: expected \(count, key_dim=2\), got \(2,\)"):
        index.search(torch.ones(2), 1)
    for broken in (torch.nan, torch.inf):
        keys = torch.ones(4, 2)
        keys[2, 1] = broken
        with pytest.raises(
            InvalidInputError,
            match=r"keys: expected finite numbers in .*, got NaN or infinity in 1 of 4 rows",
        ):
            index.append(keys)
    assert len(index) == 3
    with pytest.raises(InvalidInputError, match="keys: expected a floating-point dtype"):
        index.append(torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match="keys: expected a dense tensor"):
        index.append(torch.ones(1, 2).to_sparse())
    with pytest.raises(InvalidInputError, match="k: expected an int of at least 1, got 0"):
        index.search(torch.ones(1, 2), 0)
    with pytest.raises(InvalidInputError, match="measure: expected one of 'dot', 'cosine', 'euclidean', got 'l2'"):
        ExactIndex(2, measure="l2")
    with pytest.raises(InvalidInputError, match="key_dim: expected an int of at least 1, got 0"):
        ExactIndex(0)
    with pytest.raises(InvalidInputError, match="ids: expected ids of the 3 memories, got 1 that are not there"):
        index.gather(torch.tensor([7]))
    with pytest.raises(InvalidInputError, match=r"ids: expected a tensor of torch\.int64, got list"):
        index.gather([0])


def test_appending_inside_a_transform_is_refused():
    index = ExactIndex(2)
    with pytest.raises(UnsupportedError, match="keys: memories are appended in plain calls"):
        torch.func.vmap(lambda x: index.append(x))(torch.ones(3, 1, 2))
    assert len(index) == 0


def test_memories_of_inference_mode_serve_later():
    index = ExactIndex(2)
    with torch.inference_mode():
        index.append(torch.eye(2))
    index.append(torch.ones(1, 2))
    assert not index.keys.is_inference()
    assert index.search(torch.ones(1, 2), 1).ids.tolist() == [[2]]


def test_the_keys_that_were_given_may_change():
    index, keys = ExactIndex(2), torch.eye(2)
    index.append(keys)
    keys.zero_()
    assert torch.equal(index.keys, torch.eye(2))


def test_the_number_of_threads_changes_no_bit(threads):
    index, queries = ExactIndex(7), torch.randn(40, 7)
    index.append(torch.randn(5_000, 7).round())
    found = []
    for count in (1, 2):
        threads(count)
        found.append(index.search(queries.round(), 9))
    assert torch.equal(found[0].ids, found[1].ids)
    assert torch.equal(found[0].scores, found[1].scores)


@pytest.mark.parametrize("factor", [1e-25, 1.0, 1e25])
def test_cosine_of_keys_whose_squares_are_no_numbers(factor):
    index = ExactIndex(3, measure="cosine")
    index.append(torch.eye(3) * factor)
    ids, scores = index.search(torch.eye(3) * factor, k=1)
    assert ids.flatten().tolist() == [0, 1, 2]
    assert (scores == 1).all()


@pytest.mark.parametrize("first", ["at once", "before the others"])
def test_a_first_key_far_from_the_others_leaves_their_distances_digits(first):
    keys = torch.cat([torch.zeros(1, 11), torch.randn(300, 11) + 1000])
    index = ExactIndex(11, measure="euclidean")
    for some in [keys] if first == "at once" else keys.split([1, 150, 150]):
        index.append(some)
    queries = torch.randn(30, 11) + 1000
    distances = (queries.double()[:, None] - keys.double()).square().sum(-1)
    assert (index.search(queries, k=1).ids == distances.argmin(1, keepdim=True)).float().mean() > 0.95


def test_float64_keys_are_compared_by_more_digits_than_float32_has():
    keys = torch.arange(700, dtype=torch.float64)[:, None] + 1.7e9
    index = ExactIndex(1, measure="euclidean", dtype=torch.float64)
    index.append(keys)
    assert torch.equal(index.search(keys, k=1).ids.flatten(), torch.arange(700))
