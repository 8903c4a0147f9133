"""For tests: the contract of an attention module as one check, and cases that implementations share."""

from anyattention.testing.cases import DENSE_CASES, DenseCase
from anyattention.testing.contract import check_attention
from anyattention.testing.equivariance import assert_equivariant

__all__ = ["DENSE_CASES", "DenseCase", "assert_equivariant", "check_attention"]
