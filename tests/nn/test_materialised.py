"""A module built without memory and given it later is the one that is built with memory."""

import importlib
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyattention.interop
import anyattention.nn
from anyattention import AttentionOutput, Graph
from anyattention.nn import (
    DistanceAttention,
    EquivariantAttention,
    GraphAttention,
    GraphTransformerLayer,
    HeterogeneousGraphAttention,
    MemoryAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
    SparseAttention,
)

EDGE_INDEX = torch.tensor([[0, 0, 1, 2, 2, 5, 0, 3], [1, 2, 2, 2, 3, 1, 1, 5]])
GRAPH = Graph.from_edge_index(EDGE_INDEX, num_nodes=6)
Build = Callable[..., nn.Module]


def graph_layer(score: str, **settings: Any) -> Build:
    return lambda **kind: GraphAttention(6, 2, score=score, edge_dim=3, residual=True, **settings, **kind)


class OfTypes(HeterogeneousGraphAttention):
    """One of two types, called with their features and those of edges one after the other."""

    def __init__(self, score: Any, **kind: Any) -> None:
        relations = [("a", "to", "a"), ("b", "to", "a")]
        sizes = {"in_features": {"a": 6, "b": 4}, "relations": relations, "edge_dim": {relations[0]: 3}}
        super().__init__(6, 2, score=score, softmax_over="relation", **sizes, **kind)

    def forward(self, a: Tensor, b: Tensor, edge_attr: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        first, second = self.config.relations
        edges = {first: EDGE_INDEX, second: EDGE_INDEX % torch.tensor([[3], [6]])}
        return AttentionOutput(super().forward({"a": a, "b": b}, edges, {first: edge_attr}).output["a"])


def typed_layer(score: str) -> Build:
    return lambda **kind: OfTypes(score, **kind)


def with_positions(module: Any, positions: str, **settings: Any) -> Build:
    return lambda **kind: module(6, 2, positions=positions, max_seq_len=9, qk_norm=True, **settings, **kind)


# How each module is built, and the shapes of the numbers that it takes.
MODULES: dict[str, tuple[Build, tuple[Any, ...]]] = {
    "scaled dot product": (lambda **kind: ScaledDotProductAttention(6, 2), ((2, 5, 6),)),
    **{
        f"{module.__name__}, {positions}": (with_positions(module, positions), ((2, 5, 6),))
        for module in (MultiHeadAttention, SparseAttention)
        for positions in ("none", "sinusoidal", "learned")
    },
    **{score: (graph_layer(score), ((6, 6), GRAPH, (8, 3))) for score in ("additive", "dynamic", "dot")},
    **{
        f"transformer layer, {attention}": (
            lambda attention=attention, **kind: GraphTransformerLayer(6, 2, attention=attention, **kind),
            ((6, 6), GRAPH),
        )
        for attention in ("graph", "all", "graph + all")
    },
    "distance": (lambda **kind: DistanceAttention(6, 2, radius=2.0, **kind), ((5, 6), (5, 3))),
    **{
        f"several types, {score}": (typed_layer(score), ((6, 6), (3, 4), (8, 3)))
        for score in ("additive", "dynamic", "dot")
    },
    "memory": (
        lambda **kind: MemoryAttention(6, 2, value_dim=3, k=2, trainable=True, num_memories=5, **kind),
        ((2, 5, 6),),
    ),
    "equivariant": (lambda **kind: EquivariantAttention(6, 2, radius=2.0, **kind), ((5, 6), (5, 3))),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def output_of(module: nn.Module, shapes: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    arguments = [torch.randn(x, generator=generator).to(dtype) if isinstance(x, tuple) else x for x in shapes]
    return module.eval()(*arguments).output


def reset(module: nn.Module) -> None:
    """`reset_parameters` of all submodules, those inside before those around them."""
    module.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)  # pyright: ignore[reportCallIssue]


def materialised(build: Build, dtype: torch.dtype, how: str) -> tuple[nn.Module, nn.Module]:
    """A module that was built on "meta" and got its memory in some way, and the one that it should equal."""
    torch.manual_seed(7)
    direct = build(dtype=dtype)
    with torch.device("meta"):
        module = build(dtype=dtype)
    assert all(x.is_meta for x in (*module.parameters(), *module.buffers()))
    torch.manual_seed(7)
    if how == "reset":
        reset(module.to_empty(device="cpu"))
    elif how == "reset of the module alone":
        module.to_empty(device="cpu")
        for part in (module, direct):
            torch.manual_seed(8)
            getattr(part, "reset_parameters", lambda: None)()
    elif how == "set by hand, then reset":
        for part in module.modules():
            for numbers in (part._parameters, part._buffers):
                for name, x in numbers.items():
                    empty = None if x is None else torch.empty_like(x, device="cpu")
                    numbers[name] = nn.Parameter(empty) if isinstance(x, nn.Parameter) else empty
        reset(module)
    elif how == "assigned":
        module.load_state_dict(direct.state_dict(), assign=True)
    elif how == "assigned inside a model":
        model = nn.Sequential(module)
        model.load_state_dict(nn.Sequential(direct).state_dict(), assign=True)
    elif how == "loaded":
        module.to_empty(device="cpu").load_state_dict(direct.state_dict())
    else:
        module.to_empty(device="cpu")
        module.set_parameters(direct.get_parameters())  # pyright: ignore[reportCallIssue]
    return module, direct


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        "reset",
        "reset of the module alone",
        "set by hand, then reset",
        "assigned",
        "assigned inside a model",
        "loaded",
        "a vector of parameters",
    ],
)
@pytest.mark.parametrize("name", MODULES)
def test_a_module_built_on_meta_equals_one_built_directly(name: str, how: str, dtype: torch.dtype) -> None:
    build, shapes = MODULES[name]
    module, direct = materialised(build, dtype, how)
    buffers = zip(module.named_buffers(), direct.named_buffers(), strict=True)
    for (ours, actual), (theirs, expected) in buffers:
        assert (ours, actual.dtype) == (theirs, expected.dtype)
        assert torch.equal(actual, expected)
    assert torch.equal(output_of(module, shapes, dtype), output_of(direct, shapes, dtype))


