"""Product-key memory by the compiled kernels: no score is kept but those of a block of tokens."""

from __future__ import annotations

from torch import Tensor

from anyattention.ambient import is_transformed
from anyattention.ops.product_keys.call import Call
from anyattention.ops.product_keys.operators import (
    ProductKeyIndices,
    SlotAttention,
    product_key_indices,
    slot_attention,
)
from anyattention.ops.refusals import refusal_of_device

__all__ = ["choose", "refusal", "run"]

_MOST_HALF_KEYS = 1 << 16


def refusal(call: Call) -> str | None:
    """Why the kernels cannot run a call."""
    unable = refusal_of_device(call.query, "query is")
    if unable is not None:
        return unable
    if call.num_half_keys > _MOST_HALF_KEYS:
        return f"the kernels have at most {_MOST_HALF_KEYS} half keys in a half"
    if is_transformed(call.query, call.half_keys, call.values):
        return "the kernels have no forward derivatives and no rules for the transforms of torch.func"
    return None


def choose(call: Call) -> tuple[Tensor, Tensor]:
    """The slots and their scores `(T, H, k)`, without gradients.

    Cost: O(T x H x (n x D + k x k)) time; memory the half keys once more, and a block of scores for each thread.
    """
    return product_key_indices(ProductKeyIndices(call.query.detach(), call.half_keys.detach(), call.k))


def run(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(T, C)`, weights and slots `(T, H, k)`, the first two in the dtype of the sums.

    Cost: that of `choose` and O(T x H x k x (D + C)) time; memory O(T x H x k) above the results, backward too.
    """
    assert call.values is not None
    indices, scores = choose(call)
    output, weights = slot_attention(
        SlotAttention(
            call.query, call.half_keys, call.values, indices, scores, call.keep, call.sparse_grad, call.hands_on
        )
    )
    return output, weights, indices
