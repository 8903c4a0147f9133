"""Training for the commands: node classification."""

from anyattention.training.data import HeterogeneousNodeData, Metric, NodeData, Split
from anyattention.training.digits import load_digits
from anyattention.training.fitting import Epoch, Fit, FitSettings, attention_within_classes, fit, predict_logits
from anyattention.training.graphml import load_graphml
from anyattention.training.heterogeneous_model import HeterogeneousNodeClassifier, HeterogeneousNodeClassifierConfig
from anyattention.training.heterogeneous_tables import load_heterogeneous_tables
from anyattention.training.model import NodeClassifier, NodeClassifierConfig
from anyattention.training.npz import load_npz
from anyattention.training.pictures import draw_attention
from anyattention.training.presets import preset_for
from anyattention.training.reading import Reading, ReadOptions
from anyattention.training.saved_data import save_data
from anyattention.training.saved_sources import load_saved
from anyattention.training.scoring import accuracy, metric_value, roc_auc
from anyattention.training.tables import load_tables

__all__ = [
    "Epoch",
    "Fit",
    "FitSettings",
    "HeterogeneousNodeClassifier",
    "HeterogeneousNodeClassifierConfig",
    "HeterogeneousNodeData",
    "Metric",
    "NodeClassifier",
    "NodeClassifierConfig",
    "NodeData",
    "ReadOptions",
    "Reading",
    "Split",
    "accuracy",
    "attention_within_classes",
    "draw_attention",
    "fit",
    "load_digits",
    "load_graphml",
    "load_heterogeneous_tables",
    "load_npz",
    "load_saved",
    "load_tables",
    "metric_value",
    "predict_logits",
    "preset_for",
    "roc_auc",
    "save_data",
]
