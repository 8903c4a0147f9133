"""What holds of every operation and implementation, over the shared cases."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Graph, explain
from cases import AXES, CASES, Call, Case
from oracle import expected, pairs_of

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def forms_weights(case: Case) -> bool:
    return (case.operation, case.implementation) not in (("dense", "cpu"), ("dense", "torch"))


def results(case: Case, call: Call, implementation: str | None) -> list[Tensor]:
    """Output, weights of the pairs and logsumexp, as far as there are any; None takes what is chosen."""
    found = call.run(implementation, return_weights="heads" if forms_weights(case) else False)
    weights = [] if found.weights is None else [of_pairs(call, found.weights, found.indices)]
    return [found.output, *weights, *([] if found.logsumexp is None else [found.logsumexp])]


def of_pairs(call: Call, weights: Tensor, indices: Tensor | None) -> Tensor:
    """Weights of all keys or of chosen ones as `(batch, pairs, heads)`."""
    if isinstance(call.pattern, Graph) or (weights.ndim == 3 and indices is None):
        return weights
    query, key = pairs_of(call.pattern, call["query"].shape[1], call["key"].shape[1])
    if indices is not None:
        keys = call["key"].shape[1]  # and one more column, for unused slots
        table = weights.new_zeros(*weights.shape[:3], keys + 1)
        weights = table.scatter(3, torch.where(indices < 0, keys, indices), weights).transpose(1, 2)
    return weights[:, :, query, key].transpose(1, 2)


def derivatives(found: list[Tensor], leaves: list[Tensor], order: int) -> list[Tensor]:
    """The derivatives of a random loss, then those of a random loss of these; the losses are the same at each call."""
    generator, listed = torch.Generator().manual_seed(1), []
    for _ in range(order):
        # A logsumexp of -inf is a constant.
        found = [each.masked_fill(each == -torch.inf, 0.0) for each in found]
        cotangents = [
            torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each.dtype) for each in found
        ]
        found = list(
            torch.autograd.grad(found, leaves, cotangents, create_graph=True, allow_unused=True, materialize_grads=True)
        )
        listed += found
    return listed


def written_out(case: Case, call: Call) -> list[Tensor]:
    """What `results` should be."""
    output, weights, logsumexp = expected(call.arguments())
    return [output, *([weights] * forms_weights(case)), *([logsumexp] * call.settings.get("normalize", True))]


def assert_close(found: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, exact, strict=True):
        finite = theirs.detach()[theirs.isfinite()].abs()
        scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance * scale)


def tolerance_of(call: Call) -> float:
    return 1e-10 if call["query"].dtype == torch.float64 else 1e-4


@pytest.mark.parametrize(("operation", "implementation"), AXES)
def test_each_two_settings_meet_in_a_case(operation: str, implementation: str) -> None:
    cases = [case for case in CASES if (case.operation, case.implementation) == (operation, implementation)]
    for (first, ones), (second, others) in combinations(AXES[operation, implementation].items(), 2):
        met = {(id(case.settings[first]), id(case.settings[second])) for case in cases}
        assert met == {(id(one), id(other)) for one in ones for other in others}, (first, second)


@each_case
def test_results_and_two_derivatives_are_those_written_out(native: Any, case: Case) -> None:
    call = case.call()
    exact = call.to(torch.float64)
    found, wanted = results(case, call, case.implementation), written_out(case, exact)
    found += derivatives(found, call.leaves, 2)
    wanted += derivatives(wanted, exact.leaves, 2)
    assert_close(found, wanted, tolerance_of(call))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[] if (position + turn) % 3 == 0 else pytest.mark.exhaustive)
        for position, case in enumerate(CASES)
        for turn, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    ],
    ids=lambda part: part.name if isinstance(part, Case) else str(part),
)
def test_other_dtypes_are_roundings_away_from_float64(native: Any, case: Case, dtype: torch.dtype) -> None:
    call = case.call().to(dtype)
    exact = call.to(torch.float64)
    found, wanted = results(case, call, case.implementation), written_out(case, exact)
    assert found[0].dtype == dtype
    found += derivatives(found, call.leaves, 1)
    wanted += derivatives(wanted, exact.leaves, 1)
    assert_close(found, wanted, max(16 * torch.finfo(dtype).eps, 1e-4))


@pytest.mark.parametrize("case", [case for case in CASES if case.implementation == "cpu"], ids=lambda case: case.name)
def test_kernels_are_chosen_and_drop_what_the_reference_drops(native: Any, case: Case) -> None:
    call = case.call(dropout=0.4)
    assert explain(**call.arguments()).implementation != "reference"
    found = []
    for implementation in (None, "reference"):
        torch.manual_seed(7)
        shown = results(case, call, implementation)
        found.append([*shown, *derivatives(shown, call.leaves, 1)])
    chosen, reference = found
    assert_close(chosen, reference, tolerance_of(call))
    assert not torch.equal(chosen[0], results(case, call.changed(dropout=0.0), None)[0])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.exhaustive if case.implementation == "reference" else [], id=case.name)
        for case in CASES
    ],
)
def test_threads_change_no_bit_and_strides_nothing(native: Any, threads: Callable[[int], None], case: Case) -> None:
    call = case.call()
    apart = call.with_tensors(
        each.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for each in call.leaves
    )
    found = []
    for count, given in ((1, call), (3, call), (2, apart)):
        threads(count)
        shown = results(case, given, case.implementation)
        found.append([*shown, *derivatives(shown, given.leaves, 1)])
    assert all(map(torch.equal, found[0], found[1]))
    assert_close(found[0], found[2], tolerance_of(call))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.implementation == "reference"], ids=lambda case: case.name
)
def test_forward_derivatives_are_those_of_the_backward_pass(native: Any, case: Case) -> None:
    call = case.call()
    tangents = tuple(torch.randn_like(each) for each in call.leaves)

    def output(*tensors: Tensor) -> Tensor:
        return call.with_tensors(tensors).run(return_weights=False, return_logsumexp=False).output

    found, along = torch.func.jvp(output, tuple(each.detach() for each in call.leaves), tangents)  # pyright: ignore
    cotangent = torch.randn_like(found)
    gradients = torch.autograd.grad(
        output(*call.leaves), call.leaves, cotangent, allow_unused=True, materialize_grads=True
    )
    by_inputs = sum(float((gradient * tangent).sum()) for gradient, tangent in zip(gradients, tangents, strict=True))
    assert float((along * cotangent).sum()) == pytest.approx(by_inputs, rel=1e-9, abs=1e-9)
