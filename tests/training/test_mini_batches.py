"""Training on samples: the classifiers over all neighbours of a batch agree with those over the whole graph."""

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anyattention as aa
from anyattention.errors import GraphStructureError, InvalidConfigError, InvalidInputError, NumericalInstabilityError
from anyattention.nn.feature_rows import first_rows, rows_at, sparse_csr
from anyattention.training import (
    FitSettings,
    HeterogeneousNodeClassifier,
    HeterogeneousNodeClassifierConfig,
    HeterogeneousNodeData,
    NodeClassifier,
    NodeClassifierConfig,
    NodeData,
    Split,
    fit,
    predict_logits,
)
from anyattention.training import fitting as training_fitting
from anyattention.training.fitting import classify, run_epoch
from anyattention.training.mini_batches import batch_loader, classify_seeds
from anyattention.training.reading import Reading

# PyTorch says this once in a process, at the first sparse CSR tensor that a test makes by itself.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

CLASSES = 3


def parts(nodes: int, train: int) -> Split:
    order = torch.randperm(nodes)
    return Split(order[:train], order[train : train + 5], order[train + 5 :])


def node_data(
    *, layout: str = "dense", edge_dim: int | None = None, nodes: int = 23, edges: int = 71, train: int = 11
) -> NodeData:
    """Parallel edges, self-loops, and node 0, which no edge but its own ends in."""
    x = torch.randn(nodes, 5, dtype=torch.float64) * (torch.rand(nodes, 5) < 0.6)
    edge_index = torch.stack([torch.randint(nodes, (edges,)), torch.randint(1, nodes, (edges,))])
    graph = aa.Graph.from_edge_index(edge_index, nodes).with_self_loops()
    features = None if edge_dim is None else torch.randn(graph.num_edges, edge_dim, dtype=torch.float64)
    return NodeData(
        name="made up",
        features=x.to_sparse_csr() if layout == "sparse" else x,
        graph=graph,
        labels=torch.randint(CLASSES, (nodes,)),
        num_classes=CLASSES,
        splits=(parts(nodes, train),),
        edge_features=features,
    )


WRITES, CITES, SELLS = ("author", "writes", "paper"), ("paper", "cites", "paper"), ("paper", "sold_by", "shop")
VISITS = ("author", "visits", "shop")


def typed_data(
    *, layout: str = "dense", edge_dims: dict[Any, int] | None = None, train: int = 7
) -> HeterogeneousNodeData:
    """No relation ends in authors; shops, which are no sources, are not found by any sample."""
    counts = {"author": 11, "paper": 17, "shop": 3}
    widths = {"author": 2, "paper": 5, "shop": 3}
    lengths = {WRITES: 29, CITES: 37, SELLS: 13, VISITS: 5}
    edges = {
        key: torch.stack([torch.randint(counts[key[0]], (length,)), torch.randint(counts[key[2]], (length,))])
        for key, length in lengths.items()
    }
    x = {kind: torch.randn(count, widths[kind], dtype=torch.float64) for kind, count in counts.items()}
    if layout == "sparse":
        x = {kind: (each * (each > 0)).to_sparse_csr() for kind, each in x.items()}
    given = {} if edge_dims is None else edge_dims
    return HeterogeneousNodeData(
        name="made up",
        features=x,
        graph=aa.HeterogeneousGraph.from_edge_index(edges, counts),
        target="paper",
        labels=torch.randint(CLASSES, (17,)),
        num_classes=CLASSES,
        splits=(parts(17, 7),),
        reading=Reading(("a", "b", "c")),
        edge_features={key: torch.randn(lengths[key], dim, dtype=torch.float64) for key, dim in given.items()},
    )


def classifier(data: NodeData | HeterogeneousNodeData, **settings: Any) -> Any:
    kinds = {NodeData: NodeClassifier, HeterogeneousNodeData: HeterogeneousNodeClassifier}
    return kinds[type(data)](**data.sizes, hidden=6, heads=2, **settings).double()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    zero = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    return {name: zero[name] if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}


