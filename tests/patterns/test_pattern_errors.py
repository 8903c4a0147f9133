"""What patterns refuse: settings out of range, lengths that do not fit, blocks that are none."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import attend, explain
from anyattention.errors import (
    AttentionError,
    DimensionMismatchError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
)
from anyattention.patterns import (
    Blocks,
    Causal,
    Documents,
    Fixed,
    Full,
    Global,
    Graph,
    Pattern,
    RandomBlocks,
    Strided,
    Window,
)
from anyattention.patterns.spans import Spans

_MASK = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        (Window, (-1, 0), "left: expected an int >= 0, up to 2\\^59, got -1"),
        (Window, (0, -2), "right: expected an int >= 0, up to 2\\^59, got -2"),
        (Window, (1.0, 0), "left: expected an int >= 0, .*got 1.0"),
        (Window, (True, 0), "left: expected an int >= 0, .*got True"),
        (Window, (0, 2**63 - 1), "right: expected an int >= 0, up to 2\\^59, got 9223372036854775807"),
        (Strided, (0, 1), "stride: expected an int >= 1, .*got 0"),
        (Strided, (2, -1), "local: expected an int >= 0, .*got -1"),
        (Fixed, (0, 0), "block: expected an int >= 1, .*got 0"),
        (Fixed, (4, -1), "summary: expected an int >= 0, .*got -1"),
        (Fixed, (4, 5), "summary: expected at most block=4, got 5"),
        (Global, (-1,), "tokens: expected an int >= 0, .*got -1"),
        (Global, (True,), "tokens: expected an int >= 0, .*got True"),
        (Global, ((3, -1),), r"tokens\[1\]: expected an int >= 0, .*got -1"),
        (Global, ((0.5,),), r"tokens\[0\]: expected an int >= 0, .*got 0.5"),
        (Global, ("first",), "tokens: expected a sequence of ints, got 'first'"),
        (Global, (None,), "tokens: expected a sequence of ints, got None"),
        (Documents, ((2, -1),), r"lengths\[1\]: expected an int >= 0, .*got -1"),
        (Documents, (5,), "lengths: expected a sequence of ints, got 5"),
        (Documents, (torch.tensor([1.5]),), r"lengths\[0\]: expected an int >= 0, .*got 1.5"),
        (Documents, (torch.tensor(3),), "lengths: expected a sequence of ints, got tensor"),
        (RandomBlocks, (-1,), "per_row: expected an int >= 0, .*got -1"),
        (RandomBlocks, (1, -1), "seed: expected an int >= 0, .*got -1"),
        (RandomBlocks, (1, 0, 0), "size: expected an int >= 1, .*got 0"),
        (Blocks, (_MASK, 0), "size: expected an int >= 1, .*got 0"),
    ],
)
def test_settings_out_of_range(kind: Any, settings: tuple[Any, ...], match: str) -> None:
    with pytest.raises(InvalidConfigError, match=match):
        kind(*settings)


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (_MASK.float(), r"mask: expected a boolean matrix \(query blocks, key blocks\), got torch.float32 \(2, 3\)"),
        (_MASK[0], r"mask: expected a boolean matrix .*got torch.bool \(3,\)"),
        ([[True]], r"mask: expected a boolean matrix .*got \[\[True\]\]"),
    ],
    ids=["float", "vector", "list"],
)
def test_blocks_need_a_boolean_matrix(mask: Any, match: str) -> None:
    with pytest.raises(InvalidMaskError, match=match):
        Blocks(mask, 2)


_EACH_CORNER = [
    lambda align: Causal(align),
    lambda align: Window(1, 1, align),
    lambda align: Strided(2, 1, align),
    lambda align: Fixed(2, 1, align),
    lambda align: Global(1, align),
]
each_positional = pytest.mark.parametrize("make", _EACH_CORNER, ids=["Causal", "Window", "Strided", "Fixed", "Global"])


@each_positional
def test_another_corner_is_refused(make: Any) -> None:
    with pytest.raises(InvalidConfigError, match="align: expected 'top_left', 'bottom_right' or None, got 'centre'"):
        make("centre")


@each_positional
def test_two_lengths_need_an_alignment(make: Any) -> None:
    pattern = make(None)
    text = f"{type(pattern).__name__}: expected as many queries as keys, or an alignment, got 2 queries and 3 keys"
    index = torch.zeros(1, dtype=torch.int64)
    for call in (
        lambda: pattern.allows(index, index, 2, 3),
        lambda: pattern.spans(2, 3),
        lambda: pattern.to_dense(2, 3),
        lambda: pattern.to_graph(2, 3),
        lambda: pattern.to_blocks(2, 2, 3),
        lambda: pattern.density(2, 3),
        lambda: pattern.max_attended(2, 3),
    ):
        with pytest.raises(DimensionMismatchError, match=text):
            call()


@pytest.mark.parametrize("sizes", [(4, 4), (5, 4), (4, 5), (0, 0)])
def test_documents_add_up(sizes: tuple[int, int]) -> None:
    pattern = Documents((2, 3))
    text = f"Documents: expected 5 queries and keys, the sum of the documents' lengths, got {sizes[0]} queries"
    for call in (pattern.to_dense, pattern.spans, pattern.to_graph):
        with pytest.raises(DimensionMismatchError, match=text):
            call(*sizes)


@pytest.mark.parametrize("sizes", [(4, 4), (5, 6), (4, 7), (0, 0)])
def test_a_mask_of_blocks_fits_the_lengths(sizes: tuple[int, int]) -> None:
    pattern = Blocks(_MASK, 2)
    text = rf"mask: expected \(\d, \d\), blocks of 2 for {sizes[0]} queries and {sizes[1]} keys, got \(2, 3\)"
    for call in (pattern.to_dense, pattern.spans, pattern.to_graph):
        with pytest.raises(DimensionMismatchError, match=text):
            call(*sizes)
    assert pattern.to_dense(3, 5).all()


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "2"])
@pytest.mark.parametrize("pattern", [Full(), Window(1, 1) | Global(1)], ids=str)
def test_blocks_have_a_size(pattern: Pattern, size: Any) -> None:
    with pytest.raises(InvalidConfigError, match=f"size: expected an int >= 1, up to 2\\^59, got {size!r}"):
        pattern.to_blocks(size, 4, 4)


def test_a_graph_answers_for_its_own_sizes() -> None:
    graph = Graph.from_edge_index(torch.tensor([[0], [1]]), num_queries=2, num_keys=3)
    index = torch.zeros(1, dtype=torch.int64)
    for call in (
        lambda: graph.allows(index, index, 3, 3),
        lambda: graph.spans(2, 2),
        lambda: graph.to_blocks(1, 3, 2),
        lambda: graph.density(2),
        lambda: graph.max_attended(3),
    ):
        with pytest.raises(DimensionMismatchError, match=r"\(num_queries, num_keys\): expected \(2, 3\), the graph's"):
            call()


def test_the_largest_settings_run() -> None:
    most = 2**59
    for pattern in (Window(most, most), Strided(most, most), Fixed(most, 0), RandomBlocks(1, most, most)):
        assert pattern.to_dense(3, 3).all()
        assert pattern.to_graph(3, 3).num_edges == 9
        assert pattern.to_blocks(most, 3, 3).tolist() == [[True]]
    assert Global((most,)).to_graph(3, 3).num_edges == 0


def test_a_refusal_is_also_a_value_error() -> None:
    with pytest.raises(ValueError, match="left") as caught:
        Window(-1, 0)
    assert isinstance(caught.value, AttentionError)


class Prefix(Pattern):
    """A user's own; its dataclasses below have the field `lengths`."""

    lengths: Any

    def allows(self, query: Tensor, key: Tensor, num_queries: int, num_keys: int) -> Tensor:
        return (key < self.lengths[0]) & (query >= 0)

    def spans(self, num_queries: int, num_keys: int, *, device: Any = None) -> Spans:
        return Spans.of(torch.arange(num_queries, device=device), 0, min(self.lengths[0], num_keys) - 1)


