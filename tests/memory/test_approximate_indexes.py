"""Approximate indexes, of clusters and of other libraries, against the exact one."""

import random
import sys

import pytest
import torch

from anyattention import interfaces
from anyattention.errors import DimensionMismatchError, InvalidInputError, MissingExtraError, UnsupportedError
from anyattention.memory import ClusterIndex, ExactIndex, FaissIndex, UsearchIndex
from anyattention.nn import MemoryAttention

MEASURES = ("dot", "cosine", "euclidean")
KINDS = ("clusters", "usearch", "usearch bfloat16", "faiss", "faiss Flat", "faiss IVF")


@pytest.fixture(params=KINDS)
def kind(request, require):
    if request.param != "clusters":
        require("usearch.index" if request.param.startswith("usearch") else "faiss")
    return request.param


def made(kind: str, key_dim: int, measure: str):
    if kind == "clusters":
        return ClusterIndex(key_dim, measure=measure)
    if kind.startswith("usearch"):
        dtype = torch.bfloat16 if kind.endswith("bfloat16") else torch.float32
        return UsearchIndex(key_dim, measure=measure, dtype=dtype)
    factory = {"faiss": "HNSW16", "faiss Flat": "Flat", "faiss IVF": "IVF1,Flat"}[kind]
    return FaissIndex(key_dim, measure=measure, factory=factory)


def recall(found, expected) -> float:
    return float((found[:, :, None] == expected[:, None]).any(2).double().mean())


@pytest.mark.parametrize("measure", MEASURES)
def test_finds_what_the_exact_index_finds(kind, measure):
    ours, exact = made(kind, 7, measure), ExactIndex(7, measure=measure)
    keys, queries = torch.randn(500, 7), torch.randn(31, 7)
    assert isinstance(ours, interfaces.MemoryIndex)
    for some in keys.split(300):
        assert torch.equal(ours.append(some), exact.append(some))
    gone = torch.randperm(500)[:170]
    for index in (ours, exact):
        index.delete(gone[:50])
        index.delete(gone[50:])
    assert len(ours) == len(exact) == 330
    (found, scores), (expected, best) = ours.search(queries, 9), exact.search(queries, 9)
    if kind in ("clusters", "faiss Flat", "faiss IVF"):
        assert torch.equal(found, expected)
        torch.testing.assert_close(scores, best, rtol=1e-4, atol=1e-5)
    assert not torch.isin(found, gone).any()
    assert recall(found, expected) > 0.9
    assert (scores.diff() <= 0).all()


