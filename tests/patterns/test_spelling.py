"""A pattern of positions as words and back."""

import pytest
import torch

from anyattention import Blocks, Causal, Documents, Fixed, Full, Global, Graph, Pattern, RandomBlocks, Strided, Window
from anyattention.patterns.spelling import pattern_of, words_of


class Renamed(Window):
    """A subclass, which may allow other pairs."""


@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        Causal("bottom_right"),
        Window(3, 2, "top_left") & Causal(),
        Strided(5, 1) | Fixed(8, 2) & RandomBlocks(2, seed=2**58, size=4),
        Global(3) | Global((1, 5)) | Global(()),
    ],
    ids=str,
)
def test_the_words_of_a_pattern_give_it_back(pattern: Pattern) -> None:
    words = words_of(pattern)
    assert type(words) is str
    assert pattern_of(words) == pattern


def test_patterns_of_one_length_and_of_others_have_none() -> None:
    graph = Graph.all_pairs(2, 2)
    others = [Documents((2, 3)), Blocks(torch.ones(1, 1) > 0, 2), graph, Renamed(1, 1)]
    assert all(words_of(pattern) == words_of(Causal() | pattern) == "" for pattern in others)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("Window", "1"),
        ("Window", "1", "1", "null", "null"),
        ("Window", "-1", "1", "null"),
        ("Window", "1.5", "1", "null"),
        ("Window", "Causal", "null", "1", "null"),
        ("Window", "__import__('os')", "1", "null"),
        ("Global", '{"a": 1}', "null"),
        ("Intersection", "1", "2"),
        ("Blocks", "null", "2"),
        ("Graph",),
        ("7",),
        ("Causal", '"left"'),
        ("Intersection",) * 100_000,
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_other_words_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        pattern_of(" ".join(words))
