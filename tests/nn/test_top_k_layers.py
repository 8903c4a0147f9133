"""Layers over chosen keys: dense attention masked to the largest weights, what they say of themselves, files."""

import pytest
import torch

from anyattention import Causal, Graph, SparseAttentionBuilder, SparseAttentionConfig, TopK, Window, load, save
from anyattention.errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
)
from anyattention.nn import MultiHeadAttention, ScaledDotProductAttention, SparseAttention
from anyattention.testing import check_attention

BATCH, LENGTH, KEYS, WIDTH, HEADS = 2, 11, 7, 12, 3
PADDING = torch.arange(LENGTH) < torch.tensor([LENGTH, 6])[:, None]  # (batch, length), True = not padding


def chosen(k=3, **settings):
    settings = {"dropout": 0.0, "dtype": torch.float64, **settings}
    return SparseAttention(WIDTH, HEADS, sparsity_pattern="top_k", top_k=k, **settings)


def over_pattern(kind, pattern, **settings):
    parameters = {"dtype": torch.float64} if kind is MultiHeadAttention else {}
    return kind(WIDTH, HEADS, dropout=0.0, pattern=pattern, **parameters, **settings)


def features(*lengths, dtype=torch.float64):
    return [torch.randn(BATCH, length, WIDTH, dtype=dtype, requires_grad=True) for length in lengths]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_is_dense_attention_of_the_largest(module, k, inputs, allowed, mask=None, bias=None):
    """Against a dense twin whose mask is the k largest of its own weights in each row and head."""
    base = getattr(module.config, "base", module.config)
    settings = base.to_dict() | {"causal": False}
    if isinstance(module, ScaledDotProductAttention):
        twin = ScaledDotProductAttention(WIDTH, HEADS, dropout=0.0)
    else:
        twin = MultiHeadAttention(**settings, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    visible = allowed if mask is None else allowed & mask
    visible = (visible[:, None] if visible.ndim == 3 else visible).expand(BATCH, HEADS, *allowed.shape)
    everything = twin(*inputs, visible, bias=bias, return_weights="heads").weights
    rank = everything.argsort(-1, descending=True).argsort(-1)
    largest = (rank < k) & visible
    expected = twin(*inputs, largest, bias=bias, return_weights="heads")
    actual = module(*inputs, mask, bias=bias, return_weights="heads")
    assert_close(actual.output, expected.output)
    assert_close(module(*inputs, mask, bias=bias).output, expected.output)
    assert actual.weights.is_coalesced()
    assert torch.equal(actual.weights.indices().T, largest.nonzero())
    assert_close(actual.weights.to_dense(), expected.weights)
    mean = module(*inputs, mask, bias=bias, return_weights=True).weights
    assert mean.is_coalesced()
    assert torch.equal(mean.indices().T, largest.any(1).nonzero())
    assert_close(mean.to_dense(), expected.weights.mean(1))
    cotangents = [torch.randn_like(expected.output), torch.randn_like(expected.weights)]
    ours = torch.autograd.grad(
        [actual.output, actual.weights.to_dense()], [*inputs, *module.parameters()], cotangents, retain_graph=True
    )
    theirs = torch.autograd.grad(expected, [*inputs, *twin.parameters()], cotangents, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)
    at_values = torch.autograd.grad(actual.weights.values(), inputs[:2], cotangents[1][largest])
    theirs = torch.autograd.grad(expected.weights, inputs[:2], cotangents[1] * largest)
    for one, other in zip(at_values, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("more", [{}, {"positions": "learned", "qk_norm": True, "scale": 0.7}], ids=str)
def test_sparse_attention_attends_to_the_largest(k, causal, more):
    module = chosen(k, causal=causal, **more)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    inputs = features(LENGTH, LENGTH, LENGTH)
    assert_is_dense_attention_of_the_largest(module, k, inputs, allowed)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_biases_and_padding_are_within_the_choice(causal):
    module = chosen(causal=causal)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    inputs = features(LENGTH, LENGTH, LENGTH)
    bias = torch.randn(BATCH, LENGTH, LENGTH, dtype=torch.float64)
    masks = (
        torch.rand(LENGTH) < 0.6,
        torch.rand(LENGTH, LENGTH) < 0.6,
        torch.rand(BATCH, LENGTH, LENGTH) < 0.6,
        torch.rand(BATCH, HEADS, LENGTH, LENGTH) < 0.6,
        PADDING[:, None].expand(-1, LENGTH, -1),
    )
    for mask in masks:
        assert_is_dense_attention_of_the_largest(module, 3, inputs, allowed, mask)
        assert_is_dense_attention_of_the_largest(module, 3, inputs, allowed, mask, bias)


def test_padding_does_not_leak():
    module, query, memory = chosen(), *features(LENGTH, LENGTH)
    poisoned = torch.where(PADDING[..., None], memory, torch.nan)
    output, weights = module(query, poisoned, mask=PADDING[:, None], return_weights=True)
    assert_close(output, module(query, memory, mask=PADDING[:, None]).output)
    batch, _, key = weights.indices()
    assert PADDING[batch, key].all()
    gradient = torch.autograd.grad(output, memory, torch.randn_like(output))[0]
    assert gradient.isfinite().all()
    assert (gradient[~PADDING] == 0).all()


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(LENGTH, LENGTH), (LENGTH, KEYS), (KEYS, LENGTH)])
def test_layers_that_take_a_pattern_take_a_selection(kind, num_queries, num_keys):
    inputs = features(num_queries, num_keys, num_keys)
    for among in (None, Window(3, 2, align="bottom_right")):
        module = over_pattern(kind, TopK(2, among))
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool)
        allowed = allowed if among is None else among.to_dense(num_queries, num_keys)
        assert_is_dense_attention_of_the_largest(module, 2, inputs, allowed)
        assert module(*inputs).weights is None


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
def test_causal_joins_a_selection(kind):
    module, inputs = over_pattern(kind, TopK(2, Window(3, 3)), causal=True), features(LENGTH, LENGTH, LENGTH)
    allowed = (Window(3, 3) & Causal()).to_dense(LENGTH, LENGTH)
    assert_is_dense_attention_of_the_largest(module, 2, inputs, allowed)
    with pytest.raises(
        DimensionMismatchError, match=r"^causal: expected as many queries as keys, got 11 queries and 7"
    ):
        module(*features(LENGTH, KEYS))


