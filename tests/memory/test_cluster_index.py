"""An index of clusters of memories against brute force and the exact index."""

import copy
import pickle
import random

import pytest
import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as written_tensors
from torch import Tensor

from anyattention.errors import InvalidInputError, UnsupportedError
from anyattention.memory import ClusterIndex, ExactIndex, clustering, clusters

MEASURES = ("dot", "cosine", "euclidean")
ALL = 10**6


@pytest.fixture
def small(monkeypatch):
    """Clusters of few memories, rearranged often."""
    monkeypatch.setattr(clustering, "_ONE_CLUSTER", 20)
    monkeypatch.setattr(clusters, "_FEW_NEW", 5)


def recall(found: Tensor, expected: Tensor) -> float:
    return float((expected[:, :, None] == found[:, None]).any(2).double().mean())


def both(count: int, measure: str, scale: float = 1.0, offset: float = 0.0) -> tuple[ClusterIndex, ExactIndex]:
    ours, exact, keys = ClusterIndex(5, measure=measure), ExactIndex(5, measure=measure), torch.randn(count, 5)
    for index in (ours, exact):
        index.append(keys * scale + offset)
    return ours, exact


@pytest.mark.parametrize("measure", MEASURES)
def test_all_clusters_have_what_the_exact_index_finds(measure):
    ours, exact = both(5000, measure)
    queries = torch.randn(101, 5)
    assert len(ours._centroids) == 70
    assert ours.num_probes < 35
    found, expected = ours.search(queries, 32).ids, exact.search(queries, 32).ids
    assert recall(found, expected) >= 0.9
    assert not torch.equal(found, expected)  # it does not look at all of them
    ours.num_probes = 70
    for one, other in zip(ours.search(queries, 32), exact.search(queries, 32), strict=True):
        assert torch.equal(one, other)


def test_keys_far_from_the_origin():
    ours, exact = both(5000, "euclidean", offset=1000.0)
    queries = torch.randn(101, 5) + 1000
    assert ours.num_probes < 35
    assert recall(ours.search(queries, 32).ids, exact.search(queries, 32).ids) >= 0.9
    ours.num_probes = 70
    assert torch.equal(ours.search(queries, 32).ids, exact.search(queries, 32).ids)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_keys_that_are_all_the_same(measure, value):
    index = ClusterIndex(3, measure=measure)
    index.append(torch.full((5000, 3), value))
    index.append(torch.full((100, 3), value))
    assert index.search(torch.ones(2, 3), 3).ids.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("scale", [1e25, 1e38])
@pytest.mark.parametrize("measure", MEASURES)
def test_keys_whose_squares_are_no_numbers(measure, scale, has_kernels, monkeypatch):
    monkeypatch.setattr("anyattention.native.load.available", lambda: has_kernels)
    torch.manual_seed(1)  # of which the largest number is finite in float32
    ours, exact = both(5000, measure, scale=scale / 2)
    found = ours.search(torch.randn(7, 5), 3).ids
    assert (found >= 0).all()
    other = ClusterIndex(5, measure=measure)
    other.restore(ours.to_bytes())
    assert other.to_bytes() == ours.to_bytes()
    few = torch.full((5000, 5), scale)
    few[7::1000] = 1.0  # whose distances to all others are infinite
    other = ClusterIndex(5, measure=measure)
    other.append(few)
    assert (other.search(few[[7, 0]], 3).ids >= 0).all()
    if measure == "cosine":
        queries = torch.randn(50, 5)
        assert recall(ours.search(queries, 9).ids, exact.search(queries, 9).ids) >= 0.9


@pytest.mark.parametrize("measure", MEASURES)
def test_clusters_smaller_than_k_are_not_all_that_is_found(measure):
    ours, exact = both(5000, measure)
    ours.num_probes = 1
    queries = torch.randn(11, 5)
    assert (ours.search(queries, 300).ids >= 0).all()
    found, expected = ours.search(queries, 5007), exact.search(queries, 5007)
    assert torch.equal(found.ids.sort(1).values, torch.arange(-7, 5000).clamp(min=-1).expand(11, -1))
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("measure", MEASURES)
def test_few_memories_left_of_many(measure):
    ours, exact = both(9000, measure)
    gone = torch.randperm(9000)[:8600]
    for index in (ours, exact):
        index.delete(gone)
    assert len(ours._centroids) == 1
    queries = torch.randn(11, 5)
    assert torch.equal(ours.search(queries, 32).ids, exact.search(queries, 32).ids)
    ours.delete(ours.known_ids())
    assert len(ours) == 0
    assert ours.gather(torch.tensor([[-1, -1]])).tolist() == [[[0.0] * 5] * 2]
    assert ours.search(queries, 2).ids.tolist() == [[-1, -1]] * 11
    assert ours.append(queries).tolist() == list(range(9000, 9011))
    assert ours.gather(torch.tensor([9003])).tolist() == queries[3:4].tolist()


