"""Settings of the modules: frozen, checked when made, and kept as JSON over a closed set of names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from anyattention.errors import InvalidConfigError
from anyattention.settings import (
    Config,
    Within,
    documented,
    require_config,
    require_count,
    require_defaults,
    require_usable,
)

__all__ = [
    "AttentionConfig",
    "Config",
    "GeometricAttentionConfig",
    "GraphAttentionConfig",
    "GraphBase",
    "PointBase",
    "SparseAttentionConfig",
    "require_config",
    "require_defaults",
]

Positions = Literal["none", "sinusoidal", "learned", "rope", "alibi"]
RadialBasis = Literal["gaussian", "bessel"]
SparsityPattern = Literal["local", "strided", "fixed", "global", "block", "top_k"]
GraphScore = Literal["additive", "dynamic", "dot"]
Aggregation = Literal["sum", "mean", "max"]
Dropout = Annotated[
    float,
    Within(at_least=0.0, below=1.0),
    "probability in [0, 1) with which a weight is dropped during training",
]


@documented
@dataclass(frozen=True)
class AttentionConfig(Config):
    """Settings of dense attention, and the base of the other configs.

    Args: the fields.

    Raises:
        InvalidConfigError: a value is out of range.

    Example:
        >>> config = AttentionConfig(d_model=64, num_heads=4)
        >>> config.d_k, config.get_scale()
        (16, 0.25)
        >>> AttentionConfig.from_json(config.to_json()) == config
        True
    """

    d_model: Annotated[int, "width of all heads together; num_heads divides it"] = 512
    num_heads: Annotated[int, "number of heads, each d_k = d_model / num_heads wide"] = 8
    dropout: Dropout = 0.1
    use_bias: Annotated[bool, "whether projections have a bias"] = True
    scale: Annotated[
        float | None,
        Within(above=0.0),
        "factor of the score; None is 1 / sqrt(d_k) for products of query and key, 1 for other scores",
    ] = None
    max_seq_len: Annotated[
        int, 'the longest sequence that "sinusoidal" and "learned" positions encode; inert with the others'
    ] = 512
    causal: Annotated[bool, "a query attends to the past only; raises when a call's lengths differ"] = False
    eps: Annotated[
        float,
        Within(above=0.0),
        "added inside the root mean square of query/key normalisation, inert with qk_norm=False; between points, the "
        "least distance told apart from 0, in the positions' unit",
    ] = 1e-6
    positions: Annotated[
        Positions,
        '"sinusoidal" or "learned", added to query and key (not value) before their projection; "rope", which turns '
        'their heads by their position; "alibi", a bias by distance; or "none"',
    ] = "none"
    qk_norm: Annotated[bool, "normalise each head's query and key by their root mean square, with a learned gain"] = (
        False
    )
    check_finite: Annotated[bool, "raise NumericalInstabilityError when an output holds NaN or Inf"] = False
    num_kv_heads: Annotated[
        int | None,
        "heads of key and value, each shared by as many of the query's; a divisor of num_heads, None is num_heads",
    ] = None
    kdim: Annotated[int | None, "width of the key's features; None is d_model"] = None
    vdim: Annotated[int | None, "width of the value's features; None is d_model"] = None
    softcap: Annotated[float | None, Within(above=0.0), "c bounds the scaled score: c tanh(score / c)"] = None
    rope_theta: Annotated[float, Within(above=0.0), 'the base of the angles of "rope"; inert with other positions'] = (
        10000.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.num_heads:
            raise InvalidConfigError(
                argument="num_heads",
                expected=f"a divisor of d_model={self.d_model}",
                actual=self.num_heads,
                hint=f"d_model={self.num_heads * (self.d_model // self.num_heads + 1)} would do",
            )
        if self.num_heads % self.key_heads:
            raise InvalidConfigError(
                argument="num_kv_heads",
                expected=f"a divisor of num_heads={self.num_heads}",
                actual=self.num_kv_heads,
            )
        if self.positions == "rope" and self.d_k % 2:
            raise InvalidConfigError(
                argument="positions",
                expected="an even d_model / num_heads for 'rope', which turns pairs of channels",
                actual=self.d_k,
            )
        if self.positions in ("sinusoidal", "learned") and self.kdim not in (None, self.d_model):
            raise InvalidConfigError(
                argument="kdim",
                expected=f"d_model={self.d_model} with positions={self.positions!r}, which are added to the key",
                actual=self.kdim,
            )

    @property
    def d_k(self) -> int:
        """Width of one head, d_model / num_heads."""
        return self.d_model // self.num_heads

    @property
    def key_heads(self) -> int:
        """`num_kv_heads`, or num_heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def get_scale(self) -> float:
        """`scale`, or 1 / sqrt(d_k)."""
        return 1.0 / math.sqrt(self.d_k) if self.scale is None else float(self.scale)


