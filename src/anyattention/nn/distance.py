"""Distance attention: invariant attention between points, by distances and the keys' features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention._checks import Axes
from anyattention.ambient import without_autocast
from anyattention.config import GeometricAttentionConfig, PointBase
from anyattention.nn.arguments import ParameterArguments, arguments_of, takes
from anyattention.nn.bare import initialise_projection
from anyattention.nn.base import require_finite
from anyattention.nn.points import PointAttention, read_pairs_mask, require_finite_positions
from anyattention.ops import attend
from anyattention.ops.dispatch import Explanation
from anyattention.ops.points.pairs import (
    as_pairs,
    displacements,
    from_centre,
    in_use,
    mask_of_edges,
    pairs_within,
    shown,
    squared_distance_rows,
)
from anyattention.output import AttentionOutput
from anyattention.patterns import Graph

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DistanceAttention"]


@dataclass(frozen=True)
class DistanceArguments(ParameterArguments, GeometricAttentionConfig, PointBase):
    """The arguments of `DistanceAttention`."""

    vector_channels: Any = field(init=False, metadata={"unused": "DistanceAttention has no vectors"})


class DistanceAttention(PointAttention):
    """Each point attends to others by their features and by how far away they are.

    With f the features, x the positions, d = |x_j - x_i|, in each head:

        score_ij = scale w . f_j - softplus(decay) (d / length)^2 + sum over k of radial_weight_k basis_k(d) + log u(d)
        output_i = W_O concat over heads of sum over j of dropout(p_ij) W_V f_j,   p_i = softmax(score_i)

    length is the radial range (1 without one), and the basis is there with a radial range. With a radius, u is
    `geometry.cutoff_envelope`: exp(score) is multiplied with a factor that reaches 0 at the radius with two continuous
    derivatives, so a point's weight is 0 there and beyond. A point's own pair, of distance 0, keeps the softmax's
    denominator above 0: when the last neighbour leaves, the output goes smoothly to the point's own value. A query that
    is none of the points (`geometric_forward`) has no such pair: its output jumps to that of no key when its last
    key leaves.

    Rotating, reflecting or moving all points changes nothing.

    Args: the fields of `DistanceArguments`.

    scale multiplies the features' part of the score alone. Points nearer than eps count as this far apart in the basis
    and the envelope, with derivative 0: the distance itself has none at 0.

    Parameters, in the order of `get_parameters()`: distance_decay `(heads,)`; radial_weight `(heads, num_radial)` with
    a radial range; key_projection (weight `(heads, d_model)`: w); value_projection, output_projection.

    Raises:
        InvalidConfigError: a setting is out of range, or is set and cannot be used.

    Cost: O(points x d_model^2 + pairs x d_model) time. Memory above the inputs is O(points) over all pairs without
    radius and radial range, and O(pairs x heads) with them (a radius takes those within it, found among
    all) or over a graph.

    Source: Schuett et al., 2017 (SchNet), for the radial basis; Gasteiger et al., 2020 (DimeNet), for the envelope and
    the Bessel basis; here they shape the scores of attention.

    Example:
        >>> layer = DistanceAttention(8, 2, radius=1.5)
        >>> layer(torch.zeros(4, 8), torch.randn(4, 3)).output.shape
        torch.Size([4, 8])
    """

    @takes(DistanceArguments)
    def __init__(
        self, config: GeometricAttentionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        d_model, num_heads, use_bias = config.base.d_model, config.base.num_heads, config.base.use_bias
        super().__init__(config, num_heads, device, dtype)
        self.key_projection = nn.Linear(d_model, num_heads, bias=False, device=device, dtype=dtype)
        self.value_projection = nn.Linear(d_model, d_model, bias=use_bias, device=device, dtype=dtype)
        self.output_projection = nn.Linear(d_model, d_model, bias=use_bias, device=device, dtype=dtype)
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
        return cls(**arguments_of(config, DistanceArguments), device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier-uniform projections, biases 0, decays from 1 to 1/16, a small radial part."""
        self._reset_distance_score()
        for projection in (self.key_projection, self.value_projection, self.output_projection):
            initialise_projection(projection)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        graph: Graph | Tensor | None = None,
        *,
        cell: Tensor | None = None,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool | str = False,
    ) -> AttentionOutput:
        """Attend between the points, over all pairs or over a graph's edges.

        Args:
            x: features `(points, d_model)` or `(batch, points, d_model)`.
            positions: `(points, geometric_dim)` or `(batch, points, geometric_dim)`, in the unit of `radius`.
            graph: a Graph or an edge_index over the points; None is all pairs. Put self-loops in it
                (`graph.with_self_loops()`), as over all pairs: without them the output jumps as a point's last
                neighbour leaves. Of radius at least the layer's. Several clouds are one graph by `Graph.batch`.
            cell: exactly where the graph has shifts, the periodic cell that they count, in the positions' unit:
                `(geometric_dim, geometric_dim)` or `(clouds, geometric_dim, geometric_dim)`, as in
                `Graph.displacements`. The key of an edge is then its image at x_j + shift @ cell; gradients reach the
                cell.
            batch: `(points,)` int64, the cloud of each point, where there are several cells.
            mask: boolean, True = may attend. Over all pairs `(points,)`, `(points, points)`, `(batch, points, points)`
                or rank 4 with heads second, where sizes of 1 broadcast: `real[:, None, :]` hides the padding of a
                batch. Over a graph `(edges,)`, `(edges, heads)` or `(batch, edges, heads)`.
            return_weights: "mean" over heads (or True), `(..., points, points)` or `(..., edges)`; "heads",
                `(..., heads, points, points)` or `(..., edges, heads)`; or False.

        Returns:
            AttentionOutput(output `(..., points, d_model)`, weights).

        Raises:
            DimensionMismatchError, InvalidInputError, InvalidMaskError: an argument does not fit, a coordinate is not
                finite, or there is a cell or are shifts without the other.
            GraphStructureError: an edge_index names a point, or batch a cloud, that is not there; or the graph is of a
                smaller radius (`Graph.radius`) than the layer.
        """
        graph, offsets = self._read(x, positions, graph, cell, batch)
        return self._attend(positions, positions, x, graph, offsets, mask, self.config.radius, return_weights)

    def explain_forward(
        self,
        x: Tensor,
        positions: Tensor,
        graph: Graph | Tensor | None = None,
        *,
        cell: Tensor | None = None,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool | str = False,
    ) -> Explanation:
        """Which implementation `forward` runs for these arguments, and what the graph lacks for a smooth cut-off.

        Args: as `forward`.

        Returns:
            Explanation(implementation, refusals, notes); print it.

        Raises: as `forward`; nothing is computed.

        Example:
            >>> layer, x, positions = DistanceAttention(8, 2, radius=1.5), torch.zeros(2, 8), torch.zeros(2, 3)
            >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 0], [1, 0, 0]]), num_nodes=2)
            >>> layer.explain_forward(x, positions, graph).notes[-1].split(",")[0]
            '1 of 2 points have no edge to themselves'
        """
        graph, _ = self._read(x, positions, graph, cell, batch)
        return self._explained(positions, graph, mask, return_weights)

    def geometric_forward(
        self, query_pos: Tensor, key_pos: Tensor, features: Tensor, *, return_weights: bool | str = True
    ) -> AttentionOutput:
        """Attend from positions to points with features, over all pairs.

        Args:
            query_pos: `(queries, geometric_dim)` or `(batch, queries, geometric_dim)`.
            key_pos: `(keys, geometric_dim)` or `(batch, keys, geometric_dim)`.
            features: of the keys, `(keys, d_model)` or `(batch, keys, d_model)`.
            return_weights: "mean" over heads (or True), `(..., queries, keys)`; "heads"; or False.

        Returns:
            AttentionOutput(output `(..., queries, d_model)`, weights).

        Raises: as `forward`.
        """
        axes = Axes()
        self._check_points("key_pos", key_pos, features, axes, "keys")
        self._check_points("query_pos", query_pos, None, axes, "queries")
        return self._attend(query_pos, key_pos, features, None, None, None, self.config.radius, return_weights)

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

        Args:
            positions: `(points, geometric_dim)` or `(batch, points, geometric_dim)`.
            features: `(points, d_model)` or `(batch, points, d_model)`.
            radius: of the envelope, in the positions' unit, in place of the config's; the basis stays as it is.
            cell, periodic: as in `Graph.radius`: the periodic cell, one or `(batch, geometric_dim, geometric_dim)`,
                and which of its vectors repeat. Each image of a point is attended to by itself.

        Returns:
            AttentionOutput(output, weights): the mean weights over heads as a sparse COO tensor `(..., points,
            points)`, coalesced, of the pairs at most the radius apart; a pair's images are added up.

        Raises: as `forward`; InvalidInputError for a radius that is not above 0; MatrixOperationError for a cell whose
            repeating vectors are not independent.

        Cost: that of `forward` over the graph, and of the search for it.
        """
        axes = Axes()
        self._check_points("positions", positions, features, axes, "points")
        graph, offsets = self._within(positions, radius, cell, periodic)
        flat, rows = positions.flatten(0, -2), features.flatten(0, -2)
        result = self._attend(flat, flat, rows, graph, offsets, None, radius, "mean")
        return self._with_matrix(result, graph, positions.shape)

    def _read(
        self, x: Tensor, positions: Tensor, graph: Graph | Tensor | None, cell: Tensor | None, batch: Tensor | None
    ) -> tuple[Graph | None, Tensor | None]:
        """The graph and its offsets, of a call whose arguments fit."""
        self._check_points("positions", positions, x, Axes(), "points")
        graph = self._read_graph(graph, positions.shape[-2], positions.shape[-2], positions)
        return graph, self._offsets(graph, positions, cell, batch)

    def _attend(
        self,
        query_pos: Tensor,
        key_pos: Tensor,
        features: Tensor,
        graph: Graph | None,
        offsets: Tensor | None,
        mask: Tensor | None,
        radius: float | None,
        return_weights: bool | str,
    ) -> AttentionOutput:
        config, base = self.config, self.config.base
        has_batch = query_pos.ndim == 3
        batch = query_pos.shape[0] if has_batch else 1
        num_queries, num_keys = query_pos.shape[-2], key_pos.shape[-2]
        mask = read_pairs_mask(mask, graph, batch, base.num_heads, num_queries, num_keys)
        if not has_batch:
            query_pos, key_pos, features = query_pos[None], key_pos[None], features[None]
        asks, seen = in_use(mask, graph)
        query_pos, key_pos, features = shown(query_pos, asks), shown(key_pos, seen), shown(features, seen)
        require_finite_positions("positions", query_pos)
        require_finite_positions("positions", key_pos)
        scale = 1.0 if base.scale is None else base.scale
        term = self.key_projection(features) * scale
        value = self.value_projection(features).unflatten(-1, (base.num_heads, base.d_k))
        settings = {
            "scale": 1.0,
            "dropout": base.dropout if self.training else 0.0,
            "return_weights": return_weights,
        }
        dtype = torch.promote_types(query_pos.dtype, torch.float32)
        with without_autocast(query_pos.device):
            places, others = query_pos.to(dtype), key_pos.to(dtype)
            term, value = term.to(dtype), value.to(dtype)
            if graph is None and radius is None and config.get_radial_range() is None:
                near, near_keys = squared_distance_rows(*from_centre(places, others, seen), self._decay(dtype))
                # The keys' own part of the score, for the query's one.
                key = torch.cat([near_keys[..., :-1], near_keys[..., -1:] + term[..., None]], -1)
                result = attend(near, key, value, mask=mask, **settings)
            else:
                pairs = pairs_within(places, others, radius) if graph is None else graph
                if graph is None and mask is not None:
                    mask = mask_of_edges(mask, batch, base.num_heads, pairs)
                bias, _ = self._distance_terms(displacements(places, others, pairs, offsets), radius)
                ones = torch.ones(batch, num_queries, base.num_heads, 1, dtype=dtype, device=query_pos.device)
                result = attend(ones, term[..., None], value, pairs, bias=bias, mask=mask, **settings)
                if graph is None:
                    result = result._replace(weights=as_pairs(result.weights, pairs))
        output = self.output_projection(result.output.flatten(-2).to(query_pos.dtype))
        weights = None if result.weights is None else result.weights.to(query_pos.dtype)
        if base.check_finite:
            require_finite(self.name, output)
        if has_batch:
            return AttentionOutput(output, weights)
        return AttentionOutput(output[0], None if weights is None else weights[0])
