"""Each sparse pattern against its rule, written as loops over single pairs of Python ints."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch

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

Rule = Callable[[int, int], bool]  # (the query's position, key)

_SIZES = [(0, 0), (0, 3), (3, 0), (1, 1), (1, 7), (7, 1), (7, 7), (13, 11), (5, 17), (17, 5), (16, 16)]
_ALIGNS: list[Literal["top_left", "bottom_right"]] = ["top_left", "bottom_right"]


def window(left: int, right: int) -> Rule:
    return lambda position, key: position - left <= key <= position + right


def strided(stride: int, local: int) -> Rule:
    return lambda position, key: abs(key - position) <= local or abs(key - position) % stride == 0


def fixed(block: int, summary: int) -> Rule:
    def rule(position: int, key: int) -> bool:
        begin = block * (position // block)
        return key in range(begin, begin + block) or block - key % block <= summary

    return rule


def tokens(*positions: int) -> Rule:
    return lambda position, key: key in positions or position in positions


_POSITIONAL: list[tuple[Pattern, Rule]] = [
    (Full(), lambda position, key: True),
    (Causal(), lambda position, key: key <= position),
    (Window(2, 1), window(2, 1)),
    (Window(0, 0), window(0, 0)),
    (Window(0, 3), window(0, 3)),
    (Window(40, 40), window(40, 40)),
    (Strided(3, 1), strided(3, 1)),
    (Strided(2, 5), strided(2, 5)),
    (Strided(4, 0), strided(4, 0)),
    (Strided(1, 0), strided(1, 0)),
    (Strided(50, 2), strided(50, 2)),
    (Fixed(4, 1), fixed(4, 1)),
    (Fixed(3, 3), fixed(3, 3)),
    (Fixed(5, 0), fixed(5, 0)),
    (Fixed(1, 0), fixed(1, 0)),
    (Fixed(30, 2), fixed(30, 2)),
    (Global(0), tokens()),
    (Global(2), tokens(0, 1)),
    (Global(40), tokens(*range(40))),
    (Global((5, 1, 2, 1)), tokens(1, 2, 5)),
    (Global((9,)), tokens(9)),
    (Global(()), tokens()),
]


def hashed(number: int) -> int:
    """The finalizer of splitmix64 in 62 bits, in Python's own integers."""
    mask = 2**62 - 1
    number = number * 0x1B03738712FAD5C9 & mask
    number = (number ^ number >> 30) * 0x3F58476D1CE4E5B9 & mask
    number = (number ^ number >> 27) * 0x14D049BB133111EB & mask
    return number ^ number >> 31


def drawn(pattern: RandomBlocks, row: int, columns: int) -> set[int]:
    """The blocks of keys of one block of queries: those of the smallest hashes."""
    start = hashed(hashed(pattern.seed) + row)
    return set(sorted(range(columns), key=lambda column: hashed(start + column))[: pattern.per_row])


