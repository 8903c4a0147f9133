"""`python -m examples.language_model`: what it prints and writes, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest

import examples.language_model.__main__ as command
from examples.language_model import report, train
from examples.language_model.__main__ import main

SMALL = ["--length", "96", "--window", "16", "--bytes", "20000", "--threads", "1"]
FILES = {"attention.png", "metrics.json"}


def test_it_says_how_it_went(tmp_path: Path, capsys) -> None:
    assert main([*SMALL, "--steps", "4", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["steps"], metrics["interrupted"], metrics["settings"]["window"]) == (4, False, 16)
    for name, bits in metrics["bits_per_byte"].items():
        assert f" {bits:5.2f}  " in printed.out, name
    assert re.search(r"The implementation that runs: \w+", printed.out)
    assert "384 bytes in" in printed.out
    assert re.search(r"[\d,]+ tokens per second", printed.out)
    for name in ("the window of 16", "dense, causal", "dense, causal, weights formed"):
        assert re.search(rf"  {name}$", printed.out, re.MULTILINE)
    assert "train for longer" in printed.out
    assert str(tmp_path / "run/attention.png") in printed.out
    assert "4/4" in printed.err


def test_an_interrupt_reports_what_there_is(tmp_path: Path, monkeypatch, capsys) -> None:
    fit = command.fit

    def interrupted(tokens, settings, on_step):
        def stop(step) -> None:
            on_step(step)
            if step.number == 2:
                raise KeyboardInterrupt

        return fit(tokens, settings, stop)

    monkeypatch.setattr(command, "fit", interrupted)
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "Interrupted after 2 steps" in printed.err
    assert "192 bytes in" in printed.out
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "metrics.json").read_text())["interrupted"] is True


def test_an_interrupt_before_there_is_anything(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", interrupt)
    assert main([*SMALL, "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "python -m examples.language_model: interrupted; nothing was written" in capsys.readouterr().err


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
        ("--particles 3", "unrecognized arguments: --particles 3"),
        ("--steps 0", "argument --steps: expected a whole number from 1"),
        ("--seed -1", "argument --seed: expected a whole number from 0"),
        ("--window 4096", "window: expected less than length=2048, got 4096"),
        ("--length 1", "length: expected an int of at least 2, got 1"),
        ("--length 300000", "--length: expected less than the held-out text's 200,000 bytes, got 300000"),
    ],
)
def test_a_mistake_is_told_in_one_line(options: str, text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("python -m examples.language_model: error: ")
    assert printed.err.count("\n") == 1
    assert text in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_a_missing_extra_is_named_before_training(package: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'anyattention[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("held_out", "words"),
    [(2.0, "needs 1.50 bits fewer than counting pairs"), (4.0, "less than counting pairs"), (5.0, "not learnt more")],
)
def test_the_verdict_is_honest(held_out: float, words: str) -> None:
    assert words in report.describe_scores(report.Scores(2.0, held_out, 4.5, 3.5))


def test_what_it_writes_cannot_steer_a_terminal() -> None:
    assert report._quoted(b"a = 1\n\x1b[2J\xff\r") == "  | a = 1\n  | \ufffd[2J\ufffd\ufffd"
