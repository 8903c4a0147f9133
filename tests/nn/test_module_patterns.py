"""Layers of sequences over a pattern: the same as under the pattern's mask, kept by clones, in files."""

import functools
import json

import pytest
import safetensors.torch
import torch

from anyattention import (
    AttentionConfig,
    Causal,
    Documents,
    Fixed,
    Full,
    Global,
    Graph,
    RandomBlocks,
    Strided,
    TopK,
    Window,
    load,
    save,
)
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, UnsupportedError
from anyattention.nn import MultiHeadAttention, ScaledDotProductAttention, SparseAttention
from anyattention.patterns.stored import pattern_from_dict
from anyattention.testing import check_attention

BATCH, LENGTH, KEYS, WIDTH, HEADS = 2, 11, 7, 12, 3

PATTERNS = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(2, 1),
    "causal window": Window(3, 3) & Causal(),
    "strided": Strided(3, 1),
    "global": Window(1, 1) | Global((0, 4)),
    "documents": Documents((4, 0, 7)),
    "random blocks": RandomBlocks(1, seed=5, size=3),
    "graph": Graph.from_adjacency(torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.3),
}


def build(kind, **settings):
    parameters = {"dtype": torch.float64} if kind is MultiHeadAttention else {}
    return kind(WIDTH, HEADS, **{"dropout": 0.0, **parameters, **settings})


def features(*lengths, dtype=torch.float64):
    return [torch.randn(BATCH, length, WIDTH, dtype=dtype, requires_grad=True) for length in lengths]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_pattern_is_the_mask_of_its_pairs(kind, name, causal):
    pattern = PATTERNS[name]
    module, twin = build(kind, pattern=pattern, causal=causal), build(kind, causal=causal)
    twin.load_state_dict(module.state_dict())
    inputs = features(LENGTH, LENGTH, LENGTH)
    mask = pattern.to_dense(LENGTH, LENGTH)
    actual, expected = module(*inputs, return_weights=True), twin(*inputs, mask)
    pairs, weights = actual.weights, expected.weights
    if name not in ("full", "causal"):
        joined = pattern & Causal() if causal else pattern
        key, query = joined.to_graph(LENGTH, LENGTH).edge_index
        weights = weights[:, query, key]
    assert_close(actual.output, expected.output)
    assert_close(pairs, weights)
    cotangents = [torch.randn_like(expected.output), torch.randn_like(weights)]
    sources = [(*inputs, *m.parameters()) for m in (module, twin)]
    ours = torch.autograd.grad([actual.output, pairs], sources[0], cotangents)
    theirs = torch.autograd.grad([expected.output, weights], sources[1], cotangents)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
def test_weights_are_returned_by_default_without_a_pattern_only(kind):
    (x,) = features(LENGTH)
    assert build(kind)(x).weights.shape == (BATCH, LENGTH, LENGTH)
    assert build(kind, causal=True)(x).weights is not None
    for pattern in PATTERNS.values():
        assert build(kind, pattern=pattern)(x).weights is None
    assert build(kind)(x, return_weights=False).weights is None


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_an_aligned_pattern_takes_lengths_that_differ(kind, align):
    inputs = features(KEYS, LENGTH, LENGTH)
    for pattern in (Causal(align=align), Window(2, 1, align=align)):
        module, twin = build(kind, pattern=pattern), build(kind)
        twin.load_state_dict(module.state_dict())
        expected = twin(*inputs, pattern.to_dense(KEYS, LENGTH))
        assert_close(module(*inputs).output, expected.output)
        # With causal the diagonal has no named corner, whatever the pattern's is.
        with pytest.raises(
            DimensionMismatchError, match=r"^causal: expected as many queries as keys, got 7 queries and 11"
        ):
            build(kind, pattern=pattern, causal=True)(*inputs)
        (x,) = features(LENGTH)
        joined = pattern.to_dense(LENGTH, LENGTH) & Causal().to_dense(LENGTH, LENGTH)
        causal = build(kind, pattern=pattern, causal=True)
        twin.load_state_dict(causal.state_dict())
        assert_close(causal(x).output, twin(x, mask=joined).output)
    with pytest.raises(DimensionMismatchError, match=r"^Window: expected as many queries as keys, or an alignment"):
        build(kind, pattern=Window(2, 1))(*inputs)


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
def test_masks_are_of_positions_and_over_a_graph_of_edges(kind):
    inputs = features(LENGTH, LENGTH, LENGTH)
    mask = torch.rand(BATCH, LENGTH, LENGTH) < 0.6
    bias = torch.randn(BATCH, LENGTH, LENGTH, dtype=torch.float64)
    for name in ("window", "graph"):
        pattern = PATTERNS[name]
        module, twin = build(kind, pattern=pattern), build(kind)
        twin.load_state_dict(module.state_dict())
        expected = twin(*inputs, mask & pattern.to_dense(LENGTH, LENGTH), bias=bias).output
        given = (mask, bias)
        if name == "graph":
            given = [x[:, pattern.query_index, pattern.key_index, None].expand(-1, -1, HEADS) for x in given]
        assert_close(module(*inputs, given[0], bias=given[1]).output, expected)


