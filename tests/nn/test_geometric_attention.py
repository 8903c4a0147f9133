"""DistanceAttention and EquivariantAttention: paths agree, padding, batches, the radius, zero distance, bad input."""

import math

import pytest
import torch

from anyattention import Graph
from anyattention.errors import (
    DimensionMismatchError,
    GraphStructureError,
    InvalidConfigError,
    InvalidInputError,
    InvalidMaskError,
    NumericalInstabilityError,
)
from anyattention.geometry import cutoff_envelope, gaussian_basis
from anyattention.nn import DistanceAttention, EquivariantAttention

_KINDS = [DistanceAttention, EquivariantAttention]
_SETTINGS = {"all pairs": {}, "radius": {"radius": 2.0}, "range": {"radial_range": 3.0, "radial_basis": "bessel"}}
_F64 = torch.float64


def _module(kind, dtype=_F64, **settings):
    module = kind(12, 3, dtype=dtype, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module.eval()


def _points(*shape, dtype=_F64, dim=3):
    return torch.randn(*shape, 12, dtype=dtype), torch.randn(*shape, dim, dtype=dtype)


def _call(module, x, positions, graph=None, **settings):
    """Every result but the weights."""
    if isinstance(module, EquivariantAttention):
        return module.equivariant_forward(x, positions, graph=graph, **settings)[:3]
    return (module(x, positions, graph, **settings).output,)


def _close(results, others, **settings):
    for one, other in zip(results, others, strict=True):
        torch.testing.assert_close(one, other, **settings)


def _complete(points):
    return torch.ones(points, points).nonzero().T.flip(0)


@pytest.mark.parametrize("settings", _SETTINGS)
def test_distance_attention_is_its_formula(settings):
    settings = _SETTINGS[settings] | {"scale": 0.7}
    if settings.get("radial_basis"):
        settings["radial_basis"] = "gaussian"
    module = _module(DistanceAttention, **settings)
    x, p = _points(7)
    output, weights = module(x, p, return_weights="heads")
    length = module.config.get_radial_range()
    d = (p - p[:, None]).norm(dim=-1).clamp(min=1e-6)
    score = 0.7 * module.key_projection(x).T[:, None]
    decay = torch.nn.functional.softplus(module.distance_decay)
    score = score - decay[:, None, None] * (d / (length or 1.0)) ** 2
    if length is not None:
        score = score + (gaussian_basis(d, length, 16) @ module.radial_weight.T).permute(2, 0, 1)
    if "radius" in settings:
        score = score + cutoff_envelope(d, 2.0).log()
    expected = score.softmax(-1)
    torch.testing.assert_close(weights, expected)
    value = module.value_projection(x).unflatten(-1, (3, 4))
    expected = module.output_projection(torch.einsum("hij,jhd->ihd", expected, value).flatten(1))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("settings", _SETTINGS)
def test_equivariant_attention_is_its_formula(settings):
    settings = _SETTINGS[settings]
    module = _module(EquivariantAttention, vector_channels=6, **{**settings, "radial_basis": "gaussian"})
    x, p = _points(7)
    v = 3 * torch.randn(7, 6, 3, dtype=_F64)
    result = module.equivariant_forward(x, p, v, return_weights="heads")
    length = module.config.get_radial_range() or 1.0

    def shorter(v):
        return v / (1 + v.square().sum(-1, keepdim=True) / length**2) ** 0.25

    def squares(v):
        return v.square().sum(-1) / length**2

    n = torch.cat([module.norm(x), squares(shorter(v))], -1)
    q, k, value = (
        f(n).unflatten(-1, (3, 4)) for f in (module.query_projection, module.key_projection, module.value_projection)
    )
    away = p - p[:, None]
    d = away.norm(dim=-1).clamp(min=1e-6)
    decay = torch.nn.functional.softplus(module.distance_decay)
    score = torch.einsum("ihd,jhd->hij", q, k) / 2 - decay[:, None, None] * (d / length) ** 2
    gate = torch.ones(3, 7, 7, dtype=_F64)
    if module.radial_weight is not None:
        radial = (gaussian_basis(d, length, 16) @ module.radial_weight.T).permute(2, 0, 1)
        score, gate = score + radial[:3], gate + radial[3:]
    if "radius" in settings:
        score = score + cutoff_envelope(d, 2.0).log()
    weights = score.softmax(-1)
    torch.testing.assert_close(result.weights, weights)
    g = weights * gate
    a = torch.einsum("hij,jhd->ihd", g, value).flatten(1)
    r = shorter(torch.einsum("hij,ijx->ihx", g, away))
    values = torch.einsum("cb,jbx->jcx", module.vector_value.weight, shorter(v)).unflatten(1, (3, 2))
    u = torch.einsum("hij,jhcx->ihcx", g, values).flatten(1, 2)
    mixed = torch.einsum("cb,ibx->icx", module.vector_mix.weight, u)
    mixed = mixed + torch.einsum("ch,ihx->icx", module.relative_mix.weight, r)
    vectors = v + (1 + module.vector_gate(n))[..., None] * mixed
    torch.testing.assert_close(result.vectors, vectors)
    short = shorter(vectors)
    torch.testing.assert_close(result.positions, p + (module.position_gate(n)[..., None] * short).sum(1))
    features = torch.cat([a, squares(r), squares(short)], -1)
    torch.testing.assert_close(result.output, x + module.output_projection(features))


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", _SETTINGS)
def test_all_pairs_a_graph_a_mask_and_a_batch_agree(kind, settings):
    module = _module(kind, **_SETTINGS[settings])
    x, p = _points(2, 7)
    whole = _call(module, x, p)
    _close(_call(module, x, p, _complete(7)), whole)
    _close([torch.stack(each) for each in zip(*[_call(module, x[n], p[n]) for n in range(2)], strict=True)], whole)
    one = Graph.from_edge_index(_complete(7), num_nodes=7)
    flat = _call(module, x.flatten(0, 1), p.flatten(0, 1), Graph.batch([one, one]))
    _close([each.unflatten(0, (2, 7)) for each in flat], whole)
    # A mask of all pairs is a graph of those that it shows.
    allowed = (torch.rand(7, 7) < 0.5) | torch.eye(7, dtype=torch.bool)
    masked = _call(module, x, p, mask=allowed)
    _close(_call(module, x, p, allowed.nonzero().T.flip(0)), masked)
    _close(_call(module, x, p, _complete(7), mask=allowed.flatten()), masked)
    _close(_call(module, x, p, mask=allowed.expand(2, 3, 7, 7)), masked)


def test_a_point_that_attends_to_nothing_comes_out_as_it_went_in():
    module, (x, p), vectors = _module(EquivariantAttention), _points(7), torch.randn(7, 3, 3, dtype=_F64)
    allowed = torch.ones(7, 7, dtype=torch.bool)
    allowed[3] = False
    masked = _call(module, x, p, vectors=vectors, mask=allowed)
    _close([each[3] for each in masked], [x[3], p[3], vectors[3]])
    _close(_call(module, x, p, allowed.nonzero().T.flip(0), vectors=vectors), masked)
    _close(_call(module, x, p, _complete(7), vectors=vectors, mask=allowed.flatten()), masked)


@pytest.mark.parametrize("kind", _KINDS)
def test_the_radius_is_a_graph_of_neighbours(kind):
    module = _module(kind, radius=1.5)
    x, p = _points(2, 17)
    output, weights = module.distance_attention(p, x, 1.5)
    whole = module(x, p, return_weights=True)
    torch.testing.assert_close(output, whole.output)
    torch.testing.assert_close(weights.to_dense(), whole.weights)
    assert weights.is_coalesced()
    assert int(weights.values().numel()) == int((torch.cdist(p, p) <= 1.5).sum()) < 2 * 17**2
    one = module.distance_attention(p[0], x[0], 1.5)
    torch.testing.assert_close(one.output, output[0])
    torch.testing.assert_close(one.weights.to_dense(), weights[0].to_dense())


@pytest.mark.parametrize("kind", _KINDS)
def test_pairs_beyond_the_radius_change_nothing(kind):
    module = _module(kind, radius=1.5)
    x, p = (each.requires_grad_() for each in _points(2, 9))
    mask = torch.rand(2, 3, 9, 9) < 0.7
    mask[0, :, 4] = False
    results = _call(module, x, p, mask=mask)
    of_edges = mask.flatten(2).transpose(1, 2)
    expected = _call(module, x, p, _complete(9), mask=of_edges)
    _close(results, expected)
    cotangents = [torch.randn_like(each) for each in results]
    leaves = [x, p, *module.parameters()]
    found, others = (torch.autograd.grad(each, leaves, cotangents, allow_unused=True) for each in (results, expected))
    _close([each for each in found if each is not None], [each for each in others if each is not None])
    weights = module(x, p, mask=mask, return_weights="heads").weights
    whole = module(x, p, graph=_complete(9), mask=of_edges, return_weights="heads").weights
    torch.testing.assert_close(weights, whole.transpose(1, 2).unflatten(2, (9, 9)))
    assert (weights[torch.cdist(p, p)[:, None].expand(-1, 3, -1, -1) >= 1.5] == 0).all()


@pytest.mark.parametrize("kind", _KINDS)
def test_geometric_forward_at_the_points_themselves_and_elsewhere(kind):
    module = _module(kind, radius=2.0)
    x, p = _points(7)
    q = torch.randn(5, 3, dtype=_F64)
    output, weights = module.geometric_forward(q, p, x)
    assert (output.shape, weights.shape) == ((5, 12), (5, 7))
    torch.testing.assert_close(weights == 0, torch.cdist(q, p) >= 2.0)
    if kind is DistanceAttention:
        torch.testing.assert_close(module.geometric_forward(p, p, x).output, module(x, p).output)
    batched = module.geometric_forward(q[None], p[None], x[None], return_weights="heads")
    torch.testing.assert_close(batched.output[0], output)
    torch.testing.assert_close(batched.weights[0].mean(0), weights)


@pytest.mark.parametrize("kind", _KINDS)
def test_the_output_and_its_derivatives_are_continuous_where_a_neighbour_leaves(kind):
    module = _module(kind, radius=2.0)
    x = torch.randn(2, 12, dtype=_F64)
    cotangent = torch.randn(2, 12, dtype=_F64)

    def jets(distance):
        away = torch.tensor(distance, dtype=_F64, requires_grad=True)
        zero = torch.zeros((), dtype=_F64)
        p = torch.stack([torch.zeros(3, dtype=_F64), torch.stack([away, zero, zero])])
        value = (module(x, p).output * cotangent).sum()
        if not value.requires_grad:
            return value, zero, zero
        (first,) = torch.autograd.grad(value, away, create_graph=True)
        return value, first, torch.autograd.grad(first, away)[0]

    # The third derivative jumps, so the second one changes by as much as the distance does.
    for step in (1e-3, 1e-4, 1e-5):
        inside, outside = jets(2.0 - step), jets(2.0 + step)
        for one, other in zip(inside, outside, strict=True):
            assert abs(one - other) < 2000 * step
    assert jets(2.0)[1] == jets(2.5)[1] == 0.0


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", _SETTINGS)
def test_padding_of_a_batch_does_not_leak(kind, settings):
    module = _module(kind, **_SETTINGS[settings])
    x, p = _points(2, 7)
    real = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    x[1, 4:], p[1, 4:] = torch.nan, torch.inf
    x.requires_grad_()
    p.requires_grad_()
    results = _call(module, x, p, mask=real[:, :, None] & real[:, None])
    _close([each[1, :4] for each in results], _call(module, x[1, :4], p[1, :4]))
    _close([each[0] for each in results], _call(module, x[0], p[0]))
    sum((each[real] * torch.randn_like(each[real])).sum() for each in results).backward()
    assert x.grad.isfinite().all()
    assert p.grad.isfinite().all()
    assert (p.grad[1, 4:] == 0).all()
    assert all(each.grad is None or each.grad.isfinite().all() for each in module.parameters())


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", _SETTINGS)
@pytest.mark.parametrize("hidden_by", ["no edge", "mask of edges", "mask of heads", "mask of a batch"])
def test_a_point_outside_a_graph_does_not_leak(kind, settings, hidden_by):
    module = _module(kind, **_SETTINGS[settings])
    x, p = _points(7)
    edges = torch.tensor([[0, 1, 2, 2, 4, 5, 0], [0, 0, 1, 2, 5, 4, 5]])
    mask = None
    if hidden_by != "no edge":
        edges = torch.cat([edges, torch.tensor([[6, 3, 6], [0, 6, 3]])], 1)
        mask = torch.arange(10) < 7
        if hidden_by != "mask of edges":
            mask = mask[:, None].expand(-1, 3)
        if hidden_by == "mask of a batch":
            x, p, mask = x[None], p[None], mask[None]
    real = torch.tensor([0, 1, 2, 4, 5])
    cotangents = [torch.randn(5, 12), torch.randn(5, 3), torch.randn(5, 3, 3)]

    def outcome(hidden):
        # Points 3 and 6 have nothing that any point attends to.
        one, other = (t.index_fill(-2, torch.tensor([3, 6]), hidden).requires_grad_() for t in (x, p))
        results = _call(module, one, other, edges, mask=mask)
        real_results = [(t[0] if x.ndim == 3 else t)[real] for t in results]
        loss = sum((t * c).sum() for t, c in zip(real_results, cotangents, strict=False))
        found = torch.autograd.grad(loss, [one, other, *module.parameters()], allow_unused=True)
        return real_results + [t for t in found if t is not None]

    expected = outcome(0.25)
    assert all(t.isfinite().all() for t in expected)
    for hidden in (torch.nan, torch.inf):
        _close(outcome(hidden), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", _SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, _F64], ids=str)
def test_points_at_one_place_have_finite_derivatives(kind, settings, dtype):
    module = _module(kind, dtype=dtype, **_SETTINGS[settings])
    for p in (torch.ones(5, 3), torch.tensor([[0.0, 0, 0], [0, 0, 0], [1e-25, 0, 0], [1e-4, 0, 0], [2, 0, 0]])):
        x, p = torch.randn(5, 12, dtype=dtype), p.to(dtype).requires_grad_()
        for graph in (None, _complete(5)):
            results = _call(module, x, p, graph)
            assert all(each.isfinite().all() for each in results)
            energy = sum((each * torch.randn_like(each)).sum() for each in results)
            (force,) = torch.autograd.grad(energy, p, create_graph=True)
            assert force.isfinite().all()
            found = torch.autograd.grad(force.square().sum(), [p, *module.parameters()], allow_unused=True)
            assert all(each is None or each.isfinite().all() for each in found)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", _SETTINGS)
@pytest.mark.parametrize("points", [0, 1])
def test_no_point_and_one_point(kind, settings, points):
    module = _module(kind, **_SETTINGS[settings])
    x, p = _points(points)
    p.requires_grad_()
    loops = torch.arange(points).expand(2, -1)
    results = _call(module, x, p)
    assert [each.shape[0] for each in results] == [points] * len(results)
    _close(_call(module, x, p, loops), results)
    module.distance_attention(p, x, 1.0).output.sum().backward()
    assert p.grad.isfinite().all()
    assert module.geometric_forward(p, p[:0], x[:0]).output.shape == (points, 12)
    # One point gets its own value.
    if points and kind is DistanceAttention:
        torch.testing.assert_close(results[0], module.output_projection(module.value_projection(x)))


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", _SETTINGS)
def test_a_graph_without_edges_has_no_forces_to_train_on(kind, settings):
    module = _module(kind, **_SETTINGS[settings])
    x, p = _points(4)
    p.requires_grad_()
    output = module(x, p, graph=torch.zeros(2, 0, dtype=torch.int64)).output
    (forces,) = torch.autograd.grad(output.sin().sum(), p, create_graph=True, allow_unused=True, materialize_grads=True)
    assert torch.equal(forces, torch.zeros_like(forces))
    if forces.requires_grad:
        forces.square().sum().backward()
        assert all(each.grad is None or not each.grad.any() for each in module.parameters())


@pytest.mark.parametrize("kind", _KINDS)
def test_far_from_the_origin_float32_keeps_its_accuracy(kind):
    for settings in _SETTINGS.values():
        module = _module(kind, dtype=torch.float32, **settings)
        x = torch.randn(9, 12)
        # Positions of few digits, so that moving them is exact.
        p = (8 * torch.randn(9, 3)).round() / 8
        for graph in (None, _complete(9)):
            here, there = _call(module, x, p, graph), _call(module, x, p + 1024.0, graph)
            torch.testing.assert_close(here[0], there[0], rtol=1e-5, atol=1e-5)
            if len(here) == 3:
                torch.testing.assert_close(here[1] + 1024.0, there[1], rtol=0, atol=2e-4)
                torch.testing.assert_close(here[2], there[2], rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
def test_thirty_two_layers_train_for_a_hundred_steps():
    torch.manual_seed(1)
    layers = torch.nn.ModuleList(EquivariantAttention(12, 3, dropout=0.0, radius=2.0) for _ in range(32))
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
    x, p = torch.randn(8, 12), torch.randn(8, 3)
    graph = Graph.from_edge_index(_complete(8), num_nodes=8)
    target = torch.randn(8, 3)
    losses = []
    for _ in range(100):
        h, places, vectors = x, p, None
        for layer in layers:
            h, places, vectors, _ = layer.equivariant_forward(h, places, vectors, graph)
        assert h.abs().max() < 1e4
        loss = (places - target).square().mean() + h.square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(each.grad is None or each.grad.isfinite().all() for each in layers.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(each) for each in losses)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", _KINDS)
def test_dropout_keeps_the_mean(kind):
    module = _module(kind, dropout=0.3, radius=3.0).train()
    x, p = _points(5)
    expected = module.eval()(x, p).output
    module.train()
    drawn = torch.stack([module(x, p).output for _ in range(2000)])
    assert drawn.std(0).max() > 0
    if kind is DistanceAttention:
        assert ((drawn.mean(0) - expected).abs() < 6 * drawn.std(0) / 2000**0.5 + 1e-9).all()


@pytest.mark.parametrize("kind", _KINDS)
def test_autocast_and_low_precision(kind):
    for settings in _SETTINGS.values():
        module = _module(kind, dtype=torch.float32, **settings)
        x, p = _points(2, 7, dtype=torch.float32)
        expected = _call(module, x, p)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = _call(module, x, p)
        _close([each.float() for each in results], expected, rtol=0.1, atol=0.1)
        low = _call(module.bfloat16(), x.bfloat16(), p.bfloat16())
        assert all(each.dtype == torch.bfloat16 and each.isfinite().all() for each in low)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.exhaustive), {"radius": 2.0}], ids=str)
