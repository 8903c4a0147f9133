"""Bad calls of every public entry point: a typed error that names the argument, and no file left behind.

A row's pattern must find the argument, what was expected and what came, in the error's text.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import networkx
import numpy as np
import pytest
import safetensors.torch
import scipy.sparse
import torch

from anyattention import (
    Additive,
    AttentionBuilder,
    AttentionConfig,
    AttentionGradients,
    Blocks,
    Causal,
    Documents,
    Dot,
    Dynamic,
    EdgeFeatures,
    Fixed,
    GeometricAttentionConfig,
    Global,
    Graph,
    GraphAttentionBuilder,
    GraphAttentionConfig,
    RandomBlocks,
    SparseAttentionBuilder,
    SparseAttentionConfig,
    Strided,
    TopK,
    Window,
    attend,
    explain,
    load,
    mask_from_blocked,
    save,
)
from anyattention import errors as e
from anyattention.nn import GraphAttention, MultiHeadAttention, ScaledDotProductAttention, SparseAttention

_NAN = float("nan")

# Dense at op level: (batch 2, length 5, heads 3, head_dim 7). Graph: 4 nodes, 3 edges, heads 3, head_dim 7.
_X = torch.ones(2, 5, 3, 7)
_EDGE_INDEX = torch.tensor([[0, 1, 0], [2, 2, 3]])
_GRAPH = Graph.from_edge_index(_EDGE_INDEX, num_nodes=4)
_N = torch.ones(4, 3, 7)
_TERM = torch.ones(4, 3, 1)

# 4 points in 3 dimensions.
_P = torch.arange(1.0, 13.0).reshape(4, 3)

# Modules: (batch 2, length 5, d_model 8); graph modules: 4 nodes with 3 features.
_S = torch.ones(2, 5, 8)
_F = torch.ones(4, 3)

_LONG = torch.ones(1, 1, 1, 1).expand(1, 2**20, 1, 1)


def _mha(**settings):
    return MultiHeadAttention(8, 2, **settings)


def _gat(**settings):
    return GraphAttention(8, 2, in_features=3, **settings)


def _periodic(dim):
    return Graph.from_edge_index(_EDGE_INDEX, num_nodes=4, shifts=torch.zeros(3, dim, dtype=torch.int64))


def _backward(grad_output):
    module = _mha()
    _, cache = module.cached_forward(_S)
    return module.backward(grad_output, cache)


@dataclass(frozen=True)
class Row:
    name: str
    error: type[e.AttentionError]
    call: Callable[[Path], object]
    text: str
    prepare: Callable[[Path], object] = lambda folder: None


def row(name, error, call, text):
    return Row(name, error, lambda folder: call(), text)


_INPUT, _SHAPE, _MASK, _CONFIG = e.InvalidInputError, e.DimensionMismatchError, e.InvalidMaskError, e.InvalidConfigError
_GRAPHS, _SPARSE, _UNSUPPORTED = e.GraphStructureError, e.SparseMatrixError, e.UnsupportedError

# fmt: off
_ATTEND_DENSE = [
    row("list", _INPUT, lambda: attend([[1.0]], _X, _X), "query: expected a torch.Tensor, got list"),
    row("ragged list", _INPUT, lambda: attend(_X, [[1.0], [1.0, 2.0]], _X), "key: expected a torch.Tensor, got list"),
    row("array", _INPUT, lambda: attend(_X, _X, np.ones((2, 5, 3, 7))), "value: expected a torch.Tensor, got ndarray"),
    row("none", _INPUT, lambda: attend(None, _X, _X), "query: expected a torch.Tensor, got NoneType"),
    row("ragged tensor", _INPUT,
        lambda: attend(torch.nested.nested_tensor([_X[0], _X[0, :2]], layout=torch.jagged), _X, _X),
        "query: expected a torch.Tensor of one shape, got a nested"),
    row("sparse query", _INPUT, lambda: attend(_X.to_sparse(), _X, _X),
        "query: expected a dense tensor, got torch.sparse_coo"),
    row("rank 3 without a graph", _SHAPE, lambda: attend(_N, _N, _N),
        r"query: expected \(batch, query_length, heads, head_dim\), got \(4, 3, 7\)"),
    row("heads of key", _SHAPE, lambda: attend(_X, _X[:, :, :2], _X[:, :, :2]),
        r"key: expected a number of key_heads that divides heads=3, got \(2, 5, 2, 7\). heads is 3 in query"),
    row("heads of value", _SHAPE, lambda: attend(_X, _X[:, :, :1], _X),
        r"value: expected \(batch=2, .*, key_heads=1, value_dim\), got \(2, 5, 3, 7\). key_heads is 1 in key"),
    row("length of value", _SHAPE, lambda: attend(_X, _X, _X[:, :4]),
        r"value: expected \(batch=2, key_length=5, .*got \(2, 4, 3, 7\). key_length is 5 in key"),
    row("batch of key", _SHAPE, lambda: attend(_X, _X[:1], _X),
        r"key: expected \(batch=2, .*got \(1, 5, 3, 7\). batch is 2 in query"),
    row("dtype of key", _INPUT, lambda: attend(_X, _X.double(), _X),
        "key: expected torch.float32, as query, got torch.float64"),
    row("integers", _INPUT, lambda: attend(_X.long(), _X.long(), _X.long()),
        "query: expected a floating-point dtype.*got torch.int64"),
    row("complex", _INPUT, lambda: attend(_X.to(torch.complex64), _X, _X),
        "query: expected a floating-point dtype.*got torch.complex64"),
    row("8 bits", _INPUT, lambda: attend(*[_X.to(torch.float8_e4m3fn)] * 3),
        "query: expected a floating-point dtype of 16, 32 or 64 bits, got torch.float8_e4m3fn"),
    row("device of value", _INPUT, lambda: attend(_X, _X, _X.to("meta")),
        "value: expected device cpu, as query, got meta"),
    row("integer mask", _MASK, lambda: attend(_X, _X, _X, mask=torch.ones(5, dtype=torch.int64)),
        r"mask: expected a torch.bool tensor.*got torch.int64. mask\.bool\(\) .*Hugging Face.*mask_from_blocked"),
    row("float mask", _MASK, lambda: attend(_X, _X, _X, mask=torch.zeros(5)),
        "mask: expected a torch.bool tensor.*got torch.float32. .*mask_from_blocked"),
    row("mask as list", _MASK, lambda: attend(_X, _X, _X, mask=[True] * 5), "mask: expected a torch.bool.*got list"),
    row("mask of rank 3", _MASK, lambda: attend(_X, _X, _X, mask=torch.ones(2, 5, 5, dtype=torch.bool)),
        r"mask: expected rank 1, 2 or 4, got rank 3, \(2, 5, 5\).*mask\[:, None\].*mask\[None\]"),
    row("size of mask", _MASK, lambda: attend(_X, _X, _X, mask=torch.ones(5, 4, dtype=torch.bool)),
        r"mask: expected a shape that broadcasts to \(batch=2, heads=3, query_length=5, key_length=5\), got \(5, 4\)"),
    row("padding", _MASK, lambda: attend(_X, _X, _X, mask=torch.ones(2, 5, dtype=torch.bool)),
        r"mask: expected .*got \(2, 5\). for padding, .* mask\[:, None, None\], in a module mask\[:, None\]"),
    row("scipy pattern", _INPUT, lambda: attend(_X, _X, _X, scipy.sparse.eye_array(5)),
        r"pattern: expected a pattern .*Graph.from_adjacency\(\.\.\.\) makes a Graph of it"),
    row("networkx pattern", _INPUT, lambda: attend(_X, _X, _X, networkx.path_graph(5)),
        r"pattern: expected a pattern .*Graph.from_networkx\(\.\.\.\) makes a Graph of it"),
    row("networkx layer", _INPUT, lambda: _gat()(_F, networkx.DiGraph([(0, 1)])),
        r"graph: expected a Graph or an edge_index, got DiGraph. Graph.from_networkx\(\.\.\.\) makes a Graph of it"),
    row("rank 5 mask", _MASK, lambda: attend(_X, _X, _X, mask=torch.ones(1, 1, 1, 1, 5, dtype=torch.bool)),
        r"mask: expected a shape that broadcasts.*got \(1, 1, 1, 1, 5\)"),
    row("device of mask", _INPUT, lambda: attend(_X, _X, _X, mask=torch.ones(5, dtype=torch.bool, device="meta")),
        "mask: expected device cpu, as query, got meta"),
    row("sparse mask", _INPUT, lambda: attend(_X, _X, _X, mask=torch.ones(5, 5, dtype=torch.bool).to_sparse()),
        "mask: expected a dense tensor, got torch.sparse_coo"),
    row("boolean bias", _INPUT, lambda: attend(_X, _X, _X, bias=torch.ones(5, dtype=torch.bool)),
        "bias: expected a floating-point dtype.*got torch.bool"),
    row("bias of rank 3", _SHAPE, lambda: attend(_X, _X, _X, bias=torch.ones(2, 5, 5)),
        r"bias: expected rank 1, 2 or 4, got rank 3, \(2, 5, 5\).*bias\[:, None\].*bias\[None\]"),
    row("device of bias", _INPUT, lambda: attend(_X, _X, _X, bias=torch.ones(5, device="meta")),
        "bias: expected device cpu, as query, got meta"),
    row("scale nan", _INPUT, lambda: attend(_X, _X, _X, scale=_NAN), "scale: expected a finite number, got nan"),
    row("scale text", _INPUT, lambda: attend(_X, _X, _X, scale="1"), "scale: expected a finite number, got '1'"),
    row("list of sinks", _INPUT, lambda: attend(_X, _X, _X, sinks=[0.0] * 3),
        "sinks: expected a torch.Tensor, got list"),
    row("number as sinks", _INPUT, lambda: attend(_X, _X, _X, sinks=0.0), "sinks: expected a torch.Tensor, got float"),
    row("number of sinks", _SHAPE, lambda: attend(_X, _X, _X, sinks=torch.zeros(2)),
        r"sinks: expected \(heads=3\), got \(2,\). heads is 3 in query"),
    row("rank of sinks", _SHAPE, lambda: attend(_X, _X, _X, Window(1, 1), sinks=torch.zeros(3, 1)),
        r"sinks: expected \(heads=3\), got \(3, 1\)"),
    row("integers as sinks", _INPUT, lambda: attend(_X, _X, _X, TopK(2), sinks=torch.zeros(3, dtype=torch.int64)),
        "sinks: expected a floating-point dtype.*got torch.int64"),
    row("device of sinks", _INPUT, lambda: attend(_X, _X, _X, sinks=torch.zeros(3, device="meta")),
        "sinks: expected device cpu, as query, got meta"),
    row("softcap 0", _INPUT, lambda: attend(_X, _X, _X, softcap=0), "softcap: expected a finite number above 0, got 0"),
    row("softcap that no float holds", _INPUT, lambda: attend(_X, _X, _X, softcap=10**400),
        "softcap: expected a finite number above 0, got 1000"),
    row("dropout 1.5", _INPUT, lambda: attend(_X, _X, _X, dropout=1.5),
        "dropout: expected a finite number at least 0 and below 1, got 1.5"),
    row("dropout True", _INPUT, lambda: attend(_X, _X, _X, dropout=True),
        "dropout: expected a finite number at least 0 and below 1, got True"),
    row("return_weights all", _INPUT, lambda: attend(_X, _X, _X, return_weights="all"),
        "return_weights: expected False, True, 'mean' or 'heads', got 'all'"),
    row("return_logsumexp yes", _INPUT, lambda: attend(_X, _X, _X, return_logsumexp="yes"),
        "return_logsumexp: expected True or False, got 'yes'"),
    row("unknown implementation", _INPUT, lambda: attend(_X, _X, _X, implementation="cuda"),
        "implementation: expected one of 'cpu', 'torch', 'reference', got 'cuda'"),
    row("forced implementation", _UNSUPPORTED, lambda: attend(_X, _X, _X, implementation="torch", softcap=2.0),
        "implementation='torch' cannot run this call: it has no softcap"),
    row("mask as pattern", _INPUT, lambda: attend(_X, _X, _X, torch.ones(5, 5, dtype=torch.bool)),
        "pattern: expected a pattern .*got Tensor. .*mask="),
    row("score class", _INPUT, lambda: attend(_X, _X, _X, score=Dot), r"score: expected Dot\(\), .*got <class .*Dot'>"),
    row("edges without a graph", _INPUT, lambda: attend(_X, _X, _X, edges=EdgeFeatures(torch.ones(3, 2))),
        "edges: expected None with the pattern Full, got EdgeFeatures"),
    row("aggregation without a graph", _UNSUPPORTED, lambda: attend(_X, _X, _X, Causal(), aggregation="mean"),
        "aggregation='mean'.*the pattern Causal has only aggregation='sum'"),
    row("normalize without a graph", _UNSUPPORTED, lambda: attend(_X, _X, _X, normalize=False),
        "normalize=False: the pattern Full has only .*normalize=True"),
    row("causal of two lengths", _SHAPE, lambda: attend(_X[:, :3], _X, _X, Causal()),
        "Causal: expected as many queries as keys, or an alignment, got 3 queries and 5 keys. .*top_left"),
    row("more memory than there is", e.OutOfMemoryError,
        lambda: attend(_LONG, _LONG, _LONG, return_weights=True, implementation="reference"),
        r"matrix of scores \(batch x .*would take 4096.00 GiB; .* are free"),
    row("more memory than there is, kernels or not", e.OutOfMemoryError,
        lambda: attend(_LONG, _LONG, _LONG, return_weights=True),
        r"matrix of (weights|scores \(batch x .*\)) would take 4096.00 GiB; .* are free"),
    row("explain, dtype", _INPUT, lambda: explain(_X, _X, _X.half()),
        "value: expected torch.float32, as query, got torch.float16"),
    row("explain, implementation", _INPUT, lambda: explain(_X, _X, _X, implementation="fast"),
        "implementation: expected one of .*got 'fast'"),
    row("explain, graph", _SHAPE, lambda: explain(_N[:3], _N, _N, _GRAPH),
        r"query: expected \(queries=4, .*got \(3, 3, 7\)"),
]
# fmt: on

# fmt: off
_ATTEND_GRAPH = [
    row("too few queries", _SHAPE, lambda: attend(_N[:3], _N, _N, _GRAPH),
        r"query: expected \(queries=4, heads, head_dim\), got \(3, 3, 7\). queries is 4 in the graph"),
    row("too many keys", _SHAPE, lambda: attend(_N, torch.cat([_N, _N]), _N, _GRAPH),
        r"key: expected \(keys=4, .*got \(8, 3, 7\). keys is 4 in the graph"),
    row("batch in the query only", _SHAPE, lambda: attend(_N[None], _N, _N, _GRAPH),
        r"key: expected \(batch=1, keys=4, .*got \(4, 3, 7\)"),
    row("graph elsewhere", _INPUT, lambda: attend(_N, _N, _N, _GRAPH.to("meta")),
        "graph: expected device cpu, as query, got meta"),
    row("integer edge mask", _MASK, lambda: attend(_N, _N, _N, _GRAPH, mask=torch.ones(3, dtype=torch.uint8)),
        "mask: expected a torch.bool.*got torch.uint8. .*mask_from_blocked"),
    row("dense mask with a graph", _MASK, lambda: attend(_N, _N, _N, _GRAPH, mask=torch.ones(4, 4, dtype=torch.bool)),
        r"mask: expected \(3,\) or \(3, 3\): edges=3, heads=3, got \(4, 4\)"),
    row("edge mask elsewhere", _INPUT,
        lambda: attend(_N, _N, _N, _GRAPH, mask=torch.ones(3, dtype=torch.bool, device="meta")),
        "mask: expected device cpu, as query, got meta"),
    row("edge bias", _SHAPE, lambda: attend(_N, _N, _N, _GRAPH, bias=torch.ones(3, 2)),
        r"bias: expected \(3,\) or \(3, 3\): edges=3, heads=3, got \(3, 2\)"),
    row("edge bias elsewhere", _INPUT, lambda: attend(_N, _N, _N, _GRAPH, bias=torch.ones(3, device="meta")),
        "bias: expected device cpu, as query, got meta"),
    row("edges that are text", _INPUT, lambda: attend(_N, _N, _N, _GRAPH, edges="weight"),
        r"edges: expected EdgeFeatures\(features, ...\) or None, got str"),
    row("number of edge features", _SHAPE,
        lambda: attend(_N, _N, _N, _GRAPH, edges=EdgeFeatures(torch.ones(2, 5), torch.ones(3, 7, 5))),
        r"edges.features: expected \(edges=3, edge_dim\), got \(2, 5\). edges is 3 in the graph"),
    row("edge weight", _SHAPE,
        lambda: attend(_N, _N, _N, _GRAPH, edges=EdgeFeatures(torch.ones(3, 5), None, torch.ones(3, 7, 2))),
        r"edges.value_weight: expected \(heads=3, value_dim=7, edge_dim=5\), got \(3, 7, 2\). edge_dim is 5 in edges"),
    row("additive with wide keys", _SHAPE, lambda: attend(_N, _N, _N, _GRAPH, score=Additive()),
        "query: expected head_dim 1 with the score Additive.*got head_dim 7"),
    row("additive slope", _INPUT, lambda: attend(_TERM, _TERM, _N, _GRAPH, score=Additive(_NAN)),
        "score.negative_slope: expected a finite number, got nan"),
    row("dynamic vector as list", _INPUT, lambda: attend(_N, _N, _N, _GRAPH, score=Dynamic([1.0])),
        "score.vector: expected a torch.Tensor, got list"),
    row("dynamic vector", _SHAPE, lambda: attend(_N, _N, _N, _GRAPH, score=Dynamic(torch.ones(3, 6))),
        r"score.vector: expected \(heads=3, head_dim=7\), got \(3, 6\). head_dim is 7 in query"),
    row("unknown aggregation", _INPUT, lambda: attend(_N, _N, _N, _GRAPH, aggregation="median"),
        "aggregation: expected 'sum', 'mean' or 'max', got 'median'"),
    row("normalize by a number", _INPUT, lambda: attend(_N, _N, _N, _GRAPH, normalize=0),
        "normalize: expected True or False, got 0"),
    row("logsumexp without softmax", _UNSUPPORTED,
        lambda: attend(_N, _N, _N, _GRAPH, normalize=False, return_logsumexp=True),
        "return_logsumexp=True: with normalize=False there is no softmax"),
    row("no fused kernel yet", _INPUT, lambda: attend(_N, _N, _N, _GRAPH, implementation="torch"),
        "implementation: expected one of .*got 'torch'"),
]
# fmt: on


def _bad_offsets():
    parts = torch.tensor([0, 5, 2]), torch.tensor([0, 1]), torch.ones(2)
    return torch.sparse_csr_tensor(*parts, size=(2, 2), check_invariants=False)


def _bad_columns():
    parts = torch.tensor([0, 1, 2]), torch.tensor([0, 9]), torch.ones(2)
    return torch.sparse_csr_tensor(*parts, size=(2, 2), check_invariants=False)


# fmt: off
_GRAPH_ROWS = [
    row("index too large", _GRAPHS, lambda: Graph.from_edge_index(torch.tensor([[0, 9], [1, 1]]), num_nodes=2),
        r"source \(key\): expected indices from 0 to 1 \(2 nodes\), got 9 at edge 1"),
    row("negative index", _GRAPHS, lambda: Graph.from_edge_index(torch.tensor([[0], [-1]]), num_nodes=2),
        r"target \(query\): expected indices from 0 to 1 \(2 nodes\), got -1 at edge 0"),
    row("an edge and no node", _GRAPHS, lambda: Graph.from_edge_index(torch.tensor([[0], [0]]), num_nodes=0),
        r"source \(key\): expected indices from 0 to -1 \(0 nodes\), got 0 at edge 0"),
    row("index past 32 bits", _GRAPHS, lambda: Graph.from_edge_index(torch.tensor([[2**32], [0]]), num_nodes=2),
        r"source \(key\): expected indices from 0 to 1 .*got 4294967296 at edge 0"),
    row("no number of nodes", _GRAPHS, lambda: Graph.from_edge_index(_EDGE_INDEX),
        "num_queries: expected a number of nodes, got None. give num_nodes"),
    row("nodes as float", _GRAPHS, lambda: Graph.from_edge_index(_EDGE_INDEX, num_nodes=4.0),
        "num_queries: expected an int >= 0, .*got 4.0"),
    row("negative nodes", _GRAPHS, lambda: Graph.from_edge_index(_EDGE_INDEX, num_queries=4, num_keys=-4),
        "num_keys: expected an int >= 0, .*got -4"),
    row("more nodes than int64 can count", _GRAPHS, lambda: Graph.from_edge_index(_EDGE_INDEX, num_nodes=10**30),
        "num_queries: expected an int >= 0, .*got 1000"),
    row("more nodes than memory", e.OutOfMemoryError, lambda: Graph.from_edge_index(_EDGE_INDEX, num_nodes=2**49),
        "memory ran out: .*tried to allocate 4503599627370504 bytes"),
    row("edges as floats", _INPUT, lambda: Graph.from_edge_index(_EDGE_INDEX.float(), num_nodes=4),
        "edge_index: expected torch.int64, got torch.float32"),
    row("edges as int32", _INPUT, lambda: Graph.from_edge_index(_EDGE_INDEX.int(), num_nodes=4),
        "edge_index: expected torch.int64, got torch.int32"),
    row("edges as rows", _SHAPE, lambda: Graph.from_edge_index(_EDGE_INDEX.T, num_nodes=4),
        r"edge_index: expected \(2, edges\), got \(3, 2\)"),
    row("edges as list", _INPUT, lambda: Graph.from_edge_index([[0], [1]], num_nodes=4),
        "edge_index: expected a torch.Tensor, got list"),
    row("edges without data", _INPUT, lambda: Graph.from_edge_index(_EDGE_INDEX.to("meta"), num_nodes=4),
        "edge_index: expected a device with data, got meta"),
    row("sparse edges", _INPUT, lambda: Graph.from_edge_index(_EDGE_INDEX.to_sparse(), num_nodes=4),
        "edge_index: expected a dense tensor, got torch.sparse_coo"),
    row("number of values", _SHAPE, lambda: Graph.from_edge_index(_EDGE_INDEX, num_nodes=4, values=torch.ones(4)),
        r"values: expected \(edges=3,\), got \(4,\)"),
    row("values elsewhere", _INPUT,
        lambda: Graph.from_edge_index(_EDGE_INDEX, num_nodes=4, values=torch.ones(3, device="meta")),
        "values: expected device cpu, as edge_index, got meta"),
    row("adjacency as list", _SPARSE, lambda: Graph.from_adjacency([[0, 1], [1, 0]]),
        "adjacency: expected a scipy.sparse matrix, .*got list"),
    row("adjacency of rank 3", _SHAPE, lambda: Graph.from_adjacency(torch.ones(2, 2, 2)),
        r"adjacency: expected a matrix, got \(2, 2, 2\)"),
    row("adjacency of text", _SPARSE, lambda: Graph.from_adjacency(np.array([["a"]])),
        "adjacency: expected entries of a numeric dtype, got <U1"),
    row("offsets that fall", _SPARSE, lambda: Graph.from_adjacency(_bad_offsets()),
        "adjacency: expected 3 offsets that rise"),
    row("column out of range", _SPARSE, lambda: Graph.from_adjacency(_bad_columns()),
        r"adjacency: source \(key\): expected indices from 0 to 1 .*got 9 at edge 1"),
    row("networkx graph as list", _INPUT, lambda: Graph.from_networkx([("u", "v")]),
        "graph: expected a networkx graph, got list"),
    row("batch of no list", _INPUT, lambda: Graph.batch(_GRAPH), "graphs: expected a list of Graphs, got Graph"),
    row("batch of others", _INPUT, lambda: Graph.batch([_GRAPH, 3]), r"graphs\[1\]: expected a Graph, got int"),
    row("batch on two devices", _INPUT, lambda: Graph.batch([_GRAPH, _GRAPH.to("meta")]),
        r"graphs\[1\]: expected device cpu, as graphs\[0\], got meta"),
    row("self-loops of two sets", _GRAPHS,
        lambda: Graph.from_edge_index(_EDGE_INDEX, num_queries=5, num_keys=4).with_self_loops(),
        "graph: expected as many queries as keys for self-loops, got 5 queries and 4 keys"),
    row("dense of another size", _SHAPE, lambda: _GRAPH.to_dense(4, 5),
        r"\(num_queries, num_keys\): expected \(4, 4\), the graph's own, got \(4, 5\)"),
    row("alignment", _CONFIG, lambda: Causal(align="left"),
        "align: expected 'top_left', 'bottom_right' or None, got 'left'"),
    row("blocked as list", _MASK, lambda: mask_from_blocked([0, 1]), "blocked: expected a torch.Tensor, got list"),
    row("blocked of -inf", _MASK, lambda: mask_from_blocked(torch.tensor([0.0, -torch.inf])),
        "blocked: expected only the values 0 and 1, got others, in a torch.float32 tensor. .*bias="),
]
# fmt: on

# fmt: off
_PATTERNS = [
    row("negative window", _CONFIG, lambda: Window(-1, 0), r"left: expected an int >= 0, up to 2\^59, got -1"),
    row("window without end", _CONFIG, lambda: Window(0, 2**63), r"right: expected an int >= 0, up to 2\^59, got 9223"),
    row("stride 0", _CONFIG, lambda: Strided(0, 1), "stride: expected an int >= 1, .*got 0"),
    row("summary above block", _CONFIG, lambda: Fixed(4, 5), "summary: expected at most block=4, got 5"),
    row("negative token", _CONFIG, lambda: Global((3, -1)), r"tokens\[1\]: expected an int >= 0, .*got -1"),
    row("tokens as text", _CONFIG, lambda: Global("cls"), "tokens: expected a sequence of ints, got 'cls'"),
    row("random blocks of no size", _CONFIG, lambda: RandomBlocks(1, size=0), "size: expected an int >= 1, .*got 0"),
    row("corner", _CONFIG, lambda: Window(1, 1, align="left"), "align: expected 'top_left', .*got 'left'"),
    row("two corners", _CONFIG, lambda: Causal("top_left") & Window(1, 1, "bottom_right"),
        "align: expected one alignment in a composed pattern, got bottom_right and top_left"),
    row("repeated edge in a composed pattern", _GRAPHS,
        lambda: Graph.from_edge_index(torch.zeros(2, 2, dtype=torch.int64), num_nodes=5) & Causal(),
        "graph: expected each edge once in a composed pattern, got an edge that is repeated"),
    row("blocks as floats", _MASK, lambda: Blocks(torch.ones(2, 2), 3),
        r"mask: expected a boolean matrix \(query blocks, key blocks\), got torch.float32 \(2, 2\)"),
    row("blocks of another grid", _SHAPE, lambda: attend(_X, _X, _X, Blocks(torch.ones(3, 2, dtype=torch.bool), 3)),
        r"mask: expected \(2, 2\), blocks of 3 for 5 queries and 5 keys, got \(3, 2\)"),
    row("documents that do not add up", _SHAPE, lambda: attend(_X, _X, _X, Documents((2, 2))),
        "Documents: expected 4 queries and keys, .*got 5 queries and 5 keys"),
    row("window of two lengths", _SHAPE, lambda: attend(_X[:, :3], _X, _X, Window(1, 1)),
        "Window: expected as many queries as keys, or an alignment, got 3 queries and 5 keys. .*top_left"),
    row("blocks to draw of no size", _CONFIG, lambda: Causal().to_blocks(0, 5, 5), "size: expected an int >= 1.*got 0"),
    row("edges with a window", _INPUT, lambda: attend(_X, _X, _X, Window(1, 1), edges=EdgeFeatures(torch.ones(3, 2))),
        "edges: expected None with the pattern Window, got EdgeFeatures"),
    row("mask of rank 3 with a window", _MASK,
        lambda: attend(_X, _X, _X, Window(1, 1), mask=torch.ones(2, 5, 5, dtype=torch.bool)),
        r"mask: expected rank 1, 2 or 4, got rank 3, \(2, 5, 5\).*mask\[:, None\]"),
    row("aggregation with a window", _UNSUPPORTED, lambda: attend(_X, _X, _X, Window(1, 1), aggregation="max"),
        "aggregation='max'.*the pattern Window has only aggregation='sum'"),
]
# fmt: on

# fmt: off
_NEIGHBOURS = [
    row("points as list", _INPUT, lambda: Graph.radius([[0.0]], 1.0), "positions: expected a torch.Tensor, got list"),
    row("integer points", _INPUT, lambda: Graph.radius(torch.ones(4, 3, dtype=torch.int64), 1.0),
        "positions: expected a floating-point dtype.*got torch.int64"),
    row("points of rank 1", _SHAPE, lambda: Graph.nearest(_P[0], 1),
        r"positions: expected \(points, dim\), got \(3,\)"),
    row("points of rank 3", _SHAPE, lambda: Graph.radius(_P[None], 1.0), r"\(points, dim\), got \(1, 4, 3\)"),
    row("points without coordinates", _SHAPE, lambda: Graph.radius(_P[:, :0], 1.0),
        r"positions: expected \(points, dim\) with dim >= 1, got \(4, 0\)"),
    row("NaN point", _INPUT, lambda: Graph.radius(torch.tensor([[0.0, _NAN]]), 1.0),
        r"positions: expected finite coordinates, below 1e\+150, got 1 others among 2"),
    row("infinite point", _INPUT, lambda: Graph.nearest(_P / 0, 1),
        "positions: expected finite.*got 12 others among 12"),
    row("points on meta", _INPUT, lambda: Graph.radius(_P.to("meta"), 1.0),
        "positions: expected a device with data, got"),
    row("radius of 0", _INPUT, lambda: Graph.radius(_P, 0.0), "r: expected a finite number above 0.*, got 0.0"),
    row("radius below 0", _INPUT, lambda: Graph.radius(_P, -1), "r: expected a finite number above 0.*, got -1"),
    row("NaN radius", _INPUT, lambda: Graph.radius(_P, _NAN), "r: expected a finite number above 0.*, got nan"),
    row("infinite radius", _INPUT, lambda: Graph.radius(_P, float("inf")), "r: expected a finite number.*, got inf"),
    row("radius as text", _INPUT, lambda: Graph.radius(_P, "1"), "r: expected a finite number above 0.*, got '1'"),
    row("radius that is 0 in float16", _INPUT, lambda: Graph.radius(_P.half(), 1e-9),
        "r: expected a number above 0 in torch.float16, got 1e-09"),
    row("no neighbour asked for", _INPUT, lambda: Graph.nearest(_P, 0), "k: expected an int of at least 1, got 0"),
    row("neighbours as float", _INPUT, lambda: Graph.nearest(_P, 2.0), r"k: expected an int of at least 1, got 2\.0"),
    row("too many neighbours", _GRAPHS, lambda: Graph.radius(torch.zeros(4, 3), 1.0, max_neighbours=2),
        "max_neighbours: expected at most 2 neighbours for each query, got 3 for query 0, and too many for 4 in all"),
    row("cap as float", _INPUT, lambda: Graph.radius(_P, 1.0, max_neighbours=2.5), "max_neighbours: .*got 2.5"),
    row("batch of another length", _SHAPE, lambda: Graph.radius(_P, 1.0, torch.tensor([0, 1])),
        r"batch: expected \(4,\), a cloud for each of positions, got \(2,\)"),
    row("batch that falls", _GRAPHS, lambda: Graph.radius(_P, 1.0, torch.tensor([0, 1, 0, 1])),
        r"batch: expected cloud numbers from 0 that never fall.*got \[0, 1, 0, 1\]"),
    row("negative cloud", _GRAPHS, lambda: Graph.nearest(_P, 1, torch.tensor([-1, 0, 0, 1])),
        "batch: expected cloud.*-1"),
    row("batch of int32", _INPUT, lambda: Graph.radius(_P, 1.0, torch.zeros(4, dtype=torch.int32)),
        "batch: expected torch.int64, got torch.int32"),
    row("queries of another dimension", _SHAPE, lambda: Graph.radius(_P, 1.0, queries=_P[:, :2]),
        r"queries: expected \(queries=4, dim=3\), got \(4, 2\). dim is 3 in positions"),
    row("queries of another dtype", _INPUT, lambda: Graph.nearest(_P, 1, queries=_P.double()),
        "queries: expected torch.float32, as positions, got torch.float64"),
    row("query_batch without queries", _INPUT, lambda: Graph.radius(_P, 1.0, query_batch=torch.zeros(4).long()),
        "query_batch: expected None without queries"),
    row("queries without query_batch", _INPUT, lambda: Graph.radius(_P, 1.0, torch.zeros(4).long(), queries=_P),
        "query_batch: expected the cloud of each query, as batch is given, got None"),
    row("query_batch without batch", _INPUT,
        lambda: Graph.radius(_P, 1.0, queries=_P, query_batch=torch.zeros(4).long()),
        "query_batch: expected None, got a tensor, and batch is None"),
    row("cell of another dimension", _SHAPE, lambda: Graph.radius(_P, 1.0, cell=torch.eye(2)),
        r"cell: expected \(3, 3\), one vector in each row, got \(2, 2\)"),
    row("cell of lengths", _SHAPE, lambda: Graph.radius(_P, 1.0, cell=torch.ones(3)),
        r"cell: .*got \(3,\). torch.diag"),
    row("too few cells", _SHAPE, lambda: Graph.radius(_P, 1.0, torch.tensor([0, 0, 1, 2]), cell=torch.ones(2, 3, 3)),
        r"cell: expected \(3, 3\).* or \(3, 3, 3\), one cell per cloud, got \(2, 3, 3\)"),
    row("singular cell", e.MatrixOperationError, lambda: Graph.radius(_P, 1.0, cell=torch.ones(3, 3)),
        "cell: expected vectors that repeat to point in independent directions, got a singular cell"),
    row("one singular cell", e.MatrixOperationError,
        lambda: Graph.nearest(_P, 1, torch.tensor([0, 0, 1, 1]), cell=torch.stack([torch.eye(3), torch.zeros(3, 3)])),
        r"cell\[1\]: expected vectors .*singular"),
    row("NaN cell", _INPUT, lambda: Graph.radius(_P, 1.0, cell=torch.eye(3) * _NAN), "cell: expected finite numbers"),
    row("periodic without a cell", _INPUT, lambda: Graph.radius(_P, 1.0, periodic=True),
        "cell: expected a cell, as periodic is given, got None"),
    row("periodic of another length", _INPUT, lambda: Graph.radius(_P, 1.0, cell=torch.eye(3), periodic=[True]),
        r"periodic: expected a bool, or 3 of them.*got \[True\]"),
    row("shifts of floats", _INPUT, lambda: Graph.from_edge_index(_EDGE_INDEX, 4, shifts=torch.ones(3, 3)),
        "shifts: expected torch.int64, got torch.float32"),
    row("shifts of other edges", _SHAPE, lambda: Graph.from_edge_index(_EDGE_INDEX, 4, shifts=torch.ones(2, 3).long()),
        r"shifts: expected \(edges=3, dim\), got \(2, 3\)"),
    row("shifts of several dimensions", _GRAPHS, lambda: Graph.batch([_periodic(2), _periodic(3)]),
        r"graphs: expected shifts of one dimension, got dimensions \[2, 3\]"),
    row("displacements of other points", _SHAPE, lambda: _GRAPH.displacements(_P[:3]),
        r"positions: expected \(keys=4, dim\), got \(3, 3\). keys is 4 in the graph"),
    row("displacements without queries", _GRAPHS, lambda: Graph.radius(_P, 1.0, queries=_P[:2]).displacements(_P),
        "queries: expected the positions of the graph's 2 queries, which are not its 4 keys"),
    row("displacements without the cell", _INPUT, lambda: _periodic(3).displacements(_P),
        "cell: expected the cell that the graph's shifts count, got None"),
    row("displacements with a needless cell", _INPUT, lambda: _GRAPH.displacements(_P, torch.eye(3)),
        "cell: expected None, as the graph has no shifts"),
    row("displacements of another dimension", _SHAPE, lambda: _periodic(3).displacements(_P[:, :2], torch.eye(2)),
        r"positions: expected \(points, dim=3\), as the graph's shifts, got \(4, 2\)"),
    row("displacements in another cell", _SHAPE, lambda: _periodic(3).displacements(_P, torch.eye(2)),
        r"cell: expected \(3, 3\) or \(clouds, 3, 3\), got \(2, 2\)"),
    row("displacements in cells of no clouds", _INPUT, lambda: _periodic(3).displacements(_P, torch.ones(2, 3, 3)),
        "batch: expected the cloud of each of positions, as there is a cell for each, got None"),
    row("displacements in too few cells", _GRAPHS,
        lambda: _periodic(3).displacements(_P, torch.ones(2, 3, 3), batch=torch.tensor([0, 0, 1, 2])),
        "batch: expected clouds from 0 to 1, as cell has, got clouds from 0 to 2"),
    row("displacements of a short batch", _SHAPE,
        lambda: _periodic(3).displacements(_P, torch.ones(2, 3, 3), batch=torch.tensor([0, 1])),
        r"batch: expected \(4,\), a cloud for each of positions, got \(2,\)"),
]

_MODULES = [
    row("heads that do not divide", _CONFIG, lambda: MultiHeadAttention(8, 3),
        "num_heads: expected a divisor of d_model=8, got 3. d_model=9 would do"),
    row("no head", _CONFIG, lambda: ScaledDotProductAttention(8, 0), "num_heads: expected an int of at least 1.*got 0"),
    row("dropout of a module", _CONFIG, lambda: GraphAttention(8, 2, dropout=1.5),
        "dropout: expected a finite number at least 0 and below 1, got 1.5"),
    row("eps nan", _CONFIG, lambda: _mha(eps=_NAN), "eps: expected a finite number above 0, got nan"),
    row("other positions", _CONFIG, lambda: _mha(positions="rotary"), "positions: expected one of 'no.*got 'rotary'"),
    row("integer parameters", _INPUT, lambda: _mha(dtype=torch.int64),
        "dtype: expected a floating-point dtype.*got torch.int64"),
    row("unknown device", _INPUT, lambda: _gat(device="abacus"),
        "device: expected a device that is here, got 'abacus'"),
    row("unknown score", _CONFIG, lambda: _gat(score="cosine"), "score: expected one of 'additive', .*got 'cosine'"),
    row("slope of the dot product", _CONFIG, lambda: _gat(score="dot", negative_slope=0.1),
        "negative_slope: expected its default 0.2 here, got '?0.1'?. the dot product has no LeakyReLU"),
    row("three widths", _CONFIG, lambda: GraphAttention(8, 2, in_features=(1, 2, 3)),
        r"in_features: expected an int, a pair .*got \(1, 2, 3\)"),
    row("config as dictionary", _CONFIG, lambda: MultiHeadAttention.from_config({"d_model": 8}),
        "config: expected AttentionConfig, got dict"),
    row("config of another module", _CONFIG, lambda: GraphAttention.from_config(AttentionConfig(8, 2)),
        "config: expected GraphAttentionConfig, got AttentionConfig"),
    row("config that has no use", _CONFIG,
        lambda: ScaledDotProductAttention.from_config(AttentionConfig(8, 2, qk_norm=True)),
        "qk_norm: expected its default False here, got True. ScaledDotProductAttention has no parameters"),
    row("width", _SHAPE, lambda: _mha()(_S[..., :7]),
        r"query: expected \(batch=2, .*d_model=8\), got \(2, 5, 7\). d_model is 8 in the module"),
    row("rank", _SHAPE, lambda: _mha()(_S[0]), r"query: expected \(batch, query_length, d_model=8\), got \(5, 8\)"),
    row("key and value", _SHAPE, lambda: ScaledDotProductAttention(8, 2)(_S, _S[:, :3], _S[:, :4]),
        r"value: expected \(batch=2, key_length=3, d_model=8\), got \(2, 4, 8\). key_length is 3 in key"),
    row("input as list", _INPUT, lambda: _mha()([[[1.0] * 8]]), "query: expected a torch.Tensor, got list"),
    row("input of another dtype", _INPUT, lambda: _mha()(_S, _S.double()),
        "key: expected torch.float32, as the parameters, got torch.float64"),
    row("input elsewhere", _INPUT, lambda: _mha()(_S.to("meta")),
        "query: expected device cpu, as the parameters, got meta"),
    row("sparse input", _INPUT, lambda: _mha()(_S.to_sparse()), "query: expected a dense tensor, got torch.sparse_coo"),
    row("module's integer mask", _MASK, lambda: _mha()(_S, mask=torch.ones(2, 5, 5, dtype=torch.int64)),
        "mask: expected a torch.bool tensor.*got torch.int64. .*mask_from_blocked"),
    row("module's mask", _MASK, lambda: _mha()(_S, mask=torch.ones(3, 5, 5, dtype=torch.bool)),
        r"mask: expected a shape that broadcasts to \(batch=2, heads=2, .*got \(3, 1, 5, 5\)"),
    row("longer than the positions", _SHAPE, lambda: _mha(positions="learned", max_seq_len=4)(_S),
        "query: expected a length of at most max_seq_len=4, .*got 5"),
    row("causal cross-attention", _SHAPE, lambda: _mha(causal=True)(_S, _S[:, :3]),
        "causal: expected as many queries as keys, got 5 queries and 3 keys. .*bottom_right"),
    row("all weights", _INPUT, lambda: _mha()(_S, return_weights="all"),
        "return_weights: expected False, True, 'mean' or 'heads', got 'all'"),
    row("module's mask as pattern", _CONFIG, lambda: _mha(pattern=torch.ones(5, 5, dtype=torch.bool)),
        r"pattern: expected a pattern \(Causal, Window, Graph, ...\), TopK or None, got Tensor"),
    row("graph of another length", _SHAPE, lambda: _mha(pattern=_GRAPH)(_S),
        r"query: expected \(batch=2, queries=4, .*got \(2, 5, 2, 4\). queries is 4 in the graph"),
    row("how many chosen keys", _CONFIG, lambda: SparseAttention(8, 2, sparsity_pattern="top_k"),
        "top_k: expected a number with sparsity_pattern='top_k', got None"),
    row("sparse cross-attention", _SHAPE, lambda: SparseAttention(8, 2)(_S, _S[:, :3]),
        "key: expected as many keys as queries, 5, got 3 keys. .*bottom_right"),
    row("connectivity as list", _SPARSE, lambda: SparseAttention(8, 2).sparse_forward(_S, _S, _S, [[1]]),
        "adjacency: expected a scipy.sparse matrix, .*got list"),
    row("connectivity of another size", _SHAPE,
        lambda: SparseAttention(8, 2).sparse_forward(_S, _S, _S, torch.ones(5, 4)),
        r"connectivity: expected \(query_length=5, key_length=5\), got \(5, 4\)"),
    row("NaN in the output", e.NumericalInstabilityError, lambda: _mha(check_finite=True)(_S * _NAN),
        r"MultiHeadAttention output: expected finite numbers \(check_finite=True\), got 80 NaN or Inf among 80"),
    row("node features", _SHAPE, lambda: _gat()(_F[:, :2], _EDGE_INDEX),
        r"x: expected \(nodes=4, features=3\), got \(4, 2\). features is 3 in the module"),
    row("three node sets", _INPUT, lambda: _gat()((_F, _F, _F), _EDGE_INDEX),
        r"x: expected a tensor or a pair .*got 3 items"),
    row("batch in one of a pair", _SHAPE, lambda: _gat()((_F, _F[None]), _EDGE_INDEX),
        r"x\[1\]: expected \(target_nodes, target_features=3\), got \(1, 4, 3\)"),
    row("node features of another dtype", _INPUT, lambda: _gat()(_F.double(), _EDGE_INDEX),
        "x: expected torch.float32, as the parameters, got torch.float64"),
    row("COO features", _INPUT, lambda: _gat()(_F.to_sparse(), _EDGE_INDEX),
        "x: expected a dense tensor or a sparse CSR .*got torch.sparse_coo"),
    row("graph as list", _INPUT, lambda: _gat()(_F, [[0], [1]]), "graph: expected a Graph or an edge_index, got list"),
    row("edges elsewhere", _INPUT, lambda: _gat()(_F, _EDGE_INDEX.to("meta")),
        "graph: expected device cpu, as x, got meta"),
    row("graph of another size", _SHAPE, lambda: _gat()(_F[:3], _GRAPH),
        "graph: expected 3 keys and 3 queries, the nodes of x, got 4 keys and 4 queries"),
    row("edge of no node", _GRAPHS, lambda: _gat().graph_forward(_F[:3], _EDGE_INDEX),
        r"target \(query\): expected indices from 0 to 2 \(3 nodes\), got 3 at edge 2"),
    row("adjacency of another size", _SHAPE, lambda: _gat().sparse_forward(_F, torch.ones(2, 2)),
        "graph: expected 4 keys and 4 queries, the nodes of x, got 2 keys and 2 queries"),
    row("edge features that are missing", _INPUT, lambda: _gat(edge_dim=5)(_F, _EDGE_INDEX),
        r"edge_attr: expected \(edges, edge_dim=5\), got None"),
    row("edge features without use", _INPUT, lambda: _gat()(_F, _EDGE_INDEX, torch.ones(3, 5)),
        "edge_attr: expected None: the module was built without edge_dim, got a tensor"),
    row("too few edge features", _SHAPE, lambda: _gat(edge_dim=5)(_F, _EDGE_INDEX, torch.ones(2, 5)),
        r"edge_attr: expected \(edges=3, edge_dim=5\), got \(2, 5\). edges is 3 in the graph"),
    row("edge features of another width", _SHAPE, lambda: _gat(edge_dim=5)(_F, _EDGE_INDEX, torch.ones(3, 4)),
        r"edge_attr: expected \(edges=3, edge_dim=5\), got \(3, 4\). edge_dim is 5 in the module"),
]
# fmt: on

# fmt: off
_TRAINING = [
    row("set too few", _SHAPE, lambda: _mha().set_parameters(torch.ones(287)),
        r"vector: expected \(parameter_count=288,\), got \(287,\)"),
    row("set a list", _INPUT, lambda: _mha().set_parameters([1.0]), "vector: expected a torch.Tensor, got list"),
    row("set integers", _INPUT, lambda: _mha().set_parameters(torch.ones(288, dtype=torch.int64)),
        "vector: expected a floating-point dtype.*got torch.int64"),
    row("update without gradients", e.TrainingError, lambda: _mha().update_parameters(learning_rate=0.1),
        "update_parameters: no gradients are held; call loss.backward"),
    row("update with others' gradients", _SHAPE,
        lambda: _mha().update_parameters(AttentionGradients({}, torch.ones(3)), learning_rate=0.1),
        r"gradients: expected \(parameter_count=288,\), got \(3,\)"),
    row("negative learning rate", _INPUT, lambda: _mha().update_parameters(torch.ones(288), learning_rate=-0.1),
        "learning_rate: expected a finite number at least 0, got -0.1"),
    row("shape of grad_output", _SHAPE, lambda: _backward(torch.ones(2, 5, 7)),
        r"grad_output: expected \(2, 5, 8\), got \(2, 5, 7\)"),
    row("dtype of grad_output", _INPUT, lambda: _backward(torch.ones(2, 5, 8, dtype=torch.float64)),
        "grad_output: expected torch.float32, as the output, got torch.float64"),
    row("device of grad_output", _INPUT, lambda: _backward(torch.ones(2, 5, 8, device="meta")),
        "grad_output: expected device cpu, as the output, got meta"),
    row("no cache", _INPUT, lambda: _mha().backward(_S, _mha()(_S)),
        "cache: expected the AttentionCache of cached_forward, got AttentionOutput"),
    row("l2_weight", _INPUT, lambda: _mha().regularization_loss(float("inf")),
        "l2_weight: expected a finite number at least 0, got inf"),
]
# fmt: on

# fmt: off
_CONFIGS = [
    row("unknown key", _CONFIG, lambda: AttentionConfig.from_dict({"d_modle": 8}),
        "AttentionConfig: expected only the fields d_model, .*got 'd_modle'"),
    row("not JSON", _CONFIG, lambda: AttentionConfig.from_json("{d_model"),
        r"AttentionConfig: not valid JSON \(.*line 1"),
    row("JSON without end", _CONFIG, lambda: AttentionConfig.from_json("[" * 200_000),
        r"AttentionConfig: not valid JSON \(.*recursion"),
    row("JSON of a list", _CONFIG, lambda: AttentionConfig.from_json("[8]"),
        "AttentionConfig: expected a dictionary, got list"),
    row("NaN in JSON", _CONFIG, lambda: AttentionConfig.from_json('{"scale": NaN}'),
        "scale: expected a finite number above 0, got nan"),
    row("width of no machine", _CONFIG, lambda: AttentionConfig(8 * 10**30),
        r"d_model: expected an int of at least 1 and below 2\^31, got 8000"),
    row("causal graph", _CONFIG, lambda: GraphAttentionConfig(AttentionConfig(8, 2, causal=True)),
        "causal: expected its default False here, got True. a graph has no sequence"),
    row("base as dictionary", _CONFIG, lambda: GraphAttentionConfig(base={}),
        "base: expected AttentionConfig, got dict"),
    row("edge features of no width", _CONFIG, lambda: GraphAttentionConfig(use_edge_features=True),
        "edge_dim: expected a width, got None. use_edge_features is True"),
    row("global without tokens", _CONFIG, lambda: SparseAttentionConfig(sparsity_pattern="global"),
        "num_global_tokens: expected a number with sparsity_pattern='global', got None"),
    row("window of top_k", _CONFIG, lambda: SparseAttentionConfig(sparsity_pattern="top_k", top_k=3, local_window=5),
        "local_window: expected its default 128 here, got '?5'?. the pattern 'top_k' does not use it"),
    row("negative radius", _CONFIG, lambda: GeometricAttentionConfig(radius=-1),
        "radius: expected a finite number above 0, got -1"),
    row("builder, heads", _CONFIG, lambda: AttentionBuilder().d_model(10).num_heads(4).build_multi_head(),
        "num_heads: expected a divisor of d_model=10, got 4"),
    row("builder, unused setting", _CONFIG, lambda: AttentionBuilder().positions("learned").build_scaled_dot_product(),
        "positions: expected its default 'none' here, got 'learned'. ScaledDotProductAttention"),
    row("graph builder, aggregation", _CONFIG, lambda: GraphAttentionBuilder().aggregation("min").build(),
        "aggregation: expected one of 'sum', 'mean', 'max', got 'min'"),
    row("sparse builder, unused setting", _CONFIG,
        lambda: SparseAttentionBuilder().sparsity_pattern("block").local_window(3).build_sparse(),
        "local_window: expected its default 128 here, got '?3'?. the pattern 'block' does not use it"),
]
# fmt: on


def _write(settings, weights=None):
    """Writes a folder `saved` with these files."""

    def prepare(folder):
        saved = folder / "saved"
        saved.mkdir()
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (saved / "config.json").write_text(text)
        if isinstance(weights, bytes):
            (saved / "model.safetensors").write_bytes(weights)
        elif weights is not None:
            safetensors.torch.save_file(weights, saved / "model.safetensors")

    return prepare


def _settings(**config):
    return {"module": "MultiHeadAttention", "config": {"d_model": 8, "num_heads": 2, **config}}


def _saved(name, error, settings, text, weights=None):
    return Row(name, error, lambda folder: load(folder / "saved"), text, _write(settings, weights))


def _truncated(folder):
    save(_mha(), folder / "saved")
    weights = folder / "saved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])


def _file_in_the_way(folder):
    (folder / "file").write_text("not a folder")


# fmt: off
_FILES = [
    row("save another module", _INPUT, lambda: save(torch.nn.Linear(1, 1), "saved"),
        "module: expected one of .*MultiHead.*got Linear"),
    row("save a pattern of tensors", _UNSUPPORTED, lambda: save(_mha(pattern=Blocks(torch.ones(1, 1) > 0, 2)), "saved"),
        "Blocks is not kept in a file: of patterns those of numbers are: Causal, "),
    row("save to a number", _INPUT, lambda: save(_mha(), 3), "folder: expected a path, got 3"),
    row("save to no path", _INPUT, lambda: save(_mha(), "a\0b"), r"folder: expected a path, got 'a\\x00b'"),
    Row("save below a file", _INPUT, lambda folder: save(_mha(), folder / "file" / "saved"),
        "file/saved: expected a folder, got Not a directory", _file_in_the_way),
    Row("save onto a folder", _INPUT,
        lambda folder: save(_mha(), folder),
        "model.safetensors: expected a writable file, got Is a directory",
        lambda folder: (folder / "model.safetensors").mkdir()),
    row("load a number", _INPUT, lambda: load(3), "folder: expected a path, got 3"),
    row("load nothing", _INPUT, lambda: load("nowhere"),
        "model.safetensors: expected a readable safetensors file, got .*No such file"),
    Row("load to an unknown device", _INPUT, lambda folder: load(folder, device="abacus"),
        "device: expected the name of a device, got 'abacus'", lambda folder: save(_mha(), folder)),
    _saved("garbage settings", _INPUT, "{", "config.json: expected a readable JSON file, got Expecting"),
    _saved("settings without end", _INPUT, "[" * 200_000,
        "config.json: expected a readable JSON file, got .*recursion"),
    _saved("settings as list", _CONFIG, [], "config.json: expected the keys module, config, got list"),
    _saved("settings with more", _CONFIG, {**_settings(), "code": 1}, "expected the keys module, config, got .*code"),
    _saved("unknown module", _CONFIG, {**_settings(), "module": "Linear"}, "module: expected one of .*got 'Linear'"),
    _saved("dotted path", _CONFIG, {**_settings(), "module": "os.system"}, "module: expected one of .*got 'os.system'"),
    _saved("module as list", _CONFIG, {**_settings(), "module": ["os"]}, r"module: expected one of .*got \['os'\]"),
    _saved("unknown setting", _CONFIG, _settings(hook="os"), "AttentionConfig: expected only the fields .*got 'hook'"),
    _saved("setting of another type", _CONFIG, _settings(use_bias="no"), "use_bias: expected True or False, got 'no'"),
    _saved("no weights", _INPUT, _settings(),
        "model.safetensors: expected a readable safetensors file, got No such file"),
    _saved("garbage weights", _INPUT, _settings(),
        "model.safetensors: expected a readable safetensors file, got", b"PK\x03"),
    Row("truncated weights", _INPUT, lambda folder: load(folder / "saved"),
        "model.safetensors: expected a readable safetensors file, got Error", _truncated),
    _saved("weights of another shape", _INPUT,
        _settings(use_bias=False),
        r"weights do not fit config.json: .*query_projection.weight.*\[7, 8\].*\[8, 8\]",
        {f"{name}_projection.weight": torch.ones(7, 8) for name in ("query", "key", "value", "output")}),
    _saved("settings of petabytes", _INPUT, _settings(d_model=10_000_000),
        "weights do not fit config.json: .*Missing key", {"weight": torch.ones(1)}),
]
# fmt: on

_ROWS = [
    *_ATTEND_DENSE,
    *_ATTEND_GRAPH,
    *_PATTERNS,
    *_GRAPH_ROWS,
    *_NEIGHBOURS,
    *_MODULES,
    *_TRAINING,
    *_CONFIGS,
    *_FILES,
]


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("bad", _ROWS, ids=lambda bad: bad.name.replace(" ", "-"))
def test_bad_call_is_named_and_leaves_no_file(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad.prepare(tmp_path)
    before = _contents(tmp_path)

    with pytest.raises(e.AttentionError, match=re.compile(bad.text, re.DOTALL)) as caught:
        bad.call(tmp_path)

    assert type(caught.value) is bad.error
    assert _contents(tmp_path) == before


def test_rows_are_many_and_named_once():
    names = [bad.name for bad in _ROWS]
    assert len(names) >= 60
    assert len(set(names)) == len(names)
