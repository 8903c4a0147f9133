"""End to end on small settings: what train and predict write, and that both tell the same."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import anyattention
from anyattention.cli import main
from anyattention.cli import training as cli_training
from anyattention.training import NodeClassifier, accuracy, load_digits, load_npz, predict_logits, roc_auc

SMALL = ["--hidden", "8", "--heads", "2"]
FILES = {"model.safetensors", "config.json", "metrics.json", "attention.png"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_picture(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82") and len(content) > 10_000


@pytest.fixture
def sparse_file(data_files, tmp_path: Path) -> Path:
    return data_files.write(tmp_path / "sparse.npz", data_files.sparse_arrays())


@pytest.fixture
def dense_file(data_files, tmp_path: Path) -> Path:
    return data_files.write(tmp_path / "dense.npz", data_files.dense_arrays())


@pytest.mark.parametrize("layer", ["gat", "gatv2", "dot"])
def test_train_on_digits(layer: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    command = ["train", "--layer", layer, *SMALL, "--epochs", "3", "--seed", "4", "--out", str(out)]
    assert main(command) == 0
    assert names(out) == FILES
    assert is_picture(out / "attention.png")
    metrics = json.loads((out / "metrics.json").read_text())
    model, data = anyattention.load(out), load_digits(4)
    test = data.splits[0].test
    assert metrics["test_accuracy"] == accuracy(predict_logits(model, data)[test], data.labels[test])
    assert metrics["labels"] == {"train": 100, "validation": 100, "test": 1597}
    assert metrics["training"]["seed"] == 4
    assert metrics["model"] == model.config.to_dict()
    assert model.config.score == {"gat": "additive", "gatv2": "dynamic", "dot": "dot"}[layer]
    assert torch.get_num_threads() == 1, "the graph is a small one"
    printed = capsys.readouterr()
    assert f"Test accuracy: {metrics['test_accuracy']:.4f}" in printed.out
    assert "validation accuracy=" in printed.err
    assert "loss=" in printed.err


def test_train_and_predict_on_sparse_features(sparse_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(sparse_file), "--epochs", "4", "--out", str(out)]) == 0
    assert names(out) == FILES
    assert is_picture(out / "attention.png")
    model, data = anyattention.load(out), load_npz(sparse_file)
    # The published settings of GAT on citation graphs.
    config = model.config
    assert (config.score, config.hidden, config.heads, config.dropout) == ("additive", 64, 8, 0.6)
    expected = predict_logits(model, data).softmax(1).numpy()

    written = tmp_path / "predictions.npz"
    assert main(["predict", "--model", str(out), "--data", str(sparse_file), "--out", str(written)]) == 0
    with np.load(written, allow_pickle=False) as file:
        assert set(file.files) == {"classes", "probabilities"}
        np.testing.assert_array_equal(file["probabilities"], expected)
        np.testing.assert_array_equal(file["classes"], expected.argmax(1))

    assert main(["predict", "--model", str(out), "--data", str(sparse_file)]) == 0
    with open(out / "predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["node", "class", "probability_0", "probability_1"]
    assert [int(row[0]) for row in rows] == list(range(13))
    assert [int(row[1]) for row in rows] == expected.argmax(1).tolist()
    np.testing.assert_array_equal(np.array([row[2:] for row in rows], dtype=np.float32), expected)


def test_train_on_all_splits(dense_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(dense_file), "--epochs", "4", "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    splits = metrics["splits"]
    assert [split["split"] for split in splits] == [0, 1]
    for metric in ("test_roc_auc", "test_accuracy"):
        values = [split[metric] for split in splits]
        assert metrics[metric] == pytest.approx(np.mean(values), abs=1e-12)
        assert metrics[f"{metric}_standard_deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    best = max(splits, key=lambda split: split["validation_roc_auc"])
    assert metrics["saved_split"] == best["split"]
    model, data = anyattention.load(out), load_npz(dense_file)
    assert model.config.residual
    assert model.config.layer_norm
    test = data.splits[best["split"]].test
    logits = predict_logits(model, data)[test]
    assert roc_auc(logits[:, 1] - logits[:, 0], data.labels[test]) == best["test_roc_auc"]


def test_train_on_one_split(dense_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", "--data", str(dense_file), "--epochs", "2", "--split", "1", "--no-residual", "--no-layer-norm"]
    assert main([*command, "--dropout", "0.25", "--threads", "2", "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert [split["split"] for split in metrics["splits"]] == [1]
    assert metrics["test_roc_auc"] == metrics["splits"][0]["test_roc_auc"]
    model = anyattention.load(out)
    assert (model.config.residual, model.config.layer_norm) == (False, False)
    # A dropout that was asked for is meant for inputs and attention weights.
    assert model.config.layer_configs()[0].base.dropout == 0.25
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("given", "fanout"), [([], [10, 10]), (["--fanout", "-1,3"], [-1, 3]), (["--fanout=2,-1"], [2, -1])]
)
def test_train_on_mini_batches(given: list[str], fanout: list[int], dense_file: Path, tmp_path: Path, capsys) -> None:
    command = ["train", "--data", str(dense_file), "--epochs", "3", "--split", "1", *SMALL, "--output-heads", "2"]
    runs = []
    for name in ("one", "again"):
        out = tmp_path / name
        assert main([*command, "--batch-size", "2", *given, "--out", str(out)]) == 0
        assert names(out) == FILES
        runs.append(anyattention.load(out).state_dict())
    torch.testing.assert_close(runs[1], runs[0], atol=0, rtol=0)
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert (metrics["training"]["batch_size"], metrics["training"]["fanout"]) == (2, fanout)
    assert metrics["splits"][0]["epochs"] == 3
    # The test labels are scored over the whole graph.
    model, data = anyattention.load(tmp_path / "one"), load_npz(dense_file)
    test = data.splits[1].test
    assert metrics["test_accuracy"] == accuracy(predict_logits(model, data)[test], data.labels[test])
    assert "3/3" in capsys.readouterr().err, "the bar counts epochs"


@pytest.mark.parametrize("data", ["sparse", "digits"])
def test_mini_batches_of_sparse_features_and_of_edge_features(data: str, sparse_file: Path, tmp_path: Path) -> None:
    name = str(sparse_file) if data == "sparse" else data
    out = tmp_path / "run"
    command = ["train", "--data", name, "--epochs", "2", *SMALL, "--batch-size", "30", "--fanout", "3,4"]
    assert main([*command, "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["training"]["fanout"] == [3, 4]
    assert (metrics["model"]["edge_dim"] is None) == (data == "sparse")
    assert main([*command[:-4], "--out", str(tmp_path / "whole")]) == 0
    assert json.loads((tmp_path / "whole/metrics.json").read_text())["training"]["batch_size"] is None
    pairs = zip(*(anyattention.load(folder).parameters() for folder in (out, tmp_path / "whole")), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs)


def predict(model: Path, data: Path, out: Path) -> np.ndarray:
    assert main(["predict", "--model", str(model), "--data", str(data), "--out", str(out)]) == 0
    with np.load(out) as file:
        return file["probabilities"]


def test_nodes_alone_are_standardised_as_inside_their_graph(data_files, tmp_path: Path) -> None:
    """Nodes of one class, cut out of the graph: their own mean says nothing of the features' unit."""
    arrays = data_files.dense_arrays()
    arrays["edges"] = np.array([[0, 1], [2, 4], [4, 6]])
    whole = data_files.write(tmp_path / "whole.npz", arrays)
    run = tmp_path / "run"
    assert main(["train", "--data", str(whole), "--epochs", "20", "--out", str(run)]) == 0
    part = np.arange(8, 17, 2)
    cut = {"node_features": arrays["node_features"][part], "edges": np.empty((0, 2), dtype=int)}
    alone = predict(run, data_files.write(tmp_path / "part.npz", cut), tmp_path / "part_out.npz")
    inside = predict(run, whole, tmp_path / "whole_out.npz")[part]
    np.testing.assert_allclose(alone, inside, atol=1e-6)


