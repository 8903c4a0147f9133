"""Settings of dense attention, the base of the others, and the parts of it that others take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from anyattention.errors import InvalidConfigError
from anyattention.settings import Config, Within, documented

__all__ = ["AttentionConfig", "Dropout", "GraphBase", "PointBase", "Positions"]

Positions = Literal["none", "sinusoidal", "learned", "rope", "alibi"]
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
