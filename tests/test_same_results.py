"""The rule by which two checkouts' numbers are compared, and that a call's numbers depend on its name alone."""

import importlib

import numpy as np
import pytest
import torch

OUTPUT, FIRST, SECOND = (f"a call | float64, 1 | {kind} | query" for kind in ("output", "first", "second"))
ERROR = "a call | float64, 1 | error | output"
EPS = np.finfo(np.float64).eps


@pytest.fixture
def same_results(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath)
    return importlib.import_module("benchmarks.same_results.compare")


@pytest.fixture
def recording(same_results):
    return importlib.import_module("benchmarks.same_results.record")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.bool_])
def test_equal_arrays_differ_in_nothing(same_results, dtype):
    array = np.array([0, 1, 1]).astype(dtype)
    assert same_results.compare({OUTPUT: array, SECOND: array}, {OUTPUT: array.copy(), SECOND: array.copy()}) == []


@pytest.mark.parametrize("key", [OUTPUT, FIRST])
def test_one_bit_of_an_output_or_a_first_gradient_breaks_the_rule(same_results, key):
    before = np.array([1.0, 2.0])
    (found,) = same_results.compare({key: before}, {key: np.array([1.0, np.nextafter(2.0, 3.0)])})
    assert found.breaks_rule
    assert found.roundings == 1.0
    (found,) = same_results.compare({key: np.array([0.0])}, {key: np.array([-0.0])})
    assert found.breaks_rule


@pytest.mark.parametrize("key", [OUTPUT, SECOND])
def test_nan_equals_any_nan_and_nothing_else(same_results, key):
    quiet = np.array([np.nan, -np.inf, 1.0])
    other = np.array([-np.nan, -np.inf, 1.0])
    assert same_results.compare({key: quiet}, {key: other}) == []
    for wrong in (0.0, np.inf):
        (found,) = same_results.compare({key: quiet}, {key: np.array([wrong, -np.inf, 1.0])})
        assert found.breaks_rule
        (found,) = same_results.compare({key: quiet}, {key: np.array([np.nan, wrong, 1.0])})
        assert found.breaks_rule


def test_second_derivatives_may_differ_by_4_roundings_of_the_largest(same_results):
    before = np.array([8.0, 0.0])
    (found,) = same_results.compare({SECOND: before}, {SECOND: np.array([8.0, 32 * EPS])})
    assert not found.breaks_rule
    (found,) = same_results.compare({SECOND: before}, {SECOND: np.array([8.0, 33 * EPS])})
    assert found.breaks_rule
    (found,) = same_results.compare({SECOND: before}, {SECOND: np.array([np.nan, 0.0])})
    assert found.breaks_rule
    (found,) = same_results.compare({SECOND: np.zeros(2)}, {SECOND: np.array([0.0, 1e-300])})
    assert found.breaks_rule
    (found,) = same_results.compare({SECOND: np.zeros(2)}, {SECOND: -np.zeros(2)})
    assert not found.breaks_rule


def test_an_array_that_one_side_lacks_breaks_the_rule(same_results):
    for sides in (({OUTPUT: np.ones(1)}, {}), ({}, {SECOND: np.ones(1)})):
        (found,) = same_results.compare(*sides)
        assert found.breaks_rule
        assert "only" in found.how


def test_another_shape_or_dtype_breaks_the_rule(same_results):
    for other in (np.ones((1, 2)), np.ones(2, np.float32), np.ones(2, [("bfloat16", np.float32)]), np.array("error")):
        (found,) = same_results.compare({OUTPUT: np.ones(2)}, {OUTPUT: other})
        assert found.breaks_rule


def test_another_error_breaks_the_rule(same_results):
    before = {ERROR: np.array("UnsupportedError: no")}
    assert same_results.compare(before, dict(before)) == []
    (found,) = same_results.compare(before, {ERROR: np.array("UnsupportedError: not yet")})
    assert found.breaks_rule


def test_the_package_itself_is_not_compared(same_results):
    assert same_results.compare({same_results.PACKAGE: np.array("a")}, {same_results.PACKAGE: np.array("b")}) == []


def test_a_call_repeats_and_has_outputs_and_both_gradients(recording):
    name = "attend pattern=window, score=dot, all"
    call, dtypes = recording.calls()[name]
    first, again = (dict(recording.run_call(name, call, "float64")) for _ in range(2))
    assert dtypes == ("float32", "float64")
    assert {key.split(" | ")[0] for key in first} == {"output", "first", "second"}
    assert {"output | weights", "output | logsumexp", "first | key", "second | cotangent weights"} <= set(first)
    assert first.pop("output | runs") == again.pop("output | runs") == "cpu"
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_there_are_at_least_300_calls(recording):
    assert len(recording.calls()) >= 300
