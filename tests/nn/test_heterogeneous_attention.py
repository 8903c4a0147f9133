"""HeterogeneousGraphAttention against its formula, one edge at a time."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch_geometric.data import HeteroData

from anyattention import HeterogeneousGraph, interfaces, load, save
from anyattention.errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
    NumericalInstabilityError,
    TrainingError,
)
from anyattention.nn import GraphAttention, HeterogeneousGraphAttention

# Names as people have them: a dot, a space, a method of dictionaries.
WIDTHS = {"a.b": 5, "keys": 2, "no nodes": 3, "only source": 7}
RELATIONS = [
    ("a.b", "to", "keys"),
    ("keys", "to", "a.b"),
    ("a.b", "to", "a.b"),
    ("only source", "to", "a.b"),
    ("keys", "no edges", "keys"),
    ("keys", "other", "a.b"),
    ("no nodes", "to", "keys"),
]
COUNTS = {"a.b": 7, "keys": 3, "no nodes": 0, "only source": 5}
EDGE_DIM = {("a.b", "to", "keys"): 2, ("keys", "other", "a.b"): 1, ("keys", "no edges", "keys"): 3}
SETTINGS = [
    {"score": score, "softmax_over": over, **more}
    for score, over in itertools.product(["dot", "additive", "dynamic"], ["node", "relation"])
    for more in ({"use_bias": False}, {"edge_dim": EDGE_DIM, "concat": False, "residual": True, "scale": 0.7})
]


def inputs(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    x = {kind: torch.randn(count, WIDTHS[kind], dtype=dtype) for kind, count in COUNTS.items()}
    edges = {}
    for relation in RELATIONS:
        source, name, target = relation
        count = 0 if name == "no edges" or not COUNTS[source] else 9
        ends = [torch.randint(COUNTS[kind], (count,)) if count else torch.zeros(0).long() for kind in (source, target)]
        edges[relation] = torch.stack(ends)
    edge_attr = {
        relation: torch.randn(edges[relation].shape[1], width, dtype=dtype) for relation, width in EDGE_DIM.items()
    }
    return x, edges, edge_attr


def layer_of(dtype=torch.float64, **settings):
    torch.manual_seed(1)
    layer = HeterogeneousGraphAttention(
        6, 3, in_features=WIDTHS, relations=RELATIONS, dropout=0.0, dtype=dtype, **settings
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def of_type(layer, name, kind):
    ends = {"query": 2, "residual": 2}.get(name, 0)
    kinds = [each for each in WIDTHS if any(relation[ends] == each for relation in RELATIONS)]
    if layer.config.score == "additive" and name == "value":
        kinds = list(WIDTHS)
    return getattr(layer, f"{name}_projections")[kinds.index(kind)]


def terms_of(layer, relation, x, edge):
    """Score and value of one edge of a relation, `(heads,)` and `(heads, d_k)`."""
    config, (source, _, target) = layer.config, relation
    place = RELATIONS.index(relation)
    sender, receiver, feature = edge
    widths = [width or 0 for width in config.edge_widths]
    weight = None
    if feature is not None:
        weight = layer.edge_weight[..., sum(widths[:place]) : sum(widths[: place + 1])]
    heads = config.base.num_heads

    def row(name, kind, node):
        return of_type(layer, name, kind)(x[kind][node]).unflatten(-1, (heads, -1))

    if config.score == "additive":
        value = row("value", source, sender)
        targets = [kind for kind in WIDTHS if any(each[2] == kind for each in RELATIONS)]
        vector = layer.query_vector[place if config.softmax_over == "relation" else targets.index(target)]
        raw = (vector * row("value", target, receiver)).sum(-1) + (layer.key_vector[place] * value).sum(-1)
        if weight is not None:
            raw = raw + (weight @ feature)[:, 0]
        return F.leaky_relu(raw, config.negative_slope) * config.get_scale(), value
    query = row("query", target, receiver)
    key = torch.einsum("hd,hde->he", row("key", source, sender), layer.key_relation[place])
    part = 0.0 if weight is None else weight @ feature
    if config.score == "dynamic":
        raw = (layer.score_vector * F.leaky_relu(query + key + part, config.negative_slope)).sum(-1)
        return raw * config.get_scale(), key
    value = torch.einsum("hd,hde->he", row("value", source, sender), layer.value_relation[place])
    raw = layer.prior[place] * (query * (key + part)).sum(-1)
    return raw * config.get_scale(), value + part


def by_formula(layer, x, edges, edge_attr):
    """Outputs and weights, by the formula in the docstring."""
    config = layer.config
    weights = {relation: torch.zeros(each.shape[1], 3, dtype=torch.float64) for relation, each in edges.items()}
    outputs, shares = {}, {}
    targets = [kind for kind in WIDTHS if any(relation[2] == kind for relation in RELATIONS)]
    for kind in targets:
        incoming = [relation for relation in edges if relation[2] == kind]
        groups = [incoming] if config.softmax_over == "node" else [[relation] for relation in incoming]
        rows = []
        for group in groups:
            nodes = []
            for node in range(len(x[kind])):
                found = []
                for relation in group:
                    for place, (sender, receiver) in enumerate(edges[relation].T.tolist()):
                        if receiver == node:
                            feature = edge_attr[relation][place] if relation in edge_attr else None
                            found.append((relation, place, *terms_of(layer, relation, x, (sender, receiver, feature))))
                total = torch.zeros(3, 2, dtype=torch.float64)
                if found:
                    shares_of_node = torch.softmax(torch.stack([score for _, _, score, _ in found]), 0)
                    for (relation, place, _, value), share in zip(found, shares_of_node, strict=True):
                        weights[relation][place] = share
                        total = total + share[:, None] * value
                nodes.append(total.flatten() if config.concat else total.mean(0))
            width = 6 if config.concat else 2
            rows.append(torch.stack(nodes) if nodes else torch.zeros(0, width, dtype=torch.float64))
        if config.softmax_over == "relation" and rows:
            scores = [
                torch.tanh(layer.relation_projection(each)).mean(0) @ layer.relation_vector
                if len(each)
                else torch.zeros(())
                for each in rows
            ]
            each_share = torch.softmax(torch.stack(scores), 0)
            shares.update(zip(incoming, each_share, strict=True))
            output = sum(share * row for share, row in zip(each_share, rows, strict=True))
        else:
            output = rows[0]
        if config.residual:
            output = output + of_type(layer, "residual", kind)(x[kind])
        if layer.bias is not None:
            output = output + layer.bias[targets.index(kind)]
        outputs[kind] = output
    return outputs, weights, shares


def gradients(outputs, leaves):
    torch.manual_seed(5)
    cotangents = [torch.randn_like(each) for each in outputs]
    return torch.autograd.grad(list(outputs), leaves, cotangents, materialize_grads=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_outputs_weights_and_gradients_are_those_of_the_formula(settings):
    x, edges, edge_attr = inputs()
    edge_attr = edge_attr if "edge_dim" in settings else {}
    layer = layer_of(**settings)
    leaves = [*x.values(), *edge_attr.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    leaves += list(layer.parameters())
    graph = HeterogeneousGraph.from_edge_index(edges, COUNTS)
    output, weights, shares = layer(x, graph, edge_attr, return_weights="heads")
    assert layer.explain_forward(x, graph, edge_attr).implementation == "cpu"
    expected, expected_weights, expected_shares = by_formula(layer, x, edges, edge_attr)
    assert list(output) == ["a.b", "keys"]
    for found, wanted in ((output, expected), (weights, expected_weights), (shares or {}, expected_shares)):
        assert found.keys() == wanted.keys()
        for name, each in wanted.items():
            torch.testing.assert_close(found[name], each, rtol=1e-11, atol=1e-11)
    # The weights' gradients too: a loss on both.
    used = [relation for relation, each in expected_weights.items() if each.requires_grad]
    one = gradients([*output.values(), *(weights[relation] for relation in used)], leaves)
    other = gradients([*expected.values(), *(expected_weights[relation] for relation in used)], leaves)
    for found, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_second_derivatives(settings):
    x, edges, edge_attr = inputs()
    edge_attr = edge_attr if "edge_dim" in settings else {}
    layer, graph = layer_of(**settings), HeterogeneousGraph.from_edge_index(edges, COUNTS)
    leaf = x["a.b"].requires_grad_()
    names = [name for name, _ in layer.named_parameters()][:2]

    def call(features, *parameters):
        given = dict(zip(names, parameters, strict=True))
        found = torch.func.functional_call(layer, given, ({**x, "a.b": features}, graph, edge_attr))
        return found.output["a.b"], found.output["keys"]

    parameters = [layer.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(call, (leaf, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (leaf, *parameters), fast_mode=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("score", ["dot", "additive", "dynamic"])
def test_wide_and_sparse_features_are_projected_first(score):
    torch.manual_seed(0)
    relations = [("a", "to", "b"), ("a", "of", "b")]
    layer = HeterogeneousGraphAttention(
        6, 3, in_features={"a": 50, "b": 4}, relations=relations, score=score, dropout=0.0, dtype=torch.float64
    )
    features = torch.randn(7, 50, dtype=torch.float64) * (torch.rand(7, 50) < 0.3)
    x = {"a": features.clone().requires_grad_(), "b": torch.randn(5, 4, dtype=torch.float64)}
    edges = {relation: torch.randint(5, (2, 11)) for relation in relations}
    leaves = list(layer.parameters())
    one = layer(x, edges).output["b"]
    sparse = layer({**x, "a": features.to_sparse_csr()}, edges).output["b"]
    # Other features after as many of 0 as make the input narrow beside the projections: one product of folded weights.
    narrow = HeterogeneousGraphAttention(
        6, 3, in_features={"a": 6, "b": 4}, relations=relations, score=score, dropout=0.0, dtype=torch.float64
    )
    with torch.no_grad():
        for wide, each in zip(layer.parameters(), narrow.parameters(), strict=True):
            each.copy_(wide[..., : each.shape[-1]])
    folded = narrow({**x, "a": features[:, :6]}, edges).output["b"]
    cut = torch.where(torch.arange(50) < 6, features, 0.0)
    torch.testing.assert_close(layer({**x, "a": cut}, edges).output["b"], folded, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one, sparse, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(gradients([one], leaves), gradients([sparse], leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score", ["dot", "additive", "dynamic"])
def test_one_type_and_one_relation_are_a_plain_graph(score):
    torch.manual_seed(0)
    plain = GraphAttention(6, 3, in_features=4, score=score, dropout=0.0, edge_dim=2, dtype=torch.float64)
    typed = HeterogeneousGraphAttention(
        6,
        3,
        in_features={"a": 4},
        relations=[("a", "to", "a")],
        score=score,
        dropout=0.0,
        edge_dim=2,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for name in ("query", "key", "value"):
            if hasattr(plain, f"{name}_projection") and hasattr(typed, f"{name}_projections"):
                getattr(typed, f"{name}_projections")[0].load_state_dict(
                    getattr(plain, f"{name}_projection").state_dict()
                )
        for name in ("key_relation", "value_relation"):
            if hasattr(typed, name):
                getattr(typed, name).copy_(torch.eye(2, dtype=torch.float64).expand(1, 3, 2, 2))
        for name in ("query_vector", "key_vector", "score_vector", "edge_weight"):
            if hasattr(plain, name):
                getattr(typed, name).copy_(getattr(plain, name).reshape(getattr(typed, name).shape))
    x, edges = torch.randn(7, 4, dtype=torch.float64), torch.randint(7, (2, 20))
    features = torch.randn(20, 2, dtype=torch.float64)
    output, weights = plain(x, edges, features, return_weights=True)
    relation = ("a", "to", "a")
    found = typed({"a": x}, {relation: edges}, {relation: features}, return_weights=True)
    torch.testing.assert_close(found.output["a"], output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.weights[relation], weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS[::2], ids=str)
def test_projections_that_were_replaced_are_called(settings):
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    x, edges, _ = inputs()
    layer = layer_of(**settings)
    twice = copy.deepcopy(layer)
    for name, module in list(twice.named_modules()):
        if name.endswith("_projections"):
            for place, inner in enumerate(module):
                module[place] = Doubled(inner)
                with torch.no_grad():
                    for parameter in getattr(layer, name)[place].parameters():
                        parameter *= 2
    found, expected = twice(x, edges).output, layer(x, edges).output
    for kind, each in expected.items():
        torch.testing.assert_close(found[kind], each, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_part_of_the_graph(settings):
    """Relations and types that a graph lacks; the layer's output is that of no edges there."""
    x, edges, edge_attr = inputs()
    edge_attr = edge_attr if "edge_dim" in settings else {}
    layer = layer_of(**settings)
    for kept in (RELATIONS[:1], RELATIONS[2:4], RELATIONS[5:]):
        some = {relation: edges[relation] for relation in reversed(kept)}
        attr = {relation: each for relation, each in edge_attr.items() if relation in some}
        output = layer(x, some, attr).output
        expected = (
            by_formula(layer, x, some, attr)[0]
            if all(any(relation[2] == kind for relation in some) for kind in ("a.b", "keys"))
            else {kind: each for kind, each in output.items() if False}
        )
        for kind, each in expected.items():
            torch.testing.assert_close(output[kind], each, rtol=1e-11, atol=1e-11)
        assert {kind: each.shape[0] for kind, each in output.items()} == {"a.b": 7, "keys": 3}
    ends = {kind: each for kind, each in x.items() if kind in ("a.b", "only source")}
    some = {relation: edges[relation] for relation in RELATIONS[2:4]}
    assert list(layer(ends, some).output) == ["a.b"]
    nothing = layer(x, {}).output
    width = 6 if layer.config.concat else 2
    assert {kind: each.shape for kind, each in nothing.items()} == {"a.b": (7, width), "keys": (3, width)}
    if not layer.config.residual and layer.bias is None:
        assert not any(each.any() for each in nothing.values())


