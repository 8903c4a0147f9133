"""What a layer of Hugging Face transformers computes, by `attend`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from anyattention.errors import InvalidMaskError, UnsupportedError
from anyattention.interop.pattern_mask import PatternMask
from anyattention.ops import attend
from anyattention.ops.dense import decode
from anyattention.patterns import Causal

__all__ = ["attention"]

# What models pass on to every layer and no implementation of transformers reads, or that stands in the mask already.
_INERT = frozenset(
    {
        "cache_position",
        "deterministic",
        "labels",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)
_PACKING = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of a layer, as transformers calls it.

    Args:
        query: `(batch, heads, queries, head_dim)`; key and value `(batch, key_heads, keys, head_dim)`.
        attention_mask: what the mask function returned, or a model's or caller's own: boolean, True = may attend, or
            floating, to be added. None is all pairs, or in a causal layer those of a causal mask from the first key on.

    Returns:
        `(batch, queries, heads, head_dim)`; where they are asked for, the weights before dropout, `(batch, heads,
        queries, keys)`.
    """
    if others:
        _refuse_unknown(others, attention_mask)
    if not output_attentions:
        # Some models do not pass it on, and leave it to hooks to find the weights in what the layers return.
        recorded = _active_collector.get()
        output_attentions = bool(recorded) and any("attentions" in each for each in recorded)
    if len(query) == 1 != len(key):
        # Queries that a model has learned, for the whole batch.
        query = query.expand(len(key), -1, -1, -1)
    pattern, mask, bias = None, None, position_bias
    if query.shape[2] == 1 and not (output_attentions or module.training) and position_bias is None and s_aux is None:
        # A token: what is left of a small model's time is Python.
        output = decode(query, key, value, attention_mask, scaling, softcap)
        if output is not None:
            return output, None
    if attention_mask is None:
        # transformers' own reading of "no mask", that of its "sdpa": several queries, in a causal layer, from the first
        # key on. More keys than queries are then those of a static cache that is not filled.
        if query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            pattern = Causal(align="top_left")
    elif isinstance(attention_mask, PatternMask) and attention_mask.matrix is None and not output_attentions:
        pattern, mask = attention_mask.pattern, attention_mask.keys
    else:
        mask, bias = _mask_and_bias(attention_mask, position_bias)
    result = attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        pattern,
        mask=mask,
        bias=bias,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout if module.training else 0.0,
        return_weights="heads" if output_attentions else False,
    )
    return result.output, result.weights


def _mask_and_bias(attention_mask: Tensor, position_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A boolean mask or a floating one as `attend` takes them, beside a bias."""
    if isinstance(attention_mask, PatternMask):
        attention_mask = attention_mask.laid_out()
    while attention_mask.ndim < 4:
        attention_mask = attention_mask[None]
    if attention_mask.dtype == torch.bool:
        is_of_keys = attention_mask.shape[2] > 1 and attention_mask.stride(2) == 0
        return attention_mask[:, :, :1] if is_of_keys else attention_mask, position_bias
    if not attention_mask.is_floating_point():
        raise InvalidMaskError(
            argument="attention_mask",
            expected="boolean, True = may attend, or floating, to be added to the scores",
            actual=f"{attention_mask.dtype} of shape {tuple(attention_mask.shape)}",
        )
    return None, attention_mask if position_bias is None else attention_mask + position_bias


def _refuse_unknown(others: dict[str, Any], attention_mask: Tensor | None) -> None:
    """Raise for what the model passes on and this attention would leave out."""
    for name, given in others.items():
        if given is None or name in _INERT:
            continue
        if name in _PACKING:
            # Lengths of packed sequences stand in the mask too, where transformers saw them in the position_ids. Of
            # patterns none has them.
            if attention_mask is not None and not isinstance(attention_mask, PatternMask):
                continue
            hint = "Packed sequences are told apart by position_ids that start anew, without an attention_mask."
        else:
            hint = "If it does not concern the attention, do not pass it to the model's call."
        raise UnsupportedError(
            f"attn_implementation='anyattention' does not know {name}, which the model passes to its attention",
            argument=name,
            hint=hint,
        )
