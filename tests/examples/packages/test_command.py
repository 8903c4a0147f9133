"""`python -m examples.packages`: what it prints and writes, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import examples.packages.__main__ as command
from examples.packages.__main__ import main
from examples.packages.baselines import run_baseline
from examples.packages.data import load_packages
from examples.packages.guesses import with_guesses
from examples.packages.inputs import prepare_inputs
from examples.packages.model import PackageClassifier, Settings
from examples.packages.report import MEANINGS, Report, describe_scores
from examples.packages.train import Shares, accuracy, predict

FILES = {"attention.png", "metrics.json", "model.safetensors"}
SMALL = ["--width", "8", "--heads", "2"]


def test_it_says_how_it_went(packages_file: Path, tmp_path: Path, capsys) -> None:
    options = [*SMALL, "--data", str(packages_file), "--steps", "3", "--baselines", "--out", str(tmp_path / "run")]
    assert main(options) == 0
    printed = capsys.readouterr()
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["steps"], metrics["interrupted"], metrics["settings"]["width"]) == (3, False, 8)
    for score in (*metrics["accuracy"].values(), *(each["test"] for each in metrics["baselines"].values())):
        assert f"  {score:.4f}  " in printed.out
    assert set(metrics["relations"]) == set(MEANINGS)
    for name, shares in metrics["relations"].items():
        assert f"  {shares['attention']:9.1%}  {shares['links']:6.1%}   {MEANINGS[name]}" in printed.out
    for kind in ("attention", "links"):
        assert sum(shares[kind] for shares in metrics["relations"].values()) == pytest.approx(1)
    assert "60 packages" in printed.out
    assert str(tmp_path / "run/attention.png") in printed.out
    assert "3/3" in printed.err
    packages = load_packages(packages_file)
    inputs = with_guesses(packages, prepare_inputs(packages))
    model = PackageClassifier(inputs, Settings(width=8, heads=2), len(packages.classes)).eval()
    model.load_state_dict(load_file(tmp_path / "run/model.safetensors"))
    score = accuracy(predict(model, inputs, packages.test), packages.test, packages.labels)
    assert score == metrics["accuracy"]["test"]


def test_an_interrupt_reports_what_there_is(packages_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    fit = command.fit

    def interrupted(packages, inputs, settings, on_step):
        def stop(step) -> None:
            on_step(step)
            if step.number == 2:
                raise KeyboardInterrupt

        return fit(packages, inputs, settings, stop)

    monkeypatch.setattr(command, "fit", interrupted)
    assert main([*SMALL, "--data", str(packages_file), "--out", str(tmp_path)]) == 0
    assert "Interrupted after 2 steps" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "metrics.json").read_text())["interrupted"] is True


def test_an_interrupt_before_there_is_anything(packages_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.packages.train._step", interrupt)
    assert main([*SMALL, "--data", str(packages_file), "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "python -m examples.packages: interrupted; nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("", "the following arguments are required: --data"),
        ("--data none.npz", "none.npz"),
        ("--data none.npz --steps 0", "argument --steps: expected a whole number from 1"),
        ("--data none.npz --dropout 1", "dropout: expected a share below 1, got 1.0"),
        ("--data none.npz --heads 3", "heads: expected a divisor of width=256"),
    ],
)
def test_a_mistake_is_told_in_one_line(options: str, text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("python -m examples.packages: error: ")
    assert printed.err.count("\n") == 1
    assert text in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["matplotlib", "tqdm", "sklearn"])
def test_a_missing_extra_is_named_before_the_work(
    package: str, packages_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--data", str(packages_file), "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert "pip install 'anyattention[demo]'" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


def test_logistic_regression_on_words_is_that_of_a_dense_matrix(packages_file: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    packages = load_packages(packages_file)
    found = run_baseline("words", packages, prepare_inputs(packages))
    words = torch.zeros(60, packages.num_words)
    rows = torch.arange(60).repeat_interleave(packages.word_offsets.diff())
    words[rows, packages.words] = 1
    x, y = words.numpy(), packages.labels.numpy()
    train, test = packages.train.numpy(), packages.test.numpy()
    scores = {
        strength: LogisticRegression(C=strength, max_iter=100).fit(x[train], y[train]).score(x[test], y[test])
        for strength in (0.3, 1.0, 3.0, 10.0)
    }
    assert found["test"] == pytest.approx(scores[found["C"]])
    neighbours = run_baseline("words and neighbours' words", packages, prepare_inputs(packages))
    assert 0 <= neighbours["test"] <= 1


@pytest.mark.parametrize(
    ("score", "baselines", "words"),
    [
        (0.9, {"words": {"test": 0.8}}, "That is 10.0 points more than the best of the others."),
        (0.8, {"words": {"test": 0.8}}, "It has not learnt more than the others: train for longer."),
        (0.1, {}, "It has not learnt more than the others: train for longer."),
        (0.9, {}, "is added by --baselines"),
    ],
)
def test_the_verdict_is_honest(score: float, baselines, words: str, packages_file: Path) -> None:
    packages = load_packages(packages_file)
    scores = {"test": score, "validation": 0.5, "train": 0.5}
    report = Report(scores, packages.labels[packages.test], Shares({}, {}))
    assert words in describe_scores(report, packages, baselines)