@pytest.mark.parametrize("num_probes", [ALL, None])
@pytest.mark.parametrize("measure", MEASURES)
def test_random_operations(measure, num_probes, small, monkeypatch):
    calls = {"_learn": 0, "_arrange": 0}

    def count(name):
        function = getattr(ClusterIndex, name)

        def counted(self):
            calls[name] += 1
            function(self)

        monkeypatch.setattr(ClusterIndex, name, counted)

    for name in calls:
        count(name)
    choose, there, hits, most = random.Random(2), {}, [], 0
    index = ClusterIndex(3, measure=measure, num_probes=num_probes)
    next_id = 0
    for turn in range(340):
        step = choose.random()
        if step < (0.5 if turn % 200 < 140 else 0.1):
            keys = torch.randn(choose.choice([0, 1, 2, 7, 30]), 3)
            ids = index.append(keys).tolist()
            assert ids == list(range(next_id, next_id + len(keys)))
            there.update(zip(ids, keys, strict=True))
            next_id += len(keys)
        elif step < 0.7:
            ids = choose.sample(sorted(there), min(len(there), choose.choice([0, 1, 3, 20])))
            index.delete(torch.tensor(ids, dtype=torch.int64))
            for each in ids:
                del there[each]
        else:
            k = choose.choice([1, 4, 30])
            hits += check_search(index, there, measure, k, is_exact=num_probes == ALL)
        most = max(most, len(index._centroids))
        assert len(index) == len(there)
    assert index.known_ids().tolist() == sorted(there)
    assert torch.equal(index.gather(index.known_ids()), torch.stack([there[each] for each in sorted(there)]))
    assert most > 8
    assert calls["_learn"] > 8
    assert calls["_arrange"] > calls["_learn"] + 10
    assert sum(hits) / len(hits) > 0.8


def check_search(index: ClusterIndex, there: dict[int, Tensor], measure: str, k: int, is_exact: bool) -> list[float]:
    """Which share of what brute force finds the index finds, for each of some queries."""
    queries = torch.randn(5, 3)
    found, scores = index.search(queries, k)
    ids = torch.tensor(sorted(there), dtype=torch.int64)
    count = min(k, len(ids))
    assert (found[:, count:] == -1).all()
    assert scores[:, count:].isneginf().all()
    assert all(each in there for each in found[:, :count].flatten().tolist())  # nothing else, and no slot left
    if count == 0:
        return []
    keys = torch.stack([there[each] for each in sorted(there)]).double()
    if measure == "euclidean":
        alike = -torch.cdist(queries.double(), keys).square()
    elif measure == "cosine":
        alike = torch.nn.functional.cosine_similarity(queries.double()[:, None], keys[None], dim=-1)
    else:
        alike = queries.double() @ keys.T
    best = alike.topk(count, dim=1)
    own = alike.gather(1, torch.searchsorted(ids, found[:, :count].contiguous()))
    torch.testing.assert_close(scores[:, :count].double(), own, rtol=1e-4, atol=1e-5)
    assert all(len(set(row)) == count for row in found[:, :count].tolist())
    if is_exact:
        torch.testing.assert_close(own, best.values, rtol=1e-4, atol=1e-5)
    return (ids[best.indices][:, :, None] == found[:, None]).any(2).double().mean(1).tolist()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("num_probes", [3, None])
def test_an_index_goes_to_bytes_and_back(measure, num_probes, small):
    index = ClusterIndex(5, measure=measure, num_probes=num_probes)
    keys, queries = torch.randn(500, 5), torch.randn(9, 5)
    index.append(keys[:470])
    index.append(keys[470:])  # which wait
    index.delete(torch.tensor([3, 499, 7]))
    other = ClusterIndex(5, measure=measure, num_probes=99)
    other.restore(index.to_bytes())
    assert other.to_bytes() == index.to_bytes()
    for _ in range(3):
        assert other.num_probes == index.num_probes
        for one, two in zip(index.search(queries, 6), other.search(queries, 6), strict=True):
            assert torch.equal(one, two)
        more = torch.randn(400, 5)
        assert torch.equal(index.append(more), other.append(more))
        gone = index.known_ids()[5:50:3]
        for each in (index, other):
            each.delete(gone)
    assert other.append(queries)[0] == 500 + 3 * 400


