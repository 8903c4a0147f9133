"""How strongly a query attends to a key: one file a score, with its check, scale, formula and operands."""

from anyattention.scores.additive import Additive
from anyattention.scores.base import EdgeProducts, FeatureProducts, Score
from anyattention.scores.dot import Dot
from anyattention.scores.dynamic import Dynamic
from anyattention.scores.features import EdgeFeatures

__all__ = ["SCORES", "Additive", "Dot", "Dynamic", "EdgeFeatures", "EdgeProducts", "FeatureProducts", "Score"]

# The scores that the kernels have, by the name of their policy in csrc/scores.h.
SCORES: dict[str, type[Score]] = {score.__name__: score for score in (Dot, Additive, Dynamic)}