def test_keys_may_be_chosen_among_a_graphs_edges():
    edges = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.4
    module = over_pattern(MultiHeadAttention, Graph.from_adjacency(edges) & TopK(2))
    inputs = features(LENGTH, LENGTH, LENGTH)
    assert_is_dense_attention_of_the_largest(module, 2, inputs, edges)
    # A mask is of positions, since what is chosen has no edges.
    mask = torch.rand(BATCH, LENGTH, LENGTH) < 0.6
    assert_is_dense_attention_of_the_largest(module, 2, inputs, edges, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    module, (x,) = chosen(dtype=dtype), features(LENGTH, dtype=dtype)
    for kind in ("mean", "heads"):
        output, weights = module(x, return_weights=kind)
        assert (output.dtype, weights.dtype) == (dtype, dtype)
        rows = weights.to_dense().float().sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0.02, atol=0.02)


def test_dropout_is_for_training_only():
    module, (x,) = chosen(dropout=0.5), features(LENGTH)
    assert not torch.equal(module(x).output, module(x).output)
    assert torch.equal(module.eval()(x).output, module(x).output)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 3, LENGTH])
def test_what_it_says_of_itself_is_what_it_computes(causal, length):
    module, x = chosen(3, causal=causal, max_seq_len=length), torch.randn(1, length, WIDTH, dtype=torch.float64)
    assert module.supports_dynamic_sparsity
    assert module.max_attended_positions == 3
    assert module.pattern == (TopK(3, Causal()) if causal else TopK(3))
    weights = module(x, return_weights="heads").weights.to_dense()
    left_out = (weights == 0).double().mean((0, 2, 3))
    assert_close(left_out, torch.full((HEADS,), module.sparsity_ratio, dtype=torch.float64))
    most = (weights > 0).sum(-1).max().item()
    assert most == min(3, length) == module.pattern.max_attended(length)


