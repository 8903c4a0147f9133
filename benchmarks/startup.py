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
IMPORTS = {
    "python, nothing imported": "pass",
    "import torch": "import torch",
    "import anyattention": "import anyattention",
    "attend and Graph": "from anyattention import attend, Graph",
    "every public name": "from anyattention import *",
}
HELP = [[], ["train"], ["demo"], ["predict"], ["info"]]
# What a line takes where PyTorch is imported already; whole processes differ by more from one to the next.
AFTER = "import time, torch; begun = time.process_time(); {}; print(1e3 * (time.process_time() - begun))"


def main() -> None:
    require_tests("tests/test_layers.py", "tests/cli/test_commands.py")
    helps = {
        " ".join(
            ["anyattention", *command, "--help"]
        ): f"from anyattention.cli import main; main({[*command, '--help']})"
        for command in HELP
    }
    whole: dict[str, list[float]] = {name: [] for name in (*IMPORTS, *helps)}
    after: dict[str, list[float]] = {name: [] for name in IMPORTS if "anyattention" in IMPORTS[name]}
    # Once before, which writes Python's compiled files.
    run(IMPORTS["every public name"])
    for _ in range(ROUNDS):
        for name, code in {**IMPORTS, **helps}.items():
            whole[name].append(run(code)[0])
        for name in after:
            after[name].append(float(run(AFTER.format(IMPORTS[name]))[1]))
    imports = {name: {"milliseconds": statistics.median(whole[name])} for name in IMPORTS}
    for name, taken in after.items():
        imports[name]["after import torch"] = statistics.median(taken)
    for name, taken in [*whole.items(), *((f"{name}, after import torch", taken) for name, taken in after.items())]:
        print(f"  {name:40s} {statistics.median(taken):9.1f} ms ({min(taken):.1f} to {max(taken):.1f})")
    write_result(
        "startup",
        {"imports": imports, "help": {name: {"milliseconds": statistics.median(whole[name])} for name in helps}},
    )


def run(code: str) -> tuple[float, str]:
    """The processor's milliseconds of a fresh process that runs the code, and what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(Path(anyattention.__file__).parents[1])
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"failed: {code}")
    return 1e3 * (usage.ru_utime + usage.ru_stime), printed


if __name__ == "__main__":
    main()
