"""Second derivatives of attention over runs, by their kernel: against plain PyTorch in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from anyattention import Blocks, Causal, Full, Pattern, RelativeBias, Strided, Window, attend, explain
from anyattention.native import calls
from anyattention.ops.dropout import draw_seed, keep_factors
from anyattention.ops.runs import composed

pytestmark = pytest.mark.usefixtures("native")

KERNEL = "run_attention_double_backward"


@dataclass(frozen=True)
class Case:
    """A call, and the sizes of its inputs; pairs are hidden by the pattern and the mask."""

    pattern: Pattern | None = None
    lengths: tuple[int, int] = (7, 7)
    heads: tuple[int, int] = (2, 2)
    widths: tuple[int, int] = (3, 3)
    mask: bool = False
    bias: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    scale: float | None = None

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Query, key, value, and gradients by output and logsumexp."""
        (queries, keys), (heads, key_heads), (width, value_width) = self.lengths, self.heads, self.widths
        shapes = [(queries, heads, width), (keys, key_heads, width), (keys, key_heads, value_width)]
        shapes += [(queries, heads, value_width), (queries, heads)]
        return [torch.randn(2, *shape).to(dtype) for shape in shapes]

    def numbers_of_pairs(self) -> dict[str, Tensor]:
        """Mask and bias, the same in each call."""
        generator = torch.Generator().manual_seed(5)
        queries, keys = self.lengths
        found: dict[str, Tensor] = {}
        if self.mask:
            found["mask"] = torch.rand(2, self.heads[0], queries, keys, generator=generator) < 0.6
            found["mask"][:, :, queries // 2] = False
        if self.bias:
            found["bias"] = torch.randn(self.heads[0], queries, keys, generator=generator, dtype=torch.float64)[None]
        return found

    def ours(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output and logsumexp, 0 where a row is empty."""
        torch.manual_seed(11)
        pairs = self.numbers_of_pairs()
        if "bias" in pairs:
            pairs["bias"] = pairs["bias"].to(query.dtype)
        result = attend(
            query, key, value, self.pattern, softcap=self.softcap or None, dropout=self.dropout, scale=self.scale,
            return_logsumexp=True, implementation="cpu", **pairs,
        )  # fmt: skip
        assert result.logsumexp is not None
        return result.output, torch.where(result.logsumexp == -torch.inf, 0.0, result.logsumexp)

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same in plain PyTorch."""
        group = self.heads[0] // self.heads[1]
        key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
        scale = self.widths[0] ** -0.5 if self.scale is None else self.scale
        scores = scale * torch.einsum("bihd,bjhd->bhij", query, key)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        pairs, seen = self.numbers_of_pairs(), self.seen()
        if "bias" in pairs:
            scores = scores + pairs["bias"]
        scores = torch.where(seen, scores, -torch.inf)
        is_empty = ~seen.any(-1)
        logsumexp = torch.where(is_empty[..., None], 0.0, scores).logsumexp(-1)
        weights = torch.where(seen, torch.exp(torch.where(seen, scores, 0.0) - logsumexp[..., None]), 0.0)
        output = torch.einsum("bhij,bjhc->bihc", weights * self.kept().to(query.dtype), value)
        return output, torch.where(is_empty, 0.0, logsumexp).transpose(1, 2)

    def seen(self) -> Tensor:
        shape = (2, self.heads[0], *self.lengths)
        seen = (self.pattern or Full()).to_dense(*self.lengths).expand(shape)
        return seen & self.numbers_of_pairs().get("mask", torch.ones(()).bool())

    def kept(self) -> Tensor:
        """The factors of dropout: of all pairs where attention is dense, else of the pattern's."""
        shape = (2, self.heads[0], *self.lengths)
        if not self.dropout:
            return torch.ones(shape, dtype=torch.float64)
        torch.manual_seed(11)
        seed = draw_seed(torch.device("cpu"))
        if self.pattern is None or isinstance(self.pattern, Causal):
            return keep_factors(shape, self.dropout, seed, torch.float64)
        pairs = self.pattern.to_dense(*self.lengths)
        factors = keep_factors((2, int(pairs.sum()), self.heads[0]), self.dropout, seed, torch.float64)
        kept = torch.zeros(shape, dtype=torch.float64)
        kept[:, :, pairs] = factors.transpose(1, 2)
        return kept


CASES = {
    "full": Case(),
    "one query": Case(lengths=(1, 9)),
    "one key": Case(lengths=(9, 1)),
    "many tiles": Case(lengths=(150, 1100), heads=(1, 1)),
    "causal": Case(Causal("bottom_right"), (5, 9)),
    "causal with empty rows": Case(Causal("bottom_right"), (9, 5)),
    "window": Case(Window(20, 3), (150, 150)),
    "strides in several parts": Case(Strided(4, 1) & Causal(), (150, 150), heads=(1, 1)),
    "blocks": Case(Blocks(torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool(), 20), (50, 50)),
    "a mask with empty rows": Case(mask=True),
    "a mask over a window": Case(Window(20, 3), (70, 70), mask=True),
    "a constant bias": Case(bias=True, scale=0.8),
    "softcap": Case(softcap=0.9, scale=2.0),
    "softcap, bias and mask": Case(Causal(), softcap=0.9, scale=2.0, bias=True, mask=True),
    "dropout": Case(Causal(), (70, 70), dropout=0.4),
    "dropout over a window": Case(Window(9, 3), (70, 70), dropout=0.4, mask=True),
    "grouped heads": Case(Causal(), heads=(6, 2)),
    "wide values": Case(widths=(3, 18), heads=(4, 2)),
    "wide keys": Case(Window(5, 5), (30, 30), widths=(40, 1), softcap=1.5),
}


def small(case: Case) -> Case:
    """The same of a few positions."""
    if max(case.lengths) < 10:
        return case
    pattern = replace(case.pattern, size=2) if isinstance(case.pattern, Blocks) else case.pattern
    return replace(case, pattern=pattern, lengths=(5, 5))


each_case = pytest.mark.parametrize("name", CASES)

Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def second_of(
    function: Function, inputs: Sequence[Tensor], by: Sequence[Tensor | None], *, logsumexp: bool = True
) -> list[Tensor | None]:
    """The gradients of those by query, key and value times `by`: by these, and by the gradients they came of."""
    own = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    results = function(own[0], own[1], own[2])
    used = 2 if logsumexp else 1
    first = torch.autograd.grad(results[:used], own[:3], own[3 : 3 + used], create_graph=True)
    pairs = [(x, each) for x, each in zip(first, by, strict=True) if each is not None]
    return list(torch.autograd.grad([x for x, _ in pairs], own, [each for _, each in pairs], allow_unused=True))


def directions(inputs: Sequence[Tensor], which: str = "qkv") -> list[Tensor | None]:
    return [torch.randn_like(x) if name in which else None for name, x in zip("qkv", inputs[:3], strict=True)]


def assert_agree(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if other is None:
            assert one is None or not one.any()
            continue
        assert one is not None
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * max(scale, 1e-3))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that ran, in order; no graph of all pairs is made."""
    names: list[str] = []
    run = calls.run

    def recorded(function: str, *arguments: Any) -> None:
        names.append(function)
        run(function, *arguments)

    def refused(*_: Any) -> None:
        raise AssertionError("a graph of all pairs")

    monkeypatch.setattr(calls, "run", recorded)
    monkeypatch.setattr(composed, "graph_of_parts", refused)
    return names


@each_case
@pytest.mark.parametrize("which", ["qkv", "q", "k", "v", "qv"])
def test_equal_plain_pytorch(name: str, which: str, ran: list[str]) -> None:
    case = CASES[name]
    inputs = case.inputs()
    by = directions(inputs, which)
    assert_agree(second_of(case.ours, inputs, by), second_of(case.plain, inputs, by), 1e-11)
    assert KERNEL in ran
    assert ("run_attention_double_backward_sums" in ran) == ("several parts" in name)


def test_without_logsumexp_and_of_it_alone() -> None:
    case = CASES["causal"]
    inputs = case.inputs()
    by = directions(inputs)
    ours, theirs = (second_of(each, inputs, by, logsumexp=False) for each in (case.ours, case.plain))
    assert ours[4] is theirs[4] is None
    assert_agree(ours, theirs, 1e-12)

    def of_logsumexp(function: Function) -> list[Tensor | None]:
        own = [x.detach().clone().requires_grad_() for x in inputs]
        logsumexp = function(own[0], own[1], own[2])[1]
        first = torch.autograd.grad(logsumexp, own[:2], own[4], create_graph=True)
        return list(torch.autograd.grad(first, [*own[:2], own[4]], [x for x in by[:2] if x is not None]))

    assert_agree(of_logsumexp(case.ours), of_logsumexp(case.plain), 1e-12)


@each_case
def test_finite_differences(name: str) -> None:
    case = small(CASES[name])
    inputs = [x[:1].requires_grad_() for x in case.inputs()[:3]]
    # A mask or dropout for two entries of a batch.
    whole = [x.detach()[1:] for x in case.inputs()[:3]]

    def function(*own: Tensor) -> tuple[Tensor, Tensor]:
        output, logsumexp = case.ours(*(torch.cat(pair) for pair in zip(own, whole, strict=True)))
        return output[:1], logsumexp[:1]

    assert gradgradcheck(function, inputs, fast_mode=True)


@each_case
def test_a_third_derivative(name: str) -> None:
    case = small(CASES[name])
    inputs, by = case.inputs(), directions(case.inputs())
    third = [torch.randn_like(x) for x in inputs]

    def third_of(function: Function) -> list[Tensor | None]:
        own = [x.detach().clone().requires_grad_() for x in inputs]
        given = [x.detach().clone().requires_grad_() for x in by if x is not None]
        first = torch.autograd.grad(function(own[0], own[1], own[2]), own[:3], own[3:], create_graph=True)
        second = torch.autograd.grad(first, own, given, create_graph=True)
        return list(torch.autograd.grad(second, [*own, *given], third))

    assert_agree(third_of(case.ours), third_of(case.plain), 1e-11)


@pytest.mark.parametrize("name", ["full", "causal", "window", "many tiles", "strides in several parts", "dropout"])
def test_are_as_right_in_float32_as_plain_pytorch(name: str) -> None:
    case = replace(CASES[name], widths=(32, 32))
    inputs = case.inputs(torch.float32)
    by = directions(inputs)

    def of(function: Function, dtype: torch.dtype) -> list[Tensor | None]:
        return second_of(function, [x.to(dtype) for x in inputs], [None if x is None else x.to(dtype) for x in by])

    exact = of(case.plain, torch.float64)
    for one, other, truth in zip(of(case.ours, torch.float32), of(case.plain, torch.float32), exact, strict=True):
        assert one is not None
        assert other is not None
        assert truth is not None
        step = 2.0**-20 * truth.abs().max()
        assert (one - truth).abs().max() <= 2 * (other - truth).abs().max() + step


@pytest.mark.parametrize("name", ["full", "window", "strides in several parts"])
def test_do_not_depend_on_a_constant_in_all_scores(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    by = directions(inputs)

    def shifted(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        result = attend(query, key, value, case.pattern, bias=torch.full((1, 1), -1e6), implementation="cpu")
        return result.output, result.output.sum(-1)

    ours, exact = (
        second_of(each, inputs, by, logsumexp=False)[:4] for each in (shifted, lambda *own: (case.ours(*own)[0],))
    )
    assert_agree(ours, exact, 0.2)


@pytest.mark.parametrize("name", ["window", "a mask over a window", "strides in several parts", "many tiles"])
@pytest.mark.parametrize("planted", ["query", "key", "value", "output", "logsumexp", "q", "k", "v"])
def test_nan_shows_where_it_is_used_and_nowhere_else(name: str, planted: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    tensors = dict(zip(("query", "key", "value", "output", "logsumexp"), inputs, strict=True))
    tensors |= {each: torch.randn_like(x) for each, x in zip("qkv", inputs[:3], strict=True)}
    place = (1, 40 if tensors[planted].shape[1] > 40 else 0, 0, 1)[: tensors[planted].ndim]

    def at(number: float, function: Function) -> list[Tensor]:
        given = {each: x.clone() for each, x in tensors.items()}
        given[planted][place] = number
        found = second_of(function, list(given.values())[:5], [given[each] for each in "qkv"])
        return [x for x in found if x is not None]

    one, other = at(0.5, case.plain), at(1.5, case.plain)
    # Rounding differs too where nothing else does.
    used = [(x - y).abs() > 1e-13 * max(float(x.abs().max()), 1.0) for x, y in zip(one, other, strict=True)]
    assert any(each.any() for each in used)
    for with_nan, without, is_used in zip(at(torch.nan, case.ours), at(0.5, case.ours), used, strict=True):
        assert with_nan[is_used].isnan().all()
        # What is used but changes by less than the threshold may be NaN; what has another key or query may not.
        assert with_nan[~reached(is_used)].isfinite().all()
        torch.testing.assert_close(with_nan[with_nan.isfinite()], without[with_nan.isfinite()], rtol=0, atol=0)


def reached(is_used: Tensor) -> Tensor:
    """Whole rows, of a position and a head."""
    return is_used if is_used.ndim == 3 else is_used.any(-1, keepdim=True).expand(is_used.shape)


@pytest.mark.parametrize("name", ["many tiles", "strides in several parts", "grouped heads", "dropout over a window"])
def test_the_same_bits_on_any_number_of_threads(name: str, threads: Callable[[int], None]) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    by = directions(inputs)
    threads(1)
    expected = second_of(case.ours, inputs, by)
    for count in (2, 3, 2):
        threads(count)
        for one, other in zip(second_of(case.ours, inputs, by), expected, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_in_half_precision(dtype: torch.dtype, ran: list[str]) -> None:
    case = CASES["window"]
    inputs = case.inputs(dtype)
    inputs[3:] = [x.float() for x in inputs[3:]]
    by = directions(inputs)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, logsumexp = case.ours(query, key, value)
        assert output.dtype is dtype
        return output.float(), logsumexp

    found = second_of(ours, inputs, by)
    assert [x.dtype for x in found if x is not None] == [dtype] * 3 + [torch.float32] * 2
    wide = [None if x is None else x.double() for x in by]
    exact = second_of(case.plain, [x.double() for x in inputs], wide)
    assert_agree(found, exact, 8 * torch.finfo(dtype).eps)
    assert KERNEL in ran


def test_views_are_read_where_they_lie(ran: list[str]) -> None:
    case = CASES["grouped heads"]
    inputs = case.inputs()
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]]
    assert not any(x.is_contiguous() for x in views)
    # A sum's gradient is one number, expanded.
    by: list[Tensor | None] = [torch.ones((), dtype=torch.float64).expand(x.shape) for x in inputs[:3]]
    assert_agree(second_of(case.ours, [*views, inputs[4]], by), second_of(case.plain, inputs, by), 1e-12)
    assert KERNEL in ran


def test_a_gradient_penalty_trains_parameters(ran: list[str]) -> None:
    case = CASES["causal"]
    inputs = case.inputs()

    def penalty(function: Function) -> list[Tensor]:
        own = [x.clone().requires_grad_() for x in inputs[:3]]
        output = function(own[0], own[1], own[2])[0]
        (by_query,) = torch.autograd.grad(output, own[0], inputs[3], create_graph=True)
        # Twice, and the loss itself afterwards: nothing of the first derivative is used up.
        by_query.square().sum().backward(retain_graph=True)
        output.square().sum().backward()
        return [x.grad for x in own if x.grad is not None]

    assert_agree(penalty(case.ours), penalty(case.plain), 1e-12)
    assert ran.count(KERNEL) == 1


def test_an_empty_sequence() -> None:
    for queries, keys in ((3, 0), (0, 3), (0, 0)):
        case = Case(Window(1, 1, "top_left"), (queries, keys))
        inputs = case.inputs()
        for found, x in zip(second_of(case.ours, inputs, directions(inputs)), inputs, strict=True):
            assert found is None or (found.shape == x.shape and not found.any())


def test_many_gradients_at_once(ran: list[str]) -> None:
    case = CASES["full"]
    inputs = case.inputs()
    many = [torch.randn(4, *x.shape, dtype=torch.float64) for x in inputs[:3]]
    own = [x.requires_grad_() for x in inputs]
    first = torch.autograd.grad(case.ours(own[0], own[1], own[2]), own[:3], own[3:], create_graph=True)
    found = torch.autograd.grad(first, own, many, is_grads_batched=True)
    for n in range(4):
        assert_agree([x[n] for x in found], second_of(case.plain, inputs, [x[n] for x in many]), 1e-12)
    assert ran.count(KERNEL) == 1


BIASES = {
    "of all pairs": (2, 3, 70, 70),
    "of heads": (1, 3, 70, 70),
    "of pairs": (70, 70),
    "of queries": (1, 3, 70, 1),
    "of keys": (2, 1, 1, 70),
    "one number": (1, 1, 1, 1),
}


@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("pattern", [None, Window(20, 3), Strided(4, 1) & Causal()], ids=str)
@pytest.mark.parametrize("which", ["qkvb", "b", "q"])
def test_a_bias_that_is_learned(shape: str, pattern: Pattern | None, which: str, ran: list[str]) -> None:
    case = Case(pattern, (70, 70), heads=(3, 3), softcap=1.5)
    bias = torch.randn(BIASES[shape], dtype=torch.float64)
    bias[..., 0] = torch.where(torch.rand(bias[..., 0].shape) < 0.3, -torch.inf, bias[..., 0])
    bias = torch.zeros_like(bias) if shape == "one number" else bias
    inputs = [*case.inputs()[:4], bias]
    by = [torch.randn_like(x) for x, name in zip((*inputs[:3], bias), "qkvb", strict=True) if name in which]

    def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", query, key) / 3**0.5
        scores = 1.5 * torch.tanh(scores / 1.5)
        seen = case.seen() & (bias > -torch.inf)
        scores = torch.where(seen, scores + torch.where(bias == -torch.inf, 0.0, bias), -torch.inf)
        weights = torch.where(seen.any(-1, keepdim=True), scores, 0.0).softmax(-1)
        return torch.einsum("bhij,bjhc->bihc", torch.where(seen, weights, 0.0), value)

    def ours(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attend(query, key, value, pattern, bias=bias, softcap=1.5, implementation="cpu").output

    def second(function: Callable[..., Tensor]) -> list[Tensor | None]:
        own = [x.clone().requires_grad_() for x in inputs]
        first = torch.autograd.grad(function(*own[:3], own[4]), [*own[:3], own[4]], own[3], create_graph=True)
        asked = [x for x, name in zip(first, "qkvb", strict=True) if name in which]
        return list(torch.autograd.grad(asked, own, by))

    assert_agree(second(ours), second(plain), 1e-11)
    assert KERNEL in ran


def test_a_bias_by_distance_that_is_learned(ran: list[str]) -> None:
    inputs = [torch.randn(2, 70, 2, 3, dtype=torch.float64) for _ in range(4)]
    for numbers in (torch.randn(2, 6, dtype=torch.float64), torch.randn(1, 200, dtype=torch.float64)):
        by = [torch.randn_like(x) for x in (*inputs[:3], numbers)]

        def second(implementation: str, numbers: Tensor = numbers, by: list[Tensor] = by) -> list[Tensor | None]:
            own = [x.clone().requires_grad_() for x in (*inputs[:3], numbers)]
            bias = RelativeBias(own[3], -3)
            output = attend(own[0], own[1], own[2], Window(30, 2), bias=bias, implementation=implementation).output
            first = torch.autograd.grad(output, own, inputs[3], create_graph=True)
            return list(torch.autograd.grad(first, own, by))

        assert_agree(second("cpu"), second("reference"), 1e-12)
    assert KERNEL in ran


@pytest.mark.parametrize("length", ["2000", "6000"])
def test_memory_is_linear_in_the_length(peak_of_a_penalty: Callable[..., float], length: str) -> None:
    # One number for each pair would be 60 and 190.
    assert peak_of_a_penalty(length) < 45


def backwards(case: Case, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The second derivatives of leaves."""
    first = torch.autograd.grad(case.ours(*inputs[:3]), inputs[:3], inputs[3:5], create_graph=True)
    return torch.autograd.grad(first, inputs[:5], inputs[5:])


@pytest.mark.parametrize("name", ["full", "causal", "softcap", "grouped heads", "strides in several parts"])
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_two_backwards_are_traced(name: str, mode: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    own = [x.requires_grad_() for x in inputs]
    by = [torch.randn_like(x) for x in inputs[:3]]
    traced = make_fx(lambda *x: backwards(case, *x), tracing_mode=mode)(*own, *by)
    assert f"anyattention.{KERNEL}" in traced.code
    # Other numbers, so that nothing was taken for a constant.
    other = [x.requires_grad_() for x in case.inputs()]
    others = [torch.randn_like(x) for x in by]
    assert_agree(list(traced(*other, *others)), second_of(case.plain, other, others), 1e-10)


@pytest.mark.parametrize("name", ["full", "window", "strides in several parts"])
def test_fake_tensors_have_the_shapes(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x).requires_grad_() for x in inputs]
        found = backwards(case, *fakes, *[torch.randn_like(x) for x in fakes[:3]])
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in inputs]


@pytest.mark.parametrize("name", ["causal", "window"])
def test_forward_derivatives_of_gradients_are_not_lost(name: str) -> None:
    case = small(CASES[name])
    own = [x.requires_grad_() for x in case.inputs()]

    def tangents(function: Function) -> list[Tensor | None]:
        results = function(own[0], own[1], own[2])
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, torch.ones_like(x)) for x in own[3:]]
            found = torch.autograd.grad(results, own[:3], dual)
            return [forward_ad.unpack_dual(x).tangent for x in found]

    assert_agree(tangents(case.ours), tangents(case.plain), 1e-12)


def test_explain_says_that_kernels_run() -> None:
    query = torch.randn(1, 9, 2, 3, requires_grad=True)
    assert explain(query, query, query).implementation == "cpu"
