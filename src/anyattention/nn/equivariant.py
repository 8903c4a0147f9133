"""Equivariant attention: features, vectors and positions updated together, whatever way the points are turned.

Axes: B batch, N queries, M keys, E edges, H heads, C vector channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anyattention._checks import Axes
from anyattention.ambient import without_autocast
from anyattention.config import GeometricAttentionConfig, PointBase
from anyattention.nn.arguments import ParameterArguments, arguments_of, takes
from anyattention.nn.bare import initialise_projection
from anyattention.nn.base import require_finite
from anyattention.nn.points import PointAttention, Points, read_pairs_mask, require_finite_positions
from anyattention.nn.vectors import mix, shortened, squares
from anyattention.ops.arguments import weights_asked_for
from anyattention.ops.dispatch import Explanation
from anyattention.ops.points.pairs import as_pairs, displacements, in_use, mask_of_edges, pairs_within, shown
from anyattention.ops.points.sums import EquivariantSums, Rows, sums_of_all, sums_of_edges
from anyattention.output import AttentionOutput, EquivariantOutput
from anyattention.patterns import Graph

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EquivariantAttention"]


# Of the features' norm, whose unit is not that of the config's eps.
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class EquivariantArguments(ParameterArguments, GeometricAttentionConfig, PointBase):
    """The arguments of `EquivariantAttention`."""


class EquivariantAttention(PointAttention):
    """Points attend to each other, and update features h, vectors v `(channels, dim)` and positions x together.

    With n = [RMSNorm(h), |s(v)|^2 of each channel], d = |x_j - x_i|, and in each head:

        score_ij = scale (W_Q n_i) . (W_K n_j) + distance score(d)                 as in `DistanceAttention`
        g_ij     = dropout(p_ij) (1 + sum over k of gate_k basis_k(d)),   p_i = softmax(score_i)
        a_i = sum over j of g_ij W_V n_j,   u_i = sum over j of g_ij U s(v_j),   r_i = sum over j of g_ij (x_j - x_i)

        v_i' = v_i + (1 + G n_i) (M u_i + R s(r_i))       one factor for each channel
        x_i' = x_i + sum over channels of (P n_i) s(v_i')
        h_i' = h_i + W_O [a_i, |s(r_i)|^2 of each head, |s(v_i')|^2 of each channel]

    U, M and R mix channels, without bias. s(v) = v / (1 + |v|^2 / length^2)^(1/4) shortens long vectors to the square
    root of their length and leaves short ones: without it, deep stacks overflow. The gate is there with a radial range.
    Over edges, r_i is summed from the displacements; over all pairs without radius and radial
    range it is sum g x_j - (sum g) x_i, with positions taken from their mean. A point that by mask or graph may attend
    to nothing comes out as it went in.

    Rotating, reflecting or moving the points leaves h', turns v', and moves x' with them; mirror images look alike.

    Args: the fields of `EquivariantArguments`.

    Points nearer than eps count as this far apart in the basis and the envelope. use_bias and check_finite are about
    the features.

    Parameters, in the order of `get_parameters()`: distance_decay `(heads,)`; radial_weight `(2 heads, num_radial)`
    with a radial range (scores, then gates); norm; query_projection, key_projection, value_projection; vector_value
    (U), vector_mix (M), relative_mix (R), vector_gate (G), position_gate (P); output_projection.

    Raises:
        InvalidConfigError: a setting is out of range, or is set and cannot be used.

    Cost: O(points x d_model^2 + pairs x (d_model + channels x dim)) time. Memory above the inputs is O(points) over all
    pairs without radius and radial range, and O(pairs x (heads + dim)) with them (a radius takes those within it, found
    among all) or over a graph, first and second derivative alike.

    Source: Satorras et al., 2021 (E(n) equivariant networks): relative vectors, and features from invariants; Schuett
    et al., 2021 (PaiNN): vectors beside features. Here the weights are those of attention, and no network runs for a
    pair.

    Example:
        >>> layer = EquivariantAttention(8, 2, radius=1.5)
        >>> features, positions = torch.zeros(4, 8), torch.randn(4, 3)
        >>> output, positions, vectors, _ = layer.equivariant_forward(features, positions)
        >>> output.shape, positions.shape, vectors.shape
        (torch.Size([4, 8]), torch.Size([4, 3]), torch.Size([4, 2, 3]))
    """

    @takes(EquivariantArguments)
    def __init__(
        self, config: GeometricAttentionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        d_model, num_heads, use_bias = config.base.d_model, config.base.num_heads, config.base.use_bias
        super().__init__(config, 2 * num_heads, device, dtype)
        channels = config.get_vector_channels()

        def projection(width: int, out: int, *, bias: bool) -> nn.Linear:
            return nn.Linear(width, out, bias=bias, device=device, dtype=dtype)

        width = d_model + channels
        self.norm = nn.RMSNorm(d_model, eps=_NORM_EPS, device=device, dtype=dtype)
        self.query_projection = projection(width, d_model, bias=use_bias)
        self.key_projection = projection(width, d_model, bias=use_bias)
        self.value_projection = projection(width, d_model, bias=use_bias)
        self.vector_value = projection(channels, channels, bias=False)
        self.vector_mix = projection(channels, channels, bias=False)
        self.relative_mix = projection(num_heads, channels, bias=False)
        self.vector_gate = projection(width, channels, bias=use_bias)
        self.position_gate = projection(width, channels, bias=use_bias)
        self.output_projection = projection(d_model + num_heads + channels, d_model, bias=use_bias)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: GeometricAttentionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module of a config."""
        return cls(**arguments_of(config, EquivariantArguments), device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier-uniform, the gates of vectors and positions a tenth of that, biases 0."""
        self._reset_distance_score()
        for module in self.children():
            is_gate = module is self.vector_gate or module is self.position_gate
            initialise_projection(module, gain=0.1 if is_gate else 1.0)
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        vectors: Tensor | None = None,
        graph: Graph | Tensor | None = None,
        *,
        cell: Tensor | None = None,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool | str = False,
    ) -> AttentionOutput:
        """The features and weights of `equivariant_forward`, whose arguments it takes."""
        result = self.equivariant_forward(
            x, positions, vectors, graph, cell=cell, batch=batch, mask=mask, return_weights=return_weights
        )
        return AttentionOutput(result.output, result.weights)

    def equivariant_forward(
        self,
        x: Tensor,
        positions: Tensor,
        vectors: Tensor | None = None,
        graph: Graph | Tensor | None = None,
        *,
        cell: Tensor | None = None,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool | str = False,
    ) -> EquivariantOutput:
        """Update features, positions and vectors, over all pairs or over a graph's edges.

        Args:
            x: features `(points, d_model)` or `(batch, points, d_model)`.
            positions: `(points, geometric_dim)` or `(batch, points, geometric_dim)`, in the unit of `radius`. In a
                stack every layer gets those that the graph was built from, or energies jump as a pair leaves it.
            vectors: `(..., points, vector_channels, geometric_dim)`, such as velocities; None is zeros.
            graph: as in `DistanceAttention.forward`: with self-loops, and of radius at least the layer's.
            cell, batch: as in `DistanceAttention.forward`. The positions that come out are not brought into the cell,
                so that graph and cell serve the next layer too.
            mask: as in `DistanceAttention.forward`.
            return_weights: as in `DistanceAttention.forward`; p, without the gate.

        Returns:
            EquivariantOutput(output, positions, vectors, weights), of the inputs' shapes.

        Raises: as `DistanceAttention.forward`.
        """
        graph, offsets = self._read(x, positions, vectors, graph, cell, batch)
        points = self._points(positions, x, vectors)
        result = self._update(points, points, graph, offsets, mask, self.config.radius, return_weights)
        return result if positions.ndim == 3 else _first(result)

    def explain_forward(
        self,
        x: Tensor,
        positions: Tensor,
        vectors: Tensor | None = None,
        graph: Graph | Tensor | None = None,
        *,
        cell: Tensor | None = None,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool | str = False,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments, and what the graph lacks for a smooth cut-off.

        Args: as `forward`.

        Returns, Raises: as `DistanceAttention.explain_forward`.
        """
        graph, _ = self._read(x, positions, vectors, graph, cell, batch)
        return self._explained(positions, graph, mask, return_weights)

    def geometric_forward(
        self, query_pos: Tensor, key_pos: Tensor, features: Tensor, *, return_weights: bool | str = True
    ) -> AttentionOutput:
        """Attend from positions to points with features, over all pairs; the queries have features and vectors 0.

        Args:
            query_pos: `(queries, geometric_dim)` or `(batch, queries, geometric_dim)`.
            key_pos: `(keys, geometric_dim)` or `(batch, keys, geometric_dim)`.
            features: of the keys, `(keys, d_model)` or `(batch, keys, d_model)`.
            return_weights: "mean" over heads (or True), `(..., queries, keys)`; "heads"; or False.

        Returns:
            AttentionOutput(output `(..., queries, d_model)`, weights).

        Raises: as `equivariant_forward`.
        """
        axes = Axes()
        self._check_points("key_pos", key_pos, features, axes, "keys")
        self._check_points("query_pos", query_pos, None, axes, "queries")
        queries, keys = self._points(query_pos), self._points(key_pos, features)
        result = self._update(queries, keys, None, None, None, self.config.radius, return_weights)
        result = result if query_pos.ndim == 3 else _first(result)
        return AttentionOutput(result.output, result.weights)

    def distance_attention(
        self,
        positions: Tensor,
        features: Tensor,
        radius: float,
        *,
        cell: Tensor | None = None,
        periodic: bool | Sequence[bool] | None = None,
    ) -> AttentionOutput:
        """Attend from each point to those less than the radius away, itself included.

        Args: as `DistanceAttention.distance_attention`.

        Returns:
            AttentionOutput(output, weights): the features, and the mean weights over heads as a sparse COO tensor
            `(..., points, points)`, coalesced, of the pairs at most the radius apart; a pair's images are added up.

        Raises: as `DistanceAttention.distance_attention`.
        """
        axes = Axes()
        self._check_points("positions", positions, features, axes, "points")
        graph, offsets = self._within(positions, radius, cell, periodic)
        points = self._points(positions.flatten(0, -2), features.flatten(0, -2))
        result = _first(self._update(points, points, graph, offsets, None, radius, "mean"))
        return self._with_matrix(AttentionOutput(result.output, result.weights), graph, positions.shape)

    def _read(
        self,
        x: Tensor,
        positions: Tensor,
        vectors: Tensor | None,
        graph: Graph | Tensor | None,
        cell: Tensor | None,
        batch: Tensor | None,
    ) -> tuple[Graph | None, Tensor | None]:
        """The graph and its offsets, of a call whose arguments fit."""
        axes = Axes()
        self._check_points("positions", positions, x, axes, "points")
        if vectors is not None:
            axes.set("vector_channels", self.config.get_vector_channels(), "the module")
            leading = "batch " if positions.ndim == 3 else ""
            axes.bind("vectors", vectors, f"{leading}points vector_channels geometric_dim")
            self._check_kind("vectors", vectors)
        graph = self._read_graph(graph, positions.shape[-2], positions.shape[-2], positions)
        return graph, self._offsets(graph, positions, cell, batch)

    def _update(
        self,
        queries: Points,
        keys: Points,
        graph: Graph | None,
        offsets: Tensor | None,
        mask: Tensor | None,
        radius: float | None,
        return_weights: bool | str,
    ) -> EquivariantOutput:
        """The layer; queries and keys, with a batch axis, may be different points."""
        base, dtype, length = self.config.base, queries.positions.dtype, self._length
        batch, num_queries, num_keys = *queries.positions.shape[:2], keys.positions.shape[1]
        mask = read_pairs_mask(mask, graph, batch, base.num_heads, num_queries, num_keys)
        asks, seen = in_use(mask, graph)
        old, is_same = queries, keys is queries
        queries, keys = queries.shown(asks), keys.shown(seen)
        require_finite_positions("positions", queries.positions)
        require_finite_positions("positions", keys.positions)
        if is_same and asks is None and seen is None:
            context = key_context = self._context(queries)
        else:
            both = Points(*(torch.cat(sides, dim=1) for sides in zip(queries, keys, strict=True)))
            context, key_context = self._context(both).split([num_queries, num_keys], dim=1)
        sums = self._sums(context, key_context, queries, keys, graph, offsets, mask, seen, radius, return_weights)
        relative = shortened(sums.relative, length)
        mixed = mix(self.vector_mix, sums.vectors.to(dtype)) + mix(self.relative_mix, relative.to(dtype))
        vectors = queries.vectors + (1.0 + self.vector_gate(context))[..., None] * mixed
        short = shortened(vectors, length)
        positions = queries.positions + (self.position_gate(context)[..., None] * short).sum(-2)
        features = torch.cat([sums.values.flatten(-2), squares(relative, length), squares(short, length)], -1)
        output = queries.features + self.output_projection(features.to(dtype))
        updated = Points(positions.to(dtype), output.to(dtype), vectors.to(dtype))
        if asks is not None:
            updated = Points(*(shown(new, asks, before) for new, before in zip(updated, old, strict=True)))
        if base.check_finite:
            require_finite(self.name, updated.features)
        weights = None if sums.weights is None else sums.weights.to(dtype)
        return EquivariantOutput(updated.features, updated.positions, updated.vectors, weights)

    @property
    def _length(self) -> float:
        return self.config.get_radial_range() or 1.0

    def _points(self, positions: Tensor, features: Tensor | None = None, vectors: Tensor | None = None) -> Points:
        """The points with a batch axis, and zeros for features and vectors that are not there."""
        *leading, dim = positions.shape
        if features is None:
            features = positions.new_zeros(*leading, self.d_model)
        if vectors is None:
            vectors = positions.new_zeros(*leading, self.config.get_vector_channels(), dim)
        parts = (positions, features, vectors)
        return Points(*(parts if len(leading) == 2 else (x[None] for x in parts)))

    def _context(self, points: Points) -> Tensor:
        """What of a point no motion changes: its features and the lengths of its vectors, `(B, N, d_model + C)`."""
        normed = self.norm(points.features)
        return torch.cat([normed, squares(shortened(points.vectors, self._length), self._length).to(normed.dtype)], -1)

    def _sums(
        self,
        query_context: Tensor,
        key_context: Tensor,
        queries: Points,
        keys: Points,
        graph: Graph | None,
        offsets: Tensor | None,
        mask: Tensor | None,
        seen: Tensor | None,
        radius: float | None,
        return_weights: bool | str,
    ) -> EquivariantSums:
        """Attention in each head, in at least float32, and never under autocast: coordinates have digits to lose."""
        base, dim = self.config.base, self.geometric_dim
        heads = (base.num_heads, base.d_k)
        query = self.query_projection(query_context) * base.get_scale()
        key, value = self.key_projection(key_context), self.value_projection(key_context)
        vectors = mix(self.vector_value, shortened(keys.vectors, self._length))
        vectors = vectors.unflatten(-2, (base.num_heads, -1)).flatten(-2)
        dropout, kind = base.dropout if self.training else 0.0, weights_asked_for(return_weights)
        dtype = torch.promote_types(queries.positions.dtype, torch.float32)
        with without_autocast(query.device):
            split = [x.to(dtype).unflatten(-1, heads) for x in (query, key, value)]
            rows = Rows(*split, vectors=vectors.to(dtype))
            places, others = queries.positions.to(dtype), keys.positions.to(dtype)
            if graph is None and radius is None and self.config.get_radial_range() is None:
                decay = self._decay(dtype)
                sums = sums_of_all(rows, places, others, decay, mask, seen, dropout, return_weights)
            else:
                pairs = pairs_within(places, others, radius) if graph is None else graph
                if graph is None and mask is not None:
                    mask = mask_of_edges(mask, places.shape[0], base.num_heads, pairs)
                displacement = displacements(places, others, pairs, offsets)
                terms = self._distance_terms(displacement, radius)
                sums = sums_of_edges(rows, displacement, *terms, pairs, mask, dropout)
                weights = None if kind is None else sums.weights
                weights = weights.mean(-1) if kind == "mean" and weights is not None else weights
                sums = sums._replace(weights=as_pairs(weights, pairs) if graph is None else weights)
        summed = sums.vectors.unflatten(-1, (-1, dim)).flatten(-3, -2)
        return sums._replace(vectors=summed)


def _first(result: EquivariantOutput) -> EquivariantOutput:
    """The result of a batch of one without its batch axis."""
    output, positions, vectors, weights = result
    return EquivariantOutput(output[0], positions[0], vectors[0], None if weights is None else weights[0])
