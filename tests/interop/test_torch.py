"""`interop.torch.MultiheadAttention` beside PyTorch's own, and over patterns beside the same pairs as a mask."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyattention import Causal, Documents, Full, Graph, TopK, Window, attend
from anyattention.interop.torch import MultiheadAttention, convert
from cases import sampled

_BATCH, _QUERIES, _KEYS, _WIDTH, _HEADS = 2, 5, 7, 12, 3
_SETTINGS = sampled(
    {
        "inputs": ("self", "key is value", "all different", "kdim", "vdim"),
        "layout": ("length first", "batch first", "unbatched"),
        "bias": (True, False),
        "add_bias_kv": (False, True),
        "add_zero_attn": (False, True),
        "attn_mask": (None, "blocked", "blocked by heads", "added", "added by heads"),
        "key_padding_mask": (None, "blocked", "added"),
        "weights": (None, "mean", "heads"),
    }
)


def pair(**settings: Any) -> tuple[Any, Any]:
    """PyTorch's module and ours, in float64, with the same random parameters."""
    theirs = nn.MultiheadAttention(_WIDTH, _HEADS, dtype=torch.float64, **settings)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = MultiheadAttention(_WIDTH, _HEADS, dtype=torch.float64, **settings)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(kind: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    def rows(length: int, width: int) -> Tensor:
        x = torch.randn(_BATCH, length, width, dtype=torch.float64)
        return x if layout == "batch first" else x.transpose(0, 1).contiguous() if layout == "length first" else x[0]

    query = rows(_QUERIES, _WIDTH)
    if kind == "self":
        return query, query, query
    key = rows(_KEYS, 4 if kind == "kdim" else _WIDTH)
    return query, key, key if kind == "key is value" else rows(_KEYS, 5 if kind == "vdim" else _WIDTH)


def mask(kind: str | None, shape: tuple[int, ...]) -> Tensor | None:
    """True is blocked; each query keeps a key."""
    if kind is None:
        return None
    blocked = torch.rand(shape) < 0.3
    blocked[..., 0] = False
    if kind.startswith("blocked"):
        return blocked
    return torch.randn(shape, dtype=torch.float64).masked_fill(blocked, -torch.inf)


def everything(module: Any, given: tuple[Tensor, ...], masks: dict[str, Any], weights: str | None) -> list[Tensor]:
    """Output, weights, and the gradients of a loss on both by inputs, float masks and parameters."""
    leaves = {id(x): x.detach().clone().requires_grad_() for x in given}
    masks = {name: x if x is None or x.dtype == torch.bool else x.clone().requires_grad_() for name, x in masks.items()}
    result = module(
        *(leaves[id(x)] for x in given),
        need_weights=weights is not None,
        average_attn_weights=weights == "mean",
        **masks,
    )
    results = [x for x in result if x is not None]
    assert len(results) == 1 + (weights is not None)
    torch.manual_seed(3)
    loss = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in results)
    by = [*leaves.values(), *module.parameters(), *(x for x in masks.values() if x is not None and x.requires_grad)]
    return [*results, *torch.autograd.grad(loss, by)]


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.fixture
def no_fast_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("settings", _SETTINGS.values(), ids=_SETTINGS)
def test_outputs_weights_and_gradients_are_those_of_pytorch(settings: dict[str, Any], no_fast_path: None) -> None:
    kind, layout = settings["inputs"], settings["layout"]
    theirs, ours = pair(
        bias=settings["bias"],
        add_bias_kv=settings["add_bias_kv"],
        add_zero_attn=settings["add_zero_attn"],
        batch_first=layout == "batch first",
        kdim=4 if kind == "kdim" else None,
        vdim=5 if kind == "vdim" else None,
    )
    given = inputs(kind, layout)
    keys, batch = _QUERIES if kind == "self" else _KEYS, 1 if layout == "unbatched" else _BATCH
    by_heads = (batch * _HEADS,) if str(settings["attn_mask"]).endswith("heads") else ()
    masks = {
        "attn_mask": mask(settings["attn_mask"], (*by_heads, _QUERIES, keys)),
        "key_padding_mask": mask(settings["key_padding_mask"], (keys,) if layout == "unbatched" else (batch, keys)),
    }
    assert ours.explain_forward(*given, **masks).implementation == "cpu"
    assert_close(*(everything(module, given, masks, settings["weights"]) for module in (ours, theirs)))


