"""The documents: their Python runs, their links lead somewhere, and the changelog knows the version."""

import re
import runpy
from pathlib import Path

import pytest

import anyattention

_ROOT = Path(__file__).resolve().parents[1]
_RUN = [path for path in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))) if path.exists()]
_ALL = [*sorted(_ROOT.glob("*.md")), *sorted((_ROOT / "docs").glob("*.md"))]


def _blocks(path):
    """Each fenced block: its language, its first line's number, its text."""
    language, start, lines = None, 0, []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = re.match(r"```(.*)$", line)
        if fence is None:
            lines.append(line)
        elif language is None:
            language, start, lines = fence[1].strip(), number + 1, []
        else:
            yield language, start, "\n".join(lines)
            language = None
    assert language is None, f"{path}: the block of line {start - 1} has no end"


@pytest.mark.parametrize("path", _RUN, ids=lambda path: str(path.relative_to(_ROOT)))
def test_python_blocks_run_one_after_the_other(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, start, text in _blocks(path):
        if language == "python":
            # The line numbers of the document, for the traceback.
            exec(compile("\n" * (start - 1) + text, str(path), "exec"), names)


def test_readme_shows_each_kind_of_attention():
    shown = "\n".join(text for language, _, text in _blocks(_ROOT / "README.md") if language == "python")
    layers = ("MultiHeadAttention", "GraphAttention", "SparseAttention", "EquivariantAttention")
    for name in ("attend", "explain", "Causal", "TopK", "Graph.from_adjacency", "Graph.radius", *layers):
        assert f"aa.{name}" in shown or f"aa.nn.{name}" in shown


def test_readme_has_at_most_a_thousand_words():
    assert len((_ROOT / "README.md").read_text().split()) <= 1000


def test_the_picture_of_readme_can_be_drawn_again(tmp_path, require):
    require("matplotlib")
    require("networkx")
    draw = runpy.run_path(str(_ROOT / "docs/pictures/attention.py"))["main"]
    draw(tmp_path / "attention.png")
    for path in (tmp_path / "attention.png", _ROOT / "docs/pictures/attention.png"):
        assert 10_000 < path.stat().st_size < 150_000


def test_the_index_names_every_page():
    index = (_ROOT / "docs/README.md").read_text()
    for path in sorted((_ROOT / "docs").glob("*.md")):
        assert path.name == "README.md" or f"({path.name})" in index, path.name


def test_the_links_of_a_document_name_headings_that_exist():
    for path in _ALL:
        for target, heading in re.findall(r"\]\(([^)\s:]*)#([^)\s]+)\)", path.read_text()):
            headings = re.findall(r"^#+ (.+)$", (path.parent / target if target else path).read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]
            assert heading in anchors, f"{path.name}: {target}#{heading}"


@pytest.mark.parametrize("path", _ALL, ids=lambda path: str(path.relative_to(_ROOT)))
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), target


def test_changelog_mentions_the_version():
    release = re.escape(anyattention.__version__)
    assert re.search(rf"^## {release}\b", (_ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
