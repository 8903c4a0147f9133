"""`anyattention demo sequence`: what it prints and writes, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest

from anyattention.cli import main
from anyattention.cli import sequence as cli_sequence
from anyattention.training import sequence

SMALL = ["demo", "sequence", "--length", "96", "--window", "16", "--threads", "1"]
FILES = {"attention.png", "metrics.json"}


@pytest.fixture
def _little_text(monkeypatch) -> None:
    load = cli_sequence.load_source
    monkeypatch.setattr(cli_sequence, "load_source", lambda: load(20_000))


@pytest.mark.usefixtures("_little_text")
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


@pytest.mark.usefixtures("_little_text")
def test_an_interrupt_reports_what_there_is(tmp_path: Path, monkeypatch, capsys) -> None:
    fit = cli_sequence.fit_sequence

    def interrupted(tokens, settings, on_step):
        def stop(step) -> None:
            on_step(step)
            if step.number == 2:
                raise KeyboardInterrupt

        return fit(tokens, settings, stop)

    monkeypatch.setattr(cli_sequence, "fit_sequence", interrupted)
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "Interrupted after 2 steps" in printed.err
    assert "192 bytes in" in printed.out
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "metrics.json").read_text())["interrupted"] is True


@pytest.mark.usefixtures("_little_text")
def test_an_interrupt_before_there_is_anything(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sequence, "train_step", interrupt)
    assert main([*SMALL, "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "anyattention: interrupted; nothing was written" in capsys.readouterr().err


@pytest.mark.usefixtures("_little_text")
def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "attention.png").write_bytes(b"old")

    def fail(*arguments):
        raise RuntimeError("no picture")

    monkeypatch.setattr(cli_sequence, "draw_sequence", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        main([*SMALL, "--steps", "1", "--out", str(tmp_path)])
    assert (tmp_path / "attention.png").read_bytes() == b"old"
    monkeypatch.setattr(cli_sequence, "draw_sequence", lambda *arguments: b"new")
    written = []
    write = cli_sequence.write_atomically
    monkeypatch.setattr(cli_sequence, "write_atomically", lambda *a: written.append(a[0].name) or write(*a))
    assert main([*SMALL, "--steps", "1", "--out", str(tmp_path)]) == 0
    assert written == ["metrics.json", "attention.png"]
    assert (tmp_path / "attention.png").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("poem", "argument subject: invalid choice: 'poem'"),
        ("sequence --epochs 3", "argument --epochs: not an option of `demo sequence`"),
        ("--steps 3", "argument --steps: not an option of `demo digits`"),
        ("digits --window 3", "argument --window: not an option of `demo digits`"),
        ("sequence --steps 0", "argument --steps: expected a whole number from 1"),
        ("sequence --window 4096", "window: expected less than length=2048, got 4096"),
        ("sequence --length 1", "length: expected an int of at least 2, got 1"),
        ("sequence --length 300000", "--length: expected less than the held-out text's 200,000 bytes, got 300000"),
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
    assert words in cli_sequence._verdict(cli_sequence._Scores(2.0, held_out, 4.5, 3.5))


def test_what_it_writes_cannot_steer_a_terminal() -> None:
    assert cli_sequence._quoted(b"a = 1\n\x1b[2J\xff\r") == "  | a = 1\n  | \ufffd[2J\ufffd\ufffd"