@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize(
    "pattern",
    [Full(), Causal(), Window(1, 0), Documents((2, 3)), TopK(9), Window(1, 2) & TopK(9), "graph"],
    ids=str,
)
def test_a_pattern_is_the_mask_of_its_pairs(pattern: Any, extra: dict[str, bool], weights: str | None) -> None:
    """PyTorch's own forward is told the pairs as a mask."""
    theirs, ours = pair(**extra)
    is_pair = torch.rand(_QUERIES, _QUERIES) < 0.5
    is_pair[range(_QUERIES), range(_QUERIES)] = True
    if pattern == "graph":
        edges = is_pair.T.nonzero().T
        pattern = Graph.from_edge_index(edges[:, torch.randperm(edges.shape[1])], num_nodes=_QUERIES)
    elif isinstance(pattern, TopK):
        is_pair = torch.ones_like(is_pair) if pattern.among is None else pattern.among.to_dense(_QUERIES, _QUERIES)
    else:
        is_pair = pattern.to_dense(_QUERIES, _QUERIES)
    ours.pattern = pattern
    given = inputs("self", "length first")
    hidden = mask("added", (_BATCH, _QUERIES))
    added = torch.randn(_BATCH * _HEADS, _QUERIES, _QUERIES, dtype=torch.float64)
    hidden[:, :] = torch.where(hidden.isinf(), -3.0, hidden)
    masks = {"attn_mask": added, "key_padding_mask": hidden}
    found = everything(ours, given, masks, weights)
    masks["attn_mask"] = added.masked_fill(~is_pair, -torch.inf)
    assert_close(found, everything(theirs, given, masks, weights))


def test_extra_keys_beside_topk_are_among_its_candidates() -> None:
    _, ours = pair(add_zero_attn=True)
    ours.pattern = Window(1, 1) & TopK(1)
    x = inputs("self", "batch first")[0].mul(3).transpose(0, 1)
    weights = ours(x, x, x)[1]
    assert weights.shape == (_BATCH, _QUERIES, _QUERIES + 1)
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights[..., -1] > 0).any()


@pytest.mark.parametrize("pattern", [None, Window(1, 1)])
@pytest.mark.parametrize("padding", [False, True])
def test_the_hint_of_a_causal_mask(pattern: Any, padding: bool) -> None:
    theirs, ours = pair()
    ours.pattern = pattern
    x = inputs("self", "length first")[0]
    causal = nn.Transformer.generate_square_subsequent_mask(_QUERIES, dtype=torch.float64)
    hidden = mask("added", (_BATCH, _QUERIES)) if padding else None
    outside = 0.0 if pattern is None else torch.zeros(()).where(pattern.to_dense(_QUERIES, _QUERIES), -torch.inf)
    for weights in (None, "heads"):
        found = ours(x, x, x, hidden, weights is not None, causal, False, is_causal=True)
        expected = theirs(x, x, x, hidden, weights is not None, causal + outside, False)
        assert_close([y for y in found if y is not None], [y for y in expected if y is not None])


def test_the_hint_of_a_causal_mask_of_other_lengths() -> None:
    theirs, ours = pair()
    query, key, value = inputs("all different", "length first")
    blocked = torch.ones(_QUERIES, _KEYS).triu(1).bool()
    expected = theirs(query, key, value, attn_mask=blocked, need_weights=False)[0]
    assert_close(ours(query, key, value, attn_mask=blocked, need_weights=False, is_causal=True)[0], expected)
    assert_close(ours(query, key, value, attn_mask=blocked, is_causal=True)[0], expected)


@pytest.mark.parametrize("pattern", [None, Window(1, 1), TopK(2)])
def test_a_query_without_keys_gets_the_bias_of_out_proj(pattern: Any) -> None:
    theirs, ours = pair(batch_first=True)
    ours.pattern = pattern
    x = inputs("self", "batch first")[0].requires_grad_()
    blocked = torch.tensor([[False] * _QUERIES, [True] * _QUERIES])
    output, weights = ours(x, x, x, key_padding_mask=blocked)
    assert_close(output[1], ours.out_proj.bias.expand(_QUERIES, _WIDTH))
    assert (weights[1] == 0).all()
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    assert (gradient[1] == 0).all()
    assert theirs(x, x, x, key_padding_mask=blocked)[0][1].isnan().all()


def test_the_layout_of_the_output_can_be_viewed() -> None:
    for batch_first in (True, False):
        _, ours = pair(batch_first=batch_first)
        x = inputs("self", "length first")[0]
        assert ours(x, x, x)[0].is_contiguous()