def test_predict_scores_the_labels_that_are_there(data_files, tmp_path: Path, capsys) -> None:
    arrays = data_files.dense_arrays()
    run = tmp_path / "run"
    data = data_files.write(tmp_path / "whole.npz", arrays)
    assert main(["train", "--data", str(data), "--epochs", "4", "--out", str(run)]) == 0
    nodes = {key: arrays[key] for key in ("node_features", "edges")}
    capsys.readouterr()
    probabilities = predict(run, data_files.write(tmp_path / "bare.npz", nodes), tmp_path / "out.npz")
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert printed.err == ""
    labels = np.where(np.arange(17) < 6, arrays["node_labels"], -1)
    right = int((probabilities.argmax(1) == labels).sum())
    predict(run, data_files.write(tmp_path / "some.npz", {**nodes, "node_labels": labels}), tmp_path / "out.npz")
    assert f"that of the label for {right} of the 6 labelled nodes ({right / 6:.1%})" in capsys.readouterr().out
    too_many = data_files.write(tmp_path / "three.npz", {**nodes, "node_labels": np.full(17, 2)})
    assert main(["predict", "--model", str(run), "--data", str(too_many)]) == 2
    assert "at most 2 classes, as in the training, got 3 features and 3 classes" in capsys.readouterr().err