def test_a_repeated_edge_counts_twice():
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 1], [0, 0, 0]]), num_nodes=2)
    module = ScaledDotProductAttention(WIDTH, HEADS, dropout=0.0, pattern=graph)
    value = torch.tensor([0.0, 3.0])[None, :, None].expand(1, 2, WIDTH)
    assert_close(module(torch.zeros(1, 2, WIDTH), value * 0, value).output[0, 0], torch.full((WIDTH,), 2.0))


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
def test_the_pattern_is_kept_beside_the_config(kind):
    pattern = Window(2, 1)
    module = build(kind, pattern=pattern)
    (x,) = features(LENGTH)
    assert module.pattern is pattern
    assert build(kind).pattern is None
    assert "pattern" not in module.config.to_dict()
    assert module.clone().pattern == pattern
    assert torch.equal(module.clone()(x).output, module(x).output)
    assert kind.from_config(module.config, pattern=pattern).pattern is pattern
    assert kind.from_config(module.config).pattern is None
    assert f"12, 3, pattern={pattern}" in repr(module)
    assert "pattern" not in repr(build(kind))


def test_a_clone_has_its_own_graph():
    module = build(MultiHeadAttention, pattern=PATTERNS["graph"])
    (x,) = features(LENGTH)
    assert torch.equal(module.clone()(x).output, module(x).output)


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
def test_save_refuses_a_pattern_of_tensors(kind, tmp_path):
    for pattern, name in ((PATTERNS["graph"], "Graph"), (Causal() & PATTERNS["graph"], "Graph")):
        with pytest.raises(
            UnsupportedError, match=rf"^{name} is not kept in a file: of patterns those of numbers are: "
        ):
            save(build(kind, pattern=pattern), tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
    save(build(kind, causal=True), tmp_path / "folder")


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
@pytest.mark.parametrize(
    "pattern",
    [
        Causal(),
        Full(),
        Window(2, 1, align="top_left"),
        Strided(2, 1) & Causal(),
        (Fixed(3, 1) | Global((0, 4))) & Causal(),
        Documents((2, LENGTH - 2)),
        RandomBlocks(1, seed=3, size=2),
        TopK(2, among=Window(2, 2)),
        TopK(3),
    ],
    ids=str,
)
def test_a_pattern_comes_back_from_a_folder(kind, pattern, tmp_path):
    module = build(kind, pattern=pattern).eval()
    save(module, tmp_path)
    loaded = load(tmp_path)
    assert loaded.pattern == pattern
    assert type(loaded.pattern) is type(pattern)
    (x,) = features(LENGTH)
    assert torch.equal(loaded(x).output, module(x).output)


@pytest.mark.parametrize(
    "pattern",
    [functools.reduce(lambda one, other: one | other, [Window(i, 0) for i in range(40)]), Documents((1,) * 120_000)],
    ids=["deep", "long"],
)
def test_what_could_not_be_loaded_is_not_saved(pattern, tmp_path):
    with pytest.raises(UnsupportedError, match=r"(more than 32 in one another is|over 1,048,576 bytes are) not kept"):
        save(build(MultiHeadAttention, pattern=pattern), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_pattern_that_is_put_in_later_is_checked():
    module = build(MultiHeadAttention)
    module.pattern = "causal"
    with pytest.raises(InvalidConfigError, match=r"^pattern: expected a pattern"):
        module(*features(LENGTH))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "Graph"}, "pattern: expected a kind, one of Causal, .*, got 'Graph'"),
        ({"kind": "os.system"}, "pattern: expected a kind, one of .*, got 'os.system'"),
        ({"kind": ["Causal"]}, "pattern: expected a kind, one of .*, got .'Causal'"),
        (3, "pattern: expected a kind, one of .*, got int"),
        ({"left": 1}, "pattern: expected a kind, one of .*, got None"),
        ({"kind": "Window", "left": 1}, "pattern: expected the settings of Window, got .*missing"),
        ({"kind": "Window", "left": 1, "right": -1}, "right: expected an int >= 0"),
        ({"kind": "Window", "left": 1, "right": 1, "home": 1}, "expected only the settings left, right, align of Win"),
        ({"kind": "Window", "left": {"kind": "Causal"}, "right": 1}, "left: expected an int >= 0"),
        ({"kind": "Union", "first": 1, "second": 2}, "pattern: expected the settings of Union"),
        ({"kind": "Documents", "lengths": "ab"}, "lengths: expected a sequence of ints"),
        ({"kind": "TopK", "k": 1, "among": "Causal"}, "among: expected a pattern or None"),
        (functools.reduce(lambda inner, _: {"kind": "TopK", "k": 1, "among": inner}, range(40), {"kind": "Causal"}),
         "at most 32 patterns in another, got more"),
    ],
)  # fmt: skip
def test_malicious_patterns_are_refused(settings, text):
    with pytest.raises(InvalidConfigError, match=text):
        pattern_from_dict(settings)