_NO_SEQUENCE = {"unused": "a graph has no sequence to order or to bound"}
_NO_ORDER = {"unused": "points have no order"}
_NO_NORM = {"unused": "geometric attention does not use it"}
_NO_KEYS = {"unused": "keys and values are the same nodes' features here, in as many heads as the queries"}
_NO_CAP = {"unused": "only attention over sequences bounds its scores"}


@dataclass(frozen=True)
class GraphBase(AttentionConfig):
    """The settings of its base that graph attention takes: those that are not taken out here."""

    max_seq_len: Any = field(init=False, metadata=_NO_SEQUENCE)
    causal: Any = field(init=False, metadata=_NO_SEQUENCE)
    eps: Any = field(init=False, metadata=_NO_SEQUENCE)
    positions: Any = field(init=False, metadata=_NO_SEQUENCE)
    qk_norm: Any = field(init=False, metadata=_NO_SEQUENCE)
    num_kv_heads: Any = field(init=False, metadata=_NO_KEYS)
    kdim: Any = field(init=False, metadata=_NO_KEYS)
    vdim: Any = field(init=False, metadata=_NO_KEYS)
    softcap: Any = field(init=False, metadata=_NO_CAP)
    rope_theta: Any = field(init=False, metadata=_NO_SEQUENCE)


@dataclass(frozen=True)
class PointBase(AttentionConfig):
    """The settings of its base that attention between points takes: those that are not taken out here."""

    # A dropped pair is a jump in an energy, whose derivatives are forces.
    dropout: Dropout = 0.0
    max_seq_len: Any = field(init=False, metadata=_NO_ORDER)
    causal: Any = field(init=False, metadata=_NO_ORDER)
    positions: Any = field(init=False, metadata=_NO_ORDER)
    qk_norm: Any = field(init=False, metadata=_NO_NORM)
    num_kv_heads: Any = field(init=False, metadata=_NO_KEYS)
    kdim: Any = field(init=False, metadata=_NO_KEYS)
    vdim: Any = field(init=False, metadata=_NO_KEYS)
    softcap: Any = field(init=False, metadata=_NO_CAP)
    rope_theta: Any = field(init=False, metadata=_NO_ORDER)