def require_all_neighbours_give_the_whole_graph_s_loss(data: Any, model: Any) -> None:
    """Of one batch with all training nodes: the scores, the loss and all gradients."""
    (split,) = data.splits
    (sampled,) = batch_loader(data, split.train, len(split.train), (-1, -1), seed=3)
    logits, labels = classify_seeds(model, data, sampled)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    whole = classify(model, data).output
    expected = F.cross_entropy(whole[split.train], data.labels[split.train])
    expected.backward()
    nodes = sampled.nodes if isinstance(data, NodeData) else sampled.nodes[data.target]
    seeds = nodes[: len(split.train)]
    assert not torch.equal(seeds, split.train), "the test needs an order of its own"
    assert torch.equal(seeds.sort().values, split.train.sort().values)
    torch.testing.assert_close(logits, whole[seeds], atol=1e-10, rtol=0)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found, gradients(model), atol=1e-10, rtol=0)
    assert any(bool((each != 0).any()) for each in found.values())


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("edge_dim", [None, 2])
@pytest.mark.parametrize("extras", [False, True])
def test_all_neighbours_in_one_batch_give_the_whole_graph_s_loss_and_gradients(
    score: str, layout: str, edge_dim: int | None, extras: bool
) -> None:
    data = node_data(layout=layout, edge_dim=edge_dim)
    standardise = extras and layout == "dense"
    settings = {"residual": extras, "layer_norm": extras, "output_heads": 2 if extras else 1}
    model = classifier(data, score=score, dropout=0.0, standardise=standardise, **settings)
    if standardise:
        model.measure_features(3 * data.features + 1)
    require_all_neighbours_give_the_whole_graph_s_loss(data, model)


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("edge_dims", [None, {WRITES: 2, CITES: 3}])
def test_so_do_those_of_several_types(score: str, layout: str, edge_dims: Any) -> None:
    data = typed_data(layout=layout, edge_dims=edge_dims)
    require_all_neighbours_give_the_whole_graph_s_loss(data, classifier(data, score=score, dropout=0.0))


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_of_some_neighbours_the_scores_are_those_over_the_drawn_edges(layout: str) -> None:
    """Every node draws once, so that both layers over all that was drawn, among all nodes, give the seeds' scores."""
    data = node_data(layout=layout, edge_dim=2)
    model = classifier(data, residual=True, layer_norm=True).eval()
    drawn = 0
    for sampled in batch_loader(data, data.splits[0].train, 4, (2, 3), seed=0):
        edges = sampled.edges[0]
        drawn += len(edges)
        part = aa.Graph.from_edge_index(data.graph.edge_index[:, edges], data.num_nodes)
        expected = model(data.features, part, data.edge_features[edges]).output[sampled.nodes[: sampled.num_seeds]]
        logits, labels = classify_seeds(model, data, sampled)
        torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
        assert torch.equal(labels, data.labels[sampled.nodes[: sampled.num_seeds]])
    assert 0 < drawn < 3 * data.num_edges


def test_of_some_neighbours_over_several_types_too() -> None:
    data = typed_data(edge_dims={WRITES: 2, CITES: 3})
    model = classifier(data).eval()
    for sampled in batch_loader(data, data.splits[0].train, 3, (1, 2), seed=0):
        edges = sampled.edges[0]
        part = {key: ends[:, edges[key]] for key, ends in data.graph.edge_index.items()}
        graph = aa.HeterogeneousGraph.from_edge_index(part, dict(data.graph.num_nodes))
        features = {key: each[edges[key]] for key, each in data.edge_features.items()}
        seeds = sampled.nodes["paper"][: sampled.num_seeds["paper"]]
        expected = model(data.features, graph, features).output[seeds]
        logits, labels = classify_seeds(model, data, sampled)
        torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
        assert torch.equal(labels, data.labels[seeds])


