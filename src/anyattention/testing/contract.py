"""The contract that every attention module keeps, as one check that names what is broken."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from anyattention import interfaces
from anyattention.errors import DimensionMismatchError, TrainingError
from anyattention.output import AttentionOutput
from anyattention.patterns import Causal, Full, Graph, Pattern
from anyattention.saving import load, save

__all__ = ["check_attention"]

# A method that only modules of this kind have, so that a module which has it claims the whole interface.
_CLAIMS = {
    "graph_forward": interfaces.GraphAttention,
    "sparsity_ratio": interfaces.SparseAttention,
    "geometric_forward": interfaces.GeometricAttention,
}


def check_attention(module: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Check that an attention module keeps the contract of this package; return nothing when it does.

    Held are: the Protocols of `anyattention.interfaces` that it claims; output and weights (shape, dtype, finite,
    repeatable, a softmax row sums to 1, inputs left alone); parameters as a vector and back, in another dtype too;
    `cached_forward` and `backward` against autograd's own gradients; `update_parameters`, `zero_grad`,
    `regularization_loss`, `clone`; the config through JSON; and, for this package's own modules, `save` and `load`.

    Args:
        module: in any mode; copies of it are checked, in evaluation mode, and it stays as it is.
        inputs, kwargs: one call of the module, small and finite: `module(*inputs, **kwargs)`.

    Raises:
        AssertionError: names the check, what was expected and what came.

    Cost: about ten calls forward and four backward.

    Example:
        >>> from anyattention.nn import MultiHeadAttention
        >>> check_attention(MultiHeadAttention(8, 2), torch.randn(2, 3, 8), torch.randn(2, 5, 8))
        >>> class Forgetful(MultiHeadAttention):
        ...     def zero_grad(self, set_to_none=True):
        ...         pass
        >>> check_attention(Forgetful(8, 2), torch.randn(2, 3, 8))
        Traceback (most recent call last):
        AssertionError: Forgetful, zero_grad: query_projection.weight still holds a gradient
    """
    # By position, whichever way they came: the first one says how many queries there are.
    call = inspect.signature(module.forward).bind(*inputs, **kwargs)
    inputs, kwargs = call.args, call.kwargs
    for check in _CHECKS:
        label = f"{type(module).__name__}, {check.__name__.removeprefix('_check_')}"
        try:
            check(copy.deepcopy(module).eval(), inputs, kwargs)
        except _BrokenPromise as broken:
            raise AssertionError(f"{label}: {broken}") from None
        except Exception as fault:
            raise AssertionError(f"{label}: raised {type(fault).__name__}: {fault}") from fault


class _BrokenPromise(Exception):
    """What a check found; the text says it all."""


