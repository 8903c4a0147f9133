"""The shape of the package: arrows point one way, imports stay light, public names are documented."""

import ast
import importlib
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
    ("errors", "signals"),
    ("ambient", "files", "output"),
    ("native", "_checks"),
    ("settings",),
    ("config", "masks", "interfaces"),
    ("scores", "geometry"),
    ("patterns",),
    ("bias",),
    ("ops",),
    ("memory",),
    ("encodings", "nn", "shared_buffers"),
    ("builder", "loader", "saving"),
    ("testing",),
    ("training",),
    ("anyattention",),
    ("interop", "cli"),
)

# The same inside `ops`.
_FLOORS = (
    ("compile_cache", "handles", "records", "linear_products"),
    ("mapped",),
    ("operator",),
    ("linear_map_operators",),
    ("arguments", "dropout", "dispatch", "linear_maps", "normalizer"),
    ("refusals",),
    ("edges",),
    ("runs",),
    ("graph",),
    ("dense", "product_keys", "topk"),
    ("sparse",),
    ("sinks", "spread"),
    ("attend", "merge"),
    ("points",),
    ("ops",),
)

# `native` reads the package's folder and version, which exist before any of its modules.
_EXCEPTIONS = {("native.load", "")}

_IMPLEMENTATIONS = ("reference", "torch_fused", "cpu", "triton", "cuda")
_HEAVY = (
    "faiss",
    "matplotlib",
    "networkx",
    "pymetis",
    "scipy",
    "sklearn",
    "torch_geometric",
    "tqdm",
    "usearch",
    "vesin",
)


def _dotted(path):
    """A file's module name below the package: `ops.dense.api`, or `` for the package itself."""
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


_NAMES = {_dotted(path) for path in _FILES}