def test_a_folder_without_mean_and_deviation_still_predicts(dense_file: Path, tmp_path: Path, capsys) -> None:
    """As folders were before models kept them: features are standardised by the file that is given, which is told."""
    run, data = tmp_path / "run", load_npz(dense_file)
    torch.manual_seed(0)
    model = NodeClassifier(3, 2, hidden=4, heads=2).eval()
    anyattention.save(model, run)
    settings = json.loads((run / "config.json").read_text())
    for name in ("standardise", "equal_weights"):
        del settings["config"][name]
    (run / "config.json").write_text(json.dumps(settings))
    safetensors.torch.save_file(model.state_dict(), run / "model.safetensors")
    capsys.readouterr()
    found = predict(run, dense_file, tmp_path / "out.npz")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run}: saved without the mean and deviation of its training's features, so those of ")
    wide = data.features.double()
    expected = model(((wide - wide.mean(0)) / wide.std(0, correction=0)).float(), data.graph).output.softmax(1)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)


def test_a_feature_that_was_constant_in_the_training_is_told(data_files, tmp_path: Path, capsys) -> None:
    arrays, run = data_files.dense_arrays(), tmp_path / "run"
    arrays["node_features"][:, 1] = 0.1
    data = data_files.write(tmp_path / "a.npz", arrays)
    assert main(["train", "--data", str(data), "--epochs", "4", "--out", str(run)]) == 0
    capsys.readouterr()
    before = predict(run, data, tmp_path / "out.npz")
    assert capsys.readouterr().err == ""
    arrays["node_features"][0, 1] = 1e6
    other = data_files.write(tmp_path / "b.npz", arrays)
    np.testing.assert_array_equal(predict(run, other, tmp_path / "out.npz"), before)
    told = f"{other}: not used, since the training had the same number everywhere: feature 1.\n"
    assert capsys.readouterr().err == told


def test_what_is_not_used_is_told_in_a_line(data_files, tmp_path: Path, capsys) -> None:
    arrays = {**data_files.dense_arrays(), "edge_weight": np.ones(17)}
    arrays["edges"] = np.concatenate([arrays["edges"], arrays["edges"][:, ::-1]])
    data, run = data_files.write(tmp_path / "more.npz", arrays), tmp_path / "run"
    lines = [
        f"{data}: edges lists 17 edges again, either way round; each counts once, in both directions.",
        f"{data}: Not used, since the format has no such key: edge_weight.",
    ]
    assert main(["train", "--data", str(data), "--epochs", "2", "--split", "0", "--out", str(run)]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == lines
    predict(run, data, tmp_path / "out.npz")
    assert capsys.readouterr().err.splitlines() == lines


def test_without_tqdm_and_matplotlib(dense_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "attention.png").write_text("of an earlier run")
    for package in ("tqdm", "matplotlib"):
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", "--data", str(dense_file), "--epochs", "3", "--out", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "tqdm is not installed: no progress bar (pip install 'anyattention[demo]')",
        "matplotlib is not installed: no picture of the attention (pip install 'anyattention[demo]')",
    ]
    assert f"Wrote model.safetensors, config.json and metrics.json to {run}" in printed.out
    assert names(run) == FILES - {"attention.png"}
    assert predict(run, dense_file, tmp_path / "out.npz").shape == (17, 2)


