"""The language model: settings, byte embedding, blocks of attention over a pattern, a score for each next byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyattention import Pattern, Window
from anyattention.errors import InvalidConfigError
from anyattention.nn import KeyValueCache, MultiHeadAttention
from examples.settings import About, check_settings, require_divisor

__all__ = ["LanguageModel", "Past", "Settings"]

_BYTES, _TOGETHER = 256, 3


@dataclass(frozen=True)
class Settings:
    """The model's size and how to train it.

    Raises:
        InvalidConfigError: a value is out of range.
    """

    steps: Annotated[int, About("steps of the training")] = 700
    batch: Annotated[int, About("passages in a step")] = 1
    length: Annotated[int, About("bytes of a passage", least=2)] = 2048
    window: Annotated[int, About("bytes back that a byte may attend to, beside itself")] = 128
    width: Annotated[int, About("features of a byte")] = 128
    heads: Annotated[int, About("heads of the attention, a divisor of the width")] = 8
    blocks: Annotated[int, About("blocks of attention and feed-forward")] = 3
    learning_rate: Annotated[float, About("AdamW's highest learning rate")] = 5e-3
    seed: Annotated[int, About("seed of the initial weights and the passages", least=0)] = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.window >= self.length:
            expected = f"less than length={self.length}"
            raise InvalidConfigError(argument="window", expected=expected, actual=self.window)
        require_divisor(self, "heads", of="width")

    @property
    def pattern(self) -> Window:
        """Which earlier bytes a byte may attend to."""
        return Window(self.window, 0)


class Past:
    """What a model keeps of the bytes before: keys and values of each block, and the last bytes.

    Args:
        model: whose past it is, empty at first.
    """

    def __init__(self, model: LanguageModel) -> None:
        pattern = model.pattern
        # A window needs the keys that it reaches alone.
        window = pattern.left if isinstance(pattern, Window) else None
        self.caches = [KeyValueCache(window=window) for _ in model.blocks]
        self.last = torch.zeros(1, _TOGETHER - 1, dtype=torch.int64)


class LanguageModel(nn.Module):
    """Byte embedding, pre-norm blocks of attention and feed-forward, and a score for each next byte.

    A byte is embedded together with the two before it, so that attention may look for what came after the same three
    bytes earlier; in a minute's training it does not learn to put neighbours together by itself.

    Args:
        settings: the size.
        pattern: who attends to whom, nobody to what comes later; None is every earlier byte by `causal=True`, which
            forms the attention weights, as MultiHeadAttention does where it has no pattern.
    """

    def __init__(self, settings: Settings, pattern: Pattern | None) -> None:
        super().__init__()
        width = settings.width
        self.pattern = pattern
        self.embedding = nn.Embedding(_TOGETHER * _BYTES, width)
        self.blocks = nn.ModuleList(_Block(settings, pattern) for _ in range(settings.blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens: Tensor, past: Past | None = None) -> Tensor:
        """Scores `(batch, length, 256)` of the byte after each of the `tokens` `(batch, length)`.

        With a past, of one text, these come after its bytes, and are added to it.
        """
        if past is None:
            x, caches = self._embed(F.pad(tokens, (_TOGETHER - 1, 0))), [None] * len(self.blocks)
        else:
            preceded = torch.cat([past.last, tokens], 1)
            x, caches = self._embed(preceded), past.caches
            past.last = preceded[:, preceded.shape[1] - (_TOGETHER - 1) :]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, past=cache)[0]
        return self.head(self.norm(x))

    @torch.no_grad()
    def weights(self, tokens: Tensor) -> list[Tensor]:
        """Attention weights of one passage `(length,)`: a tensor `(edges, heads)` for each block, as the pattern's
        Graph orders them."""
        x = self._embed(F.pad(tokens[None], (_TOGETHER - 1, 0)))
        found = []
        for block in self.blocks:
            x, weights = block(x, "heads")
            found.append(weights[0])
        return found

    def _embed(self, preceded: Tensor) -> Tensor:
        """Features of the bytes but the first two, which are before the first."""
        together = preceded.unfold(1, _TOGETHER, 1)
        return self.embedding(together + _BYTES * torch.arange(_TOGETHER)).sum(2)


class _Block(nn.Module):
    def __init__(self, settings: Settings, pattern: Pattern | None) -> None:
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

    def forward(
        self, x: Tensor, return_weights: str | None = None, past: KeyValueCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = self.attention(self.attention_norm(x), past=past, return_weights=return_weights)
        x = x + output
        return x + self.feed_forward(x), weights
