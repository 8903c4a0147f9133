"""A user's own score, a subclass of ours: its formula counts in every operation, or the operation refuses it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Dot, Graph, Pattern, TopK, Window, attend, explain
from anyattention.errors import UnsupportedError


@dataclass(frozen=True)
class Twice(Dot):
    """Twice the product."""

    def raw(self, query: Tensor, key: Tensor) -> Tensor:
        return 2.0 * super().raw(query, key)

    def raw_of_pairs(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        return super().raw_of_pairs(query, key, 2.0 * scale)


@pytest.mark.parametrize("pattern", [None, Causal(), Window(1, 2), Graph.all_pairs(5, 5)], ids=str)
def test_its_formula_counts(pattern: Pattern | None) -> None:
    query, key, value = (torch.randn(2, 5, 3, 4) for _ in range(3))
    assert explain(query, key, value, pattern, score=Twice()).implementation == "reference"
    found = attend(query, key, value, pattern, score=Twice()).output
    torch.testing.assert_close(found, attend(2.0 * query, key, value, pattern).output)


def test_a_selection_refuses_it() -> None:
    x = torch.randn(2, 5, 3, 4)
    with pytest.raises(UnsupportedError, match=r"score=Twice: TopK chooses by Dot\(\)"):
        attend(x, x, x, TopK(2), score=Twice())
