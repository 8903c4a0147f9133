"""How long a fresh process takes to import the package and to show each command's help, beside PyTorch's import.

`python -m benchmarks.startup` starts processes in turns and counts the processor's time, of the user and the system,
which other work on the machine disturbs less than the clock. Python's compiled files are there, as pip writes them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import anyattention
from benchmarks.harness import require_tests, write_result

ROUNDS = 15
NOTHING, TORCH = "python, nothing imported", "import torch"
IMPORTS = {
    NOTHING: "pass",
    TORCH: "import torch",
    "import anyattention": "import anyattention",
    "attend and Graph": "from anyattention import attend, Graph",
    "every public name": "from anyattention import *",
}
HELP = [[], ["train"], ["demo"], ["predict"], ["info"]]


def main() -> None:
    require_tests("tests/test_layers.py", "tests/cli/test_commands.py")
    helps = {
        " ".join(
            ["anyattention", *command, "--help"]
        ): f"from anyattention.cli import main; main({[*command, '--help']})"
        for command in HELP
    }
    codes = {**IMPORTS, **helps}
    for code in codes.values():
        milliseconds(code)
    taken: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(ROUNDS):
        for name, code in codes.items():
            taken[name].append(milliseconds(code))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    imports = {}
    for name in IMPORTS:
        imports[name] = {"milliseconds": medians[name]}
        if name not in (NOTHING, TORCH):
            more = statistics.median(a - b for a, b in zip(taken[name], taken[TORCH], strict=True))
            imports[name]["more than import torch"] = more
    cases = {"imports": imports, "help": {name: {"milliseconds": medians[name]} for name in helps}}
    for name, median in medians.items():
        print(f"  {name:28s} {median:9.1f} ms")
    write_result("startup", cases)


def milliseconds(code: str) -> float:
    """The processor's time of a fresh process that runs the code."""
    source = str(Path(anyattention.__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": source}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"failed: {code}")
    return 1e3 * (usage.ru_utime + usage.ru_stime)


if __name__ == "__main__":
    main()