def test_under_compile(kind, settings):
    torch._dynamo.reset()
    module, (x, p) = _module(kind, **settings), _points(7)
    graph = Graph.from_edge_index(_complete(7), num_nodes=7)
    for each in (None, graph):
        compiled = torch.compile(lambda x, p, each=each: _call(module, x, p, each), fullgraph=True, backend="eager")
        _close(compiled(x, p), _call(module, x, p, each))


def _bad(match, error, call):
    return pytest.param(match, error, call, id=match[:40])


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize(
    ("match", "error", "call"),
    [
        _bad(r"positions: expected \(points=7, geometric_dim=3\), got \(7, 2\)", DimensionMismatchError,
             lambda m, x, p: m(x, p[:, :2])),
        _bad(r"features: expected \(points=7, d_model=12\), got \(6, 12\)", DimensionMismatchError,
             lambda m, x, p: m(x[:6], p)),
        _bad("positions: expected finite coordinates, got 1 NaN or Inf among 21", InvalidInputError,
             lambda m, x, p: m(x, p.index_fill(0, torch.tensor([2]), 0.0).index_put(
                 (torch.tensor(1), torch.tensor(1)), torch.tensor(torch.nan, dtype=_F64)))),
        _bad("radius: expected a finite number above 0, got 0.0", InvalidInputError,
             lambda m, x, p: m.distance_attention(p, x, 0.0)),
        _bad("radius: expected a finite number above 0, got nan", InvalidInputError,
             lambda m, x, p: m.distance_attention(p, x, math.nan)),
        _bad("positions: expected a floating-point dtype", InvalidInputError, lambda m, x, p: m(x, p.long())),
        _bad("features: expected torch.float64, as the parameters", InvalidInputError,
             lambda m, x, p: m(x.float(), p)),
        _bad("positions: expected a torch.Tensor, got list", InvalidInputError, lambda m, x, p: m(x, p.tolist())),
        _bad("positions: expected a dense tensor", InvalidInputError, lambda m, x, p: m(x, p.to_sparse())),
        _bad("graph: expected 7 keys and 7 queries, the points, got 6 keys", DimensionMismatchError,
             lambda m, x, p: m(x, p, graph=Graph.from_edge_index(torch.zeros(2, 1).long(), num_nodes=6))),
        _bad(r"source \(key\): expected indices from 0 to 6", GraphStructureError,
             lambda m, x, p: m(x, p, graph=torch.full((2, 1), 7))),
        _bad("graph: expected a Graph or an edge_index, got list", InvalidInputError,
             lambda m, x, p: m(x, p, graph=[[0], [1]])),
        _bad("mask: expected a torch.bool tensor", InvalidMaskError, lambda m, x, p: m(x, p, mask=torch.ones(7, 7))),
        _bad("mask: expected a shape that broadcasts", InvalidMaskError,
             lambda m, x, p: m(x, p, mask=torch.ones(6, 7).bool())),
        _bad("return_weights: expected False, True", InvalidInputError, lambda m, x, p: m(x, p, return_weights="all")),
        _bad(r"query_pos: expected \(queries=7, geometric_dim=3\), got \(7, 2\)", DimensionMismatchError,
             lambda m, x, p: m.geometric_forward(p[:, :2], p, x)),
        _bad(r"features: expected \(keys=6, d_model=12\), got \(7, 12\)", DimensionMismatchError,
             lambda m, x, p: m.geometric_forward(p, p[:6], x)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"radius": 2.0}], ids=str)
