"""A bias by distance, as data: ALiBi and relative positions without a number for each pair."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anyattention._checks import describe_shape, keep_plain, require_floating
from anyattention.errors import DimensionMismatchError, InvalidConfigError
from anyattention.patterns.base import Align, check_align, diagonal_offset, require_int

__all__ = ["RelativeBias"]


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """The bias of a pair, read from a table by the distance from the query's position to the key's.

    `bias[h, i, j] = numbers[h, clamp(j - i - first, 0, distances - 1)]`, i the query's position by `align`: distances
    beyond the table's ends take the number at that end. Kernels read the table; only "reference", "torch" and a
    selection (`TopK`) spread it over all pairs.

    Args:
        numbers: `(heads, distances)`, or `(1, distances)` for all heads; floating, without -inf, trainable.
        first: the distance of the first column, negative for keys before the query.
        align: where query i stands when the lengths differ: at key i ("top_left"), or so that the last query stands
            at the last key ("bottom_right").

    Raises:
        DimensionMismatchError: `numbers` has another rank, or no distance.
        InvalidInputError: `numbers` is not floating.
        InvalidConfigError: `first` is no int, or `align` another name.

    Source: Shaw et al., 2018 (clipped distances, here a number for each instead of a vector); Press et al., 2022
    (`alibi`).

    Example:
        >>> bias = RelativeBias(torch.tensor([[-1.0, 0.0, 1.0]]), first=-1)
        >>> bias.to_dense(3, 3)[0]
        tensor([[ 0.,  1.,  1.],
                [-1.,  0.,  1.],
                [-1., -1.,  0.]])
    """

    numbers: Tensor
    first: int
    align: Align | None = None

    def __post_init__(self) -> None:
        require_floating("bias.numbers", self.numbers)
        if self.numbers.ndim != 2 or 0 in self.numbers.shape:
            raise DimensionMismatchError(
                argument="bias.numbers", expected="(heads, distances)", actual=describe_shape(self.numbers)
            )
        keep_plain(self, "first")
        # A symbol where a trace is of any length.
        if isinstance(self.first, bool) or not isinstance(self.first, int | torch.SymInt):
            raise InvalidConfigError(argument="first", expected="an int", actual=repr(self.first))
        check_align(self.align)

    @classmethod
    def alibi(
        cls,
        heads: int,
        length: int,
        *,
        align: Align | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RelativeBias:
        """Attention with linear biases: `-slope_h |j - i|`, for distances up to `length - 1`.

        The slopes are 2^(-8 h / heads), h from 1; where `heads` is no power of two, those of the power below it, then
        every second one of the power above it.

        Args:
            heads: how many heads.
            length: the longest sequence.
            align: as in the class.
            device, dtype: of the numbers; None is the default, as for a module's parameters.

        Returns:
            The bias.

        Raises:
            InvalidConfigError: a number is no int of at least 1.

        Source: Press et al., 2022, section 3.

        Example:
            >>> RelativeBias.alibi(2, 3).numbers
            tensor([[-0.1250, -0.0625,  0.0000, -0.0625, -0.1250],
                    [-0.0078, -0.0039,  0.0000, -0.0039, -0.0078]])
        """
        heads = require_int("heads", heads, 1)
        length = length if isinstance(length, torch.SymInt) else require_int("length", length, 1)
        power = 2 ** math.floor(math.log2(heads))
        exponents = [8 * (h + 1) / power for h in range(power)]
        exponents += [8 * (2 * h + 1) / (2 * power) for h in range(heads - power)]
        slopes = torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float64, device="cpu")
        distances = torch.arange(1 - length, length, device="cpu")
        numbers = slopes[:, None] * -distances.abs()
        place = torch.get_default_device() if device is None else device
        return cls(numbers.to(place, dtype or torch.get_default_dtype()), 1 - length, align)

    def at(self, query_index: Tensor, key_index: Tensor, num_queries: int, num_keys: int) -> Tensor:
        """The bias of some pairs.

        Args:
            query_index, key_index: int64, of shapes that broadcast to each other's.
            num_queries, num_keys: the lengths.

        Returns:
            `(heads, ...)` or `(1, ...)`, of the broadcast shape, differentiable.

        Raises:
            DimensionMismatchError: the lengths differ and `align` is None.
        """
        distance = key_index - query_index - diagonal_offset("bias", self.align, num_queries, num_keys)
        place = (distance - self.first).clamp(0, self.numbers.shape[1] - 1)
        # Not by indexing, whose gradient cannot be mapped over.
        return self.numbers.index_select(1, place.flatten()).unflatten(1, place.shape)

    def to_dense(self, num_queries: int, num_keys: int) -> Tensor:
        """The bias of every pair, `(heads, num_queries, num_keys)` or `(1, ...)`."""
        device = self.numbers.device
        queries, keys = torch.arange(num_queries, device=device), torch.arange(num_keys, device=device)
        return self.at(queries[:, None], keys, num_queries, num_keys)