def test_heterodata_is_taken_as_it_is():
    x, edges, edge_attr = inputs()
    data = HeteroData()
    for kind, features in x.items():
        data[kind].x = features
    for relation, each in edges.items():
        data[relation].edge_index = each
    layer = layer_of()
    found, expected = layer(data), layer(x, edges)
    assert all(found.output[kind].equal(each) for kind, each in expected.output.items())
    for relation, each in edge_attr.items():
        data[relation].edge_attr = each
    layer = layer_of(edge_dim=EDGE_DIM)
    found, expected = layer(data, return_weights=True), layer(x, edges, edge_attr, return_weights=True)
    assert all(found.output[kind].equal(each) for kind, each in expected.output.items())
    assert all(found.weights[relation].equal(each) for relation, each in expected.weights.items())
    _, cache = layer.cached_forward(data)
    assert "x['keys']" in cache.inputs


@pytest.mark.parametrize("settings", SETTINGS[1::2], ids=str)
def test_parameters_gradients_copies_and_files(settings, tmp_path):
    x, edges, edge_attr = inputs()
    layer = layer_of(**settings)
    assert isinstance(layer, interfaces.GraphAttention)
    assert isinstance(layer, interfaces.TrainableAttention)
    assert layer.supports_heterogeneous
    assert layer.supports_edge_features
    vector = layer.get_parameters()
    layer.set_parameters(vector.flip(0))
    layer.set_parameters(vector)
    result, cache = layer.cached_forward(x, edges, edge_attr)
    cotangent = {kind: torch.randn_like(each) for kind, each in result.output.items()}
    found = layer.backward(cotangent, cache)
    leaves = {kind: each.clone().requires_grad_() for kind, each in x.items()}
    twin = layer.clone()
    output = twin(leaves, edges, edge_attr).output
    torch.autograd.backward(list(output.values()), list(cotangent.values()))
    for kind in ("a.b", "keys", "only source"):
        torch.testing.assert_close(found.inputs[f"x[{kind!r}]"], leaves[kind].grad)
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in twin.parameters()])
    torch.testing.assert_close(found.parameters, flat)
    with pytest.raises(InvalidInputError, match=r"grad_output: expected gradients of the outputs 'a\.b', 'keys'"):
        layer.backward({"keys": cotangent["keys"]}, cache)
    with pytest.raises(DimensionMismatchError, match=r"grad_output\['keys'\]"):
        layer.backward({**cotangent, "keys": cotangent["keys"][:1]}, cache)
    layer.update_parameters(learning_rate=0.1)
    assert not torch.equal(layer.get_parameters(), vector)
    layer.zero_grad()
    with pytest.raises(TrainingError):
        layer.update_parameters(learning_rate=0.1)
    save(layer, tmp_path)
    again = load(tmp_path)
    assert again.config == layer.config
    again_output = again(x, edges, edge_attr).output
    assert all(each.equal(again_output[kind]) for kind, each in layer(x, edges, edge_attr).output.items())


