"""Rows at the beginning of a larger tensor: as more come, each is copied a few times in all."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattention.ambient import lasting
from anyattention.native import available, large_empty

__all__ = ["GrowingRows"]


class GrowingRows:
    """Rows that more can be appended to, in memory for half as many again.

    Args:
        rows: `(count, ...)`; they are read where they lie, until the first are appended.

    Example:
        >>> growing = GrowingRows(torch.zeros(2, 3))
        >>> growing.append(torch.ones(4, 3)).shape, growing.keep(torch.tensor([0, 5])).sum()
        (torch.Size([6, 3]), tensor(3.))
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = self._whole = rows

    def append(self, more: Tensor) -> Tensor:
        """The rows, with more behind them, in the dtype and on the device of the first."""
        count, total = len(self.rows), len(self.rows) + len(more)
        with lasting(), torch.no_grad():
            # In memory that processes share, another one may append behind the same rows.
            if total > len(self._whole) or self._whole is self.rows or self._whole.is_shared():
                shape = (max(total, count + count // 2), *self.rows.shape[1:])
                whole = large_empty(self.rows, shape) if _may_be_large(self.rows) else self.rows.new_empty(shape)
                whole[:count] = self.rows.detach()
                self._whole = whole
            self._whole[count:total] = more.detach()
            self.rows = self._whole[:total]
        return self.rows

    def keep(self, places: Tensor) -> Tensor:
        """The rows at some places, in a tensor of their own."""
        with lasting(), torch.no_grad():
            self.rows = self._whole = self.rows.detach().index_select(0, places)
        return self.rows


def _may_be_large(rows: Tensor) -> bool:
    return rows.is_cpu and available()
