"""Attention to memories that are found in clusters, against attention to those that are found exactly."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from anyattention import MemoryAttentionConfig, load, save
from anyattention.errors import InvalidConfigError, InvalidInputError, UnsupportedError
from anyattention.memory import ClusterIndex
from anyattention.nn import MemoryAttention

MEASURES = ("dot", "cosine", "euclidean")
ALL = 10**6


def module_of(count: int, **settings) -> MemoryAttention:
    memory = MemoryAttention(6, 2, **{"value_dim": 3, "k": 4, "index": "clusters", **settings})
    memory.append(torch.randn(count, 3), torch.randn(count, 3))
    return memory.eval()


def exact_twin(memory: MemoryAttention) -> MemoryAttention:
    settings = {**memory.config.to_dict(), "index": "exact", "num_probes": None}
    twin = MemoryAttention.from_config(MemoryAttentionConfig.from_dict(settings), dtype=memory.values.dtype)
    twin.load_state_dict(memory.state_dict())
    return twin.eval()


@pytest.mark.parametrize("measure", MEASURES)
def test_with_all_clusters_a_module_is_the_exact_one(measure):
    memory = module_of(5000, measure=measure, num_probes=70, trainable=True, dtype=torch.float64)
    exact, x = exact_twin(memory), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    ours, theirs = memory.memory_forward(x), exact.memory_forward(x)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    cotangent = torch.randn_like(x)
    gradients = [
        torch.autograd.grad(found.output, [x, *module.parameters()], cotangent)
        for found, module in ((ours, memory), (theirs, exact))
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_module_follows_its_memories(measure):
    memory = module_of(5000, measure=measure)
    queries = torch.randn(50, 3)
    assert memory.recall(queries, 32) >= 0.9
    index = memory.index
    assert isinstance(index, ClusterIndex)
    memory.append(torch.randn(700, 3), torch.randn(700, 3))
    memory.delete(torch.randperm(5700)[:900])
    memory.append(torch.randn(6000, 3), torch.randn(6000, 3))
    assert memory.index is index
    assert torch.equal(index.known_ids(), memory.ids)
    assert memory.recall(queries, 32) >= 0.9
    index.num_probes = ALL
    x, exact = torch.randn(7, 6), exact_twin(memory)
    exclude = memory.memory_forward(x).indices[:, 0, 0]
    for one, other in zip(
        memory.memory_forward(x, exclude=exclude), exact.memory_forward(x, exclude=exclude), strict=True
    ):
        assert torch.equal(one, other)


def test_a_folder_keeps_the_clusters(tmp_path):
    memory, x = module_of(5000, measure="euclidean", num_probes=3), torch.randn(7, 6)
    memory(x)
    memory.append(torch.randn(10, 3), torch.randn(10, 3))
    save(memory, tmp_path)
    loaded = load(tmp_path)
    assert loaded.index.to_bytes() == memory.index.to_bytes()
    assert loaded.index.num_probes == 3
    assert torch.equal(loaded(x).output, memory(x).output)
    assert loaded.append(torch.zeros(1, 3), torch.zeros(1, 3)).tolist() == [5010]
    save(loaded, tmp_path)
    assert torch.equal(load(tmp_path).index.known_ids(), torch.arange(5011))


def test_a_folder_of_a_memory_that_was_searched_while_empty(tmp_path):
    memory = module_of(0, measure="euclidean")
    memory.search(torch.randn(2, 3))
    save(memory, tmp_path)
    loaded = load(tmp_path)
    loaded.append(torch.eye(3), torch.eye(3))
    assert loaded.search(torch.eye(3), 1).ids.tolist() == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"index": "clusters", "num_probes": 0}, "num_probes: expected .*, got 0"),
        ({"index": "clusters", "num_probes": -3}, "num_probes: expected .*, got -3"),
        ({"index": "clusters", "num_probes": 1.5}, "num_probes: expected .*, got 1.5"),
        ({"index": "clusters", "ef_search": 9}, "ef_search: expected its default None here, got 9"),
        ({"index": "clusters", "index_dtype": "bfloat16"}, "index_dtype: expected its default 'float32' here"),
        ({"num_probes": 2}, "num_probes: expected its default None here, got 2"),
        ({"index": "faiss", "num_probes": 2}, "num_probes: expected its default None here, got 2"),
    ],
)
def test_settings_that_cannot_be_used(settings, match):
    with pytest.raises(InvalidConfigError, match=match):
        MemoryAttention(6, 2, **settings)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), MemoryAttention.clone])
def test_copies_build_indexes_of_their_own(copied):
    memory, queries = module_of(5000), torch.randn(9, 3)
    before = memory.search(queries).ids
    twin = copied(memory)
    assert twin.index is None
    assert torch.equal(twin.search(queries).ids, before)
    twin.delete(before[0])
    twin.append(torch.ones(1, 3), torch.ones(1, 3))
    assert len(twin.index) == 4997
    assert len(memory.index) == 5000
    assert torch.equal(memory.search(queries).ids, before)


@pytest.mark.parametrize("measure", MEASURES)
def test_moments_of_a_module(measure):
    """A module whose index is built under modes and transforms attends as any other, and is trained after it."""
    memory, x = module_of(5000, measure=measure, trainable=True), torch.randn(3, 6)
    cotangent = torch.randn(3, 6)

    def gradients(module: MemoryAttention) -> tuple[Tensor, ...]:
        given = x.clone().requires_grad_()
        return torch.autograd.grad(module(given).output, [given, *module.parameters()], cotangent)

    expected, output = gradients(memory), memory(x).output
    after = memory.index.to_bytes()
    for name in ("inference", "meta", "autocast", "functional", "jvp"):
        twin = copy.deepcopy(memory)
        if name == "inference":
            with torch.inference_mode():
                assert torch.equal(twin(x).output, output)
        elif name == "meta":
            with torch.device("meta"):
                assert torch.equal(twin(x).output, output)
        elif name == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                torch.testing.assert_close(twin(x).output.float(), output, rtol=0.5, atol=0.5)
        elif name == "functional":
            found = torch.func.grad(lambda x, module=twin: (module(x).output * cotangent).sum())(x)
            torch.testing.assert_close(found, expected[0])
        else:
            torch.func.jvp(lambda x, module=twin: module(x).output, (x,), (x,))
        if twin.index is not None:
            assert twin.index.to_bytes() == after, name
        for one, other in zip(gradients(twin), expected, strict=True):
            assert torch.equal(one, other), name
        twin.append(torch.randn(9, 3), torch.randn(9, 3))
        assert len(twin.index) == 5009, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_of_other_dtypes(dtype):
    memory = module_of(5000, dtype=dtype, num_probes=70)
    x, exact = torch.randn(5, 6, dtype=dtype, requires_grad=True), exact_twin(memory)
    found, expected = memory.memory_forward(x), exact.memory_forward(x)
    assert found.output.dtype == dtype
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.output, expected.output)
    assert torch.autograd.grad(found.output.sum(), x)[0].isfinite().all()
    memory.append(torch.randn(3, 3), torch.randn(3, 3))
    assert len(memory.index) == 5003


def test_a_default_dtype_is_not_that_of_a_module_s_index():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        memory = module_of(5000, num_probes=70)
        x = torch.randn(5, 6)
        assert torch.equal(memory(x).output, exact_twin(memory)(x).output)
    finally:
        torch.set_default_dtype(default)


def test_inputs_that_are_views():
    memory = MemoryAttention(3, 1, project=False, k=4, value_dim=2, index="clusters", num_probes=70)
    memory.append(torch.randn(5000, 3), torch.randn(5000, 2))
    exact, x = exact_twin(memory), torch.randn(8, 6)
    for view in (x[:, ::2], x.T[:3].T, x[::2, 2:5], x[:1, :3].expand(4, 3), torch._neg_view(x[:, :3].contiguous())):
        assert torch.equal(memory(view).output, exact(view).output)


def test_nan_in_a_query_shows():
    memory, x = module_of(5000), torch.randn(3, 6)
    x[1, 0] = torch.nan
    output = memory(x).output
    assert output[1].isnan().all()
    assert output[[0, 2]].isfinite().all()


def test_where_the_keys_cannot_be_read_no_index_is_built():
    memory, x = module_of(50), torch.randn(3, 6)
    with pytest.raises(UnsupportedError, match="index='clusters' is built where the keys can be read"):
        torch.func.vmap(lambda keys: torch.func.functional_call(memory, {"keys": keys}, (x,)).output)(
            memory.keys.expand(2, -1, -1)
        )
    assert memory.index is None


def test_a_compiled_module_is_refused():
    memory = torch.compile(module_of(50), backend="eager")
    refusal = pytest.raises(UnsupportedError, match="index='clusters' is built where the keys can be read: neither")
    with refusal, torch.no_grad():  # with gradients PyTorch warns where its compiler gives up
        memory(torch.randn(3, 6))


def test_an_index_of_other_keys_is_refused():
    one, other = module_of(50), module_of(50)
    one.search(torch.randn(1, 3))
    with pytest.raises(InvalidInputError, match="index: expected the keys of the memories, got others"):
        other.restore_index(one.index_content())


@pytest.mark.parametrize("index", ["clusters", "usearch"])
def test_keys_that_are_no_numbers_in_float32_are_named(index, require):
    if index == "usearch":
        require("usearch.index")
    memory = module_of(50, dtype=torch.float64, index=index)
    memory.search(torch.randn(1, 3, dtype=torch.float64))
    large = torch.full((1, 3), 1e39, dtype=torch.float64)
    with pytest.raises(InvalidInputError, match=r"keys: expected finite numbers in torch.float32, got NaN or infinity"):
        memory.append(large, large)
    with pytest.raises(InvalidInputError, match=r"keys: expected finite numbers in torch.float32, got NaN or infinity"):
        memory.search(torch.randn(1, 3, dtype=torch.float64))
    memory.delete(memory.ids[-1:])
    assert memory.search(torch.randn(1, 3, dtype=torch.float64)).ids.max() < 50


def test_keys_with_a_lazy_sign_are_trained():
    memory = MemoryAttention(6, 2, value_dim=3, k=4, trainable=True)
    memory.append(torch.randn(10, 3), torch.randn(10, 3))
    twin, x = copy.deepcopy(memory), torch.randn(5, 6)
    keys = memory.keys.detach().neg()
    memory.keys = torch.nn.Parameter(torch.complex(keys, keys).conj().imag)
    assert memory.keys.is_neg()
    for _ in range(2):
        torch.testing.assert_close(memory(x).output, twin(x).output)