def test_drawn_weights_are_bounded_and_priors_are_one():
    layer = HeterogeneousGraphAttention(12, 2, in_features={"a": 4}, relations=[("a", "to", "a")], edge_dim=3)
    bound = math.sqrt(6 / 12)
    assert 0.8 * bound < layer.key_relation.abs().max() <= bound
    assert layer.prior.eq(1).all()
    assert layer.edge_weight.abs().max() <= math.sqrt(6 / 9)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_adjacency_matrices_and_edge_lists(settings):
    x, edges, edge_attr = inputs()
    edge_attr = edge_attr if "edge_dim" in settings else {}
    layer = layer_of(**settings)
    # Of simple graphs, in the order of their matrices.
    matrices, attr = {}, {}
    for relation, each in edges.items():
        matrix = torch.zeros(COUNTS[relation[2]], COUNTS[relation[0]])
        matrix[each[1], each[0]] = 1.0
        matrices[relation] = matrix
        if relation in edge_attr:
            attr[relation] = torch.randn(int(matrix.sum()), edge_attr[relation].shape[1], dtype=torch.float64)
    lists = {relation: matrix.nonzero().T.flip(0) for relation, matrix in matrices.items()}
    one, other = layer.sparse_forward(x, matrices, attr), layer.graph_forward(x, lists, attr)
    assert all(one.output[kind].equal(each) for kind, each in other.output.items())
    assert all(each.shape[1:] == (3,) for each in one.weights.values())
    with pytest.raises(DimensionMismatchError, match=r"adjacency\[\('a.b', 'to', 'keys'\)\]: expected 3 rows and 7"):
        layer.sparse_forward(x, {RELATIONS[0]: torch.zeros(4, 7)})


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("settings", SETTINGS[:4:2] + SETTINGS[5::4], ids=str)
def test_compiled_and_under_autocast(settings):
    x, edges, edge_attr = inputs(torch.float32)
    edge_attr = edge_attr if "edge_dim" in settings else {}
    layer, graph = layer_of(torch.float32, **settings), HeterogeneousGraph.from_edge_index(edges, COUNTS)
    expected = layer(x, graph, edge_attr)
    graph.joint(by_relation=settings["softmax_over"] == "relation")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    found = compiled(x, graph, edge_attr)
    leaves = list(layer.parameters())
    for kind, each in expected.output.items():
        torch.testing.assert_close(found.output[kind], each, rtol=1e-4, atol=1e-5)
    one, other = (gradients(result.output.values(), leaves) for result in (found, layer(x, graph, edge_attr)))
    for found_gradient, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(found_gradient, wanted, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = layer(x, graph, edge_attr).output
    for kind, each in expected.output.items():
        assert rough[kind].dtype in (torch.bfloat16, torch.float32)
        assert (rough[kind].float() - each).norm() < 0.1 * each.norm() + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS[::2], ids=str)
