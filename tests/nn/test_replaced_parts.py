"""A projection with a hook, a patch or a parametrisation, or something else in its place, is called as a module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize

from anyattention import Graph, TopK
from anyattention.nn import (
    DistanceAttention,
    EquivariantAttention,
    GraphAttention,
    GraphTransformerLayer,
    MultiHeadAttention,
    SparseAttention,
)

EDGE_INDEX = torch.tensor([[0, 0, 1, 2, 2, 5, 0, 3], [1, 2, 2, 2, 3, 1, 1, 5]])
GRAPH = Graph.from_edge_index(EDGE_INDEX, num_nodes=6)
BETWEEN = Graph.from_edge_index(torch.tensor([[0, 1, 2, 5], [0, 1, 1, 3]]), num_keys=6, num_queries=4)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def graph_layer(score: str, **settings: Any) -> GraphAttention:
    return GraphAttention(6, 2, score=score, residual=True, dropout=0.0, dtype=torch.float64, **settings)


# Each is a module and the arguments of its call; features are as wide as the heads, so that Identity fits.
MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "multi-head": lambda: (
        MultiHeadAttention(6, 2, positions="sinusoidal", qk_norm=True, dropout=0.0, dtype=torch.float64),
        (rows(2, 5, 6), rows(2, 4, 6), rows(2, 4, 6)),
    ),
    "multi-head, top k": lambda: (
        MultiHeadAttention(6, 2, pattern=TopK(3), dropout=0.0, dtype=torch.float64),
        (rows(2, 5, 6),),
    ),
    "sparse": lambda: (SparseAttention(6, 2, local_window=1, dropout=0.0, dtype=torch.float64), (rows(2, 5, 6),)),
    "additive": lambda: (graph_layer("additive", edge_dim=3), (rows(6, 6), GRAPH, rows(8, 3))),
    "additive, one projection for both sides": lambda: (
        graph_layer("additive"),
        ((rows(6, 6), rows(4, 6)), BETWEEN),
    ),
    "additive, a projection for each side": lambda: (
        graph_layer("additive", in_features=(6, 6)),
        ((rows(2, 6, 6), rows(2, 4, 6)), BETWEEN),
    ),
    "additive, sparse features": lambda: (graph_layer("additive"), (rows(6, 6).relu().to_sparse_csr(), GRAPH)),
    "dynamic": lambda: (graph_layer("dynamic", edge_dim=3), (rows(6, 6), GRAPH, rows(8, 3))),
    "dynamic, sparse features": lambda: (graph_layer("dynamic"), (rows(6, 6).relu().to_sparse_csr(), GRAPH)),
    "dot": lambda: (graph_layer("dot", edge_dim=3, concat=True), (rows(6, 6), GRAPH, rows(8, 3))),
    "dot, two sides": lambda: (graph_layer("dot", in_features=(6, 6)), ((rows(6, 6), rows(4, 6)), BETWEEN)),
    "transformer layer": lambda: (
        GraphTransformerLayer(
            6, 2, attention="graph + all", edge_dim=3, hidden_features=6, dropout=0.0, dtype=torch.float64
        ).eval(),
        (rows(6, 6), GRAPH, rows(8, 3)),
    ),
    "distance": lambda: (
        DistanceAttention(6, 2, radius=2.0, dropout=0.0, dtype=torch.float64),
        (rows(5, 6), rows(5, 3)),
    ),
    "equivariant": lambda: (
        EquivariantAttention(6, 2, radius=2.0, vector_channels=6, dropout=0.0, dtype=torch.float64),
        (rows(5, 6), rows(5, 3), rows(5, 6, 3)),
    ),
    "equivariant, over a graph with a lone point": lambda: (
        EquivariantAttention(6, 2, vector_channels=6, dropout=0.0, dtype=torch.float64),
        (rows(6, 6), rows(6, 3), rows(6, 6, 3), GRAPH),
    ),
}


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class Adapted(nn.Module):
    """A frozen projection and a product of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, width = base.requires_grad_(False), base.weight
        self.down = nn.Parameter(torch.randn(2, width.shape[1], dtype=width.dtype))
        self.up = nn.Parameter(torch.randn(width.shape[0], 2, dtype=width.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Twice(nn.Module):
    """A parametrisation that counts its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return 2.0 * weight


def double(linear: nn.Linear) -> None:
    """What most of the changes below do, written into the numbers of a bare projection."""
    with torch.no_grad():
        linear.weight *= 2.0
        if linear.bias is not None:
            linear.bias *= 2.0


def double_weight(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight *= 2.0


def patch(linear: nn.Linear) -> None:
    plain = linear.forward
    linear.forward = lambda x: 2.0 * plain(x)  # pyright: ignore[reportAttributeAccessIssue]


def retype(linear: nn.Linear) -> None:
    linear.__class__ = Doubling


CHANGES: dict[str, tuple[Callable[[nn.Linear], object], Callable[[nn.Linear], None]]] = {
    "forward hook": (lambda linear: linear.register_forward_hook(lambda _, __, output: 2.0 * output), double),
    "forward pre-hook": (lambda linear: linear.register_forward_pre_hook(lambda _, x: (2.0 * x[0],)), double_weight),
    "patched forward": (patch, double),
    "subclass": (retype, double),
    "parametrisation": (
        lambda linear: parametrize.register_parametrization(linear, "weight", Twice(), unsafe=True),
        double_weight,
    ),
    "weight norm": (parametrizations.weight_norm, lambda linear: None),
}


def pair(module: str) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """A module, its copy, and arguments."""
    layer, arguments = MODULES[module]()
    twin, _ = MODULES[module]()
    twin.load_state_dict(layer.state_dict())
    return layer, twin, arguments


def projections(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_children() if isinstance(part, nn.Linear)]


def output_and_gradient(module: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Of the first argument where it is dense."""
    first = arguments[0]
    if not isinstance(first, Tensor) or first.layout != torch.strided:
        return [module(*arguments).output]
    first = first.detach().requires_grad_()
    output = module(first, *arguments[1:]).output
    cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad(output, first, cotangent)]


def assert_same(layer: nn.Module, twin: nn.Module, arguments: tuple[Any, ...]) -> None:
    expected = output_and_gradient(twin, arguments)
    torch.testing.assert_close(output_and_gradient(layer, arguments), expected, rtol=1e-9, atol=1e-9)


pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_projection_counts(module: str, change: str) -> None:
    touch, write = CHANGES[change]
    for name in projections(MODULES[module]()[0]):
        layer, twin, arguments = pair(module)
        touch(layer.get_submodule(name))  # pyright: ignore[reportArgumentType]
        write(twin.get_submodule(name))  # pyright: ignore[reportArgumentType]
        assert_same(layer, twin, arguments)


@pytest.mark.parametrize("module", MODULES)
def test_an_adapter_counts(module: str) -> None:
    for name in projections(MODULES[module]()[0]):
        layer, twin, arguments = pair(module)
        adapted = Adapted(layer.get_submodule(name))  # pyright: ignore[reportArgumentType]
        setattr(layer, name, adapted)
        with torch.no_grad():
            twin.get_parameter(f"{name}.weight").add_(adapted.up @ adapted.down)
        assert_same(layer, twin, arguments)


@pytest.mark.parametrize("module", MODULES)
def test_identity_in_a_projections_place(module: str) -> None:
    for name in projections(MODULES[module]()[0]):
        layer, twin, arguments = pair(module)
        linear = twin.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear.in_features != linear.out_features:
            continue
        if "sparse features" in module:
            arguments = (arguments[0].to_dense(), *arguments[1:])
        with torch.no_grad():
            linear.weight.copy_(torch.eye(linear.in_features))
            if linear.bias is not None:
                linear.bias.zero_()
        setattr(layer, name, nn.Identity())
        assert_same(layer, twin, arguments)


@pytest.mark.parametrize("module", MODULES)
def test_a_projection_with_a_bias_where_there_was_none_and_without_where_there_was(module: str) -> None:
    for name in projections(MODULES[module]()[0]):
        layer, twin, arguments = pair(module)
        old = layer.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is None, dtype=torch.float64)
        setattr(layer, name, new)
        setattr(twin, name, nn.Sequential(new))
        assert_same(layer, twin, arguments)