def test_bad_input(kind, settings, match, error, call):
    with pytest.raises(error, match=match):
        call(_module(kind, **settings), *_points(7))


def test_bad_vectors():
    module, (x, p) = _module(EquivariantAttention), _points(7)
    with pytest.raises(
        DimensionMismatchError, match=r"vectors: expected \(points=7, vector_channels=3, geometric_dim=3"
    ):
        module.equivariant_forward(x, p, torch.zeros(7, 2, 3, dtype=_F64))
    with pytest.raises(InvalidInputError, match=r"vectors: expected torch.float64, as the parameters"):
        module.equivariant_forward(x, p, torch.zeros(7, 3, 3))


@pytest.mark.parametrize("kind", _KINDS)
def test_a_mask_of_edges_must_fit(kind):
    module, (x, p) = _module(kind), _points(7)
    for mask in (torch.ones(48).bool(), torch.ones(49, 2).bool(), torch.ones(2, 49, 3).bool()):
        with pytest.raises(InvalidMaskError, match="mask: expected"):
            module(x, p, graph=_complete(7), mask=mask)


@pytest.mark.parametrize("kind", _KINDS)
def test_overflow_shows_with_check_finite(kind):
    module, (x, p) = _module(kind, check_finite=True), _points(7)
    with pytest.raises(NumericalInstabilityError, match=f"{kind.__name__} output: expected finite numbers"):
        module(x * torch.inf, p)


def test_settings_of_the_other_module_are_refused():
    config = EquivariantAttention(12, 3, vector_channels=6).config
    with pytest.raises(InvalidConfigError, match="vector_channels: expected its default None here, got 6"):
        DistanceAttention.from_config(config)
    with pytest.raises(InvalidConfigError, match="config: expected GeometricAttentionConfig, got dict"):
        EquivariantAttention.from_config(config.to_dict())
