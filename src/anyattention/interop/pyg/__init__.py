"""PyTorch Geometric's attention layers on this package's kernels: change one import, keep the weights.

Each class is PyTorch Geometric's own with another `forward`. What that forward cannot run, the parent's does;
`layer.explain_forward(...)` says which, and why.
"""

from anyattention.errors import MissingExtraError

try:
    import torch_geometric.nn  # noqa: F401
except ModuleNotFoundError as missing:
    # What torch_geometric itself lacks is not ours to explain away.
    if missing.name is None or missing.name.split(".")[0] != "torch_geometric":
        raise
    raise MissingExtraError(
        "anyattention.interop.pyg needs torch_geometric",
        argument="torch_geometric",
        hint="Install it with: pip install 'anyattention[pyg]'",
    ) from missing

from anyattention.interop.pyg.gat import GATConv
from anyattention.interop.pyg.gatv2 import GATv2Conv
from anyattention.interop.pyg.han import HANConv
from anyattention.interop.pyg.hgt import HGTConv
from anyattention.interop.pyg.neighbour_sampler import NeighborSampler
from anyattention.interop.pyg.neighbours import knn, knn_graph, radius, radius_graph
from anyattention.interop.pyg.provided import provide_neighbours
from anyattention.interop.pyg.transformer import TransformerConv

__all__ = [
    "GATConv",
    "GATv2Conv",
    "HANConv",
    "HGTConv",
    "NeighborSampler",
    "TransformerConv",
    "knn",
    "knn_graph",
    "provide_neighbours",
    "radius",
    "radius_graph",
]
