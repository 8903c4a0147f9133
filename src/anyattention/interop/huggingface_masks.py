"""The masks of Hugging Face transformers as patterns, where they are ones.

transformers describes a mask by a function of indices, lengths and offsets. Of the functions that it builds itself,
those of causal masks and sliding windows are recognised by their code; any other becomes a boolean matrix, by
transformers' own `sdpa_mask`. So an unknown function, or a later version's, costs memory and is still right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.utils.import_utils import is_tracing

from anyattention.ambient import Moment, constant_when_compiled, moment_of
from anyattention.errors import UnsupportedError
from anyattention.interop.pattern_mask import PatternMask
from anyattention.patterns import Causal, Full, Pattern, Window

__all__ = ["attention_mask"]

_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_SLIDING = masking_utils.sliding_window_overlay(1).__code__
_BOTH_WAYS = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_known: dict[type, bool] = {}


def attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The mask of a forward: what `transformers.masking_utils.sdpa_mask` gives, with patterns where there are ones.

    Args: as `sdpa_mask`. Query i stands at q_offset + i, and key j at kv_offset + j.

    Raises:
        UnsupportedError: the model does not call `AttentionInterface`. transformers asks that of "sdpa" alone.

    Returns:
        None for all pairs. Else a boolean mask `(batch, 1, queries, keys)`: a PatternMask for a pattern, and one row,
        expanded, for padding alone. For compilers and static caches None as there, for a causal mask from the first key
        on too.
    """
    config = others.get("config")
    if config is not None and not _calls_attention(type(config)):
        raise UnsupportedError(
            f"the model of {type(config).__name__} computes its attention by itself, without transformers' "
            "AttentionInterface, and would misread this mask",
            argument="attn_implementation",
            hint="Use attn_implementation='eager'.",
        )
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    pattern = None
    # The offsets of a static cache are tensors: its masks are made before what is compiled, and handed to it.
    if may_skip and not isinstance(q_offset, Tensor) and _is_readable(attention_mask):
        # Whether the last query stands at the last key, which the patterns' "bottom_right" says.
        is_aligned = q_offset + q_length == kv_offset + kv_length
        pattern = _pattern(mask_function, q_length, kv_length, is_aligned)
    if pattern is not None:
        keys = _visible_keys(attention_mask, kv_length, kv_offset)
        shape = (batch_size, 1, q_length, kv_length)
        if isinstance(pattern, Full):
            return keys if keys is None else keys.expand(shape)
        # Also where `sdpa_mask` gives None and leaves the rest to the layers' `is_causal`: not all models set that.
        return PatternMask(pattern, keys, shape, device)
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # pyright: ignore[reportArgumentType]  # a tensor is added like an int
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        device=device,
        **others,
    )


@constant_when_compiled
def _calls_attention(config: type) -> bool:
    """Whether models of a kind of config call their attention through the interface, by transformers' own test.

    Those are looked for in the file of models that lies beside the config's; where there is none, they are taken to.
    """
    if config not in _known:
        name = config.__module__.replace(".configuration_", ".modeling_")
        beside = vars(sys.modules.get(name, sys)).values()
        models = [x for x in beside if isinstance(x, type) and issubclass(x, PreTrainedModel) and x.__module__ == name]
        _known[config] = not models or models[0]._can_set_attn_implementation()
    return _known[config]


def _is_readable(attention_mask: Tensor | None) -> bool:
    """Whether there is a mask of padding whose numbers can be asked for, or none; not where a compiler traces this."""
    if moment_of((attention_mask,)) is not Moment.PLAIN:
        return False
    if attention_mask is None:
        return True
    return attention_mask.ndim == 2 and (attention_mask.is_cpu or not is_tracing(attention_mask))


def _pattern(mask_function: Any, num_queries: int, num_keys: int, is_aligned: bool) -> Pattern | None:
    """The pairs of a mask function; None where it is unknown or empty, or no pattern says where the queries stand."""
    sides = _sides(mask_function)
    if sides is None or min(sides) < 0 or (sides != (inf, inf) and not is_aligned):
        return None
    # No key lies further before a query's place than the first before the last, nor behind it than the last behind the
    # first query's.
    is_open = (sides[0] >= num_keys - 1, sides[1] >= num_queries - 1)
    if is_open == (True, True):
        return Full()
    if is_open[0] and sides[1] == 0:
        return Causal(align="bottom_right")
    # One query's row of a matrix is less work than a pattern of it.
    if num_queries == 1:
        return None
    return Window(int(min(sides[0], num_keys)), int(min(sides[1], num_queries)), align="bottom_right")


def _sides(mask_function: Any) -> tuple[float, float] | None:
    """How far before and behind its place a query sees, by transformers' own functions; None for any other."""
    if mask_function is masking_utils.causal_mask_function:
        return inf, 0
    if mask_function is masking_utils.bidirectional_mask_function:
        return inf, inf
    # Two functions that one `def` made have one code: what differs is in the cells.
    code = getattr(mask_function, "__code__", None)
    if code is _AND:
        parts = [_sides(part) for part in _cell(mask_function, "mask_functions")]
        known = [part for part in parts if part is not None]
        return (min(left for left, _ in known), min(right for _, right in known)) if known == parts else None
    if code is _SLIDING:
        # key > query - sliding_window
        return _cell(mask_function, "sliding_window") - 1, inf
    if code is _BOTH_WAYS:
        return (_cell(mask_function, "sliding_window"),) * 2
    return None


def _cell(function: Any, name: str) -> Any:
    """What a function has closed over by a name."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _visible_keys(attention_mask: Tensor | None, num_keys: int, first: int) -> Tensor | None:
    """`(batch, 1, 1, keys)`, False for padding and for keys beyond the mask's end; None where all are True."""
    if attention_mask is None:
        return None
    padded: Any = masking_utils.prepare_padding_mask(attention_mask, num_keys, first)
    keys = padded if padded.shape[1] == num_keys else padded[:, first : first + num_keys]
    return None if keys.all() else keys[:, None, None]
