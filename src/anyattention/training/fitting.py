"""Trains a node classifier and keeps the epoch that does best on the validation labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention._checks import keep_all_plain, require_number
from anyattention.ambient import lasting
from anyattention.errors import InvalidConfigError
from anyattention.loader import NeighborLoader
from anyattention.output import AttentionOutput
from anyattention.training.data import AnyData, NodeData, Split
from anyattention.training.heterogeneous_model import (
    ClassScores,
    HeterogeneousNodeClassifier,
    HeterogeneousNodeClassifierConfig,
)
from anyattention.training.mini_batches import DEFAULT_FANOUT, batch_loader, classify_seeds, require_fanout
from anyattention.training.model import NodeClassifier, NodeClassifierConfig
from anyattention.training.scoring import metric_value
from anyattention.training.steps import require_finite_loss, require_finite_scores

__all__ = [
    "AnyClassifier",
    "AnyConfig",
    "Epoch",
    "Fit",
    "FitSettings",
    "attention_within_classes",
    "classify",
    "fit",
    "predict_logits",
    "run_epoch",
]


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    Args:
        epochs: at most so many; one is a step that sees all nodes, or with batch_size a pass over the training nodes.
        learning_rate: Adam's.
        weight_decay: Adam's, the squared weights' factor.
        patience: stop after so many epochs without a better one.
        seed: of the initial weights and of dropout, and of the batches and their neighbours.
        batch_size: of how many training nodes a step is; None is all nodes in one step.
        fanout: with batch_size, how many edges are drawn: of each training node of a batch, and of each node that these
            lead to. -1 for all; None is (10, 10).

    Raises:
        InvalidConfigError: a value is out of range.
    """

    epochs: int = 300
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    patience: int = 100
    seed: int = 0
    batch_size: int | None = None
    fanout: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        keep_all_plain(self)
        for name, at_least in (("epochs", 1), ("patience", 1), ("seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if name == "batch_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
                raise InvalidConfigError(argument=name, expected=f"an int of at least {at_least}", actual=repr(value))
        # Far beyond any use, and far below what overflows in float32.
        require_number("learning_rate", self.learning_rate, above=0.0, below=1e6, error=InvalidConfigError)
        require_number("weight_decay", self.weight_decay, at_least=0.0, below=1e6, error=InvalidConfigError)
        if self.batch_size is not None:
            fanout = DEFAULT_FANOUT if self.fanout is None else require_fanout(self.fanout)
            object.__setattr__(self, "fanout", fanout)
        elif self.fanout is not None:
            raise InvalidConfigError(
                argument="fanout",
                expected="a batch_size with it, since a step over all nodes takes all neighbours",
                actual=f"fanout={self.fanout!r} and batch_size=None",
            )


AnyClassifier = NodeClassifier | HeterogeneousNodeClassifier
"""A network of any kind that can be trained."""

AnyConfig = NodeClassifierConfig | HeterogeneousNodeClassifierConfig
"""Its settings."""


class Epoch(NamedTuple):
    """What a finished epoch reports: its number from 1, the training loss, and the scores on validation labels."""

    number: int
    loss: float
    validation_loss: float
    validation_score: float


class Fit(NamedTuple):
    """A trained classifier, in evaluation mode, at its best epoch.

    Attributes:
        model: the classifier.
        best: the epoch that was kept.
        epochs: number of epochs that were run.
        interrupted: whether Ctrl-C ended them.
    """

    model: AnyClassifier
    best: Epoch
    epochs: int
    interrupted: bool


def fit(
    data: AnyData,
    split: Split,
    config: AnyConfig,
    settings: FitSettings,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Fit:
    """Train a new classifier on the split's training labels.

    The best epoch has the highest score (`data.metric`) on the validation labels; among equals, the lowest
    validation loss. Test labels are not looked at. Ctrl-C (KeyboardInterrupt) ends the training early and keeps the
    best epoch so far; before the first epoch has finished there is none, and it is passed on.

    Args:
        data: features, graph and labels.
        split: one of `data.splits`.
        config: of the classifier, that of the data's kind; whether it standardises is `data.standardise`.
        settings: of the training.
        on_epoch: called after each epoch.

    Raises:
        NumericalInstabilityError: the loss, or a class score, is NaN or infinite.

    Cost: a forward and backward pass for training and a forward pass for validation, each epoch. With a batch_size
    those of training are over the sampled neighbours of a batch at a time; the one of validation is over all nodes, and
    exact. The same arguments give the same weights; PyTorch's own random state is left as it was.
    """
    # The epoch and its weights in one variable: an interrupt may come between any two lines.
    kept: tuple[Epoch, dict[str, Tensor]] | None = None
    number, interrupted = 0, False
    # A training that was called where gradients are off has some all the same.
    with lasting(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _new_classifier(config, data)
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        batches = _batches(data, split, settings)
        try:
            for number in range(1, settings.epochs + 1):
                epoch = run_epoch(number, model, optimizer, data, split, batches)
                if kept is None or _rank(epoch) > _rank(kept[0]):
                    kept = epoch, {key: value.clone() for key, value in model.state_dict().items()}
                if on_epoch is not None:
                    on_epoch(epoch)
                if number - kept[0].number >= settings.patience:
                    break
        except KeyboardInterrupt:
            if kept is None:
                raise
            interrupted = True
    assert kept is not None
    best, weights = kept
    model.load_state_dict(weights)
    return Fit(model.eval(), best, number, interrupted)


def _new_classifier(config: AnyConfig, data: AnyData) -> AnyClassifier:
    """A classifier of the dtype and on the device of the features, whatever PyTorch's defaults are."""
    like = data.features if isinstance(data, NodeData) else next(iter(data.features.values()))
    with torch.device(like.device):
        if isinstance(config, HeterogeneousNodeClassifierConfig):
            return HeterogeneousNodeClassifier.from_config(config).to(like.dtype)
        if not isinstance(data, NodeData):
            raise InvalidConfigError(
                argument="config",
                expected="HeterogeneousNodeClassifierConfig for such data",
                actual=type(config).__name__,
            )
        model = NodeClassifier.from_config(replace(config, standardise=data.standardise)).to(like.dtype)
    if data.standardise:
        model.measure_features(data.features)
    return model


def _batches(data: AnyData, split: Split, settings: FitSettings) -> NeighborLoader | None:
    if settings.batch_size is None or settings.fanout is None:
        return None
    return batch_loader(data, split.train, settings.batch_size, settings.fanout, settings.seed)


def classify(
    model: AnyClassifier, data: AnyData, *, return_weights: bool | str = False
) -> AttentionOutput | ClassScores:
    """The model's output for all nodes of the data, whose edge features it gets if it takes any."""
    if isinstance(model, HeterogeneousNodeClassifier):
        return model(data.features, data.graph, data.edge_features, return_weights=return_weights)
    edges = None if model.config.edge_dim is None else data.edge_features
    return model(data.features, data.graph, edges, return_weights=return_weights)


def predict_logits(model: AnyClassifier, data: AnyData) -> Tensor:
    """Class scores `(nodes, num_classes)` of all nodes, without dropout and without gradients.

    Raises:
        NumericalInstabilityError: a score is NaN or infinite.
    """
    model.eval()
    with torch.no_grad():
        scores = classify(model, data).output
    require_finite_scores(scores, data.name, data.ids)
    return scores


def attention_within_classes(model: AnyClassifier, data: NodeData, nodes: Tensor) -> tuple[float, float]:
    """The share of some nodes' attention to other nodes that stays in their class; and the same, evenly paid.

    Args:
        model: a trained classifier; the attention is that of its second layer.
        data: what it classifies; all labels are known.
        nodes: whose attention, `(any,)` int64.
    """
    model.eval()
    with torch.no_grad():
        weights = classify(model, data, return_weights=True).weights
    assert isinstance(weights, Tensor)
    query, key = data.graph.query_index, data.graph.key_index
    is_counted = torch.zeros(data.num_nodes, dtype=torch.bool, device=nodes.device)
    is_counted[nodes] = True
    counted = is_counted[query] & (query != key)
    same = (data.labels[query] == data.labels[key])[counted]
    even = 1 / data.graph.query_offsets.diff()[query].to(weights.dtype)
    learnt, evenly = (float(part[counted][same].sum() / part[counted].sum()) for part in (weights, even))
    return learnt, evenly


def run_epoch(
    number: int,
    model: AnyClassifier,
    optimizer: torch.optim.Optimizer,
    data: AnyData,
    split: Split,
    batches: NeighborLoader | None = None,
) -> Epoch:
    """One step of training on all nodes, or one on each batch; and the scores on the validation labels after it.

    The loss is the mean over the training nodes, of each as it was in the step of its batch.
    """
    model.train()
    if batches is None:
        optimizer.zero_grad(set_to_none=True)
        logits = classify(model, data).output[split.train]
        loss = _descend(optimizer, logits, data.labels[split.train], f"epoch {number}")
    else:
        total = 0.0
        for place, sampled in enumerate(batches, start=1):
            optimizer.zero_grad(set_to_none=True)
            logits, labels = classify_seeds(model, data, sampled)
            total += len(labels) * _descend(optimizer, logits, labels, f"epoch {number}, batch {place}")
        loss = total / len(split.train)
    logits = predict_logits(model, data)[split.validation]
    labels = data.labels[split.validation]
    validation_loss = F.cross_entropy(logits, labels).item()
    return Epoch(number, loss, validation_loss, metric_value(data.metric, logits, labels))


def _descend(optimizer: torch.optim.Optimizer, logits: Tensor, labels: Tensor, step: str) -> float:
    """Moves the weights by a step, and returns the loss before it."""
    loss = F.cross_entropy(logits, labels)
    require_finite_loss(loss.item(), step)
    loss.backward()
    optimizer.step()
    return loss.item()


def _rank(epoch: Epoch) -> tuple[float, float]:
    return epoch.validation_score, -epoch.validation_loss
