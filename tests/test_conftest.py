"""The fixtures themselves: memory that was not written shows, what is skipped in CI fails, samples are pairwise."""

from itertools import product
from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_new_floating_memory_is_nan(dtype):
    like = torch.zeros(3, dtype=dtype)
    created = [
        torch.empty(3, dtype=dtype),
        torch.empty(3, dtype=dtype, requires_grad=True).detach(),
        torch.empty_like(like),
        torch.empty_strided((3,), (2,), dtype=dtype),
        like.new_empty(3),
    ]
    for tensor in created:
        assert tensor.isnan().all()


def test_new_integers_are_no_index():
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.empty(3, dtype=torch.bool).all()


def test_algorithms_are_those_of_users():
    assert not torch.are_deterministic_algorithms_enabled()


def test_empty_still_compiles():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def ones(like):
        return torch.empty_like(like).fill_(1) * like.new_empty(3).fill_(1) * torch.empty(3).fill_(1)

    assert torch.equal(ones(torch.zeros(3)), torch.ones(3))


_SKIPPED = """
import pytest

@pytest.mark.skip(reason="no reason")
def test_marked():
    pass

def test_missing(require):
    require("no_such_module")

@pytest.mark.xfail(reason="known", strict=True)
def test_known():
    assert False
"""


@pytest.mark.parametrize(
    ("ci", "outcomes"),
    [("", {"skipped": 2, "xfailed": 1}), ("true", {"errors": 1, "failed": 1, "xfailed": 1})],
    ids=["", "CI"],
)
def test_what_is_skipped_fails_in_ci(ci, outcomes, pytester, monkeypatch):
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(_SKIPPED)
    result = pytester.runpytest_inprocess("-rs")
    result.assert_outcomes(**outcomes)
    result.stdout.fnmatch_lines(["*cannot import no_such_module*"])


def test_a_file_that_is_skipped_fails_in_ci(pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile("import pytest; pytest.importorskip('no_such_module')")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*CI=true, and this was skipped: *no_such_module*"])


def test_without_kernels_nothing_runs_in_ci(native, pytester, monkeypatch):
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile("def test_nothing(): pass")
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(native, "_state", native._State())
    monkeypatch.setattr(native, "_built", dict)
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*only the reference can run: no compiled kernels*"])


def test_a_grid_s_sample_has_each_two_values(pytester):
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile("""
import pytest

@pytest.mark.pairwise
@pytest.mark.parametrize("c", range(4))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("a", range(3))
def test_grid(a, b, c):
    print("ran", a, b, c)
""")
    ini = ["-o", "markers=pairwise\nexhaustive", "-s", "-q"]
    lines = {
        chosen: pytester.runpytest_inprocess("-m", chosen, *ini).stdout.lines
        for chosen in ("not exhaustive", "exhaustive")
    }
    quick, rest = (
        {tuple(map(int, line.split("ran ")[1].split())) for line in each if "ran " in line} for each in lines.values()
    )
    assert quick | rest == set(product(range(3), range(3), range(4)))
    assert not quick & rest
    assert len(quick) <= 14
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert len({(setting[first], setting[second]) for setting in quick}) == (9 if second == 1 else 12)
