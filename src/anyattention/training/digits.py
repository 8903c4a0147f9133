"""The embedded data set: scikit-learn's handwritten digits, each linked to the digits that look most like it."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.geometry import principal_components
from anyattention.patterns import Graph
from anyattention.training.data import NodeData, Split
from anyattention.training.extras import import_demo

__all__ = ["load_digits"]

_COMPONENTS = 32
_NEIGHBOURS = 10
_LABELS_PER_CLASS = 10


def load_digits(seed: int = 0) -> NodeData:
    """1,797 handwritten digits of 8 x 8 pixels as a graph; nothing is downloaded.

    Each digit is linked to its 10 nearest neighbours in the space of the first principal components, in both
    directions, and to itself. Transductive: components and neighbours see all images; no label is used for them.

    Args:
        seed: draws which 10 training and 10 validation labels of each class are known. The other 1,597 are for
            the test.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    datasets = import_demo("sklearn.datasets", "the digits data set")
    digits = datasets.load_digits()
    pixels = torch.from_numpy(digits.data).double() / 16
    labels = torch.from_numpy(digits.target).long()
    components = principal_components(pixels, _COMPONENTS)
    # The first component's spread is the unit: all keep their relative importance.
    coordinates = components.coordinates / components.variances[0].sqrt()
    return NodeData(
        name="digits",
        features=coordinates.float(),
        graph=_nearest_neighbours(coordinates, _NEIGHBOURS),
        labels=labels,
        num_classes=10,
        splits=(_draw_split(labels, seed),),
        images=torch.from_numpy(digits.images).float() / 16,
    )


def _nearest_neighbours(points: Tensor, count: int) -> Graph:
    """Each point linked with its nearest others, in both directions, and with itself."""
    distances = torch.cdist(points, points)
    distances.fill_diagonal_(torch.inf)
    nearest = distances.topk(count, largest=False).indices
    adjacency = torch.zeros(distances.shape, dtype=torch.bool, device=distances.device).scatter_(1, nearest, True)
    adjacency |= adjacency.T.clone()
    adjacency.fill_diagonal_(True)
    return Graph.from_adjacency(adjacency)


def _draw_split(labels: Tensor, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    by_class = [order[labels[order] == label] for label in range(10)]
    first, second = _LABELS_PER_CLASS, 2 * _LABELS_PER_CLASS
    return Split(
        train=torch.cat([nodes[:first] for nodes in by_class]),
        validation=torch.cat([nodes[first:second] for nodes in by_class]),
        test=torch.cat([nodes[second:] for nodes in by_class]),
    )
