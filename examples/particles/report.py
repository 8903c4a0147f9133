"""What the training on particles came to: errors and checks, in numbers and in words."""

from __future__ import annotations

from typing import NamedTuple

from examples.particles.model import Prediction, Settings
from examples.particles.simulation import SEGMENT, TIME_STEP
from examples.particles.train import (
    Data,
    Errors,
    Fit,
    constant_errors,
    finite_difference_error,
    model_errors,
    predict_all,
    rotation_error,
)

__all__ = ["Report", "describe_checks", "describe_data", "describe_errors", "describe_settings", "measure"]


class Report(NamedTuple):
    """What is said of the models on test configurations.

    Attributes:
        equivariant, plain: their predictions.
        errors: by what makes the prediction: "equivariant", "plain", "mean".
        finite_differences: the most by which a force of the equivariant model differs from them.
        rotation: the most by which a force on a turned cluster differs from the turned force, by model.
        largest: the largest component of a true force on the cluster of these checks.
    """

    equivariant: Prediction
    plain: Prediction
    errors: dict[str, Errors]
    finite_differences: float
    rotation: dict[str, float]
    largest: float


def describe_settings(settings: Settings) -> str:
    """What is simulated and learnt, and in which units."""
    return f"""\
Clusters of {settings.particles} particles, charged 1 and -1 in turns, under Lennard-Jones and Coulomb forces.
In reduced units: lengths in sigma and energies in epsilon of the Lennard-Jones potential, times in
sigma sqrt(mass / epsilon), charges in sqrt(4 pi epsilon_0 sigma epsilon).
Two models of one size learn energies and forces from four fifths of {settings.trajectories} simulated trajectories;
the others are the test.
"""


def describe_data(data: Data, seconds: float) -> str:
    """What the simulation yielded."""
    time_units = SEGMENT * TIME_STEP
    return f"""\
Simulated in {seconds:.0f} s, by the velocity Verlet method.
{time_units:g} time unit passes at constant energy before each sample; a particle's total energy drifts in it by \
{data.drift:.0e}
(root mean square). {len(data.train.energies):,} configurations to learn from, {len(data.test.energies):,} for the test.
"""


def measure(fit: Fit, data: Data, settings: Settings) -> Report:
    """Errors on the test, and the checks on its first cluster."""
    test = data.test
    models = {"equivariant": fit.equivariant.model, "plain": fit.plain.model}
    predicted = {name: predict_all(model, test.positions, settings.batch) for name, model in models.items()}
    errors = {name: model_errors(prediction, test) for name, prediction in predicted.items()}
    cluster = test.positions[0]
    return Report(
        **predicted,
        errors={**errors, "mean": constant_errors(data.train, test)},
        finite_differences=finite_difference_error(fit.equivariant.model, cluster),
        rotation={name: rotation_error(model, cluster) for name, model in models.items()},
        largest=float(test.forces[0].abs().max()),
    )


def describe_errors(report: Report, fit: Fit) -> str:
    """The errors as a table, and a verdict."""
    names = {"equivariant": "equivariant attention", "plain": "plain transformer", "mean": "mean of the training"}
    lines = [
        "\nErrors on the test's trajectories, mean absolute and root mean square; smaller is better:\n",
        "  a particle's energy    a force's component",
        "       (epsilon)          (epsilon / sigma)",
    ]
    for name, errors in report.errors.items():
        trained = {"equivariant": fit.equivariant, "plain": fit.plain}.get(name)
        cost = "the same energy for all, no forces"
        if trained is not None:
            size = sum(parameter.numel() for parameter in trained.model.parameters())
            cost = f"{size:,} parameters, {len(trained.losses)} steps in {trained.seconds:.0f} s"
        energy, force = errors[:2], errors[2:]
        numbers = f"  {energy[0]:8.4f} {energy[1]:8.4f}      {force[0]:8.3f} {force[1]:8.3f}"
        lines.append(f"{numbers}      {names[name]} ({cost})")
    return "\n".join([*lines, "", _verdict(report.errors), ""])


def _verdict(errors: dict[str, Errors]) -> str:
    own, others = errors["equivariant"].force_mae, min(errors["plain"].force_mae, errors["mean"].force_mae)
    if own < others:
        return f"The equivariant model's error of a force is {others / own:.1f} times smaller than the others'."
    return "The equivariant model has not learnt forces better than the others: train for longer."


def describe_checks(report: Report) -> str:
    """The checks as a list."""
    return f"""\
Checked in float64 on one test cluster, whose forces go up to {report.largest:.1f}:

  {report.finite_differences:.0e}  the most by which a force differs from minus the energy's finite differences
  {report.rotation["equivariant"]:.0e}  the most by which a force changes, but for its direction, when the cluster is \
turned
  {report.rotation["plain"]:.0e}  the same for the plain transformer
"""