def test_half_precision(settings, dtype):
    x, edges, _ = inputs(torch.float64)
    exact = layer_of(**settings)
    layer = copy.deepcopy(exact).to(dtype)
    found = layer({kind: each.to(dtype) for kind, each in x.items()}, edges).output
    for kind, each in exact(x, edges).output.items():
        assert found[kind].dtype == dtype
        assert (found[kind].double() - each).norm() < 0.05 * each.norm()


def test_dropout_drops_in_training_alone():
    x, edges, _ = inputs()
    layer = HeterogeneousGraphAttention(6, 3, in_features=WIDTHS, relations=RELATIONS, dropout=0.5, dtype=torch.float64)
    one = layer(x, edges).output["a.b"]
    assert not torch.equal(one, layer(x, edges).output["a.b"])
    layer.eval()
    assert torch.equal(layer(x, edges).output["a.b"], layer(x, edges).output["a.b"])


def test_a_node_without_edges_gets_nothing_and_leaks_nothing():
    edges = {("a", "to", "a"): torch.tensor([[0, 1], [1, 1]])}
    layer = HeterogeneousGraphAttention(4, 2, in_features={"a": 3}, relations=list(edges), dropout=0.0)
    x = torch.randn(4, 3)
    x[2] = math.nan
    x.requires_grad_()
    output = layer({"a": x}, edges).output["a"]
    assert not output[[0, 2, 3]].any()
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    assert gradient[:2].isfinite().all()
    assert not gradient[3].any()


