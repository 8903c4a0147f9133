"""HGTConv and HANConv against PyTorch Geometric's, over random graphs of several types."""

import copy
import pickle
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch_geometric import EdgeIndex
from torch_geometric import nn as original
from torch_geometric.data import HeteroData
from torch_geometric.explain import Explainer, GNNExplainer

from anyattention.errors import GraphStructureError
from anyattention.interop import pyg

KINDS = ["a", "b", "c"]
RELATIONS = [
    ("a", "to", "b"),
    ("b", "of", "a"),
    ("a", "to", "a"),
    ("c", "to", "a"),
    ("b", "to", "c"),
    ("b", "of", "c"),
]


def typed_graph(seed, dtype=torch.float64):
    """Features and edges of some types and relations; a type may have no nodes, a relation no edges."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kinds = KINDS[: draw.choice([1, 2, 3, 3])]
    relations = [each for each in RELATIONS if {each[0], each[2]} <= {*kinds}]
    relations = [each for each in relations if draw.random() < 0.8] or relations[:1] or [("a", "to", "a")]
    sizes = {kind: draw.choice([1, 2, 3, 5, 11]) for kind in kinds}
    widths = {kind: draw.choice([2, 6, 40]) for kind in kinds}
    x = {kind: torch.randn(sizes[kind], widths[kind], dtype=dtype) for kind in kinds}
    edges = {}
    for source, name, target in relations:
        count = draw.choice([0, 1, 7, 23])
        ends = (torch.randint(sizes[source], (count,)), torch.randint(sizes[target], (count,)))
        edges[source, name, target] = torch.stack(ends)
    return x, edges, (kinds, relations), widths


def results_of(layer, x, edges, **more):
    """Outputs, and all gradients by random cotangents."""
    leaves = {kind: each.clone().requires_grad_() for kind, each in x.items()}
    outputs = layer(leaves, edges, **more)
    weights = {}
    if more:
        outputs, weights = outputs
    present = {kind: each for kind, each in outputs.items() if each is not None}
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(each.shape, dtype=each.dtype, generator=generator) for each in present.values()]
    layer.zero_grad()
    torch.autograd.backward(list(present.values()), cotangents)
    gradients = {kind: each.grad for kind, each in leaves.items()}
    gradients |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return outputs, weights, gradients


def require_equal(ours, theirs, tolerance=1e-10):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        if expected is None or not expected.numel():
            assert found is None or not found.abs().sum(), name
        else:
            found = torch.zeros_like(expected) if found is None else found
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def pair(kind, widths, metadata, **settings):
    theirs = getattr(original, kind)(widths, 6, metadata, heads=3, **settings).double()
    ours = getattr(pyg, kind)(widths, 6, metadata, heads=3, **settings).double()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        # Priors and skips of 1 would hide a wrong place.
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(torch.randn_like(other))
            one.copy_(other)
    return ours, theirs


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(20, 200))])
@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_layers_equal_pytorch_geometrics(kind, seed):
    x, edges, metadata, widths = typed_graph(seed)
    ours, theirs = pair(kind, widths, metadata)
    assert ours.explain_forward(x, edges).implementation == "cpu"
    more = {"return_semantic_attention_weights": True} if kind == "HANConv" else {}
    for found, expected in zip(results_of(ours, x, edges, **more), results_of(theirs, x, edges, **more), strict=True):
        require_equal(found, expected)


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_the_order_of_the_relations_does_not_matter(kind):
    x, edges, metadata, widths = typed_graph(38)
    assert len(edges) > 3
    ours, _ = pair(kind, widths, metadata)
    turned = dict(reversed(edges.items()))
    for found, expected in zip(results_of(ours, x, turned), results_of(ours, x, edges), strict=True):
        require_equal(found, expected, 1e-12)


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_relations_that_are_missing_from_a_call(kind):
    x, edges, metadata, widths = typed_graph(38)
    ours, theirs = pair(kind, widths, metadata)
    for count in (1, 2):
        part = dict(list(edges.items())[:count])
        for found, expected in zip(results_of(ours, x, part), results_of(theirs, x, part), strict=True):
            require_equal(found, expected)


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_no_relation_at_all(kind):
    x, _, metadata, widths = typed_graph(38)
    ours, _ = pair(kind, widths, metadata)
    outputs = ours(x, {})
    if kind == "HANConv":
        assert outputs == dict.fromkeys(x)
    else:
        assert {each: output.shape for each, output in outputs.items()} == {each: (len(x[each]), 6) for each in x}


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_widths_from_the_first_call(kind):
    x, edges, metadata, _ = typed_graph(38)
    ours = getattr(pyg, kind)(-1, 6, metadata, heads=3).double()
    theirs = getattr(original, kind)(-1, 6, metadata, heads=3).double()
    found = ours(x, edges)
    assert ours.explain_forward(x, edges).implementation == "cpu"
    theirs.load_state_dict(ours.state_dict())
    require_equal(found, theirs(x, edges))


def test_dropout_of_han_has_the_parents_distribution():
    metadata = (["a"], [("a", "to", "a")])
    layer = pyg.HANConv(3, 4, metadata, heads=2, dropout=0.4).double()
    x = {"a": torch.randn(40, 3, dtype=torch.float64)}
    edges = {("a", "to", "a"): torch.randint(40, (2, 400))}
    exact = layer.eval()(x, edges)["a"]
    layer.train()
    assert not torch.equal(layer(x, edges)["a"], layer(x, edges)["a"])
    torch.manual_seed(0)
    one = layer(x, edges)["a"]
    torch.manual_seed(0)
    assert torch.equal(layer(x, edges)["a"], one)
    assert layer.eval()(x, edges)["a"].equal(exact)


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_edges_that_are_changed_are_read_again(kind):
    x, edges, metadata, widths = typed_graph(38)
    ours, theirs = pair(kind, widths, metadata)
    require_equal(ours(x, edges), theirs(x, edges))
    for each in edges.values():
        each.numpy()[:] = each.numpy()[:, ::-1].copy()
    relation = max(edges, key=lambda relation: edges[relation].shape[1])
    edges[relation][0, 0] = (edges[relation][0, 0] + 1) % len(x[relation[0]])
    require_equal(ours(x, edges), theirs(x, edges))


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_int32_edges_and_an_edge_to_nowhere(kind):
    x, edges, metadata, widths = typed_graph(38)
    ours, _ = pair(kind, widths, metadata)
    narrow = {relation: each.int() for relation, each in edges.items()}
    require_equal(ours(x, narrow), ours(x, edges), 1e-14)
    relation = next(relation for relation, each in edges.items() if each.numel())
    wrong = {**edges, relation: edges[relation] + 1000}
    with pytest.raises(GraphStructureError, match=r"edge_index\[.*indices from 0 to"):
        ours(x, wrong)


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_an_evaluation_under_inference_mode_comes_before_training(kind):
    x, edges, metadata, widths = typed_graph(38)
    ours, theirs = pair(kind, widths, metadata)
    with torch.inference_mode():
        ours(x, edges)
    for found, expected in zip(results_of(ours, x, edges), results_of(theirs, x, edges), strict=True):
        require_equal(found, expected)


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_second_derivatives(kind):
    x, edges, metadata, widths = typed_graph(38)
    ours, theirs = pair(kind, widths, metadata)

    def penalty(layer):
        leaves = [each.clone().requires_grad_() for each in x.values()]
        outputs = [each for each in layer(dict(zip(x, leaves, strict=True)), edges).values() if each is not None]
        first = torch.autograd.grad(sum(each.sin().sum() for each in outputs), leaves, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), leaves)

    for found, expected in zip(penalty(ours), penalty(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_hooks_adapters_and_replaced_parts_are_called(kind):
    x, edges, metadata, widths = typed_graph(38)
    ours, theirs = pair(kind, widths, metadata)
    calls = []
    for layer in (ours, theirs):
        inner = layer.kqv_lin.lins["a"] if kind == "HGTConv" else layer.proj["a"]
        inner.register_forward_hook(lambda module, args, output: calls.append(module) or 2 * output)
    assert ours.explain_forward(x, edges).implementation == "cpu"
    calls.clear()
    for found, expected in zip(results_of(ours, x, edges), results_of(theirs, x, edges), strict=True):
        require_equal(found, expected)
    assert len(calls) == 2


def test_hooks_of_the_relations_matrices_leave_the_call_to_the_parent():
    x, edges, metadata, widths = typed_graph(38)
    ours, theirs = pair("HGTConv", widths, metadata)
    for layer in (ours, theirs):
        layer.v_rel.register_forward_hook(lambda module, args, output: 3 * output)
    assert ours.explain_forward(x, edges).refusals == (("anyattention", "v_rel has hooks or is another module"),)
    require_equal(ours(x, edges), theirs(x, edges))


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x, edges: (x, {**edges, ("a", "new", "a"): torch.zeros(2, 1, dtype=torch.int64)}),
        lambda x, edges: (x, {key: each.double() for key, each in edges.items()}),
        lambda x, edges: (x, {key: each[:1] for key, each in edges.items()}),
        lambda x, edges: ({key: each for key, each in x.items() if key != "a"}, edges),
    ],
    ids=["unknown relation", "edges of floats", "one row", "no features"],
)
def test_what_the_parent_refuses_is_left_to_it(kind, change):
    x, edges, metadata, widths = typed_graph(38)
    ours, _ = pair(kind, widths, metadata)
    x, edges = change(x, edges)
    assert ours.explain_forward(x, edges).implementation == "torch_geometric"
    with pytest.raises(Exception, match=r".*"):  # whatever the parent says
        ours(x, edges)


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_copies_pickles_and_data(kind):
    x, edges, metadata, widths = typed_graph(38, torch.float32)
    ours = getattr(pyg, kind)(widths, 6, metadata, heads=3)
    data = HeteroData()
    for name, each in x.items():
        data[name].x = each
    for relation, each in edges.items():
        data[relation].edge_index = each
    expected = ours(x, edges)
    require_equal(copy.deepcopy(ours)(data.x_dict, data.edge_index_dict), expected, 1e-6)
    require_equal(pickle.loads(pickle.dumps(ours))(x, edges), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
@pytest.mark.parametrize("form", ["EdgeIndex", "sparse_csr", "sparse_coo", "sparse_csc"])
def test_edges_in_other_forms(kind, form):
    x, edges, metadata, widths = typed_graph(38)
    ours, theirs = pair(kind, widths, metadata)
    given, lists = {}, {}
    for relation, each in edges.items():
        sizes = (len(x[relation[0]]), len(x[relation[2]]))
        matrix = torch.sparse_coo_tensor(each.flip(0), torch.ones(each.shape[1]), sizes[::-1]).coalesce()
        # A matrix adds up edges that are there twice.
        lists[relation] = each if form == "EdgeIndex" else matrix.indices().flip(0)
        if form == "EdgeIndex":
            given[relation] = EdgeIndex(each, sparse_size=sizes)
        else:
            given[relation] = matrix if form == "sparse_coo" else getattr(matrix, f"to_{form}")()
    assert ours.explain_forward(x, given).implementation == "cpu"
    # The parents do not take each form of each relation.
    for found, expected in zip(results_of(ours, x, given), results_of(theirs, x, lists), strict=True):
        require_equal(found, expected)


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_autocast(kind):
    x, edges, metadata, widths = typed_graph(38, torch.float32)
    ours, theirs = (layer.float() for layer in pair(kind, widths, metadata))
    exact = theirs(x, edges)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.explain_forward(x, edges).implementation == "cpu"
        found, expected = results_of(ours, x, edges), results_of(theirs, x, edges)
    for name, each in expected[0].items():
        assert found[0][name].dtype == each.dtype
        error, peers = ((one - exact[name]).abs().max() for one in (found[0][name], each))
        assert error <= 2 * peers + 0.02 * exact[name].abs().max()
    assert all(gradient is None or gradient.isfinite().all() for gradient in found[2].values())


def typed_call(seed, sizes):
    """Features and edges of a graph of given sizes, of the metadata below."""
    torch.manual_seed(seed)
    x = {name: torch.randn(count, 4) for name, count in zip("ab", sizes, strict=True)}
    relations = [("a", "to", "b"), ("b", "to", "a"), ("a", "of", "b")]
    edges = {(source, name, target): torch.stack([torch.randint(len(x[source]), (3 * sum(sizes),)),
                                                  torch.randint(len(x[target]), (3 * sum(sizes),))])
             for source, name, target in relations}  # fmt: skip
    return x, edges, (["a", "b"], relations)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_compiled_once_for_changing_sizes(kind):
    x, edges, metadata = typed_call(0, (5, 7))
    ours, theirs = (layer.float() for layer in pair(kind, {"a": 4, "b": 4}, metadata))
    torch.compiler.reset()
    programs = CompileCounter()
    counted = torch.compile(ours, fullgraph=True, dynamic=True, backend=programs)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for seed, sizes in enumerate([(5, 7), (11, 13), (17, 3), (23, 29)]):
        x, edges, _ = typed_call(seed, sizes)
        counted(x, edges)
        for _ in range(2):
            for found, expected in zip(results_of(compiled, x, edges), results_of(theirs, x, edges), strict=True):
                found = {name.removeprefix("_orig_mod."): each for name, each in found.items()}
                require_equal(found, expected, 1e-3)
    assert programs.frame_count == 1


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_an_explanation_is_the_parents(kind):
    x, edges, metadata = typed_call(0, (5, 7))
    ours, theirs = (layer.float() for layer in pair(kind, {"a": 4, "b": 4}, metadata))

    class Net(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x_dict, edge_index_dict):
            return self.layer(x_dict, edge_index_dict)["b"]

    data = HeteroData()
    for name, each in x.items():
        data[name].x = each
    for relation, each in edges.items():
        data[relation].edge_index = each
    masks = []
    for layer in (ours, theirs):
        explainer = Explainer(
            Net(layer),
            algorithm=GNNExplainer(epochs=3),
            explanation_type="model",
            node_mask_type="attributes",
            edge_mask_type="object",
            model_config={"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"},
        )
        torch.manual_seed(0)
        try:
            found = explainer(data.x_dict, data.edge_index_dict, index=torch.tensor([1]))
        except Exception as fault:
            masks.append(type(fault))
        else:
            masks.append([*found.node_mask_dict.values(), *found.edge_mask_dict.values()])
    if isinstance(masks[1], type):
        assert masks[0] is masks[1]
    else:
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*masks, strict=True))
    assert ours.explain_forward(x, edges).implementation == "cpu"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_traced_programs_take_other_edges(kind):
    ours, _ = pair(kind, {"a": 4}, (["a"], [("a", "to", "a")]))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ours

        def forward(self, x, edges):
            return self.layer({"a": x}, {("a", "to", "a"): edges})["a"]

    x, net = torch.randn(7, 4, dtype=torch.float64), Net()
    edges, others = torch.randint(7, (2, 11)), torch.randint(7, (2, 11))
    net(x, edges)
    traced = torch.jit.trace(net, (x, edges), check_trace=False)
    torch.testing.assert_close(traced(x, others), net(x, others))


@pytest.mark.parametrize("kind", ["HGTConv", "HANConv"])
def test_widths_from_an_inference_can_be_trained(kind):
    x, edges, metadata, _ = typed_graph(38)
    layer = getattr(pyg, kind)(-1, 6, metadata, heads=3).double()
    with torch.inference_mode():
        layer(x, edges)
    layer(x, edges)["a"].sum().backward()
    assert all(not parameter.is_inference() for parameter in layer.parameters())
