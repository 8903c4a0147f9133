"""One tensor for several arguments is as good as its twins: the same results, and the sum of their gradients."""

from itertools import combinations
from typing import Any

import pytest
import torch
from subjects import SUBJECTS, Subject
from torch import Tensor

from anyattention import Causal, Graph, Strided, TopK, Window, attend
from cases import make_call, random_graph

pytestmark = pytest.mark.usefixtures("native")


def gradients(subject: Subject, places: tuple[int, ...], is_shared: bool) -> list[Tensor]:
    """The results, and the gradients of all inputs: that of some places together, then those of the others."""
    given = subject.leaves()
    twins = [given[places[0]] if is_shared else given[places[0]].detach().clone().requires_grad_() for _ in places[1:]]
    for place, twin in zip(places[1:], twins, strict=True):
        given[place] = twin
    results = subject(*given)
    cotangents = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in results]
    leaves = [given[place] for place in places[: 1 if is_shared else None]]
    leaves += [x for place, x in enumerate(given) if place not in places]
    found = torch.autograd.grad(results, leaves, cotangents, allow_unused=True, materialize_grads=True)
    count = 1 if is_shared else len(places)
    return [*results, torch.stack(found[:count]).sum(0), *found[count:]]


# No two inputs of these have one shape; of attend `test_of_attend` has calls in which they have.
_ALL_DIFFER = {
    *("edge_dot", "edge_sum", "edge_softmax", "dense", "dense, torch", "dense, weights", "dense, sinks", "causal"),
    *(
        "graph",
        "graph, additive",
        "graph, dynamic",
        "graph, features",
        "graph, maximum",
        "graph, sinks",
        "graph, gates",
    ),
    *("window", "window, sinks", "top-k", "top-k, sinks", "top-k, bias", "MemoryAttention, cosine"),
}


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_of_every_operation_and_module(name: str) -> None:
    subject = SUBJECTS[name]()
    shapes = [x.shape for x in subject.inputs]
    alike = [places for places in combinations(subject.every, 2) if shapes[places[0]] == shapes[places[1]]]
    assert (not alike) == (name in _ALL_DIFFER)
    for places in alike:
        one, two = (gradients(subject, places, is_shared) for is_shared in (True, False))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


PATTERNS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "graph": (random_graph(31, 31, 203), ("dot", "additive", "dynamic")),
    "graph of few edges": (Graph.from_edge_index(torch.tensor([[0, 1, 1], [2, 0, 1]]), num_nodes=5), ("additive",)),
    "dense": (None, ("dot",)),
    "causal": (Causal(), ("dot",)),
    "window": (Window(2, 0), ("dot", "additive")),
    "strided": (Strided(2, 0) & Causal(), ("dot",)),
    "top-k": (TopK(3), ("dot",)),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared", ["key value", "query key", "query value", "query key value"])
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("width", [1, 3, 7, 8, 15, 16])
@pytest.mark.parametrize(("name", "score"), [(name, score) for name in PATTERNS for score in PATTERNS[name][1]])
def test_of_attend(name: str, score: str, width: int, heads: int, shared: str, dtype: torch.dtype) -> None:
    """In every dtype and width: some run on copies of some of the arguments."""
    pattern = PATTERNS[name][0]
    value_dim = 1 if score == "additive" else width
    batch = None if isinstance(pattern, Graph) else 2
    call = make_call(
        pattern, score, width=width, value_dim=value_dim, heads=heads, batch=batch, lengths=(17, 17), dtype=dtype
    )
    names = list(call.tensors)

    def of(tensors: Any) -> tuple[Tensor, ...]:
        given = call.arguments(**{name: tensors[name] for name in ("query", "key", "value")})
        if score == "dynamic":
            given["score"] = type(given["score"])(tensors["vector"], call.slope)
        return (attend(**given).output,)

    subject = Subject(of, {name: call[name].detach() for name in names})
    places = tuple(map(names.index, shared.split()))
    one, two = (gradients(subject, places, is_shared) for is_shared in (True, False))
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.05}[dtype]
    scale = max(float(x.detach().abs().max()) for x in two)
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * scale)
