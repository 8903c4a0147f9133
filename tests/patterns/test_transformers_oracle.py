"""Sparse patterns against Hugging Face transformers' own Longformer and BigBird attention, with its projections.

Both compute in blocks of their own, share no code with ours, and are given the same inputs and weights.
"""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anyattention import Blocks, Global, Graph, Pattern, Window, attend, explain

BATCH, HEADS, WIDTH = 2, 3, 12
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def attention(module: Any, x: Tensor, pattern: Pattern, mask: Tensor | None, heads: slice = slice(None)) -> Tensor:
    """Our attention over the projections of a layer of theirs, `(batch, length, heads, head_dim)`."""
    projected = [part(x).unflatten(-1, (HEADS, -1))[:, :, heads] for part in (module.query, module.key, module.value)]
    query, key, value = projected
    return attend(query, key, value, pattern, mask=mask).output


def assert_same(ours: Tensor, theirs: Tensor, module: nn.Module, x: Tensor, tolerance: float) -> None:
    """The same output, and the same gradients of the input and the projections by one random cotangent."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    leaves = [x, *module.parameters()]
    cotangent = torch.randn_like(theirs)
    gradients = [torch.autograd.grad(each, leaves, cotangent, retain_graph=True) for each in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=20 * tolerance, atol=20 * tolerance)


# Longformer


@pytest.fixture(scope="module")
def longformer(require: Any) -> ModuleType:
    return require("transformers.models.longformer.modeling_longformer")


# In float64 its mask overflows in its softmax, which is float32 in any dtype: padding has a NaN gradient.
@pytest.mark.parametrize(("dtype", "padded"), [(torch.float32, 0), (torch.float32, 5), (torch.float64, 0)], ids=str)
@pytest.mark.parametrize("tokens", [(), (0,), (0, 1, 17)], ids=str)
@pytest.mark.parametrize("half", [2, 4])
def test_longformer(
    longformer: ModuleType, half: int, tokens: tuple[int, ...], padded: int, dtype: torch.dtype
) -> None:
    """Its chunks of a sliding window, joined with its global keys and its rows of global queries."""
    length = 6 * 2 * half
    config = longformer.LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[2 * half], attention_probs_dropout_prob=0.0
    )
    module = longformer.LongformerSelfAttention(config, layer_id=0).to(dtype)
    # A pattern says who attends, not by which weights: global tokens get the projections of the others.
    module.query_global, module.key_global, module.value_global = module.query, module.key, module.value
    x = torch.randn(BATCH, length, WIDTH, dtype=dtype, requires_grad=True)
    is_there = torch.arange(length) < length - padded * torch.arange(BATCH)[:, None]
    # Its own code: below 0 is padding, above 0 a global token.
    code = torch.where(is_there, 0.0, -10_000.0).to(dtype)
    code[:, list(tokens)] = 10_000.0
    theirs = module(
        x,
        attention_mask=code,
        is_index_masked=code < 0,
        is_index_global_attn=code > 0,
        is_global_attn=bool(tokens),
    )[0]
    pattern = Window(half, half) | Global(tokens)
    ours = attention(module, x, pattern, is_there[:, None, None]).flatten(2)
    assert_same(ours[is_there], theirs[is_there], module, x, 2e-6)


def test_longformer_with_tokens_of_each_sequence(longformer: ModuleType) -> None:
    """A batch in which each sequence has other global tokens is one call for each."""
    config = longformer.LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[4], attention_probs_dropout_prob=0.0
    )
    module = longformer.LongformerSelfAttention(config, layer_id=0)
    module.query_global, module.key_global, module.value_global = module.query, module.key, module.value
    x = torch.randn(2, 16, WIDTH, requires_grad=True)
    code, tokens = torch.zeros(2, 16), ((3, 9), (0,))
    for row, places in enumerate(tokens):
        code[row, list(places)] = 10_000.0
    theirs = module(x, code, code < 0, code > 0, True)[0]
    ours = torch.cat(
        [attention(module, x[row, None], Window(2, 2) | Global(tokens[row]), None).flatten(2) for row in range(2)]
    )
    assert_same(ours, theirs, module, x, 2e-6)


# BigBird


@pytest.fixture(scope="module")
def bigbird(require: Any) -> ModuleType:
    return require("transformers.models.big_bird.modeling_big_bird")


def bigbird_call(
    bigbird: ModuleType, size: int, blocks: int, per_row: int, padded: int, dtype: torch.dtype, training: bool
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer, its input, which positions are no padding, its output and weights, and how often each block is named.

    The last one, `(heads, blocks, blocks)`, is 3 neighbours, the first and last block, and the layer's own random plan.
    """
    config = bigbird.BigBirdConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        block_size=size,
        num_random_blocks=per_row,
        max_position_embeddings=1024,
    )
    module = bigbird.BigBirdBlockSparseAttention(config, seed=7).to(dtype).train(training)
    length = size * blocks
    x = torch.randn(BATCH, length, WIDTH, dtype=dtype, requires_grad=True)
    is_there = torch.arange(length) < length - padded * torch.arange(BATCH)[:, None]
    blocked, band, rows, columns = bigbird.BigBirdModel.create_masks_for_block_sparse_attn(is_there.to(dtype), size)
    output, weights = module(x, band, rows, columns, blocked, blocked)

    np.random.seed(7)
    if length == 1024:  # one of three lengths for which it has the paper's plan
        plans = [module._bigbird_block_rand_mask(1024, 1024, size, size, per_row, last_idx=1024) for _ in range(HEADS)]
    else:
        plan = module._get_rand_attn_plan(length, size, per_row)
        plans = module._bigbird_block_rand_mask_with_head(length, length, size, size, HEADS, *plan)
    fixed = Window(1, 1) | Global((0, blocks - 1))
    named = fixed.to_dense(blocks, blocks).long().repeat(HEADS, 1, 1)
    for head, plan in enumerate(plans):
        chosen = torch.from_numpy(plan).long()
        named[head, 1:-1].scatter_add_(1, chosen, torch.ones_like(chosen))
    return module, x, is_there, output, weights, named


