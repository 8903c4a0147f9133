"""The choice of an implementation, with toy tables."""

import pytest
import torch

from anyattention import attend
from anyattention import explain as explain_attend
from anyattention.errors import InvalidInputError, UnsupportedError
from anyattention.ops.dispatch import Explanation, Implementation, choose, explain


def _implementation(name, limit):
    """Runs numbers up to the limit."""
    return Implementation(name, lambda call: (name, call), lambda call: f"{call} > {limit}" if call > limit else None)


_TABLE = (_implementation("fast", 3), _implementation("medium", 5), _implementation("slow", 7))


@pytest.mark.parametrize(("call", "name"), [(3, "fast"), (4, "medium"), (5, "medium"), (7, "slow")])
def test_the_first_that_can_run_is_chosen(call, name):
    chosen = choose(_TABLE, call, None)
    assert chosen.run(call) == (name, call)


def test_the_order_of_the_table_decides():
    assert choose(_TABLE[::-1], 1, None).name == "slow"


def test_a_forced_one_is_taken_though_a_faster_one_could():
    assert choose(_TABLE, 1, "slow").name == "slow"


def test_a_forced_one_never_falls_back():
    with pytest.raises(UnsupportedError, match=r"^implementation='fast' cannot run this call: 4 > 3$") as caught:
        choose(_TABLE, 4, "fast")
    assert (caught.value.argument, caught.value.actual) == ("implementation", "fast")


@pytest.mark.parametrize("forced", ["Fast", "", "none", 3, ["fast"]])
def test_unknown_names_are_listed(forced):
    with pytest.raises(InvalidInputError, match=r"^implementation: expected one of 'fast', 'medium', 'slow', got "):
        choose(_TABLE, 1, forced)


def test_no_implementation_left():
    with pytest.raises(UnsupportedError, match=r"^no implementation can run this call$"):
        choose(_TABLE, 8, None)


def test_only_those_before_the_chosen_one_are_asked():
    asked = []

    def ask(name, reason):
        return Implementation(name, lambda call: None, lambda call: asked.append(name) or reason)

    choose((ask("a", "no"), ask("b", None), ask("c", None)), 1, None)
    assert asked == ["a", "b"]


def test_explanation_has_the_reasons_in_order():
    explanation = explain(_TABLE, 6, None)
    assert explanation == Explanation("slow", (("fast", "6 > 3"), ("medium", "6 > 5")))
    assert str(explanation) == "runs: slow\nnot fast: 6 > 3\nnot medium: 6 > 5"


def test_explanation_of_the_first_or_a_forced_one_has_no_refusal():
    assert explain(_TABLE, 1, None) == Explanation("fast")
    assert str(explain(_TABLE, 1, "slow")) == "runs: slow"


def test_notes_come_last():
    explanation = explain(_TABLE, 4, None, notes=("medium: mind the gap",))
    assert str(explanation) == "runs: medium\nnot fast: 4 > 3\nmedium: mind the gap"


@pytest.mark.parametrize(
    ("call", "forced", "error", "text"),
    [
        (8, None, UnsupportedError, "no implementation"),
        (4, "fast", UnsupportedError, "4 > 3"),
        (1, "x", InvalidInputError, "'x'"),
    ],
)
def test_explain_raises_what_choose_raises(call, forced, error, text):
    with pytest.raises(error, match=text):
        explain(_TABLE, call, forced)


def test_under_autocast_explain_takes_what_attend_takes():
    x = torch.ones(2, 5, 3, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(x, x.bfloat16(), x).output.dtype == torch.bfloat16
        assert explain_attend(x, x.bfloat16(), x).implementation in ("cpu", "torch")
    with pytest.raises(InvalidInputError, match=r"key: expected torch\.float32, as query, got torch\.bfloat16"):
        explain_attend(x, x.bfloat16(), x)