def test_parts_are_called_as_modules() -> None:
    _, ours = pair()
    x = inputs("self", "length first")[0]
    expected = ours(x, x, x)[0]
    calls: list[Any] = []
    ours.out_proj.register_forward_hook(lambda module, given, output: calls.append(given) or output * 2)
    assert_close(ours(x, x, x)[0], 2 * expected)
    assert len(calls) == 1

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.more = base, nn.Linear(_WIDTH, _WIDTH, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.more(x)

    ours.out_proj = Adapter(ours.out_proj)
    ours(x, x, x)[0].sum().backward()
    assert ours.out_proj.more.weight.grad is not None
    assert len(calls) == 2


@pytest.mark.parametrize("pattern", [None, Window(1, 1), TopK(2)], ids=str)
def test_dropout_is_that_of_attend(pattern: Any) -> None:
    _, ours = pair(dropout=0.5, batch_first=True)
    ours.pattern = pattern
    x = inputs("self", "batch first")[0]
    rows = nn.functional.linear(x, ours.in_proj_weight, ours.in_proj_bias).unflatten(-1, (3, _HEADS, -1))
    torch.manual_seed(5)
    expected = ours.out_proj(attend(*rows.unbind(2), pattern, dropout=0.5).output.flatten(-2))
    torch.manual_seed(5)
    output, weights = ours(x, x, x)
    assert_close(output, expected)
    ours.eval()
    again, same = ours(x, x, x)
    assert not torch.equal(output, again)
    assert_close(weights, same)


@pytest.mark.parametrize("pattern", [None, Window(1, 1), TopK(2), "causal hint"], ids=str)
@pytest.mark.parametrize("is_average", [True, False])
def test_compiled_whole(pattern: Any, is_average: bool) -> None:
    torch._dynamo.reset()
    _, ours = pair(add_bias_kv=pattern == Window(1, 1))
    settings: dict[str, Any] = {"average_attn_weights": is_average}
    if pattern == "causal hint":
        settings |= {"attn_mask": torch.ones(_QUERIES, _QUERIES).triu(1).bool(), "is_causal": True}
    else:
        ours.pattern = pattern
    x = inputs("self", "length first")[0].requires_grad_()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, expected = (module(x, x, x, **settings) for module in (compiled, ours))
    assert_close(found, expected)
    by = [x, *ours.parameters()]
    assert_close(
        *(torch.autograd.grad(result[0].square().sum() + result[1].square().sum(), by) for result in (found, expected))
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("pattern", [None, Window(1, 1), TopK(2)], ids=str)
def test_traced_and_exported(pattern: Any) -> None:
    _, ours = pair()
    ours.pattern = pattern
    ours.requires_grad_(False)
    x = inputs("self", "length first")[0]
    for program in (torch.jit.trace(ours, (x, x, x)), torch.export.export(ours, (x, x, x)).module()):
        assert_close(tuple(program(x, x, x)), ours(x, x, x))


def test_autocast() -> None:
    ours = MultiheadAttention(8, 2, batch_first=True, pattern=Window(1, 1))
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights = ours(x, x, x)
    assert output.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), ours(x, x, x)[0], rtol=0.05, atol=0.05)


def test_functional_call_and_second_derivatives() -> None:
    _, ours = pair()
    ours.pattern = Window(1, 1)
    x = inputs("self", "length first")[0].requires_grad_()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(ours, parameters, (x, x, x))[0].square().sum()

    parameters = dict(ours.named_parameters())
    found = torch.func.grad(loss)({name: each.detach() for name, each in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    assert_close(list(found.values()), list(expected))
    assert torch.autograd.gradgradcheck(lambda x: ours(x, x, x)[0], (x[:3, :1].detach().requires_grad_(),))


def test_copies_pickles_and_state() -> None:
    theirs, ours = pair(add_bias_kv=True)
    ours.pattern = Window(1, 1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = inputs("self", "length first")[0]
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_close(again(x, x, x), ours(x, x, x))
    assert "pattern=Window(left=1, right=1, align=None)" in repr(ours)


def test_nn_transformer_in_training_and_evaluation() -> None:
    theirs = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = convert(copy.deepcopy(theirs))
    source, target = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    settings = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        "src_key_padding_mask": torch.tensor([[False] * 6, [False] * 4 + [True] * 2]),
        "memory_key_padding_mask": torch.tensor([[False] * 6, [False] * 4 + [True] * 2]),
    }
    for is_training in (True, False):
        found, expected = (each.train(is_training)(source, target, **settings) for each in (ours, theirs))
        assert_close(found, expected)
