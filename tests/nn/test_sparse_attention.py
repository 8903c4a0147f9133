"""SparseAttention: each pattern against dense masked attention, sparse_forward, and what it says of itself."""

import pytest
import torch

from anyattention import Causal, Fixed, Global, Graph, SparseAttentionConfig, Strided, Window, load, save
from anyattention.errors import (
    DimensionMismatchError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    SparseMatrixError,
)
from anyattention.nn import MultiHeadAttention, SparseAttention
from anyattention.testing import check_attention

BATCH, LENGTH, KEYS, WIDTH, HEADS = 3, 13, 7, 12, 3

# Settings, and which (query, key) pairs they mean, written out.
PATTERNS = {
    "local": ({"local_window": 2}, lambda i, j: abs(i - j) <= 2),
    "strided": ({"block_size": 4, "local_window": 2}, lambda i, j: abs(i - j) <= 2 or (i - j) % 4 == 0),
    "fixed": ({"block_size": 5, "num_global_tokens": 2}, lambda i, j: i // 5 == j // 5 or j % 5 >= 3),
    "global": ({"local_window": 1, "num_global_tokens": 2}, lambda i, j: abs(i - j) <= 1 or min(i, j) < 2),
    "block": ({"block_size": 5}, lambda i, j: i // 5 == j // 5),
}
KINDS = [pytest.param(kind, causal, id=f"{kind}{'-causal' * causal}") for kind in PATTERNS for causal in (False, True)]


def allowed(kind, causal, length=LENGTH):
    rule = PATTERNS[kind][1]
    rows = [[rule(i, j) and (j <= i or not causal) for j in range(length)] for i in range(length)]
    return torch.tensor(rows)


def sparse(kind="local", **settings):
    settings = {"dropout": 0.0, "dtype": torch.float64, **PATTERNS[kind][0], **settings}
    return SparseAttention(WIDTH, HEADS, sparsity_pattern=kind, **settings)


def dense_twin(module):
    """Dense attention over every pair with the same weights; a mask is to hide what the pattern leaves out."""
    base = module.config.base.to_dict() | {"causal": False}
    twin = MultiHeadAttention(**base, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    return twin


def features(*lengths):
    return [torch.randn(BATCH, length, WIDTH, dtype=torch.float64, requires_grad=True) for length in lengths]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_same_gradients(one, other, inputs, results, expected):
    """Gradients of the inputs and of all parameters, for the same cotangents on each result."""
    cotangents = [torch.randn_like(result) for result in expected]
    gradients = [
        torch.autograd.grad(parts, [*inputs, *module.parameters()], cotangents)
        for module, parts in ((one, results), (other, expected))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


# Against dense masked attention


@pytest.mark.parametrize(("kind", "causal"), KINDS)
@pytest.mark.parametrize(
    "more", [{}, {"positions": "learned", "qk_norm": True, "scale": 0.7, "use_bias": False}], ids=str
)
def test_each_pattern_is_dense_attention_under_its_mask(kind, causal, more):
    module = sparse(kind, causal=causal, **more)
    twin = dense_twin(module)
    mask = allowed(kind, causal)
    inputs = features(LENGTH, LENGTH, LENGTH)
    query, key = module.pattern.to_graph(LENGTH, LENGTH).edge_index.flip(0)
    assert len(query) == mask.sum()
    actual, expected = module(*inputs, return_weights="heads"), twin(*inputs, mask, return_weights="heads")
    at_pairs = expected.weights[:, :, query, key].transpose(1, 2)
    assert_close(actual.output, expected.output)
    assert_close(actual.weights, at_pairs)
    results = (actual.output, actual.weights)
    assert_same_gradients(module, twin, inputs, results, (expected.output, at_pairs))
    assert_close(module(*inputs, return_weights=True).weights, at_pairs.mean(-1))
    assert module(*inputs).weights is None


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_mask_and_a_bias_act_within_the_pattern(kind):
    module = sparse(kind)
    inputs = features(LENGTH, LENGTH, LENGTH)
    pattern, bias = allowed(kind, False), torch.randn(BATCH, LENGTH, LENGTH, dtype=torch.float64)
    for mask in (torch.rand(LENGTH) < 0.6, torch.rand(LENGTH, LENGTH) < 0.6, torch.rand(BATCH, LENGTH, LENGTH) < 0.6):
        expected = dense_twin(module)(*inputs, mask & pattern, bias=bias)
        assert_close(module(*inputs, mask, bias=bias).output, expected.output)
    heads = torch.rand(BATCH, HEADS, LENGTH, LENGTH) < 0.6
    assert_close(module(*inputs, heads).output, dense_twin(module)(*inputs, heads & pattern).output)


def test_defaults_of_key_and_value():
    module = sparse()
    query, key = features(LENGTH, LENGTH)
    assert torch.equal(module(query).output, module(query, query, query).output)
    assert torch.equal(module(query, key).output, module(query, key, key).output)


def test_lengths_shorter_than_a_window_or_a_block():
    for kind in PATTERNS:
        module = sparse(kind)
        for length in (1, 2, 3):
            (x,) = features(length)
            expected = dense_twin(module)(x, mask=allowed(kind, False, length))
            assert_close(module(x).output, expected.output)


def test_dropout_is_for_training_only():
    module = sparse(dropout=0.5)
    (x,) = features(LENGTH)
    assert not torch.equal(module(x).output, module(x).output)
    assert torch.equal(module.eval()(x).output, module(x).output)


# sparse_forward

CONNECTIVITY = torch.rand(LENGTH, KEYS, generator=torch.Generator().manual_seed(1)) < 0.4
CONNECTIVITY[4] = False  # a query without keys
CONNECTIVITY[:, 2] = False  # a key without queries

FORMATS = {
    "scipy csr": lambda scipy, pairs: scipy.csr_array(pairs.numpy()),
    "scipy csr matrix": lambda scipy, pairs: scipy.csr_matrix(pairs.double().numpy()),
    "scipy csc": lambda scipy, pairs: scipy.csc_array(pairs.numpy()),
    "scipy coo": lambda scipy, pairs: scipy.coo_array(pairs.numpy()),
    "torch csr": lambda scipy, pairs: pairs.double().to_sparse_csr(),
    "torch csc": lambda scipy, pairs: pairs.double().to_sparse_csc(),
    "torch coo": lambda scipy, pairs: pairs.double().to_sparse_coo(),
    "dense": lambda scipy, pairs: pairs,
}
beta = pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|invariant)")


@beta
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("causal", [False, True])
def test_sparse_forward_is_dense_attention_under_the_matrix(name, causal, require):
    connectivity = FORMATS[name](require("scipy.sparse"), CONNECTIVITY)
    module = sparse(causal=causal, positions="sinusoidal")  # neither the window nor causal joins the matrix
    twin = dense_twin(module)
    inputs = features(LENGTH, KEYS, KEYS)
    actual, expected = module.sparse_forward(*inputs, connectivity), twin(*inputs, CONNECTIVITY)
    assert actual.weights.layout == torch.sparse_coo
    assert actual.weights.shape == (BATCH, LENGTH, KEYS)
    assert actual.weights.is_coalesced()
    assert actual.weights.values().numel() == BATCH * CONNECTIVITY.sum()
    assert_close(actual.output, expected.output)
    weights = actual.weights.to_dense()
    assert_close(weights, expected.weights)
    assert_same_gradients(module, twin, inputs, (actual.output, weights), expected)


@beta
def test_the_weights_of_one_sequence_are_a_csr_matrix():
    module = sparse()
    inputs = features(LENGTH, KEYS, KEYS)
    weights = module.sparse_forward(*inputs, CONNECTIVITY).weights
    one = weights[1].to_sparse_csr()
    assert one.crow_indices().tolist() == [0, *CONNECTIVITY.sum(1).cumsum(0).tolist()]
    assert_close(one.to_dense(), weights.to_dense()[1])


def test_the_gradient_reaches_the_values_of_the_weights():
    module = sparse()
    inputs = features(LENGTH, KEYS, KEYS)
    weights = module.sparse_forward(*inputs, CONNECTIVITY).weights
    expected = dense_twin(module)(*inputs, CONNECTIVITY).weights[:, CONNECTIVITY].flatten()
    cotangent = torch.randn_like(expected)
    assert_close(weights.values(), expected)
    pairs = zip(*(torch.autograd.grad(x, inputs[:2], cotangent) for x in (weights.values(), expected)), strict=True)
    for one, other in pairs:
        assert_close(one, other)


def test_unsorted_and_repeated_columns_of_scipy_are_one_pair_each(require):
    columns, offsets = [3, 0, 3, 1, 2, 0], [0, 3, 3, 6]
    matrix = require("scipy.sparse").csr_array(([0.0, 1, 2, 3, 4, 5], columns, offsets), shape=(3, 4))
    pairs = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    module = sparse()
    inputs = features(3, 4, 4)
    actual, expected = module.sparse_forward(*inputs, matrix), dense_twin(module)(*inputs, pairs)
    assert_close(actual.output, expected.output)
    assert_close(actual.weights.to_dense(), expected.weights)
    assert matrix.indices.tolist() == columns  # the caller's matrix stays


def test_repeated_entries_of_torch_coo_are_one_pair():
    indices = torch.tensor([[2, 0, 2, 0], [1, 3, 1, 0]])
    matrix = torch.sparse_coo_tensor(indices, torch.ones(4), (3, 4), check_invariants=True)
    pairs = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    module = sparse()
    inputs = features(3, 4, 4)
    assert_close(module.sparse_forward(*inputs, matrix).output, dense_twin(module)(*inputs, pairs).output)


@beta
def test_unsorted_and_repeated_columns_of_torch_csr_count_each():
    offsets, columns = torch.tensor([0, 3, 3, 4]), torch.tensor([3, 0, 3, 1])
    matrix = torch.sparse_csr_tensor(offsets, columns, torch.ones(4), (3, 4), check_invariants=False)
    counts = torch.tensor([[1, 0, 0, 2], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float64)
    module = sparse()
    inputs = features(3, 4, 4)
    actual = module.sparse_forward(*inputs, matrix)
    # A pair that is there twice has twice the weight: the logarithm of its count is added to its score.
    expected = dense_twin(module)(*inputs, counts > 0, bias=counts.log())
    assert_close(actual.output, expected.output)
    assert_close(actual.weights.to_dense(), expected.weights)
    assert actual.weights.values().numel() == BATCH * 3


def test_a_matrix_without_entries_gives_the_bias_of_the_output_projection():
    module = sparse()
    inputs = features(LENGTH, KEYS, KEYS)
    output, weights = module.sparse_forward(*inputs, torch.zeros(LENGTH, KEYS))
    assert_close(output, module.output_projection.bias.expand_as(output))
    assert weights.values().numel() == 0
    assert torch.equal(weights.to_dense(), torch.zeros(BATCH, LENGTH, KEYS, dtype=torch.float64))


def test_the_pattern_as_a_matrix_gives_what_forward_gives():
    for kind in PATTERNS:
        module = sparse(kind, causal=True)
        (x,) = features(LENGTH)
        one, other = module(x), module.sparse_forward(x, x, x, module.pattern.to_dense(LENGTH, LENGTH))
        assert_close(one.output, other.output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sparse_forward_in_low_precision(dtype):
    module = sparse(dtype=dtype)
    inputs = [x.to(dtype) for x in features(LENGTH, KEYS, KEYS)]
    output, weights = module.sparse_forward(*inputs, CONNECTIVITY)
    assert (output.dtype, weights.dtype) == (dtype, dtype)
    rows = weights.to_dense().float().sum(-1)
    torch.testing.assert_close(rows, CONNECTIVITY.any(1).float().expand_as(rows), rtol=0.02, atol=0.02)


# What it says of itself


@pytest.mark.parametrize(("kind", "causal"), KINDS)
@pytest.mark.parametrize("length", [1, 4, LENGTH, 31])
def test_the_sparsity_ratio_counts_the_pairs_left_out_at_max_seq_len(kind, causal, length):
    module = sparse(kind, causal=causal, max_seq_len=length)
    left_out = (~allowed(kind, causal, length)).sum().item()
    assert module.sparsity_ratio == pytest.approx(left_out / length**2, abs=1e-12)
    # It is what the module computes: a pair left out has no gradient.
    x = torch.randn(1, length, WIDTH, dtype=torch.float64)
    jacobian = (
        torch.autograd.functional.jacobian(lambda value: module(x, x, value).output.sum(-1)[0], x)[:, 0].abs().sum(-1)
    )
    assert torch.equal(jacobian > 0, allowed(kind, causal, length))


@pytest.mark.parametrize(("kind", "causal"), KINDS)
def test_max_attended_positions_is_the_most_keys_of_a_query_at_any_length(kind, causal):
    module = sparse(kind, causal=causal)
    lengths = (LENGTH, 31, 47)
    most = [allowed(kind, causal, length).sum(1).max().item() for length in lengths]
    if kind in ("local", "block") or (kind == "global" and causal):
        assert [module.max_attended_positions] * 3 == most
    else:
        assert module.max_attended_positions is None
        assert most[0] < most[1] < most[2]


def test_patterns_of_the_settings():
    window = Window(2, 2)
    assert sparse("local").pattern == window
    assert sparse("local", causal=True).pattern == window & Causal()
    assert sparse("strided").pattern == Strided(4, 2)
    assert sparse("fixed").pattern == Fixed(5, 2)
    assert sparse("fixed", num_global_tokens=None).pattern == Fixed(5, 1)
    assert sparse("global").pattern == Window(1, 1) | Global(2)
    assert sparse("block").pattern == Fixed(5, 0)
    assert SparseAttention(WIDTH, HEADS).pattern == Window(128, 128)
    assert not sparse().supports_dynamic_sparsity


@pytest.mark.parametrize("kind", PATTERNS)
def test_config_and_files_give_the_module_back(kind, tmp_path):
    module = sparse(kind, causal=True, qk_norm=True, positions="learned", max_seq_len=LENGTH)
    rebuilt = SparseAttention.from_config(module.config, dtype=torch.float64)
    assert (rebuilt.config, rebuilt.pattern) == (module.config, module.pattern)
    assert SparseAttentionConfig.from_json(module.config.to_json()) == module.config
    save(module, tmp_path)
    loaded = load(tmp_path)
    assert (loaded.config, loaded.pattern) == (module.config, module.pattern)
    (x,) = features(LENGTH)
    assert torch.equal(loaded(x).output, module(x).output)
    assert module.clone().pattern == module.pattern
    assert f"12, 3, pattern={module.pattern}" in repr(module)


def test_parameters_are_those_of_multi_head_attention_in_the_same_order():
    settings = {"positions": "learned", "qk_norm": True, "max_seq_len": 5}
    ours, theirs = SparseAttention(WIDTH, HEADS, **settings), MultiHeadAttention(WIDTH, HEADS, **settings)
    theirs.load_state_dict(ours.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert torch.equal(ours.get_parameters(), theirs.get_parameters())


@pytest.mark.parametrize(("kind", "causal"), KINDS)
def test_contract(kind, causal):
    settings = {"causal": causal, "positions": "sinusoidal", "dtype": torch.float32, "dropout": 0.2}
    x = torch.randn(2, 7, WIDTH)
    check_attention(sparse(kind, **settings), x)
    check_attention(sparse(kind, **settings), x, x + 1, x - 1, torch.rand(2, 7, 7) < 0.7, bias=torch.randn(7, 7))


# Bad input


def test_other_settings_are_those_of_the_config():
    with pytest.raises(InvalidConfigError, match=r"^top_k: expected its default None here, got 3"):
        SparseAttention(WIDTH, HEADS, top_k=3)
    with pytest.raises(InvalidConfigError, match=r"^num_global_tokens: expected at most block_size=2 .*'fixed', got 3"):
        SparseAttention(WIDTH, HEADS, sparsity_pattern="fixed", block_size=2, num_global_tokens=3)
    with pytest.raises(InvalidConfigError, match=r"^config: expected SparseAttentionConfig, got AttentionConfig"):
        SparseAttention.from_config(MultiHeadAttention(WIDTH, HEADS).config)


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_that_differ_are_refused(causal):
    for kind in PATTERNS:
        with pytest.raises(
            DimensionMismatchError, match=r"^key: expected as many keys as queries, 13, got 7 keys\. for"
        ):
            sparse(kind, causal=causal)(*features(LENGTH, KEYS))


def test_calls_that_do_not_fit():
    module, (x,) = sparse(positions="learned", max_seq_len=LENGTH), features(LENGTH)
    (long,) = features(LENGTH + 1)
    with pytest.raises(DimensionMismatchError, match=r"^query: expected a length of at most max_seq_len=13.*got 14"):
        module(long)
    with pytest.raises(InvalidMaskError, match="mask_from_blocked"):
        module(x, mask=torch.ones(LENGTH))
    with pytest.raises(
        InvalidInputError, match=r"^query: expected torch\.float64, as the parameters, got torch\.float32"
    ):
        module(x.float())
    with pytest.raises(InvalidInputError, match=r"^return_weights: expected False, True, 'mean' or 'heads', got 'all'"):
        module(x, return_weights="all")


@beta
def test_matrices_that_do_not_fit(require):
    module, inputs = sparse(), features(3, 4, 4)

    def call(matrix):
        return module.sparse_forward(*inputs, matrix)

    with pytest.raises(
        DimensionMismatchError, match=r"^connectivity: expected \(query_length=3, key_length=4\), got \(4, 3\)"
    ):
        call(torch.ones(4, 3))
    with pytest.raises(SparseMatrixError, match=r"expected a scipy\.sparse matrix, .*got Graph"):
        call(Graph.from_adjacency(torch.ones(3, 4)))
    offsets, columns = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 4])
    with pytest.raises(SparseMatrixError, match=r"indices from 0 to 3 \(4 nodes\), got 4 at edge 1"):
        call(torch.sparse_csr_tensor(offsets, columns, torch.ones(2), (3, 4), check_invariants=False))
    matrix = require("scipy.sparse").csr_array(([1.0, 1.0], [0, 3], [0, 1, 1, 2]), shape=(3, 4))
    matrix.indices[1] = -1
    with pytest.raises(SparseMatrixError, match=r"indices from 0 to 3 \(4 nodes\), got -1 at edge 1"):
        call(matrix)
