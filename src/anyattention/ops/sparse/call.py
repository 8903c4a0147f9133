"""One call of sparse attention after its checks: what every implementation of it receives."""

from dataclasses import dataclass

from anyattention.ops.arguments import Arguments
from anyattention.patterns import Pattern

__all__ = ["SparseCall"]


@dataclass(frozen=True, eq=False)
class SparseCall:
    """Checked arguments of attention over a sparse pattern.

    Attributes:
        arguments: as `attend` got them.
        pattern: the arguments' pattern, one of positions.
        scale: the factor of the raw score.
    """

    arguments: Arguments
    pattern: Pattern
    scale: float