def test_more_than_half_may_be_deleted(kind):
    index, keys = made(kind, 5, "euclidean"), torch.randn(60, 5)
    index.append(keys)
    index.delete(torch.arange(1, 59))
    assert index.search(keys[[59, 0]], 1).ids.tolist() == [[59], [0]]
    assert index.search(keys[:1], 4).ids.tolist() == [[0, 59, -1, -1]]
    assert index.append(keys[:1]).tolist() == [60]
    tolerance = 2**-8 if kind.endswith("bfloat16") else 1e-6
    gathered, expected = index.gather(torch.tensor([[60, -1]])), torch.stack([keys[0], keys[0] * 0])[None]
    torch.testing.assert_close(gathered, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("measure", MEASURES)
def test_random_operations(kind, measure):
    choose, index, there, next_id = random.Random(1), made(kind, 3, measure), {}, 0
    for _ in range(150):
        step = choose.random()
        if step < 0.4:
            keys = torch.randn(choose.choice([1, 2, 7]), 3)
            ids = index.append(keys)
            assert ids.tolist() == list(range(next_id, next_id + len(keys)))
            there.update(zip(ids.tolist(), keys, strict=True))
            next_id += len(keys)
        elif step < 0.6:
            ids = choose.sample(sorted(there), min(len(there), choose.choice([0, 1, 3, 9])))
            index.delete(torch.tensor(ids, dtype=torch.int64))
            for each in ids:
                del there[each]
        else:
            found = index.search(torch.randn(2, 3), 4).ids
            assert all(int(each) in there or each == -1 for each in found.flatten())
            assert (found == -1).sum() >= 2 * max(4 - len(there), 0)
            assert len(index) == len(there)


@pytest.mark.parametrize("measure", MEASURES)
def test_an_index_goes_to_bytes_and_back(kind, measure):
    index, other, keys = made(kind, 5, measure), made(kind, 5, measure), torch.randn(200, 5)
    index.append(keys)
    index.delete(torch.tensor([3, 199]))
    other.restore(index.to_bytes())
    assert torch.equal(other.known_ids(), index.known_ids())
    assert torch.equal(other.search(keys[:9], 5).ids, index.search(keys[:9], 5).ids)
    for broken in (b"", b"x" * 700, index.to_bytes()[:60]):
        with pytest.raises(InvalidInputError, match="index: expected an index of"):
            made(kind, 5, measure).restore(broken)
    with pytest.raises(InvalidInputError, match=r"index: expected .*keys of width 6"):
        made(kind, 6, measure).restore(index.to_bytes())


def test_an_empty_index_finds_nothing(kind):
    index = made(kind, 3, "dot")
    assert index.search(torch.randn(2, 3), 2).ids.tolist() == [[-1, -1]] * 2
    index.append(torch.randn(0, 3))
    assert len(index) == 0


def test_bad_input_is_named(kind):
    index = made(kind, 3, "dot")
    index.append(torch.randn(5, 3))
    with pytest.raises(DimensionMismatchError, match=r"keys: expected \(count=1, key_dim=3\), got \(1, 4\)"):
        index.append(torch.randn(1, 4))
    with pytest.raises(InvalidInputError, match="keys: expected finite numbers"):
        index.append(torch.full((1, 3), torch.nan))
    with pytest.raises(DimensionMismatchError, match=r"ids: expected \(2,\), one for each key, got \(1,\)"):
        index.append(torch.randn(2, 3), torch.tensor([7]))
    with pytest.raises(InvalidInputError, match=r"ids: expected torch.int64, got torch.float32"):
        index.append(torch.randn(1, 3), torch.tensor([7.0]))
    with pytest.raises(InvalidInputError, match=r"ids: expected a tensor of torch.int64, got torch.float32"):
        index.gather(torch.tensor([2.0]))
    with pytest.raises(InvalidInputError, match=r"ids: expected a tensor of torch.int64, got list"):
        index.gather([2])
    with pytest.raises(InvalidInputError, match="ids: expected ascending ids from 5 on, got 3"):
        index.append(torch.randn(1, 3), torch.tensor([3]))
    with pytest.raises(InvalidInputError, match="ids: expected ids of the 5 memories, got 1 that are not there"):
        index.delete(torch.tensor([9]))
    with pytest.raises(InvalidInputError, match="ids: expected ids of the 5 memories, got 1 that are not there"):
        index.gather(torch.tensor([9]))
    assert len(index) == 5


def test_kinds_that_are_not_known_are_named(require):
    require("faiss")
    require("usearch.index")
    with pytest.raises(InvalidInputError, match=r"dtype: expected torch.float32 or torch.bfloat16, got torch.int8"):
        UsearchIndex(3, dtype=torch.int8)
    with pytest.raises(InvalidInputError, match="factory: expected a kind that faiss knows, got 'Round'"):
        FaissIndex(3, factory="Round")


@pytest.mark.parametrize("name", ["usearch", "faiss"])
def test_a_missing_library_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index" if name == "usearch" else "faiss", None)
    with pytest.raises(MissingExtraError, match=rf"index='{name}' needs {name}.*pip install 'anyattention\[{name}\]'"):
        (UsearchIndex if name == "usearch" else FaissIndex)(3)


@pytest.fixture(params=["clusters", "usearch", "usearch bfloat16", "faiss"])
def memory(request, require):
    index, *dtype = request.param.split()
    if index != "clusters":
        require("usearch.index" if index == "usearch" else "faiss")
    settings = {"index_dtype": dtype[0]} if dtype else {}
    settings |= {"num_probes": 2} if index == "clusters" else {"ef_search": 100}
    memory = MemoryAttention(6, 2, value_dim=3, k=4, index=index, **settings)
    memory.append(torch.randn(300, 3), torch.randn(300, 3))
    return memory.eval()


def test_a_module_attends_to_what_its_index_finds(memory):
    x = torch.randn(2, 5, 6, requires_grad=True)
    found, weights, indices = memory.memory_forward(x)
    memory.delete(indices[0, 0, 0, :2])
    memory.append(torch.randn(20, 3), torch.randn(20, 3))
    exact = MemoryAttention(6, 2, value_dim=3, k=4)
    exact.load_state_dict(memory.state_dict())
    found, weights, indices = memory.memory_forward(x)
    expected = exact.memory_forward(x)
    assert memory.recall(torch.randn(50, 3)) > 0.95
    is_same = (indices == expected.indices).all(-1).all(-1)
    assert is_same.double().mean() > 0.7
    torch.testing.assert_close(found[is_same], expected.output[is_same])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, 2))
    assert torch.autograd.grad(found.sum(), x)[0].isfinite().all()


def test_a_module_builds_its_index_anew_where_the_keys_have_changed(memory):
    x = torch.randn(5, 6)
    memory(x)
    with torch.no_grad():
        memory.keys.copy_(torch.randn_like(memory.keys))
    assert memory.recall(torch.randn(50, 3)) > 0.95
    twin = memory.clone()
    assert twin.recall(torch.randn(50, 3)) > 0.95


def test_what_cannot_be_read_is_not_searched(memory):
    """Under other transforms the index is built and kept as elsewhere."""
    x = torch.randn(3, 5, 6)
    with pytest.raises(UnsupportedError, match="an approximate index is searched where the queries can be read"):
        torch.func.vmap(lambda x: memory(x).output)(x)
    gradient = torch.func.grad(lambda x: memory(x).output.sum())(x)
    index = memory.index
    torch.func.jvp(lambda x: memory(x).output, (x,), (x,))
    assert memory.index is index is not None
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(memory(leaf).output.sum(), leaf)[0])