def cases() -> list[tuple[Pattern, tuple[int, int], list[list[bool]]]]:
    """(pattern, (num_queries, num_keys), allowed pairs)."""
    found: list[tuple[Pattern, tuple[int, int], list[list[bool]]]] = []
    generator = torch.Generator().manual_seed(0)
    for num_queries, num_keys in _SIZES:
        queries, keys = range(num_queries), range(num_keys)
        for plain, rule in _POSITIONAL:
            for align in _ALIGNS if not isinstance(plain, Full) else _ALIGNS[:1]:
                offset = num_keys - num_queries if align == "bottom_right" else 0
                pattern = plain if isinstance(plain, Full) else replace(plain, align=align)  # pyright: ignore
                expected = [[rule(query + offset, key) for key in keys] for query in queries]
                found.append((pattern, (num_queries, num_keys), expected))
        for pattern in (RandomBlocks(2, 1, 3), RandomBlocks(0), RandomBlocks(9, 0, 4), RandomBlocks(1, 5, 1)):
            chosen = [drawn(pattern, query // pattern.size, -(-num_keys // pattern.size)) for query in queries]
            expected = [[key // pattern.size in chosen[query] for key in keys] for query in queries]
            found.append((pattern, (num_queries, num_keys), expected))
        for size in (1, 4, 20):
            mask = torch.rand(-(-num_queries // size), -(-num_keys // size), generator=generator) < 0.5
            listed = mask.tolist()
            expected = [[listed[query // size][key // size] for key in keys] for query in queries]
            found.append((Blocks(mask, size), (num_queries, num_keys), expected))
    for lengths in ((), (0,), (1,), (3, 0, 4), (0, 5, 0), (2, 2, 2), (1, 6, 9)):
        of = [number for number, length in enumerate(lengths) for _ in range(length)]
        expected = [[mine == theirs for theirs in of] for mine in of]
        found.append((Documents(lengths), (len(of), len(of)), expected))
    return found


def name_of(part: object) -> str | None:
    return str(part) if isinstance(part, Pattern | tuple) else "pairs"


def in_every_run(pattern: Pattern, sizes: tuple[int, int]) -> bool:
    """The other sizes are left to `make test-all`."""
    return isinstance(pattern, Documents) or sizes in ((0, 3), (7, 1), (7, 7), (5, 17))


each_case = pytest.mark.parametrize(
    ("pattern", "sizes", "expected"),
    [pytest.param(*case, marks=[] if in_every_run(*case[:2]) else pytest.mark.exhaustive) for case in cases()],
    ids=name_of,
)


def true_pairs(expected: list[list[bool]]) -> list[tuple[int, int]]:
    """(query, key), ordered by query, then key."""
    return [(query, key) for query, row in enumerate(expected) for key, allowed in enumerate(row) if allowed]


def pairs_in(spans: Spans) -> list[tuple[int, int]]:
    """The pairs of all spans, in the order of the spans."""
    columns = (spans.query, spans.start, spans.step, spans.count)
    listed = zip(*(column.tolist() for column in columns), strict=True)
    return [(query, start + step * place) for query, start, step, count in listed for place in range(count)]


@each_case
def test_the_matrix_follows_the_rule(pattern: Pattern, sizes: tuple[int, int], expected: list[list[bool]]) -> None:
    pairs = pattern.to_dense(*sizes)
    assert pairs.dtype == torch.bool
    assert pairs.shape == sizes
    assert pairs.tolist() == expected


@each_case
def test_the_graph_lists_the_pairs_by_query_then_key(
    pattern: Pattern, sizes: tuple[int, int], expected: list[list[bool]]
) -> None:
    graph = pattern.to_graph(*sizes)
    assert (graph.num_queries, graph.num_keys) == sizes
    listed = list(zip(graph.query_index.tolist(), graph.key_index.tolist(), strict=True))
    assert listed == true_pairs(expected)


@each_case
def test_spans_are_disjoint_and_not_empty(pattern: Pattern, sizes: tuple[int, int], expected: list[list[bool]]) -> None:
    spans = pattern.spans(*sizes)
    assert {column.dtype for column in (spans.query, spans.start, spans.step, spans.count)} == {torch.int64}
    assert all(count >= 1 for count in spans.count.tolist())
    assert all(step >= 1 for step in spans.step.tolist())
    listed = pairs_in(spans)
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == true_pairs(expected)


@each_case
def test_blocks_hold_an_allowed_pair(pattern: Pattern, sizes: tuple[int, int], expected: list[list[bool]]) -> None:
    for size in (1, 2, 3, 8, 100):
        rows, columns = (-(-length // size) for length in sizes)
        blocks = [[False] * columns for _ in range(rows)]
        for query, key in true_pairs(expected):
            blocks[query // size][key // size] = True
        found = pattern.to_blocks(size, *sizes)
        assert found.dtype == torch.bool
        assert found.shape == (rows, columns)
        assert found.tolist() == blocks


@each_case
def test_density_and_max_attended_count_the_pairs(
    pattern: Pattern, sizes: tuple[int, int], expected: list[list[bool]]
) -> None:
    num_pairs = sum(map(sum, expected))
    assert pattern.density(*sizes) == (num_pairs / (sizes[0] * sizes[1]) if num_pairs else 0.0)
    assert pattern.max_attended(*sizes) == max(map(sum, expected), default=0)
    if sizes[0] == sizes[1]:
        assert pattern.density(sizes[0]) == pattern.density(*sizes)
        assert pattern.max_attended(sizes[0]) == pattern.max_attended(*sizes)


@each_case
def test_single_pairs_are_answered_too(pattern: Pattern, sizes: tuple[int, int], expected: list[list[bool]]) -> None:
    if 0 in sizes:
        return
    query, key = torch.arange(sizes[0]), torch.arange(sizes[0]) * 3 % sizes[1]
    found = pattern.allows(query, key, *sizes).tolist()
    assert found == [expected[row][column] for row, column in zip(query.tolist(), key.tolist(), strict=True)]


def test_there_are_cases_of_each_pattern() -> None:
    kinds = {type(pattern) for pattern, _, _ in cases()}
    assert kinds == {Full, Causal, Window, Strided, Fixed, Global, RandomBlocks, Documents, Blocks}


# The draw of RandomBlocks


@pytest.mark.parametrize("per_row", [0, 1, 3, 11, 20])
@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_each_row_has_its_number_of_random_blocks(per_row: int, seed: int) -> None:
    blocks = RandomBlocks(per_row, seed, size=4).to_blocks(4, 50, 43)
    assert blocks.sum(1).tolist() == [min(per_row, 11)] * 13


def test_random_blocks_depend_on_the_seed_alone() -> None:
    first = RandomBlocks(2, 3, 4).to_dense(64, 64)
    torch.manual_seed(99)
    assert torch.equal(RandomBlocks(2, 3, 4).to_dense(64, 64), first)
    draws = {tuple(RandomBlocks(2, seed, 4).to_dense(64, 64).flatten().tolist()) for seed in range(20)}
    assert len(draws) == 20


def test_rows_and_columns_are_drawn_evenly() -> None:
    blocks = torch.stack([RandomBlocks(2, seed, 1).to_dense(16, 16) for seed in range(500)])
    counts = blocks.sum(0).double()  # binomial: 500 draws of probability 1/8, standard deviation 7.4
    assert (counts - 62.5).abs().max() < 5 * 7.4
    assert len({tuple(row) for row in blocks[0].tolist()}) > 10


@pytest.mark.parametrize("seed", [0, 1, 12])
def test_a_growing_sequence_exchanges_blocks_for_new_ones_only(seed: int) -> None:
    pattern = RandomBlocks(3, seed, 2)
    for length in range(6, 60, 2):
        before, after = pattern.to_blocks(2, length, length), pattern.to_blocks(2, length + 2, length + 2)
        rows, columns = before.shape
        kept = after[:rows, :columns]
        assert not (kept & ~before).any()
        assert torch.equal((before & ~kept).sum(1), after[:rows, columns:].sum(1))


def test_random_blocks_are_the_same_in_every_version() -> None:
    chosen = [row.nonzero().flatten().tolist() for row in RandomBlocks(2, 3, 1).to_dense(6, 12)]
    assert chosen == [[4, 11], [5, 8], [2, 9], [6, 9], [8, 11], [2, 7]]


# Values and devices


def test_equal_settings_make_equal_patterns() -> None:
    assert Window(1, 2) == Window(1, 2) != Window(1, 2, "top_left")
    assert hash(Global((2, 1, 2))) == hash(Global((1, 2)))
    assert Global((2, 1, 2)) == Global((1, 2)) == Global(torch.tensor([1, 2]))  # pyright: ignore[reportArgumentType]
    assert Documents([1, 2]) == Documents((1, 2)) == Documents(torch.tensor([1, 2]))  # pyright: ignore
    assert Documents(range(3)) == Documents((0, 1, 2))  # pyright: ignore[reportArgumentType]
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert Blocks(mask, 2) != Blocks(mask, 2)
    assert str(Blocks(mask, 2)) == "Blocks(1 x 1, size=2)"


def test_blocks_keep_their_own_mask() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    pattern = Blocks(mask, 2)
    mask[0, 1] = False
    assert pattern.to_graph(4, 4).num_edges == 16


@pytest.mark.parametrize("pattern", [Window(1, 1), Strided(2, 1), Fixed(2, 1), Global(1)], ids=str)
def test_the_device_is_honoured(pattern: Pattern) -> None:
    assert pattern.to_dense(4, 4, device="meta").device.type == "meta"


# Graph as a pattern


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (3, 0), (1, 1), (4, 6), (6, 4)])
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_graph_allows_its_edges(sizes: tuple[int, int], repeats: int) -> None:
    expected = torch.rand(sizes) < 0.4
    edge_index = expected.nonzero().flip(0).T[[1, 0]].repeat(1, repeats)
    graph = Graph.from_edge_index(edge_index, num_queries=sizes[0], num_keys=sizes[1])
    query, key = torch.arange(sizes[0]), torch.arange(sizes[1])
    assert torch.equal(graph.allows(query[:, None], key[None, :], *sizes), expected)
    listed = pairs_in(graph.spans(*sizes))
    assert listed == [tuple(pair) for pair in expected.nonzero().tolist()]
    assert graph.max_attended(*sizes) == (int(expected.sum(1).max()) if sizes[0] else 0)
    assert graph.density(*sizes) == (int(expected.sum()) / expected.numel() if expected.numel() else 0.0)
    assert torch.equal(graph.to_blocks(1, *sizes), expected)
    assert graph.is_simple() == (repeats == 1 or graph.num_edges == 0)
