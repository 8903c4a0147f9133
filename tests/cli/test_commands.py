"""What the commands say: help, info, the demo, and one line for each mistake, before anything is written."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import anyattention
from anyattention import native
from anyattention.cli import demo, main, train
from anyattention.nn import MultiHeadAttention
from anyattention.training import NodeClassifier, NodeData, load_digits, load_npz

COMMANDS = ("train", "demo", "predict", "info")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], COMMANDS),
        (["train"], ("--data", "--layer {gat,gatv2,dot}", "--hidden", "--heads", "--epochs", "--lr", "--dropout")),
        (["train"], ("--weight-decay", "--seed", "--out", "--residual", "--layer-norm", "--split", "metrics.json")),
        (["train"], ("--batch-size N", "--fanout N,N", "default: 10,10")),
        (["demo"], ("--seed", "--out", "four plain", "without attention", "digits", "--epochs")),
        (["predict"], ("--model", "--data", "--out", "FILE.csv", "FILE.npz", "probabilities")),
        (["info"], ("kernels", "extras")),
    ],
)
def test_help(command: list[str], words: tuple[str, ...], capsys) -> None:
    assert main([*command, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for word in words:
        assert word in printed.out


def test_info(capsys) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^anyattention +{re.escape(anyattention.__version__)}$", printed, re.MULTILINE)
    assert torch.__version__ in printed
    assert f"{torch.get_num_threads()} threads" in printed
    about = native.info()
    assert re.search(rf"^kernels built +{', '.join(about.built) or 'none'}$", printed, re.MULTILINE)
    assert re.search(rf"^kernels used +{about.level or 'none'}", printed, re.MULTILINE)
    for extra in ("demo", "pyg", "viz"):
        assert re.search(rf"^extra {extra} +(not )?installed", printed, re.MULTILINE)


def test_info_without_kernels(monkeypatch, capsys) -> None:
    monkeypatch.setattr(native, "info", lambda: native.NativeInfo((), ("baseline",), reason="no compiler was there"))
    assert main(["info"]) == 0
    expected = "kernels used  none, the reference implementation runs: no compiler was there"
    assert expected in capsys.readouterr().out


def test_info_says_what_is_missing(monkeypatch, capsys) -> None:
    def version(package: str) -> str:
        if package == "matplotlib":
            raise metadata.PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "not installed, matplotlib missing: pip install 'anyattention[demo]'" in printed
    assert re.search(r"^extra pyg +installed: torch_geometric 1\.2\.3$", printed, re.MULTILINE)


def test_info_with_an_unknown_level() -> None:
    environment = {**os.environ, "ANYATTENTION_LEVEL": "v9"}
    command = [sys.executable, "-m", "anyattention.cli", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"anyattention: error: ANYATTENTION_LEVEL: expected one of .*, got 'v9'\n", done.stderr)


def test_demo(tmp_path: Path, capsys) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--epochs", "4", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "config.json", "metrics.json", "attention.png"
    }  # fmt: skip
    printed = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"{metrics['test_accuracy']:.2%}  graph attention (this package)" in printed
    for name in (
        "the same network, attention off",
        "nearest-neighbour vote",
        "logistic regression",
        "LabelSpreading, same links",
        "LabelSpreading, nearest neighbours",
    ):
        assert re.search(rf"\d\d\.\d\d%  {name}$", printed, re.MULTILINE)
    assert "1,597" in printed
    own, off = (
        float(re.search(rf"(\d\d\.\d\d)%  {name}", printed)[1]) for name in (r"graph attention", "the same network")
    )
    points = re.search(r"With attention off it reads (\d+\.\d) points (fewer|more)\.", printed)
    assert float(points[1]) == pytest.approx(abs(own - off), abs=0.06)
    assert points[2] == ("fewer" if off < own else "more")
    assert re.search(r" won, | share the first place", printed)
    assert str(out / "attention.png") in printed
    assert main(["predict", "--model", str(out), "--out", str(tmp_path / "digits.npz")]) == 0
    with np.load(tmp_path / "digits.npz") as file:
        assert file["probabilities"].shape == (1797, 10)


def test_a_network_of_the_earlier_digits_still_predicts(tmp_path: Path, capsys) -> None:
    """One without edge features, which those digits did not have."""
    anyattention.save(NodeClassifier(32, 10, hidden=8, heads=2), tmp_path / "old")
    assert main(["predict", "--model", str(tmp_path / "old"), "--out", str(tmp_path / "digits.csv")]) == 0
    expected = f"{tmp_path / 'old'}: trained without features of edges, so those of digits are not used\n"
    assert capsys.readouterr().err == expected


def test_the_demo_without_tqdm_and_matplotlib(tmp_path: Path, monkeypatch, capsys) -> None:
    for package in ("tqdm", "matplotlib"):
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "demo"
    assert main(["demo", "--epochs", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("is not installed") == 2
    assert "attention.png" not in printed.out
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "metrics.json"}


def test_the_demo_says_what_was_learnt(require) -> None:
    data = load_digits(0)
    (split,) = data.splits
    model = NodeClassifier(data.in_features, 10, hidden=8, heads=2, edge_dim=data.edge_dim).eval()
    text = " ".join(demo._what_it_learnt(model, data, split).split())
    logits, weights = model(data.features, data.graph, data.edge_features, return_weights=True)
    truth, read = data.labels[split.test].numpy(), logits[split.test].argmax(1).numpy()
    counts = require("sklearn.metrics").confusion_matrix(truth, read, labels=range(10))
    correct = counts.diagonal() / counts.sum(1)
    np.fill_diagonal(counts, 0)
    assert f"reads {correct.argmax()} best ({correct.max():.0%} correct)" in text
    assert f"and {correct.argmin()} worst ({correct.min():.0%})" in text
    found = re.search(r"made (\d+) times, is to take an? (\d) for an? (\d)\.", text)
    assert found
    times, taken, said = map(int, found.groups())
    assert times == counts[taken, said] == counts.max()

    test, attended, total, linked, rows = set(split.test.tolist()), 0.0, 0.0, 0.0, 0.0
    degrees = data.graph.query_index.bincount(minlength=1797)
    for (key, query), weight in zip(data.graph.edge_index.T.tolist(), weights.tolist(), strict=True):
        if query in test and key != query:
            same = bool(data.labels[key] == data.labels[query])
            attended, total = attended + weight * same, total + weight
            linked, rows = linked + same / int(degrees[query]), rows + 1 / int(degrees[query])
    assert f"{attended / total:.1%} of its attention goes" in text
    assert f"it would be {linked / rows:.1%}." in text


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ((0.97, 0.95, 0.92, 0.89), ("Ours won, 2.0 points ahead of A.",)),
        ((0.93, 0.95, 0.92, 0.89), ("A won, 2.0 points ahead of ours.", "Ours came 2.0 points behind the winner.")),
        ((0.90, 0.95, 0.92, 0.89), ("A won, 3.0 points ahead of B.", "Ours came 5.0 points behind the winner.")),
        ((0.95, 0.95, 0.92, 0.89), ("Ours and A share the first place.",)),
    ],
)
def test_the_demo_says_who_won(scores: tuple[float, ...], words: tuple[str, ...]) -> None:
    results = list(zip(("ours", "A", "B", "C"), scores, strict=True))
    lines = demo._comparison(results, 1597).splitlines()
    for line in words:
        assert line in lines
    assert ("Ours came" in "\n".join(lines)) == (len(words) == 2)


@pytest.fixture
def folder(tmp_path: Path, data_files) -> Path:
    """A working folder with data, broken data and models."""
    data_files.write(tmp_path / "good.npz", data_files.dense_arrays())
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", weights=np.arange(3))
    np.savez(tmp_path / "pickled.npz", y=np.array([{}, {}], dtype=object))
    anyattention.save(NodeClassifier(5, 2, hidden=4, heads=2), tmp_path / "five")
    anyattention.save(NodeClassifier(3, 2, hidden=4, heads=2, edge_dim=1), tmp_path / "edges")
    anyattention.save(MultiHeadAttention(8, 2), tmp_path / "dense")
    anyattention.save(NodeClassifier(3, 2, hidden=4, heads=2), tmp_path / "cut")
    weights = (tmp_path / "cut/model.safetensors").read_bytes()
    (tmp_path / "cut/model.safetensors").write_bytes(weights[:100])
    return tmp_path


MISTAKES = [
    ("", "the following arguments are required: COMMAND"),
    ("learn", "invalid choice: 'learn'"),
    ("train --bogus", "unrecognized arguments: --bogus"),
    ("train --epochs", "argument --epochs: expected one argument"),
    ("train --epochs 0", "argument --epochs: expected a whole number from 1 to 2147483647, got '0'"),
    ("train --epochs many", "argument --epochs: expected a whole number from 1"),
    ("train --heads 1e99", "argument --heads: expected a whole number"),
    ("train --seed -1", "argument --seed: expected"),
    ("train --threads 0", "argument --threads: expected a whole number from 1"),
    ("train --layer gcn", "argument --layer: invalid choice: 'gcn'"),
    ("train --lr fast", "argument --lr: invalid float value: 'fast'"),
    ("train --lr nan", "learning_rate: expected a finite number above 0 and below 1e+06, got nan"),
    ("train --lr 1e38", "learning_rate: expected a finite number above 0 and below 1e+06, got 1e+38"),
    ("train --lr -1", "learning_rate: expected a finite number above 0 and below 1e+06, got -1"),
    ("train --dropout 1", "dropout: expected a finite number at least 0 and below 1, got 1"),
    ("train --weight-decay -1", "weight_decay: expected a finite number at least 0"),
    ("train --hidden 8 --heads 3", "heads: expected a divisor of hidden=8, got 3"),
    ("train --batch-size 0", "argument --batch-size: expected a whole number from 1 to 2147483647, got '0'"),
    (
        "train --fanout 10,10",
        "--fanout: expected --batch-size with it, since a step over all nodes takes all neighbours",
    ),
    ("train --batch-size 8 --fanout 10", "argument --fanout: expected a number for each of the two layers"),
    ("train --batch-size 8 --fanout 5,5,5", "at least 1, or -1 for all neighbours, such as 10,10, got '5,5,5'"),
    ("train --batch-size 8 --fanout 5,0", "at least 1, or -1 for all neighbours, such as 10,10, got '5,0'"),
    ("train --batch-size 8 --fanout -1,-2", "at least 1, or -1 for all neighbours, such as 10,10, got '-1,-2'"),
    ("train --batch-size 8 --fanout five,5", "such as 10,10, got 'five,5'"),
    ("train --batch-size 8 --fanout", "argument --fanout: expected one argument"),
    ("train --batch-size 8 --fanout 5,5 -1,5", "unrecognized arguments: -1,5"),
    ("train --split 1", "--split: expected from 0 to 0, got 1"),
    ("train --data good.npz --split 2", "--split: expected from 0 to 1, got 2"),
    ("train --data digit", "or a file that ends in .graphml, .npz or .safetensors, got 'digit'"),
    ("train --data absent.npz", "absent.npz: expected a readable .npz file, got No such file"),
    ("train --data cut.npz", "cut.npz: expected a readable .npz file"),
    ("train --data text.npz", "text.npz: expected a readable .npz file"),
    ("train --data pickled.npz", "pickled.npz: expected a readable .npz file, got y holds pickled objects"),
    ("train --data other.npz", "other.npz: expected the keys x_indptr"),
    ("train --data good.npz --out good.npz", "good.npz: expected a folder, got File exists"),
    ("train --data good.npz --out good.npz/run", "good.npz/run: expected a folder, got Not a directory"),
    ("demo --out good.npz", "good.npz: expected a folder"),
    ("demo --epochs 0", "argument --epochs: expected a whole number from 1"),
    ("demo poem", "argument subject: invalid choice: 'poem'"),
    ("demo digits --steps 3", "unrecognized arguments: --steps 3"),
    ("demo digits --window 3", "unrecognized arguments: --window 3"),
    ("demo digits --particles 3", "unrecognized arguments: --particles 3"),
    ("demo sequence", "'sequence' is an example now: run `python -m examples.language_model` in a checkout"),
    ("demo points --particles 5", "'points' is an example now: run `python -m examples.particles` in a checkout"),
    ("predict", "the following arguments are required: --model"),
    ("predict --model absent", "model.safetensors: expected a readable safetensors file, got No such file"),
    ("predict --model dense --data good.npz", "--model: expected a NodeClassifier, got MultiHeadAttention"),
    ("predict --model cut --data good.npz", "model.safetensors: expected a readable safetensors file"),
    ("predict --model five --data good.npz", "--data: expected 5 features and at most 2 classes, as in the training"),
    (
        "predict --model edges --data good.npz",
        "--data: expected edges with 1 features, as in the training, got edges with no",
    ),
    ("predict --model five --data cut.npz", "cut.npz: expected a readable .npz file"),
    ("predict --model five --out result.txt", "--out: expected a file that ends in .csv or .npz, got 'result.txt'"),
    ("predict --model five --out good.npz/result.csv", "--data: expected 5 features"),
    ("info now", "unrecognized arguments: now"),
]


@pytest.mark.parametrize(("command", "text"), MISTAKES)
def test_a_mistake_is_told_in_one_line(command: str, text: str, folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("anyattention: error: ")
    assert printed.err.count("\n") == 1
    assert text in printed.err
    assert printed.out == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "anyattention.cli", "info"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def run(arguments: list[str], **streams) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "anyattention.cli", *arguments], text=True, check=False, **streams)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_output_is_told_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        ended = run(["info"], stdout=full, stderr=subprocess.PIPE)
    line = "anyattention: error: the output cannot be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (2, line)


@pytest.mark.parametrize("closed", [(1,), (0, 1), (1, 2), (0, 1, 2)])
def test_closed_streams(closed: tuple[int, ...], data_files: ModuleType, tmp_path: Path) -> None:
    """No file that is written takes the number of a closed stream, into which other code may print."""
    close = "import os, sys; [os.close(number) for number in map(int, sys.argv.pop(1))]; os.execv(sys.executable, "
    close += "[sys.executable, '-m', 'anyattention.cli', *sys.argv[1:]])"
    out, data = str(tmp_path / "run"), data_files.write(tmp_path / "data.npz", data_files.dense_arrays())
    arguments = ["train", "--data", str(data), "--epochs", "2", "--split", "0", "--out", out]
    command = [sys.executable, "-c", close, "".join(map(str, closed)), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    anyattention.load(out)


def test_a_loss_that_is_not_finite_is_told_in_one_line(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)

    def load_data(name: str, seed: int) -> NodeData:
        data = load_npz(name)
        return dataclasses.replace(data, features=data.features * torch.inf)

    monkeypatch.setattr(train, "load_data", load_data)
    assert main(["train", "--data", "good.npz", "--out", "run"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"anyattention: error: loss of epoch 1: expected a finite number, got nan\..*rate.*", last)
    assert list((folder / "run").iterdir()) == []


def test_an_unwritable_folder_is_refused_before_training(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["train", "--data", "good.npz", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error == "anyattention: error: run: expected a writable folder, got read-only\n"


def test_a_missing_scikit_learn_is_named_before_training(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ["sklearn", *(name for name in sys.modules if name.startswith("sklearn."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'anyattention[demo]'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: " ".join(command) or "-")
def test_help_imports_nothing_of_what_the_commands_run(command) -> None:
    script = (
        f"import sys; from anyattention.cli import main; main([*{command}, '--help']); print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    shown, _, modules = done.stdout.partition("MODULES")
    assert "usage: anyattention" in shown
    loaded = set(modules.split())
    assert not loaded & {
        "torch",
        "numpy",
        "safetensors",
        "sklearn",
        "matplotlib",
        "scipy",
        "tqdm",
        "importlib.metadata",
    }
    ours = {name for name in loaded if name.startswith("anyattention.") and not name.startswith("anyattention.cli")}
    assert ours == {"anyattention.errors", "anyattention.signals"}
    assert "anyattention.cli.training" not in loaded


def test_a_mistake_is_told_without_pytorch() -> None:
    script = "import sys; from anyattention.cli import main; main(['train', '--epochs', '0']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "expected a whole number from 1" in done.stderr
    assert "torch" not in done.stdout.split()
