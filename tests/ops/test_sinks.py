"""Attention sinks: a softmax over the scores and one more column, whose weight is dropped."""

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from anyattention import (
    AttentionResult,
    Causal,
    Full,
    Graph,
    Pattern,
    Strided,
    TopK,
    Window,
    attend,
    explain,
    merge,
)
from anyattention.errors import InvalidInputError, UnsupportedError

pytestmark = pytest.mark.usefixtures("native")

BATCH, LENGTH, HEADS, WIDTH, VALUE_DIM = 2, 6, 4, 3, 5
_EVERY_PAIR = torch.stack([torch.arange(LENGTH).repeat(LENGTH), torch.arange(LENGTH).repeat_interleave(LENGTH)])
# Pattern and implementation; a selection of all keys is all pairs.
WAYS: dict[str, tuple[Any, str]] = {
    "dense": (Full(), "cpu"),
    "dense reference": (Full(), "reference"),
    "dense torch": (Full(), "torch"),
    "causal": (Causal(), "cpu"),
    "causal torch": (Causal(), "torch"),
    "window": (Window(2, 1), "cpu"),
    "window edges": (Window(2, 1), "graph"),
    "window reference": (Window(2, 1), "reference"),
    "strided": (Strided(2, 1), "cpu"),
    "graph": (Graph.from_edge_index(_EVERY_PAIR, num_nodes=LENGTH), "cpu"),
    "graph reference": (Graph.from_edge_index(_EVERY_PAIR, num_nodes=LENGTH), "reference"),
    "top-k": (TopK(LENGTH), "reference"),
}
every_way = pytest.mark.parametrize("way", WAYS)


def rows(dtype: torch.dtype = torch.float64, *, needs_grad: bool = True) -> list[Tensor]:
    """Query, key, value and sinks."""
    shapes = (BATCH, LENGTH, HEADS, WIDTH), (BATCH, LENGTH, 2, WIDTH), (BATCH, LENGTH, 2, VALUE_DIM), (HEADS,)
    return [torch.randn(shape, dtype=dtype).requires_grad_(needs_grad) for shape in shapes]


def allowed_of(pattern: Any) -> Tensor:
    """The pairs, `(L, S)`."""
    if not isinstance(pattern, Pattern) or isinstance(pattern, Graph):
        return torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return pattern.to_dense(LENGTH, LENGTH)


def by_column(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, allowed: Tensor) -> tuple[Tensor, ...]:
    """Output, weights `(B, H, L, S)` and logsumexp, by a softmax over the scores and a column of sinks."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, 2) for x in (key, value))
    scores = torch.einsum("blhd,bshd->bhls", query, key) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~allowed, -math.inf)
    logits = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = logits.softmax(-1)[..., :-1]
    return torch.einsum("bhls,bshe->blhe", weights, value), weights, logits.logsumexp(-1).transpose(1, 2)


def attended(way: str, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    """Output, weights `(B, H, L, S)` and logsumexp; PyTorch's fused attention has no weights."""
    pattern, implementation = WAYS[way]
    asks = False if implementation == "torch" else "heads"
    found = attend(
        query, key, value, pattern, sinks=sinks, implementation=implementation,
        return_weights=asks, return_logsumexp=True, **settings,
    )  # fmt: skip
    assert found.normalizer is None
    assert found.logsumexp is not None
    if found.weights is None:
        return found.output, found.logsumexp
    return found.output, _of_all_pairs(pattern, found), found.logsumexp


def _of_all_pairs(pattern: Any, found: AttentionResult) -> Tensor:
    weights = found.weights
    assert weights is not None
    if isinstance(pattern, TopK):
        assert found.indices is not None
        return torch.zeros_like(weights).scatter(-1, found.indices.clamp(min=0), weights).transpose(1, 2)
    if isinstance(pattern, Full | Causal):
        return weights
    graph = pattern if isinstance(pattern, Graph) else pattern.to_graph(LENGTH, LENGTH)
    dense = weights.new_zeros(BATCH, LENGTH, LENGTH, HEADS)
    return dense.index_put((torch.arange(BATCH)[:, None], graph.query_index, graph.key_index), weights).permute(
        0, 3, 1, 2
    )


def compared(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 1e-11) -> None:
    wanted = wanted if len(found) == 3 else (wanted[0], wanted[2])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=tolerance, atol=tolerance)


