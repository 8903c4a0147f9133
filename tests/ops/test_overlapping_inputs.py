"""Inputs whose numbers share memory: results and gradients have memory of their own, the caller's stays as it is."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Full, Graph, Strided, TopK, Window, attend, edge_dot, edge_softmax, edge_sum
from anyattention.native.columns import are_columns
from anyattention.nn import GraphAttention, MultiHeadAttention, SparseAttention
from anyattention.ops.edges.arrays import arrays_of
from anyattention.ops.graph import operators
from anyattention.ops.graph.operators import GraphAttention as GraphAttentionRecord
from anyattention.ops.graph.operators import GraphAttentionBackward, graph_attention, graph_attention_backward
from anyattention.ops.linear_maps import linear_maps

pytestmark = pytest.mark.usefixtures("native")

BATCH, LENGTH, HEADS, WIDTH = 2, 6, 2, 3
_EDGES = torch.tensor([[0, 1, 3, 3, 0, 4, 5, 0, 2], [0, 0, 2, 2, 3, 3, 0, 5, 4]])
GRAPH = Graph.from_edge_index(_EDGES, num_nodes=LENGTH)


def _strided(strides: Sequence[int]) -> Callable[[Sequence[int]], Tensor]:
    return lambda shape: _random(80).as_strided(list(shape), list(strides)[-len(shape) :])


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


HOW: dict[str, Callable[[Sequence[int]], Tensor]] = {
    "a sliding window": _strided((7, 1, 2, 1)),
    "rows one number apart": _strided((6, 1, 3, 1)),
    "every number twice": _strided((8, 4, 2, 2)),
    "expanded rows": lambda shape: _random(1, shape[-1]).expand(*shape),
    "expanded numbers": lambda shape: _random(*shape[:-1], 1).expand(*shape),
    "one number": lambda shape: _random().expand(*shape),
    "unfolded": lambda shape: _random(*shape[:-2], shape[-2] + shape[-1] - 1).unfold(-1, shape[-1], 1),
}
every_way = pytest.mark.parametrize("how", HOW)


def addresses(x: Tensor) -> list[int]:
    """Of every number."""
    places = torch.zeros(x.shape, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        places += (torch.arange(size) * stride).view(-1, *[1] * (x.ndim - axis - 1))
    return (x.data_ptr() + places * x.element_size()).flatten().tolist()


def assert_own_memory(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """No two numbers of the results share memory, nor do they with an input."""
    taken = {place for x in inputs for place in addresses(x)}
    for x in results:
        own = addresses(x)
        assert len(set(own)) == len(own)
        assert taken.isdisjoint(own)


def derivatives(of: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients by cotangents that share memory too."""
    results = [x for x in of(*inputs) if x.requires_grad]
    generator = torch.Generator().manual_seed(3)
    by = [torch.randn((), generator=generator, dtype=x.dtype).expand(x.shape) for x in results]
    return results, list(torch.autograd.grad(results, inputs, by))


def check(of: Callable[..., Sequence[Tensor]], shapes: Sequence[Sequence[int]], how: str) -> None:
    """The results and gradients of separate numbers, in memory of their own, and the inputs as they were."""
    inputs = [HOW[how](shape).requires_grad_() for shape in shapes]
    before = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
    results, gradients = derivatives(of, inputs)
    assert [tuple(x.shape) for x in gradients] == list(shapes)
    assert_own_memory([*results, *gradients], inputs)
    for x, old in zip(inputs, before, strict=True):
        assert torch.equal(x, old)
    apart = [old.clone().requires_grad_() for old in before]
    expected = derivatives(of, apart)
    torch.testing.assert_close((results, gradients), expected, rtol=1e-12, atol=1e-12)


@every_way
def test_the_inputs_share_memory(how: str) -> None:
    x = HOW[how]((BATCH, LENGTH, HEADS, WIDTH))
    assert len(set(addresses(x))) < x.numel()


_ATTENTION: dict[str, dict[str, Any]] = {
    "dense": {"pattern": Full(), "return_weights": "heads"},
    "dense mean": {"pattern": Causal(), "return_weights": "mean"},
    "dense reference": {"pattern": Causal(), "implementation": "reference", "return_weights": "heads"},
    "dense torch": {"pattern": Causal(), "implementation": "torch"},
    "window": {"pattern": Window(2, 1), "return_weights": "heads"},
    "window edges": {"pattern": Window(2, 1), "implementation": "graph"},
    "strided": {"pattern": Strided(2, 1)},
    "top-k": {"pattern": TopK(3), "return_weights": "heads"},
    "graph": {"pattern": GRAPH, "return_weights": "heads"},
    "graph maximum": {"pattern": GRAPH, "aggregation": "max"},
    "graph reference": {"pattern": GRAPH, "implementation": "reference"},
}


