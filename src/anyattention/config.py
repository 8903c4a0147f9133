"""Settings of the modules: frozen, checked when made, and kept as JSON over a closed set of names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from anyattention._checks import require_number
from anyattention.errors import InvalidConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AttentionConfig",
    "Config",
    "GeometricAttentionConfig",
    "GraphAttentionConfig",
    "SparseAttentionConfig",
    "require_config",
    "require_defaults",
]

Positions = Literal["none", "sinusoidal", "learned"]
RadialBasis = Literal["gaussian", "bessel"]
SparsityPattern = Literal["local", "strided", "fixed", "global", "block", "top_k"]


class Config:
    """Base of the configs: to and from dictionaries and JSON; abstract."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, nested configs as dictionaries; only JSON's types."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # pyright: ignore[reportArgumentType]  # every subclass is a dataclass
        return {name: _to_plain(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config of a dictionary; fields that are absent keep their default.

        Raises:
            InvalidConfigError: an unknown name, a field without a default that is absent, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise InvalidConfigError(argument=cls.__name__, expected="a dictionary", actual=type(values).__name__)
        items = fields(cls)  # pyright: ignore[reportArgumentType]  # every subclass is a dataclass
        known = [item.name for item in items]
        for name in values:
            if name not in known:
                raise InvalidConfigError(
                    argument=cls.__name__,
                    expected="only the fields " + ", ".join(known),
                    actual=repr(name),
                )
        for item in items:
            if item.default is MISSING and item.default_factory is MISSING and item.name not in values:
                raise InvalidConfigError(argument=item.name, expected=f"a value, in {cls.__name__}", actual="none")
        given = dict(values)
        if "base" in given and not isinstance(given["base"], AttentionConfig):
            given["base"] = AttentionConfig.from_dict(given["base"])
        return cls(**given)

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config of a JSON object.

        Raises:
            InvalidConfigError: not JSON, an unknown name, or a value out of range.
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as fault:
            raise InvalidConfigError(f"{cls.__name__}: not valid JSON ({fault})") from fault
        return cls.from_dict(values)


@dataclass(frozen=True)
class AttentionConfig(Config):
    """Settings of dense attention, and the base of the other configs.

    Args:
        d_model: width of the features; num_heads divides it.
        num_heads: number of heads.
        dropout: probability in [0, 1) with which a weight is dropped during training.
        use_bias: whether projections have a bias.
        scale: factor of the score; None is 1 / sqrt(d_k) for dot products, 1 for additive and dynamic scores.
        max_seq_len: the longest sequence that positions encode; inert with positions="none".
        causal: a query attends to the past only; raises when a call's lengths differ.
        eps: added inside the root mean square of query/key normalisation; inert with qk_norm=False.
        positions: "none", "sinusoidal" or "learned", added to query and key before their projection.
        qk_norm: normalise each head's query and key by their root mean square, with a learned gain.
        check_finite: raise NumericalInstabilityError when an output holds NaN or Inf.

    Raises:
        InvalidConfigError: a value is out of range.

    Example:
        >>> config = AttentionConfig(d_model=64, num_heads=4)
        >>> config.d_k, config.get_scale()
        (16, 0.25)
        >>> AttentionConfig.from_json(config.to_json()) == config
        True
    """

    d_model: int = 512
    num_heads: int = 8
    dropout: float = 0.1
    use_bias: bool = True
    scale: float | None = None
    max_seq_len: int = 512
    causal: bool = False
    eps: float = 1e-6
    positions: Positions = "none"
    qk_norm: bool = False
    check_finite: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "num_heads", "max_seq_len"):
            _require_count(name, getattr(self, name))
        for name in ("use_bias", "causal", "qk_norm", "check_finite"):
            _require_bool(name, getattr(self, name))
        if self.d_model % self.num_heads:
            raise InvalidConfigError(
                argument="num_heads",
                expected=f"a divisor of d_model={self.d_model}",
                actual=self.num_heads,
                hint=f"d_model={self.num_heads * (self.d_model // self.num_heads + 1)} would do",
            )
        require_number("dropout", self.dropout, at_least=0.0, below=1.0, error=InvalidConfigError)
        require_number("eps", self.eps, above=0.0, error=InvalidConfigError)
        if self.scale is not None:
            require_number("scale", self.scale, above=0.0, error=InvalidConfigError)
        _require_choice("positions", self.positions, ("none", "sinusoidal", "learned"))

    @property
    def d_k(self) -> int:
        """Width of one head, d_model / num_heads."""
        return self.d_model // self.num_heads

    def get_scale(self) -> float:
        """`scale`, or 1 / sqrt(d_k)."""
        return 1.0 / math.sqrt(self.d_k) if self.scale is None else float(self.scale)


@dataclass(frozen=True)
class GraphAttentionConfig(Config):
    """Settings of `nn.GraphAttention`.

    Args:
        base: d_model, num_heads, dropout, use_bias, scale and check_finite; its other fields must keep their
            defaults.
        use_edge_features: whether calls bring edge features; None means: when edge_dim is given.
        edge_dim: width of the edge features.
        aggregation: "sum", "mean" or "max" of the weighted values.
        normalize: softmax over a node's edges; False gates each edge by itself with a sigmoid.
        negative_slope: of the LeakyReLU in the additive and dynamic scores.
        score: "additive" (GAT), "dynamic" (GATv2) or "dot" (graph transformer).
        in_features: width of the node features, a pair (source, target) for bipartite graphs; None is d_model.
        concat: output the heads side by side (width d_model) or their mean (width d_k).
        residual: add a linear map of the target's features to the output.

    Raises:
        InvalidConfigError: a value is out of range, or is set and cannot be used.

    Example:
        >>> GraphAttentionConfig(AttentionConfig(64, 4), edge_dim=3).use_edge_features
        True
    """

    base: AttentionConfig = field(default_factory=AttentionConfig)
    use_edge_features: bool | None = None
    edge_dim: int | None = None
    aggregation: Literal["sum", "mean", "max"] = "sum"
    normalize: bool = True
    negative_slope: float = 0.2
    score: Literal["additive", "dynamic", "dot"] = "dynamic"
    in_features: int | tuple[int, int] | None = None
    concat: bool = True
    residual: bool = False

    def __post_init__(self) -> None:
        require_config("base", self.base, AttentionConfig)
        unused = ("max_seq_len", "causal", "eps", "positions", "qk_norm")
        require_defaults(self.base, unused, "a graph has no sequence to order or to bound")
        if self.use_edge_features is None:
            object.__setattr__(self, "use_edge_features", self.edge_dim is not None)
        for name in ("use_edge_features", "normalize", "concat", "residual"):
            _require_bool(name, getattr(self, name))
        if self.edge_dim is not None:
            _require_count("edge_dim", self.edge_dim)
        if self.use_edge_features != (self.edge_dim is not None):
            raise InvalidConfigError(
                argument="edge_dim",
                expected="a width" if self.use_edge_features else "None",
                actual=self.edge_dim,
                hint=f"use_edge_features is {self.use_edge_features}",
            )
        _require_choice("aggregation", self.aggregation, ("sum", "mean", "max"))
        _require_choice("score", self.score, ("additive", "dynamic", "dot"))
        require_number("negative_slope", self.negative_slope, error=InvalidConfigError)
        if self.score == "dot":
            require_defaults(self, ("negative_slope",), "the dot product has no LeakyReLU")
        if isinstance(self.in_features, list | tuple):
            if len(self.in_features) != 2:
                raise InvalidConfigError(
                    argument="in_features",
                    expected="an int, a pair (source, target) or None",
                    actual=self.in_features,
                )
            object.__setattr__(self, "in_features", tuple(self.in_features))
            for width in self.in_features:
                _require_count("in_features", width)
        elif self.in_features is not None:
            _require_count("in_features", self.in_features)

    @property
    def source_features(self) -> int:
        """Width of the source's (key's) features."""
        widths = self.in_features
        return widths[0] if isinstance(widths, tuple) else widths or self.base.d_model

    @property
    def target_features(self) -> int:
        """Width of the target's (query's) features."""
        widths = self.in_features
        return widths[1] if isinstance(widths, tuple) else widths or self.base.d_model

    def get_scale(self) -> float:
        """`base.scale`; where that is None, 1 / sqrt(d_k) for "dot" and 1 for the other scores."""
        is_default = self.base.scale is None and self.score != "dot"
        return 1.0 if is_default else self.base.get_scale()


_USED_BY: dict[str, tuple[str, ...]] = {
    "local": ("local_window",),
    "strided": ("block_size", "local_window"),
    "fixed": ("block_size", "num_global_tokens"),
    "global": ("local_window", "num_global_tokens"),
    "block": ("block_size",),
    "top_k": ("top_k",),
}


@dataclass(frozen=True)
class SparseAttentionConfig(Config):
    """Settings of sparse attention over sequences.

    Args:
        base: the settings of dense attention; `causal` joins the pattern with "and", and `max_seq_len` is also the
            length at which `nn.SparseAttention` states its sparsity.
        sparsity_pattern: "local" (a window), "strided", "fixed", "global" (a window and global tokens), "block"
            (block-diagonal) or "top_k".
        block_size: the stride of "strided", the block of "fixed" and "block".
        local_window: keys on either side of "local" and "global", recent keys of "strided".
        num_global_tokens: summary tokens per block of "fixed" (None is 1, at most block_size); required by "global".
        top_k: keys that each query keeps; required by "top_k".

    A setting that the pattern does not use must keep its default.

    Raises:
        InvalidConfigError: a value is out of range, missing, or set and cannot be used.

    Example:
        >>> SparseAttentionConfig(sparsity_pattern="top_k", top_k=32).top_k
        32
    """

    base: AttentionConfig = field(default_factory=AttentionConfig)
    sparsity_pattern: SparsityPattern = "local"
    block_size: int = 64
    local_window: int = 128
    num_global_tokens: int | None = None
    top_k: int | None = None

    _SETTINGS: ClassVar[tuple[str, ...]] = (
        "block_size",
        "local_window",
        "num_global_tokens",
        "top_k",
    )

    def __post_init__(self) -> None:
        require_config("base", self.base, AttentionConfig)
        _require_choice("sparsity_pattern", self.sparsity_pattern, tuple(_USED_BY))
        for name in self._SETTINGS:
            value = getattr(self, name)
            if value is not None or name in ("block_size", "local_window"):
                _require_count(name, value)
        used = _USED_BY[self.sparsity_pattern]
        unused = tuple(name for name in self._SETTINGS if name not in used)
        require_defaults(self, unused, f"the pattern {self.sparsity_pattern!r} does not use it")
        if self.sparsity_pattern == "fixed" and (self.num_global_tokens or 1) > self.block_size:
            raise InvalidConfigError(
                argument="num_global_tokens",
                expected=f"at most block_size={self.block_size} with sparsity_pattern='fixed'",
                actual=self.num_global_tokens,
            )
        required = {"global": "num_global_tokens", "top_k": "top_k"}.get(self.sparsity_pattern)
        if required and getattr(self, required) is None:
            raise InvalidConfigError(
                argument=required,
                expected=f"a number with sparsity_pattern={self.sparsity_pattern!r}",
                actual=None,
            )


@dataclass(frozen=True)
class GeometricAttentionConfig(Config):
    """Settings of `nn.DistanceAttention` and `nn.EquivariantAttention`: attention between points in space.

    Args:
        base: the settings of attention. `eps`, in the positions' unit, is the least distance told apart from 0;
            sequence settings (causal, positions, max_seq_len) and qk_norm must keep their defaults.
        geometric_dim: number of coordinates.
        radius: points from this distance on are not attended to, in the positions' unit; None attends to all.
        radial_range: the distances that the radial basis covers, in the positions' unit; None is the radius. Without
            either there is no basis: scores then depend on the squared distance alone.
        radial_basis: "gaussian" or "bessel".
        num_radial: functions in the basis.
        vector_channels: vectors per point of `EquivariantAttention`, a multiple of num_heads; None is num_heads.
            `DistanceAttention` has none.

    Raises:
        InvalidConfigError: a value is out of range, or is set and cannot be used.

    Example:
        >>> GeometricAttentionConfig(geometric_dim=2, radius=1.5).radius
        1.5
    """

    base: AttentionConfig = field(default_factory=AttentionConfig)
    geometric_dim: int = 3
    radius: float | None = None
    radial_range: float | None = None
    radial_basis: RadialBasis = "gaussian"
    num_radial: int = 16
    vector_channels: int | None = None

    def __post_init__(self) -> None:
        require_config("base", self.base, AttentionConfig)
        unused = ("max_seq_len", "causal", "positions")
        require_defaults(self.base, unused, "points have no order")
        require_defaults(self.base, ("qk_norm",), "geometric attention does not use it")
        _require_count("geometric_dim", self.geometric_dim)
        for name in ("radius", "radial_range"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), above=0.0, error=InvalidConfigError)
        _require_choice("radial_basis", self.radial_basis, ("gaussian", "bessel"))
        _require_count("num_radial", self.num_radial)
        if self.get_radial_range() is None:
            require_defaults(self, ("radial_basis", "num_radial"), "a radial basis needs a radius or a radial_range")
        if self.vector_channels is not None:
            _require_count("vector_channels", self.vector_channels)
            if self.vector_channels % self.base.num_heads:
                raise InvalidConfigError(
                    argument="vector_channels",
                    expected=f"a multiple of num_heads={self.base.num_heads}",
                    actual=self.vector_channels,
                )

    def get_radial_range(self) -> float | None:
        """`radial_range`, or the radius; None where there is no radial basis."""
        return self.radius if self.radial_range is None else self.radial_range

    def get_vector_channels(self) -> int:
        """`vector_channels`, or one for each head."""
        return self.base.num_heads if self.vector_channels is None else self.vector_channels


def require_config(argument: str, config: object, kind: type[Config]) -> None:
    """Raise `InvalidConfigError` unless the argument is a config of the kind."""
    if not isinstance(config, kind):
        raise InvalidConfigError(argument=argument, expected=kind.__name__, actual=type(config).__name__)


def require_defaults(config: Config, names: tuple[str, ...], reason: str) -> None:
    """Raise `InvalidConfigError` when a setting that cannot be used differs from its default."""
    defaults = {item.name: item.default for item in fields(config)}  # pyright: ignore[reportArgumentType]  # every subclass is a dataclass
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise InvalidConfigError(
                argument=name,
                expected=f"its default {defaults[name]!r} here",
                actual=repr(getattr(config, name)),
                hint=reason,
            )


def _to_plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise InvalidConfigError(argument=name, expected="an int of at least 1 and below 2^31", actual=repr(value))


def _require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidConfigError(argument=name, expected="True or False", actual=repr(value))


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidConfigError(argument=name, expected="one of " + ", ".join(map(repr, choices)), actual=repr(value))
