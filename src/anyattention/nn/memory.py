"""Attention to memories: the k most like a query among any number of keys with values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention._checks import Axes
from anyattention.config import MemoryAttentionConfig, MemoryBase
from anyattention.errors import InvalidInputError
from anyattention.memory.approximate import IndexedRows
from anyattention.memory.chosen import ChosenMemories, attend_to_chosen
from anyattention.memory.exact import SearchedKeys
from anyattention.memory.growing import GrowingRows
from anyattention.memory.ids import require_memories
from anyattention.memory.kept import KeptOf
from anyattention.nn.arguments import ParameterArguments, arguments_of, shown_settings, takes
from anyattention.nn.bare import initialise_projection
from anyattention.nn.base import require_factory, require_finite, require_parameter_kind
from anyattention.nn.memory_rows import (
    excluded_rows,
    over_memories,
    read_table,
    require_input,
    require_query_kind,
    without_excluded,
)
from anyattention.nn.product_memory import (
    add_product_keys,
    attend_to_slots,
    refuse_rows,
    reset_product_keys,
)
from anyattention.nn.stored_memories import StoredMemories
from anyattention.ops.arguments import weights_asked_for
from anyattention.output import AttentionOutput, MemoryOutput

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MemoryAttention"]


@dataclass(frozen=True)
class MemoryArguments(ParameterArguments, MemoryAttentionConfig, MemoryBase):
    """The arguments of `MemoryAttention`."""


class MemoryAttention(StoredMemories):
    """Attention to the k memories that are most like a query, among any number of keys with values.

        q_h = (x W_Q)_h,   chosen_h = the k memories j of the largest measure(q_h, key_j)
        output = (sum over h and chosen j of p_hj value_j) W_O,   p_h = softmax(scale measure(q_h, key_j))

    All heads share the memories, and their sums are added. The gradients to query, keys and values are those of dense
    attention in which the other memories are hidden; the choice has none.

    A memory has an id, which `append` gives and `delete` takes. With trainable=False keys and values are buffers, such
    as latent vectors that an encoder made; `forward(keys=..., values=...)` takes others in their place, with gradients
    to what made them.

    With index="product" keys are learnt: every pair of a first and a second half key, of each head its own, is a memory
    with a value, and the id of (i, j) is i sqrt(num_memories) + j. So a million memories have 2 x 1,024 half keys by
    head, and are searched exactly all the same. None can be appended or deleted, and `keys`, `values` and `exclude` of
    a call are refused; `search` and `gather` are of one head (with several, `memory.ProductKeys(half_keys[:, head])`).

    Args: the fields of `MemoryArguments`.

    Parameters, in the order of `get_parameters()`: keys `(memories, key_dim)` and values `(memories, value_dim)`
    (trainable=True), with product keys half_keys `(2, num_heads, sqrt(memories), key_dim / 2)` and values;
    query_projection, `num_heads x key_dim` outputs, and output_projection (project=True).

    Raises:
        InvalidConfigError: a setting is out of range, or is set and cannot be used.

    Cost: O(queries x num_heads x memories x key_dim) time to find the memories and O(queries x num_heads x k x (key_dim
    + value_dim)) to attend to them; memory for the chosen ones. "cosine" and "euclidean" keep a second copy of the
    keys, in float32, and so do all where the keys are of another dtype; approximate indexes keep copies of their own.
    Dense gradients of a trainable memory are as large as it is.

    Source: Weston et al., 2014 (memory networks); Lample et al., 2019 (heads that are added); Wu et al., 2022
    (Memorizing Transformers: the k nearest of many keys). Here gradients reach the keys and values that are chosen.

    Example:
        >>> memory = MemoryAttention(8, 2, value_dim=3, k=2)
        >>> ids = memory.append(torch.randn(5, 4), torch.randn(5, 3))
        >>> memory(torch.zeros(1, 7, 8)).output.shape
        torch.Size([1, 7, 8])
        >>> memory.delete(ids[:2])
        >>> memory.num_memories, memory.memory_forward(torch.zeros(3, 8)).indices.shape
        (3, torch.Size([3, 2, 2]))
    """

    supports_masking: bool = False

    @takes(MemoryArguments)
    def __init__(
        self, config: MemoryAttentionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.config = config
        require_factory(device, dtype)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        count, base = config.num_memories or 0, config.base
        if config.index == "product":
            add_product_keys(self, config, kind)
        else:
            for name, width in (("keys", config.get_key_dim()), ("values", config.get_value_dim())):
                rows = torch.empty(count, width, device=device, dtype=dtype)
                if config.trainable:
                    self.register_parameter(name, nn.Parameter(rows))
                else:
                    self.register_buffer(name, rows)
            self.register_buffer("ids", torch.arange(count, device=device))
            self.register_buffer("next_id", torch.tensor(count, dtype=torch.int64, device=device))
        if config.project:
            queries = base.num_heads * config.get_key_dim()
            self.query_projection = nn.Linear(base.d_model, queries, bias=base.use_bias, **kind)
            self.output_projection = nn.Linear(config.get_value_dim(), base.d_model, bias=base.use_bias, **kind)
        self._growing: dict[str, GrowingRows] = {}
        self._searched: KeptOf[SearchedKeys | IndexedRows] = KeptOf()
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: MemoryAttentionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module of a config, without what was appended."""
        return cls(**arguments_of(config, MemoryArguments), device=device, dtype=dtype)

    @property
    def d_model(self) -> int:
        """Width of the output: d_model, and without projections that of the values."""
        return self.config.base.d_model if self.config.project else self.config.get_value_dim()

    def reset_parameters(self) -> None:
        """As newly built: Xavier-uniform projections, biases 0, no memories but `num_memories` drawn anew."""
        if self.config.index == "product":
            reset_product_keys(self.half_keys, self.values)
        else:
            self._reset_rows()
        for projection in self.children():
            initialise_projection(projection)

    def forward(
        self,
        x: Tensor,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        exclude: Tensor | None = None,
        return_weights: bool | str = False,
    ) -> AttentionOutput:
        """Attend to the k memories most like each query.

        Args:
            x: `(batch, length, d_model)` or `(queries, d_model)`.
            keys: `(memories, key_dim)`, attended to in place of the module's own, such as an encoder's output of this
                step, which gets gradients. They are searched exactly, and their ids are their rows. With values.
            values: `(memories, value_dim)`, in place of the module's own.
            exclude: int64 `(batch, length)` or `(queries,)`: of each query the id of one memory that it does not attend
                to, such as its own; -1 is none.
            return_weights: "mean" over heads (or True), "heads", or False.

        Returns:
            AttentionOutput(output, `(..., d_model)`, without projections `(..., value_dim)`; weights, a sparse COO
            tensor, coalesced, `(..., memories)`, or by head `(batch, heads, length, memories)`, `(heads, queries,
            memories)`: its last axis is the memories by their ids). `memory_forward` has them by id.

        Raises:
            DimensionMismatchError, InvalidInputError: an argument does not fit, there is no memory, or there are fewer
                than k.
        """
        wanted = weights_asked_for(return_weights)
        output, weights, rows = self._attend(x, keys, values, exclude)
        if wanted is None:
            return AttentionOutput(output)
        count = self.num_memories if keys is None else len(keys)
        return AttentionOutput(output, over_memories(weights, rows, count, wanted == "heads"))

    def memory_forward(
        self,
        x: Tensor,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        exclude: Tensor | None = None,
    ) -> MemoryOutput:
        """`forward`, with which memories each query and head attends to.

        Args: as `forward`.

        Returns:
            MemoryOutput(output, weights `(..., num_heads, k)`, indices: ids of the same shape, the best first; -1, with
            weight 0, in a slot that an excluded memory left).
        """
        output, weights, rows = self._attend(x, keys, values, exclude)
        if keys is not None or self.config.index == "product":
            return MemoryOutput(output, weights, rows)
        return MemoryOutput(output, weights, torch.where(rows < 0, -1, self.ids[rows.clamp(min=0)]))

    def extra_repr(self) -> str:
        """The settings and the number of memories, for `print(module)`."""
        return f"{shown_settings(self.config, 'k', 'measure', 'index')}, memories={self.num_memories}"

    def _attend(
        self, x: Tensor, keys: Tensor | None, values: Tensor | None, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the weights `(..., heads, k)` and the rows of the same shape among the memories."""
        config, heads = self.config, self.config.base.num_heads
        require_input(x, config.base.d_model)
        if config.project:
            require_parameter_kind("x", x, self)
        else:
            require_query_kind(x, self.values)
        if config.index == "product":
            refuse_rows(keys=keys, values=values, exclude=exclude)
            return self._attend_by_product_keys(x)
        own_keys, own_values = keys is None, values is None
        keys, values = self._memories(keys, values)
        require_memories(len(keys), config.k)
        leading = x.shape[:-1]
        query = (self.query_projection(x) if config.project else x).reshape(-1, config.get_key_dim())
        query = query.to(keys.dtype)  # autocast has its own
        rows = self._chosen(x, query, None if own_keys else keys, exclude).view(-1, heads, config.k)
        output, weights = attend_to_chosen(
            ChosenMemories(
                query.view(-1, heads, query.shape[-1]),
                keys,
                values,
                rows,
                config.measure,
                config.get_scale(),
                dropout=config.base.dropout if self.training else 0.0,
                sparse_grad=(config.sparse_grad and own_keys, config.sparse_grad and own_values),
            )
        )
        return self._finished(output, weights, rows, leading)

    def _attend_by_product_keys(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        query = (self.query_projection(x) if config.project else x).reshape(
            -1, config.base.num_heads, config.get_key_dim()
        )
        output, weights, slots = attend_to_slots(self, query.to(self.values.dtype))
        return self._finished(output, weights, slots, x.shape[:-1])

    def _finished(
        self, output: Tensor, weights: Tensor, rows: Tensor, leading: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The projected output, and weights and rows `(..., heads, k)`."""
        config = self.config
        output = output.reshape(*leading, output.shape[-1])
        output = self.output_projection(output) if config.project else output
        if config.base.check_finite:
            require_finite(self.name, output)
        own = (*leading, config.base.num_heads, config.k)
        return output, weights.reshape(own), rows.reshape(own)

    def _memories(self, keys: Tensor | None, values: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to: the module's own, or those of a call, checked."""
        if keys is not None and values is None:
            raise InvalidInputError(argument="values", expected="a tensor, beside keys", actual="None")
        found_keys = self.keys if keys is None else read_table("keys", keys, self.keys)
        found_values = self.values if values is None else read_table("values", values, self.values)
        axes = Axes("the module", key_dim=self.config.get_key_dim(), value_dim=self.config.get_value_dim())
        axes.bind("keys", found_keys, "memories key_dim")
        axes.bind("values", found_values, "memories value_dim")
        return found_keys, found_values

    def _chosen(self, x: Tensor, query: Tensor, given_keys: Tensor | None, exclude: Tensor | None) -> Tensor:
        """The rows `(queries x heads, k)` of the memories to attend to, -1 for none."""
        k, heads = self.config.k, self.config.base.num_heads
        search = self._rows_of if given_keys is None else SearchedKeys(given_keys, self.config.measure).search
        queries = query.reshape(-1, self.config.get_key_dim())
        if exclude is None:
            return search(queries, k)
        known = self.ids if given_keys is None else torch.arange(len(given_keys), device=x.device)
        excluded = excluded_rows(exclude, x, known).repeat_interleave(heads)
        return without_excluded(search(queries, k + 1), excluded)
