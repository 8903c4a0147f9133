"""`anyattention demo points`: energies and forces of clusters of particles, learnt from a simulation."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anyattention.cli.training import require_extras
from anyattention.geometry.clouds import require_library
from anyattention.saving import make_folder, write_atomically
from anyattention.training.extras import import_demo
from anyattention.training.particles import SEGMENT, TIME_STEP
from anyattention.training.points import (
    Errors,
    PointsData,
    PointsFit,
    Step,
    constant_errors,
    finite_difference_error,
    fit_points,
    model_errors,
    predict_all,
    rotation_error,
    simulate_data,
)
from anyattention.training.points_model import PointsSettings, Prediction
from anyattention.training.points_picture import draw_points

__all__ = ["run_points"]


class _Report(NamedTuple):
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


def run_points(settings: PointsSettings, threads: int | None, out: Path) -> int:
    """Simulate, train, and say how it went; the exit code.

    Raises:
        InvalidInputError: the folder cannot be written.
        MissingExtraError: matplotlib, tqdm, scipy or vesin is not installed.
        KeyboardInterrupt: Ctrl-C before a first step had finished.
    """
    require_extras()
    for module in ("scipy.spatial", "vesin"):
        require_library(module)
    folder = make_folder(out)
    # The tensors are small: threads gain little, and on a busy machine they wait for each other at length.
    torch.set_num_threads(threads or 1)
    print(_introduction(settings), flush=True)
    started = time.monotonic()
    data = simulate_data(settings)
    print(_simulated(data, time.monotonic() - started), flush=True)
    fit = _fit_with_bar(data, settings)
    report = _report(fit, data, settings)
    print(_comparison(report, fit), flush=True)
    print(_checks(report), flush=True)
    _write(folder, fit, data, settings, report)
    print(f"""\
The picture {folder / "attention.png"} shows the losses, predicted against true energies and forces, and who attends
to whom in one test cluster.""")
    return 0


def _introduction(settings: PointsSettings) -> str:
    return f"""\
Clusters of {settings.particles} particles, charged 1 and -1 in turns, under Lennard-Jones and Coulomb forces.
In reduced units: lengths in sigma and energies in epsilon of the Lennard-Jones potential, times in
sigma sqrt(mass / epsilon), charges in sqrt(4 pi epsilon_0 sigma epsilon).
Two models of one size learn energies and forces from four fifths of {settings.trajectories} simulated trajectories;
the others are the test.
"""


def _simulated(data: PointsData, seconds: float) -> str:
    time_units = SEGMENT * TIME_STEP
    return f"""\
Simulated in {seconds:.0f} s, by the velocity Verlet method.
{time_units:g} time unit passes at constant energy before each sample; a particle's total energy drifts in it by \
{data.drift:.0e}
(root mean square). {len(data.train.energies):,} configurations to learn from, {len(data.test.energies):,} for the test.
"""


def _fit_with_bar(data: PointsData, settings: PointsSettings) -> PointsFit:
    tqdm = import_demo("tqdm", "the progress bar").tqdm
    # A log file is not redrawn in place, so it gets a line now and then.
    pause = 0.1 if sys.stderr.isatty() else 5.0
    with tqdm(total=settings.steps, desc="training", unit="step", mininterval=pause, file=sys.stderr) as bar:

        def show(step: Step) -> None:
            losses = {"loss": f"{step.equivariant:.3f}", "plain": f"{step.plain:.3f}"}
            bar.set_postfix(losses, refresh=False)
            bar.update()

        fit = fit_points(data.train, settings, show)
    if fit.interrupted:
        steps = len(fit.equivariant.losses)
        print(f"Interrupted after {steps} steps; what follows is about these.", file=sys.stderr)
    return fit


def _report(fit: PointsFit, data: PointsData, settings: PointsSettings) -> _Report:
    test = data.test
    models = {"equivariant": fit.equivariant.model, "plain": fit.plain.model}
    predicted = {name: predict_all(model, test.positions, settings.batch) for name, model in models.items()}
    errors = {name: model_errors(prediction, test) for name, prediction in predicted.items()}
    cluster = test.positions[0]
    return _Report(
        **predicted,
        errors={**errors, "mean": constant_errors(data.train, test)},
        finite_differences=finite_difference_error(fit.equivariant.model, cluster),
        rotation={name: rotation_error(model, cluster) for name, model in models.items()},
        largest=float(test.forces[0].abs().max()),
    )


def _comparison(report: _Report, fit: PointsFit) -> str:
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


def _checks(report: _Report) -> str:
    return f"""\
Checked in float64 on one test cluster, whose forces go up to {report.largest:.1f}:

  {report.finite_differences:.0e}  the most by which a force differs from minus the energy's finite differences
  {report.rotation["equivariant"]:.0e}  the most by which a force changes, but for its direction, when the cluster is \
turned
  {report.rotation["plain"]:.0e}  the same for the plain transformer
"""


def _write(folder: Path, fit: PointsFit, data: PointsData, settings: PointsSettings, report: _Report) -> None:
    metrics: dict[str, Any] = {
        "errors": {name: errors._asdict() for name, errors in report.errors.items()},
        "finite_difference_error": report.finite_differences,
        "rotation_error": report.rotation,
        "energy_drift": data.drift,
        "configurations": {"train": len(data.train.energies), "test": len(data.test.energies)},
        "parameters": {
            "equivariant": sum(parameter.numel() for parameter in fit.equivariant.model.parameters()),
            "plain": sum(parameter.numel() for parameter in fit.plain.model.parameters()),
        },
        "seconds": {"equivariant": fit.equivariant.seconds, "plain": fit.plain.seconds},
        "steps": len(fit.equivariant.losses),
        "interrupted": fit.interrupted,
        "settings": vars(settings),
    }
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    picture = draw_points(fit, data.test, report.equivariant, report.plain)
    write_atomically(folder / "attention.png", picture)
