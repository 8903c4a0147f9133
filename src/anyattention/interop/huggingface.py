"""Hugging Face transformers on this package's kernels: `attn_implementation="anyattention"`.

transformers asks an implementation for two functions. The mask function is called once for a forward, with the lengths
and the rule of the mask; the attention function is called by each layer, with what the mask function returned. It is
given no other sign of the rule that can be trusted: some models pass `sliding_window`, some do not, and some pass it to
layers that see everything. So the rule travels in the mask itself, a `PatternMask`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattention.errors import InvalidMaskError, MissingExtraError, UnsupportedError
from anyattention.interop.pattern_mask import PatternMask
from anyattention.ops import attend
from anyattention.ops.dense import decode
from anyattention.patterns import Causal

__all__ = ["register"]

_NAME = "anyattention"
# From there on the mask function is given lengths.
_OLDEST = (5, 5)
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


def register() -> None:
    """Make `attn_implementation="anyattention"` known to Hugging Face transformers. To call it again changes nothing.

    Every model that calls its attention by `AttentionInterface` can then have it: `from_pretrained(...,
    attn_implementation="anyattention")`, or `model.set_attn_implementation("anyattention")` on one that is there. What
    it computes is that of "eager", with sinks in the denominator where a model has them:

        weights = softmax(softcap(scaling query . key) + position_bias + mask)

    Grouped key heads are read where they lie. A causal mask, a sliding window and padding reach the kernels as a
    pattern and a key mask; other masks are boolean matrices. With `output_attentions=True` in the call the weights come
    too.

    Raises:
        MissingExtraError: transformers is not installed, or older than 5.5.

    In a model's call:

    Raises:
        UnsupportedError: the model passes something that is unknown here, instead of leaving it out.
        InvalidMaskError: a mask is neither boolean nor floating.

    Cost: that of `attend`; linear memory without `output_attentions`. A mask that is no causal one, no window and no
    padding takes a byte for each pair.

    Example:
        >>> register()
    """
    try:
        import transformers
    except ModuleNotFoundError as missing:
        # What transformers itself lacks is not ours to explain away.
        if missing.name is None or missing.name.split(".")[0] != "transformers":
            raise
        raise MissingExtraError(
            "anyattention.interop.huggingface needs transformers",
            argument="transformers",
            hint="Install it with: pip install 'anyattention[huggingface]'",
        ) from missing
    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        raise MissingExtraError(
            argument="transformers",
            expected=f"{'.'.join(map(str, _OLDEST))} or later",
            actual=version,
            hint="Install it with: pip install 'anyattention[huggingface]'",
        )
    from anyattention.interop.huggingface_masks import attention_mask

    transformers.AttentionInterface.register(_NAME, attention)
    # Without this one transformers would make no mask at all, and say nothing.
    transformers.AttentionMaskInterface.register(_NAME, attention_mask)


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
            # Lengths of packed sequences stand in the mask too, where transformers saw them in the position_ids.
            if attention_mask is not None:
                continue
            hint = "Packed sequences are told apart by position_ids that start anew, without an attention_mask."
        else:
            hint = "If it does not concern the attention, do not pass it to the model's call."
        raise UnsupportedError(
            f"attn_implementation='anyattention' does not know {name}, which the model passes to its attention",
            argument=name,
            hint=hint,
        )
