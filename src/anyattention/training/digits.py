"""The embedded data set: scikit-learn's handwritten digits, each linked to digits that look like it from afar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ambient import lasting
from anyattention.geometry import principal_components
from anyattention.patterns import Graph
from anyattention.training.data import NodeData, Split
from anyattention.training.extras import import_demo

__all__ = ["load_digits"]

_COMPONENTS = 32
_NEIGHBOURS = 20
_LABELS_PER_CLASS = 10


def load_digits(seed: int = 0) -> NodeData:
    """1,797 handwritten digits of 8 x 8 pixels as a graph; nothing is downloaded.

    Each digit is linked to itself and to the 20 digits that look most like it when the images are shrunk to 2 x 2
    pixels. About half of them show the same number, so that it matters whom a digit attends to. The feature of an edge
    is how different the two whole images are: the sum of the squared differences of their pixels, which are in [0, 1].
    A digit's own features are the first 32 principal components. Transductive: components and neighbours see all
    images; no label is used for them.

    Args:
        seed: draws which 10 training and 10 validation labels of each class are known. The other 1,597 are for
            the test.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    with lasting():
        return _load(seed)


def _load(seed: int) -> NodeData:
    datasets = import_demo("sklearn.datasets", "the digits data set")
    digits = datasets.load_digits()
    pixels = torch.from_numpy(digits.data).double() / 16
    labels = torch.from_numpy(digits.target).long()
    images = pixels.reshape(-1, 8, 8)
    shrunk = F.avg_pool2d(images[:, None], 4).flatten(1)
    graph = _nearest_neighbours(shrunk, _NEIGHBOURS)
    differences = (pixels[graph.query_index] - pixels[graph.key_index]).square().sum(1, keepdim=True)
    components = principal_components(pixels, _COMPONENTS)
    # The first component's spread is the unit: all keep their relative importance.
    coordinates = components.coordinates / components.variances[0].sqrt()
    return NodeData(
        name="digits",
        features=coordinates.float(),
        graph=graph,
        labels=labels,
        num_classes=10,
        splits=(_draw_split(labels, seed),),
        images=images.float(),
        edge_features=differences.float(),
    )


def _nearest_neighbours(points: Tensor, count: int) -> Graph:
    """Each point attends to its nearest others and to itself."""
    distances = torch.cdist(points, points)
    distances.fill_diagonal_(-1)
    nearest = distances.topk(count + 1, largest=False).indices
    adjacency = torch.zeros(distances.shape, dtype=torch.bool, device=distances.device)
    return Graph.from_adjacency(adjacency.scatter_(1, nearest, True))


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
