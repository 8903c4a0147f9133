"""Fills memories, asks them, and asks simpler methods the same.

Axes: N images, D key_dim, C classes, k memories that a query attends to.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention.nn import MemoryAttention
from anyattention.training.extras import import_demo
from examples.memory.images import Data, Images
from examples.memory.model import Encoder, Settings, empty_memory, label_values
from examples.memory.train import Fit

__all__ = [
    "NEIGHBOURS",
    "Answers",
    "Pixels",
    "Recalled",
    "accuracy",
    "answer",
    "ask_pixels",
    "encode",
    "number_of_parts",
    "number_of_pixel_parts",
    "recall",
    "require_pixels",
]

NEIGHBOURS = 5
_PURPOSE = "the comparison with pixels"
_AT_ONCE, _ITERATIONS = 1000, 100


class Answers(NamedTuple):
    """What a memory says of N images.

    Attributes:
        probabilities: of the classes, `(N, C)`.
        weights: of the memories that each attends to, `(N, k)`, the best first.
        memories: these memories, by the places of their images among the training's, int64 `(N, k)`.
    """

    probabilities: Tensor
    weights: Tensor
    memories: Tensor

    @property
    def labels(self) -> Tensor:
        """The class of the largest probability `(N,)`."""
        return self.probabilities.argmax(1)


class Recalled(NamedTuple):
    """The memories, and what they say of the test's images.

    Attributes:
        memory: of all training images.
        keys: the keys of the test's images, by the encoder of all classes, `(N, D)`.
        answers: of this memory.
        before: of the memory of the other encoder, which never saw the class held out, nor did the memory.
        after: of the same memory, after the images of that class were appended.
        seconds: of the first memory: "encoding" all images, "attending" from the test's.
    """

    memory: MemoryAttention
    keys: Tensor
    answers: Answers
    before: Answers
    after: Answers
    seconds: dict[str, float]


class Pixels(NamedTuple):
    """Labels `(N,)` of the test's images, from pixels: by the 5 nearest neighbours, and by logistic regression."""

    neighbours: Tensor
    logistic: Tensor


def encode(encoder: Encoder, pixels: Tensor, on_part: Callable[[], None] | None = None) -> Tensor:
    """The keys `(N, D)` of images, of 1,000 at a time; `on_part` is called after each."""
    parts = []
    with torch.no_grad():
        for some in pixels.split(_AT_ONCE):
            parts.append(encoder(some))
            if on_part is not None:
                on_part()
    return torch.cat(parts)


def answer(memory: MemoryAttention, keys: Tensor, places: Tensor) -> Answers:
    """What a memory says of images with these keys; `places` are those of its memories, by their ids."""
    with torch.no_grad():
        found = memory.memory_forward(keys)
    # There is one head.
    return Answers(found.output, found.weights.squeeze(1), places[found.indices.squeeze(1)])


def recall(done: Fit, data: Data, settings: Settings, on_part: Callable[[], None] | None = None) -> Recalled:
    """Remember all training images, and in a second memory those of the class held out after the others.

    Args:
        done: the encoders.
        data: the images.
        settings: of the attention.
        on_part: called `number_of_parts(data)` times.

    Cost: both encoders over all images, and two attentions of the second memory for one of the first.
    """
    train, test = data
    started = time.monotonic()
    keys = encode(done.whole.encoder, train.pixels, on_part)
    queries = encode(done.whole.encoder, test.pixels, on_part)
    encoded = time.monotonic()
    memory = empty_memory(settings)
    memory.append(keys, label_values(train.labels))
    answers = answer(memory, queries, torch.arange(len(keys)))
    seconds = {"encoding": encoded - started, "attending": time.monotonic() - encoded}

    other_keys = encode(done.without.encoder, train.pixels, on_part)
    other_queries = encode(done.without.encoder, test.pixels, on_part)
    is_held_out = train.labels == settings.held_out
    known, new = (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()
    places = torch.cat([known, new])
    grown = empty_memory(settings)
    grown.append(other_keys[known], label_values(train.labels[known]))
    before = answer(grown, other_queries, places)
    grown.append(other_keys[new], label_values(train.labels[new]))
    after = answer(grown, other_queries, places)
    return Recalled(memory, queries, answers, before, after, seconds)


def number_of_parts(data: Data) -> int:
    """How many times `recall` calls its `on_part`."""
    return 2 * sum(-(-len(images.labels) // _AT_ONCE) for images in data)


def require_pixels() -> None:
    """Raise MissingExtraError before the work unless scikit-learn is installed."""
    import_demo("sklearn", _PURPOSE)


def ask_pixels(data: Data, threads: int, on_part: Callable[[], None] | None = None) -> Pixels:
    """What simpler methods say of the test's images, by scikit-learn; on so many threads.

    `on_part` is called `number_of_pixel_parts(data)` times. Logistic regression ends after 100 iterations,
    converged or not.
    """
    neighbours = import_demo("sklearn.neighbors", _PURPOSE)
    linear = import_demo("sklearn.linear_model", _PURPOSE)
    exceptions = import_demo("sklearn.exceptions", _PURPOSE)
    pools = import_demo("threadpoolctl", _PURPOSE)
    train, test = (_rows(images) for images in data)
    labels = data.train.labels.numpy()
    with pools.threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        regression = linear.LogisticRegression(max_iter=_ITERATIONS).fit(train, labels)
        by_regression = torch.from_numpy(regression.predict(test))
        if on_part is not None:
            on_part()
        nearest = neighbours.KNeighborsClassifier(NEIGHBOURS, algorithm="brute").fit(train, labels)
        parts = []
        for start in range(0, len(test), _AT_ONCE):
            parts.append(torch.from_numpy(nearest.predict(test[start : start + _AT_ONCE])))
            if on_part is not None:
                on_part()
    return Pixels(torch.cat(parts), by_regression)


def number_of_pixel_parts(data: Data) -> int:
    """How many times `ask_pixels` calls its `on_part`."""
    return 1 + -(-len(data.test.labels) // _AT_ONCE)


def _rows(images: Images) -> Any:
    """Pixels from 0 to 1, float32 `(N, 784)`."""
    return (images.pixels.flatten(1).float() / 255).numpy()


def accuracy(answered: Tensor, labels: Tensor) -> float:
    """The share of right answers; NaN where there is no label."""
    return float((answered == labels).double().mean())
