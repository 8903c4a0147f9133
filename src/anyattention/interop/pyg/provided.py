"""Our searches where PyTorch Geometric looks for those of pyg-lib."""

from __future__ import annotations

from functools import cache

import torch
import torch_geometric
import torch_geometric.typing as pyg_typing
from torch import Tensor

from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.interop.pyg.neighbour_pairs import define_search, nearest_pairs, radius_pairs

__all__ = ["provide_neighbours"]


def provide_neighbours() -> bool:
    """Has PyTorch Geometric's own models and functions find neighbours by this package's searches.

    PyTorch Geometric, from 2.8 on, calls the operators `torch.ops.pyg.radius` and `torch.ops.pyg.knn` of pyg-lib, and
    raises ImportError without it. This defines the two operators, with pyg-lib's arguments, and sets
    `torch_geometric.typing.WITH_RADIUS` and `WITH_KNN` to True. It holds for the whole process, and cannot be undone.

    From then on run: `torch_geometric.nn.radius`, `radius_graph`, `knn`, `knn_graph`, `knn_interpolate`; the
    transforms `RadiusGraph` and `KNNGraph`; `SchNet`, `ViSNet`, `DynamicEdgeConv`, `GravNetConv`, `XConv`. `DimeNet`
    and `GNNFF` need torch-sparse too. What needs `fps` or `nearest` still raises ImportError.

    The default of `max_num_neighbors` stays theirs, 32: ask for None to keep all.

    Returns:
        Whether the searches are ours. False where pyg-lib has its own: then nothing is changed.

    Raises:
        UnsupportedError: an earlier PyTorch Geometric, which calls torch_cluster.

    Cost: none but the searches', as for `radius` and `knn` of this package.

    Source: pyg-lib 0.6, the operators' arguments.

    Example:
        >>> provide_neighbours()
        True
        >>> torch_geometric.nn.knn_graph(torch.tensor([[0.0], [1.0], [5.0]]), k=1)
        tensor([[1, 0, 1],
                [0, 1, 2]])
    """
    if not (hasattr(pyg_typing, "WITH_RADIUS") and hasattr(pyg_typing, "WITH_KNN")):
        raise UnsupportedError(
            argument="torch_geometric",
            expected="version 2.8 or later",
            actual=torch_geometric.__version__,
            hint="give the edges of anyattention.interop.pyg.radius_graph to the model, where it takes some",
        )
    return _searches() is not None


@cache
def _searches() -> torch.library.Library | None:
    """The operators, which last as long as this library does; None where there are others."""
    if hasattr(torch.ops.pyg, "radius") or hasattr(torch.ops.pyg, "knn"):
        return None
    library = torch.library.Library("pyg", "FRAGMENT")
    define_search(
        library,
        "radius(Tensor x, Tensor y, Tensor? ptr_x=None, Tensor? ptr_y=None, float r=1.0, int? max_num_neighbors=32,"
        " int num_workers=1, bool ignore_same_index=False) -> Tensor",
        _radius,
    )
    define_search(
        library,
        "knn(Tensor x, Tensor y, Tensor? ptr_x=None, Tensor? ptr_y=None, int k=1, bool cosine=False,"
        " int num_workers=1) -> Tensor",
        _knn,
    )
    pyg_typing.WITH_RADIUS = pyg_typing.WITH_KNN = True
    return library


def _radius(
    x: Tensor,
    y: Tensor,
    ptr_x: Tensor | None = None,
    ptr_y: Tensor | None = None,
    r: float = 1.0,
    max_num_neighbors: int | None = 32,
    num_workers: int = 1,
    ignore_same_index: bool = False,
) -> Tensor:
    if not r >= 0:
        raise InvalidInputError(argument="r", expected="a number of at least 0", actual=r)
    if max_num_neighbors is not None and max_num_neighbors < 0:
        raise InvalidInputError(argument="max_num_neighbors", expected="at least 0", actual=max_num_neighbors)
    batch_x, batch_y = _examples("ptr_x", ptr_x, x), _examples("ptr_y", ptr_y, y)
    others = None if y is x and ptr_y is ptr_x else y
    return radius_pairs(x, others, r, batch_x, batch_y, max_num_neighbors, None, ignore_same_index)


def _knn(
    x: Tensor,
    y: Tensor,
    ptr_x: Tensor | None = None,
    ptr_y: Tensor | None = None,
    k: int = 1,
    cosine: bool = False,
    num_workers: int = 1,
) -> Tensor:
    if k < 1:
        raise InvalidInputError(argument="k", expected="an int of at least 1", actual=k)
    return nearest_pairs(x, y, k, _examples("ptr_x", ptr_x, x), _examples("ptr_y", ptr_y, y), cosine, None, False)


def _examples(argument: str, ptr: Tensor | None, points: Tensor) -> Tensor | None:
    """The example of each point, from where each example begins and the last ends."""
    if ptr is None:
        return None
    sizes = ptr.diff()
    if not len(ptr) or int(ptr[0]) != 0 or int(ptr[-1]) != len(points) or (sizes < 0).any():
        raise DimensionMismatchError(
            argument=argument, expected=f"offsets that rise from 0 to {len(points)}", actual=ptr.tolist()
        )
    return torch.repeat_interleave(sizes)
