"""Hugging Face transformers on this package's kernels: `attn_implementation="anyattention"`.

transformers asks an implementation for two functions. The mask function is called once for a forward, with the lengths
and the rule of the mask; the attention function is called by each layer, with what the mask function returned. It is
given no other sign of the rule that can be trusted: some models pass `sliding_window`, some do not, and some pass it to
layers that see everything. So the rule travels in the mask itself, a `PatternMask`.
"""

from __future__ import annotations

from anyattention.errors import MissingExtraError

__all__ = ["register"]

_NAME = "anyattention"
# From there on the mask function is given lengths.
_OLDEST = (5, 5)


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
    from anyattention.interop.huggingface_attention import attention
    from anyattention.interop.huggingface_masks import attention_mask

    transformers.AttentionInterface.register(_NAME, attention)
    # Without this one transformers would make no mask at all, and say nothing.
    transformers.AttentionMaskInterface.register(_NAME, attention_mask)
