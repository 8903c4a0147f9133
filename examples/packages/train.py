"""Trains the network, and asks it for sections and for its attention."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention import NeighborLoader
from anyattention.training.steps import require_finite_loss
from examples.packages.data import Packages
from examples.packages.inputs import Batch, Inputs
from examples.packages.model import PackageClassifier, Settings
from examples.schedule import rate_factor

__all__ = ["Fit", "Shares", "Step", "accuracy", "batches", "fit", "predict", "relation_shares"]

# Packages that are classified at once.
_TOGETHER = 16_384


class Step(NamedTuple):
    """What a finished step reports: its number from 1, and its loss."""

    number: int
    loss: float


class Fit(NamedTuple):
    """A trained network, in evaluation mode.

    Attributes:
        model: as the last step left it.
        losses: of each step.
        seconds: that the steps took.
        interrupted: whether Ctrl-C ended them.
    """

    model: PackageClassifier
    losses: list[float]
    seconds: float
    interrupted: bool


def fit(
    packages: Packages,
    inputs: Inputs,
    settings: Settings,
    on_step: Callable[[Step], None] | None = None,
    network: Callable[[Inputs, Settings, int], PackageClassifier] = PackageClassifier,
) -> Fit:
    """Train a new network on the sections of the packages to learn from.

    Ctrl-C (KeyboardInterrupt) ends the training early and keeps the weights of that moment; before the first step has
    finished it is passed on.

    Args:
        packages: whose sections are learnt.
        inputs: that were made of them.
        settings: of the network and the training.
        on_step: called after each step.
        network: makes the network, of the arguments of PackageClassifier.

    Raises:
        NumericalInstabilityError: the loss is NaN or infinite.

    Cost: a forward and backward pass over a batch each step. The same arguments give the same weights; PyTorch's own
    random state is left as it was.
    """
    losses: list[float] = []
    interrupted = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = network(inputs, settings, len(packages.classes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        started = time.monotonic()
        try:
            drawn = batches(packages.train, inputs, settings)
            for number in range(1, settings.steps + 1):
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * rate_factor(number, settings.steps, 0.01)
                loss = _step(model, optimizer, next(drawn), packages.labels, settings.smoothing)
                require_finite_loss(loss, f"step {number}")
                losses.append(loss)
                if on_step is not None:
                    on_step(Step(number, loss))
        except KeyboardInterrupt:
            if not losses:
                raise
            interrupted = True
        seconds = time.monotonic() - started
    return Fit(model.eval(), losses, seconds, interrupted)


def batches(seeds: Tensor, inputs: Inputs, settings: Settings) -> Iterator[Batch]:
    """The batches of a training, without end: fold after fold, each whole or as samples, epoch after epoch."""
    fanout = settings.fanout or -1
    parts = [(fold.seeds, inputs._replace(guesses=fold.guesses)) for fold in inputs.folds] or [(seeds, inputs)]
    if not settings.batch:
        wholes = [part.whole_batch(seeds) for seeds, part in parts] if fanout == -1 else None
        while True:
            yield from wholes or (part.batch(part.graph.sample({"package": seeds}, [fanout])) for seeds, part in parts)
    loaders = [
        NeighborLoader(
            inputs.graph,
            ("package", seeds),
            [fanout],
            batch_size=settings.batch,
            shuffle=True,
            transform=part.batch,
        )
        for seeds, part in parts
    ]
    while True:
        yield from itertools.chain(*loaders)


def _step(
    model: PackageClassifier, optimizer: torch.optim.Optimizer, batch: Batch, labels: Tensor, smoothing: float
) -> float:
    """One step; the loss before it. Nothing changes where that is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(batch), labels[batch.seeds], label_smoothing=smoothing)
    if loss.isfinite():
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def predict(model: PackageClassifier, inputs: Inputs, nodes: Tensor) -> Tensor:
    """The section of packages as a number, each of them with all of its edges."""
    return torch.cat([model(inputs.whole_batch(part)).argmax(1) for part in nodes.split(_TOGETHER)])


def accuracy(predicted: Tensor, nodes: Tensor, labels: Tensor) -> float:
    """The share of packages whose predicted section is theirs."""
    return float((predicted == labels[nodes]).double().mean())


class Shares(NamedTuple):
    """Of some packages, by the relation's name: the share of their attention, and of their links; `(packages,)`."""

    attention: dict[str, Tensor]
    links: dict[str, Tensor]


def relation_shares(model: PackageClassifier, inputs: Inputs, nodes: Tensor) -> Shares:
    """How much of its attention each package pays along each relation, and how many of its links are of it."""
    paid: dict[str, list[Tensor]] = {relation[1]: [] for relation in inputs.links}
    linked: dict[str, list[Tensor]] = {relation[1]: [] for relation in inputs.links}
    for part in nodes.split(_TOGETHER):
        batch = inputs.whole_batch(part)
        weights = model.weights(batch)
        for (_, name, _), (_, targets) in batch.block.edge_index.items():
            none = torch.zeros(len(part))
            paid[name].append(none.index_add(0, targets, weights[name]))
            linked[name].append(targets.bincount(minlength=len(part)).float())
    links = {name: torch.cat(each) for name, each in linked.items()}
    total = torch.stack(list(links.values())).sum(0)
    return Shares(
        {name: torch.cat(each) for name, each in paid.items()}, {name: each / total for name, each in links.items()}
    )
