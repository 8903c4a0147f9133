"""`anyattention demo points`: what it prints and writes, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from anyattention.cli import main
from anyattention.cli import points as cli_points
from anyattention.training import points
from anyattention.training.points import Errors
from anyattention.training.points_model import PointsSettings

FILES = {"attention.png", "metrics.json"}
COMMAND = ["demo", "points", "--particles", "5", "--threads", "1"]


@pytest.fixture(autouse=True)
def _little_simulation(monkeypatch) -> None:
    simulate = cli_points.simulate_data

    def little(settings: PointsSettings):
        return simulate(PointsSettings(particles=settings.particles, trajectories=5, samples=2, seed=settings.seed))

    monkeypatch.setattr(cli_points, "simulate_data", little)


def test_it_says_how_it_went(tmp_path: Path, capsys) -> None:
    assert main([*COMMAND, "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["steps"], metrics["interrupted"], metrics["settings"]["particles"]) == (3, False, 5)
    assert metrics["configurations"] == {"train": 8, "test": 2}
    assert set(metrics["errors"]) == {"equivariant", "plain", "mean"}
    for name, errors in metrics["errors"].items():
        line = f"{errors['energy_mae']:8.4f} {errors['energy_rmse']:8.4f}"
        assert line in printed.out, name
        assert f"{errors['force_mae']:8.3f} {errors['force_rmse']:8.3f}" in printed.out, name
    for name in ("equivariant", "plain"):
        assert f"{metrics['parameters'][name]:,} parameters, 3 steps" in printed.out
    assert metrics["finite_difference_error"] < 1e-4
    assert metrics["rotation_error"]["equivariant"] < 1e-9 < metrics["rotation_error"]["plain"]
    for number in (metrics["finite_difference_error"], metrics["energy_drift"], *metrics["rotation_error"].values()):
        assert f" {number:.0e}" in printed.out
    assert "sigma sqrt(mass / epsilon)" in printed.out
    assert str(tmp_path / "run/attention.png") in printed.out
    assert "3/3" in printed.err


def test_an_interrupt_reports_what_there_is(tmp_path: Path, monkeypatch, capsys) -> None:
    fit = cli_points.fit_points

    def interrupted(train, settings, on_step):
        def stop(step) -> None:
            on_step(step)
            if step.number == 2:
                raise KeyboardInterrupt

        return fit(train, settings, stop)

    monkeypatch.setattr(cli_points, "fit_points", interrupted)
    assert main([*COMMAND, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "Interrupted after 2 steps" in printed.err
    assert "2 steps in" in printed.out
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "metrics.json").read_text())["interrupted"] is True


def test_an_interrupt_before_there_is_anything(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(points, "_loss", interrupt)
    assert main([*COMMAND, "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "anyattention: interrupted; nothing was written" in capsys.readouterr().err


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "attention.png").write_bytes(b"old")

    def fail(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(cli_points, "draw_points", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        main([*COMMAND, "--steps", "1", "--out", str(tmp_path)])
    assert (tmp_path / "attention.png").read_bytes() == b"old"
    monkeypatch.setattr(cli_points, "draw_points", lambda *arguments: b"new")
    written = []
    write = cli_points.write_atomically
    monkeypatch.setattr(cli_points, "write_atomically", lambda *a: written.append(a[0].name) or write(*a))
    assert main([*COMMAND, "--steps", "1", "--out", str(tmp_path)]) == 0
    assert written == ["metrics.json", "attention.png"]
    assert (tmp_path / "attention.png").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("points --epochs 3", "argument --epochs: not an option of `demo points`"),
        ("points --length 3", "argument --length: not an option of `demo points`"),
        ("points --window 3", "argument --window: not an option of `demo points`"),
        ("digits --particles 3", "argument --particles: not an option of `demo digits`"),
        ("sequence --particles 3", "argument --particles: not an option of `demo sequence`"),
        ("points --steps 0", "argument --steps: expected a whole number from 1"),
        ("points --particles 1", "particles: expected an int of at least 2, got 1"),
        ("points --particles 1000", "particles: expected at most 32"),
    ],
)
def test_a_mistake_is_told_in_one_line(options: str, text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *options.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("anyattention: error: ")
    assert printed.err.count("\n") == 1
    assert text in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "extra"), [("matplotlib", "demo"), ("tqdm", "demo"), ("vesin", "geometry"), ("scipy", "geometry")]
)
def test_a_missing_extra_is_named_before_the_work(
    package: str, extra: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.spatial", raising=False)
    assert main([*COMMAND, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert f"pip install 'anyattention[{extra}]'" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("force", "words"), [(0.5, "4.0 times smaller"), (2.0, "train for longer"), (3.0, "train for longer")]
)
def test_the_verdict_is_honest(force: float, words: str) -> None:
    errors = {name: Errors(0.1, 0.1, mae, mae) for name, mae in (("equivariant", force), ("plain", 2.0), ("mean", 2.5))}
    assert words in cli_points._verdict(errors)
