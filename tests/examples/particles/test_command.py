"""`python -m examples.particles`: what it prints and writes, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

import examples.particles.__main__ as command
from examples.particles import report, train
from examples.particles.__main__ import main
from examples.particles.train import Errors

FILES = {"attention.png", "metrics.json"}
SMALL = ["--particles", "5", "--trajectories", "5", "--samples", "2"]


def test_it_says_how_it_went(tmp_path: Path, capsys) -> None:
    assert main([*SMALL, "--steps", "3", "--out", str(tmp_path / "run")]) == 0
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
    fit = command.fit

    def interrupted(train, settings, on_step):
        def stop(step) -> None:
            on_step(step)
            if step.number == 2:
                raise KeyboardInterrupt

        return fit(train, settings, stop)

    monkeypatch.setattr(command, "fit", interrupted)
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "Interrupted after 2 steps" in printed.err
    assert "2 steps in" in printed.out
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "metrics.json").read_text())["interrupted"] is True


def test_an_interrupt_before_there_is_anything(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_loss", interrupt)
    assert main([*SMALL, "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "python -m examples.particles: interrupted; nothing was written" in capsys.readouterr().err


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "attention.png").write_bytes(b"old")

    def fail(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(command, "draw", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        main([*SMALL, "--steps", "1", "--out", str(tmp_path)])
    assert (tmp_path / "attention.png").read_bytes() == b"old"
    monkeypatch.setattr(command, "draw", lambda *arguments: b"new")
    assert not (tmp_path / "metrics.json").exists()
    assert main([*SMALL, "--steps", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "attention.png").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--epochs 3", "unrecognized arguments: --epochs 3"),
        ("--length 3", "unrecognized arguments: --length 3"),
        ("--window 3", "unrecognized arguments: --window 3"),
        ("--steps 0", "argument --steps: expected a whole number from 1"),
        ("--radius wide", "argument --radius: invalid float value: 'wide'"),
        ("--radius 0", "radius: expected a finite number above 0 and below 1e+06, got 0.0"),
        ("--particles 1", "particles: expected an int of at least 2, got 1"),
        ("--particles 1000", "particles: expected at most 32"),
    ],
)
def test_a_mistake_is_told_in_one_line(options: str, text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("python -m examples.particles: error: ")
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
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert f"pip install 'anyattention[{extra}]'" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("force", "words"), [(0.5, "4.0 times smaller"), (2.0, "train for longer"), (3.0, "train for longer")]
)
def test_the_verdict_is_honest(force: float, words: str) -> None:
    errors = {name: Errors(0.1, 0.1, mae, mae) for name, mae in (("equivariant", force), ("plain", 2.0), ("mean", 2.5))}
    assert words in report._verdict(errors)
