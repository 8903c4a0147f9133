"""Dropout in the kernels: which pairs, edges and heads it keeps is what the formula says, number for number.

Scores of 0 weigh all keys alike, and values that are rows of the identity show each weight on its own.
"""

import math

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Full, Graph, Window, attend
from anyattention.ops.dropout import draw_seed, factors_by_formula, keep_factors, philox

PROBABILITIES = [1e-8, 1e-7, 2.0**-24, 0.1, 0.3, 1 / 3, 0.5, 0.9, 0.999, 0.999999, 1 - 2.0**-25]


def seed_of(manual_seed: int) -> Tensor:
    torch.manual_seed(manual_seed)
    return draw_seed(torch.device("cpu"))


def kept_pairs(num_queries: int, num_keys: int, dropout: float, pattern=None, batch=1, heads=1, dtype=torch.float32):
    """Which pairs are kept `(batch, heads, num_queries, num_keys)`, and the gradient of the values' diagonal."""
    query = torch.zeros(batch, num_queries, heads, 1, dtype=dtype)
    key = torch.zeros(batch, num_keys, heads, 1, dtype=dtype)
    value = torch.eye(num_keys, dtype=dtype)[:, None].repeat(batch, 1, heads, 1).requires_grad_()
    torch.manual_seed(7)
    output = attend(query, key, value, pattern, dropout=dropout, implementation="cpu").output
    output.sum().backward()
    assert value.grad is not None
    return (output != 0).transpose(1, 2), value.grad.diagonal(dim1=1, dim2=3), output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_keys", [1, 3, 4, 63, 64, 65, 67, 131, 192])
def test_pairs_start_anywhere_in_a_block(num_keys, dtype):
    shape = (2, 3, 19, num_keys)
    found, by_value, output = kept_pairs(19, num_keys, 0.3, Full(), 2, 3, dtype)
    expected = factors_by_formula(shape, 0.3, seed_of(7), dtype)
    assert torch.equal(found, expected != 0)
    # The backward pass draws the same numbers anew.
    torch.testing.assert_close(output.sum((1, 3)), (expected / num_keys).sum((2, 3)))
    torch.testing.assert_close(by_value, (expected / num_keys).sum(2))


@pytest.mark.parametrize("dropout", PROBABILITIES)
def test_every_probability(dropout):
    found, _, _ = kept_pairs(130, 67, dropout, Full(), 1, 2)
    assert torch.equal(found, factors_by_formula((1, 2, 130, 67), dropout, seed_of(7), torch.float32) != 0)


def test_a_number_that_equals_the_probability_is_kept():
    shape = (1, 1, 9, 13)
    numbers = (philox(torch.arange(30), seed_of(7)).T.reshape(-1)[: math.prod(shape)] >> 8).tolist()
    for position in (0, 5, 50, 116):
        dropout = numbers[position] * 2.0**-24
        for probability, is_kept in ((dropout, True), (math.nextafter(dropout, 1), False)):
            found, _, _ = kept_pairs(9, 13, probability)
            assert bool(found.flatten()[position]) == is_kept


@pytest.mark.parametrize("dropout", [*PROBABILITIES, 5e-324, math.nextafter(0.1, 1), math.nextafter(1, 0)])
def test_whole_numbers_decide_as_fractions_do(dropout):
    """What the kernels compare: w >= ceil(dropout 2^24) for w 2^-24 >= dropout."""
    limit = math.ceil(dropout * 2.0**24)
    for number in {0, 1, limit - 1, limit, limit + 1, 2**24 - 1} & set(range(2**24)):
        assert (number * 2.0**-24 >= dropout) == (number >= limit)