def test_numbers_that_are_not_finite_are_named():
    relations = [("a", "to", "a")]
    layer = HeterogeneousGraphAttention(4, 2, in_features={"a": 3}, relations=relations, check_finite=True)
    with pytest.raises(NumericalInstabilityError, match="HeterogeneousGraphAttention 'a'"):
        layer({"a": torch.full((2, 3), math.inf)}, {relations[0]: torch.tensor([[0], [1]])})


X, EDGES, _ = inputs(torch.float32)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (InvalidInputError, "x: expected types among 'a.b', 'keys'.*got other",
         lambda f: f({**X, "other": X["keys"]}, EDGES)),
        (InvalidInputError, "graph: expected relations among .*got \\('a.b', 'new', 'keys'\\)",
         lambda f: f(X, {("a.b", "new", "keys"): EDGES[RELATIONS[0]]})),
        (InvalidInputError, "x: expected features of type 'keys', which .* joins, got none",
         lambda f: f({"a.b": X["a.b"]}, {RELATIONS[0]: EDGES[RELATIONS[0]]})),
        (DimensionMismatchError, r"x\['keys'\].*features=2", lambda f: f({**X, "keys": torch.ones(3, 5)}, EDGES)),
        (DimensionMismatchError, "graph: expected 7 nodes of type 'a.b', as x has, got 8 nodes",
         lambda f: f(X, HeterogeneousGraph.from_edge_index(EDGES, {**COUNTS, "a.b": 8}))),
        (GraphStructureError, r"edge_index\[\('a.b', 'to', 'keys'\)\].*indices from 0 to 6",
         lambda f: f(X, {RELATIONS[0]: torch.tensor([[7], [0]])})),
        (InvalidInputError, "x.*torch.float64", lambda f: f({**X, "keys": X["keys"].double()}, EDGES)),
        (InvalidInputError, "x: expected features by type of nodes", lambda f: f(X["keys"], EDGES)),
        (InvalidInputError, "graph: expected a HeterogeneousGraph or .*, got None", lambda f: f(X)),
        (InvalidInputError, "graph: expected a HeterogeneousGraph.*got Tensor", lambda f: f(X, EDGES[RELATIONS[0]])),
        (InvalidInputError, "edge_attr: expected relations of the graph that have an edge_dim: none",
         lambda f: f(X, EDGES, {RELATIONS[0]: torch.ones(9, 2)})),
        (InvalidInputError, "edge_attr: expected a dictionary by relation, got Tensor",
         lambda f: f(X, EDGES, torch.ones(9, 2))),
        (InvalidInputError, "return_weights", lambda f: f(X, EDGES, return_weights="all")),
        (InvalidInputError, r"x\['keys'\]: expected", lambda f: f({**X, "keys": [1.0]}, EDGES)),
    ],
)  # fmt: skip
def test_wrong_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call(layer_of(torch.float32))


