"""A small byte-level language model over a window pattern, its training and what it can be asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyattention._checks import require_number
from anyattention.errors import InvalidConfigError, InvalidInputError
from anyattention.nn import MultiHeadAttention
from anyattention.patterns import Pattern, Window
from anyattention.training.steps import rate_factor, require_finite_loss

__all__ = ["SequenceFit", "SequenceModel", "SequenceSettings", "Step", "bits_per_byte", "fit_sequence", "sample_bytes"]

_BYTES, _TOGETHER = 256, 3


@dataclass(frozen=True)
class SequenceSettings:
    """The model's size and how to train it.

    Args:
        steps: of the training.
        batch: passages in a step.
        length: bytes of a passage.
        window: how many bytes back a byte may attend to, beside itself.
        width: of the features.
        heads: of the attention; a divisor of the width.
        blocks: of attention and feed-forward.
        learning_rate: AdamW's highest; it rises over the first tenth of the steps and falls along a cosine.
        seed: of the initial weights and of the passages.

    Raises:
        InvalidConfigError: a value is out of range.
    """

    steps: int = 700
    batch: int = 1
    length: int = 2048
    window: int = 128
    width: int = 128
    heads: int = 8
    blocks: int = 3
    learning_rate: float = 5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "length": 2, "window": 1, "width": 1, "heads": 1, "blocks": 1, "seed": 0}
        for name, at_least in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
                raise InvalidConfigError(argument=name, expected=f"an int of at least {at_least}", actual=repr(value))
        if self.window >= self.length:
            expected = f"less than length={self.length}"
            raise InvalidConfigError(argument="window", expected=expected, actual=self.window)
        if self.width % self.heads:
            expected = f"a divisor of width={self.width}"
            raise InvalidConfigError(argument="heads", expected=expected, actual=self.heads)
        require_number("learning_rate", self.learning_rate, above=0.0, below=1e6, error=InvalidConfigError)

    @property
    def pattern(self) -> Window:
        """Which earlier bytes a byte may attend to."""
        return Window(self.window, 0)


class SequenceModel(nn.Module):
    """Byte embedding, pre-norm blocks of attention and feed-forward, and a score for each next byte.

    A byte is embedded together with the two before it, so that attention may look for what came after the same three
    bytes earlier; in a minute's training it does not learn to put neighbours together by itself.

    Args:
        settings: the size.
        pattern: who attends to whom, nobody to what comes later; None is every earlier byte by `causal=True`, which
            forms the attention weights, as MultiHeadAttention does where it has no pattern.
    """

    def __init__(self, settings: SequenceSettings, pattern: Pattern | None) -> None:
        super().__init__()
        width = settings.width
        self.pattern = pattern
        self.embedding = nn.Embedding(_TOGETHER * _BYTES, width)
        self.blocks = nn.ModuleList(_Block(settings, pattern) for _ in range(settings.blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores `(batch, length, 256)` of the byte after each of the `tokens` `(batch, length)`."""
        x = self._embed(tokens)
        for block in self.blocks:
            x = block(x)[0]
        return self.head(self.norm(x))

    @torch.no_grad()
    def weights(self, tokens: Tensor) -> list[Tensor]:
        """Attention weights of one passage `(length,)`: a tensor `(edges, heads)` for each block, as the pattern's
        Graph orders them."""
        x = self._embed(tokens[None])
        found = []
        for block in self.blocks:
            x, weights = block(x, "heads")
            found.append(weights[0])
        return found

    def _embed(self, tokens: Tensor) -> Tensor:
        # Before the first byte there are zeros.
        together = F.pad(tokens, (_TOGETHER - 1, 0)).unfold(1, _TOGETHER, 1)
        return self.embedding(together + _BYTES * torch.arange(_TOGETHER)).sum(2)


class _Block(nn.Module):
    def __init__(self, settings: SequenceSettings, pattern: Pattern | None) -> None:
        super().__init__()
        width = settings.width
        self.attention_norm = nn.LayerNorm(width)
        # Without dropout, which the kernels of patterns do not compute.
        self.attention = MultiHeadAttention(
            width,
            settings.heads,
            dropout=0.0,
            max_seq_len=settings.length,
            positions="sinusoidal",
            causal=pattern is None,
            pattern=pattern,
        )
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, return_weights: str | None = None) -> tuple[Tensor, Tensor | None]:
        output, weights = self.attention(self.attention_norm(x), return_weights=return_weights)
        x = x + output
        return x + self.feed_forward(x), weights


