"""Every example: it runs from a checkout in a process of its own, and its README is that of what it does."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_TINY = {
    "language_model": "--steps 2 --length 48 --window 8 --width 16 --heads 2 --blocks 1 --bytes 20000 --threads 1",
    "memory": "--steps 2 --batch 50 --k 4 --key-dim 4 --channels 2 --threads 1",
    "particles": "--steps 2 --batch 2 --particles 4 --trajectories 5 --samples 1 --width 8 --plain-width 8 --blocks 1",
    "packages": "--steps 2 --width 8 --heads 2 --threads 1",
}
# The data set that an example reads, of those that tests find.
_DATA = {"memory": "fashion_small.npz"}


def test_every_example_is_tested():
    assert {path.parent.name for path in (_ROOT / "examples").glob("*/__main__.py")} == set(_TINY)


@pytest.mark.parametrize("name", _TINY)
def test_it_runs(name, tmp_path, request):
    command = [sys.executable, "-m", f"examples.{name}", *_TINY[name].split(), "--out", tmp_path]
    if name == "packages":
        command += ["--data", request.getfixturevalue("packages_file")]
    if name in _DATA:
        command += ["--data", request.getfixturevalue("data_folder").resolve() / _DATA[name]]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 2
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert f"The picture {tmp_path / 'attention.png'} shows" in done.stdout


@pytest.mark.parametrize("name", _TINY)
def test_its_help_shows_every_setting_and_its_default(name, capsys):
    settings = importlib.import_module(f"examples.{name}.model").Settings()
    assert importlib.import_module(f"examples.{name}.__main__").main(["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for setting, default in vars(settings).items():
        assert re.search(rf"--{setting.replace('_', '-')} N .*?\(default: {re.escape(str(default))}\)", printed)
    assert "--threads N" in printed
    assert f"--out DIR where to write (default: runs/{name})" in printed


@pytest.mark.parametrize("name", _TINY)
def test_its_readme_shows_the_command_and_a_small_picture(name):
    folder = _ROOT / "examples" / name
    text = (folder / "README.md").read_text()
    assert f"python -m examples.{name}" in text
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert 10_000 < (folder / picture).stat().st_size < 150_000
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (folder / target).exists(), target


def _imports(path):
    """The full names of what a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_package_imports_no_example_and_no_benchmark():
    for path in (_ROOT / "src").rglob("*.py"):
        assert not {name.split(".")[0] for name in _imports(path)} & {"examples", "benchmarks"}, path


def test_examples_import_no_internals():
    found = {name for path in (_ROOT / "examples").rglob("*.py") for name in _imports(path)}
    assert "anyattention.nn.MultiHeadAttention" in found
    inside = [name.split(".")[1:] for name in found if name.startswith("anyattention.")]
    assert not [parts for parts in inside if parts[0] == "ops" or any(part.startswith("_") for part in parts)]


def _cases(name):
    return json.loads((_ROOT / "benchmarks/results" / name).read_text())["cases"]


def test_the_readme_of_the_language_model_has_the_figures_of_its_result():
    text, cases = (_ROOT / "examples/language_model/README.md").read_text(), _cases("sequence.json")
    for bits in cases["bits_per_byte"].values():
        assert f"| {bits:.2f} |" in text
    window, _, matrix = (step["peak"] / 2**20 for step in cases["step"])
    assert f"{matrix:,.0f} MiB" in text
    assert f"the window takes {window:.0f}." in text


def test_the_readme_of_the_particles_has_the_figures_of_its_result():
    text, cases = (_ROOT / "examples/particles/README.md").read_text(), _cases("points.json")
    for errors in cases["errors"].values():
        energy, force = f"{errors['energy_mae']:.3f}, {errors['energy_rmse']:.3f}", "{force_mae:.3f}, {force_rmse:.3f}"
        assert f"| {energy} | {force.format(**errors)} |" in text
    for parameters in cases["parameters"].values():
        assert f"| {parameters:,} |" in text
    assert f"within {cases['finite_difference_error']:.0e}" in text
    assert f"within {cases['rotation_error']['equivariant']:.0e}" in text
    assert f"miss by {cases['rotation_error']['plain']:.0f}" in " ".join(text.split())


def test_the_readme_of_the_memory_has_the_figures_of_its_result():
    text, cases = (_ROOT / "examples/memory/README.md").read_text(), _cases("images.json")
    before, after = cases["held_out"]["before"], cases["held_out"]["after"]
    for share in cases["accuracy"].values():
        assert f"| {100 * share:.1f} % |" in text
    for name in ("held_out", "others", "all"):
        assert f"| {100 * before[name]:.1f} % | {100 * after[name]:.1f} % |" in text
    assert f"{cases['parameters']:,} parameters" in text


def test_the_memory_does_what_it_is_for():
    cases = _cases("images.json")
    shares, held_out = cases["accuracy"], cases["held_out"]
    assert cases["images"] == {"train": 60_000, "test": 10_000}
    assert shares["memory"] - shares["neighbours"] >= 0.03
    assert held_out["before"]["held_out"] == 0
    assert held_out["after"]["held_out"] >= 0.7


def test_the_readme_of_the_packages_has_the_figures_of_its_result():
    text = (_ROOT / "examples/packages/README.md").read_text()
    found = json.loads((_ROOT / "benchmarks/results/accuracy-debian.json").read_text())
    assert len(found["summary"]) == 6
    for scores in found["summary"].values():
        assert f"| {scores['mean']:.4f} |" in text