@dataclass
class ChangingPrefix(Prefix):
    lengths: Any


@dataclass(frozen=True)
class FrozenPrefix(Prefix):
    lengths: Any


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        (ChangingPrefix((2,)), r"got ChangingPrefix \(unhashable type: 'ChangingPrefix'\)"),
        (FrozenPrefix([2]), r"got FrozenPrefix \(unhashable type: 'list'\)"),
        (FrozenPrefix([2]) | Causal(), r"got Union \(unhashable type: 'list'\)"),
    ],
)
def test_a_pattern_of_ones_own_can_be_hashed(pattern: Pattern, match: str) -> None:
    x = torch.randn(1, 5, 2, 4)
    for call in (attend, explain):
        text = rf"^pattern: expected a pattern that can be hashed, {match}\. make its class a @dataclass\(frozen=True\)"
        with pytest.raises(InvalidInputError, match=text):
            call(x, x, x, pattern)


def test_a_frozen_pattern_of_ones_own_runs() -> None:
    x = torch.randn(1, 5, 2, 4)
    pattern = FrozenPrefix((2,))
    for settings in ({}, {"softcap": 3.0}):
        expected = attend(x, x, x, mask=pattern.to_dense(5, 5), **settings).output
        torch.testing.assert_close(attend(x, x, x, pattern, **settings).output, expected)