@contextmanager
def counting(register: Callable[[Callable[..., None]], Any]) -> Iterator[list[nn.Module]]:
    """The modules whose calls a hook sees."""
    seen: list[nn.Module] = []
    handle = register(lambda module, *_: seen.append(module))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
@pytest.mark.parametrize("module", MODULES)
def test_hooks_of_all_modules_see_every_part_once(module: str, register: Callable[..., Any]) -> None:
    layer, arguments = MODULES[module]()
    with counting(register) as seen:
        layer(*arguments)
    names = {part: name for name, part in layer.named_modules()}
    assert sorted(names[part] for part in seen) == sorted(names.values())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
@pytest.mark.parametrize("module", MODULES)
def test_backward_hooks_see_every_projection_once(module: str) -> None:
    layer, arguments = MODULES[module]()
    seen: list[str] = []
    for name in projections(layer):
        layer.get_submodule(name).register_full_backward_hook(lambda _, __, ___, name=name: seen.append(name))
    output = layer(*arguments).output
    output.backward(rows(*output.shape))
    # The gate of positions is no part of the features.
    assert sorted(seen) == sorted(set(projections(layer)) - {"position_gate"})


@pytest.mark.parametrize("module", MODULES)
def test_a_parametrised_weight_is_evaluated_once_a_forward(module: str) -> None:
    layer, arguments = MODULES[module]()
    counts: dict[str, Twice] = {}
    for name, part in list(layer.named_modules()):
        for parameter, _ in list(part.named_parameters(recurse=False)):
            counts[f"{name}.{parameter}"] = Twice()
            parametrize.register_parametrization(part, parameter, counts[f"{name}.{parameter}"], unsafe=True)
    before = {name: each.count for name, each in counts.items()}
    layer(*arguments)
    assert {name: each.count - before[name] for name, each in counts.items()} == dict.fromkeys(counts, 1)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("module", [name for name in MODULES if "sparse features" not in name])
