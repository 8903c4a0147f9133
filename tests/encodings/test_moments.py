"""Encodings are made once and kept: the same, and plain tensors, whatever they are computed under."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anyattention import ExpanderGraph, Graph, encodings

pytestmark = pytest.mark.usefixtures("native")

EDGE_INDEX = torch.randint(11, (2, 40), generator=torch.Generator().manual_seed(0))
GRAPH = Graph.from_edge_index(EDGE_INDEX, num_nodes=11)

MADE: dict[str, Callable[[], Tensor]] = {
    "walks": lambda: encodings.random_walk_probabilities(GRAPH, 3),
    "walks of graphs": lambda: encodings.random_walk_probabilities(Graph.batch([GRAPH, GRAPH]), 3, sizes=[11, 11]),
    "eigenvectors": lambda: encodings.laplacian_eigenvectors(GRAPH, 3).vectors,
    "degrees": lambda: encodings.degrees(GRAPH),
    "distances": lambda: encodings.hop_distances(GRAPH, 3),
    "order": lambda: GRAPH.reorder("rcm")[1],
    "reordered": lambda: GRAPH.reorder("degree")[0].keys_by_query,
    "expander": lambda: (
        ExpanderGraph.from_graph(GRAPH, 2, generator=torch.Generator().manual_seed(1)).graph.keys_by_query
    ),
    "sample": lambda: GRAPH.sample(torch.tensor([3, 1]), [2, 2], generator=torch.Generator().manual_seed(1)).nodes,
}


def under_inference_mode(make: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return make()


def under(transform: Callable[..., object]) -> Callable[[Callable[[], Tensor]], Tensor]:
    def run(make: Callable[[], Tensor]) -> Tensor:
        made: list[Tensor] = []

        def call(x: Tensor) -> Tensor:
            made.append(make())
            return x.square().sum()

        transform(call)
        return made[0]

    return run


X = torch.ones(3, 2)
MOMENTS = {
    "inference mode": under_inference_mode,
    "grad": under(lambda call: torch.func.grad(call)(X)),
    "vmap": under(lambda call: torch.func.vmap(call)(X)),
    "jvp": under(lambda call: torch.func.jvp(call, (X,), (X,))),
    "vmap of grad": under(lambda call: torch.func.vmap(torch.func.grad(call))(X)),
    "hessian": under(lambda call: torch.func.hessian(call)(X)),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", MADE)
def test_the_same_at_every_moment(name: str, moment: str) -> None:
    found, expected = MOMENTS[moment](MADE[name]), MADE[name]()
    assert torch.equal(found, expected)
    assert not found.is_inference()
    # What is kept is used in training: as an index, or in a product.
    weight = torch.ones(40 if not found.is_floating_point() else found.shape[-1], requires_grad=True)
    (found @ weight if found.is_floating_point() else weight[found]).sum().backward()
    assert weight.grad is not None
