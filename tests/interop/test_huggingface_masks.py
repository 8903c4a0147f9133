"""The mask function against transformers' mask functions asked pair by pair, and what is done to a PatternMask."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Full, Window
from anyattention.interop.pattern_mask import PatternMask

BATCH = 2


@pytest.fixture(scope="module")
def utils(require: Any) -> Any:
    return require("transformers.masking_utils")


@pytest.fixture(scope="module")
def mask_of(utils: Any) -> Callable[..., Tensor | None]:
    from anyattention.interop.huggingface_masks import attention_mask

    return attention_mask


def functions(utils: Any) -> dict[str, Callable[..., Any]]:
    """Of indices; those after the first eight are no pattern that is known."""
    left_padding = torch.tensor([0, 2])
    blocks = torch.tensor([[-1, 0, 0, 1, 1, -1] * 5] * BATCH)
    sliding = utils.sliding_window_causal_mask_function
    return {
        "causal": utils.causal_mask_function,
        "bidirectional": utils.bidirectional_mask_function,
        "sliding 0": sliding(0),
        "sliding 1": sliding(1),
        "sliding 3": sliding(3),
        "sliding 50": sliding(50),
        "both ways": utils.sliding_window_bidirectional_mask_function(2),
        "joined": utils.and_masks(sliding(4), utils.sliding_window_overlay(2), utils.bidirectional_mask_function),
        "chunked": utils.chunked_causal_mask_function(3, left_padding),
        "either": utils.or_masks(utils.causal_mask_function, utils.blockwise_overlay(blocks)),
        "both": utils.and_masks(utils.causal_mask_function, lambda b, h, q, k: (q + k) % 3 != 0),
        "packed": utils.and_masks(
            utils.causal_mask_function, utils.packed_sequence_mask_function(torch.arange(30).repeat(2, 1) // 4)
        ),
        "remapped": utils.remap_positions_for_packed_sequence(sliding(3), torch.arange(30).repeat(2, 1) % 5),
    }


PATTERNS = 8
LOCAL = {"chunked": 3, "sliding 0": 0, "sliding 1": 1, "sliding 3": 3, "both ways": 2, "joined": 2}
# Queries, keys, where the first of each stands.
PLACES = [
    (6, 6, 0, 0),
    (4, 9, 5, 0),
    (1, 1, 0, 0),
    (1, 7, 6, 0),
    (1, 4, 9, 6),
    (3, 6, 9, 6),
    (3, 8, 0, 0),
    (1, 8, 3, 0),
    (2, 8, 3, 0),
    (5, 3, 0, 0),
]
PADDINGS = {
    "none": None,
    "ones": torch.ones(BATCH, 12, dtype=torch.bool),
    "left": torch.tensor([[False] * 2 + [True] * 10, [True] * 12]),
    "right": torch.tensor([[True] * 12, [True] * 3 + [False] * 9]),
    "short": torch.ones(BATCH, 3, dtype=torch.bool),
    "empty": torch.zeros(BATCH, 12, dtype=torch.bool),
}


def wanted_pairs(function: Callable[..., Any], place: tuple[int, ...], padding: Tensor | None) -> Tensor:
    """Asked pair by pair."""
    num_queries, num_keys, first_query, first_key = place
    pairs = torch.zeros(BATCH, 1, num_queries, num_keys, dtype=torch.bool)
    for b, i, j in product(range(BATCH), range(num_queries), range(num_keys)):
        query, key = torch.tensor(first_query + i), torch.tensor(first_key + j)
        is_real = padding is None or (int(key) < padding.shape[1] and bool(padding[b, key]))
        pairs[b, 0, i, j] = is_real and bool(function(torch.tensor(b), torch.tensor(0), query, key))
    return pairs


def read(mask: Tensor | None, place: tuple[int, ...], *, is_causal: bool) -> Tensor:
    """What the attention function takes a mask for."""
    num_queries, num_keys = place[:2]
    if mask is None:
        pattern = Causal(align="top_left") if is_causal and num_queries > 1 else Full()
        return pattern.to_dense(num_queries, num_keys).expand(BATCH, 1, -1, -1)
    assert mask.shape == (BATCH, 1, num_queries, num_keys) or (
        num_queries == 1 and mask.shape == (BATCH, 1, 1, num_keys)
    )
    assert mask.dtype == torch.bool
    if not isinstance(mask, PatternMask):
        return mask
    pairs = mask.pattern.to_dense(num_queries, num_keys).expand(mask.shape)
    return pairs if mask.keys is None else pairs & mask.keys


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_pairs(utils: Any, mask_of: Any, place: tuple[int, ...], padding: str) -> None:
    num_queries, num_keys, first_query, first_key = place
    for number, (name, function) in enumerate(functions(utils).items()):
        wanted = wanted_pairs(function, place, PADDINGS[padding])
        is_causal = name not in ("bidirectional", "both ways")
        # As transformers calls it: what it does not build itself must not be left to is_causal, nor one query before a
        # static cache that is not filled.
        may_skip = number < PATTERNS and place != (1, 8, 3, 0)
        for skips, offset in product({may_skip, False}, (first_query, torch.tensor(first_query))):
            mask = mask_of(
                batch_size=BATCH,
                q_length=num_queries,
                kv_length=num_keys,
                q_offset=offset,
                kv_offset=first_key,
                mask_function=function,
                attention_mask=PADDINGS[padding],
                local_size={
                    "chunked": 3,
                    "sliding 0": 0,
                    "sliding 1": 1,
                    "sliding 3": 3,
                    "both ways": 2,
                    "joined": 2,
                }.get(name),
                allow_is_causal_skip=skips and is_causal,
                allow_is_bidirectional_skip=skips and not is_causal,
            )
            assert torch.equal(read(mask, place, is_causal=is_causal), wanted), (name, skips)


def call(mask_of: Any, function: Any, place: tuple[int, ...], padding: Tensor | None = None, **settings: Any) -> Any:
    num_queries, num_keys, first_query, first_key = place
    return mask_of(
        batch_size=BATCH,
        q_length=num_queries,
        kv_length=num_keys,
        q_offset=first_query,
        kv_offset=first_key,
        mask_function=function,
        attention_mask=padding,
        **settings,
    )


def test_nothing_is_laid_out_where_a_pattern_says_it(utils: Any, mask_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "sdpa_mask", lambda **_: pytest.fail("laid out"))
    known = functions(utils)
    assert call(mask_of, known["causal"], (1, 7, 6, 0)) is None
    assert call(mask_of, known["sliding 3"], (1, 3, 9, 7)) is None
    bidirectional = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    assert call(mask_of, known["bidirectional"], (6, 4, 0, 0), **bidirectional) is None
    end = {"align": "bottom_right"}
    for name, place, pattern in (
        ("causal", (4, 9, 5, 0), Causal(**end)),
        ("causal", (6, 6, 0, 0), Causal(**end)),
        ("sliding 50", (6, 6, 0, 0), Causal(**end)),
        ("sliding 3", (6, 6, 0, 0), Window(2, 0, **end)),
        ("sliding 1", (6, 6, 0, 0), Window(0, 0, **end)),
        ("joined", (3, 6, 9, 6), Window(1, 0, **end)),
    ):
        for padding in (None, PADDINGS["ones"]):
            mask = call(mask_of, known[name], place, padding)
            assert (mask.pattern, mask.keys, mask.matrix) == (pattern, None, None)
    mask = call(mask_of, known["both ways"], (6, 6, 0, 0), PADDINGS["left"], **bidirectional)
    assert mask.pattern == Window(2, 2, **end)
    assert torch.equal(mask.keys, PADDINGS["left"][:, None, None, :6])
    mask = call(mask_of, known["bidirectional"], (6, 6, 0, 0), PADDINGS["left"], **bidirectional)
    assert type(mask) is Tensor
    assert mask.stride(2) == 0


def make_mask() -> tuple[PatternMask, Tensor]:
    """One that nobody has read, and its pairs."""
    keys = torch.ones(BATCH, 1, 1, 5, dtype=torch.bool)
    keys[0, ..., :2] = False
    pattern = Window(1, 0, align="bottom_right")
    return PatternMask(pattern, keys, (BATCH, 1, 4, 5), "cpu"), (pattern.to_dense(4, 5) & keys)


def test_a_pattern_mask_is_a_mask() -> None:
    mask, pairs = make_mask()
    assert (mask.shape, mask.dtype, mask.device, mask.ndim) == (pairs.shape, pairs.dtype, pairs.device, 4)
    assert mask.matrix is None
    assert repr(make_mask()[0])


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x[:, :, -2:, :3],
        lambda x: x & torch.ones(4, 5, dtype=torch.bool).triu(),
        lambda x: torch.cat([x, x], 0),
        lambda x: torch.where(x, 0.0, -1.0),
        lambda x: x.to(torch.float32),
        lambda x: x.detach(),
        lambda x: x.repeat_interleave(3, dim=0),
        lambda x: x.logical_not(),
        lambda x: torch.nn.functional.pad(x, (0, 2)),
        lambda x: x.expand(-1, 3, -1, -1),
    ],
)
def test_an_operator_reads_the_pairs(operation: Callable[[Tensor], Tensor]) -> None:
    mask, pairs = make_mask()
    found = operation(mask)
    assert type(found) is Tensor
    assert torch.equal(found, operation(pairs))


def test_what_is_written_into_it_stays() -> None:
    from anyattention.interop.huggingface_attention import attention

    class Layer(torch.nn.Module):
        is_causal = True

    def hide(mask: Tensor) -> None:
        mask[:, :, 1, :] = True
        mask[1, 0, 2:, :].fill_(False)
        mask.logical_and_(torch.tensor([True, True, False, True, True]))

    mask, pairs = make_mask()
    query, key = torch.randn(BATCH, 2, 4, 3), torch.randn(BATCH, 2, 5, 3)
    before, _ = attention(Layer(), query, key, key, mask)
    torch.testing.assert_close(before, attention(Layer(), query, key, key, pairs)[0])
    assert mask.matrix is None
    hide(mask)
    hide(pairs)
    after, _ = attention(Layer(), query, key, key, mask)
    torch.testing.assert_close(after, attention(Layer(), query, key, key, pairs)[0])
    assert not torch.allclose(before, after)


def test_the_whole_way_of_transformers(utils: Any, mask_of: Any) -> None:
    """`create_causal_mask` and its kind, with overlays, reach our function and say what "eager" says."""
    from huggingface_models import make_model

    from anyattention.interop import huggingface

    huggingface.register()
    config = make_model("mistral").config
    embeddings = torch.zeros(BATCH, 6, 16)
    overlays = {"or_mask_function": lambda b, h, q, k: k == 2, "and_mask_function": lambda b, h, q, k: k != 4}
    blocks = torch.tensor([[-1, 0, 0, -1, 1, 1]] * BATCH)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for create, padding, settings in product(
        (utils.create_causal_mask, utils.create_sliding_window_causal_mask),
        (None, PADDINGS["left"][:, :6].long()),
        ({}, overlays, {"block_sequence_ids": blocks}, {"position_ids": positions}, {"allow_is_causal_skip": False}),
    ):
        found = []
        for name in ("anyattention", "eager"):
            config._attn_implementation = name
            found.append(create(config, embeddings, padding, None, **settings))
        ours, theirs = found
        assert torch.equal(read(ours, (6, 6), is_causal=True).expand_as(theirs), theirs == 0)
        if settings and "allow_is_causal_skip" not in settings:
            assert not isinstance(ours, PatternMask) or (padding is not None and settings is not overlays)
