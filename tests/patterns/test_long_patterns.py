"""131,072 positions: spans, blocks and numbers take memory for the spans, never for all pairs."""

import subprocess
import sys
import textwrap

import pytest

from anyattention.patterns import Causal, Documents, Fixed, Global, Pattern, RandomBlocks, Strided, Window

_LENGTH = 131_072

# The pattern, the most spans a query may have, and how many pairs there are, by arithmetic.
_PATTERNS: list[tuple[Pattern, int, int]] = [
    (Window(256, 128), 1, _LENGTH * 385 - 256 * 257 // 2 - 128 * 129 // 2),
    (Strided(4096, 64) & Causal(), 2, _LENGTH * 65 - 64 * 65 // 2 + 4096 * 31 * 32 // 2),
    (Fixed(512, 1) & Causal(), 2, 256 * 512 * 513 // 2 + 512 * 255 * 256 // 2),
    (Documents((1000,) * 131 + (72,)), 1, 131 * 1000**2 + 72**2),
    (Documents((1000,) * 131 + (72,)) & Causal(), 1, 131 * 1000 * 1001 // 2 + 72 * 73 // 2),
    (RandomBlocks(3, seed=1), 3, _LENGTH * 3 * 64),
]

_PEAK = """
import sys
from anyattention.patterns import Causal, Documents, Fixed, Global, RandomBlocks, Strided, Window

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

def measure(make, length):
    pattern = make(length)
    pattern.to_blocks(64, length, length)
    pattern.max_attended(length)

make = {
    "window": lambda length: Window(256, 256),
    "strided": lambda length: Strided(2048, 128) & Causal(),
    "fixed": lambda length: Fixed(2048, 1) & Causal(),
    "mixed": lambda length: Window(96, 96) | Global(128) | RandomBlocks(3),
    "documents": lambda length: Documents((length // 4, length // 4, length // 2)) & Causal(),
}[sys.argv[1]]
measure(make, 1024)  # code, thread pools and allocator are there before the measurement
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak()
measure(make, 131_072)
print((peak() - before) / 131_072)
"""


@pytest.mark.parametrize(
    ("pattern", "most", "num_pairs"),
    [*_PATTERNS[:2], *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in _PATTERNS[2:])],
    ids=[str(each[0]) for each in _PATTERNS],
)
def test_there_are_few_spans_for_many_pairs(pattern: Pattern, most: int, num_pairs: int) -> None:
    spans = pattern.spans(_LENGTH, _LENGTH)
    assert spans.query.numel() <= most * _LENGTH
    assert spans.num_pairs == num_pairs
    assert pattern.density(_LENGTH) == num_pairs / _LENGTH**2


@pytest.mark.exhaustive
def test_neighbours_global_tokens_and_random_blocks_together() -> None:
    pattern = Window(96, 96) | Global(128) | RandomBlocks(3)
    spans = pattern.spans(_LENGTH, _LENGTH)
    assert spans.query.numel() <= 5 * _LENGTH
    assert pattern.max_attended(_LENGTH) == _LENGTH
    blocks = pattern.to_blocks(64, _LENGTH, _LENGTH)
    rows = blocks.sum(1)
    assert bool(blocks[:2].all())
    assert bool(blocks[:, :2].all())
    # Two blocks of tokens, five around the diagonal, three random ones; fewer where these fall together.
    assert int(rows[2:].max()) == 10
    assert int(rows[10:-10].min()) >= 7


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["window", "strided", "fixed", "mixed", "documents"])
def test_memory_grows_with_the_spans(kind: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PEAK), kind], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    # Bytes for each query; a matrix of booleans would be 131,072 of them.
    assert float(finished.stdout) < 4096, finished.stdout
