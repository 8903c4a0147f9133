"""Why `torch.nn.MultiheadAttention`'s own forward runs a call, and when it must not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyattention._checks import FLOATING, describe_shape
from anyattention.ambient import is_autocast_enabled
from anyattention.errors import AttentionError, DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.interop.torch_masks import Call
from anyattention.nn.bare import is_untouched

__all__ = ["Refusal", "refusal_of", "require_parent"]

# As it was before anybody put another in its place.
_LINEAR_FORWARD = nn.Linear.forward


@dataclass(frozen=True)
class Refusal:
    """Why this package does not run a call.

    Attributes:
        argument, expected, actual: what is at fault.
        error: what is raised where the parent's forward must not run instead.
    """

    argument: str
    expected: str
    actual: object
    error: type[AttentionError] = InvalidInputError

    @property
    def reason(self) -> str:
        """In words."""
        return f"{self.argument} is {self.actual}, not {self.expected}"


def require_parent(module: nn.MultiheadAttention, refusal: Refusal) -> None:
    """Raise where the parent's forward would leave out the pattern, or what stands in the place of `out_proj`."""
    if getattr(module, "pattern", None) is not None:
        hint = "PyTorch's own forward, which runs such calls, knows no pattern"
    elif not _is_read_as_called(module.out_proj):
        hint = "PyTorch's own forward, which runs such calls, reads the weight of out_proj and does not call it"
    else:
        return
    raise refusal.error(argument=refusal.argument, expected=refusal.expected, actual=refusal.actual, hint=hint)


def _is_read_as_called(out_proj: nn.Module) -> bool:
    """Whether to read a projection's weight comes to the same as to call it; its weight may be parametrised."""
    return isinstance(out_proj, nn.Linear) and is_untouched(out_proj, type(out_proj), _LINEAR_FORWARD)


def refusal_of(module: Any, call: Call) -> Refusal | None:
    """Why the parent's forward runs a call; None where ours does.

    Args:
        module: of our class.
        call: what its forward was given.
    """
    return next(_refusals(module, call), None)


def _refusals(module: Any, call: Call) -> Iterator[Refusal]:
    """The faults of a call, each checked where there are none before it."""
    rows = (("query", call.query), ("key", call.key), ("value", call.value))
    masks = [("key_padding_mask", call.key_padding_mask), ("attn_mask", call.attn_mask)]
    masks = [(name, mask) for name, mask in masks if mask is not None]
    for name, x in (*rows, *masks):
        if not isinstance(x, Tensor):
            yield Refusal(name, "a torch.Tensor", type(x).__name__)
    if any(x.is_nested for _, x in rows):
        yield from _refusals_of_nested(module, call)
    else:
        yield from _refusals_of_rows(module, call)
    kept = [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
    if module._qkv_same_embed_dim and module.in_proj_weight is None:
        yield Refusal("in_proj_weight", "a tensor", None)
    for name, x in rows:
        if x.layout != torch.strided or x.dtype not in FLOATING:
            yield Refusal(name, "a dense floating-point tensor", f"{x.dtype}, {x.layout}")
        for owned, parameter in kept:
            if x.dtype != parameter.dtype and not is_autocast_enabled(x.device):
                yield Refusal(name, f"{parameter.dtype}, as {owned}", x.dtype)
    for name, x in (*rows[1:], *masks, *kept):
        if x.device != call.query.device:
            yield Refusal(name, f"on {call.query.device}, as query", f"on {x.device}")
    for name, mask in masks:
        if mask.dtype != torch.bool and mask.dtype not in FLOATING:
            yield Refusal(name, "boolean or floating", mask.dtype)
    if call.is_causal and call.attn_mask is None:
        yield Refusal("is_causal", "False without attn_mask, for which it is a hint", True)
    if module.training and not 0.0 <= module.dropout < 1.0:
        yield Refusal("dropout", "in [0, 1)", module.dropout)
    if not call.query.is_cpu and module.pattern is None and _is_read_as_called(module.out_proj):
        yield Refusal("query", "on the CPU, for which there are kernels", f"on {call.query.device}")


def _refusals_of_nested(module: Any, call: Call) -> Iterator[Refusal]:
    """Tensors of the layout that PyTorch's encoders make are padded; others are not taken."""
    query, wanted = call.query, "one nested tensor (batch, length, width) of layout strided for query, key and value"
    if not call.is_self_attention or query.layout != torch.strided or query.dim() != 3:
        yield Refusal("query", wanted, "another nested tensor", UnsupportedError)
    if not module.batch_first:
        yield Refusal("query", "without batch_first no nested tensor", "nested", UnsupportedError)
    if query.size(-1) != module.embed_dim or not module._qkv_same_embed_dim:
        yield Refusal("query", f"(batch, length, {module.embed_dim})", "nested", DimensionMismatchError)
    if call.need_weights or call.key_padding_mask is not None or call.attn_mask is not None:
        expected = "without masks and need_weights=False where it is nested"
        yield Refusal("query", expected, "nested", UnsupportedError)


def _refusals_of_rows(module: Any, call: Call) -> Iterator[Refusal]:
    """Shapes that do not fit."""
    if call.query.dim() not in (2, 3):
        expected = "(length, batch, width), with batch_first (batch, length, width), or (length, width)"
        yield Refusal("query", expected, describe_shape(call.query), DimensionMismatchError)
    first = module.batch_first and call.is_batched
    length_axis, batch_axis = (1, 0) if first else (0, 1)
    num_queries = call.query.shape[length_axis]
    num_keys = call.key.shape[length_axis] if call.key.dim() == call.query.dim() else -1
    batch = call.query.shape[batch_axis] if call.is_batched else 1

    def expect(name: str, x: Tensor, *shapes: tuple[int, ...]) -> Iterator[Refusal]:
        if x.shape not in shapes:
            yield Refusal(name, " or ".join(map(str, shapes)), describe_shape(x), DimensionMismatchError)

    def rows(length: int, width: int) -> tuple[int, ...]:
        if not call.is_batched:
            return (length, width)
        return (batch, length, width) if first else (length, batch, width)

    yield from expect("query", call.query, rows(num_queries, module.embed_dim))
    if num_keys < 0:
        expected = f"of {call.query.dim()} axes, as query"
        yield Refusal("key", expected, describe_shape(call.key), DimensionMismatchError)
    yield from expect("key", call.key, rows(num_keys, module.kdim))
    yield from expect("value", call.value, rows(num_keys, module.vdim))
    if call.key_padding_mask is not None:
        shape = (batch, num_keys) if call.is_batched else (num_keys,)
        yield from expect("key_padding_mask", call.key_padding_mask, shape)
    if call.attn_mask is not None:
        pairs = (num_queries, num_keys)
        yield from expect("attn_mask", call.attn_mask, pairs, (batch * module.num_heads, *pairs))
