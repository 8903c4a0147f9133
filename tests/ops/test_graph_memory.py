"""Memory: no channel per edge, nothing read outside the arrays, and offsets beyond 2^31."""

import mmap
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention.errors import IndexRangeError, InvalidInputError
from anyattention.ops.edges.arrays import GraphArrays, arrays_of
from anyattention.ops.edges.dynamic import DynamicDot, DynamicSums, _dynamic_dot, _dynamic_sums
from anyattention.ops.edges.operators import edge_argmax, edge_dot, edge_softmax, edge_sum, edge_total
from anyattention.ops.graph.operators import (
    GraphAttention,
    GraphAttentionBackward,
    GraphAttentionWeights,
    graph_attention,
    graph_attention_backward,
    graph_attention_weights,
)
from anyattention.patterns import Graph

pytestmark = pytest.mark.usefixtures("native")

_SCALE = 0.5


def attention(graph: GraphArrays, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Any:
    """A record of attention by dot products."""
    return GraphAttention(
        graph,
        query,
        key,
        value,
        vector=None,
        term=None,
        bias=bias,
        seed=None,
        score="Dot",
        normalize=True,
        scale=_SCALE,
        softcap=0.0,
        negative_slope=0.2,
        dropout=0.0,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(
    ("score", "features"), [("dot", "none"), ("additive", "none"), ("dynamic", "none"), ("dynamic", "key")]
)
def test_no_edge_keeps_a_channel(peak_of_a_step: Callable[..., float], score: str, features: str, order: str) -> None:
    taken = peak_of_a_step(score, "sum", features, order)
    # In tensors of one number per edge and head: one of edges x heads x channels would be 128 of them.
    assert taken < (8 if order == "first" else 64)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_few_edges_of_many_heads_take_what_their_rows_need(
    peak_of_many_heads: Callable[..., float], score: str
) -> None:
    # The workspace of a row of 2,048 edges would be 400 of these numbers.
    assert peak_of_many_heads(score) < 40


class TestBrokenArrays:
    """The Graph's own constructor checks nothing: the kernels must."""

    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 0, 3, 3], [0, 0, 1, 2, 2, 2]]), num_queries=4, num_keys=5)

    def broken(self, name: str, position: int, number: int) -> Graph:
        array = getattr(self.graph, name).clone()
        array[position] = number
        return replace(self.graph, **{name: array})

    def calls(self, graph: Graph, dtype: torch.dtype) -> list[Any]:
        """Each kernel that reads the whole graph; the forward reads the rows of queries alone."""
        query, key = torch.randn(1, 4, 2, 3, dtype=dtype), torch.randn(1, 5, 2, 3, dtype=dtype)
        output, normalizer = torch.zeros_like(query), [torch.zeros(1, 4, 2, dtype=dtype)] * 2
        numbers, arrays = torch.randn(1, 6, 2, dtype=dtype), arrays_of(graph)
        call = attention(arrays, query, key, key)
        vector, none = query[0, 0], (None, None)
        scores = DynamicDot(arrays, 0.2, vector, query, key, *none, query, key, *none)
        by_query = [
            lambda: graph_attention(call),
            lambda: graph_attention_weights(GraphAttentionWeights(call, *normalizer)),
            lambda: edge_dot(query, key, arrays),
            lambda: edge_sum(numbers, key, arrays),
            lambda: edge_softmax(numbers, arrays),
            lambda: edge_total(numbers, arrays),
            lambda: edge_argmax(numbers, key, None, None, arrays),
        ]
        by_key = [
            lambda: edge_dot(key, query, arrays.transposed),
            lambda: edge_sum(numbers, query, arrays.transposed),
            lambda: edge_total(numbers, arrays.transposed),
        ]
        both = [
            lambda: graph_attention_backward(GraphAttentionBackward(call, output, *normalizer, query, None)),
            lambda: _dynamic_sums(DynamicSums(scores, numbers, (True, True, True, False, False))),
        ]
        return [by_query, by_key, both]

    def assert_refused(self, graph: Graph, name: str, error: type[Exception], match: str) -> None:
        for dtype in (torch.float32, torch.float64):
            by_query, by_key, both = self.calls(graph, dtype)
            reads = by_query if name in ("query_offsets", "keys_by_query", "edges_by_query") else by_key
            for call in [*reads, *both]:
                with pytest.raises(error, match=match):
                    call()

    def test_whole_ones_run(self) -> None:
        for dtype in (torch.float32, torch.float64):
            for calls in self.calls(self.graph, dtype):
                assert all(call() is not None for call in calls)

    @pytest.mark.pairwise
    @pytest.mark.parametrize("number", [-1, 6, 2**31, 2**40, -(2**63), 2**63 - 1])
    @pytest.mark.parametrize("position", [0, 3, 5])
    @pytest.mark.parametrize("name", ["keys_by_query", "edges_by_query", "queries_by_key", "edges_by_key"])
    def test_an_index_out_of_range(self, name: str, position: int, number: int) -> None:
        graph = self.broken(name, position, number)
        self.assert_refused(graph, name, IndexRangeError, "name a place that does not exist")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", ["edges_by_query", "edges_by_key"])
    def test_an_edge_without_a_slot(self, name: str, dtype: torch.dtype) -> None:
        # Its place in a result of edges would stay uninitialised.
        edges = getattr(self.graph, name)
        graph = self.broken(name, 0, int(edges[3]))
        by_query, by_key, both = self.calls(graph, dtype)
        arrays, query, key = (
            arrays_of(graph),
            torch.randn(1, 4, 2, 3, dtype=dtype),
            torch.randn(1, 5, 2, 3, dtype=dtype),
        )
        none = (None, None)
        scores = DynamicDot(arrays, 0.2, query[0, 0], query, key, *none, query, key, *none)
        writes_edges = {
            "edges_by_query": [by_query[1], by_query[2], by_query[4], lambda: _dynamic_dot(scores)],
            # The backward has such a result within the kernel.
            "edges_by_key": [by_key[0], both[0]],
        }
        for call in writes_edges[name]:
            with pytest.raises(IndexRangeError, match="or one twice"):
                call()

    @pytest.mark.parametrize(
        ("position", "number"),
        [(0, 1), (0, -1), (1, -1), (1, 2**40), (2, 1), (3, 7), (-1, 5), (-1, 7), (-1, 2**62), (1, -(2**63))],
    )
    @pytest.mark.parametrize("name", ["query_offsets", "key_offsets"])
    def test_offsets_that_do_not_rise_from_0_to_the_number_of_edges(
        self, name: str, position: int, number: int
    ) -> None:
        graph = self.broken(name, position, number)
        self.assert_refused(graph, name, IndexRangeError, "name a place that does not exist")

    @pytest.mark.parametrize(
        "name",
        [item.name for item in fields(Graph) if item.name not in ("edge_index", "values", "shifts", "search_radius")],
    )
    def test_arrays_of_another_length_dtype_or_layout(self, name: str) -> None:
        array = getattr(self.graph, name)
        for wrong in (array.int(), array[None]):
            graph = replace(self.graph, **{name: wrong})
            for call in self.calls(graph, torch.float32)[2]:
                with pytest.raises(InvalidInputError, match=rf"graph\.{name}: expected torch\.int64 on cpu, \(num_"):
                    call()
        # Of two that differ in length the second is named: an array, or what stands at the nodes.
        second = {"query_offsets": r"call\.query", "keys_by_query": "edges_by_query", "key_offsets": r"call\.key"}
        for wrong in (array[:-1], torch.cat([array, array])):
            graph = replace(self.graph, **{name: wrong})
            for call in self.calls(graph, torch.float32)[2]:
                with pytest.raises(InvalidInputError, match=rf"{second.get(name, name)}: expected torch.* on cpu, \("):
                    call()
        strided = replace(self.graph, **{name: array.repeat_interleave(2)[::2]})
        assert not getattr(strided, name).is_contiguous()
        found = []
        for graph in (self.graph, strided):
            torch.manual_seed(1)
            found.append([call() for calls in self.calls(graph, torch.float32) for call in calls])
        torch.testing.assert_close(*found, rtol=0.0, atol=0.0, equal_nan=True)

    def test_numbers_of_another_size_or_dtype(self) -> None:
        arrays = arrays_of(self.graph)
        rows, columns, numbers = torch.ones(1, 4, 2, 3), torch.ones(1, 5, 2, 3), torch.ones(1, 6, 2)
        for call, name in (
            (lambda: edge_dot(rows[:, :3], columns, arrays), "query"),
            (lambda: edge_dot(rows, columns.double(), arrays), "key"),
            (lambda: edge_dot(rows, columns[..., :2], arrays), "key"),
            (lambda: edge_dot(rows.half(), columns.half(), arrays), "query"),
            (lambda: edge_sum(numbers[:, :5], columns, arrays), "weights"),
            (lambda: edge_softmax(numbers[:, :5], arrays), "scores"),
            (lambda: edge_total(numbers[:, :5], arrays), "numbers"),
        ):
            with pytest.raises(InvalidInputError, match=f"{name}: expected "):
                call()


