"""Graph.nearest by cosine, dot and distance in many dimensions, and through an index, against brute force."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from anyattention import Graph
from anyattention.errors import DimensionMismatchError, InvalidInputError
from anyattention.geometry import nearest, products
from anyattention.memory import ExactIndex
from anyattention.native import load, topk
from neighbour_oracle import brute_force, first_k


def _scores(measure, queries, keys):
    """`(queries, keys)` float64, the larger the nearer."""
    queries, keys = np.asarray(queries, dtype=np.float64), np.asarray(keys, dtype=np.float64)
    if measure == "euclidean":
        return -np.sqrt(((queries[:, None] - keys[None]) ** 2).sum(-1))
    if measure == "cosine":
        queries, keys = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, keys))
    return queries @ keys.T


def _random(count, dim, seed, dtype=torch.float32):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _rows(graph):
    """The keys of each query, ascending."""
    offsets, keys = graph.query_offsets.tolist(), graph.keys_by_query.tolist()
    return [keys[first:end] for first, end in itertools.pairwise(offsets)]


def _expected(scores, k, *, is_one_set, batch=None, query_batch=None):
    """By the definition: the k largest of each row, of equal scores the first; ascending."""
    rows = []
    for i, row in enumerate(scores):
        allowed = [
            j
            for j in range(len(row))
            if not (is_one_set and i == j) and (batch is None or int(batch[j]) == int(query_batch[i]))
        ]
        rows.append(sorted(sorted(allowed, key=lambda j: (-row[j], j))[:k]))
    return rows


@pytest.mark.parametrize("measure", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dim", [1, 3, 11, 64])
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_the_nearest_are_those_of_brute_force(measure, dim, others, batched):
    keys = _random(53, dim, dim)
    queries = _random(17, dim, dim + 1) if others else None
    batch = torch.tensor([0] * 20 + [2] * 3 + [3] * 30) if batched else None
    query_batch = torch.tensor([0] * 5 + [1] * 2 + [2] * 4 + [3] * 6) if batched and others else None
    graph = Graph.nearest(keys, 7, batch, queries=queries, query_batch=query_batch, measure=measure)
    own = query_batch if others else batch
    scores = _scores(measure, keys if queries is None else queries, keys)
    assert _rows(graph) == _expected(scores, 7, is_one_set=not others, batch=batch, query_batch=own)
    assert (graph.num_queries, graph.num_keys) == (17 if others else 53, 53)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_nearest_are_those_of_scikit_learn(metric):
    points = _random(211, 23, 0)
    found = NearestNeighbors(n_neighbors=5, metric=metric, algorithm="brute").fit(points.double().numpy())
    expected = np.sort(found.kneighbors(return_distance=False), axis=1).tolist()
    assert _rows(Graph.nearest(points, 5, measure=metric)) == expected


def _layouts(count, dim):
    random = np.random.default_rng(dim)
    far = random.normal(0, 1e-3, (count, dim)) + 1e3 * random.integers(0, 2, (count, 1))
    lone = random.normal(0, 1, (count, dim))
    lone[3] *= 1e7
    return {
        "lattice": random.integers(0, 2, (count, dim)) * 0.5,
        "coincident": np.repeat(random.random((3, dim)), count // 3, axis=0),
        "one point": np.ones((count, dim)),
        "clusters far apart": far,
        "one far away": lone,
        "far from the origin": random.random((count, dim)) + 1e6,
        "large": random.normal(0, 1e140, (count, dim)),
        "small": random.normal(0, 1e-140, (count, dim)),
    }


@pytest.mark.parametrize("name", list(_layouts(6, 2)))
@pytest.mark.parametrize("dim", [2, 12])
@pytest.mark.parametrize("others", [False, True])
def test_products_and_the_tree_find_the_same(name, dim, others, monkeypatch):
    """Ties, neighbours that float32 cannot tell apart, and numbers that it cannot hold."""
    points = torch.tensor(_layouts(90, dim)[name])
    queries = points[::4].clone() if others else None
    graphs = []
    for many in (1, 100):
        monkeypatch.setattr(nearest, "_MANY_DIMENSIONS", many)
        graphs.append(Graph.nearest(points, 5, queries=queries))
    assert torch.equal(graphs[0].edge_index, graphs[1].edge_index)
    if name not in ("large", "small"):
        rows = first_k(brute_force(points, queries, reach=np.inf), 5)
        assert graphs[0].edge_index.T.tolist() == [[int(key), int(query)] for query, key, _, _ in rows]


def test_most_queries_are_decided_by_products():
    clouds = nearest.read_clouds(_random(500, 32, 0), None, None, None, None, None)
    found, left_open = products.near_by_products(clouds, 5)
    assert len(left_open) == 0
    assert len(found.query) == 2500
    # Of more ties than there are candidates it cannot be said which are first.
    clouds = nearest.read_clouds(_random(5, 32, 0).repeat(100, 1), None, None, None, None, None)
    assert len(products.near_by_products(clouds, 5)[1]) == 500


def test_a_bound_that_forgets_rounding_is_caught(monkeypatch):
    """The test above has neighbours that float32 confuses: without the bound they would be wrong."""
    points = torch.tensor(_layouts(90, 12)["clusters far apart"])
    expected = Graph.nearest(points, 5).edge_index
    monkeypatch.setattr(products._Factors, "least_beyond", lambda self, some, farthest: farthest * torch.inf)
    assert not torch.equal(Graph.nearest(points, 5).edge_index, expected)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_chunks_of_queries_change_nothing(chunk, monkeypatch):
    points = _random(70, 13, 1)
    batch = torch.arange(70) // 30
    expected = Graph.nearest(points, 4, batch)
    monkeypatch.setattr(products, "_COORDINATES", chunk)
    assert torch.equal(Graph.nearest(points, 4, batch).edge_index, expected.edge_index)


@pytest.mark.parametrize("measure", ["euclidean", "cosine", "dot"])
def test_without_kernels_the_same_are_found(measure, monkeypatch):
    points = torch.randint(-3, 4, (61, 12), generator=torch.Generator().manual_seed(2)).float()
    points = torch.cat([points, points[:9]])
    batch = torch.arange(70) // 33
    expected = [Graph.nearest(points, k, batch, measure=measure).edge_index for k in (1, 6, 100)]
    monkeypatch.setattr(load, "available", lambda: False)
    monkeypatch.setattr(topk, "_SCORES_AT_ONCE", 700)
    for k, edges in zip((1, 6, 100), expected, strict=True):
        assert torch.equal(Graph.nearest(points, k, batch, measure=measure).edge_index, edges)


@pytest.mark.parametrize("dim", [3, 16])
def test_equal_products_go_to_the_lower_key(dim):
    points = torch.randint(-1, 2, (80, dim), generator=torch.Generator().manual_seed(0)).float()
    rows = _rows(Graph.nearest(points, 9, measure="dot"))
    assert rows == _expected(_scores("dot", points, points), 9, is_one_set=True)


def test_a_point_is_not_its_own_neighbour_even_where_others_are_larger():
    points = torch.tensor([[1.0, 0.0], [5.0, 0.0], [9.0, 0.0]])
    assert _rows(Graph.nearest(points, 1, measure="dot")) == [[2], [2], [1]]
    assert _rows(Graph.nearest(points, 2, measure="dot")) == [[1, 2], [0, 2], [0, 1]]
    # Another set of queries may be the same points.
    assert _rows(Graph.nearest(points, 1, measure="dot", queries=points.clone())) == [[2], [2], [2]]


def test_a_length_changes_no_cosine():
    points = _random(40, 20, 3, torch.float64)
    lengths = 10.0 ** torch.linspace(-120, 120, 40, dtype=torch.float64)
    expected = Graph.nearest(points, 4, measure="cosine").edge_index
    assert torch.equal(Graph.nearest(points * lengths[:, None], 4, measure="cosine").edge_index, expected)


def test_cosine_tells_directions_apart_that_float32_does_not():
    angles = torch.arange(100, dtype=torch.float64) ** 1.01 * 1e-6
    points = torch.zeros(100, 12, dtype=torch.float64)
    points[:, 0], points[:, 7] = angles.cos(), angles.sin()
    rows = _rows(Graph.nearest(points, 1, measure="cosine"))
    assert rows == [[1]] + [[i - 1] for i in range(1, 100)]


def test_a_point_at_the_origin_has_no_direction():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    batch = torch.tensor([0, 0, 0, 0, 1])
    graph = Graph.nearest(points, 3, measure="cosine")
    assert _rows(graph) == [[], [3, 4], [], [1, 4], [1, 3]]
    assert _rows(Graph.nearest(points, 3, batch, measure="cosine")) == [[], [3], [], [1], []]
    zeros = torch.zeros(3, 12)
    assert Graph.nearest(zeros, 2, measure="cosine").num_edges == 0
    assert Graph.nearest(points, 2, queries=torch.zeros(4, 2), measure="cosine").num_edges == 0


@pytest.mark.parametrize("measure", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dim", [2, 16])
def test_fewer_points_than_k_and_none_at_all(measure, dim):
    points = _random(4, dim, 0)
    assert _rows(Graph.nearest(points, 9, measure=measure)) == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert Graph.nearest(points[:1], 3, measure=measure).num_edges == 0
    empty = Graph.nearest(points[:0], 3, measure=measure)
    assert (empty.num_queries, empty.num_keys, empty.num_edges) == (0, 0, 0)
    without_queries = Graph.nearest(points, 3, queries=points[:0], measure=measure)
    assert (without_queries.num_queries, without_queries.num_keys, without_queries.num_edges) == (0, 4, 0)
    assert Graph.nearest(points[:0], 3, queries=points, measure=measure).num_edges == 0


@pytest.mark.parametrize("measure", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_only_rounds_the_points(measure, dtype):
    points = _random(60, 17, 5).to(dtype)
    expected = _expected(_scores(measure, points.double(), points.double()), 3, is_one_set=True)
    assert _rows(Graph.nearest(points, 3, measure=measure)) == expected


def test_threads_change_nothing():
    points, before = _random(900, 24, 6), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([Graph.nearest(points, 8, measure=m).edge_index for m in ("euclidean", "cosine", "dot")])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


# Through an index


class _Index:
    """Brute force, which knows nothing of the rows that are left out."""

    def __init__(self, keys, measure, without=()):
        self.keys, self.measure, self.key_dim, self.without = keys, measure, keys.shape[1], set(without)

    def search(self, queries, k):
        scores = torch.tensor(_scores(self.measure, queries, self.keys))
        scores[:, list(self.without)] = -torch.inf
        found = scores.topk(min(k, scores.shape[1]), dim=1)
        return torch.where(found.values == -torch.inf, -1, found.indices), found.values


@pytest.mark.parametrize("measure", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("others", [False, True])
def test_an_exact_index_finds_what_the_search_does(measure, others):
    points = _random(45, 11, 7)
    queries = _random(8, 11, 8) if others else None
    graph = Graph.nearest(points, 6, queries=queries, measure=measure, index=_Index(points, measure))
    assert torch.equal(graph.edge_index, Graph.nearest(points, 6, queries=queries, measure=measure).edge_index)
    # More than there are.
    graph = Graph.nearest(points, 80, queries=queries, measure=measure, index=_Index(points, measure))
    assert torch.equal(graph.edge_index, Graph.nearest(points, 80, queries=queries, measure=measure).edge_index)


@pytest.mark.parametrize("measure", ["euclidean", "cosine", "dot"])
def test_an_index_of_no_points_is_not_asked(measure):
    for queries in (None, _random(3, 4, 0)):
        graph = Graph.nearest(
            torch.zeros(0, 4), 2, queries=queries, measure=measure, index=ExactIndex(4, measure=measure)
        )
        assert graph.num_edges == 0


def test_products_of_small_points_beside_large_ones():
    keys, queries = _random(40, 12, 1, torch.float64), _random(9, 12, 2, torch.float64)
    large = torch.tensor([1e60, 1.0], dtype=torch.float64).repeat_interleave(20)[:, None]
    batch = torch.arange(2).repeat_interleave(20)
    graph = Graph.nearest(keys * large, 3, batch, measure="dot")
    assert torch.equal(graph.edge_index, Graph.nearest(keys, 3, batch, measure="dot").edge_index)
    scales = torch.tensor([1e80, 1.0, 1e-200], dtype=torch.float64).repeat(3)[:, None]
    graph = Graph.nearest(keys, 3, queries=queries * scales, measure="dot")
    assert torch.equal(graph.edge_index, Graph.nearest(keys, 3, queries=queries, measure="dot").edge_index)


@pytest.mark.parametrize("batched", [False, True])
def test_equal_products_of_unequal_keys_go_to_the_lower_one(batched):
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randint(-7, 8, (n, 12), generator=generator).float() for n in (90, 31))
    batch, query_batch = ((torch.arange(n) // 40) if batched else None for n in (90, 31))
    graph = Graph.nearest(keys, 20, batch, queries=queries, query_batch=query_batch, measure="dot")
    scores = _scores("dot", queries, keys)
    assert _rows(graph) == _expected(scores, 20, is_one_set=False, batch=batch, query_batch=query_batch)


def test_slots_without_a_key_are_left_out():
    points = _random(9, 4, 9)
    kept = [0, 2, 3, 5, 6, 8]
    graph = Graph.nearest(points, 8, measure="dot", index=_Index(points, "dot", without=[1, 4, 7]))
    assert _rows(graph) == [[key for key in kept if key != query] for query in range(9)]


def test_an_index_that_does_not_find_the_point_itself_loses_no_neighbour():
    points = torch.tensor([[1.0, 0.0], [5.0, 0.0], [9.0, 0.0], [2.0, 0.0]])
    graph = Graph.nearest(points, 2, measure="dot", index=_Index(points, "dot"))
    assert _rows(graph) == [[1, 2], [2, 3], [1, 3], [1, 2]]


class _Answers:
    def __init__(self, ids, **known):
        self.ids = ids
        vars(self).update(known)

    def search(self, queries, k):
        return self.ids, torch.zeros(self.ids.shape)


def _ids(*rows):
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("index", "given", "match"),
    [
        (object(), {}, r"index: expected an object with search\(queries, k\), got object"),
        (_Answers(_ids([0], [1])), {"batch": torch.tensor([0, 0])}, "batch: expected None with an index"),
        (_Answers(_ids([0], [1])), {"cell": torch.eye(3)}, "index: expected None in a cell"),
        (_Answers(_ids([0], [1]), measure="dot"), {}, "measure: expected 'dot', that of the index, got 'euclidean'"),
        (_Answers(_ids([0, 1])), {}, r"ids of index.search: expected int64, \(2, 2\), got torch.int64, \(1, 2\)"),
        (_Answers(_ids([0, 1], [1, 0]).int()), {}, "ids of index.search: expected int64"),
        (_Answers(_ids([0, 1], [1, 2])), {}, "expected -1, or rows of positions, which has 2, got from 0 to 2"),
        (_Answers(_ids([0, 1], [1, -2])), {}, "got from -2 to 1"),
        (_Answers(_ids([0, 1], [1, 1])), {}, "expected each key once for a query"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index, given, match):
    with pytest.raises(InvalidInputError, match=match):
        Graph.nearest(torch.randn(2, 3), 1, index=index, **given)


def test_an_index_of_another_dimension_is_refused():
    with pytest.raises(DimensionMismatchError, match="index: expected keys of 3 dimensions, as positions, got 5"):
        Graph.nearest(torch.randn(2, 3), 1, index=_Answers(_ids([0], [1]), key_dim=5))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"measure": "l2"}, "measure: expected 'euclidean', 'cosine' or 'dot', got 'l2'"),
        ({"measure": "dot", "cell": torch.eye(3)}, "measure: expected 'euclidean' in a cell, got 'dot'"),
        ({"measure": "cosine", "cell": torch.eye(3)}, "measure: expected 'euclidean' in a cell, got 'cosine'"),
        ({"measure": "dot", "k": 0}, "k: expected an int of at least 1, got 0"),
        ({"measure": "cosine", "k": -1}, "k: expected an int of at least 1, got -1"),
        ({"measure": "dot", "positions": torch.full((2, 3), torch.nan)}, "positions: expected finite coordinates"),
    ],
)
def test_a_measure_that_points_do_not_have_is_refused(given, match):
    arguments = {"positions": torch.randn(2, 3), "k": 1, **given}
    with pytest.raises(InvalidInputError, match=match):
        Graph.nearest(**arguments)
