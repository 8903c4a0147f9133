"""What a benchmark's result file records; the numbers themselves are for no test."""

import importlib
import json
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def harness(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(_ROOT)
    module = importlib.import_module("benchmarks.harness")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_a_result_names_the_version_of_every_peer(harness, tmp_path, capsys):
    harness.write_result("some", {"case": {"ours": harness.Timing(1.0, 0.5, 2.0, None, 1.0)}})
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["cases"]["case"]["ours"]["median"] == 1.0
    environment = written["environment"]
    assert set(environment) == {"python", "versions", "processor", "threads", "kernels", "commit", "date"}
    assert {"anyattention", "torch", "torch_geometric", "local-attention", "dgl"} <= set(environment["versions"])


def test_the_language_model_has_a_result(harness, tmp_path, capsys):
    benchmark = importlib.import_module("benchmarks.examples")
    benchmark.main(["sequence", "--steps", "2", "--length", "64", "--window", "8", "--bytes", "20000"])
    written = json.loads((tmp_path / "sequence.json").read_text())
    assert written["environment"]["versions"]["torch"]
    figures = written["cases"]
    assert set(figures["bits_per_byte"]) == {"train", "held_out", "unigram", "pairs"}
    assert figures["tokens_per_second"] > 0
    assert [set(step) for step in figures["step"]] == [{"name", "seconds", "peak"}] * 3
    assert (figures["steps"], figures["settings"]["window"]) == (2, 8)


def test_the_particles_have_a_result(harness, tmp_path, capsys):
    benchmark = importlib.import_module("benchmarks.examples")
    benchmark.main(["points", "--steps", "2", "--particles", "4"])
    figures = json.loads((tmp_path / "points.json").read_text())["cases"]
    assert set(figures["errors"]) == {"equivariant", "plain", "mean"}
    assert figures["finite_difference_error"] < 1e-5
    assert (figures["steps"], figures["settings"]["particles"]) == (2, 4)


def test_what_is_no_example_has_no_result(harness, tmp_path):
    benchmark = importlib.import_module("benchmarks.examples")
    with pytest.raises(SystemExit, match=r"benchmarks\.examples"):
        benchmark.main(["digits"])
    with pytest.raises(SystemExit, match="no result"):
        benchmark.main(["points", "--window", "3"])
    assert not list(tmp_path.iterdir())
