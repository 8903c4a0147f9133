"""Layer normalisation whose derivatives are right in any order of forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from anyattention.ambient import is_transformed

__all__ = ["LayerNorm"]


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis.

    PyTorch's own is wrong where a backward goes through its forward derivative (`torch.func.grad` of a
    `torch.func.jvp`). Under such derivatives this one is composed of plain operations.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`(x - mean) / sqrt(variance + eps) weight + bias` of each row."""
        weight, bias = self.weight, self.bias
        if not is_transformed(input, weight, bias):
            return layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        rows = centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt() * weight + bias
        return rows.to(input.dtype)
