"""Each score learns a task that nobody can do without attending: the answer is one neighbour's payload."""

import pytest
import torch
from torch import Tensor, nn

from anyattention.nn import GraphAttention
from anyattention.patterns import Graph

_KINDS, _TARGETS, _PAYLOAD = 4, 60, 2


def make_task(score: str) -> tuple[Tensor, Tensor, Graph, Tensor]:
    """Source and target features, the graph, and the payload that each target should find.

    Every target has one neighbour of each kind. With "additive", whose ranking of keys is the same for all
    queries (Brody et al., 2022, theorem 1), kind 0 is right; with the others, the kind that the target names.
    """
    kinds = torch.arange(_KINDS).repeat(_TARGETS)
    payload = torch.randn(_KINDS * _TARGETS, _PAYLOAD)
    source = torch.cat([nn.functional.one_hot(kinds, _KINDS).float(), payload], dim=1)
    wanted = torch.randint(0, _KINDS, (_TARGETS,))
    if score == "additive":
        wanted = torch.zeros(_TARGETS, dtype=torch.int64)
    target = nn.functional.one_hot(wanted, _KINDS).float()
    targets = torch.arange(_TARGETS)
    edge_index = torch.stack([torch.arange(_KINDS * _TARGETS), targets.repeat_interleave(_KINDS)])
    graph = Graph.from_edge_index(edge_index, num_queries=_TARGETS, num_keys=_KINDS * _TARGETS)
    return source, target, graph, payload[targets * _KINDS + wanted]


def loss_without_attention(source: Tensor, graph: Graph, answer: Tensor) -> float:
    """The least squares of the best linear answer from the plain mean of the neighbours."""
    means = torch.zeros(_TARGETS, source.shape[1]).index_add(0, graph.query_index, source[graph.key_index]) / _KINDS
    best = torch.linalg.lstsq(means, answer, driver="gelsd").solution
    return float(nn.functional.mse_loss(means @ best, answer))


def train(score: str, task: tuple[Tensor, Tensor, Graph, Tensor], num_heads: int) -> tuple[float, float]:
    """The loss before and after."""
    source, target, graph, answer = task
    widths = (source.shape[1], target.shape[1])
    layer = GraphAttention(16, num_heads, in_features=widths, score=score, dropout=0.0)  # pyright: ignore[reportArgumentType]
    readout = nn.Linear(16, _PAYLOAD)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=0.05)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(readout(layer((source, target), graph).output), answer)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("score", ["additive", "dynamic", "dot"])
def test_training_finds_the_right_neighbour(score: str) -> None:
    task = make_task(score)
    first, last = train(score, task, num_heads=2)
    floor = loss_without_attention(task[0], task[2], task[3])
    assert first > floor / 2
    assert last < floor / 20


def test_a_ranking_that_ignores_the_query_cannot() -> None:
    task = make_task("dynamic")
    # One head: two can share the kinds out between them.
    _, last = train("additive", task, num_heads=1)
    assert last > loss_without_attention(task[0], task[2], task[3]) / 2