@pytest.mark.parametrize("measure", MEASURES)
def test_an_empty_index_goes_to_bytes_and_back(measure):
    index, other = ClusterIndex(2, measure=measure), ClusterIndex(2, measure=measure)
    index.append(torch.ones(3, 2))
    index.delete([0, 1, 2])
    other.restore(index.to_bytes())
    assert other.append(torch.eye(2)).tolist() == [3, 4]
    assert other.search(torch.eye(2), 1).ids.tolist() == [[3], [4]]


BROKEN = {
    "ids twice": lambda x: x["ids"].zero_(),
    "a negative id": lambda x: x["ids"].sub_(1),
    "floating ids": lambda x: x.update(ids=x["ids"].double()),
    "ids of two axes": lambda x: x.update(ids=x["ids"][:, None].contiguous()),
    "too few ids": lambda x: x.update(ids=x["ids"][1:].contiguous()),
    "keys in float64": lambda x: x.update(keys=x["keys"].double()),
    "keys that are NaN": lambda x: x["keys"][3].fill_(torch.nan),
    "no clusters": lambda x: x.update(offsets=x["offsets"][:1].clone(), centroids=x["centroids"][:0].clone()),
    "offsets of two axes": lambda x: x.update(offsets=x["offsets"].expand(2, -1).contiguous()),
    "offsets that fall": lambda x: x["offsets"][2].fill_(0),
    "offsets that begin late": lambda x: x["offsets"][0].fill_(1),
    "offsets behind the keys": lambda x: x["offsets"][-1].fill_(999),
    "floating offsets": lambda x: x.update(offsets=x["offsets"].float()),
    "too few centroids": lambda x: x.update(centroids=x["centroids"][1:].contiguous()),
    "another centre": lambda x: x.update(centre=x["centre"][1:].contiguous()),
    "no centre": lambda x: x.pop("centre"),
    "no keys": lambda x: x.pop("keys"),
    "too few numbers": lambda x: x.update(numbers=x["numbers"][1:].contiguous()),
    "no probes": lambda x: x["numbers"][1].fill_(0),
    "learnt from none": lambda x: x["numbers"][3].fill_(0),
    "an id given twice": lambda x: x["numbers"][4].fill_(59),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_other_content_is_refused(change, small):
    index = ClusterIndex(3, measure="euclidean")
    index.append(torch.randn(60, 3))
    tensors = read_tensors(index.to_bytes())
    change(tensors)
    other = ClusterIndex(3, measure="euclidean")
    with pytest.raises(InvalidInputError, match="index: expected an index of clusters, got"):
        other.restore(written_tensors(tensors))
    assert len(other) == 0


def test_content_of_other_indexes_is_refused():
    index = ClusterIndex(3, measure="cosine")
    index.append(torch.randn(60, 3))
    content = index.to_bytes()
    for length in (0, 7, 100, len(content) - 1):
        with pytest.raises(InvalidInputError, match="index: expected an index of clusters, got"):
            ClusterIndex(3, measure="cosine").restore(content[:length])
    for width, measure in ((4, "cosine"), (3, "dot"), (3, "euclidean")):
        with pytest.raises(InvalidInputError, match=rf"index of clusters, keys of width {width} for '{measure}', got"):
            ClusterIndex(width, measure=measure).restore(content)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_same_calls_give_the_same_index(measure, threads):
    keys = torch.randn(7000, 5)

    def content() -> bytes:
        index = ClusterIndex(5, measure=measure)
        for some in keys.split(4500):
            index.append(some)
        index.delete(torch.arange(0, 7000, 11))
        return index.to_bytes()

    threads(1)
    first = content()
    torch.manual_seed(5)
    assert content() == first
    threads(2)
    assert content() == first


def test_num_probes_that_were_set_stay():
    index = ClusterIndex(3)
    index.num_probes = 2
    index.append(torch.randn(5000, 3))
    assert index.num_probes == 2
    with pytest.raises(InvalidInputError, match=r"num_probes: expected .*1.*, got 0"):
        index.num_probes = 0
    with pytest.raises(InvalidInputError, match=r"num_probes: expected .*1.*, got -1"):
        ClusterIndex(3, num_probes=-1)


@pytest.mark.parametrize("measure", MEASURES)
def test_moments(measure, small):
    """An index that is built and searched under modes and transforms is as any other."""
    keys, queries = torch.randn(300, 5), torch.randn(4, 5)

    def built() -> ClusterIndex:
        index = ClusterIndex(5, measure=measure)
        index.append(keys[:200])
        index.append(keys[200:])
        index.delete(torch.tensor([4], device="cpu"))
        return index

    expected, content = built().search(queries, 9), built().to_bytes()
    default = torch.get_default_dtype()
    with torch.inference_mode():
        inferred = built()
        inferred.search(queries, 9)
    with torch.device("meta"):
        hollow = built()
        found = [hollow.search(queries, 9)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = built()
        found.append(narrow.search(queries, 9))
    torch.set_default_dtype(torch.float64)
    try:
        wide = built()
        found.append(wide.search(queries, 9))
    finally:
        torch.set_default_dtype(default)
    index = built()
    gradient = torch.func.grad(lambda x: index.search(x, 9).scores.sum())(queries)
    assert (gradient == 0).all()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(index.known_ids())
    with pytest.raises(UnsupportedError, match="an approximate index is searched where the queries can be read"):
        torch.func.vmap(lambda x: index.search(x[None], 9))(queries)
    for each in (inferred, hollow, narrow, wide, index):
        assert each.to_bytes() == content
        found.append(each.search(queries.clone().requires_grad_(), 9))
        each.append(keys)
        each.delete([0, 300])
    for each in found:
        assert torch.equal(each.ids, expected.ids)


def test_without_kernels_autocast_changes_nothing(small, monkeypatch):
    monkeypatch.setattr("anyattention.native.load.available", lambda: False)
    keys, queries = torch.randn(300, 5), torch.randn(40, 5)
    index, other = ClusterIndex(5), ClusterIndex(5)
    index.append(keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.append(keys)
        found = other.search(queries, 7).ids
    assert other.to_bytes() == index.to_bytes()
    assert torch.equal(found, index.search(queries, 7).ids)


@pytest.mark.parametrize("measure", MEASURES)
def test_queries_may_be_views(measure):
    ours, exact = both(300, measure)
    x = torch.randn(10, 12)
    views = (x[::3, 1:6], x.T[:5].T, x[:1, :5].expand(4, 5), torch._neg_view(x[:, :5].contiguous()))
    for queries in (*views, x[:, :5].double(), x[:, :5].bfloat16()):
        assert torch.equal(ours.search(queries, 4).ids, exact.search(queries, 4).ids)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("measure", MEASURES)
def test_copies_of_an_index_go_on_by_themselves(copied, measure):
    index, queries = both(5000, measure)[0], torch.randn(9, 5)
    content, before = index.to_bytes(), index.search(queries, 7).ids
    twin = copied(index)
    assert twin.append(queries).tolist() == list(range(5000, 5009))
    twin.delete([0])
    assert index.to_bytes() == content
    assert torch.equal(index.search(queries, 7).ids, before)
    twin.delete(torch.arange(5000, 5009))
    index.delete([0])
    assert torch.equal(twin.search(queries, 7).ids, index.search(queries, 7).ids)


def test_memories_are_deleted_under_a_transform():
    index, keys = ClusterIndex(4), torch.randn(500, 4)
    index.append(keys)

    def loss(x):
        index.delete(torch.arange(10))
        return x.sum()

    torch.func.grad(loss)(torch.randn(4))
    query = torch.randn(5, 4)
    assert torch.equal(index.search(query, 7).ids, (query @ keys[10:].T).topk(7).indices + 10)


def test_queries_are_searched_a_part_at_a_time(monkeypatch):
    ours, _ = both(500, "dot")
    query = torch.randn(200, 5)
    expected = ours.search(query, 5).ids
    monkeypatch.setattr(clusters, "_PROBES_AT_ONCE", 1)
    assert torch.equal(ours.search(query, 5).ids, expected)


def test_ids_stay_in_order_while_memories_wait():
    index, keys = ClusterIndex(4), torch.randn(80, 4)
    index.append(keys[:50])
    index.search(torch.randn(1, 4), 1)
    for some in keys[50:].split(7):
        assert torch.equal(index.gather(index.append(some)), some)
    assert index.known_ids().tolist() == list(range(80))