@pytest.mark.parametrize("name", MODULES)
def test_weights_of_another_dtype_bring_it_along(name: str) -> None:
    build, shapes = MODULES[name]
    direct = build(dtype=torch.float64)
    with torch.device("meta"):
        module = build(dtype=torch.bfloat16)
    module.load_state_dict(direct.state_dict(), assign=True)
    assert torch.equal(output_of(module, shapes, torch.float64), output_of(direct, shapes, torch.float64))


@pytest.mark.parametrize("name", MODULES)
def test_a_device_that_is_named_counts_more_than_the_one_around(name: str) -> None:
    build, shapes = MODULES[name]
    torch.manual_seed(7)
    direct = build(dtype=torch.float32)
    torch.manual_seed(7)
    with torch.device("meta"):
        module = build(dtype=torch.float32, device="cpu")
        reset(module.to_empty(device="cpu"))
    module.load_state_dict(direct.state_dict())
    assert torch.equal(output_of(module, shapes, torch.float32), output_of(direct, shapes, torch.float32))


def test_positions_have_the_digits_of_their_dtype() -> None:
    built = MultiHeadAttention(6, 2, positions="sinusoidal", max_seq_len=9, dtype=torch.float64)
    position, rate = torch.arange(9.0, dtype=torch.float64), 1e4 ** (-torch.arange(0, 6, 2) / 6.0)
    angle = position[:, None] * rate.double()
    expected = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    torch.testing.assert_close(built.position_table, expected, rtol=1e-6, atol=1e-6)
    for dtype in DTYPES:
        moved = MultiHeadAttention(6, 2, positions="sinusoidal", max_seq_len=9, dtype=dtype)
        assert torch.equal(moved.double().position_table, built.position_table)


def test_positions_are_copied_pickled_and_shared() -> None:
    module = MultiHeadAttention(6, 2, positions="sinusoidal", max_seq_len=9)
    for copy in (module.clone(), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copy.position_table, module.position_table)
    table = module.position_table
    assert module.share_memory().position_table is table
    assert table.is_shared()


def modules_of(*packages: Any) -> list[type[nn.Module]]:
    """The classes of modules that packages of ours define."""
    homes = [
        importlib.import_module(f"{package.__name__}.{each.name}")
        for package in packages
        for each in pkgutil.iter_modules(package.__path__)
    ]
    found = {kind for home in homes for kind in vars(home).values() if isinstance(kind, type)}
    return sorted(
        (kind for kind in found if issubclass(kind, nn.Module) and kind.__module__.startswith("anyattention")),
        key=lambda kind: kind.__qualname__,
    )


def test_every_module_with_numbers_of_its_own_can_draw_them_anew() -> None:
    for build, _ in MODULES.values():
        for part in build().modules():
            if part._parameters or part._buffers:
                assert callable(getattr(part, "reset_parameters", None)), type(part).__name__


def test_every_module_is_among_those_above() -> None:
    tested = {type(build()) for build, _ in MODULES.values()} | {HeterogeneousGraphAttention}
    assert OfTypes in tested
    missing = {kind for kind in modules_of(anyattention.nn, anyattention.interop) if kind not in tested}
    abstract = {"AttentionModule", "PointAttention", "ProjectedAttention", "StoredMemories"}
    others = {
        "AlwaysHooked",
        "LayerNorm",
        "MultiheadAttention",
        "GATConv",
        "GATv2Conv",
        "HANConv",
        "HGTConv",
        "TransformerConv",
    }
    assert {kind.__name__ for kind in missing} == abstract | others