def interrupt_at(epoch: int, monkeypatch, fits: int = 1) -> None:
    """Ctrl-C in the progress bar's callback, in the given epoch of the given fit."""
    fit, calls = cli_training.fit, []

    def interrupted_fit(data, split, config, settings, on_epoch):
        calls.append(None)

        def stop(report) -> None:
            on_epoch(report)
            if len(calls) == fits and report.number == epoch:
                raise KeyboardInterrupt

        return fit(data, split, config, settings, stop)

    monkeypatch.setattr(cli_training, "fit", interrupted_fit)


def test_an_interrupt_writes_the_best_epoch_so_far(dense_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    interrupt_at(3, monkeypatch)
    out = tmp_path / "run"
    assert main(["train", "--data", str(dense_file), "--epochs", "400", "--out", str(out)]) == 0
    assert names(out) == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["interrupted"] is True
    assert [split["epochs"] for split in metrics["splits"]] == [3]
    assert "Interrupted after 3 epochs; the best one, " in capsys.readouterr().err


def test_an_interrupt_in_the_second_split_keeps_the_first(dense_file: Path, tmp_path: Path, monkeypatch) -> None:
    interrupt_at(2, monkeypatch, fits=2)
    out = tmp_path / "run"
    assert main(["train", "--data", str(dense_file), "--epochs", "4", "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert [split["epochs"] for split in metrics["splits"]] == [4, 2]


def test_an_interrupt_before_there_is_anything(dense_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupt)
    out = tmp_path / "run"
    assert main(["train", "--data", str(dense_file), "--epochs", "4", "--out", str(out)]) == 130
    assert names(out) == set()
    assert "anyattention: interrupted; nothing was written" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_interrupt(number: signal.Signals, dense_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # A shell's background jobs ignore interrupts, and so do their children, this test's among them.
    run = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    run += "from anyattention.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "train", "--data", str(dense_file), "--epochs", "1000000"]
    command += ["--patience", "1000000", "--threads", "1", "--split", "0", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stderr is not None
        seen = b""
        while b"loss=" not in seen:
            piece = os.read(process.stderr.fileno(), 4096)
            assert piece, seen
            seen += piece
        process.send_signal(number)
        printed, rest = process.communicate()
    assert process.returncode == 0, rest
    assert b"Traceback" not in seen + rest
    assert b"Interrupted after" in rest
    assert b"Wrote model.safetensors" in printed
    assert names(out) == FILES
    assert json.loads((out / "metrics.json").read_text())["interrupted"] is True
    anyattention.load(out)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_any_time(number: signal.Signals, dense_file: Path, tmp_path: Path) -> None:
    """From the first instant on: no traceback, and what is written is whole."""
    run = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    run += "from anyattention.cli import main; print('ready', flush=True); sys.exit(main())"
    for turn in range(10):
        out = tmp_path / str(turn)
        command = [sys.executable, "-c", run, "train", "--data", str(dense_file), "--epochs", "1000000"]
        command += ["--patience", "1000000", "--threads", "1", "--split", "0", "--out", str(out)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.4 * turn)
            process.send_signal(number)
            _, told = process.communicate()
        assert b"Traceback" not in told
        if process.returncode == 0:
            anyattention.load(out)
            assert names(out) == FILES
        else:
            # Before the command has begun, SIGTERM has its default.
            assert process.returncode in ((130,) if number == signal.SIGINT else (143, -signal.SIGTERM))
            assert not out.exists() or names(out) == set()
