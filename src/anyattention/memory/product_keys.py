"""Product keys as an index: n x n memories that two times n half keys stand for."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from anyattention._checks import Axes, describe_shape, require_count, require_floating
from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.ops.product_keys import product_key_search
from anyattention.output import SearchResult

__all__ = ["ProductKeys"]


class ProductKeys:
    """The n x n memories whose keys are the pairs of n first and n second half keys.

        key of id i n + j = (first[i], second[j]),  score = q . key

    A search is exact, and takes O(n) per query where one of n x n separate keys takes O(n^2). The half keys are read
    where they are: a step of an optimizer on them needs no rebuilding. Memories come and go with the half keys alone,
    so that none can be appended or deleted.

    Args:
        half_keys: `(2, n, key_dim / 2)`.

    Raises:
        DimensionMismatchError, InvalidInputError: they have another shape or dtype.

    Source: Lample et al., 2019, "Large Memory Layers with Product Keys".

    Example:
        >>> import torch
        >>> index = ProductKeys(torch.tensor([[[0.0], [1.0]], [[0.0], [2.0]]]))
        >>> len(index), index.key_dim
        (4, 2)
        >>> index.search(torch.ones(1, 2), k=2)
        SearchResult(ids=tensor([[3, 1]]), scores=tensor([[3., 2.]]))
        >>> index.gather(torch.tensor([3, -1]))
        tensor([[1., 2.],
                [0., 0.]])
    """

    def __init__(self, half_keys: Tensor) -> None:
        require_floating("half_keys", half_keys)
        if half_keys.ndim != 3 or len(half_keys) != 2 or 0 in half_keys.shape:
            raise DimensionMismatchError(
                argument="half_keys", expected="(2, n, key_dim / 2)", actual=describe_shape(half_keys)
            )
        self.half_keys = half_keys

    @property
    def key_dim(self) -> int:
        """Width of the keys."""
        return 2 * self.half_keys.shape[2]

    def __len__(self) -> int:
        return self.half_keys.shape[1] ** 2

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """Ids and scores `(queries, k)` of queries `(queries, key_dim)`, the best first; of equal ones the lowest id.

        -1 and -inf where there are fewer memories than k.
        """
        require_floating("queries", queries)
        Axes("the index", key_dim=self.key_dim).bind("queries", queries, "queries key_dim")
        k = require_count("k", k, at_least=1)
        found = min(k, len(self))
        ids, scores = product_key_search(
            queries.detach().to(self.half_keys.dtype)[:, None], self.half_keys.detach()[:, None], k=found
        )
        missing = (0, k - found)
        return SearchResult(
            torch.nn.functional.pad(ids[:, 0], missing, value=-1),
            torch.nn.functional.pad(scores[:, 0], missing, value=-math.inf),
        )

    def gather(self, ids: Tensor) -> Tensor:
        """The keys `(..., key_dim)` of ids `(...)`, with gradients to the half keys; an id of -1 has zeros.

        Raises:
            InvalidInputError: an id that is not there.
        """
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            actual = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise InvalidInputError(argument="ids", expected="a tensor of torch.int64", actual=actual)
        if bool(((ids < -1) | (ids >= len(self))).any()):
            raise InvalidInputError(argument="ids", expected=f"-1, or ids below {len(self)}", actual="others")
        n, places = self.half_keys.shape[1], ids.clamp(min=0)
        keys = torch.cat([self.half_keys[0][places // n], self.half_keys[1][places % n]], dim=-1)
        return torch.where((ids >= 0).unsqueeze(-1), keys, 0.0)

    def append(self, keys: Tensor) -> NoReturn:
        """Raises UnsupportedError: every pair of half keys is a memory already."""
        raise UnsupportedError("product keys: every pair of half keys is a memory, and none can be appended")

    def delete(self, ids: Tensor) -> NoReturn:
        """Raises UnsupportedError: a memory goes with its half keys alone."""
        raise UnsupportedError("product keys: every pair of half keys is a memory, and none can be deleted")
