"""Timing in turns: ours, each peer and the physical limit in one run, on the same inputs.

This kind of machine drifts by a factor of two, so contestants take turns and only ratios are quoted: the median over
the rounds of (time of the other / time of ours), each pair measured next to each other.
"""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import anyattention
from anyattention import native
from anyattention.files import write_atomically
from benchmarks.peak_memory import peak_memory

__all__ = [
    "RESULTS",
    "Timing",
    "environment",
    "keep_freed_memory",
    "measure",
    "peak_memory",
    "print_table",
    "require_tests",
    "write_result",
]

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "anyattention",
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "torch_geometric",
    "local-attention",
    "dgl",
    "pymetis",
    "vesin",
    "egnn-pytorch",
    "usearch",
)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contestant, its peak memory, and how it compares with ours.

    Attributes:
        median, low, high: seconds; low and high are the quartiles.
        peak_bytes: the most resident memory above what was held before the call; None where unknown.
        ratio: median over the rounds of this contestant's time over ours.
    """

    median: float
    low: float
    high: float
    peak_bytes: int | None
    ratio: float


def environment() -> dict[str, Any]:
    """Where a result comes from: versions, processor, threads, kernels, commit, day."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "kernels": native.info().level,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def measure(
    ours: str,
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 0.05,
) -> dict[str, Timing]:
    """Time each contestant in turns; a round repeats a quick one until `seconds` have passed."""
    repeats: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    for name, call in contestants.items():
        call()
        peaks[name] = peak_memory(call)
        started = time.perf_counter()
        call()
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - started, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - started) / repeats[name])
    results = {}
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        ratio = statistics.median(a / b for a, b in zip(taken, times[ours], strict=True))
        results[name] = Timing(median, low, high, peaks[name], ratio)
    return results


def require_tests(*paths: str) -> None:
    """Run an operation's tests; leave without a number when they fail."""
    print("Running the tests of what is measured:", *paths, flush=True)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *paths], check=False)
    if done.returncode:
        raise SystemExit("The tests fail, so nothing is measured.")


def print_table(title: str, results: Mapping[str, Timing]) -> None:
    """One case as a table: ratio to ours, median and quartiles, peak memory."""
    print(f"\n{title}")
    for name, timing in results.items():
        memory = "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:9.1f} MiB"
        spread = f"{timing.low * 1e3:.2f} to {timing.high * 1e3:.2f}"
        print(f"  {name:28s} {timing.ratio:7.2f} x {timing.median * 1e3:9.2f} ms ({spread}) {memory}")


def write_result(name: str, cases: Mapping[str, Any]) -> Path:
    """Write `results/<name>.json`, with the environment."""
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), "cases": _plain(cases)}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    print(f"\nWritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return asdict(value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _version(package: str) -> str | None:
    if package == "anyattention":
        return anyattention.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str | None:
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def keep_freed_memory() -> None:
    """Have glibc reuse what is freed, as allocators for training do, instead of asking the system anew.

    A virtual machine gives free pages back to its host, and waits for those that it asks for again.
    """
    from_system, kept = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    for option, value in ((from_system, 0), (kept, 2**31 - 1)):
        if not ctypes.CDLL(None).mallopt(option, value):
            raise RuntimeError("mallopt refused an option")
