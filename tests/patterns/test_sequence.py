"""Full and Causal: the pairs they allow, as a matrix and as a Graph."""

import pytest
import torch

from anyattention.errors import DimensionMismatchError, InvalidConfigError
from anyattention.patterns import Causal, Full

_SIZES = [(0, 0), (0, 3), (3, 0), (1, 1), (3, 3), (2, 5), (5, 2)]


@pytest.mark.parametrize(("num_queries", "num_keys"), _SIZES)
def test_full_allows_every_pair(num_queries: int, num_keys: int) -> None:
    pairs = Full().to_dense(num_queries, num_keys)
    assert pairs.dtype == torch.bool
    assert pairs.shape == (num_queries, num_keys)
    assert pairs.all()


@pytest.mark.parametrize(("num_queries", "num_keys"), _SIZES)
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_causal_starts_its_diagonal_at_the_named_corner(align: str, num_queries: int, num_keys: int) -> None:
    pattern = Causal(align=align)  # pyright: ignore[reportArgumentType]
    shift = num_keys - num_queries if align == "bottom_right" else 0
    expected = [[key <= query + shift for key in range(num_keys)] for query in range(num_queries)]
    pairs = pattern.to_dense(num_queries, num_keys)
    assert pairs.dtype == torch.bool
    assert pairs.shape == (num_queries, num_keys)
    assert pairs.tolist() == expected
    assert pattern.offset(num_queries, num_keys) == shift


def test_causal_without_alignment_takes_equal_lengths_only() -> None:
    assert Causal().to_dense(3, 3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    with pytest.raises(
        DimensionMismatchError, match="Causal: expected as many queries as keys, or an alignment, got 2"
    ):
        Causal().to_dense(2, 3)
    with pytest.raises(DimensionMismatchError, match=r"align='top_left' .* or align='bottom_right'"):
        Causal().to_graph(3, 2)


def test_causal_refuses_another_corner() -> None:
    with pytest.raises(InvalidConfigError, match="align: expected 'top_left', 'bottom_right' or None, got 'top_right'"):
        Causal(align="top_right")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pattern", [Full(), Causal("top_left"), Causal("bottom_right")], ids=repr)
@pytest.mark.parametrize(("num_queries", "num_keys"), _SIZES)
def test_to_graph_lists_the_same_pairs_by_query_then_key(
    pattern: Full | Causal, num_queries: int, num_keys: int
) -> None:
    pairs = pattern.to_dense(num_queries, num_keys)
    graph = pattern.to_graph(num_queries, num_keys)
    assert (graph.num_queries, graph.num_keys) == (num_queries, num_keys)
    listed = list(zip(graph.query_index.tolist(), graph.key_index.tolist(), strict=True))
    assert listed == [tuple(pair) for pair in pairs.nonzero().tolist()]


def test_the_device_is_honoured() -> None:
    assert Full().to_dense(2, 3, device="meta").device.type == "meta"
    assert Causal().to_dense(2, 2, device="meta").device.type == "meta"


def test_patterns_are_equal_by_value() -> None:
    assert Full() == Full()
    assert Causal("top_left") == Causal("top_left")
    assert Causal("top_left") != Causal("bottom_right")