@documented
@dataclass(frozen=True)
class GraphAttentionConfig(Config):
    """Settings of `nn.GraphAttention`.

    Args: the fields.

    Raises:
        InvalidConfigError: a value is out of range, or is set and cannot be used.

    Example:
        >>> GraphAttentionConfig(AttentionConfig(64, 4), edge_dim=3).use_edge_features
        True
    """

    base: Annotated[
        AttentionConfig,
        "the settings of attention; those that `nn.GraphAttention` does not take must keep their defaults",
    ] = field(default_factory=AttentionConfig)
    use_edge_features: Annotated[
        bool | None, "whether calls bring edge features; None means: when edge_dim is given"
    ] = None
    edge_dim: Annotated[int | None, "width of the edge features; given alone it is enough"] = None
    aggregation: Annotated[Aggregation, '"sum", "mean" or "max" of the weighted values'] = "sum"
    normalize: Annotated[bool, "softmax over a node's edges; False gates each edge by itself with a sigmoid"] = True
    negative_slope: Annotated[float, 'slope of the LeakyReLU in the additive and dynamic scores; not for "dot"'] = 0.2
    score: Annotated[GraphScore, '"additive" (GAT), "dynamic" (GATv2) or "dot" (graph transformer)'] = "dynamic"
    in_features: Annotated[
        int | tuple[int, int] | None,
        "width of the node features, a pair (source, target) for bipartite graphs; None is d_model",
    ] = None
    concat: Annotated[bool, "output the heads side by side (width d_model) or their mean (width d_k)"] = True
    residual: Annotated[bool, "add a linear map of the target's features to the output"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_usable(self.base, GraphBase)
        if self.use_edge_features is None:
            object.__setattr__(self, "use_edge_features", self.edge_dim is not None)
        if self.use_edge_features != (self.edge_dim is not None):
            raise InvalidConfigError(
                argument="edge_dim",
                expected="a width" if self.use_edge_features else "None",
                actual=self.edge_dim,
                hint=f"use_edge_features is {self.use_edge_features}",
            )
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
                require_count("in_features", width)
        elif self.in_features is not None:
            require_count("in_features", self.in_features)

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


@documented
@dataclass(frozen=True)
class SparseAttentionConfig(Config):
    """Settings of sparse attention over sequences.

    Args: the fields.

    A setting that the pattern does not use must keep its default.

    Raises:
        InvalidConfigError: a value is out of range, missing, or set and cannot be used.

    Example:
        >>> SparseAttentionConfig(sparsity_pattern="top_k", top_k=32).top_k
        32
    """

    base: Annotated[
        AttentionConfig,
        'the settings of dense attention; `causal` joins the pattern with "and", and `max_seq_len` is also the length '
        "at which `nn.SparseAttention` states its sparsity",
    ] = field(default_factory=AttentionConfig)
    sparsity_pattern: Annotated[
        SparsityPattern,
        '"local" (a window), "strided", "fixed", "global" (a window and global tokens), "block" (block-diagonal) or '
        '"top_k"',
    ] = "local"
    block_size: Annotated[int, 'the stride of "strided", the block of "fixed" and "block"'] = 64
    local_window: Annotated[int, 'keys on either side of "local" and "global", recent keys of "strided"'] = 128
    num_global_tokens: Annotated[
        int | None,
        'summary tokens per block of "fixed" (None is 1, at most block_size); required by "global"',
    ] = None
    top_k: Annotated[
        int | None,
        'keys that each query keeps, fewer where not as many are allowed; required by "top_k", None else',
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        used = ("base", "sparsity_pattern", *_USED_BY[self.sparsity_pattern])
        unused = tuple(item.name for item in fields(self) if item.name not in used)
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


@documented
@dataclass(frozen=True)
class GeometricAttentionConfig(Config):
    """Settings of `nn.DistanceAttention` and `nn.EquivariantAttention`: attention between points in space.

    Args: the fields.

    Raises:
        InvalidConfigError: a value is out of range, or is set and cannot be used.

    Example:
        >>> GeometricAttentionConfig(geometric_dim=2, radius=1.5).radius
        1.5
    """

    base: Annotated[
        AttentionConfig,
        "the settings of attention, dropout 0 by default; those that the layers do not take must keep their defaults",
    ] = field(default_factory=lambda: AttentionConfig(dropout=0.0))
    geometric_dim: Annotated[int, "number of coordinates"] = 3
    radius: Annotated[
        float | None,
        Within(above=0.0),
        "points from this distance on are not attended to, in the positions' unit; None attends to all",
    ] = None
    radial_range: Annotated[
        float | None,
        Within(above=0.0),
        "the distances that the radial basis covers, in the positions' unit; None is the radius. Without either there "
        "is no basis: scores then depend on the squared distance alone",
    ] = None
    radial_basis: Annotated[
        RadialBasis, '"gaussian" or "bessel", see `geometry.gaussian_basis` and `geometry.bessel_basis`'
    ] = "gaussian"
    num_radial: Annotated[int, "functions in the basis"] = 16
    vector_channels: Annotated[
        int | None,
        "vectors per point of `EquivariantAttention`, a multiple of num_heads; None is num_heads. "
        "`DistanceAttention` has none",
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_usable(self.base, PointBase)
        if self.get_radial_range() is None:
            require_defaults(self, ("radial_basis", "num_radial"), "a radial basis needs a radius or a radial_range")
        if self.vector_channels is not None and self.vector_channels % self.base.num_heads:
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
