"""Attention between points in space: distance scores of displacements, and sums over pairs and edges."""

from anyattention.ops.points.distance_terms import DistanceSettings, distance_terms

__all__ = ["DistanceSettings", "distance_terms"]
