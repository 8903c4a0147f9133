"""Attention to memories against dense attention in which all but the chosen ones are hidden."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from anyattention import MemoryAttentionConfig, load, save
from anyattention.errors import DimensionMismatchError, InvalidConfigError, InvalidInputError, UnsupportedError
from anyattention.nn import MemoryAttention
from anyattention.testing import check_attention

F64 = torch.float64
MEASURES = ("dot", "cosine", "euclidean")


def a_memory(count: int = 11, **settings) -> MemoryAttention:
    given = {"value_dim": 3, "k": 4, "scale": 0.7, "dtype": F64, **settings}
    memory = MemoryAttention(6, 2, **given)
    memory.append(torch.randn(count, 3, dtype=F64), torch.randn(count, 3, dtype=F64))
    return memory.eval()


def likeness(query: Tensor, keys: Tensor, measure: str) -> Tensor:
    if measure == "euclidean":
        return -(query[..., None, :] - keys).square().sum(-1)
    if measure == "cosine":
        return torch.nn.functional.cosine_similarity(query[..., None, :], keys, dim=-1)
    return query @ keys.T


def dense(memory: MemoryAttention, x: Tensor, keys: Tensor, values: Tensor, exclude: Tensor | None = None) -> Tensor:
    """The output by a mask over all memories."""
    config = memory.config
    query = memory.query_projection(x).unflatten(-1, (config.base.num_heads, -1))
    scores = likeness(query, keys, config.measure) * config.get_scale()
    if exclude is not None:
        scores = scores.masked_fill(torch.arange(len(keys)) == exclude[..., None, None], -torch.inf)
    smallest = scores.topk(config.k, dim=-1).values[..., -1:]
    weights = scores.masked_fill(scores < smallest, -torch.inf).softmax(-1)
    return memory.output_projection((weights @ values).sum(-2))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(2, 5, 6), (7, 6)])
def test_equals_dense_attention_with_the_others_hidden(measure, shape):
    memory = a_memory(measure=measure, trainable=True)
    inputs = [torch.randn(shape, dtype=F64, requires_grad=True), *memory.parameters()]
    ours = memory(inputs[0]).output
    expected = dense(memory, inputs[0], memory.keys, memory.values)
    torch.testing.assert_close(ours, expected)
    cotangent = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad(x, inputs, cotangent) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("measure", MEASURES)
def test_first_and_second_derivatives(measure):
    memory = a_memory(7, measure=measure, k=3)

    def output(x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        found = memory.memory_forward(x, keys=keys, values=values)
        return found.output, found.weights

    inputs = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in ((2, 6), (5, 3), (5, 3))]
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


@pytest.mark.parametrize("measure", MEASURES)
def test_derivatives_beside_an_excluded_memory(measure):
    memory = a_memory(4, measure=measure)  # as many as k, so that slots are left
    x = torch.randn(3, 6, dtype=F64, requires_grad=True)
    exclude = torch.tensor([2, -1, 0])
    found = memory.memory_forward(x, exclude=exclude)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(3, 2, dtype=F64))
    assert (found.indices[0] != 2).all()
    assert ((found.indices < 0).sum(-1) == torch.tensor([[1], [0], [1]])).all()
    assert (found.weights[found.indices < 0] == 0).all()
    assert torch.autograd.gradcheck(lambda x: memory(x, exclude=exclude).output, x)
    assert torch.autograd.gradgradcheck(lambda x: memory(x, exclude=exclude).output, x)


@pytest.mark.parametrize("measure", MEASURES)
def test_an_excluded_memory_makes_room_for_the_next(measure):
    memory = a_memory(measure=measure)
    x, exclude = torch.randn(2, 5, 6, dtype=F64), torch.randint(-1, 11, (2, 5))
    expected = dense(memory, x, memory.keys, memory.values, exclude)
    torch.testing.assert_close(memory(x, exclude=exclude).output, expected)


def test_without_any_memory_output_and_gradients_are_zero():
    memory = a_memory(1, k=1, project=True, use_bias=False)
    x = torch.randn(2, 6, dtype=F64, requires_grad=True)
    output, weights, indices = memory.memory_forward(x, exclude=torch.tensor([0, -1]))
    assert indices[:, :, 0].tolist() == [[-1, -1], [0, 0]]
    assert (output[0] == 0).all()
    assert (weights[0] == 0).all()
    grad = torch.autograd.grad(output.sum(), x)[0]
    assert (grad[0] == 0).all()
    everyone = memory(x, exclude=torch.tensor([0, 0])).output
    assert (everyone == 0).all()


@pytest.mark.parametrize("implementation", ["kernels", "gathered"])
def test_a_memory_that_is_not_chosen_does_not_leak(implementation):
    memory = a_memory(trainable=True, measure="euclidean")
    x = torch.randn(5, 6, dtype=F64)
    chosen = memory.memory_forward(x).indices.unique()
    (other, *_) = (n for n in range(11) if n not in chosen)
    with torch.no_grad():
        memory.values[other] = torch.nan
    output = memory(x).output
    if implementation == "gathered":
        output = torch.func.vmap(lambda x: memory(x).output)(x[None])
    assert output.isfinite().all()


def test_nan_in_a_query_shows():
    x = torch.randn(3, 6, dtype=F64)
    x[1, 0] = torch.nan
    output = a_memory()(x).output
    assert output[1].isnan().all()
    assert output[[0, 2]].isfinite().all()


def test_sparse_gradients_are_the_dense_ones():
    memory = a_memory(trainable=True)
    twin = MemoryAttention.from_config(
        MemoryAttentionConfig.from_dict({**memory.config.to_dict(), "sparse_grad": True}), dtype=F64
    )
    twin.load_state_dict(memory.state_dict())
    x, cotangent = torch.randn(3, 6, dtype=F64), torch.randn(3, 6, dtype=F64)
    for each in (memory, twin):
        each(x).output.backward(cotangent)
    for name in ("keys", "values"):
        assert getattr(twin, name).grad.is_sparse
        ours, theirs = getattr(twin, name).grad.coalesce(), getattr(memory, name).grad
        assert ours.indices()[0].tolist() == memory.memory_forward(x).indices.unique().tolist()
        torch.testing.assert_close(ours.to_dense(), theirs)
    optimizer = torch.optim.SparseAdam([twin.keys, twin.values])
    optimizer.step()
    moved = (twin.keys != memory.keys).any(1).nonzero().flatten()
    assert torch.equal(moved, twin.keys.grad.coalesce().indices()[0])
    x.requires_grad_()
    assert torch.autograd.grad(twin(x).output.sum(), twin.keys)[0].is_coalesced()
    with pytest.raises(UnsupportedError, match="sparse_grad=True: sparse gradients are not differentiated again"):
        torch.autograd.grad(twin(x).output.sum(), [x, twin.keys], create_graph=True)


def test_a_slot_without_memory_is_in_no_sparse_gradient():
    memory = a_memory(4, trainable=True, sparse_grad=True)
    memory(torch.randn(2, 6, dtype=F64), exclude=torch.tensor([0, 0])).output.sum().backward()
    assert memory.keys.grad.coalesce().indices()[0].tolist() == [1, 2, 3]


def test_an_encoder_is_trained_against_its_own_memory():
    memory, encoder = MemoryAttention(4, 1, project=False, value_dim=2, k=3), torch.nn.Linear(5, 4)
    images, labels = torch.randn(9, 5), torch.randn(9, 2)
    keys = encoder(images)
    output, _, indices = memory.memory_forward(encoder(images), keys=keys, values=labels, exclude=torch.arange(9))
    assert (indices[:, 0] != torch.arange(9)[:, None]).all()
    output.sum().backward()
    assert (encoder.weight.grad != 0).any()
    memory.append(keys, labels)
    assert not memory.keys.requires_grad
    torch.testing.assert_close(memory(encoder(images), exclude=memory.ids).output, output)


@pytest.mark.parametrize("measure", MEASURES)
def test_transforms_give_what_plain_calls_give(measure):
    memory = a_memory(measure=measure, trainable=True)
    x = torch.randn(3, 2, 6, dtype=F64)
    plain = memory(x).output
    torch.testing.assert_close(torch.func.vmap(lambda x: memory(x).output)(x), plain)

    def loss(parameters, x):
        return torch.func.functional_call(memory, parameters, (x,)).output.square().sum()

    parameters = {name: p.detach() for name, p in memory.named_parameters()}
    by_name = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(memory(x).output.square().sum(), list(memory.parameters()))
    for one, other in zip(by_name.values(), expected, strict=True):
        torch.testing.assert_close(one, other)
    tangent = torch.randn_like(x)
    forward = torch.func.jvp(lambda x: memory(x).output, (x,), (tangent,))[1]
    eps = 1e-6
    difference = (memory(x + eps * tangent).output - memory(x - eps * tangent).output) / (2 * eps)
    torch.testing.assert_close(forward, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_compiles_whole(measure):
    memory = a_memory(measure=measure, trainable=True, dtype=torch.float32)
    x = torch.randn(2, 5, 6, requires_grad=True)
    compiled = torch.compile(memory, fullgraph=True)
    output, cotangent = compiled(x).output, torch.randn(2, 5, 6)
    torch.testing.assert_close(output, memory(x).output)
    inputs = [x, *memory.parameters()]
    for one, other in zip(
        *(torch.autograd.grad(each, inputs, cotangent) for each in (output, memory(x).output)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_is_that_of_the_weights():
    memory = a_memory(dropout=0.4).train()
    x = torch.randn(3, 6, dtype=F64)
    torch.manual_seed(3)
    first = memory(x).output
    torch.manual_seed(3)
    torch.testing.assert_close(torch.func.vmap(lambda x: memory(x).output, randomness="same")(x[None])[0], first)
    assert not torch.allclose(memory.eval()(x).output, first)


def test_autocast_keeps_the_memories_dtype():
    memory = a_memory(dtype=torch.float32)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = memory(x).output
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), memory(x).output, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("trainable", [False, True])
def test_memories_come_and_go(trainable):
    memory = a_memory(5, trainable=trainable)
    held = memory.keys
    ids = memory.append(torch.randn(40, 3), torch.randn(40, 3))
    assert ids.tolist() == list(range(5, 45))
    memory.delete([0, 7, 44])
    assert memory.ids.tolist() == [n for n in range(45) if n not in (0, 7, 44)]
    assert memory.append(torch.zeros(1, 3), torch.zeros(1, 3)).tolist() == [45]
    assert (memory.num_memories, len(memory.keys), len(memory.values)) == (43, 43, 43)
    assert (memory.keys is held) == trainable
    keys, values = memory.gather(torch.tensor([45, 1]))
    assert torch.equal(keys[1], memory.keys[0])
    assert (values[0] == 0).all()
    x = torch.randn(2, 6, dtype=F64)
    torch.testing.assert_close(memory(x).output, dense(memory, x, memory.keys, memory.values))


@pytest.mark.parametrize("measure", MEASURES)
def test_memories_may_come_between_forward_and_backward(measure):
    memory = a_memory(measure=measure)
    x = torch.randn(2, 6, dtype=F64, requires_grad=True)
    before = torch.autograd.grad(memory(x).output.sum(), x)[0]
    output = memory(x).output
    memory.append(torch.randn(3, 3), torch.randn(3, 3))
    memory.delete([0])
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], before)


@pytest.mark.parametrize("measure", MEASURES)
def test_keys_that_a_step_has_changed_are_searched_anew(measure):
    memory = a_memory(measure=measure, trainable=True)
    x = torch.randn(2, 6, dtype=F64)
    memory(x)
    with torch.no_grad():
        memory.keys.copy_(torch.randn_like(memory.keys))
    torch.testing.assert_close(memory(x).output, dense(memory, x, memory.keys, memory.values))
    memory.keys = torch.nn.Parameter(torch.randn_like(memory.keys))
    torch.testing.assert_close(memory(x).output, dense(memory, x, memory.keys, memory.values))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_state_dict_brings_its_number_of_memories(assign, trainable):
    memory = a_memory(7, trainable=trainable)
    memory.delete([2])
    other = MemoryAttention.from_config(memory.config, dtype=F64)
    other.append(torch.randn(3, 3), torch.randn(3, 3))
    other.load_state_dict(copy.deepcopy(memory.state_dict()), assign=assign)
    x = torch.randn(2, 6, dtype=F64)
    assert torch.equal(other.eval()(x).output, memory(x).output)
    assert other.append(torch.zeros(1, 3), torch.zeros(1, 3)).tolist() == [7]
    # The two share nothing that one of them would change for the other.
    assert memory.num_memories == 6


def test_modules_that_share_memory_do_not_write_into_each_others():
    memory = a_memory(7)
    memory.append(torch.randn(1, 3), torch.randn(1, 3))  # with room behind
    other = MemoryAttention.from_config(memory.config, dtype=F64)
    other.load_state_dict(memory.state_dict(), assign=True)
    for each, number in ((memory, 1.0), (other, 2.0)):
        each.append(torch.full((1, 3), number), torch.full((1, 3), number))
    assert (memory.keys[-1] == 1).all()
    assert (other.keys[-1] == 2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([0, 0, 1])}, "ids: they do not ascend from 0 to below next_id"),
        ({"ids": torch.tensor([-1, 0, 1])}, "ids: they do not ascend from 0 to below next_id"),
        ({"next_id": torch.tensor(2)}, "ids: they do not ascend from 0 to below next_id"),
        ({"ids": torch.tensor([0, 1])}, "keys, values and ids are of different numbers of memories"),
        ({"ids": torch.tensor([0.0, 1.0, 2.0])}, "ids are not int64"),
        ({"keys": torch.zeros(3, 4, dtype=F64)}, "size mismatch for keys"),
    ],
)
def test_a_state_dict_that_contradicts_itself_is_refused(change, message):
    memory = a_memory(3, k=2)
    state = {**memory.state_dict(), **change}
    other = a_memory(5, k=2)
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)


def test_copies_are_independent():
    memory, x = a_memory(), torch.randn(2, 6, dtype=F64)
    before = memory(x).output
    for twin in (memory.clone(), copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert torch.equal(twin(x).output, before)
        twin.append(torch.randn(5, 3), torch.randn(5, 3))
        twin.delete([0])
        assert (twin.num_memories, memory.num_memories) == (15, 11)
        assert torch.equal(memory(x).output, before)


def test_an_exact_index_recalls_all():
    assert a_memory().recall(torch.randn(5, 3, dtype=F64)) == 1.0


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    "trainable",
    [{}, {"trainable": True, "num_memories": 7}, {"trainable": True, "num_memories": 7, "sparse_grad": True}],
    ids=str,
)
def test_keeps_the_contract(measure, trainable):
    memory = MemoryAttention(6, 2, value_dim=3, key_dim=5, k=4, measure=measure, **trainable)
    if not trainable:
        memory.append(torch.randn(7, 5), torch.randn(7, 3))
    check_attention(memory, torch.randn(2, 5, 6))
    check_attention(memory, torch.randn(5, 6))


def test_keeps_the_contract_without_projections():
    memory = MemoryAttention(6, 1, value_dim=3, project=False, k=4, check_finite=True)
    memory.append(torch.randn(7, 6), torch.randn(7, 3))
    check_attention(memory, torch.randn(2, 5, 6))
    assert (memory.d_model, memory.parameter_count()) == (3, 0)


def test_what_is_saved_comes_back(tmp_path):
    memory, x = a_memory(), torch.randn(2, 6, dtype=F64)
    memory.delete([3, 4])
    save(memory, tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == memory.config
    for (name, one), (other, two) in zip(memory.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    assert torch.equal(loaded(x).output, memory(x).output)
    assert loaded.append(torch.zeros(1, 3), torch.zeros(1, 3)).tolist() == [11]


def test_a_folder_cannot_ask_for_memories_that_it_does_not_have(tmp_path):
    memory = MemoryAttention(6, 2, trainable=True, num_memories=5, k=2)
    object.__setattr__(memory.config, "num_memories", 10**9)
    save(memory, tmp_path)
    with pytest.raises(
        InvalidConfigError, match=r"at most .* bytes beside such weights, got .*: a smaller num_memories"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measure": "l2"}, "measure: expected one of 'dot', 'cosine', 'euclidean', got 'l2'"),
        ({"index": "lsh"}, "index: expected one of .*, got 'lsh'"),
        ({"k": 0}, "k: expected an int of at least 1"),
        ({"ef_search": 9}, "ef_search: expected its default None here, got 9"),
        ({"index": "faiss", "index_dtype": "bfloat16"}, "index_dtype: expected its default 'float32' here"),
        ({"index": "usearch", "index_dtype": "int8"}, "index_dtype: expected one of 'float32', 'bfloat16', got 'int8'"),
        ({"sparse_grad": True}, "sparse_grad: expected its default False here, got True"),
        ({"num_memories": 5}, "num_memories: expected its default None here, got 5"),
        ({"project": False}, "num_heads: expected 1 with project=False"),
        ({"project": False, "num_heads": 1, "key_dim": 3}, "key_dim: expected d_model=6 with project=False"),
        ({"causal": True}, "causal"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    heads = settings.pop("num_heads", 2)
    with pytest.raises((InvalidConfigError, TypeError), match=message):
        MemoryAttention(6, heads, **settings)


def test_bad_input_is_named():
    memory, x = MemoryAttention(6, 2, value_dim=3, k=4), torch.randn(2, 6)
    with pytest.raises(InvalidInputError, match="memory: expected memories to attend to, got none: append some first"):
        memory(x)
    memory.append(torch.randn(3, 3), torch.randn(3, 3))
    with pytest.raises(InvalidInputError, match="k: expected at most 3, the number of memories, got 4"):
        memory(x)
    with pytest.raises(InvalidInputError, match="k: expected at most 3, the number of memories, got 4"):
        memory.recall(torch.randn(2, 3))
    assert (memory.search(torch.randn(2, 3)).ids[:, 3] == -1).all()
    memory.append(torch.randn(3, 3), torch.randn(3, 3))
    with pytest.raises(InvalidInputError, match="queries: expected at least one, got none"):
        memory.recall(torch.randn(0, 3))
    with pytest.raises(DimensionMismatchError, match=r"x: expected \(queries=2, d_model=6\), got \(2, 5\)"):
        memory(torch.randn(2, 5))
    with pytest.raises(InvalidInputError, match=r"x: expected torch.float32, as the parameters, got torch.float64"):
        memory(x.double())
    with pytest.raises(DimensionMismatchError, match=r"keys: expected \(count=1, key_dim=3\), got \(1, 4\)"):
        memory.append(torch.randn(1, 4), torch.randn(1, 3))
    with pytest.raises(DimensionMismatchError, match=r"values: expected \(count=2, value_dim\), got \(1, 3\)"):
        memory.append(torch.randn(2, 3), torch.randn(1, 3))
    with pytest.raises(
        InvalidInputError, match=r"values: expected finite numbers in torch.float32, got NaN or infinity in 1 of 1 rows"
    ):
        memory.append(torch.randn(1, 3), torch.full((1, 3), torch.nan))
    assert memory.num_memories == 6
    with pytest.raises(InvalidInputError, match="values: expected a tensor, beside keys, got None"):
        memory(x, keys=torch.randn(5, 3))
    with pytest.raises(DimensionMismatchError, match=r"values: expected \(memories=5, value_dim=3\), got \(6, 3\)"):
        memory(x, keys=torch.randn(5, 3), values=torch.randn(6, 3))
    with pytest.raises(InvalidInputError, match=r"keys: expected torch.float32, as the module, got torch.float64"):
        memory(x, keys=torch.randn(5, 3, dtype=F64), values=torch.randn(5, 3))
    with pytest.raises(DimensionMismatchError, match=r"exclude: expected \(queries=2\), got \(3,\)"):
        memory(x, exclude=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match=r"exclude: expected a tensor of torch.int64, got torch.float32"):
        memory(x, exclude=torch.zeros(2))
    with pytest.raises(InvalidInputError, match="exclude: expected ids of the 6 memories, got 1 that are not"):
        memory(x, exclude=torch.tensor([0, 17]))
    with pytest.raises(InvalidInputError, match="return_weights: expected False, True, 'mean' or 'heads'"):
        memory(x, return_weights="all")
    bare = MemoryAttention(3, 1, project=False, k=1)
    bare.append(torch.eye(3), torch.eye(3))
    with pytest.raises(InvalidInputError, match=r"x: expected torch.float32, as the memories, got torch.float64"):
        bare(torch.eye(3, dtype=F64))


@pytest.mark.parametrize("measure", ["cosine", "euclidean"])
def test_a_step_that_leaves_the_version_is_seen(measure):
    memory = MemoryAttention(6, 2, k=2, measure=measure, trainable=True, num_memories=11)
    queries = torch.randn(40, 3)
    memory.search(queries)
    memory.keys.grad = torch.randn_like(memory.keys)
    torch.optim.SGD([memory.keys], lr=9.0, fused=True).step()
    best = likeness(queries, memory.keys.detach(), measure).argmax(-1)
    assert torch.equal(memory.search(queries, 1).ids[:, 0], best)


def test_other_numbers_in_the_same_memory_are_seen():
    memory = MemoryAttention(7, 1, project=False, k=1, measure="cosine", trainable=True, num_memories=7)
    memory.keys.requires_grad_(False)  # read by their address and version alone
    queries = torch.randn(40, 7)
    memory.search(queries)
    memory.keys.data = memory.keys.data.T  # the same address, shape and version
    assert torch.equal(memory.search(queries).ids[:, 0], likeness(queries, memory.keys, "cosine").argmax(-1))
    for _ in range(11):
        memory.search(queries)
        for _ in range(2):  # the second may lie where the one of the search lay
            memory.keys.data = torch.randn(7, 7)
        assert torch.equal(memory.search(queries).ids[:, 0], likeness(queries, memory.keys, "cosine").argmax(-1))


@pytest.mark.parametrize("name", ["keys", "values"])
def test_numbers_that_the_modules_dtype_cannot_hold_are_refused(name):
    memory = MemoryAttention(6, 2, k=2, dtype=torch.float16)
    given = {"keys": torch.ones(5, 3), "values": torch.ones(5, 6)}
    given[name][3, 1] = 1e6
    with pytest.raises(InvalidInputError, match=rf"{name}: expected finite numbers in torch.float16, .* in row 3"):
        memory.append(**given)
    assert memory.num_memories == 0


def test_a_module_made_in_inference_mode_takes_memories_outside():
    with torch.inference_mode():
        memory = MemoryAttention(6, 2, k=2)
    for first in (0, 2):
        assert memory.append(torch.ones(2, 3), torch.ones(2, 6)).tolist() == [first, first + 1]
    assert memory.ids.tolist() == [0, 1, 2, 3]


def test_memory_that_processes_share_is_not_appended_to():
    memory = MemoryAttention(6, 2, k=2)
    for count in (4, 1):  # leaves room behind
        memory.append(torch.ones(count, 3), torch.ones(count, 6))
    memory.share_memory()
    twin = copy.copy(memory)  # as another process has it
    twin._buffers, twin._growing = (
        dict(memory._buffers),
        {name: copy.copy(rows) for name, rows in memory._growing.items()},
    )
    memory.append(torch.full((1, 3), 5.0), torch.ones(1, 6))
    twin.append(torch.full((1, 3), 7.0), torch.ones(1, 6))
    assert (memory.keys[-1] == 5).all()
    assert (twin.keys[-1] == 7).all()


def test_values_of_a_call_get_dense_gradients_beside_sparse_ones():
    memory = MemoryAttention(6, 2, k=2, trainable=True, num_memories=5, sparse_grad=True)
    values = torch.randn(5, 6, requires_grad=True)
    memory(torch.randn(3, 6), values=values * 2).output.sum().backward()
    assert not values.grad.is_sparse
    assert memory.keys.grad.is_sparse


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("measure", MEASURES[1:])
def test_half_precision_weights_are_those_of_float32(measure, dtype):
    memory = MemoryAttention(64, 1, project=False, k=8, value_dim=3, measure=measure, scale=0.2, dtype=dtype)
    size = 400.0 if measure == "cosine" else 1.0  # whose squares float16 does not hold
    memory.append(torch.randn(70, 64) * size, torch.randn(70, 3))
    x = torch.randn(5, 64).to(dtype)
    _, weights, indices = memory.memory_forward(x)
    keys = memory.keys[indices[:, 0]].float()
    scores = torch.stack([likeness(q, key, measure) for q, key in zip(x.float(), keys, strict=True)])
    expected = (scores * 0.2).softmax(-1)
    torch.testing.assert_close(weights[:, 0].float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_distances_within_clusters_that_are_far_apart(sparse_grad):
    memory = MemoryAttention(
        7, 1, project=False, k=4, measure="euclidean", trainable=True, num_memories=22, sparse_grad=sparse_grad
    )
    far = torch.where(torch.arange(22) % 2 == 0, 1000.0, -1000.0)[:, None]
    with torch.no_grad():
        memory.keys.copy_(torch.randn(22, 7) + far)
    x = torch.randn(22, 7) + far
    output, weights, indices = memory.memory_forward(x)
    scores = -(x[:, None].double() - memory.keys.double()[indices[:, 0]]).square().sum(-1)
    torch.testing.assert_close(weights[:, 0].double(), scores.softmax(-1), rtol=1e-4, atol=1e-5)
    output.sum().backward()
    assert memory.keys.grad.is_sparse == sparse_grad


def test_autocast_chooses_the_same_memories_under_a_transform():
    memory = MemoryAttention(64, 1, project=False, k=8)
    memory.append(torch.randn(700, 64), torch.randn(700, 64))
    x = torch.randn(11, 64)
    plain = memory.memory_forward(x).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped = torch.func.vmap(lambda x: memory.memory_forward(x).indices)(x[None])[0]
    assert (mapped == plain).float().mean() > 0.99
