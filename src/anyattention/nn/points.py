"""What modules between points in space share: parameters of the distance score, checks, graphs and periodic cells.

Axes: B batch, N queries, M keys, E edges, H heads, K radial functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyattention._checks import (
    Axes,
    describe_shape,
    require_dense,
    require_device,
    require_floating,
    require_mask,
    require_number,
    require_tensor,
    to_four_axes,
)
from anyattention.ambient import is_readable, without_autocast
from anyattention.config import GeometricAttentionConfig
from anyattention.errors import DimensionMismatchError, GraphStructureError, InvalidInputError, InvalidMaskError
from anyattention.geometry.displacement import image_offsets
from anyattention.nn.arguments import shown_settings
from anyattention.nn.base import AttentionModule, graph_of_edges, require_factory, require_parameter_kind
from anyattention.nn.matrices import weights_at
from anyattention.ops import explain
from anyattention.ops.dispatch import Explanation
from anyattention.ops.points import DistanceSettings, distance_terms
from anyattention.ops.points.distance_terms import refusal as refusal_of_terms
from anyattention.ops.points.pairs import shown
from anyattention.output import AttentionOutput
from anyattention.patterns import Graph
from anyattention.patterns.graph_arrays import lacks_loop

__all__ = [
    "PointAttention",
    "Points",
    "read_pairs_mask",
    "require_finite_positions",
]


class Points(NamedTuple):
    """One side of a call, with a batch axis: `(B, points, dim)`, `(B, points, d_model)`, `(B, points, C, dim)`."""

    positions: Tensor
    features: Tensor
    vectors: Tensor

    def shown(self, seen: Tensor | None) -> Points:
        """Zeros where not seen."""
        return Points(*(shown(x, seen) for x in self))


class PointAttention(AttentionModule):
    """Attention whose scores depend on distances; abstract.

        distance score_h(d) = -softplus(decay_h) (d / length)^2 + sum over k of radial_weight_hk basis_k(d) + log u(d)

    length is the radial range, 1 without one; the basis is there with a radial range, and the envelope u with a radius.
    """

    config: GeometricAttentionConfig

    def __init__(
        self,
        config: GeometricAttentionConfig,
        radial_outputs: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        require_factory(device, dtype)
        self.config = config
        heads = config.base.num_heads
        self.distance_decay = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.radial_weight = (
            None
            if config.get_radial_range() is None
            else nn.Parameter(torch.empty(radial_outputs, config.num_radial, device=device, dtype=dtype))
        )

    @property
    def d_model(self) -> int:
        """Width of all heads together."""
        return self.config.base.d_model

    @property
    def geometric_dim(self) -> int:
        """Number of coordinates."""
        return self.config.geometric_dim

    @property
    def is_rotation_equivariant(self) -> bool:
        """Whether rotating the points rotates the output's vectors and nothing else: always."""
        return True

    @property
    def is_translation_invariant(self) -> bool:
        """Whether moving all points leaves the features that come out as they are: always."""
        return True

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return shown_settings(self.config, "geometric_dim", "radius")

    def _reset_distance_score(self) -> None:
        """Heads from short-sighted to far-sighted, and a small radial part."""
        heads = self.config.base.num_heads
        decay = 2.0 ** torch.linspace(0.0, -4.0, heads, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            self.distance_decay.copy_(decay.expm1().log())
        if self.radial_weight is not None:
            nn.init.normal_(self.radial_weight, std=0.1 / math.sqrt(self.config.num_radial))

    def _decay(self, dtype: torch.dtype) -> Tensor:
        """By how much a head's score falls with the squared distance, `(H,)`."""
        length = self.config.get_radial_range() or 1.0
        return F.softplus(self.distance_decay.to(dtype)) / length**2

    def _distance_terms(self, displacement: Tensor, radius: float | None) -> tuple[Tensor, Tensor | None]:
        """The distance score `(B, E, H)`, -inf from the radius on, and what else the basis weighs, `(B, E, others)`."""
        dtype, heads = displacement.dtype, self.config.base.num_heads
        settings = self._distance_settings(radius)
        weight = self.radial_weight
        weight = None if weight is None else weight.to(dtype)
        terms = distance_terms(displacement.flatten(0, 1), self._decay(dtype), weight, settings)
        terms = terms.unflatten(0, displacement.shape[:2])
        return terms[..., :heads], None if weight is None else terms[..., heads:]

    def _distance_settings(self, radius: float | None) -> DistanceSettings:
        config = self.config
        return DistanceSettings(radius, config.get_radial_range(), config.radial_basis, config.base.eps)

    def _check_points(self, argument: str, positions: Tensor, features: Tensor | None, axes: Axes, side: str) -> None:
        """Shapes, dtypes and devices of one side; `side` names its axis of points."""
        require_tensor(argument, positions)
        batch = "batch " if positions.ndim == 3 else ""
        axes.set("geometric_dim", self.config.geometric_dim, "the module")
        axes.set("d_model", self.d_model, "the module")
        axes.bind(argument, positions, f"{batch}{side} geometric_dim")
        named = {argument: positions}
        if features is not None:
            axes.bind("features", features, f"{batch}{side} d_model")
            named["features"] = features
        for name, tensor in named.items():
            self._check_kind(name, tensor)

    def _check_kind(self, argument: str, tensor: Tensor) -> None:
        require_floating(argument, tensor)
        require_dense(argument, tensor)
        require_parameter_kind(argument, tensor, self)

    def _read_graph(self, graph: Graph | Tensor | None, num_queries: int, num_keys: int, like: Tensor) -> Graph | None:
        if graph is None:
            return None
        if not isinstance(graph, Graph):
            return graph_of_edges(graph, num_queries, num_keys, like.device, "the positions")
        require_device("graph", graph.edge_index, like.device, "the positions")
        if (graph.num_keys, graph.num_queries) != (num_keys, num_queries):
            raise DimensionMismatchError(
                argument="graph",
                expected=f"{num_keys} keys and {num_queries} queries, the points",
                actual=f"{graph.num_keys} keys and {graph.num_queries} queries",
            )
        radius, searched = self.config.radius, graph.search_radius
        # But for the rounding of a number that was kept in float32.
        if radius is not None and searched is not None and radius > searched * (1.0 + 1e-6):
            raise GraphStructureError(
                argument="graph",
                expected=f"a radius of at least {radius!r}, the layer's",
                actual=f"a graph of radius {searched!r}",
                hint="a pair that enters it would have a weight at once, and the output would jump",
            )
        return graph

    def _offsets(
        self, graph: Graph | None, positions: Tensor, cell: Tensor | None, batch: Tensor | None
    ) -> Tensor | None:
        """By how much each edge's image of its key is moved, `(E, dim)`, in at least float32; None without shifts."""
        if cell is not None:
            require_tensor("cell", cell)
            self._check_kind("cell", cell)
            require_finite_positions("cell", cell)
        if batch is not None and (cell is None or cell.ndim != 3):
            raise InvalidInputError(
                argument="batch",
                expected="None unless there is a cell for each cloud: it is the graph that keeps clouds apart",
                actual="a batch",
                hint="build the graph by Graph.batch, or by Graph.radius with its batch=",
            )
        if graph is None:
            if cell is not None:
                raise InvalidInputError(
                    argument="cell", expected="None without a graph, whose shifts count it", actual="a tensor"
                )
            return None
        dtype = torch.promote_types(positions.dtype, torch.float32)
        with without_autocast(positions.device):
            wide = None if cell is None else cell.to(dtype)
            return image_offsets(positions.to(dtype), graph.shifts, wide, graph.key_index, batch)

    def _explained(
        self, positions: Tensor, graph: Graph | None, mask: Tensor | None, return_weights: bool | str
    ) -> Explanation:
        """What runs over the pairs of a call: dense attention, or operations over edges. Nothing is computed."""
        config, points = self.config, positions.shape[-2]
        batch = positions.shape[0] if positions.ndim == 3 else 1
        mask = read_pairs_mask(mask, graph, batch, config.base.num_heads, points, points)
        dtype = torch.promote_types(positions.dtype, torch.float32)
        rows = positions.new_zeros((), dtype=dtype).expand(batch, points, config.base.num_heads, 1)
        if graph is None and config.radius is None and config.get_radial_range() is None:
            explanation = explain(rows, rows, rows, mask=mask, return_weights=return_weights)
            return replace(explanation, notes=("dense attention over all pairs", *explanation.notes))
        if graph is not None:
            notes = [f"over the graph's {graph.num_edges:,} edges"]
        elif config.radius is not None:
            notes = ["over the pairs within the radius, found among all pairs"]
        else:
            notes = ["over a graph of all pairs"]
        edges = torch.zeros(2, 0, dtype=torch.int64, device=positions.device)
        pairs = Graph.of_known(edges, points, points) if graph is None else graph
        explanation = explain(rows, rows, rows, pairs, return_weights=return_weights)
        refusal = refusal_of_terms(rows, self._distance_settings(config.radius))
        if explanation.implementation == "cpu" and refusal is not None:
            notes.append(f"the scores of the distance run as reference: {refusal}")
        if graph is not None and config.radius is not None and is_readable(graph.edge_index):
            lacking = int(lacks_loop(graph).sum())
            if lacking:
                notes.append(
                    f"{lacking:,} of {points:,} points have no edge to themselves, which the smooth cut-off needs: "
                    "their output jumps as the last neighbour leaves; graph.with_self_loops() adds the edges"
                )
        return replace(explanation, notes=tuple(notes))

    def _within(
        self, positions: Tensor, radius: float, cell: Tensor | None, periodic: bool | Sequence[bool] | None
    ) -> tuple[Graph, Tensor | None]:
        """The graph of the pairs within the radius, each cloud `(points, dim)` of a batch by itself; and offsets."""
        radius = require_number("radius", radius, above=0.0)
        flat, batch = positions.flatten(0, -2), None
        if positions.ndim == 3:
            clouds, points = positions.shape[:2]
            batch = torch.arange(clouds, device=positions.device).repeat_interleave(points)
        graph = Graph.radius(flat.detach(), radius, batch, cell=cell, periodic=periodic).with_self_loops()
        is_one_cell = cell is None or cell.ndim != 3
        return graph, self._offsets(graph, flat, cell, None if is_one_cell else batch)

    def _with_matrix(self, result: AttentionOutput, graph: Graph, shape: torch.Size) -> AttentionOutput:
        """The output in the positions' shape, and the mean weights as a sparse matrix for each cloud."""
        output, weights = result
        assert weights is not None
        points = shape[-2]
        query, key = graph.query_index, graph.key_index
        if len(shape) == 2:
            return AttentionOutput(output, weights_at(torch.stack([query, key]), weights, (points, points)))
        places = torch.stack([query // max(points, 1), query % max(points, 1), key % max(points, 1)])
        matrix = weights_at(places, weights, (shape[0], points, points))
        return AttentionOutput(output.unflatten(0, tuple(shape[:2])), matrix)


def require_finite_positions(argument: str, positions: Tensor) -> None:
    """Raise where a coordinate is NaN or infinite; where that cannot be read, it shows in the output instead."""
    if not is_readable(positions):
        return
    finite = positions.isfinite()
    if not finite.all():
        raise InvalidInputError(
            argument=argument,
            expected="finite coordinates",
            actual=f"{int((~finite).sum())} NaN or Inf among {positions.numel()}",
        )


def read_pairs_mask(
    mask: Tensor | None, graph: Graph | None, batch: int, heads: int, num_queries: int, num_keys: int
) -> Tensor | None:
    """A module's mask, checked: `(B | 1, H | 1, N | 1, M | 1)`; with a graph `(E, H)` or `(B, E, H)`."""
    if mask is None:
        return None
    require_mask("mask", mask)
    if graph is not None:
        shapes = [(graph.num_edges,), (graph.num_edges, heads), (batch, graph.num_edges, heads)]
        if tuple(mask.shape) not in shapes:
            raise InvalidMaskError(
                argument="mask",
                expected="(edges,), (edges, heads) or (batch, edges, heads): "
                f"edges={graph.num_edges}, heads={heads}, batch={batch}",
                actual=describe_shape(mask),
            )
        return mask[:, None].expand(-1, heads) if mask.ndim == 1 else mask
    return to_four_axes("mask", mask[:, None] if mask.ndim == 3 else mask, batch, heads, num_queries, num_keys)