@every_way
def test_results_and_gradients_are_those_of_one_more_column(way: str) -> None:
    inputs = rows()
    allowed = allowed_of(WAYS[way][0])
    found, wanted = attended(way, *inputs), by_column(*inputs, allowed)
    compared(found, wanted)
    wanted = wanted if len(found) == 3 else (wanted[0], wanted[2])
    cotangents = [torch.randn_like(x) for x in wanted]
    gradients = [torch.autograd.grad(each, inputs, cotangents) for each in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@every_way
def test_gradcheck_and_gradgradcheck(way: str) -> None:
    inputs = [x[:, :, :2] if x.ndim == 4 else x[:2] for x in rows(needs_grad=False)]
    inputs = [x[:1].clone().requires_grad_() if x.ndim == 4 else x.clone().requires_grad_() for x in inputs]
    pattern, implementation = WAYS[way]

    def of(*given: Tensor) -> tuple[Tensor, ...]:
        asks = False if implementation == "torch" else "mean"
        found = attend(
            *given[:3], pattern, sinks=given[3], implementation=implementation, return_weights=asks,
            return_logsumexp=True,
        )  # fmt: skip
        return tuple([x for x in (found.output, found.weights, found.logsumexp) if x is not None])

    assert gradcheck(of, inputs)
    assert gradgradcheck(of, inputs)


@pytest.fixture(scope="module")
def gpt_oss(require: Any) -> ModuleType:
    return require("transformers.models.gpt_oss.modeling_gpt_oss")


@pytest.mark.parametrize("window", [None, 3])
def test_gpt_oss(gpt_oss: ModuleType, window: int | None) -> None:
    """Hugging Face's own formula, in its full layers and those of a sliding window."""
    query, key, value, sinks = rows()
    pattern = Causal() if window is None else Window(window - 1, 0)
    blocked = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~allowed_of(pattern), -math.inf)
    layer = SimpleNamespace(sinks=sinks, num_key_value_groups=2, training=False)
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    theirs = gpt_oss.eager_attention_forward(layer, *heads_first, blocked, scaling=0.3)[0]
    ours = attend(query, key, value, pattern, sinks=sinks, scale=0.3).output
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(theirs)
    leaves = [query, key, value, sinks]
    gradients = [torch.autograd.grad(each, leaves, cotangent) for each in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@every_way
def test_a_row_without_keys_has_the_sink_as_its_logsumexp(way: str) -> None:
    query, key, value, sinks = rows()
    pattern = WAYS[way][0]
    if isinstance(pattern, Graph):
        mask = pattern.query_index != 2
    else:
        mask = torch.ones(LENGTH, 1, dtype=torch.bool)
        mask[2] = False
    output, *weights, logsumexp = attended(way, query, key, value, sinks, mask=mask)
    assert (output[:, 2] == 0).all()
    assert torch.equal(logsumexp[:, 2], sinks.expand(BATCH, HEADS))
    outputs, sums = torch.zeros_like(output), torch.zeros_like(logsumexp)
    outputs[:, 2], sums[:, 2] = torch.nan, 1.0
    by = [outputs, *[torch.zeros_like(x) for x in weights], sums]
    gradients = torch.autograd.grad([output, *weights, logsumexp], [query, key, value, sinks], by)
    for gradient in gradients[:3]:
        assert (gradient == 0).all()
    # Of each batch entry's row 1, and nothing of the NaN.
    assert torch.equal(gradients[3], torch.full_like(sinks, BATCH))


@every_way
def test_a_sink_of_minus_infinity_is_none(way: str) -> None:
    query, key, value, _ = rows()
    sinks = torch.full((HEADS,), -math.inf, dtype=torch.float64, requires_grad=True)
    pattern, implementation = WAYS[way]
    found = attended(way, query, key, value, sinks)
    plain = attend(query, key, value, pattern, implementation=implementation, return_logsumexp=True)
    assert torch.equal(found[0], plain.output)
    torch.testing.assert_close(found[-1], plain.logsumexp, rtol=1e-14, atol=1e-14)
    gradients = torch.autograd.grad(found, [query, sinks], [torch.ones_like(x) for x in found])
    assert gradients[0].isfinite().all()
    assert (gradients[1] == 0).all()


@every_way
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_broken_sink_shows_in_its_head_only(way: str, number: float) -> None:
    query, key, value, sinks = rows()
    broken = sinks.detach().clone()
    broken[1] = number
    output, *_, logsumexp = attended(way, query, key, value, broken)
    assert output[:, :, 1].isnan().all()
    assert logsumexp[:, :, 1].isnan().all()
    others = [0, 2, 3]
    whole = attended(way, query, key, value, sinks)
    torch.testing.assert_close(output[:, :, others], whole[0][:, :, others])


@every_way
@pytest.mark.parametrize("common", [1e9, -1e9])
def test_what_scores_and_sinks_share_changes_nothing(way: str, common: float) -> None:
    """float32 has steps of 64 there: the scores are 0, and the logarithm of the sum is lost in logsumexp."""
    query, key, value, _ = rows(torch.float32, needs_grad=False)
    sinks, pattern = torch.full((HEADS,), common), WAYS[way][0]
    bias = torch.full((pattern.num_edges,) if isinstance(pattern, Graph) else (1,), common)
    found = attended(way, torch.zeros_like(query), key, value, sinks, bias=bias)
    zeros = torch.zeros_like(query).double(), key.double(), value.double(), torch.zeros(HEADS, dtype=torch.float64)
    wanted = by_column(*zeros, allowed_of(pattern))
    for ours, theirs in zip(found[:-1], wanted, strict=False):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_weights_are_probabilities_that_the_sink_takes_from() -> None:
    query, key, value, sinks = rows(needs_grad=False)
    heads = attend(query, key, value, Causal(), sinks=sinks, return_weights="heads", return_logsumexp=True)
    mean = attend(query, key, value, Causal(), sinks=sinks, return_weights=True)
    assert heads.weights is not None
    assert heads.logsumexp is not None
    torch.testing.assert_close(mean.weights, heads.weights.mean(1))
    taken = (sinks - heads.logsumexp).exp().transpose(1, 2)
    torch.testing.assert_close(heads.weights.sum(-1), 1 - taken)


def test_merge_refuses_a_part_with_sinks_and_takes_them_as_a_part() -> None:
    query, key, value, sinks = rows(needs_grad=False)
    halves = [(key[:, :4], value[:, :4]), (key[:, 4:], value[:, 4:])]
    whole = attend(query, key, value, sinks=sinks, return_logsumexp=True)
    parts = [attend(query, k, v, return_logsumexp=True) for k, v in halves]
    with pytest.raises(
        InvalidInputError, match=r"parts\[1\].normalizer: expected a pair .* got None. the part .* sinks"
    ):
        merge([parts[0], whole])
    with pytest.raises(InvalidInputError, match="call attend with return_logsumexp=True"):
        merge([attend(query, *halves[0], sinks=sinks)])
    shape = BATCH, LENGTH, HEADS
    sink = AttentionResult(torch.zeros_like(whole.output), normalizer=(sinks.expand(shape), sinks.new_zeros(shape)))
    merged = merge([*parts, sink])
    torch.testing.assert_close((merged.output, merged.logsumexp), (whole.output, whole.logsumexp))


def test_explain_takes_sinks() -> None:
    query, key, value, sinks = rows()
    assert explain(query, key, value, sinks=sinks).implementation == "cpu"
    assert explain(query, key, value, Window(1, 1), sinks=sinks).implementation == "cpu"


def test_gates_have_no_denominator() -> None:
    graph = WAYS["graph"][0]
    query, key, value, sinks = rows()
    for call in (attend, explain):
        with pytest.raises(UnsupportedError, match="sinks with normalize=False: each edge is gated") as caught:
            call(query, key, value, graph, sinks=sinks, normalize=False)
        assert caught.value.argument == "sinks"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_way
def test_half_precision(way: str, dtype: torch.dtype) -> None:
    """As far from the exact results as twice what plain PyTorch in that precision is, and a rounding."""
    inputs = rows(dtype, needs_grad=False)
    allowed = allowed_of(WAYS[way][0])
    found, plain = attended(way, *inputs), by_column(*inputs, allowed)
    exact = by_column(*[x.double() for x in inputs], allowed)
    assert found[0].dtype == dtype
    assert found[-1].dtype == torch.float32
    step = torch.finfo(dtype).eps
    for place in range(len(found) - 1):
        ours, theirs = (float((x[place].double() - exact[place]).abs().max()) for x in (found, plain))
        assert ours <= 2 * theirs + step * float(exact[place].abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinks_of_another_dtype(dtype: torch.dtype) -> None:
    """They are taken in the dtype of the sums, as a bias is, and their gradient has their own."""
    query, key, value, sinks = (x.detach() for x in rows(torch.bfloat16))
    given = sinks.to(dtype).requires_grad_()
    found = attend(query, key, value, sinks=given)
    assert torch.equal(found.output, attend(query, key, value, sinks=sinks).output)
    (gradient,) = torch.autograd.grad(found.output.float().square().sum(), given)
    assert gradient.dtype == dtype


def test_autocast() -> None:
    inputs = rows(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*inputs[:3], sinks=inputs[3], return_logsumexp=True)
    assert found.logsumexp is not None
    assert (found.output.dtype, found.logsumexp.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(
        found.output.double(), by_column(*[x.double() for x in inputs], allowed_of(Full()))[0], rtol=0.05, atol=0.05
    )
    assert torch.autograd.grad(found.output.float().sum(), inputs[3])[0].dtype == torch.float32


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][1] != "torch"])
def test_compiled_whole(way: str) -> None:
    torch.compiler.reset()
    inputs = rows(torch.float32)

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        return attended(way, *given)

    found, wanted = torch.compile(step, fullgraph=True)(*inputs), step(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    cotangents = [torch.randn_like(x) for x in wanted]
    gradients = [torch.autograd.grad(each, inputs, cotangents) for each in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][1] == "reference"])
def test_sinks_are_mapped_over(way: str) -> None:
    *fixed, _ = rows(needs_grad=False)
    many = torch.randn(3, HEADS, dtype=torch.float64)
    found = torch.vmap(lambda sinks: attended(way, *fixed, sinks))(many)
    each = [attended(way, *fixed, sinks) for sinks in many]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*each, strict=True))))
