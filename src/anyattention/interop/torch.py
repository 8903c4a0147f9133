"""PyTorch's multi-head attention on this package's kernels, over any pattern: change one line, keep the weights.

`MultiheadAttention` is PyTorch's own class with another `forward`; what that cannot run, the parent's does, and
`module.explain_forward(...)` says which, and why. `convert` turns the attention of a whole model into it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from anyattention.errors import InvalidInputError, UnsupportedError
from anyattention.interop.torch_masks import Call, as_pairs, as_pattern, dense_weights
from anyattention.interop.torch_refusals import refusal_of, require_parent
from anyattention.nn.projected import check_pattern, split_heads
from anyattention.ops import attend, explain
from anyattention.ops.dispatch import Explanation
from anyattention.ops.linear_maps import linear_maps
from anyattention.patterns import Graph, Pattern, TopK

__all__ = ["MultiheadAttention", "convert"]

Model = TypeVar("Model", bound=nn.Module)


class AlwaysHooked(nn.Module):
    """Part of a `MultiheadAttention`, so that PyTorch's encoder layers call it; never called itself.

    In evaluation they read the weights of `self_attn` instead, and run a kernel that knows no pattern, unless a module
    inside of them has a hook. This one says that it has.
    """

    @property
    def _forward_hooks(self) -> OrderedDict[int, Callable[..., None]]:
        return OrderedDict({0: _no_hook})

    @_forward_hooks.setter
    def _forward_hooks(self, hooks: object) -> None: ...  # pyright: ignore[reportIncompatibleVariableOverride]  # no dict


def _no_hook(*_: object) -> None: ...


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on this package's kernels: its arguments, parameters and results, and a pattern.

    With Q = query W_q + b_q and so on, in each head:

        output = concat_h(softmax(Q_h K_h' / sqrt(head_dim) + attn_mask) V_h) W_o + b_o    over the pattern's pairs

    PyTorch's own forward runs a call that this one cannot, but not in place of a pattern; see `explain_forward`. A
    query without any key gets 0 before `out_proj`, where PyTorch's gets NaN. Dropout draws other numbers than
    PyTorch's, with the same distribution, and weights are those before dropout.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `torch.nn.MultiheadAttention`.
        pattern: which pairs exist: a pattern or TopK; None is all. A mask takes pairs away. Every query may attend to
            the keys of `add_bias_kv` and `add_zero_attn`.

    Raises:
        InvalidConfigError: `pattern` is none.

    Cost: O(batch x length x embed_dim^2) time for the projections, O(batch x pairs x embed_dim) between; memory linear
    in the lengths, and batch x query_length x key_length for weights.

    Source: Vaswani et al., 2017, section 3.2.2.

    Example:
        >>> from anyattention import Window
        >>> attention = MultiheadAttention(8, 2, batch_first=True, pattern=Window(2, 2))
        >>> output, weights = attention(*[torch.ones(1, 5, 8)] * 3)
        >>> output.shape, weights[0, 0]
        (torch.Size([1, 5, 8]), tensor([0.3333, 0.3333, 0.3333, 0.0000, 0.0000], grad_fn=<SelectBackward0>))
    """

    pattern: Pattern | TopK | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | TopK | None = None,
    ) -> None:
        check_pattern(pattern, causal=False)
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.always_hooked = AlwaysHooked()
        self.pattern = pattern

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args: as in `torch.nn.MultiheadAttention.forward`: a boolean mask is True where a pair is blocked, a float one
            is added to the scores. `is_causal=True` says that `attn_mask` is the causal mask, and is believed.

        Returns:
            The output, of the query's shape, and the weights `(batch, query_length, key_length)`, for
            `average_attn_weights=False` `(batch, heads, query_length, key_length)`; None without `need_weights`. Pairs
            outside the pattern have weight 0.

        Raises:
            AttentionError: an argument does not fit, and there is a pattern; without one PyTorch's own error comes.
        """
        call = Call(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        refusal = refusal_of(self, call)
        if refusal is not None:
            require_parent(self, refusal)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return _of_nested(self, call) if query.is_nested else _of_rows(self, call)

    def explain_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments, and why each faster one does not.

        Args, Raises: as `forward`.

        Returns:
            Explanation; its implementation is "torch.nn" where PyTorch's own forward runs.
        """
        call = Call(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        refusal = refusal_of(self, call)
        if refusal is not None:
            require_parent(self, refusal)
            return Explanation("torch.nn", (("anyattention", refusal.reason),))
        with torch.no_grad():
            return explain(**_arguments(self, _padded(self, call) if query.is_nested else call))

    def extra_repr(self) -> str:
        """The pattern, for `print(module)`."""
        return "" if self.pattern is None else f"pattern={self.pattern}"


def convert(model: Model, pattern: Pattern | TopK | None = None) -> Model:
    """Turn every `nn.MultiheadAttention` of a model into ours, in place.

    Each stays the object that it was and gets another class, so parameters, hooks, parametrisations and modes stay as
    they are, as does whatever refers to a module or a parameter, such as an optimiser.

    Args:
        model: a module that has, or is, an `nn.MultiheadAttention`.
        pattern: which pairs exist, in each of them: those of decoders that read from an encoder, too. For some alone,
            convert a part of the model. None leaves the pattern of those that are of our class already, and is all
            pairs for the others; `Full()` is all pairs for each.

    Returns:
        The model.

    Raises:
        InvalidConfigError: `pattern` is none.
        InvalidInputError: the model is none, or has no attention.
        UnsupportedError: an attention is of another subclass of `nn.MultiheadAttention`, or the object has a forward of
            its own. Nothing is converted then.

    Cost: one pass over the modules; no tensor is copied.

    Example:
        >>> from anyattention import Window
        >>> model = convert(nn.TransformerEncoderLayer(8, 2), Window(4, 4))
        >>> model.self_attn.pattern
        Window(left=4, right=4, align=None)
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(argument="model", expected="a torch.nn.Module", actual=type(model).__name__)
    check_pattern(pattern, causal=False)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if not found:
        raise InvalidInputError(
            argument="model", expected="a model with a torch.nn.MultiheadAttention", actual=type(model).__name__
        )
    kinds = [_converted_class(name, module) for name, module in found.items()]
    for module, kind in zip(found.values(), kinds, strict=True):
        if kind is not type(module):
            module.__class__ = kind
            module.always_hooked = AlwaysHooked()
        if pattern is not None:
            module.pattern = pattern  # pyright: ignore[reportArgumentType]  # of our class now
    return model


def _converted_class(name: str, module: nn.MultiheadAttention) -> type[nn.MultiheadAttention]:
    """What a module's class becomes; itself where it is of ours."""
    kind = type(module)
    if "forward" in vars(module):
        raise UnsupportedError(
            f"model: {name or 'it'} has a forward of its own, put on the object, which ours would not replace",
            argument="model",
            actual=name,
        )
    if isinstance(module, MultiheadAttention):
        return kind
    if kind is nn.MultiheadAttention:
        return MultiheadAttention
    if is_parametrized(module) and kind.__bases__ == (nn.MultiheadAttention,):
        # A class of this one module, which PyTorch made for the parametrised tensors.
        own = {key: item for key, item in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        return type(kind.__name__, (MultiheadAttention,), own)
    raise UnsupportedError(
        f"model: {name or 'it'} is a {kind.__module__}.{kind.__qualname__}, a subclass of nn.MultiheadAttention that "
        "may compute something else",
        argument="model",
        actual=name,
        hint="derive it from anyattention.interop.torch.MultiheadAttention",
    )


def _of_rows(module: MultiheadAttention, call: Call) -> tuple[Tensor, Tensor | None]:
    arguments = _arguments(module, call)
    result = attend(**arguments)
    heads, weights = result.output, None
    if result.weights is not None:
        lengths = arguments["query"].shape[1], arguments["key"].shape[1]
        weights = dense_weights(result, arguments["pattern"], *lengths, call.average_attn_weights)
    if not call.is_batched:
        heads, weights = heads[0], None if weights is None else weights[0]
    elif not module.batch_first:
        heads = heads.transpose(0, 1)
    return module.out_proj(heads.flatten(-2)), weights


def _of_nested(module: MultiheadAttention, call: Call) -> tuple[Tensor, None]:
    output, _ = _of_rows(module, _padded(module, call))
    lengths = [len(each) for each in call.query.unbind()]
    parts = [each[:length] for each, length in zip(output, lengths, strict=True)]
    return torch.nested.as_nested_tensor(parts), None


def _padded(module: MultiheadAttention, call: Call) -> Call:
    """A call of a nested tensor as one of its padded rows, whose padding is hidden; a Graph's are as many as it has."""
    query = call.query.to_padded_tensor(0.0)
    if isinstance(module.pattern, Graph) and module.pattern.num_queries > query.shape[1]:
        query = F.pad(query, (0, 0, 0, module.pattern.num_queries - query.shape[1]))
    lengths = torch.tensor([len(each) for each in call.query.unbind()], dtype=torch.int64, device=query.device)
    is_padding = torch.arange(query.shape[1], device=query.device) >= lengths[:, None]
    return replace(call, query=query, key=query, value=query, key_padding_mask=is_padding)


def _arguments(module: MultiheadAttention, call: Call) -> dict[str, Any]:
    """The arguments of `attend`."""
    heads = [split_heads(x, module.num_heads) for x in _projected(module, call)]
    if not call.is_batched:
        heads = [x[None] for x in heads]
    elif not module.batch_first:
        heads = [x.transpose(0, 1) for x in heads]
    query, key, value = heads
    extra = _extra_keys(module, key)
    if extra:
        key = torch.cat([key, *(each for each, _ in extra)], dim=1)
        value = torch.cat([value, *(each for _, each in extra)], dim=1)
    pattern, is_masked = as_pattern(module.pattern, call, [query, key], len(extra))
    mask, bias = as_pairs(call, not is_masked, pattern, query, len(extra))
    weights = "mean" if call.average_attn_weights else "heads"
    return {
        "query": query,
        "key": key,
        "value": value,
        "pattern": pattern,
        "mask": mask,
        "bias": bias,
        "dropout": float(module.dropout) if module.training else 0.0,
        "return_weights": weights if call.need_weights else False,
    }


def _projected(module: MultiheadAttention, call: Call) -> list[Tensor]:
    """Query, key and value as their projections have them; what is one tensor goes through one product."""
    query, key, value, width = call.query, call.key, call.value, module.embed_dim
    bias = module.in_proj_bias
    if not module._qkv_same_embed_dim:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    elif call.is_self_attention:
        return _maps(query, module.in_proj_weight, bias, 3)
    elif key is value:
        of_query, of_both = module.in_proj_weight.split([width, 2 * width])
        biases = (None, None) if bias is None else bias.split([width, 2 * width])
        return _maps(query, of_query, biases[0], 1) + _maps(key, of_both, biases[1], 2)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [_maps(*each, 1)[0] for each in zip((query, key, value), weights, biases, strict=True)]


def _maps(x: Tensor, weight: Any, bias: Tensor | None, parts: int) -> list[Tensor]:
    """`x weight' + bias`, cut into equal parts."""
    width = weight.shape[0] // parts
    rows = linear_maps(x.flatten(0, -2), [weight], [bias], [width] * parts)
    return [each.unflatten(0, x.shape[:-1]) for each in rows]


def _extra_keys(module: MultiheadAttention, key: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The keys and values `(batch, 1, heads, head_dim)` that come behind those of the call."""
    batch, _, heads, width = key.shape
    extra = []
    if module.bias_k is not None and module.bias_v is not None:
        learned = (split_heads(x, heads).expand(batch, 1, heads, width) for x in (module.bias_k, module.bias_v))
        extra.append(tuple(x.to(key.dtype) for x in learned))
    if module.add_zero_attn:
        extra.append((key.new_zeros((batch, 1, heads, width)),) * 2)
    return extra
