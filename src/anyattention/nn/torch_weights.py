"""Weights of `MultiHeadAttention` from `torch.nn.MultiheadAttention`, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from anyattention.errors import InvalidInputError, UnsupportedError
from anyattention.nn.bare import is_bare, is_untouched
from anyattention.settings import settings_of

if TYPE_CHECKING:
    from anyattention.nn.dense import MultiHeadAttention

__all__ = ["from_torch", "to_torch"]

_Module = TypeVar("_Module", bound="MultiHeadAttention")

_NAMES = ("query_projection", "key_projection", "value_projection")
_TORCH_FORWARD = nn.MultiheadAttention.forward
_OUTPUT = nn.modules.linear.NonDynamicallyQuantizableLinear
# What PyTorch's module has too, in its constructor.
_SHARED = ("d_model", "num_heads", "dropout", "use_bias", "kdim", "vdim")
# What changes nothing while another setting is as it is there.
_INERT = ("max_seq_len", "eps", "rope_theta", "causal", "check_finite")


def from_torch(kind: type[_Module], module: nn.MultiheadAttention) -> _Module:
    """See `MultiHeadAttention.from_torch`."""
    if not isinstance(module, nn.MultiheadAttention):
        raise InvalidInputError(
            argument="module", expected="a torch.nn.MultiheadAttention", actual=type(module).__name__
        )
    if module.bias_k is not None or module.add_zero_attn:
        raise UnsupportedError(
            "add_bias_kv and add_zero_attn: MultiHeadAttention attends to the keys it is given; "
            "interop.torch.MultiheadAttention has them",
            argument="module",
        )
    is_plain = is_untouched(module, nn.MultiheadAttention, _TORCH_FORWARD)
    if not is_plain or not is_untouched(module.out_proj, _OUTPUT, _OUTPUT.forward):
        raise UnsupportedError(
            "a torch.nn.MultiheadAttention with hooks, parametrisations, an own forward or another out_proj: what they "
            "add is no weight; interop.torch.convert keeps them",
            argument="module",
        )
    weight = module.out_proj.weight
    made = kind(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout,
        use_bias=module.in_proj_bias is not None,
        kdim=None if module.kdim == module.embed_dim else module.kdim,
        vdim=None if module.vdim == module.embed_dim else module.vdim,
        device=weight.device,
        dtype=weight.dtype,
    )
    _copy(_weights_of(module), _parameters_of(made))
    return made.train(module.training)


def to_torch(module: MultiHeadAttention, batch_first: bool) -> nn.MultiheadAttention:
    """See `MultiHeadAttention.to_torch`."""
    settings = settings_of(module.config)
    defaults = settings_of(type(module.config)(module.config.d_model, module.config.num_heads))
    others = {name: value for name, value in settings.items() if name not in (*_SHARED, *_INERT)}
    if settings["num_kv_heads"] == module.config.num_heads:
        others.pop("num_kv_heads")
    changed = [f"{name}={value!r}" for name, value in others.items() if value != defaults[name]]
    changed += [f"{name}={settings[name]!r}" for name in ("causal", "check_finite") if settings[name]]
    changed += [f"pattern={module.pattern}"] if module.pattern is not None else []
    if changed:
        raise UnsupportedError(
            f"torch.nn.MultiheadAttention has no {', '.join(changed)}; interop.torch.MultiheadAttention has patterns",
            argument=changed[0].partition("=")[0],
        )
    for name in (*_NAMES, "output_projection"):
        if not is_bare(getattr(module, name)):
            raise UnsupportedError(
                f"{name} is no plain nn.Linear any more: what replaced it is no weight of torch.nn.MultiheadAttention",
                argument=name,
            )
    weight = module.output_projection.weight
    made = nn.MultiheadAttention(
        module.config.d_model,
        module.config.num_heads,
        dropout=module.config.dropout,
        bias=module.config.use_bias,
        kdim=module.config.kdim,
        vdim=module.config.vdim,
        batch_first=batch_first,
        device=weight.device,
        dtype=weight.dtype,
    )
    _copy(_parameters_of(module), _weights_of(made))
    return made.train(module.training)


def _weights_of(module: nn.MultiheadAttention) -> list[Tensor | None]:
    """Weights of query, key, value and output, then their biases; parts of PyTorch's are views."""
    if module.in_proj_weight is None:
        weights: list[Any] = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        weights = list(module.in_proj_weight.chunk(3))
    bias = module.in_proj_bias
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [*weights, module.out_proj.weight, *biases, module.out_proj.bias]


def _parameters_of(module: MultiHeadAttention) -> list[Tensor | None]:
    projections: list[Any] = [getattr(module, name) for name in (*_NAMES, "output_projection")]
    return [each.weight for each in projections] + [each.bias for each in projections]


def _copy(source: list[Tensor | None], target: list[Tensor | None]) -> None:
    with torch.no_grad():
        for given, taken in zip(source, target, strict=True):
            if given is not None and taken is not None:
                if given.shape != taken.shape:
                    raise UnsupportedError(
                        f"a projection was replaced by one of other widths: its weight is {tuple(given.shape)}, where "
                        f"{tuple(taken.shape)} fits",
                        argument="module",
                    )
                taken.copy_(given)