@pytest.mark.parametrize(
    ("selection", "num_queries", "num_keys"),
    [(TopK(2), 5, 3), (TopK(9), 5, 3), (TopK(2, Window(1, 0, "top_left")), 5, 3), (TopK(2), 0, 3), (TopK(2), 3, 0)],
)
def test_a_selection_counts_its_pairs(selection, num_queries, num_keys):
    among = selection.among.to_dense(num_queries, num_keys) if selection.among else torch.ones(num_queries, num_keys)
    counts = among.sum(1).clamp(max=selection.k)
    pairs = num_queries * num_keys
    assert selection.density(num_queries, num_keys) == (counts.sum().item() / pairs if pairs else 0)
    assert selection.max_attended(num_queries, num_keys) == max(counts.tolist(), default=0)


@pytest.mark.parametrize("causal", [False, True])
def test_builder_config_and_files_give_the_module_back(causal, tmp_path):
    module = chosen(causal=causal, qk_norm=True, positions="learned", max_seq_len=LENGTH)
    (x,) = features(LENGTH)
    assert SparseAttentionConfig.from_json(module.config.to_json()) == module.config
    rebuilt = SparseAttention.from_config(module.config, dtype=torch.float64)
    built = SparseAttentionBuilder().d_model(WIDTH).num_heads(HEADS).sparsity_pattern("top_k").top_k(3).causal(causal)
    assert built.build_sparse().pattern == rebuilt.pattern == module.pattern
    save(module, tmp_path)
    for twin in (load(tmp_path), module.clone()):
        assert (twin.config, twin.pattern) == (module.config, module.pattern)
        assert torch.equal(twin(x).output, module(x).output)
    assert f"12, 3, pattern={module.pattern}" in repr(module)


@pytest.mark.parametrize("causal", [False, True])
def test_contract(causal):
    settings = {"causal": causal, "positions": "sinusoidal", "dtype": torch.float32, "dropout": 0.2}
    x = torch.randn(2, 7, WIDTH)
    check_attention(chosen(**settings), x)
    check_attention(chosen(**settings), x, x + 1, x - 1, torch.rand(2, 7, 7) < 0.7, bias=torch.randn(7, 7))
    for kind in (MultiHeadAttention, ScaledDotProductAttention):
        check_attention(kind(WIDTH, HEADS, pattern=Window(3, 1) & TopK(2), causal=causal), x)


def test_sparse_forward_takes_every_stored_pair():
    module, inputs = chosen(1), features(LENGTH, KEYS, KEYS)
    connectivity = torch.rand(LENGTH, KEYS) < 0.5
    twin = SparseAttention(WIDTH, HEADS, dropout=0.0, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    actual, expected = (x.sparse_forward(*inputs, connectivity) for x in (module, twin))
    assert_close(actual.output, expected.output)
    assert_close(actual.weights.to_dense(), expected.weights.to_dense())


def test_a_layer_without_weights_compiles_whole():
    torch._dynamo.reset()
    module, x = chosen(causal=True, dtype=torch.float32), torch.randn(BATCH, LENGTH, WIDTH)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).output, module(x).output)


def test_bad_input(tmp_path):
    (x,) = features(LENGTH)
    with pytest.raises(InvalidConfigError, match=r"^top_k: expected a number with sparsity_pattern='top_k', got None"):
        SparseAttention(WIDTH, HEADS, sparsity_pattern="top_k")
    with pytest.raises(DimensionMismatchError, match=r"^key: expected as many keys as queries, 11, .*or TopK\(k\)"):
        chosen()(*features(LENGTH, KEYS))
    with pytest.raises(InvalidMaskError, match="mask_from_blocked"):
        chosen()(x, mask=torch.ones(LENGTH))
    with pytest.raises(InvalidInputError, match=r"^return_weights: expected False, True, 'mean' or 'heads', got 'all'"):
        chosen()(x, return_weights="all")
    twice = Graph.from_edge_index(torch.tensor([[0, 0], [1, 1]]), num_nodes=2)
    with pytest.raises(GraphStructureError, match=r"^graph: expected each edge once in a composed pattern"):
        twice & TopK(1)