def test_only_modules_with_a_pattern_have_one_in_a_folder(tmp_path):
    save(SparseAttention(8, 2), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = SparseAttention(8, 2).state_dict()
    told = {"module": "SparseAttention", "config": SparseAttention(8, 2).config.to_dict(), "pattern": {"kind": "Full"}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InvalidConfigError, match=r"pattern: expected none in SparseAttention, got \{'kind': 'Full'\}"):
        load(tmp_path)


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
def test_patterns_that_cannot_be_are_refused_when_building(kind):
    for wrong in ("causal", torch.ones(3, 3) > 0, Window):
        with pytest.raises(
            InvalidConfigError, match=r"^pattern: expected a pattern \(Causal, Window, Graph, \.\.\.\), TopK or None"
        ):
            kind(WIDTH, HEADS, pattern=wrong)
        with pytest.raises(InvalidConfigError, match=r"^pattern: "):
            kind.from_config(AttentionConfig(WIDTH, HEADS), pattern=wrong)
    twice = Graph.from_edge_index(torch.tensor([[0, 0], [1, 1]]), num_nodes=2)
    with pytest.raises(GraphStructureError, match=r"^graph: expected each edge once in a composed pattern"):
        kind(WIDTH, HEADS, pattern=twice, causal=True)


def test_a_graph_of_other_lengths_is_refused():
    module = build(MultiHeadAttention, pattern=PATTERNS["graph"])
    with pytest.raises(DimensionMismatchError, match=r"^query: .*queries=11.*queries is 11 in the graph"):
        module(*features(KEYS))


@pytest.mark.parametrize("kind", [MultiHeadAttention, ScaledDotProductAttention])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [False, True])
def test_contract(kind, name, causal):
    module = kind(WIDTH, HEADS, dropout=0.1, pattern=PATTERNS[name], causal=causal)
    check_attention(module, *features(LENGTH, LENGTH, dtype=torch.float32))


def test_a_module_over_a_graph_compiles_whole():
    torch._dynamo.reset()
    module = MultiHeadAttention(WIDTH, HEADS, dropout=0.0, pattern=PATTERNS["graph"])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (x,) = features(LENGTH, dtype=torch.float32)
    torch.testing.assert_close(compiled(x).output, module(x).output)
