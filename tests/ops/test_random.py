"""Philox4x32-10 against published vectors and a second writing of it in numpy; the factors against their statistics."""

import math

import numpy
import pytest
import torch

from anyattention.ops.dropout import draw_seed, keep_factors, philox

# Counter, key and words of Random123's known answers ("kat_vectors"), each in 32-bit words, lowest first.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def numpy_philox(counter, key):
    """Salmon et al., 2011, section 3.3 with Python's unbounded integers; words lowest first."""
    x0, x1, x2, x3 = (int(word) for word in counter)
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        low = 2**32
        high0, low0 = divmod(0xD2511F53 * x0, low)
        high1, low1 = divmod(0xCD9E8D57 * x2, low)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % low, (k1 + 0xBB67AE85) % low
    return x0, x1, x2, x3


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_oracle_gives_the_published_answers(counter, key, words):
    assert numpy_philox(counter, key) == words


def test_counter_zero_gives_the_published_answer():
    words = philox(torch.tensor([0]), torch.tensor(0))
    assert tuple(words[:, 0].tolist()) == KNOWN_ANSWERS[0][2]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x299F31D0A4093822, 2**63 - 1, -1, -(2**63)])
def test_philox_agrees_with_the_oracle(seed):
    counters = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 0x1234567890ABCDEF, 2**63 - 1]
    words = philox(torch.tensor(counters), torch.tensor(seed))
    key = (seed % 2**32, (seed >> 32) % 2**32)
    expected = [numpy_philox((counter % 2**32, counter >> 32, 0, 0), key) for counter in counters]
    assert words.T.tolist() == [list(answer) for answer in expected]


def test_factors_come_from_the_words_in_order():
    seed = 0x123456789ABCDEF
    shape = (3, 5, 7)
    words = [numpy_philox((block, 0, 0, 0), (seed % 2**32, seed >> 32)) for block in range(27)]
    uniform = (numpy.array(words, dtype=numpy.int64).reshape(-1)[:105] >> 8) / 2.0**24
    expected = numpy.where(uniform >= 0.3, 1 / 0.7, 0.0).reshape(shape)
    actual = keep_factors(shape, 0.3, torch.tensor(seed), torch.float64)
    numpy.testing.assert_array_equal(actual.numpy(), expected)


def test_factors_depend_on_the_position_and_not_on_the_shape():
    seed = torch.tensor(99)
    whole = keep_factors((13, 11), 0.5, seed, torch.float32)
    assert torch.equal(keep_factors((143,), 0.5, seed, torch.float32), whole.flatten())
    assert torch.equal(keep_factors((2, 11), 0.5, seed, torch.float32), whole[:2])
    assert keep_factors((0, 3), 0.5, seed, torch.float32).shape == (0, 3)
    assert keep_factors((), 0.5, seed, torch.float32) == whole[0, 0]


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_factors_are_kept_at_the_right_rate_and_independently(dropout):
    size = 1 << 18
    drawn = torch.stack([keep_factors((size,), dropout, torch.tensor(seed), torch.float64) for seed in (1, 2)])
    assert set(drawn.unique().tolist()) == {0.0, 1 / (1 - dropout)}
    kept = (drawn > 0).double()
    error = math.sqrt(dropout * (1 - dropout) / size)
    assert ((kept.mean(1) - (1 - dropout)).abs() <= 4 * error).all()
    centred = (kept - (1 - dropout)) / math.sqrt(dropout * (1 - dropout))
    # Neighbours, words of one block, blocks next to each other, and seeds next to each other.
    for shift in (1, 2, 3, 4):
        correlation = (centred[0, shift:] * centred[0, :-shift]).mean()
        assert correlation.abs() <= 4 / math.sqrt(size)
    assert (centred[0] * centred[1]).mean().abs() <= 4 / math.sqrt(size)


def test_uniform_numbers_are_uniform():
    words = philox(torch.arange(1 << 16), torch.tensor(7)).flatten()
    counts = torch.bincount(words >> 24, minlength=256).double()
    expected = len(words) / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 255 degrees of freedom: mean 255, standard deviation sqrt(510).
    assert abs(chi_square - 255) <= 4 * math.sqrt(510)


def test_seeds_follow_manual_seed():
    torch.manual_seed(21)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(21)
    again = draw_seed(torch.device("cpu"))
    assert first == again
    assert first != second
    assert first.dtype == torch.int64
    assert first.shape == ()