def test_an_epoch_takes_a_step_for_each_batch_with_each_training_node_once(monkeypatch) -> None:
    data = node_data()
    model = classifier(data, dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = batch_loader(data, data.splits[0].train, 4, (-1, -1), seed=0)
    # By the whole graph, without samples.
    twin = classifier(data, dropout=0.0)
    twin.load_state_dict(model.state_dict())
    seen = []

    def watched(model: Any, data: Any, sampled: Any) -> Any:
        seen.append(sampled.nodes[: sampled.num_seeds])
        return classify_seeds(model, data, sampled)

    monkeypatch.setattr(training_fitting, "classify_seeds", watched)
    orders = []
    for number in (1, 2):
        seen.clear()
        epoch = run_epoch(number, model, optimizer, data, data.splits[0], batches)
        assert [len(seeds) for seeds in seen] == [4, 4, 3]
        orders.append(torch.cat(seen))
        assert torch.equal(orders[-1].sort().values, data.splits[0].train.sort().values)
        total = 0.0
        for seeds in seen:
            twin.zero_grad()
            loss = F.cross_entropy(twin(data.features, data.graph).output[seeds], data.labels[seeds])
            loss.backward()
            total += loss.item() * len(seeds)
            with torch.no_grad():
                for weight in twin.parameters():
                    weight -= 0.1 * weight.grad
        assert epoch.loss == pytest.approx(total / 11, abs=1e-10)
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), atol=1e-10, rtol=0)
        validation = data.splits[0].validation
        logits = predict_logits(model, data)[validation]
        assert epoch.validation_loss == F.cross_entropy(logits, data.labels[validation]).item(), "of the whole graph"
    assert not torch.equal(*orders)


def single(data: Any) -> Any:
    """In float32, as files are read."""
    if isinstance(data, NodeData):
        return dataclasses.replace(data, features=data.features.float())
    return dataclasses.replace(data, features={kind: each.float() for kind, each in data.features.items()})


@pytest.mark.parametrize("kind", ["one type", "several"])
def test_the_seed_alone_decides(kind: str) -> None:
    """Whatever PyTorch's own random state, which is left as it was."""
    data = single(node_data() if kind == "one type" else typed_data())
    config = {"one type": NodeClassifierConfig, "several": HeterogeneousNodeClassifierConfig}[kind]
    config = config(**data.sizes, hidden=6, heads=2, dropout=0.3)
    settings = FitSettings(epochs=3, batch_size=5, fanout=(3, 2))
    before = torch.get_rng_state()
    first = fit(data, data.splits[0], config, settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    second = fit(data, data.splits[0], config, settings)
    assert first.best == second.best
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])
    for other in ({"seed": 1}, {"batch_size": 4}, {"fanout": (1, 2)}, {"batch_size": None, "fanout": None}):
        done = fit(data, data.splits[0], config, dataclasses.replace(settings, **other))
        assert any(not torch.equal(x, done.model.state_dict()[name]) for name, x in first.model.state_dict().items())


def test_the_batches_do_not_depend_on_the_number_of_threads(monkeypatch) -> None:
    data = single(node_data(nodes=211, edges=1999, train=101))
    config = NodeClassifierConfig(**data.sizes, hidden=6, heads=2, dropout=0.3)
    drawn: list[list[Any]] = []

    def watched(model: Any, data: Any, sampled: Any) -> Any:
        drawn[-1].append((sampled.nodes, *sampled.edges))
        return classify_seeds(model, data, sampled)

    monkeypatch.setattr(training_fitting, "classify_seeds", watched)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            drawn.append([])
            fit(data, data.splits[0], config, FitSettings(epochs=2, batch_size=50, fanout=(3, 2)))
    finally:
        torch.set_num_threads(threads)
    assert len(drawn[0]) == 6
    torch.testing.assert_close(drawn[1], drawn[0], atol=0, rtol=0)


