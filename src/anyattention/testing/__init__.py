"""For tests: the contract of an attention module as one check, and cases that implementations share."""

from anyattention.testing.cases import DENSE_CASES, DenseCase
from anyattention.testing.contract import check_attention

__all__ = ["DENSE_CASES", "DenseCase", "check_attention"]