@DTYPES
@pytest.mark.parametrize("padded", [0, 6])
@pytest.mark.parametrize(("blocks", "per_row"), [(11, 2), (14, 3)])
def test_bigbird(bigbird: ModuleType, blocks: int, per_row: int, padded: int, dtype: torch.dtype) -> None:
    """In training, when its random blocks are random; each head has blocks of its own."""
    module, x, is_there, theirs, weights, named = bigbird_call(bigbird, 4, blocks, per_row, padded, dtype, True)
    assert named.max() == 1
    assert not torch.equal(named[0], named[1])
    ours = []
    for head in range(HEADS):
        pattern = Blocks(named[head] > 0, 4)
        ours.append(attention(module, x, pattern, is_there[:, None, None], slice(head, head + 1)))
        # The pairs themselves: where it has a weight, which only the first sequence has everywhere.
        assert torch.equal(weights[0, head] > 0, pattern.to_dense(4 * blocks, 4 * blocks))
    assert_same(torch.cat(ours, 2).flatten(2)[is_there], theirs[is_there], module, x, 2e-6)
    assert (theirs[~is_there] == 0).all()


def test_bigbird_runs_on_tiles(bigbird: ModuleType, native: ModuleType) -> None:
    x = torch.randn(1, 44, 1, 4)
    named = bigbird_call(bigbird, 4, 11, 2, 0, torch.float32, True)[-1]
    assert explain(x, x, x, Blocks(named[0] > 0, 4)).implementation == "cpu"


@pytest.mark.parametrize(("size", "blocks", "training"), [(4, 11, False), (64, 16, True)], ids=["evaluation", "paper"])
def test_bigbird_counts_a_block_as_often_as_it_names_it(
    bigbird: ModuleType, size: int, blocks: int, training: bool
) -> None:
    """In evaluation every random block is the first one again; the paper's plan draws some neighbours again.

    Its softmax runs over all that it gathered, so that such a block counts several times: a Graph's repeated edges.
    """
    module, x, _, theirs, weights, named = bigbird_call(bigbird, size, blocks, 2, 0, torch.float64, training)
    assert named.max() == (2 if training else 3)
    ours, length = [], size * blocks
    for head in range(HEADS):
        times = named[head].repeat_interleave(size, 0).repeat_interleave(size, 1)
        pairs = times.nonzero().repeat_interleave(times[times > 0], 0)
        graph = Graph.from_edge_index(pairs.T.flip(0), num_queries=length, num_keys=length)
        ours.append(attention(module, x, graph, None, slice(head, head + 1)))
        assert torch.equal(weights[0, head] > 0, times > 0)
    assert_same(torch.cat(ours, 2).flatten(2), theirs, module, x, 1e-9)