def test_wrong_edge_features_are_named():
    x, edges, edge_attr = inputs(torch.float32)
    layer = layer_of(torch.float32, edge_dim=EDGE_DIM)
    first = RELATIONS[0]
    with pytest.raises(
        InvalidInputError, match=r"edge_attr\[\('a.b', 'to', 'keys'\)\]: expected \(edges, edge_dim=2\)"
    ):
        layer(x, edges)
    with pytest.raises(DimensionMismatchError, match=r"edge_attr\[\('a.b', 'to', 'keys'\)\].*edges=9"):
        layer(x, edges, {**edge_attr, first: torch.ones(8, 2)})
    flat = {**edge_attr, RELATIONS[5]: edge_attr[RELATIONS[5]][:, 0]}
    assert all(
        each.equal(layer(x, edges, flat).output[kind]) for kind, each in layer(x, edges, edge_attr).output.items()
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"in_features": {}}, "in_features: expected each type of nodes once"),
        ({"in_features": 5}, "in_features: expected a dictionary of widths"),
        ({"in_features": {"a": 0}}, r"in_features\['a'\]"),
        ({"in_features": [("a", 1), ("a", 2)]}, "in_features: expected each type of nodes once"),
        ({"relations": []}, "relations: expected each relation once"),
        ({"relations": [("a", "to", "a")] * 2}, "relations: expected each relation once"),
        ({"relations": [("a", "to", "b")]}, "relations: expected types of in_features: 'a', got 'b'"),
        ({"relations": [("a", "a")]}, "relations: expected .*three strings"),
        ({"relations": "to"}, "relations: expected .*three strings"),
        ({"edge_dim": {("a", "of", "a"): 2}}, "edge_dim: expected relations among"),
        ({"edge_dim": (1, 2)}, "edge_dim: expected an int, a dictionary"),
        ({"edge_dim": 0}, r"edge_dim\[\('a', 'to', 'a'\)\]"),
        ({"negative_slope": 0.3}, "negative_slope: expected its default .*no LeakyReLU"),
        ({"softmax_over": "all"}, "softmax_over: expected one of 'node', 'relation'"),
    ],
)
def test_wrong_settings_are_named(settings, match):
    with pytest.raises(InvalidConfigError, match=match):
        HeterogeneousGraphAttention(4, 2, **{"in_features": {"a": 3}, "relations": [("a", "to", "a")], **settings})
