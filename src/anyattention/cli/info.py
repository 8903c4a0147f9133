"""`anyattention info`: what is installed, and what runs."""

from __future__ import annotations

import argparse
import platform
import re
from typing import Any

__all__ = ["add_parser"]

_FOR_DEVELOPMENT = ("test", "bench", "dev")


def add_parser(commands: Any) -> None:
    """Describe the command."""
    text = "print versions, threads, which kernels were built and chosen, and which extras are installed"
    parser = commands.add_parser("info", help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    import anyattention

    print(f"anyattention  {anyattention.__version__}")
    print(f"Python        {platform.python_version()} on {platform.machine()}")
    print(f"PyTorch       {torch.__version__}, {torch.get_num_threads()} threads")
    for line in _kernels():
        print(line)
    for extra, packages in _extras().items():
        print(f"extra {extra:7} {_describe(extra, packages)}")
    return 0


def _kernels() -> list[str]:
    from anyattention import native

    about = native.info()
    lines = [
        f"kernels built {', '.join(about.built) or 'none'}",
        f"this CPU runs {', '.join(about.supported) or 'none'}",
        *[f"not usable    {level}: {reason}" for level, reason in about.refused],
    ]
    if about.reason is not None:
        return [*lines, f"kernels used  none, the reference implementation runs: {about.reason}"]
    threads = f"OpenMP from {about.openmp}" if about.openmp else "one thread"
    return [*lines, f"kernels used  {about.level} ({threads}), {about.path}"]


def _extras() -> dict[str, list[str]]:
    """The packages of each extra, as the installed package's own metadata lists them."""
    from importlib.metadata import requires

    found: dict[str, list[str]] = {}
    for requirement in requires("anyattention") or []:
        match = re.match(r"([\w.-]+).*;.*extra == ['\"](\w+)['\"]", requirement)
        if match and match[2] not in _FOR_DEVELOPMENT:
            found.setdefault(match[2], []).append(match[1])
    return found


def _describe(extra: str, packages: list[str]) -> str:
    from importlib.metadata import PackageNotFoundError, version

    known, missing = [], []
    for package in packages:
        try:
            known.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if not missing:
        return f"installed: {', '.join(known)}"
    return f"not installed, {', '.join(missing)} missing: pip install 'anyattention[{extra}]'"