@every_way
@pytest.mark.parametrize("kind", _ATTENTION)
def test_attention(kind: str, how: str) -> None:
    def of(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        found = attend(query, key, value, return_logsumexp=True, **_ATTENTION[kind])
        return [x for x in (found.output, found.weights, found.logsumexp) if x is not None]

    check(of, [(BATCH, LENGTH, HEADS, WIDTH)] * 3, how)


@every_way
def test_attention_over_a_graph_without_batch(how: str) -> None:
    check(lambda *rows: [attend(*rows, GRAPH).output], [(LENGTH, HEADS, WIDTH)] * 3, how)


@every_way
def test_primitives(how: str) -> None:
    rows, edges = (LENGTH, HEADS, WIDTH), (1, GRAPH.num_edges, HEADS)
    check(lambda query, key: [edge_dot(query, key, GRAPH)], [rows, rows], how)
    check(lambda weights, value: [edge_sum(weights[0], value, GRAPH)], [edges, rows], how)
    check(lambda scores: [edge_softmax(scores, GRAPH)], [edges], how)


@every_way
@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiHeadAttention(4, 2),
        lambda: SparseAttention(4, 2, local_window=1),
        lambda: GraphAttention(4, 2, score="dot"),
    ],
)
def test_modules(make: Callable[[], torch.nn.Module], how: str) -> None:
    module = make().double().eval()
    given = [GRAPH] if isinstance(module, GraphAttention) else []
    check(lambda x: [module(x, *given).output if not given else module(x[0], *given)[0]], [(BATCH, LENGTH, 4)], how)


@pytest.mark.parametrize("pattern", [Full(), Window(2, 1), GRAPH])
def test_a_gradient_sums_over_what_shares_memory(pattern: Any) -> None:
    """Of the memory itself, by PyTorch's own rule of the view."""
    found = []
    for implementation in ("cpu", "reference"):
        memory = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64, requires_grad=True)
        rows = memory.as_strided((1, LENGTH, HEADS, WIDTH), (0, 3, 2, 1))
        output = attend(rows, rows.flip(1), rows.detach(), pattern, implementation=implementation).output
        found.append(torch.autograd.grad(output.sin().sum(), memory)[0])
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] != 0).any()


def _rows_side_by_side(draw: random.Random) -> list[Tensor]:
    """Rows that may be the columns of a matrix, and may be none by a stride or a place that does not fit."""
    memory, nodes = torch.zeros(400), (draw.randint(1, 2), draw.randint(1, 4))
    widths = [(draw.randint(1, 2), draw.randint(1, 3)) for _ in range(draw.randint(1, 3))]
    whole = sum(heads * width for heads, width in widths)
    rows, offset = [], draw.randint(0, 2)
    for heads, width in widths:
        stride = whole + draw.choice((0, 0, 0, 0, -1, 1))
        own = (nodes[1] * stride, stride, width, 1)
        if draw.random() < 0.2:
            own = draw.randint(0, 9), draw.randint(0, 5), draw.randint(0, 3), 1
        rows.append(memory.as_strided((*nodes, heads, width), own, offset))
        offset += heads * width - draw.choice((0, 0, 0, 0, 1))
    return draw.sample(rows, len(rows))


def test_what_are_columns_have_no_number_in_common() -> None:
    """Gradients are written with the strides of rows that are columns of one matrix: of any rows, those only."""
    draw, found = random.Random(0), 0
    for _ in range(1_000):
        rows = _rows_side_by_side(draw)
        if are_columns(rows):
            found += 1
            for each in (rows, operators._columns_like(rows)):
                places = [place for x in each for place in addresses(x)]
                assert len(set(places)) == len(places)
    assert 200 < found < 800


@every_way
def test_the_backward_by_itself(how: str) -> None:
    """Called as an operator, without `attend` before it."""
    rows = [HOW[how]((BATCH, LENGTH, HEADS, WIDTH)) for _ in range(3)]
    before = [x.clone(memory_format=torch.contiguous_format) for x in rows]
    found = []
    for query, key, value in (rows, before):
        record = GraphAttentionRecord(
            arrays_of(GRAPH), query, key, value, None, None, None, None, "Dot", True, 0.0, 0.0, scale=0.5, softcap=0.0
        )
        results = graph_attention(record)
        by = torch.ones_like(results[0])
        found.append(graph_attention_backward(GraphAttentionBackward(record, *results, by, None)))
    assert_own_memory([x for x in found[0] if x is not None], rows)
    torch.testing.assert_close(found[0][:3], found[1][:3], rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, rows, before))


@every_way
def test_linear_maps(how: str) -> None:
    weights = [torch.randn(4, WIDTH, dtype=torch.float64), torch.randn(2, WIDTH, dtype=torch.float64)]
    x = HOW[how]((1, LENGTH, 1, WIDTH))[0, :, 0].requires_grad_()
    old = x.detach().clone(memory_format=torch.contiguous_format)
    by_one = torch.randn(1, 4, dtype=torch.float64).expand(LENGTH, 4)
    by = [by_one, torch.randn((), dtype=torch.float64).expand(LENGTH, 2)]
    results = linear_maps(x, weights)
    (gradient,) = torch.autograd.grad(results, x, by)
    torch.testing.assert_close(gradient, by[0] @ weights[0] + by[1] @ weights[1])
    assert_own_memory([gradient], [x, *by])
    assert torch.equal(x, old)