@pytest.mark.parametrize("dropout", PROBABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_as_a_tensor(dtype, dropout):
    for shape in ((), (0, 3), (1,), (3, 21), (64,), (65,), (511,), (8, 64), (513,), (3, 5, 7, 11), (2, 70_001)):
        for number in (0, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822):
            seed = torch.tensor(number)
            expected = factors_by_formula(shape, dropout, seed, dtype)
            assert torch.equal(keep_factors(shape, dropout, seed, dtype), expected)


def test_the_compiler_traces_the_formula():
    compiled = torch.compile(lambda seed: keep_factors((3, 70), 0.3, seed, torch.float32), fullgraph=True)
    assert torch.equal(compiled(torch.tensor(5)), keep_factors((3, 70), 0.3, torch.tensor(5), torch.float32))


@pytest.mark.parametrize("length", [5, 64, 131, 197])
def test_causal(length):
    found, _, _ = kept_pairs(length, length, 0.3, Causal(), 1, 2)
    expected = factors_by_formula((1, 2, length, length), 0.3, seed_of(7), torch.float32) != 0
    assert torch.equal(found, expected.tril())


@pytest.mark.parametrize("pattern", [Window(9, 3), Window(70, 70), Window(5, 5) | Window(0, 0) & Causal()])
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_pairs_of_a_pattern_count_only_those_it_has(heads, pattern):
    length = 147
    found, by_value, _ = kept_pairs(length, length, 0.3, pattern, 2, heads)
    allowed = pattern.to_dense(length, length)
    kept = factors_by_formula((2, int(allowed.sum()), heads), 0.3, seed_of(7), torch.float32)
    expected = torch.zeros(2, heads, length, length)
    expected[:, :, allowed] = kept.transpose(1, 2)
    assert torch.equal(found, expected != 0)
    torch.testing.assert_close(by_value, (expected / allowed.sum(1)[:, None]).sum(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8, 63, 64, 65, 70])
def test_heads_of_an_edge(heads, dtype):
    num_nodes = 21
    edge_index = torch.stack([x.flatten() for x in torch.meshgrid([torch.arange(num_nodes)] * 2, indexing="ij")])
    edge_index = edge_index[:, torch.randperm(num_nodes**2, generator=torch.Generator().manual_seed(1))]
    graph = Graph.from_edge_index(edge_index, num_nodes=num_nodes)
    zeros = torch.zeros(num_nodes, heads, num_nodes, dtype=dtype)
    value = torch.eye(num_nodes, dtype=dtype)[:, None].repeat(1, heads, 1).requires_grad_()
    torch.manual_seed(7)
    output = attend(zeros, zeros, value, graph, dropout=0.3, implementation="cpu").output
    output.sum().backward()
    kept = factors_by_formula((1, num_nodes**2, heads), 0.3, seed_of(7), dtype)[0]
    source, target = edge_index
    assert torch.equal(output[target, :, source] != 0, kept != 0)
    expected = torch.zeros(num_nodes, heads, dtype=dtype).index_add_(0, source, kept / num_nodes)
    assert value.grad is not None
    torch.testing.assert_close(value.grad.diagonal(dim1=0, dim2=2).T, expected)


@pytest.mark.parametrize("width", [4, 8, 16, 32])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_heads_whose_sums_stay_in_registers(heads, width):
    num_nodes = 4
    edge_index = torch.stack([x.flatten() for x in torch.meshgrid([torch.arange(num_nodes)] * 2, indexing="ij")])
    graph = Graph.from_edge_index(edge_index, num_nodes=num_nodes)
    zeros = torch.zeros(num_nodes, heads, width)
    value = torch.eye(num_nodes, width)[:, None].repeat(1, heads, 1).requires_grad_()
    torch.manual_seed(7)
    output = attend(zeros, zeros, value, graph, dropout=0.3, implementation="cpu").output
    output.sum().backward()
    kept = factors_by_formula((1, num_nodes**2, heads), 0.3, seed_of(7), torch.float32)[0]
    source, target = edge_index
    assert torch.equal(output[target, :, source] != 0, kept != 0)
    expected = torch.zeros(num_nodes, heads).index_add_(0, source, kept / num_nodes)
    assert value.grad is not None
    torch.testing.assert_close(value.grad[:, :, 0], expected)