def test_without_a_fanout_it_is_ten_and_ten() -> None:
    assert FitSettings(batch_size=7).fanout == (10, 10)
    assert (FitSettings().batch_size, FitSettings().fanout) == (None, None)
    assert FitSettings(batch_size=7, fanout=[-1, 3]).fanout == (-1, 3)
    told = json.loads(json.dumps(vars(FitSettings(batch_size=7, fanout=torch.tensor([2, 3]).numpy()))))
    assert (told["batch_size"], told["fanout"]) == (7, [2, 3])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"batch_size": 0}, "batch_size: expected an int of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size: expected an int of at least 1, got 2.0"),
        ({"batch_size": True}, "batch_size: expected an int of at least 1, got True"),
        ({"fanout": (3, 3)}, r"fanout: expected a batch_size with it, .* got fanout=\(3, 3\) and batch_size=None"),
        ({"batch_size": 2, "fanout": (3,)}, r"fanout: expected a number for each of the two layers, .* got \(3,\)"),
        ({"batch_size": 2, "fanout": (3, 3, 3)}, "fanout: expected a number for each of the two layers"),
        ({"batch_size": 2, "fanout": (3, 0)}, r"at least 1, or -1 for all neighbours, got \(3, 0\)"),
        ({"batch_size": 2, "fanout": (-2, 3)}, r"at least 1, or -1 for all neighbours, got \(-2, 3\)"),
        ({"batch_size": 2, "fanout": (True, 3)}, r"at least 1, or -1 for all neighbours, got \(True, 3\)"),
        ({"batch_size": 2, "fanout": 3}, "fanout: expected a number for each of the two layers, .* got 3"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidConfigError, match=text):
        FitSettings(**settings)


def test_a_batch_whose_loss_is_not_finite_is_named() -> None:
    data = single(node_data())
    data.features[:] = torch.nan
    with pytest.raises(NumericalInstabilityError, match="loss of epoch 1, batch 1: expected a finite number, got nan"):
        fit(data, data.splits[0], NodeClassifierConfig(**data.sizes), FitSettings(epochs=2, batch_size=3))


def test_a_training_node_that_comes_twice_is_refused() -> None:
    data = single(node_data())
    split = data.splits[0]._replace(train=torch.tensor([3, 4, 3]))
    with pytest.raises(GraphStructureError, match="seeds: expected each node once"):
        fit(data, split, NodeClassifierConfig(**data.sizes), FitSettings(epochs=2, batch_size=3))


@pytest.mark.parametrize("make", [node_data, typed_data])
def test_a_sample_of_other_hops_is_refused(make: Any) -> None:
    data = make()
    (sampled,) = batch_loader(data, data.splits[0].train, 50, (2, 2, 2), seed=0)
    with pytest.raises(InvalidInputError, match="graph: expected a sample of two hops, one for each layer, got 3"):
        classify_seeds(classifier(data), data, sampled)


def test_an_interrupt_within_an_epoch_keeps_the_best_one_before(monkeypatch) -> None:
    data = single(node_data())
    config, settings = NodeClassifierConfig(**data.sizes), FitSettings(epochs=9, batch_size=3)
    step, steps = torch.optim.Adam.step, []

    def interrupt(self: Any, *arguments: Any) -> Any:
        steps.append(None)
        # Four batches make an epoch.
        if len(steps) == 4 * 2 + 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupt)
        done = fit(data, data.splits[0], config, settings)
    assert done.interrupted
    shorter = fit(data, data.splits[0], config, dataclasses.replace(settings, epochs=2))
    assert done.best == shorter.best
    for name, weight in shorter.model.state_dict().items():
        assert torch.equal(weight, done.model.state_dict()[name])


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_rows_of_sparse_features_are_those_of_dense_ones(index_dtype: torch.dtype) -> None:
    dense = torch.randn(7, 5) * (torch.rand(7, 5) < 0.4)
    dense[2] = 0
    csr = dense.to_sparse_csr()
    x = sparse_csr(csr.crow_indices().to(index_dtype), csr.col_indices().to(index_dtype), csr.values(), (7, 5))
    for nodes in ([], [2], [6, 2, 0, 6], list(range(7))):
        chosen = torch.tensor(nodes, dtype=torch.int64)
        for each in (x, dense):
            assert torch.equal(rows_at(each, chosen).to_dense(), dense[chosen])
        assert rows_at(x, chosen).crow_indices().dtype == index_dtype
    for count in (0, 3, 7):
        for each in (x, dense):
            assert torch.equal(first_rows(each, count).to_dense(), dense[:count])
