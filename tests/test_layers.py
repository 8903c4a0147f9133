"""The shape of the package: arrows point one way, imports stay light, public names are documented."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anyattention
from anyattention import nn

_ROOT = Path(anyattention.__file__).parent
_FILES = sorted(_ROOT.rglob("*.py"))

# From the ground up: a module may import what stands in a line above its own, and its own package.
_LAYERS = (
    ("errors",),
    ("output", "scores", "_native"),
    ("_checks", "_sorting"),
    ("settings",),
    ("config", "masks", "interfaces"),
    ("geometry",),
    ("patterns",),
    ("bias",),
    ("_dispatch",),
    ("ops",),
    ("nn",),
    ("builder", "saving"),
    ("testing",),
    ("training",),
    ("anyattention",),
    ("interop", "cli"),
)
_LAYER_OF = {name: layer for layer, names in enumerate(_LAYERS) for name in names}

# `_native` reads the package's folder and version, which exist before any of its modules.
_EXCEPTIONS = {("_native", "anyattention")}

_IMPLEMENTATIONS = ("reference", "torch_fused", "cpu", "triton")
_HEAVY = ("matplotlib", "networkx", "scipy", "sklearn", "torch_geometric", "tqdm", "vesin")


def _dotted(path):
    """A file's module name below the package: `ops.dense.api`, or `` for the package itself."""
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


_NAMES = {_dotted(path) for path in _FILES}


def _imports(path):
    """The package's modules that a file imports, inside functions too; `` is the package itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            if name.split(".")[0] == "anyattention":
                below = name.split(".")[1:]
                while below and ".".join(below) not in _NAMES:
                    below = below[:-1]
                yield ".".join(below)


def _top(dotted):
    return dotted.split(".")[0] or "anyattention"


def test_each_module_has_its_layer():
    assert {_top(_dotted(path)) for path in _FILES} <= set(_LAYER_OF)


@pytest.mark.parametrize("path", _FILES, ids=lambda path: _dotted(path) or "anyattention")
def test_arrows_point_one_way(path):
    own = _top(_dotted(path))
    for imported in _imports(path):
        other = _top(imported)
        if other != own and (own, other) not in _EXCEPTIONS:
            assert _LAYER_OF[other] < _LAYER_OF[own], f"{own} imports {imported or other}"


def test_imports_are_found_at_all():
    assert set(_imports(_ROOT / "ops" / "dense" / "torch_fused.py")) >= {"ops.dense.autograd", "scores"}
    assert "patterns" in set(_imports(_ROOT / "ops" / "attend.py"))


def test_implementations_do_not_import_each_other():
    found = [path for path in _FILES if path.stem in _IMPLEMENTATIONS and path.parent.parent.name == "ops"]
    assert len(found) >= 3
    for path in found:
        for imported in _imports(path):
            assert imported.split(".")[-1] not in _IMPLEMENTATIONS, f"{path} imports {imported}"


def _run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_import_is_light():
    # PyTorch itself imports tqdm.
    run = _run("import sys, torch; before = set(sys.modules); import anyattention; print(*(set(sys.modules) - before))")
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "anyattention" in loaded
    assert not loaded & set(_HEAVY)
    assert not {name for name in run.stdout.split() if name.startswith(("anyattention.cli", "anyattention.training"))}


def test_import_says_nothing():
    run = _run("import warnings, torch; warnings.simplefilter('error'); import anyattention")
    assert (run.stdout, run.stderr) == ("", "")


@pytest.mark.parametrize("name", sorted(name for name in _NAMES if name))
def test_each_module_names_what_it_offers(name):
    module = __import__(f"anyattention.{name}", fromlist=["__all__"])
    for offered in getattr(module, "__all__", ()):
        assert hasattr(module, offered), f"{name} has no {offered}"


def test_the_prelude_is_complete():
    modules = {name.split(".")[0] for name in _NAMES}
    public = {name for name in vars(anyattention) if not name.startswith("_")}
    imported = {name for name in public if inspect.ismodule(getattr(anyattention, name))} - {
        "errors",
        "interfaces",
        "nn",
    }
    # Submodules become attributes when something imports them; `version` is importlib's.
    assert public - (imported & modules) - {"version"} == set(anyattention.__all__) - {"__version__"}
    assert anyattention.__all__ == sorted(anyattention.__all__)


def _public():
    for home in (anyattention, nn):
        for name in home.__all__:
            item = getattr(home, name)
            if inspect.isclass(item) or inspect.isfunction(item):
                yield pytest.param(item, id=f"{home.__name__}.{name}")


@pytest.mark.parametrize("item", list(_public()))
def test_public_names_have_an_example_that_runs(item):
    # pytest runs the examples themselves: --doctest-modules.
    assert re.search(r"Example:\n\s+>>> ", inspect.getdoc(item) or "")


@pytest.mark.parametrize("item", list(_public()))
def test_public_names_say_what_they_take_return_and_raise(item):
    text = inspect.getdoc(item)
    summary = text.splitlines()[0]
    assert summary.endswith((".", ":"))
    if not inspect.isfunction(item):
        return
    assert "Args:" in text
    assert "Raises:" in text or "Raises: " in text
    if inspect.signature(item).return_annotation not in (None, "None"):
        assert "Returns:" in text


@pytest.mark.parametrize(
    "name",
    [
        "DistanceAttention",
        "EquivariantAttention",
        "GraphAttention",
        "MultiHeadAttention",
        "ScaledDotProductAttention",
        "SparseAttention",
    ],
)
def test_modules_have_formula_cost_and_source(name):
    text = inspect.getdoc(getattr(nn, name))
    for part in ("Args:", "Raises:", "Cost: O(", "Source: "):
        assert part in text
    assert re.search(r"softmax\(|output_i = ", text)
    arguments = set(inspect.signature(getattr(nn, name)).parameters)
    assert all(re.search(rf"\b{argument}\b", text) for argument in arguments)


@pytest.mark.parametrize("path", _FILES, ids=lambda path: _dotted(path) or "anyattention")
def test_files_are_finished_and_short(path):
    text = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b|\bfor now\b", text)
    assert len(text.splitlines()) <= 450
