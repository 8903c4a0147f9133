"""Patterns made with & and |: the pairs of the parts, by the matrices of the parts."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies
from torch import Tensor

from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidConfigError
from anyattention.patterns import (
    Blocks,
    Causal,
    Documents,
    Fixed,
    Full,
    Global,
    Graph,
    Intersection,
    Pattern,
    RandomBlocks,
    Strided,
    Union,
    Window,
)
from anyattention.patterns.base import Align


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations, each of which would wait for the other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Fixed examples on every run, and no stored ones.
_settings = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=200)


def patterns_of(num_queries: int, num_keys: int, align: Align) -> list[Pattern]:
    """One or two of each kind that these lengths allow."""
    generator = torch.Generator().manual_seed(num_queries * 100 + num_keys)
    edges = torch.rand(num_queries, num_keys, generator=generator) < 0.3
    blocks = torch.rand(-(-num_queries // 4), -(-num_keys // 4), generator=generator) < 0.5
    found: list[Pattern] = [
        Full(),
        Causal(align),
        Window(2, 1, align),
        Window(0, 0, align),
        Strided(3, 1, align),
        Strided(2, 5, align),
        Strided(4, 0, align),
        Fixed(4, 1, align),
        Fixed(3, 3, align),
        Global(2, align),
        Global((1, 2, 5), align),
        Global(0, align),
        RandomBlocks(2, 1, 3),
        RandomBlocks(0),
        Blocks(blocks, 4),
        Graph.from_adjacency(edges),
    ]
    if num_queries == num_keys:
        first = num_queries // 3
        found.append(Documents((first, 0, num_queries - first)))
    return found


def require_pairs(pattern: Pattern, expected: Tensor) -> None:
    """Every form of the pattern has these pairs."""
    num_queries, num_keys = expected.shape
    assert torch.equal(pattern.to_dense(num_queries, num_keys), expected)
    graph = pattern.to_graph(num_queries, num_keys)
    assert (graph.num_queries, graph.num_keys) == (num_queries, num_keys)
    assert torch.equal(graph.edge_index.flip(0).T, expected.nonzero())
    spans = pattern.spans(num_queries, num_keys)
    assert spans.num_pairs == int(expected.sum())
    assert bool((spans.count >= 1).all())
    assert pattern.max_attended(num_queries, num_keys) == (int(expected.sum(1).max()) if num_queries else 0)
    rows, columns = -(-num_queries // 3), -(-num_keys // 3)
    padded = F.pad(expected, (0, 3 * columns - num_keys, 0, 3 * rows - num_queries))
    blocks = padded.reshape(rows, 3, columns, 3).any(3).any(1)
    assert torch.equal(pattern.to_blocks(3, num_queries, num_keys), blocks)


@pytest.mark.parametrize("position", range(17))
@pytest.mark.parametrize(
    ("sizes", "align"),
    [((7, 7), "top_left"), ((4, 9), "bottom_right")],
)
def test_each_two_patterns(position: int, sizes: tuple[int, int], align: Align) -> None:
    patterns = patterns_of(*sizes, align)
    first = patterns[position % len(patterns)]
    for second in patterns:
        pairs = first.to_dense(*sizes), second.to_dense(*sizes)
        require_pairs(first & second, pairs[0] & pairs[1])
        require_pairs(first | second, pairs[0] | pairs[1])


@strategies.composite
def compositions(draw: strategies.DrawFn) -> tuple[Pattern, Tensor]:
    """A tree of two to four patterns, and its pairs."""
    sizes = draw(strategies.tuples(strategies.integers(0, 11), strategies.integers(0, 11)))
    align: Align = draw(strategies.sampled_from(["top_left", "bottom_right"]))
    one = strategies.sampled_from(patterns_of(*sizes, align))
    pattern = draw(one)
    pairs = pattern.to_dense(*sizes)
    for _ in range(draw(strategies.integers(1, 3))):
        other = draw(one)
        both = [(pattern, pairs), (other, other.to_dense(*sizes))]
        if draw(strategies.booleans()):
            both.reverse()
        (first, its), (second, theirs) = both
        if draw(strategies.booleans()):
            pattern, pairs = first & second, its & theirs
        else:
            pattern, pairs = first | second, its | theirs
    return pattern, pairs


@_settings
@hypothesis.given(compositions())
def test_trees_of_patterns(drawn: tuple[Pattern, Tensor]) -> None:
    require_pairs(*drawn)


def test_a_union_of_two_trees() -> None:
    first, second = Strided(3, 0) & Causal(), Fixed(4, 1) | Global(1)
    expected = first.to_dense(12, 12) & second.to_dense(12, 12)
    require_pairs(first & second, expected)
    require_pairs((first & second) | Documents((5, 7)), expected | Documents((5, 7)).to_dense(12, 12))


def test_runs_that_touch_become_one() -> None:
    left, right = torch.tensor([[True, False]] * 2), torch.tensor([[False, True]] * 2)
    spans = (Blocks(left, 3) | Blocks(right, 3)).spans(6, 6)
    assert spans.query.tolist() == list(range(6))
    assert spans.count.tolist() == [6] * 6
    apart = (Window(0, 0) | Global((5,))).spans(6, 6)
    assert apart.query.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]


# Alignment


@pytest.mark.parametrize(
    ("pattern", "align"),
    [
        (Causal() & Window(1, 1), None),
        (Causal("top_left") & Window(1, 1), "top_left"),
        (Window(1, 1) | Global(1, "bottom_right"), "bottom_right"),
        (Full() & RandomBlocks(1), None),
        ((Full() | Causal("top_left")) & RandomBlocks(1), "top_left"),
    ],
    ids=str,
)
def test_a_composed_pattern_has_the_alignment_of_its_parts(pattern: Pattern, align: Align | None) -> None:
    assert pattern.align == align


def test_alignments_must_agree() -> None:
    text = "align: expected one alignment in a composed pattern, got bottom_right and top_left"
    with pytest.raises(InvalidConfigError, match=text):
        _ = Causal("top_left") & Window(1, 1, "bottom_right")
    with pytest.raises(InvalidConfigError, match=text):
        _ = (Causal("bottom_right") & Full()) | Global(1, "top_left")


def test_each_part_needs_an_alignment_of_its_own() -> None:
    pattern = Causal("top_left") & Window(1, 1)
    for call in (pattern.to_dense, pattern.to_graph, pattern.spans):
        with pytest.raises(DimensionMismatchError, match="Window: expected as many queries as keys, or an alignment"):
            call(2, 3)


# Graphs as parts


def test_a_graph_with_repeated_edges_is_refused() -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 0], [1, 1, 1]]), num_nodes=2)
    text = "graph: expected each edge once in a composed pattern, got an edge that is repeated"
    with pytest.raises(GraphStructureError, match=text):
        _ = graph & Causal()
    with pytest.raises(GraphStructureError, match=text):
        _ = Full() | graph


def test_a_graph_of_other_sizes_is_refused() -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 1]]), num_nodes=2)
    for pattern in (graph & Causal(), graph | Causal()):
        for call in (pattern.to_dense, pattern.to_graph, pattern.spans, pattern.density):
            with pytest.raises(
                DimensionMismatchError,
                match=r"\(num_queries, num_keys\): expected \(2, 2\), the graph's own, got \(3, 3\)",
            ):
                call(3, 3)


# What else they are


def test_a_composed_pattern_reads_as_it_is_written() -> None:
    window, start = Window(1, 0), Global(1)
    first, second = "Window(left=1, right=0, align=None)", "Global(tokens=1, align=None)"
    assert str(window & start) == f"{first} & {second}"
    assert str(window | start) == f"{first} | {second}"
    assert str((window | start) & Full()) == f"({first} | {second}) & Full()"
    assert str(Full() & (window | start)) == f"Full() & ({first} | {second})"
    assert str((window & start) | Full()) == f"{first} & {second} | Full()"
    assert str((window | start) | Full()) == f"{first} | {second} | Full()"


def test_composed_patterns_are_equal_by_value() -> None:
    assert Causal() & Window(1, 1) == Causal() & Window(1, 1)
    assert hash(Causal() | Window(1, 1)) == hash(Causal() | Window(1, 1))
    assert Causal() & Window(1, 1) != Causal() | Window(1, 1)
    assert isinstance(Causal() & Full(), Intersection)
    assert isinstance(Causal() | Full(), Union)


@pytest.mark.parametrize("other", [None, 3, torch.ones(2, 2, dtype=torch.bool)], ids=["none", "int", "tensor"])
def test_only_patterns_compose(other: object) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = Causal() & other  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = Causal() | other  # pyright: ignore[reportOperatorIssue]
