"""Dense attention on PyTorch's fused CPU kernel, wrapped so that masked slots and empty rows stay harmless."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ambient import is_transformed
from anyattention.bias import RelativeBias
from anyattention.ops.arguments import Arguments, of_pairs
from anyattention.ops.dense.heads import with_all_heads
from anyattention.ops.dense.pairs import allowed_pairs
from anyattention.ops.dense.torch_kernel import FusedDense, fused_dense
from anyattention.ops.normalizer import with_normalizer
from anyattention.output import AttentionResult
from anyattention.patterns import Causal

__all__ = ["LEAK", "ROUNDING", "refusal", "run"]

LEAK = (
    "torch: a NaN in a key or value that some queries may attend to and others may not (causal, a mask) "
    "reaches all of them; implementation='reference' keeps it where it belongs"
)
ROUNDING = (
    "torch: gradients are off by the rounding of the largest product of query and key, times the scale: in float32 by "
    "3 % at a million, and by the number of keys at a billion. The scores beside a large bias are not rounded"
)


def refusal(call: Arguments) -> str | None:
    """Why the fused kernel cannot run a call."""
    if call.query.device.type != "cpu":
        return f"PyTorch's fused attention is wrapped for the CPU only, and the query is on {call.query.device}"
    bias = call.bias_numbers
    if is_transformed(call.query, call.key, call.value, bias):
        return "it has no forward derivatives and no rules for the transforms of torch.func"
    if not call.score.is_product:
        return f"it scores by dot product, not by {type(call.score).__name__}"
    if call.softcap is not None:
        return "it has no softcap"
    if call.dropout > 0:
        return "it has no dropout"
    if call.weights is not None:
        return "it never forms the weights; once they are formed, the output is one product away"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for the bias"
    if 0 in (*call.query.shape, call.key.shape[1], call.value.shape[3]):
        return "a size is 0"
    return None


def run(call: Arguments) -> AttentionResult:
    """Output `(B, L, H, E)` and logsumexp `(B, L, H)`. Memory: O(B x H x L x (D + E)) and the mask's own size."""
    call = of_pairs(call)
    assert not isinstance(call.bias, RelativeBias)
    query, (key, value) = call.query, with_all_heads(call)
    bias, largest_bias, scale = None, None, call.scaling.scale
    lengths = query.shape[1], key.shape[1]
    causal = isinstance(call.pattern, Causal) and call.pattern.offset(*lengths) == 0
    if causal and call.mask is None and call.bias is None:
        # Keys past the last query are never used; the kernel would read them all the same.
        key, value = key[:, : query.shape[1]], value[:, : query.shape[1]]
        has_pairs = None
        if scale <= 0:
            # The kernel hides later keys by -inf before it scales.
            query, scale = (-query, -scale) if scale < 0 else (query * 0.0, 1.0)
    else:
        pairs, causal = allowed_pairs(call), False
        has_pairs = None if pairs is None else pairs.any(-1, keepdim=True)
        if call.bias is not None:
            # A narrower dtype would turn numbers into -inf; the kernel takes this one beside half precision.
            bias = call.bias.to(torch.promote_types(query.dtype, torch.float32))
        if pairs is not None and has_pairs is not None:
            query = _zero_where_not(has_pairs[..., 0], query)
            used = pairs.any(-2)
            key, value = _zero_where_not(used, key), _zero_where_not(used, value)
            # An empty row attends to everything inside the kernel, and is set to 0 below.
            hidden = ~pairs & has_pairs
            bias = torch.zeros((), dtype=query.dtype, device=query.device) if bias is None else bias
            bias = torch.where(hidden, -torch.inf, bias)
        if bias is not None and call.bias is not None:
            # The kernel's backward takes exp(score - logsumexp), whose digits a large bias would use up.
            largest_bias = bias.amax(-1, keepdim=True)
            bias = bias - largest_bias
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    width = max(head_dim, value_dim)
    query, key = (F.pad(x, (0, width - head_dim)) if head_dim < width else x for x in (query, key))
    value = F.pad(value, (0, width - value_dim)) if value_dim < width else value
    output, logsumexp = fused_dense(FusedDense(query, key, value, bias, causal, scale))
    output = output[..., :value_dim]
    rows = None if has_pairs is None else has_pairs.transpose(1, 2)
    result = AttentionResult(output if rows is None else torch.where(rows, output, 0.0))
    if not call.return_logsumexp:
        return result
    added = torch.zeros_like(logsumexp) if largest_bias is None else largest_bias[..., 0].transpose(1, 2)
    largest, log_sum = _exact_sum(added, logsumexp)
    if rows is not None:
        largest, log_sum = torch.where(rows[..., 0], largest, -torch.inf), torch.where(rows[..., 0], log_sum, 0.0)
    return with_normalizer(result, largest, log_sum)


def _exact_sum(bias: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    """The sum as autograd's constant, and what its rounding leaves, with the gradient (Knuth's TwoSum)."""
    total = (bias + logsumexp).detach()
    taken = total - bias
    return total, (bias - (total - taken)) + (logsumexp - taken)


def _zero_where_not(used: Tensor, rows: Tensor) -> Tensor:
    """Rows `(B, L, H, D)`, those that `used` `(B | 1, H | 1, L | 1)` names as they are, the others 0."""
    return torch.where(used.transpose(1, 2)[..., None], rows, 0.0)
