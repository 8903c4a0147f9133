"""One call of sparse attention after its checks: what every implementation of it receives."""

from dataclasses import dataclass

from anyattention.ops.arguments import Arguments

__all__ = ["SparseCall"]


@dataclass(frozen=True, eq=False)
class SparseCall:
    """Checked arguments of attention over a sparse pattern.

    Attributes:
        arguments: as `attend` got them; the pattern is one of positions.
        scale: the factor of the raw score.
    """

    arguments: Arguments
    scale: float
