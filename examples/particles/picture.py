"""Draws a fit of energies and forces: losses, predictions against the truth, and attention in one cluster."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattention.errors import InvalidInputError
from anyattention.training.extras import import_demo
from examples.particles.model import EquivariantBody, Prediction, predict
from examples.particles.simulation import Configurations
from examples.particles.train import Fit

__all__ = ["draw"]

_PURPOSE = "the picture of the attention"
# Okabe and Ito's colours, which the colour-blind tell apart.
_OWN, _PLAIN, _TRUE = "#0072b2", "#e69f00", "#bbbbbb"
_POSITIVE, _NEGATIVE, _ALIKE, _OPPOSITE = "#d55e00", "#56b4e9", "#cc79a7", "#009e73"


class _Cluster(NamedTuple):
    """One cluster as it is drawn.

    Attributes:
        places: its particles from the side from which it looks widest, `(N, 3)`; the last coordinate is the depth.
        charges: `(N,)`.
        true, predicted: forces, from the same side, `(N, 3)`.
        query, key: the particles of each pair that attends, `(E,)`.
        distance: of these pairs, `(E,)`.
        weights: of these pairs in the last block, the mean of its heads, `(E,)`.
    """

    places: Tensor
    charges: Tensor
    true: Tensor
    predicted: Tensor
    query: Tensor
    key: Tensor
    distance: Tensor
    weights: Tensor


def draw(fit: Fit, test: Configurations, own: Prediction, plain: Prediction) -> bytes:
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
    _draw_parity(energies, test.energies / size, own.energies / size, plain.energies / size, markersize=8)
    energies.set(
        xlabel=r"true energy of a particle ($\epsilon$)",
        ylabel=r"predicted ($\epsilon$)",
        title="Energies of test clusters",
    )
    _draw_parity(forces, test.forces, own.forces, plain.forces, markersize=4)
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


def _draw_losses(axes: Any, fit: Fit) -> None:
    for trained, color, name in ((fit.plain, _PLAIN, "plain transformer"), (fit.equivariant, _OWN, "equivariant")):
        losses = torch.tensor(trained.losses)
        steps = torch.arange(1, len(losses) + 1)
        axes.plot(steps.numpy(), losses.numpy(), color=color, alpha=0.3, linewidth=1)
        span = max(1, len(losses) // 20)
        smooth = losses.unfold(0, span, 1).mean(1)
        axes.plot(
            steps[span - 1 :].numpy(), smooth.numpy(), color=color, linewidth=2, label=f"{name}, mean of {span} steps"
        )
    # By the loss's definition: the squares of energies and forces are taken in units of their own spread.
    axes.axhline(2.0, color="#333333", linestyle=":", linewidth=1.2, label="mean of the training")
    axes.set(xlabel="step", ylabel="loss (no unit)", yscale="log", title="The training loss")
    axes.legend(fontsize=9)


def _draw_parity(axes: Any, true: Tensor, own: Tensor, plain: Tensor, markersize: int) -> None:
    for predicted, color, name in ((plain, _PLAIN, "plain transformer"), (own, _OWN, "equivariant")):
        error = (predicted - true).abs().mean()
        label = f"{name}: off by {error:.2g} on average"
        axes.plot(
            true.flatten(), predicted.flatten(), ".", color=color, alpha=0.5, markersize=markersize, mew=0, label=label
        )
    low, high = true.aminmax()
    axes.plot([low, high], [low, high], color="#333333", linestyle=":", linewidth=1.2, label="exact")
    legend = axes.legend(fontsize=9, loc="upper left", markerscale=12 / markersize)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _read_cluster(fit: Fit, test: Configurations) -> _Cluster:
    model = fit.equivariant.model
    body = model.body
    if not isinstance(body, EquivariantBody):
        raise InvalidInputError(argument="fit", expected="an equivariant model", actual=type(body).__name__)
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
        weights[-1].mean(1),
    )


def _draw_attention(axes: Any, cluster: _Cluster) -> None:
    """Lines as wide as the mean of the weights of both ways; particles that are nearer are larger."""
    size = len(cluster.charges)
    matrix = torch.zeros(size, size)
    matrix[cluster.query, cluster.key] = cluster.weights
    between = ((matrix + matrix.T) / 2).fill_diagonal_(0)
    strongest = max(float(between.max()), 1e-9)
    for first, second in between.triu().nonzero().tolist():
        share = float(between[first, second]) / strongest
        x, y, depth = cluster.places[[first, second]].T
        axes.plot(x, y, color="#222222", linewidth=7 * share, alpha=share**2, zorder=float(depth.mean()))
    x, y, depth = cluster.places.T
    sizes = 160 * (1 + 0.35 * depth).clamp(min=0.3)
    for index, charge in enumerate(cluster.charges.tolist()):
        color = _POSITIVE if charge > 0 else _NEGATIVE
        axes.scatter(x[index], y[index], sizes[index], color, edgecolor="#222222", zorder=float(depth[index]))
    for color, name in ((_POSITIVE, "charge 1"), (_NEGATIVE, "charge -1")):
        axes.scatter([], [], 160, color, edgecolor="#222222", label=name)
    axes.plot([], [], color="#222222", linewidth=7, label=f"weight {strongest:.2f}")
    axes.set_title("Who attends to whom in a test cluster, last block")
    _lay_out(axes, cluster.places)


def _draw_forces(axes: Any, cluster: _Cluster) -> None:
    """Arrows from the particles, the longest one sigma long."""
    x, y, _ = cluster.places.T
    largest = max(float(cluster.true[:, :2].norm(dim=1).max()), 1e-9)
    for forces, color, width, name in (
        (cluster.true, _TRUE, 0.014, "true"),
        (cluster.predicted, _OWN, 0.006, "predicted"),
    ):
        arrows = {"color": color, "width": width, "angles": "xy", "scale_units": "xy", "scale": largest}
        axes.quiver(x, y, forces[:, 0], forces[:, 1], label=name, **arrows)
    axes.scatter(x, y, 16, "#222222", label="particles")
    axes.set_title(rf"Its forces (longest arrow: {largest:.1f} $\epsilon/\sigma$)")
    _lay_out(axes, torch.cat([cluster.places, cluster.places + cluster.true / largest]))


def _lay_out(axes: Any, shown: Tensor) -> None:
    """Show these places, lengths alike along both axes, with the legend below them."""
    reach = 1.15 * float(shown[:, :2].abs().max())
    axes.set(xlabel=r"widest direction ($\sigma$)", ylabel=r"second widest direction ($\sigma$)")
    axes.set(xlim=(-reach, reach), ylim=(-1.25 * reach, reach), aspect="equal")
    axes.legend(fontsize=9, loc="lower center", ncols=3)


def _draw_distances(axes: Any, cluster: _Cluster) -> None:
    alike = cluster.charges[cluster.query] * cluster.charges[cluster.key] > 0
    itself = cluster.query == cluster.key
    for kind, color, marker, name in (
        (itself, "#222222", "s", "itself"),
        (alike & ~itself, _ALIKE, "o", "same charge"),
        (~alike, _OPPOSITE, "^", "opposite charge"),
    ):
        axes.plot(
            cluster.distance[kind], cluster.weights[kind], marker, color=color, markersize=5, alpha=0.7, label=name
        )
    axes.set(xlabel=r"distance ($\sigma$)", ylabel="weight, mean of the last block's heads", ylim=(0, None))
    axes.set_title("Its attention by distance")
    axes.legend(fontsize=9)