def _imports(source):
    """The package's modules that a file imports, inside functions too; `` is the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            if name.split(".")[0] == "anyattention":
                below = name.split(".")[1:]
                while below and ".".join(below) not in _NAMES:
                    below = below[:-1]
                yield ".".join(below)


def _place(dotted):
    """Layer and name of a module, and inside `ops` floor and name."""
    parts = [*dotted.split("."), ""]
    top = parts[0] or "anyattention"
    places = [(_height(_LAYERS, top), top)]
    if top == "ops":
        inside = parts[1] or "ops"
        places.append((_height(_FLOORS, inside), inside))
    return places


def _height(layers, name):
    (height,) = [number for number, names in enumerate(layers) if name in names]
    return height


def _is_implementation(dotted):
    return dotted.startswith("ops.") and dotted.split(".")[-1] in _IMPLEMENTATIONS


def _wrong_arrows(dotted, source):
    """The imports of a module that do not point down."""
    for imported in _imports(source):
        if (dotted, imported) in _EXCEPTIONS:
            continue
        if _is_implementation(dotted) and _is_implementation(imported):
            yield imported
            continue
        # The first of the places that differ decides.
        for (height, name), (other_height, other) in zip(_place(dotted), _place(imported), strict=False):
            if name != other:
                if other_height >= height:
                    yield imported
                break


@pytest.mark.parametrize("path", _FILES, ids=lambda path: _dotted(path) or "anyattention")
def test_arrows_point_one_way(path):
    assert not list(_wrong_arrows(_dotted(path), path.read_text()))


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("ambient", "from anyattention import native"),
        ("output", "from anyattention.ambient import is_compiling"),
        ("native.calls", "from anyattention import _checks"),
        ("native.calls", "import anyattention"),
        ("scores.dot", "from anyattention.patterns import Graph"),
        ("scores.dot", "def late():\n    from anyattention.ops.edges import edge_dot"),
        ("geometry.clouds", "import anyattention.patterns.graph"),
        ("patterns.base", "from anyattention.bias import RelativeBias"),
        ("nn.base", "from anyattention.saving import load"),
        ("ops.merge", "from anyattention import attend"),
        ("ops.merge", "from anyattention.nn import GraphAttention"),
        ("ops.operator", "from anyattention.ops.edges.arrays import GraphArrays"),
        ("ops.operator", "from anyattention.ops.arguments import Arguments"),
        ("ops.dispatch", "from anyattention.ops import refusals"),
        ("ops.edges.operators", "from anyattention.ops.runs import run_attention"),
        ("ops.edges.operators", "from anyattention.ops.graph import operators"),
        ("ops.runs.parts", "from anyattention.ops.points import chunks"),
        ("ops.graph.api", "from anyattention.ops.sparse import api"),
        ("ops.dense.api", "from anyattention.ops.topk.chosen import at_keys"),
        ("ops.dense.api", "from anyattention.ops import attend"),
        ("ops.dense.api", "from anyattention.ops import merge"),
        ("ops.attend", "import anyattention.ops"),
        ("ops.dense.cpu", "from anyattention.ops.dense import reference"),
        ("ops.topk.cpu", "from anyattention.ops.graph.cpu import run"),
    ],
)
def test_a_wrong_arrow_is_found(module, statement):
    source = (_ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    assert len(list(_wrong_arrows(module, f"{source}\n{statement}\n"))) == 1


def test_each_module_has_its_layer():
    for name in _NAMES:
        assert _place(name)
    for layers in (_LAYERS, _FLOORS):
        names = [name for layer in layers for name in layer]
        assert len(names) == len(set(names))
    found = {place[depth][1] for place in map(_place, _NAMES) for depth in range(len(place))}
    assert found == {name for layer in (*_LAYERS, *_FLOORS) for name in layer}


def test_imports_are_found_at_all():
    def imports(*parts):
        return set(_imports(_ROOT.joinpath(*parts).read_text()))

    assert imports("ops", "dense", "torch_fused.py") >= {"ops.dense.torch_kernel", "patterns"}
    assert "patterns" in imports("ops", "attend.py")


def test_implementations_are_found_at_all():
    found = {name for name in _NAMES if _is_implementation(name)}
    assert found >= {
        "ops.dense.torch_fused",
        *(f"ops.{name}.{kind}" for name in ("dense", "graph", "topk") for kind in ("cpu", "reference")),
    }


def _run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def _loaded(code):
    """What a fresh process has imported in the end, and what without the package."""
    run = _run(f"import sys, torch; before = set(sys.modules); {code}; print('LOADED', *sys.modules, '/', *before)")
    loaded, _, before = run.stdout.partition("LOADED")[2].partition("/")
    return set(loaded.split()), set(before.split())


def test_import_alone_does_not_import_pytorch():
    run = _run("import sys; before = set(sys.modules); import anyattention; print(*(set(sys.modules) - before))")
    loaded = {name for name in run.stdout.split() if name.startswith("anyattention") or name in ("torch", "numpy")}
    assert loaded == {"anyattention"}


def test_every_public_name_together_is_light():
    loaded, before = _loaded("from anyattention import *; attend, nn, Graph, save")
    assert {"anyattention.ops", "anyattention.nn", "anyattention.saving"} <= loaded
    new = loaded - before
    # PyTorch itself imports tqdm.
    assert not {name.split(".")[0] for name in new} & {*_HEAVY, "pandas", "sympy"}
    heavy = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx.experimental", "torch.onnx")
    assert not {name for name in new if name.startswith(heavy)}
    assert not {name for name in new if name.startswith(("anyattention.cli", "anyattention.training"))}


def test_each_public_name_is_where_the_package_says():
    """What type checkers read, and what Python reads."""
    tree = ast.parse((_ROOT / "__init__.py").read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    shown = {
        alias.name: (node.module or "").removeprefix("anyattention").removeprefix(".")
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == anyattention._HOME_OF
    assert {*shown, "__version__"} == set(anyattention.__all__) <= set(dir(anyattention))
    for name, home in shown.items():
        if home:
            assert name in importlib.import_module(f"anyattention.{home}").__all__, name
            assert getattr(anyattention, name) is getattr(importlib.import_module(f"anyattention.{home}"), name)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'anyattention' has no attribute 'atend'"):
        anyattention.atend  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'atend' from 'anyattention'"):
        from anyattention import atend  # noqa: F401


def test_import_says_nothing():
    run = _run("import warnings, torch; warnings.simplefilter('error'); import anyattention")
    assert (run.stdout, run.stderr) == ("", "")


@pytest.mark.parametrize("name", sorted(name for name in _NAMES if name))
def test_each_module_names_what_it_offers(name):
    module = __import__(f"anyattention.{name}", fromlist=["__all__"])
    for offered in getattr(module, "__all__", ()):
        assert hasattr(module, offered), f"{name} has no {offered}"


def test_the_public_names_are_sorted():
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
        "GraphTransformerLayer",
        "MemoryAttention",
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


# Functions that make a tensor; of the first, what they are given says the dtype.
_TYPED = {"arange", "randint", "randperm", "sparse_coo_tensor", "sparse_csr_tensor", "tril_indices", "triu_indices"}
_UNTYPED = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}


def _unplaced(source):
    """Where a tensor is made on the default device, or of the default dtype: line and function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TYPED | _UNTYPED:
            if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
                continue
            named = {keyword.arg for keyword in node.keywords}
            if not named >= ({"device"} if node.func.attr in _TYPED else {"device", "dtype"}):
                yield node.lineno, node.func.attr


def test_unplaced_tensors_are_seen():
    source = "torch.arange(3)\ntorch.zeros(3, device=d)\ntorch.zeros(3, device=d, dtype=t)\nx.zeros(3)"
    assert list(_unplaced(source)) == [(1, "arange"), (2, "zeros")]


@pytest.mark.parametrize("path", _FILES, ids=lambda path: _dotted(path) or "anyattention")
def test_no_tensor_is_made_where_the_default_happens_to_be(path):
    found = list(_unplaced(path.read_text()))
    if _dotted(path) == "patterns.adjacency":
        # A caller's array has its dtype.
        found.remove(next(each for each in found if each[1] == "tensor"))
    assert not found


def test_an_exported_program_loads_where_the_operators_are_imported(tmp_path: Path) -> None:
    script = """
import sys, torch
{imports}
x = torch.ones(1, 6, 2, 4)
if sys.argv[1] == "save":
    class Layer(torch.nn.Module):
        def forward(self, x):
            return anyattention.attend(x, x, x, anyattention.Window(1, 1)).output
    torch.export.save(torch.export.export(Layer(), (x,)), sys.argv[2])
else:
    print(torch.export.load(sys.argv[2]).module()(x).shape)
"""
    for step, imports in (("save", "import anyattention"), ("load", "import anyattention.ops")):
        command = [sys.executable, "-c", script.format(imports=imports), step, str(tmp_path / "layer.pt2")]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "torch.Size([1, 6, 2, 4])\n"
