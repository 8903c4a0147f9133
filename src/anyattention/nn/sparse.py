"""Sparse attention: multi-head attention over part of a sequence's pairs, given by the config or by a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyattention.bias import RelativeBias
from anyattention.config import AttentionConfig, SparseAttentionConfig
from anyattention.errors import DimensionMismatchError
from anyattention.nn.arguments import ImplementationArgument, ParameterArguments, arguments_of, shown_settings, takes
from anyattention.nn.projected import ProjectedAttention
from anyattention.ops import explain
from anyattention.ops.dispatch import Explanation
from anyattention.output import AttentionOutput
from anyattention.patterns import Causal, Fixed, Global, Graph, Pattern, Strided, TopK, Window

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SparseAttention"]


@dataclass(frozen=True)
class SparseArguments(ParameterArguments, ImplementationArgument, SparseAttentionConfig, AttentionConfig):
    """The arguments of `SparseAttention`."""


class SparseAttention(ProjectedAttention):
    """Multi-head attention in which each query attends to the keys that a pattern of positions allows.

    `output = concat_h(softmax(Q_h K_h' scale + bias) V_h) W_O`, each softmax over the query's pairs: as
    `MultiHeadAttention`, whose parameters have the same names and order. The patterns, joined by `Causal()` with "and"
    where `causal`:

        local    Window(local_window, local_window)
        strided  Strided(block_size, local_window)
        fixed    Fixed(block_size, num_global_tokens or 1)
        global   Window(local_window, local_window) | Global(num_global_tokens)
        block    Fixed(block_size, 0): the sequence cut into blocks, each attending to itself
        top_k    TopK(top_k): in each head, the keys of the query's largest scores

    Args: the fields of `SparseArguments`.

    Parameters, in the order of `get_parameters()`: position_embedding `(max_seq_len, d_model)` (positions="learned"),
    query_projection, key_projection, value_projection, output_projection (weight `(d_model, d_model)`, then bias),
    query_norm, key_norm `(d_k,)` (qk_norm=True).

    Raises:
        InvalidConfigError: a setting is out of range, or is set and the pattern does not use it.

    Cost: O(batch x length x d_model^2) for the projections, O(batch x pairs x d_model) between; with "top_k" every
    pair's score is computed, O(batch x length^2 x d_model), and the scores of some keys at a time kept.

    Source: Child et al., 2019 ("strided", "fixed"); Beltagy et al., 2020 ("local", "global"); Gupta et al., 2021
    ("top_k"). Here every head has the whole pattern, where Child et al. may give each head a part.

    Example:
        >>> attention = SparseAttention(8, 2, local_window=1)
        >>> output, weights = attention(torch.zeros(1, 4, 8), return_weights=True)
        >>> output.shape, weights.shape  # each query and its neighbours: 2 + 3 + 3 + 2 pairs
        (torch.Size([1, 4, 8]), torch.Size([1, 10]))
        >>> attention.max_attended_positions
        3
    """

    @takes(SparseArguments)
    def __init__(
        self,
        config: SparseAttentionConfig,
        implementation: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        pattern = _pattern_of(config)
        super().__init__(config.base, device, dtype)
        self.config = config
        self.implementation = implementation
        self._pattern = pattern

    @classmethod
    def from_config(
        cls,
        config: SparseAttentionConfig,
        *,
        implementation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module of a config."""
        settings = arguments_of(config, SparseArguments)
        return cls(**settings, implementation=implementation, device=device, dtype=dtype)

    @property
    def pattern(self) -> Pattern | TopK:
        """Which pairs `forward` attends over, `causal` included; for "top_k" the selection."""
        return self._pattern

    @property
    def sparsity_ratio(self) -> float:
        """Share of all pairs that are left out, in each head, in a sequence of `max_seq_len`. Cost: O(spans)."""
        return 1.0 - self._pattern.density(self.config.base.max_seq_len)

    @property
    def max_attended_positions(self) -> int | None:
        """The most keys that one query attends to, in a sequence of any length; None where the length decides."""
        config, causal = self.config, self.config.base.causal
        if config.sparsity_pattern == "local":
            return config.local_window * (1 if causal else 2) + 1
        if config.sparsity_pattern == "global" and causal:
            # The tokens themselves see only what comes before them.
            return config.local_window + 1 + (config.num_global_tokens or 0)
        return {"block": config.block_size, "top_k": config.top_k}.get(config.sparsity_pattern)

    @property
    def supports_dynamic_sparsity(self) -> bool:
        """Whether the pairs depend on the scores: those of "top_k" do."""
        return isinstance(self._pattern, TopK)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | RelativeBias | None = None,
        return_weights: bool | str = False,
    ) -> AttentionOutput:
        """Attend over the pattern's pairs.

        Args:
            query: `(batch, length, d_model)`.
            key: of the same shape; None is the query.
            value: of the same shape; None is the key.
            mask: boolean, True = may attend, within the pattern: `(length,)`, `(length, length)`, `(batch, length,
                length)` or rank 4 with heads second; sizes of 1 broadcast.
            bias: floating, added to the scaled scores; shapes as the mask. Or `RelativeBias`, by distance.
            return_weights: "mean" over heads (or True), "heads", or False, which spares them.

        Returns:
            AttentionOutput(output `(batch, length, d_model)`, weights). The weights are those of the pairs, `(batch,
            edges)`, for "heads" `(batch, edges, heads)`, in the order of `module.pattern.to_graph(length, length)`.
            Those of "top_k" are a sparse COO tensor, coalesced, of the chosen pairs alone: `(batch, length, length)`,
            for "heads" `(batch, heads, length, length)`; differentiable through `values()` and `to_dense()`.

        Raises:
            DimensionMismatchError: a shape does not fit, the lengths differ, or are above the max_seq_len of positions.
            InvalidInputError, InvalidMaskError: a dtype or device does not fit.
        """
        call = self._arguments(query, key, value, mask, bias=bias, return_weights=return_weights)
        return self._attend(call)

    def explain_forward(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which implementation a call with these arguments of `forward` runs, and why each faster one does not."""
        return explain(**self._arguments(*args, **kwargs))

    def _arguments(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | RelativeBias | None = None,
        return_weights: bool | str = False,
    ) -> dict[str, Any]:
        """The arguments of `attend` for those of `forward`."""
        heads = self._project(query, key, value)
        num_queries, num_keys = heads[0].shape[1], heads[1].shape[1]
        if num_queries != num_keys:
            raise DimensionMismatchError(
                argument="key",
                expected=f"as many keys as queries, {num_queries}",
                actual=f"{num_keys} keys",
                hint="for others MultiHeadAttention takes a pattern with an alignment, such as pattern=Window(left, "
                "right, align='bottom_right'), or TopK(k), and sparse_forward any connectivity",
            )
        return self._call(heads, self._pattern, mask, bias, return_weights)

    def sparse_forward(self, query: Tensor, key: Tensor, value: Tensor, connectivity: Any) -> AttentionOutput:
        """Attend over exactly the pairs that a matrix stores; neither the pattern nor `causal` joins them.

        Args:
            query: `(batch, query_length, d_model)`.
            key: `(batch, key_length, d_model)`.
            value: `(batch, key_length, d_model)`.
            connectivity: `(query_length, key_length)`, a scipy sparse matrix, torch CSR, CSC or COO, or what else
                `Graph.from_adjacency` takes: query i attends to key j where entry (i, j) is stored, whatever its value,
                in any order. An entry that a scipy or COO matrix repeats is one pair; in torch CSR and CSC each counts.

        Returns:
            AttentionOutput(output `(batch, query_length, d_model)`, weights): the mean weights over heads as a sparse
            COO tensor `(batch, query_length, key_length)`, coalesced, of the stored pairs alone; differentiable through
            `values()` and `to_dense()`. `weights[0].to_sparse_csr()` is the CSR matrix of one sequence.

        Raises:
            DimensionMismatchError: a shape does not fit, or a length is above the max_seq_len of positions.
            InvalidInputError: a dtype or device does not fit.
            SparseMatrixError: the matrix has an unknown layout, or an index outside its shape.

        Cost: O(pairs x log(pairs)) for the sorting, beside that of `forward`.

        Example:
            >>> x = torch.zeros(1, 2, 8)
            >>> connectivity = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).to_sparse()
            >>> SparseAttention(8, 2).sparse_forward(x, x, x, connectivity).weights.to_dense()
            tensor([[[1.0000, 0.0000],
                     [0.5000, 0.5000]]], grad_fn=<ToDenseBackward0>)
        """
        heads = self._project(query, key, value)
        graph = Graph.from_adjacency(connectivity)
        sizes = (heads[0].shape[1], heads[1].shape[1])
        if (graph.num_queries, graph.num_keys) != sizes:
            raise DimensionMismatchError(
                argument="connectivity",
                expected=f"(query_length={sizes[0]}, key_length={sizes[1]})",
                actual=(graph.num_queries, graph.num_keys),
            )
        graph = graph.to(query.device)
        output, weights = self._attend(self._call(heads, graph, None, None, "mean"))
        assert weights is not None
        return AttentionOutput(output, _as_matrix(weights, graph))

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f"{shown_settings(self.config)}, pattern={self._pattern}"


def _pattern_of(config: SparseAttentionConfig) -> Pattern | TopK:
    """The pattern that the settings name."""
    window = Window(config.local_window, config.local_window)
    if config.sparsity_pattern == "local":
        pattern = window
    elif config.sparsity_pattern == "strided":
        pattern = Strided(config.block_size, config.local_window)
    elif config.sparsity_pattern == "fixed":
        pattern = Fixed(config.block_size, config.num_global_tokens or 1)
    elif config.sparsity_pattern == "global":
        pattern = window | Global(config.num_global_tokens or 0)
    elif config.sparsity_pattern == "block":
        pattern = Fixed(config.block_size, 0)
    else:
        assert config.top_k is not None
        pattern = TopK(config.top_k)
    return pattern & Causal() if config.base.causal else pattern


def _as_matrix(weights: Tensor, graph: Graph) -> Tensor:
    """Weights `(batch, edges)` of a graph as a sparse tensor `(batch, queries, keys)`; those of one pair are added."""
    batch, edges = weights.shape
    sequence = torch.arange(batch, device=weights.device).repeat_interleave(edges)
    indices = torch.stack([sequence, graph.query_index.repeat(batch), graph.key_index.repeat(batch)])
    size = (batch, graph.num_queries, graph.num_keys)
    numbers = weights.reshape(-1)
    return torch.sparse_coo_tensor(indices, numbers, size, device=weights.device, check_invariants=False).coalesce()