def _check_interfaces(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    claimed = [kind for member, kind in _CLAIMS.items() if hasattr(type(module), member)]
    for kind in (interfaces.Attention, interfaces.TrainableAttention, *claimed):
        missing = [member for member in dir(kind) if not member.startswith("_") and not hasattr(module, member)]
        _require(isinstance(module, kind), f"{kind.__name__} also needs {', '.join(missing)}")
    _require(isinstance(module.name, str) and bool(module.name), f"name is {module.name!r}")
    _require(isinstance(module.d_model, int) and module.d_model > 0, f"d_model is {module.d_model!r}")
    _require(isinstance(module.supports_masking, bool), f"supports_masking is {module.supports_masking!r}")


def _check_output(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    before = [x.detach().clone() for x in _floating_inputs(module, inputs, kwargs).values()]
    result = module(*inputs, **kwargs)
    _require(isinstance(result, AttentionOutput), f"a call returns {type(result).__name__}, not AttentionOutput")
    for old, (name, new) in zip(before, _floating_inputs(module, inputs, kwargs).items(), strict=True):
        _require_same_bits(f"the input {name}", old, new.detach(), "after the call")
    output, query = result.output, _query(inputs)
    config = getattr(module, "config", None)
    width = module.d_model if getattr(config, "concat", True) else module.d_model // module.num_graph_heads
    shape = (*query.shape[:-1], width)
    _require(tuple(output.shape) == shape, f"the output's shape is {tuple(output.shape)}, not {shape}")
    _require(output.dtype == query.dtype, f"the output is {output.dtype}, the query {query.dtype}")
    _require(bool(output.isfinite().all()), "the output is not finite")
    _require_same_bits("the output", output, module(*inputs, **kwargs).output, "in a second call")


def _check_weights(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if "return_weights" not in inspect.signature(module.forward).parameters:
        return
    by_kind = {kind: module(*inputs, **{**kwargs, "return_weights": kind}) for kind in (False, True, "mean", "heads")}
    _require(by_kind[False].weights is None, "return_weights=False returns weights")
    for kind in (True, "mean", "heads"):
        _require(by_kind[kind].weights is not None, f"return_weights={kind!r} returns None")
        _require_close(f"the output with return_weights={kind!r}", by_kind[kind].output, by_kind[False].output)
    # Those of chosen keys are sparse tensors.
    one, mean, heads = (by_kind[kind].weights.to_dense() for kind in (True, "mean", "heads"))
    graph = _graph(module, (*inputs, *kwargs.values()))
    _require_close("the mean weights", mean, heads.mean(-3 if graph is None else -1))
    _require_same_bits("the weights", one, mean, "with return_weights='mean'")
    _require(bool(((heads >= 0) & (heads <= 1 + 1e-3)).all()), "a weight is outside [0, 1]")
    if not getattr(getattr(module, "config", None), "normalize", True):
        return
    if graph is None:
        sums = heads.sum(-1)
    else:
        shape = (*heads.shape[:-2], graph.num_queries, heads.shape[-1])
        sums = heads.new_zeros(shape).index_add(-2, graph.query_index, heads)
    # A query that may attend to nothing has only zeros.
    _require_close("the sum of a row's weights", sums, torch.where(sums == 0, 0.0, 1.0).to(sums))


def _check_parameters(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    vector, count = module.get_parameters(), module.parameter_count()
    _require(count == sum(x.numel() for x in module.parameters()), f"parameter_count() is {count}")
    _require(tuple(vector.shape) == (count,), f"get_parameters() has the shape {tuple(vector.shape)}, not ({count},)")
    _require_same_bits("get_parameters()", vector, _flat(module.parameters(), vector), "flattened parameters")
    original = copy.deepcopy(module)
    for written in (vector, vector.to(torch.float64)):
        vector_before = written.clone()
        module.set_parameters(torch.flip(written, (0,)) + 1)
        _require_same_bits(
            "get_parameters()", module.get_parameters(), (torch.flip(written, (0,)) + 1).to(vector), "what was set"
        )
        module.set_parameters(written)
        _require_same_bits("set_parameters' argument", written, vector_before, "after the call")
        for (name, one), other in zip(original.named_parameters(), module.parameters(), strict=True):
            _require_same_bits(f"set_parameters(get_parameters()): {name}", one, other, "afterwards")
    if count:
        taken = module.get_parameters()
        taken += 1
        _require_same_bits("get_parameters()", vector, module.get_parameters(), "after its last result was changed")
    _require_raises(DimensionMismatchError, "set_parameters(a vector too long)", module.set_parameters, _longer(vector))


def _check_backward(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = inspect.signature(module.forward).bind(*inputs, **kwargs)
    leaves: dict[str, Tensor] = {}
    for name, argument in arguments.arguments.items():
        arguments.arguments[name] = _as_leaves(name, argument, leaves)
    output = module(*arguments.args, **arguments.kwargs).output
    cotangent = _random_like(output)
    output.backward(cotangent)
    by_autograd = _flat((_gradient(x) for x in module.parameters()), module.get_parameters())

    twin = copy.deepcopy(module)
    twin.zero_grad()
    result, cache = twin.cached_forward(*inputs, **kwargs)
    _require_close("cached_forward's output", result.output, output)
    gradients = twin.backward(cotangent, cache)
    names = set(gradients.inputs)
    _require(names == set(leaves), f"backward has gradients of {sorted(names)}, not of {sorted(leaves)}")
    for name, leaf in leaves.items():
        _require_close(f"backward's gradient of {name}", gradients.inputs[name], _gradient(leaf))
    _require_close("backward's gradient of the parameters", gradients.parameters, by_autograd)
    held = _flat((_gradient(x) for x in twin.parameters()), module.get_parameters())
    _require_close("the gradient held after backward", held, by_autograd)
    wrong = cotangent[..., :-1]
    _require_raises(DimensionMismatchError, "backward(a gradient of another shape)", twin.backward, wrong, cache)


def _check_update_parameters(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _, cache = module.cached_forward(*inputs, **kwargs)
    before = module.get_parameters()
    if len(before):
        module.zero_grad()
        step = "update_parameters without gradients"
        _require_raises(TrainingError, step, module.update_parameters, learning_rate=0.1)
    cotangent = _random_like(cache.output)
    gradients = module.backward(cotangent, cache)
    expected = before - 0.1 * gradients.parameters
    for label, given in (("held", None), ("returned", gradients), ("given as a vector", gradients.parameters)):
        if len(before) == 0 and given is None:
            continue
        module.set_parameters(before)
        module.update_parameters(given, learning_rate=0.1)
        _require_close(f"a step of 0.1 along the gradients {label}", module.get_parameters(), expected)
    long = _longer(before)
    step = "update_parameters(a vector too long)"
    _require_raises(DimensionMismatchError, step, module.update_parameters, long, learning_rate=0.1)


def _check_zero_grad(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.zero_grad()
    for name, parameter in module.named_parameters():
        is_gone = parameter.grad is None or bool((parameter.grad == 0).all())
        _require(is_gone, f"{name} still holds a gradient")


def _check_regularization_loss(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    loss = module.regularization_loss(0.3)
    vector = module.get_parameters()
    expected = 0.3 * vector.double().square().sum()
    _require(loss.ndim == 0, f"its shape is {tuple(loss.shape)}, not ()")
    _require_close("0.3 times the sum of squares", loss.detach().to(vector), expected.to(vector))
    if len(vector) == 0:
        return
    loss.backward()
    gradient = _flat((_gradient(x) for x in module.parameters()), vector)
    trained = _flat((torch.full_like(x, x.requires_grad) for x in module.parameters()), vector)
    _require_close("its gradient", gradient, 0.6 * vector * trained)


def _check_clone(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    twin = module.clone()
    _require(type(twin) is type(module), f"it is a {type(twin).__name__}")
    output = module(*inputs, **kwargs).output
    _require_same_bits("its output", twin(*inputs, **kwargs).output, output, "the module's")
    before = module.get_parameters()
    for (name, one), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        _require(other.grad is None or not other.grad.any(), f"it holds the gradient of {name}")
        with torch.no_grad():
            other += 1
        _require(one.grad is not None and bool((one.grad == 1).all()), f"the module lost the gradient of {name}")
    _require_same_bits("the module's parameters", before, module.get_parameters(), "after its clone changed")


def _check_config(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not hasattr(module, "config"):
        return
    config = module.config
    for way, back in (
        ("from_json(to_json())", type(config).from_json(config.to_json())),
        ("from_dict(to_dict())", type(config).from_dict(config.to_dict())),
    ):
        _require(back == config, f"{way} is {back}, not {config}")
    rebuilt = type(module).from_config(config)
    _require(rebuilt.config == config, f"from_config(config).config is {rebuilt.config}, not {config}")
    ours, theirs = ({name: tuple(x.shape) for name, x in part.named_parameters()} for part in (module, rebuilt))
    _require(ours == theirs, f"from_config(config) has the parameters {theirs}, not {ours}")


def _check_saving(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # A folder names one of this package's modules; others bring their own way. A pattern that was given is not saved.
    if type(module).__module__.partition(".")[0] != "anyattention" or vars(module).get("pattern") is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        save(module, folder)
        loaded = load(folder)
    _require(type(loaded) is type(module), f"load(save()) is a {type(loaded).__name__}")
    _require(loaded.config == module.config, f"load(save()).config is {loaded.config}, not {module.config}")
    for (name, one), other in zip(module.named_parameters(), loaded.cpu().parameters(), strict=True):
        _require_same_bits(f"load(save()): {name}", one.cpu(), other, "the module's")
    loaded = loaded.to(_query(inputs).device)
    output = module(*inputs, **kwargs).output
    _require_same_bits("the output of load(save())", loaded(*inputs, **kwargs).output, output, "the module's")


_CHECKS: tuple[Callable[[Any, tuple[Any, ...], dict[str, Any]], None], ...] = (
    _check_interfaces,
    _check_output,
    _check_weights,
    _check_parameters,
    _check_backward,
    _check_update_parameters,
    _check_zero_grad,
    _check_regularization_loss,
    _check_clone,
    _check_config,
    _check_saving,
)


def _floating_inputs(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, argument in inspect.signature(module.forward).bind(*inputs, **kwargs).arguments.items():
        is_pair = isinstance(argument, tuple | list)
        for position, part in enumerate(argument if is_pair else (argument,)):
            if isinstance(part, Tensor) and part.is_floating_point():
                found[f"{name}[{position}]" if is_pair else name] = part
    return found


def _as_leaves(name: str, argument: Any, leaves: dict[str, Tensor]) -> Any:
    """The argument with its floating-point tensors made leaves, which `leaves` gets by name."""
    if isinstance(argument, tuple | list):
        return tuple(_as_leaves(f"{name}[{position}]", part, leaves) for position, part in enumerate(argument))
    if isinstance(argument, Tensor) and argument.is_floating_point():
        leaves[name] = argument.detach().clone().requires_grad_()
        return leaves[name]
    return argument


def _query(inputs: tuple[Any, ...]) -> Tensor:
    """The first input; of a pair (source, target) the target, which asks."""
    return inputs[0][-1] if isinstance(inputs[0], tuple | list) else inputs[0]


def _graph(module: Any, inputs: tuple[Any, ...]) -> Graph | None:
    """The graph of a call, which may be a pattern's or an edge_index; None for dense attention."""
    pattern = getattr(module, "pattern", None)
    if isinstance(pattern, Pattern) and not isinstance(pattern, Full | Causal):
        query, key = _query(inputs), next((x for x in inputs[1:2] if x is not None), inputs[0])
        pattern = pattern & Causal() if getattr(module.config, "causal", False) else pattern
        return pattern.to_graph(query.shape[1], key.shape[1], device=query.device)
    for argument in inputs[1:]:
        if isinstance(argument, Graph):
            return argument
        if isinstance(argument, Tensor) and argument.dtype == torch.int64:
            source = inputs[0][0] if isinstance(inputs[0], tuple | list) else inputs[0]
            sizes = {"num_queries": _query(inputs).shape[-2], "num_keys": source.shape[-2]}
            return Graph.from_edge_index(argument, **sizes)
    return None


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.to_dense()


def _flat(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    parts = [tensor.detach().reshape(-1).to(like) for tensor in tensors]
    return torch.cat(parts) if parts else like.new_zeros(0)


def _longer(vector: Tensor) -> Tensor:
    return torch.cat([vector, vector.new_zeros(1)])


def _random_like(tensor: Tensor) -> Tensor:
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    return drawn.to(tensor)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise _BrokenPromise(message)


def _require_close(what: str, actual: Tensor, expected: Tensor) -> None:
    """Raise unless two tensors agree to rounding errors that add up over a few hundred terms."""
    tolerance = 64 * torch.finfo(expected.dtype).eps
    try:
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    except AssertionError as difference:
        raise _BrokenPromise(f"{what} is wrong. {difference}") from None


def _require_same_bits(what: str, one: Tensor, other: Tensor, which: str) -> None:
    is_same = one.dtype == other.dtype and torch.equal(one, other)
    _require(is_same, f"{what} ({one.dtype}, {tuple(one.shape)}) differs from {which}")


def _require_raises(error: type[Exception], what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except error:
        return
    raise _BrokenPromise(f"{what} raises no {error.__name__}")
