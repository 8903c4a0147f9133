"""The network: sparse words to features, one layer of attention over typed edges, a linear classifier; its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyattention.errors import InvalidConfigError
from anyattention.nn import HeterogeneousGraphAttention
from examples.packages.inputs import Batch, Inputs, Rows, product, role_of
from examples.settings import About, check_settings, require_divisor

__all__ = ["PackageClassifier", "Settings", "WordFeatures"]


@dataclass(frozen=True)
class Settings:
    """The network's size and how to train it.

    Raises:
        InvalidConfigError: a value is out of range.
    """

    steps: Annotated[int, About("steps of the training")] = 100
    batch: Annotated[int, About("packages in a step; 0 for a fifth of those to learn from", least=0)] = 0
    fanout: Annotated[int, About("neighbours by each relation in a step, at most; 0 for all", least=0)] = 0
    width: Annotated[int, About("features of a node")] = 256
    heads: Annotated[int, About("heads of the attention, a divisor of the width")] = 4
    dropout: Annotated[float, About("share of the features that a step drops, below 1")] = 0.6
    word_dropout: Annotated[float, About("share of the words that a step drops, below 1")] = 0.3
    learning_rate: Annotated[float, About("AdamW's highest learning rate")] = 1e-2
    weight_decay: Annotated[float, About("AdamW's weight decay")] = 1e-4
    smoothing: Annotated[float, About("label smoothing, below 1")] = 0.1
    seed: Annotated[int, About("seed of the initial weights and the draws", least=0)] = 0

    def __post_init__(self) -> None:
        check_settings(self)
        require_divisor(self, "heads", of="width")
        for name in ("dropout", "word_dropout", "smoothing"):
            if getattr(self, name) >= 1:
                raise InvalidConfigError(argument=name, expected="a share below 1", actual=getattr(self, name))


class WordFeatures(nn.Module):
    """Features of nodes from words and guesses: layer norm and GELU of a linear map of what a node reads.

        h_i = W_own words_i + sum over relations r of sum over j of factor_r,i W_r words_j + W numbers_i + W guesses_i

    The words of a node are mapped once for each relation, and then summed along its edges: a tenth of the work that it
    takes to map the sums.
    """

    def __init__(self, inputs: Inputs, width: int, dropout: float, word_dropout: float) -> None:
        super().__init__()
        self.word_dropout = word_dropout
        count = inputs.own["package"].num_columns

        def table() -> nn.Parameter:
            return nn.Parameter(torch.randn(count, width) * 0.1)

        self.own = nn.ParameterDict({kind: table() for kind in inputs.own})
        self.linked = nn.ParameterDict({relation[1]: table() for relation in inputs.links})
        self.numbers = nn.Linear(inputs.numbers.shape[1], width)
        # A package has its own guesses, and the means along each of its relations.
        guesses = {kind: each.shape[1] for kind, each in inputs.guesses.items()}
        if guesses:
            guesses["package"] *= 1 + len(inputs.links)
        self.guesses = nn.ModuleDict({kind: nn.Linear(count, width) for kind, count in guesses.items()})
        self.norms = nn.ModuleDict({kind: nn.LayerNorm(width) for kind in inputs.own})
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Features `(nodes, width)` of the batch's nodes, by type."""
        found = {kind: self._mapped(rows, self.own[kind]) for kind, rows in batch.own.items()}
        found["package"] = found["package"] + self.numbers(batch.numbers)
        for relation, link in batch.links.items():
            words = self._mapped(link.words, self.linked[relation[1]])
            found["package"] = found["package"] + product(link.readers, words)
        for kind, guesses in batch.guesses.items():
            found[kind] = found[kind] + self.guesses[kind](guesses)
        return {kind: self.dropout(F.gelu(self.norms[kind](rows))) for kind, rows in found.items()}

    def _mapped(self, rows: Rows, table: Tensor) -> Tensor:
        return product(rows._replace(values=F.dropout(rows.values, self.word_dropout, self.training)), table)


class PackageClassifier(nn.Module):
    """Scores of the sections of packages.

    Args:
        inputs: what it is to read.
        settings: its size.
        classes: the number of sections.
    """

    def __init__(self, inputs: Inputs, settings: Settings, classes: int) -> None:
        super().__init__()
        width = settings.width
        self.features = WordFeatures(inputs, width, settings.dropout, settings.word_dropout)
        relations = [role_of(relation) for relation in inputs.links]
        in_features = dict.fromkeys(["package", *(source for source, _, _ in relations)], width)
        self.attention = HeterogeneousGraphAttention(
            width, settings.heads, in_features=in_features, relations=relations, residual=True
        )
        # Scores of 0: attention begins as a mean.
        nn.init.zeros_(self.attention.prior)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(settings.dropout)
        self.classify = nn.Linear(2 * width, classes)

    def forward(self, batch: Batch) -> Tensor:
        """Scores `(seeds, classes)`."""
        x = self.features(batch)
        own = x["package"][: len(batch.seeds)]
        attended = self.attend(x, batch)
        return self.classify(torch.cat([own, self.dropout(F.gelu(self.norm(attended)))], 1))

    def attend(self, x: dict[str, Tensor], batch: Batch) -> Tensor:
        """What the seeds, with features x of the batch's nodes, attend to: `(seeds, width)`."""
        return self.attention(self.roles(x, batch), batch.block).output["package"]

    @torch.no_grad()
    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Attention weights by the relation's name, `(edges,)` as in the batch's block, the mean of the heads."""
        x = self.roles(self.features(batch), batch)
        weights = self.attention(x, batch.block, return_weights=True).weights
        return {name: found for (_, name, _), found in weights.items()}

    def roles(self, x: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The seeds, and by relation those whom they attend to: the layer makes keys of what is read alone."""
        read = {relation[1]: x[relation[0]][nodes] for relation, nodes in batch.attended.items()}
        return {"package": x["package"][: len(batch.seeds)], **read}
