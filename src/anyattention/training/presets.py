"""The settings that suit each kind of data, each chosen on validation labels."""

from typing import Any, NamedTuple

import torch

from anyattention.training.data import AnyData, HeterogeneousNodeData, NodeData
from anyattention.training.features import FeatureKind, Look, look_at, look_at_sparse

__all__ = ["Preset", "look_of", "preset_for", "told_choice"]

_NAMES: dict[FeatureKind, str] = {
    "words": "GAT with much dropout, for words",
    "numbers": "attention by dot products with residual connections, for numbers",
    "structure": "GAT with much dropout, for the structure of the graph",
}


class Preset(NamedTuple):
    """Defaults by the names of the classifier's config and of `FitSettings`."""

    model: dict[str, Any]
    fit: dict[str, Any]


_DIGITS = Preset(
    {"score": "dot", "hidden": 64, "heads": 4, "dropout": 0.1, "attention_dropout": 0.0, "residual": True},
    {"epochs": 150, "learning_rate": 0.01, "weight_decay": 0.02, "patience": 40},
)

# Velickovic et al., 2018, section 3.3, for citation graphs with words as features.
_SPARSE = Preset(
    {"score": "additive", "hidden": 64, "heads": 8, "output_heads": 1, "dropout": 0.6},
    {"epochs": 1000, "learning_rate": 0.005, "weight_decay": 5e-4, "patience": 100},
)

_DENSE = Preset(
    {
        "score": "dot",
        "hidden": 16,
        "heads": 4,
        "output_heads": 4,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "residual": True,
        "layer_norm": True,
    },
    {"epochs": 120, "learning_rate": 0.05, "weight_decay": 0.0, "patience": 40},
)

_HETEROGENEOUS = Preset(
    {"score": "dot", "hidden": 64, "heads": 4, "dropout": 0.3},
    {"epochs": 200, "learning_rate": 0.005, "weight_decay": 1e-4, "patience": 30},
)

# Structure alone has as many columns as words have, of which each says little.
_PRESETS: dict[FeatureKind, Preset] = {"words": _SPARSE, "numbers": _DENSE, "structure": _SPARSE}


def preset_for(data: AnyData) -> Preset:
    """The defaults for several types, for the digits, and for what features are: words, numbers, or the structure."""
    if isinstance(data, HeterogeneousNodeData):
        return _HETEROGENEOUS
    if data.images is not None:
        return _DIGITS
    return _PRESETS[look_of(data).kind]


def look_of(data: NodeData) -> Look:
    """What the features of the data are, and why."""
    if data.look is not None:
        return data.look
    if data.features.layout == torch.sparse_csr:
        return look_at_sparse(data.features)
    return look_at(data.features.numpy())


def told_choice(data: AnyData) -> str:
    """Which network the data's preset is, and why, in a sentence."""
    if isinstance(data, HeterogeneousNodeData):
        return "Network: attention over relations (HGT), since there are several types of nodes or edges."
    if data.images is not None:
        return "Network: the one for the digits."
    look = look_of(data)
    return f"Network: {_NAMES[look.kind]}, since {look.reason}."
