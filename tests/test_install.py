"""Installing where no compiler is found, and what an import brings with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]


def run(*command, **environment):
    finished = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def installed_without_compiler(require, tmp_path_factory):
    require("scikit_build_core")
    folder = tmp_path_factory.mktemp("installed")
    run(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--no-index", "--target", str(folder), str(_ROOT)),
        CC="/no/such/compiler",
        CXX="/no/such/compiler",
    )
    return folder


def test_installs_as_pure_python_without_a_compiler(installed_without_compiler):
    package = installed_without_compiler / "anyattention"
    assert (package / "py.typed").is_file()
    assert not list(package.rglob("*.so"))


def test_runs_as_pure_python_with_one_warning(installed_without_compiler):
    printed = run(
        "-c",
        f"""
import sys, warnings
# The finder of an editable installation would come first.
sys.meta_path = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
sys.path.insert(0, {str(installed_without_compiler)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import anyattention
    from anyattention import native
    assert anyattention.__file__.startswith({str(installed_without_compiler)!r})
    assert not caught, caught[0]
    assert not native.available() and not native.available()
print([warning.category.__name__ for warning in caught])
""",
    )
    assert printed.strip() == "['MissingKernelsWarning']"


def test_import_brings_no_optional_package():
    optional = ["matplotlib", "networkx", "scipy", "sklearn", "torch_geometric", "tqdm"]
    printed = run(
        "-c",
        f"""
import sys, torch
before = set(sys.modules)
import anyattention
print(sorted(set({optional}) & (set(sys.modules) - before)))
""",
    )
    assert printed.strip() == "[]"
