"""What attention between points adds to its scores for a distance."""

from anyattention.ops.distance.terms import DistanceSettings, distance_terms

__all__ = ["DistanceSettings", "distance_terms"]
