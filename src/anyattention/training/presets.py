"""The settings that suit each kind of data, each chosen on validation labels."""

from typing import Any, NamedTuple

import torch

from anyattention.training.data import NodeData

__all__ = ["Preset", "preset_for"]


class Preset(NamedTuple):
    """Defaults by the names of `NodeClassifierConfig` and of `FitSettings`."""

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


def preset_for(data: NodeData) -> Preset:
    """The defaults for the digits, for sparse features (text) and for dense ones."""
    if data.images is not None:
        return _DIGITS
    return _SPARSE if data.features.layout == torch.sparse_csr else _DENSE
