"""`python -m examples.memory`: what it prints and writes, and what it refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import examples.memory.__main__ as command
from anyattention import load
from examples.memory import report, train
from examples.memory.__main__ import main
from examples.memory.images import Data, load_data
from examples.memory.model import Encoder, Settings
from examples.memory.recall import Answers, Pixels, Recalled, encode
from examples.memory.report import Report, Shares

FILES = {"attention.png", "encoder.safetensors", "memory", "metrics.json"}
SMALL = ["--batch", "64", "--k", "5", "--key-dim", "8", "--channels", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def path(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of the small data set."""
    train, test = load_data(data_folder / "fashion_small.npz")
    path = tmp_path_factory.mktemp("data") / "images.npz"
    parts = {"train": train.chosen(torch.arange(300)), "test": test.chosen(torch.arange(100))}
    images = {f"{part}_images": images.pixels.numpy() for part, images in parts.items()}
    labels = {f"{part}_labels": images.labels.numpy().astype(np.uint8) for part, images in parts.items()}
    np.savez(path, **images, **labels)
    return path


def run(path: Path, out: Path, *options: str) -> int:
    return main([*SMALL, "--data", str(path), "--out", str(out), *options])


def test_it_says_how_it_went(path: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert run(path, out, "--steps", "5", "--held-out", "1") == 0
    printed = capsys.readouterr()
    assert {file.name for file in out.iterdir()} == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["interrupted"], metrics["settings"]["k"]) == (5, False, 5)
    assert metrics["images"] == {"train": 300, "test": 100}
    assert "300 images of clothes to remember, 100 for the test" in printed.out
    for name, words in (("memory", "attention to"), ("neighbours", "5 nearest"), ("logistic", "logistic regression")):
        assert f"  {metrics['accuracy'][name]:6.1%}  {words}" in printed.out
    held_out = metrics["held_out"]
    assert (held_out["class"], held_out["before"]["held_out"]) == (1, 0)
    for name, words in (("held_out", 'of the class "trouser"'), ("others", "of the other classes"), ("all", "of all")):
        assert f"  {held_out['before'][name]:6.1%}  {held_out['after'][name]:6.1%}  {words}" in printed.out
    assert f"{metrics['parameters']:,} parameters, 5 steps" in printed.out
    assert str(out / "attention.png") in printed.out
    assert "5/5" in printed.err


def test_what_is_saved_answers_as_before(path: Path, tmp_path: Path) -> None:
    assert run(path, tmp_path, "--steps", "2") == 0
    settings = json.loads((tmp_path / "metrics.json").read_text())["settings"]
    encoder = Encoder(Settings(**settings)).eval()
    encoder.load_state_dict(safetensors.torch.load_file(tmp_path / "encoder.safetensors"))
    test = load_data(path).test
    with torch.no_grad():
        answered = load(tmp_path / "memory")(encode(encoder, test.pixels)).output.argmax(1)
    share = float((answered == test.labels).double().mean())
    assert share == json.loads((tmp_path / "metrics.json").read_text())["accuracy"]["memory"]


def test_an_interrupt_reports_what_there_is(path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    fit = command.fit

    def interrupted(images, settings, on_step):
        def stop(step) -> None:
            on_step(step)
            if step.number == 2:
                raise KeyboardInterrupt

        return fit(images, settings, stop)

    monkeypatch.setattr(command, "fit", interrupted)
    assert run(path, tmp_path) == 0
    printed = capsys.readouterr()
    assert "Interrupted after 2 steps" in printed.err
    assert "2 steps in" in printed.out
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "metrics.json").read_text())["interrupted"] is True


def test_an_interrupt_before_there_is_anything(path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "attention_loss", interrupt)
    assert run(path, tmp_path) == 130
    assert list(tmp_path.iterdir()) == []
    assert "python -m examples.memory: interrupted; nothing was written" in capsys.readouterr().err


def test_a_picture_that_fails_leaves_the_old_one(path: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "attention.png").write_bytes(b"old")

    def fail(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(command, "draw", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        run(path, tmp_path, "--steps", "1")
    assert {file.name for file in tmp_path.iterdir()} == {"attention.png"}
    assert (tmp_path / "attention.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--epochs 3", "unrecognized arguments: --epochs 3"),
        ("--steps 0", "argument --steps: expected a whole number from 1"),
        ("--scale wide", "argument --scale: invalid float value: 'wide'"),
        ("--k 500", "k: expected less than batch=500, got 500"),
        ("--held-out 10", "held_out: expected a class from 0 to 9, got 10"),
        ("--data nowhere", "nowhere: expected a whole .npz file, got No such file or directory. Debian's package"),
        ("--data .", "train-images-idx3-ubyte.gz: expected a whole gzip file, got No such file"),
        ("--batch 290 --data PATH", "--batch: expected at most the 2"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    options: str, text: str, path: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options.replace("PATH", str(path)).split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("python -m examples.memory: error: ")
    assert printed.err.count("\n") == 1
    assert text in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["matplotlib", "tqdm", "sklearn"])
def test_a_missing_extra_is_named_before_the_work(
    package: str, path: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run(path, tmp_path / "run") == 2
    printed = capsys.readouterr()
    assert "pip install 'anyattention[demo]'" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("memory", "words"), [(0.9, "4.0 more right"), (0.86, "train for longer"), (0.8, "train for longer")]
)
def test_the_verdict_is_honest(memory: float, words: str) -> None:
    shares = Shares(0.0, 0.0, 0.0)
    assert words in report._verdict(Report(memory, 0.86, 0.84, shares, shares, 0.0))


def test_the_figures_are_those_of_the_answers(path: Path) -> None:
    data: Data = load_data(path)
    labels = data.test.labels
    settings, of_class = Settings(), labels == 8
    wrong = (labels + 1) % 10
    right = torch.arange(len(labels)) < 50
    answers = [
        _answers(torch.where(mask, labels, wrong), data) for mask in (right, ~of_class & right, of_class | right)
    ]
    pixels = Pixels(torch.where(right, wrong, labels), wrong)
    found = report.measure(Recalled(None, None, *answers, {}), pixels, data, settings)  # type: ignore[arg-type]
    assert (found.memory, found.neighbours, found.logistic) == (0.5, 0.5, 0.0)
    others = float(right[~of_class].double().mean())
    assert (found.before.held_out, found.before.others) == (0.0, pytest.approx(others))
    assert (found.after.held_out, found.after.others) == (1.0, pytest.approx(others))
    # Each attends with 0.75 to an image of the class it is told as.
    assert found.appended == pytest.approx(0.75)


def _answers(told: torch.Tensor, data: Data) -> Answers:
    first = {label: int((data.train.labels == label).nonzero()[0]) for label in range(10)}
    memories = torch.tensor([[first[int(label)], first[(int(label) + 1) % 10]] for label in told])
    probabilities = torch.nn.functional.one_hot(told, 10).float()
    return Answers(probabilities, torch.tensor([0.75, 0.25]).expand(len(told), 2), memories)
