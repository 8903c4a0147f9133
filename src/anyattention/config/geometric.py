"""Settings of attention between points in space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from anyattention.config.attention import AttentionConfig, PointBase
from anyattention.errors import InvalidConfigError
from anyattention.settings import Config, Within, documented, require_defaults, require_usable

__all__ = ["GeometricAttentionConfig"]

RadialBasis = Literal["gaussian", "bessel"]


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