class Step(NamedTuple):
    """What a finished step reports: its number from 1, and the loss in bits per byte."""

    number: int
    bits: float


class SequenceFit(NamedTuple):
    """A trained model, in evaluation mode.

    Attributes:
        model: as the last step left it.
        bits: the training loss of each step, in bits per byte.
        seconds: that the steps took.
        interrupted: whether Ctrl-C ended them.
    """

    model: SequenceModel
    bits: list[float]
    seconds: float
    interrupted: bool


def fit_sequence(
    tokens: Tensor, settings: SequenceSettings, on_step: Callable[[Step], None] | None = None
) -> SequenceFit:
    """Train a new model to tell each byte from those before it, on passages drawn at random.

    Ctrl-C (KeyboardInterrupt) ends the training early and keeps the weights of that moment; before the first step has
    finished it is passed on.

    Args:
        tokens: the text, int64 `(bytes,)`.
        settings: of the model and the training.
        on_step: called after each step.

    Raises:
        InvalidInputError: the text is no longer than a passage.
        NumericalInstabilityError: the loss is NaN or infinite.

    Cost: a forward and backward pass over `batch` passages each step. The same arguments give the same weights;
    PyTorch's own random state is left as it was.
    """
    require_passage("tokens", tokens, settings.length)
    bits: list[float] = []
    interrupted = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = SequenceModel(settings, settings.pattern)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
        started = time.monotonic()
        try:
            for number in range(1, settings.steps + 1):
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * rate_factor(number, settings.steps, 0.05)
                loss = train_step(model, optimizer, draw_passages(tokens, settings))
                require_finite_loss(loss, f"step {number}")
                bits.append(loss)
                if on_step is not None:
                    on_step(Step(number, loss))
        except KeyboardInterrupt:
            if not bits:
                raise
            interrupted = True
        seconds = time.monotonic() - started
    return SequenceFit(model.eval(), bits, seconds, interrupted)


def require_passage(argument: str, tokens: Tensor, length: int) -> None:
    """Raise unless a text holds a passage and the byte after it."""
    if len(tokens) <= length:
        expected = f"more than the length of a passage, {length} bytes"
        raise InvalidInputError(argument=argument, expected=expected, actual=f"{len(tokens)} bytes")


def draw_passages(tokens: Tensor, settings: SequenceSettings) -> Tensor:
    """Passages and the byte after each, `(batch, length + 1)`, from anywhere in the text."""
    starts = torch.randint(len(tokens) - settings.length, (settings.batch, 1))
    return tokens[starts + torch.arange(settings.length + 1)]


def train_step(model: SequenceModel, optimizer: torch.optim.Optimizer, passages: Tensor) -> float:
    """One step; the loss before it, in bits per byte. Nothing changes where that is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss = _loss(model, passages)
    if math.isfinite(loss.item()):
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item() / math.log(2)


@torch.no_grad()
def bits_per_byte(model: SequenceModel, tokens: Tensor, length: int) -> float:
    """The loss over a text cut into passages of one length; what is left at its end is not counted."""
    require_passage("tokens", tokens, length)
    passages = tokens.unfold(0, length + 1, length)
    losses = [_loss(model, passage[None]).item() for passage in passages]
    return sum(losses) / len(losses) / math.log(2)


@torch.no_grad()
def sample_bytes(model: SequenceModel, prompt: Tensor, count: int, *, temperature: float = 0.9, seed: int = 0) -> bytes:
    """What the model writes after a prompt `(bytes,)`; both together are to be no longer than a passage.

    Cost: a forward pass over the text so far for each byte.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(count):
        scores = model(tokens[None])[0, -1] / temperature
        tokens = torch.cat([tokens, torch.multinomial(scores.softmax(0), 1, generator=generator)])
    return bytes(tokens[len(prompt) :].tolist())


def _loss(model: SequenceModel, passages: Tensor) -> Tensor:
    scores = model(passages[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), passages[:, 1:].flatten())
