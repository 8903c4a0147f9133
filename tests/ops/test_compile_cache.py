"""Code that torch.compile kept for other sources of this package is not run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.compiler import config

import anyattention
import anyattention.ops.operator
from anyattention.ops.compile_cache import digest_of, separate_compiled_graphs

# Prints how often a compiled graph was found on disk.
PROGRAM = """
import torch
from torch._dynamo.utils import counters
from anyattention import attend

x = torch.ones(1, 4, 1, 8, requires_grad=True)
torch.compile(lambda x: attend(x, x, x).output, fullgraph=True)(x).sum().backward()
print(counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_digest_changes_with_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "one.py").write_text("x = 1")
    seen = [digest_of(tmp_path)]
    (tmp_path / "inner" / "one.py").write_text("x = 2")
    seen.append(digest_of(tmp_path))
    (tmp_path / "inner" / "one.py").rename(tmp_path / "one.py")
    seen.append(digest_of(tmp_path))
    assert len(set(seen)) == len(seen)
    (tmp_path / "notes.txt").write_text("not a source")
    assert digest_of(tmp_path) == seen[-1]


def test_a_tag_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"anyattention-{digest_of(Path(anyattention.__file__).parent)}"
    assert own in config.cache_key_tag
    monkeypatch.setattr(config, "cache_key_tag", "mine")
    separate_compiled_graphs()
    separate_compiled_graphs()
    assert config.cache_key_tag == f"mine{own}"


@pytest.mark.exhaustive
def test_compiled_graphs_of_other_sources_are_not_found(tmp_path: Path) -> None:
    for copy in ("one", "other"):
        shutil.copytree(Path(anyattention.__file__).parent, tmp_path / copy / "anyattention")
    with (tmp_path / "other" / "anyattention" / "ops" / "attend.py").open("a") as source:
        source.write("\n# Changed.\n")

    def found(copy: str) -> int:
        # Without `site`, as an editable installation would be found before the copy.
        folders = (tmp_path / copy, Path(torch.__file__).parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        }
        done = subprocess.run([sys.executable, "-S", "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert [found("one"), found("one"), found("other"), found("other")] == [0, 1, 0, 1]
