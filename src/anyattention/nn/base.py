"""What every attention module offers beside its forward: parameters as a vector, gradients, one plain step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention._checks import (
    describe_shape,
    no_graph,
    require_device,
    require_floating,
    require_floating_dtype,
    require_number,
    require_same_kind,
    require_tensor,
)
from anyattention.ambient import is_autocast_enabled, is_mapped
from anyattention.errors import (
    DimensionMismatchError,
    InvalidInputError,
    NumericalInstabilityError,
    TrainingError,
    UnsupportedError,
)
from anyattention.nn.bare import is_bare
from anyattention.output import AttentionCache, AttentionGradients
from anyattention.patterns import Graph
from anyattention.settings import with_meanings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AttentionModule",
    "graph_of_edges",
    "plain_parameter",
    "require_as_built",
    "require_factory",
    "require_finite",
    "require_parameter_kind",
]


class AttentionModule(nn.Module):
    """Base of all attention modules; abstract.

    Example:
        >>> from anyattention.nn import MultiHeadAttention
        >>> module = MultiHeadAttention(4, 2, use_bias=False)
        >>> module.set_parameters(torch.zeros(module.parameter_count()))
        >>> module.get_parameters().shape, module.regularization_loss(0.1).item()
        (torch.Size([64]), 0.0)
    """

    supports_masking: bool = True
    _name: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        arguments = getattr(vars(cls).get("__init__"), "arguments", None)
        if arguments is not None:
            cls.__doc__ = with_meanings(cls.__doc__, arguments)

    @property
    def name(self) -> str:
        """What errors call the module: the class's name, or one that was set. Copies keep it; config and files do not.

        Raises:
            InvalidInputError: another is set, and is no str or empty.
        """
        return self._name or type(self).__name__

    @name.setter
    def name(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise InvalidInputError(argument="name", expected="a str of at least one character", actual=repr(name))
        self._name = name

    @property
    def d_model(self) -> int:
        """Width of all heads together."""
        raise NotImplementedError

    def parameter_count(self) -> int:
        """Number of trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def get_parameters(self) -> Tensor:
        """A copy of all parameters as one flat vector, in the order of `named_parameters()`.

        Returns:
            `(parameter_count(),)`, on the first parameter's device, in the widest dtype among them.
        """
        return self._flatten(parameter.detach() for parameter in self.parameters())

    def set_parameters(self, vector: Tensor) -> None:
        """Write a vector of `get_parameters()` back, each part in its parameter's dtype and device.

        Raises:
            DimensionMismatchError: the length is not `parameter_count()`.
            InvalidInputError: not a floating-point tensor.
        """
        with torch.no_grad():
            for parameter, part in self._split("vector", vector):
                parameter.copy_(part)

    def cached_forward(self, *args: Any, **kwargs: Any) -> tuple[Any, AttentionCache]:
        """The forward, and the cache that `backward` needs.

        Args: as forward. Floating-point tensors are cut from the caller's graph and recorded by name.
        """
        given = inspect.signature(self.forward).bind(*args, **kwargs).arguments
        inputs: dict[str, Tensor] = {}
        for name, argument in given.items():
            cut = {place: self._cut(part) for place, part in _parts_of(argument).items()}
            for place, part in cut.items():
                if isinstance(part, Tensor) and part.requires_grad:
                    inputs[f"{name}{_label(place)}"] = part
            given[name] = _like(argument, cut)
        with torch.enable_grad():
            output = self(**given)
        detached = type(output)(*map(_detached, output))
        return detached, AttentionCache(inputs, output.output)

    def backward(self, grad_output: Tensor | Mapping[str, Tensor], cache: AttentionCache) -> AttentionGradients:
        """Gradients of the cached inputs and of the parameters: autograd's own, equal to `.backward()`.

        The parameters' gradients are also added to their `.grad`, as `.backward()` does, so that
        `update_parameters()` can follow. A cache may be used again.

        Args:
            grad_output: the loss's gradient by the output, of the output's shape; by type where that is.
            cache: from `cached_forward`.

        Raises:
            DimensionMismatchError: `grad_output` has another shape than the output.
            InvalidInputError: it has another dtype or device, or the cache is not one.
        """
        if not isinstance(cache, AttentionCache):
            raise InvalidInputError(
                argument="cache", expected="the AttentionCache of cached_forward", actual=type(cache).__name__
            )
        outputs, cotangents = _parts_of(cache.output), _parts_of(grad_output)
        if outputs.keys() != cotangents.keys():
            raise InvalidInputError(
                argument="grad_output",
                expected="gradients of the outputs " + ", ".join(map(repr, outputs)),
                actual=type(grad_output).__name__ if None in cotangents else ", ".join(map(repr, cotangents)),
            )
        for place, output in outputs.items():
            name, cotangent = f"grad_output{_label(place)}", cotangents[place]
            require_same_kind(name, cotangent, "the output", output)
            if cotangent.shape != output.shape:
                raise DimensionMismatchError(
                    argument=name, expected=describe_shape(output), actual=describe_shape(cotangent)
                )
        parameters = list(self.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        sources = [*cache.inputs.values(), *trained]
        # An output that nothing leads to, such as that of a type without edges, has none.
        joined = [place for place, output in outputs.items() if output.requires_grad]
        found = [torch.zeros_like(source) for source in sources]
        if joined:
            ends = [[each[place] for place in joined] for each in (outputs, cotangents)]
            found = torch.autograd.grad(ends[0], sources, ends[1], retain_graph=True, materialize_grads=True)
        inputs = dict(zip(cache.inputs, found, strict=False))
        by_parameter = dict(zip(map(id, trained), found[len(inputs) :], strict=True))
        for parameter in trained:
            gradient = by_parameter[id(parameter)]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        flat = self._flatten(by_parameter.get(id(p), torch.zeros_like(p)) for p in parameters)
        return AttentionGradients(inputs, flat)

    def update_parameters(self, gradients: AttentionGradients | Tensor | None = None, *, learning_rate: float) -> None:
        """One step of plain gradient descent: parameter -= learning_rate x gradient.

        Args:
            gradients: what `backward` returned, or its flat vector; None takes the gradients held in `.grad`.
            learning_rate: at least 0.

        Raises:
            TrainingError: None was given and no gradient is held.
            DimensionMismatchError: the vector's length is not `parameter_count()`.
        """
        learning_rate = require_number("learning_rate", learning_rate, at_least=0.0)
        if isinstance(gradients, AttentionGradients):
            gradients = gradients.parameters
        if gradients is None and all(parameter.grad is None for parameter in self.parameters()):
            raise TrainingError(
                "update_parameters: no gradients are held; call loss.backward() or module.backward(...) first",
                argument="gradients",
            )
        with torch.no_grad():
            if gradients is not None:
                for parameter, part in self._split("gradients", gradients):
                    parameter -= learning_rate * part.to(parameter)
            else:
                for parameter in self.parameters():
                    if parameter.grad is not None:
                        parameter -= learning_rate * parameter.grad

    def regularization_loss(self, l2_weight: float) -> Tensor:
        """`l2_weight` times the sum of the squared parameters; 0-d, at least float32, differentiable."""
        l2_weight = require_number("l2_weight", l2_weight, at_least=0.0)
        device = next((parameter.device for parameter in self.parameters()), "cpu")
        total = torch.zeros((), dtype=torch.float32, device=device)
        for parameter in self.parameters():
            # A sum of squares leaves float16's range soon.
            total = total + parameter.to(torch.promote_types(parameter.dtype, torch.float32)).square().sum()
        return l2_weight * total

    def clone(self) -> Self:
        """An independent copy, without gradients."""
        twin = copy.deepcopy(self)
        twin.zero_grad(set_to_none=True)
        return twin

    def _split(self, argument: str, vector: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        require_floating(argument, vector)
        if vector.shape != (self.parameter_count(),):
            raise DimensionMismatchError(
                argument=argument,
                expected=f"(parameter_count={self.parameter_count()},)",
                actual=describe_shape(vector),
            )
        parameters = list(self.parameters())
        parts = vector.detach().split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            yield parameter, part.reshape(parameter.shape)

    def _flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        flat = [(tensor.to_dense() if tensor.is_sparse else tensor).reshape(-1) for tensor in tensors]
        if not flat:
            return torch.zeros(0, dtype=torch.float32, device="cpu")
        return torch.cat([part.to(flat[0].device) for part in flat])

    @staticmethod
    def _cut(argument: Any) -> Any:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            return argument.detach().requires_grad_()
        return argument


def _parts_of(argument: Any) -> dict[Any, Any]:
    """The parts of a pair or of a dictionary, by place or key; anything else is one part, at None."""
    if isinstance(argument, Mapping):
        return dict(argument)
    return dict(enumerate(argument)) if isinstance(argument, tuple | list) else {None: argument}


def _like(argument: Any, parts: dict[Any, Any]) -> Any:
    """Parts put together as those of an argument were."""
    if isinstance(argument, Mapping):
        return parts
    return tuple(parts.values()) if isinstance(argument, tuple | list) else parts[None]


def _label(place: Any) -> str:
    return "" if place is None else f"[{place!r}]"


def _detached(result: Any) -> Any:
    parts = _parts_of(result)
    return _like(result, {place: part.detach() if isinstance(part, Tensor) else part for place, part in parts.items()})


def require_as_built(argument: str, given: object, setting: str, value: object, expected: str) -> None:
    """Raise InvalidInputError unless a tensor is there exactly where the module was built with a setting."""
    if (given is None) != (value is None):
        raise InvalidInputError(
            argument=argument,
            expected=f"None: the module was built without {setting}" if value is None else expected,
            actual="None" if given is None else "a tensor",
        )


def require_factory(device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise unless parameters can have the device's name and the dtype."""
    if dtype is not None:
        require_floating_dtype("dtype", dtype)
    try:
        torch.empty(0, dtype=torch.uint8, device="cpu" if device is None else torch.device(device))
    except (AssertionError, RuntimeError, TypeError) as refusal:
        raise InvalidInputError(argument="device", expected="a device that is here", actual=repr(device)) from refusal


def require_parameter_kind(argument: str, tensor: Tensor, module: nn.Module) -> None:
    """Raise unless a tensor has the parameters' device, and their dtype where autocast does not see to that.

    The parameters are the module's own and those of bare projections; what else stands in a projection's place knows by
    itself what it takes.
    """
    parameter = plain_parameter(module)
    if parameter is None:
        return
    require_device(argument, tensor, parameter.device, "the parameters")
    if tensor.dtype != parameter.dtype and not is_autocast_enabled(tensor.device):
        raise InvalidInputError(
            argument=argument, expected=f"{parameter.dtype}, as the parameters", actual=tensor.dtype
        )


def plain_parameter(module: nn.Module) -> Tensor | None:
    """The first of a module's own parameters, or else of its bare projections' weights."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return own[0] if own else next((child.weight for child in module.children() if is_bare(child)), None)


def graph_of_edges(edge_index: object, num_queries: int, num_keys: int, device: torch.device, named_by: str) -> Graph:
    """The Graph of an edge_index that a caller gives in place of one, checked."""
    if not isinstance(edge_index, Tensor):
        raise no_graph("graph", edge_index, "a Graph or an edge_index")
    require_tensor("graph", edge_index)
    require_device("graph", edge_index, device, named_by)
    return Graph.from_edge_index(edge_index, num_queries=num_queries, num_keys=num_keys)


def require_finite(module: str, output: Tensor) -> None:
    """Raise `NumericalInstabilityError` when the output holds a NaN or an Inf."""
    if is_mapped(output):
        raise UnsupportedError(f"{module}: under vmap no number can be read, as check_finite=True asks for")
    finite = output.isfinite()
    if not finite.all():
        raise NumericalInstabilityError(
            argument=f"{module} output",
            expected="finite numbers (check_finite=True)",
            actual=f"{int((~finite).sum())} NaN or Inf among {output.numel()}",
        )
