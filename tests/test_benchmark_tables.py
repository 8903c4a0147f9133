"""docs/benchmarks.md and README's ratios are what the results say, to the last figure."""

import copy
import importlib
import json
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_FILES = sorted(path.stem for path in (_ROOT / "benchmarks/results").glob("*.json"))
# What the page leaves out. Of a timing: its quartiles, ours over ours, and what its ratios come from, but not our time.
# Of a run: what its summary is made of.
_LEFT_OUT = (
    "*/low",
    "*/high",
    "*/anyattention/ratio",
    "*/peak_bytes",
    "*/median",
    "geometric/cases/attention/*/reading * sorted/ratio",
    "geometric/cases/forces/energy, forces and their backward/*",
    "geometric/cases/neighbours/time per point over that of the fewest/[13]00000",
    "accuracy-*/runs/*",
    "accuracy-*/settings/*",
    "images/cases/settings/*",
    "images/cases/held_out/class",
    "images/cases/held_out/before/held_out",  # 0, which stays 0
    "images/cases/seconds/whole",
    "images/cases/seconds/without",
    "nbody/cases/runs/*",
    "nbody/cases/validation error of the trials/*",
    "points/cases/settings/*",
    "points/cases/seconds/*",
    "points/cases/energy_drift",
    "sequence/cases/settings/*",
    "sequence/cases/bits_per_byte/train",
)


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(_ROOT)
    return importlib.import_module("benchmarks.tables")


@pytest.fixture
def copied(tables, tmp_path):
    """A folder with the documents and what they are made of."""
    for name in (tables.README, tables.PAGE, "benchmarks/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_ROOT / name, tmp_path / name)
    shutil.copytree(_ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    return tmp_path


def _numbers(found, path=()):
    """Where each number stands."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if isinstance(value, dict | list):
            yield from _numbers(value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*path, key)


def _scaled(found, path, factor):
    """What was found, with one number multiplied."""
    *above, last = path
    holder = found
    for key in above:
        holder = holder[key]
    kind = type(holder[last])
    holder[last] = kind(holder[last] * factor)
    return found


def test_both_documents_are_what_the_results_say(tables):
    for name, text in tables.pages(tables.read_results()).items():
        assert (_ROOT / name).read_text() == text, f"{name} differs: run python -m benchmarks.tables"


@pytest.mark.parametrize("file", _FILES)
def test_every_figure_that_changes_changes_the_page(tables, file):
    results = tables.read_results()
    before = tables.pages(results)[tables.PAGE]
    names = {path: "/".join(map(str, (file, *path))) for path in _numbers(results[file])}
    shown = [
        path
        for path, name in names.items()
        if name.endswith("/anyattention/median") or not any(fnmatchcase(name, left_out) for left_out in _LEFT_OUT)
    ]
    assert shown
    for path in shown:
        changed = _scaled(copy.deepcopy(results[file]), path, 3)
        after = tables.pages({**results, file: changed})[tables.PAGE]
        assert after != before, path


def test_the_ratios_of_readme_follow_the_results(tables):
    results = tables.read_results()
    before = tables.block(results)
    assert len(tables.GAINS) == 10
    for ratio in (*tables.GAINS, *tables.LOSSES):
        assert f"{ratio.what}" in before
        assert tables.figure(ratio.number(results)) in before
    assert all(ratio.number(results) < 1 for ratio in tables.LOSSES), "a loss that is none any more"
    assert all(ratio.number(results) > 1 for ratio in tables.GAINS), "a gain that is none any more"
    changed = copy.deepcopy(results)
    changed["graph"]["cases"]["layers"]["GAT layer, forward+backward"]["DGL"]["ratio"] = 1.25
    assert "| DGL | 1.25 x |" in tables.block(changed)


def test_attention_chooses_on_the_digits(tables):
    """Mean of five seeds: 10 points more of it on the right digits than paid evenly, and 1 point of accuracy."""
    results = tables.read_results()
    content = results["accuracy-digits"]
    assert len(content["runs"]) == 5
    assert "missed" not in tables.digits_attention(results)
    shares = content["attention within the class"]
    assert shares["learnt"] >= shares["evenly paid"] + 0.1
    changed = copy.deepcopy(results)
    changed["accuracy-digits"]["summary"]["attention off"]["mean"] = content["summary"]["anyattention"]["mean"]
    assert "1 point more: missed" in tables.digits_attention(changed)


def test_readme_has_no_ratio_of_its_own(tables):
    text = (_ROOT / tables.README).read_text()
    block = tables.block(tables.read_results())
    assert block in text
    assert not re.findall(r"\d\s?x\b|\d\s?%", text.replace(block, "")), "write it in benchmarks/tables.py"


def test_every_aim_belongs_to_a_case(tables):
    results = tables.read_results()
    paths = {
        "/".join(map(str, (file, *path[1:end])))
        for file, content in results.items()
        if "cases" in content
        for path in _numbers(content)
        for end in range(2, len(path) + 1)
    }
    for pattern in tables.AIMS:
        assert any(fnmatchcase(path, pattern) for path in paths), pattern


def test_a_missed_aim_is_named_and_a_reached_one(tables):
    results = copy.deepcopy(tables.read_results())
    case = results["sparse"]["cases"]["window"]["forward"]
    case["FlexAttention"]["ratio"] = 1.99
    assert "2 x FlexAttention: missed" in tables.TABLES["sparse window"](results)
    case["FlexAttention"]["ratio"] = 2.0
    assert "2 x FlexAttention: reached" in tables.TABLES["sparse window"](results)


def test_check_compares_and_writes_nothing(tables, copied, capsys):
    assert tables.main(["--check"], copied) == 0
    path = copied / "benchmarks/results/dense.json"
    results = json.loads(path.read_text())
    results["cases"]["attend, length 64, forward+backward"]["torch SDPA, bare"]["ratio"] = 0.5
    path.write_text(json.dumps(results))
    texts = [(copied / name).read_text() for name in (tables.PAGE, tables.README)]
    assert tables.main(["--check"], copied) == 1
    assert capsys.readouterr().out.split("\n")[-3:-1] == ["docs/benchmarks.md differs", "README.md differs"]
    assert [(copied / name).read_text() for name in (tables.PAGE, tables.README)] == texts
    assert tables.main([], copied) == 0
    assert tables.main(["--check"], copied) == 0
    assert "0.5 x" in (copied / tables.README).read_text()


def test_a_readme_without_its_block_is_refused(tables, copied):
    (copied / tables.README).write_text("# anyattention\n")
    with pytest.raises(SystemExit, match="blocks of ratios"):
        tables.main([], copied)
