"""Biases by distance: a table against plain loops, ALiBi against its definition, and what is refused."""

import pytest
import torch

from anyattention import Causal, Full, Graph, RelativeBias, TopK, Window, attend, nn
from anyattention.errors import DimensionMismatchError, InvalidConfigError, InvalidInputError


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "align"), [(5, 5, None), (3, 7, "top_left"), (7, 3, "bottom_right")]
)
def test_every_pair_reads_its_distance(num_queries: int, num_keys: int, align: str | None) -> None:
    numbers = torch.randn(2, 4)
    dense = RelativeBias(numbers, -2, align).to_dense(num_queries, num_keys)  # pyright: ignore[reportArgumentType]
    ahead = num_keys - num_queries if align == "bottom_right" else 0
    for h in range(2):
        for i in range(num_queries):
            for j in range(num_keys):
                assert dense[h, i, j] == numbers[h, min(max(j - (i + ahead) + 2, 0), 3)]


def test_alibi_is_that_of_the_paper() -> None:
    dense = RelativeBias.alibi(8, 6).to_dense(6, 6)
    for h in range(8):
        assert dense[h, 5, 2] == pytest.approx(-3 * 2.0 ** -(h + 1))
    # Slopes for 12 heads, from the paper's own code: those of 8, then every second one of 16.
    slopes = -RelativeBias.alibi(12, 2).numbers[:, 0]
    expected = [2.0 ** -(h + 1) for h in range(8)] + [2.0 ** -(0.5 + h) for h in range(4)]
    torch.testing.assert_close(slopes, torch.tensor(expected))


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(2, 1), TopK(3), Causal() & TopK(2)], ids=str)
def test_is_the_same_as_a_bias_of_pairs(pattern) -> None:
    query, key, value = (torch.randn(2, 7, 3, 4, dtype=torch.float64) for _ in range(3))
    numbers = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = RelativeBias(numbers, -3)
    found = []
    for given in (bias, bias.to_dense(7, 7)[None]):
        output = attend(query, key, value, pattern, bias=given).output
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        found.append([output, *torch.autograd.grad(output, numbers, cotangent)])
    torch.testing.assert_close(found[0], found[1])


def test_goes_through_the_layers() -> None:
    layer, x, bias = nn.SparseAttention(8, 2, local_window=2).eval(), torch.randn(1, 5, 8), RelativeBias.alibi(2, 5)
    expected = layer(x, bias=bias.to_dense(5, 5)[None]).output
    torch.testing.assert_close(layer(x, bias=bias).output, expected)


def test_refusals() -> None:
    x = torch.ones(1, 3, 2, 4)
    with pytest.raises(DimensionMismatchError, match=r"bias\.numbers: expected \(heads, distances\)"):
        RelativeBias(torch.ones(3), 0)
    with pytest.raises(InvalidInputError, match=r"bias\.numbers"):
        RelativeBias(torch.ones(1, 3, dtype=torch.int64), 0)
    with pytest.raises(InvalidConfigError, match="first: expected an int"):
        RelativeBias(torch.ones(1, 3), 0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match=r"bias\.numbers: expected no -inf"):
        attend(x, x, x, Window(1, 1), bias=RelativeBias(torch.full((1, 3), -torch.inf), -1))
    with pytest.raises(InvalidConfigError, match="align"):
        RelativeBias(torch.ones(1, 3), 0, "left")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidConfigError, match="heads: expected an int >= 1"):
        RelativeBias.alibi(0, 3)
    for pattern in (Full(), Window(1, 1)):
        with pytest.raises(DimensionMismatchError, match=r"bias\.numbers: expected \(heads=2, distances\)"):
            attend(x, x, x, pattern, bias=RelativeBias(torch.ones(3, 3), -1))
    with pytest.raises(DimensionMismatchError, match="bias: expected as many queries as keys"):
        attend(x[:, :2], x, x, Window(1, 1, "top_left"), bias=RelativeBias(torch.ones(1, 3), -1))
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 2]]), num_nodes=3)
    with pytest.raises(InvalidInputError, match="a tensor with a Graph"):
        attend(x, x, x, graph, bias=RelativeBias(torch.ones(1, 3), -1))
