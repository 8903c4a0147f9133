"""Patterns against others' definitions: FlexAttention's masks, and the index sets of the papers."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, flex_attention, or_masks

from anyattention import attend
from anyattention.patterns import (
    Causal,
    Documents,
    Fixed,
    Full,
    Global,
    Pattern,
    Strided,
    Window,
)

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key)

_LENGTHS = (70, 0, 101, 129)
_DOCUMENT = torch.tensor([number for number, length in enumerate(_LENGTHS) for _ in range(length)])


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query - key <= 40) & (key - query <= 7)


def prefix(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key < 20) | (query < 20)


def document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return _DOCUMENT[query] == _DOCUMENT[key]


def every_ninth(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return ((query - key) % 9 == 0) | ((query - key).abs() <= 2)


def own_block_and_summaries(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query // 64 == key // 64) | (key % 64 >= 61)


_RULES: list[tuple[Pattern, MaskMod]] = [
    (Causal(), causal),
    (Window(40, 7), near),
    (Global(20), prefix),
    (Documents(_LENGTHS), document),
    (Strided(9, 2), every_ninth),
    (Fixed(64, 3), own_block_and_summaries),
    (Causal() & Documents(_LENGTHS), and_masks(causal, document)),
    (Strided(9, 2) & Causal(), and_masks(every_ninth, causal)),
    (Window(40, 7) | Global(20), or_masks(near, prefix)),
    ((Window(40, 7) | Global(20)) & Documents(_LENGTHS), and_masks(or_masks(near, prefix), document)),
    (Fixed(64, 3) & Causal() | Window(40, 7), or_masks(and_masks(own_block_and_summaries, causal), near)),
]


@pytest.mark.parametrize(("pattern", "rule"), _RULES, ids=[str(pattern) for pattern, _ in _RULES])
def test_flex_attention_makes_the_same_mask(pattern: Pattern, rule: MaskMod) -> None:
    mask = create_mask(rule, None, None, 300, 300, device="cpu")[0, 0]
    assert torch.equal(pattern.to_dense(300, 300), mask)
    graph = pattern.to_graph(300, 300)
    assert torch.equal(graph.edge_index.flip(0).T, mask.nonzero())


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize(("pattern", "rule"), _RULES, ids=[str(pattern) for pattern, _ in _RULES])
def test_flex_attention_finds_the_same_blocks(pattern: Pattern, rule: MaskMod, size: int) -> None:
    blocks = create_block_mask(rule, None, None, 300, 300, device="cpu", BLOCK_SIZE=size).to_dense()[0, 0]
    assert torch.equal(pattern.to_blocks(size, 300, 300), blocks.bool())


# Uncompiled it forms all scores, and says so; on the CPU it has no gradients.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.exhaustive)], ids=str)
@pytest.mark.parametrize(("pattern", "rule"), _RULES, ids=[str(pattern) for pattern, _ in _RULES])
def test_flex_attention_gives_the_same_output(pattern: Pattern, rule: MaskMod, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 300, 3, 8, dtype=dtype) for _ in range(3))
    mask = create_block_mask(rule, None, None, 300, 300, device="cpu")
    expected = flex_attention(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=mask).transpose(1, 2)
    torch.testing.assert_close(attend(query, key, value, pattern).output, expected)


def of_index_sets(length: int, keys_of: Callable[[int], set[int]]) -> list[list[bool]]:
    return [[key in keys_of(query) for key in range(length)] for query in range(length)]


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_strided_is_that_of_the_sparse_transformer(stride: int) -> None:
    """A1(i) = {t, ..., i} with t = max(0, i - l), A2(i) = {j <= i: (i - j) mod l = 0}."""

    def keys_of(i: int) -> set[int]:
        return {*range(max(0, i - stride), i + 1)} | {j for j in range(i + 1) if (i - j) % stride == 0}

    pattern = Strided(stride, stride) & Causal()
    assert pattern.to_dense(30, 30).tolist() == of_index_sets(30, keys_of)


@pytest.mark.parametrize(("block", "summary"), [(1, 1), (4, 1), (8, 3)])
def test_fixed_is_that_of_the_sparse_transformer(block: int, summary: int) -> None:
    """A1(i) = {j <= i: floor(j / l) = floor(i / l)}, A2(i) = {j <= i: j mod l in {l - c, ..., l - 1}}."""

    def keys_of(i: int) -> set[int]:
        own = {j for j in range(i + 1) if j // block == i // block}
        return own | {j for j in range(i + 1) if j % block in range(block - summary, block)}

    pattern = Fixed(block, summary) & Causal()
    assert pattern.to_dense(30, 30).tolist() == of_index_sets(30, keys_of)


def test_longformer_is_a_band_and_crosses() -> None:
    length, half, start = 40, 4, (0, 17)
    row = np.arange(length) <= half  # the first row and column of a symmetric Toeplitz matrix
    mask = scipy.linalg.toeplitz(row) > 0
    mask[list(start)] = True
    mask[:, list(start)] = True
    assert (Window(half, half) | Global(start)).to_dense(length, length).tolist() == mask.tolist()


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (2, 5), (90, 1)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(30, 30), (12, 30), (30, 12)])
def test_window_is_a_band_between_two_triangles(left: int, right: int, num_queries: int, num_keys: int) -> None:
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool)
    for align, diagonal in (("top_left", 0), ("bottom_right", num_keys - num_queries)):
        expected = ones.tril(diagonal + right) & ones.triu(diagonal - left)
        assert torch.equal(Window(left, right, align).to_dense(num_queries, num_keys), expected)  # pyright: ignore


def test_documents_are_blocks_on_the_diagonal() -> None:
    expected = np.asarray(scipy.linalg.block_diag(*(np.ones((length, length)) for length in (3, 1, 6)))) > 0
    assert Documents((3, 1, 6)).to_dense(10, 10).tolist() == expected.tolist()


def test_composing_with_full_changes_nothing_or_everything() -> None:
    for pattern, _ in _RULES:
        assert torch.equal((pattern & Full()).to_dense(300, 300), pattern.to_dense(300, 300))
        assert (pattern | Full()).density(300) == 1.0
