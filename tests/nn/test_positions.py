"""Positions: what they come to, against formulas written out for each pair."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Graph, RelativeBias, Window
from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.nn import MultiHeadAttention, SparseAttention
from anyattention.nn.positions import rotary_angles

LENGTH = 9


def build(kind: Any = MultiHeadAttention, **settings: Any) -> Any:
    return kind(24, 3, dropout=0.0, dtype=torch.float64, **settings)


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, 24, dtype=torch.float64)


def expected_output(module: Any, query: Tensor, key: Tensor, score: Any, allowed: Tensor | None = None) -> Tensor:
    """Attention with the score `(query head, key head, query place, key place)` of each pair, one by one."""
    q, k, v = (
        projection(x).unflatten(-1, (3, 8))
        for projection, x in (
            (module.query_projection, query),
            (module.key_projection, key),
            (module.value_projection, key),
        )
    )
    outputs = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(3):
            for i in range(q.shape[1]):
                seen = [j for j in range(k.shape[1]) if allowed is None or allowed[i, j]]
                scores = torch.stack([score(h, q[b, i, h], k[b, j, h], i, j) for j in seen])
                outputs[b, i, h] = scores.softmax(0) @ v[b, seen, h]
    return module.output_projection(outputs.flatten(-2))


def rope_score(theta: float, first: int = 0, ahead: int = 0) -> Any:
    def turned(x: Tensor, place: int) -> Tensor:
        numbers = torch.view_as_complex(torch.stack([x[:4], x[4:]], -1).contiguous())
        angles = torch.tensor([place * theta ** (-2 * c / 8) for c in range(4)], dtype=torch.float64)
        return numbers * torch.exp(1j * angles)

    def score(_: int, q: Tensor, k: Tensor, i: int, j: int) -> Tensor:
        product = turned(q, first + i + ahead) * turned(k, first + j).conj()
        return product.real.sum() / math.sqrt(8)

    return score


def alibi_score(ahead: int = 0) -> Any:
    slopes = [2**-4, 2**-8, 2**-2]  # two heads', then every second of four heads'

    def score(h: int, q: Tensor, k: Tensor, i: int, j: int) -> Tensor:
        return q @ k / math.sqrt(8) - slopes[h] * abs(i + ahead - j)

    return score


@pytest.mark.parametrize("kind", [MultiHeadAttention, SparseAttention])
@pytest.mark.parametrize("theta", [10000.0, 7.0])
def test_rope_turns_queries_and_keys(kind: Any, theta: float) -> None:
    module, x = build(kind, positions="rope", rope_theta=theta), tokens()
    torch.testing.assert_close(module(x).output, expected_output(module, x, x, rope_score(theta)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [MultiHeadAttention, SparseAttention])
def test_alibi_is_a_bias_by_distance(kind: Any) -> None:
    module, x = build(kind, positions="alibi"), tokens()
    torch.testing.assert_close(module(x).output, expected_output(module, x, x, alibi_score()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("positions", "align"),
    [(positions, align) for positions in ("rope", "alibi") for align in ("top_left", "bottom_right")]
    + [("rope", None)],
)
def test_the_last_query_stands_at_the_last_key_where_the_pattern_says_so(positions: Any, align: Any) -> None:
    pattern = None if align is None else Window(20, 20, align=align)
    module, query, key = build(positions=positions, pattern=pattern), tokens(4), tokens()
    ahead = 5 if align == "bottom_right" else 0
    score = rope_score(1e4, ahead=ahead) if positions == "rope" else alibi_score(ahead)
    torch.testing.assert_close(
        module(query, key).output, expected_output(module, query, key, score), rtol=1e-9, atol=1e-9
    )


def test_distances_between_sequences_need_an_alignment() -> None:
    with pytest.raises(DimensionMismatchError, match=r"^bias: expected as many queries as keys, or an alignment"):
        build(positions="alibi")(tokens(4), tokens())


@pytest.mark.parametrize("own", [torch.ones(9, 9) > 0, torch.ones(9, 9).long(), [0.0]])
def test_alibi_takes_no_other_bias_than_floating_ones(own: Any) -> None:
    for module in (build(positions="alibi"), build(positions="alibi", pattern=Graph.from_adjacency(torch.ones(9, 9)))):
        with pytest.raises(InvalidInputError, match=r"^bias: expected "):
            module(tokens(), bias=own)


def test_alibi_takes_no_bias_of_other_shapes() -> None:
    with pytest.raises(DimensionMismatchError, match=r"^bias: expected a shape that broadcasts to"):
        build(positions="alibi")(tokens(), bias=torch.ones(5, 7, dtype=torch.float64))
    over_edges = build(positions="alibi", pattern=Graph.from_adjacency(torch.ones(9, 9)))
    for shape in ((1,), (81, 1), (3, 81, 3), ()):
        with pytest.raises(
            DimensionMismatchError, match=r"^bias: expected \(edges=81,\), \(edges, heads=3\) or \(batch=2"
        ):
            over_edges(tokens(), bias=torch.ones(shape, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match=r"a bias by distance over a Graph"):
        over_edges(tokens(), bias=RelativeBias(torch.ones(1, 1), 0))


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rope", "alibi"])
def test_an_offset_moves_all_positions(positions: Any) -> None:
    module, x = build(positions=positions, causal=True), tokens()
    moved = module(x, position_offset=3).output
    if positions in ("rope", "alibi"):
        # Only distances count.
        torch.testing.assert_close(moved, module(x).output, rtol=1e-9, atol=1e-9)
    else:
        padded = torch.cat([torch.zeros(2, 3, 24, dtype=torch.float64), x], 1)
        is_real = torch.arange(LENGTH + 3) >= 3
        expected = module(padded, mask=is_real[None]).output[:, 3:]
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(moved, module(x).output)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_any_length(positions: Any) -> None:
    module = MultiHeadAttention(8, 2, positions=positions, max_seq_len=2, causal=True).eval()
    assert module(torch.randn(1, 700, 8), return_weights=False).output.isfinite().all()


def test_angles_of_late_positions_are_exact() -> None:
    first = 100_000
    cosines, _ = rotary_angles(first, 2, torch.zeros(1, 2, 1, 8), 10000.0)
    for place in range(2):
        for pair in range(4):
            exact = math.cos((first + place) * 10000.0 ** (-2 * pair / 8))
            assert abs(cosines[place, 0, pair].item() - exact) < 1e-6


@pytest.mark.parametrize("own", ["pairs", "heads", "distance"])
def test_alibi_and_a_bias_of_the_caller_add_up(own: str) -> None:
    module, x = build(positions="alibi"), tokens()
    bias: Any = {
        "pairs": torch.randn(LENGTH, LENGTH, dtype=torch.float64),
        "heads": torch.randn(2, 3, LENGTH, LENGTH, dtype=torch.float64),
        "distance": RelativeBias(torch.randn(3, 5, dtype=torch.float64), first=-2),
    }[own]
    dense = bias.to_dense(LENGTH, LENGTH) if own == "distance" else bias
    both = RelativeBias.alibi(3, LENGTH, dtype=torch.float64).to_dense(LENGTH, LENGTH) + dense
    plain = build()
    plain.load_state_dict(module.state_dict())
    expected = plain(x, bias=both if both.ndim == 4 else both[None]).output
    torch.testing.assert_close(module(x, bias=bias).output, expected, rtol=1e-10, atol=1e-10)


def test_alibi_over_a_graph() -> None:
    pairs = torch.rand(LENGTH, LENGTH) < 0.5
    dense, x = build(positions="alibi"), tokens()
    over_edges = build(positions="alibi", pattern=Graph.from_adjacency(pairs))
    over_edges.load_state_dict(dense.state_dict())
    torch.testing.assert_close(over_edges(x).output, dense(x, mask=pairs).output, rtol=1e-10, atol=1e-10)
    own = torch.randn(int(pairs.sum()), dtype=torch.float64)
    spread = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    spread[pairs] = own
    expected = dense(x, mask=pairs, bias=spread).output
    torch.testing.assert_close(over_edges(x, bias=own).output, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_gradients(positions: Any) -> None:
    module, x = build(positions=positions, pattern=Causal()), tokens(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x).output, (x,))
