"""Draws a fit of energies and forces: losses, predictions against the truth, and attention in one cluster."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.training.extras import import_demo
from anyattention.training.particles import Configurations
from anyattention.training.points import PointsFit
from anyattention.training.points_model import EquivariantBody, Prediction, predict

__all__ = ["draw_points"]

_PURPOSE = "the picture of the attention"
# Okabe and Ito's colours, which the colour-blind tell apart.
_OWN, _PLAIN, _POSITIVE, _NEGATIVE = "#0072b2", "#e69f00", "#d55e00", "#56b4e9"


class _Cluster(NamedTuple):
    """One cluster as it is drawn.

    Attributes:
        places: its particles from the side from which it looks widest, `(N, 3)`; the last coordinate is the depth.
        charges: `(N,)`.
        true, predicted: forces, from the same side, `(N, 3)`.
        query, key: the particles of each pair that attends, `(E,)`.
        distance: of these pairs, `(E,)`.
        weights: of these pairs, mean over the blocks' heads, `(blocks, E)`.
    """

    places: Tensor
    charges: Tensor
    true: Tensor
    predicted: Tensor
    query: Tensor
    key: Tensor
    distance: Tensor
    weights: Tensor


def draw_points(fit: PointsFit, test: Configurations, own: Prediction, plain: Prediction) -> bytes:
    """A PNG picture: losses, predicted against true energies and forces, and attention in the first test cluster.

    Args:
        fit: of both models.
        test: configurations.
        own, plain: what the equivariant and the plain model predict for them.

    Returns:
        The bytes of the file; no window is opened and no figure of pyplot's is touched.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = import_demo("matplotlib.figure", _PURPOSE)
    agg = import_demo("matplotlib.backends.backend_agg", _PURPOSE)
    figure = figures.Figure(figsize=(15, 10.5), facecolor="white", layout="constrained")
    agg.FigureCanvasAgg(figure)
    (loss, energies, forces), (attention, arrows, distances) = figure.subplots(2, 3)
    _draw_losses(loss, fit)
    size = len(test.charges)
    _draw_parity(energies, test.energies / size, own.energies / size, plain.energies / size)
    energies.set(
        xlabel=r"true energy of a particle ($\epsilon$)",
        ylabel=r"predicted ($\epsilon$)",
        title="Energies of test clusters",
    )
    _draw_parity(forces, test.forces, own.forces, plain.forces)
    forces.set(
        xlabel=r"true component of a force ($\epsilon/\sigma$)",
        ylabel=r"predicted ($\epsilon/\sigma$)",
        title="Forces in test clusters",
    )
    cluster = _read_cluster(fit, test)
    _draw_attention(attention, cluster)
    _draw_forces(arrows, cluster)
    _draw_distances(distances, cluster)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def _draw_losses(axes: Any, fit: PointsFit) -> None:
    for trained, color, name in ((fit.plain, _PLAIN, "plain transformer"), (fit.equivariant, _OWN, "equivariant")):
        losses = torch.tensor(trained.losses)
        steps = torch.arange(1, len(losses) + 1)
        axes.plot(steps.numpy(), losses.numpy(), color=color, alpha=0.3, linewidth=1)
        span = max(1, len(losses) // 20)
        smooth = losses.unfold(0, span, 1).mean(1)
        axes.plot(steps[span - 1 :].numpy(), smooth.numpy(), color=color, linewidth=2, label=f"{name}, mean of {span}")
    axes.set(xlabel="step", ylabel="loss (no unit)", yscale="log", title="The training loss")
    axes.legend(fontsize=9)


def _draw_parity(axes: Any, true: Tensor, own: Tensor, plain: Tensor) -> None:
    for predicted, color, name in ((plain, _PLAIN, "plain transformer"), (own, _OWN, "equivariant")):
        error = (predicted - true).abs().mean()
        label = f"{name}: off by {error:.2g} in the mean"
        axes.plot(true.flatten(), predicted.flatten(), ".", color=color, alpha=0.4, markersize=4, mew=0, label=label)
    low, high = true.aminmax()
    axes.plot([low, high], [low, high], color="#333333", linestyle=":", linewidth=1.2, label="exact")
    legend = axes.legend(fontsize=9, loc="upper left", markerscale=3)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _read_cluster(fit: PointsFit, test: Configurations) -> _Cluster:
    model = fit.equivariant.model
    body = model.body
    if not isinstance(body, EquivariantBody):
        raise InvalidInputError(
            argument="fit", expected="an equivariant model with its body", actual=type(body).__name__
        )
    positions = test.positions[:1].to(model.scale.dtype)
    graph = body.graph(positions)
    with torch.no_grad():
        weights = body.weights(model.features(positions), positions, graph)
    query, key = graph.query_index, graph.key_index
    places = test.positions[0] - test.positions[0].mean(0)
    side = torch.linalg.svd(places).Vh.T
    return _Cluster(
        places @ side,
        test.charges,
        test.forces[0] @ side,
        predict(model, positions).forces[0].double() @ side,
        query,
        key,
        (places[key] - places[query]).norm(dim=1),
        torch.stack([block.mean(1) for block in weights]),
    )


def _draw_attention(axes: Any, cluster: _Cluster) -> None:
    """Lines as wide as the weight of the last block, the mean of both ways; nearer particles are drawn larger."""
    size = len(cluster.charges)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[cluster.query, cluster.key] = cluster.weights[-1].double()
    between = ((matrix + matrix.T) / 2).fill_diagonal_(0)
    strongest = float(between.max().clamp(min=1e-9))
    for first, second in between.triu().nonzero().tolist():
        share = float(between[first, second]) / strongest
        x, y, depth = cluster.places[[first, second]].T
        axes.plot(
            x, y, color="#222222", linewidth=5 * share, alpha=share, zorder=float(depth.mean()), solid_capstyle="round"
        )
    _draw_particles(axes, cluster)
    title = f"Attention in a test cluster, last block (thickest line: weight {strongest:.2f})"
    axes.set(title=title)


def _draw_particles(axes: Any, cluster: _Cluster) -> None:
    for sign, color, name in ((1, _POSITIVE, "charge 1"), (-1, _NEGATIVE, "charge -1")):
        x, y, depth = cluster.places[cluster.charges * sign > 0].T
        for index in range(len(x)):
            axes.scatter(
                x[index],
                y[index],
                s=180 + 60 * float(depth[index]),
                color=color,
                edgecolor="#222222",
                zorder=float(depth[index]) + 0.01,
                label=name if index == 0 else None,
            )
    axes.set(xlabel=r"x ($\sigma$)", ylabel=r"y ($\sigma$)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=9)


def _draw_forces(axes: Any, cluster: _Cluster) -> None:
    x, y, _ = cluster.places.T
    scale = float(cluster.true.norm(dim=1).max().clamp(min=1e-9)) * 1.2
    for forces, color, width, name in (
        (cluster.true, "#222222", 0.012, "true"),
        (cluster.predicted, _OWN, 0.005, "predicted"),
    ):
        axes.quiver(
            x,
            y,
            forces[:, 0],
            forces[:, 1],
            color=color,
            angles="xy",
            scale_units="xy",
            scale=scale,
            width=width,
            label=name,
        )
    axes.scatter(x, y, s=12, color="#222222")
    axes.set(xlabel=r"x ($\sigma$)", ylabel=r"y ($\sigma$)", title="Forces")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=9)


def _draw_distances(axes: Any, cluster: _Cluster) -> None:
    alike = cluster.charges[cluster.query] * cluster.charges[cluster.key] > 0
    others = cluster.query != cluster.key
    for kind, color, marker, name in (
        (alike & others, _POSITIVE, "o", "same charge"),
        (~alike, _OWN, "^", "opposite charge"),
    ):
        axes.plot(
            cluster.distance[kind], cluster.weights[-1][kind], marker, color=color, markersize=4, alpha=0.7, label=name
        )
    axes.set(xlabel=r"distance ($\sigma$)", ylabel="weight, mean of the heads", title="Attention by distance")
    axes.legend(fontsize=9)
