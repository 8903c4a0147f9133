"""With positions, queries at the end of the keys are those of the whole sequence."""

from typing import Any

import pytest
import torch

from anyattention import Causal, Full, Global, RelativeBias, TopK, Window
from anyattention.errors import DimensionMismatchError
from anyattention.nn import MultiHeadAttention

PATTERNS = [
    Causal("bottom_right"),
    Window(3, 1, "bottom_right"),
    Window(3, 0, "bottom_right") | Global(1, "bottom_right"),
    TopK(3) & Causal("bottom_right"),
]


def module(pattern: Any, positions: str) -> MultiHeadAttention:
    return MultiHeadAttention(8, 2, pattern=pattern, positions=positions, max_seq_len=9, dtype=torch.float64).eval()


@pytest.mark.parametrize("positions", ["none", "sinusoidal", "learned"])
@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_last_queries_alone_are_those_of_all(pattern: Any, count: int, positions: str) -> None:
    attention, x = module(pattern, positions), torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(x[:, -count:], x).output, attention(x).output[:, -count:])


def test_a_bias_by_distance_says_where_the_queries_stand() -> None:
    attention, x = module(Full(), "sinusoidal"), torch.randn(1, 9, 8, dtype=torch.float64)
    bias = RelativeBias(torch.randn(2, 17, dtype=torch.float64), first=-8, align="bottom_right")
    torch.testing.assert_close(attention(x[:, -2:], x, bias=bias).output, attention(x, bias=bias).output[:, -2:])


@pytest.mark.parametrize("pattern", [None, TopK(9), Window(8, 8, "top_left")], ids=repr)
def test_without_an_end_in_common_both_begin_at_the_first_position(pattern: Any) -> None:
    attention, x = module(pattern, "sinusoidal"), torch.randn(1, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(x[:, :2], x).output, attention(x).output[:, :2])


def test_more_queries_than_keys_end_together_too() -> None:
    attention, x = module(Window(8, 8, "bottom_right"), "sinusoidal"), torch.randn(1, 9, 8, dtype=torch.float64)
    plain = MultiHeadAttention(8, 2, pattern=Window(8, 8, "bottom_right"), dtype=torch.float64).eval()
    plain.load_state_dict(attention.state_dict())
    placed = x + attention.position_table
    expected = plain(placed, placed[:, 7:], x[:, 7:]).output
    torch.testing.assert_close(attention(x, x[:, 7:]).output, expected)


def test_a_position_beyond_the_longest_is_refused() -> None:
    attention = module(Causal("bottom_right"), "learned")
    with pytest.raises(DimensionMismatchError, match="max_seq_len=9"):
        attention(torch.randn(1, 1, 8).double(), torch.randn(1, 10, 8).double())
