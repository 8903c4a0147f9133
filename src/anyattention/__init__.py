"""Attention over anything: sequences, graphs, point clouds, sparse patterns and large memories."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__: str = version("anyattention")
