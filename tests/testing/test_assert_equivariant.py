"""The checker of symmetries: it passes what is symmetric, and catches each planted fault by name."""

import pytest
import torch

from anyattention.errors import InvalidInputError
from anyattention.testing import assert_equivariant

_POINTS = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
_FEATURES = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def _distances(x):
    return (x[:, None] - x).square().sum(-1).sum(1)


def test_it_passes_what_is_symmetric():
    worst = assert_equivariant(
        lambda h, x: (h * _distances(x)[:, None], x + (x - x.mean(0)), x - x.mean(0), _distances(x).sum()),
        [_FEATURES, _POINTS],
        takes=["scalar", "position"],
        returns=["scalar", "position", "vector", "total"],
    )
    assert set(worst) == {"rotation", "reflection", "translation", "permutation"}
    assert max(worst.values()) < 1e-13


def _from_mean(x):
    return x - x.mean(0)


# By what is broken: a function that keeps some of the other symmetries.
_FAULTS = {
    "rotation": (lambda x: _from_mean(x) * torch.tensor([1, 1, 1 + 1e-7]).double(), ["translation", "permutation"]),
    "reflection": (lambda x: torch.linalg.cross(_from_mean(x), _from_mean(x).roll(1, 0)), ["rotation", "translation"]),
    "translation": (lambda x: _from_mean(x) + 1e-8 * x, ["rotation", "reflection", "permutation"]),
    "permutation": (
        lambda x: _from_mean(x) * (1 + 1e-8 * torch.arange(7.0).double()[:, None]),
        ["rotation", "reflection", "translation"],
    ),
}


@pytest.mark.parametrize("symmetry", _FAULTS)
def test_it_catches_a_planted_fault(symmetry):
    fault, kept = _FAULTS[symmetry]
    settings = {"takes": ["position"], "returns": ["vector"]}
    assert set(assert_equivariant(fault, [_POINTS], symmetries=kept, **settings)) == set(kept)
    with pytest.raises(AssertionError, match=rf"^{symmetry}: result 0 \(vector\) is off by"):
        assert_equivariant(fault, [_POINTS], symmetries=[symmetry], **settings)


def test_a_fault_in_float32_and_a_nan_are_caught():
    x = _POINTS.float()
    assert_equivariant(lambda x: x - x.mean(0), [x], takes=["position"], returns=["vector"])
    with pytest.raises(AssertionError, match="translation: result 0"):
        assert_equivariant(
            lambda x: 1.001 * x, [x], takes=["position"], returns=["position"], symmetries=["translation"], draws=20
        )
    with pytest.raises(AssertionError, match="is off by nan"):
        assert_equivariant(lambda x: x * torch.nan, [x], takes=["position"], returns=["position"])
    with pytest.raises(AssertionError, match="is off by inf"):
        assert_equivariant(lambda x: x[x[:, 0] > 0], [x], takes=["position"], returns=["vector"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"takes": ["place"]}, "takes: expected among scalar"),
        ({"returns": ["place"]}, "returns: expected among scalar"),
        ({"symmetries": ["inversion"]}, "symmetries: expected among rotation"),
        ({"takes": ["position", "scalar"]}, "takes: expected a kind for each of 1 inputs"),
        ({"takes": ["scalar"]}, "takes: expected a position or a vector"),
        ({"returns": ["scalar", "scalar"]}, "returns: expected a kind for each of 1 results"),
    ],
)
def test_kinds_must_fit(changes, match):
    with pytest.raises(InvalidInputError, match=match):
        assert_equivariant(lambda x: x, [_POINTS], **{"takes": ["position"], "returns": ["position"], **changes})


def test_other_dtypes_need_a_tolerance():
    with pytest.raises(InvalidInputError, match=r"tolerance: expected a number for torch.bfloat16"):
        assert_equivariant(lambda x: x, [_POINTS.bfloat16()], takes=["position"], returns=["position"])