def test_quantised_projections_run(module: str) -> None:
    layer, arguments = MODULES[module]()
    layer = layer.float()
    arguments = tuple(
        tuple(each.float() for each in x) if isinstance(x, tuple) else x.float() if isinstance(x, Tensor) else x
        for x in arguments
    )
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    assert not any(type(part) is nn.Linear for part in quantised.modules())
    expected = layer(*arguments).output
    error = (quantised(*arguments).output - expected).abs().max() / expected.abs().max()
    assert 0 < error < (0.5 if "top k" in module else 0.1)  # a rounded score may choose another key


@pytest.mark.parametrize("module", MODULES)
def test_new_weights_leave_replaced_projections_alone(module: str) -> None:
    for name in projections(MODULES[module]()[0]):
        layer, _ = MODULES[module]()
        setattr(layer, name, nn.Identity())
        layer.reset_parameters()  # pyright: ignore[reportCallIssue]


def test_a_pair_of_one_tensor_has_a_projection_for_each_side() -> None:
    layer, x = graph_layer("additive", in_features=(6, 6)), rows(6, 6)
    torch.testing.assert_close(layer((x, x), GRAPH), layer((x, x.clone()), GRAPH))


def test_every_projection_of_a_bare_layer_is_read_and_not_called() -> None:
    """The short cut that the tests above are about is there."""
    for module in ("additive", "dynamic", "dot"):
        layer, arguments = MODULES[module]()
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(F, "linear", None)
            layer(*arguments)