def untouched(count: int, dtype: torch.dtype) -> Tensor:
    """So many zeros without memory: pages that nobody has written, which the system promises to nobody either."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="needs pages without memory")
class TestOffsetsBeyond31Bits:
    """What stands 2^32 numbers on, where an offset of 32 bits leads back to the beginning."""

    def test_rows_of_keys(self) -> None:
        width, last = 64, 2**26
        keys = untouched((last + 1) * width, torch.float32).view(1, last + 1, 1, width)
        key_offsets = untouched(last + 2, torch.int64)
        key_offsets[-1] = 2
        keys[0, 0], keys[0, -1] = torch.randn(width), torch.randn(width)
        index = torch.tensor([0, last])
        zeros, both = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1])
        arrays = GraphArrays(torch.tensor([0, 2]), index, both, key_offsets, zeros, both, zeros, index)
        query = torch.randn(1, 1, 1, width)
        output, largest, log_sum = graph_attention(attention(arrays, query, keys, keys))
        used = keys[0, index, 0]
        scores = used @ query.flatten() * _SCALE
        torch.testing.assert_close(output.flatten(), scores.softmax(0) @ used)
        torch.testing.assert_close((largest + log_sum).flatten(), scores.logsumexp(0, keepdim=True))
        products = edge_dot(query, keys, arrays)
        torch.testing.assert_close(products.flatten(), used @ query.flatten())
        sums = edge_sum(products, keys, arrays)
        torch.testing.assert_close(sums.flatten(), products.flatten() @ used)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_strides_of_a_bias(self, axis: int) -> None:
        # Of shape (batch, edges, heads) = (2, 2, 2); the second entry of one axis is far away.
        far = 2**32
        strides = [far if n == axis else n + 1 for n in range(3)]
        numbers = untouched(far + 10, torch.float32)
        numbers[:10], numbers[far:] = torch.randn(10), torch.randn(10)
        bias = numbers.as_strided((2, 2, 2), strides)
        graph = Graph.from_edge_index(torch.tensor([[0, 1], [0, 0]]), num_queries=1, num_keys=2)
        zeros, value = torch.zeros(2, 2, 2, 1), torch.randn(2, 2, 2, 3)
        output, *_ = graph_attention(attention(arrays_of(graph), zeros[:, :1], zeros, value, bias))
        torch.testing.assert_close(output[:, 0], torch.einsum("beh,behc->bhc", bias.softmax(1), value))
