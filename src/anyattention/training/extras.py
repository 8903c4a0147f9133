"""Imports of the packages that only the commands need."""

from importlib import import_module
from typing import Any

from anyattention.errors import MissingExtraError

__all__ = ["import_demo", "require_extras"]

_PACKAGES = {"sklearn": "scikit-learn"}


def import_demo(module: str, purpose: str) -> Any:
    """A module of the `demo` extra.

    Args:
        module: its full name, such as "sklearn.datasets".
        purpose: what needs it, as the subject of a sentence.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as missing:
        top = module.split(".")[0]
        # A broken installation of the package itself is not ours to explain away.
        if missing.name is None or missing.name.split(".")[0] != top:
            raise
        raise MissingExtraError(
            f"{purpose} needs {_PACKAGES.get(top, top)}",
            argument=top,
            hint="Install it with: pip install 'anyattention[demo]'",
        ) from missing


def is_installed(module: str) -> bool:
    """Whether a module of the `demo` extra can be imported, for what can be left out."""
    try:
        import_demo(module, module)
    except MissingExtraError:
        return False
    return True


def require_extras() -> None:
    """Raise before the work when a package is missing that would be needed after it.

    Raises:
        MissingExtraError: matplotlib or tqdm is not installed.
    """
    import_demo("tqdm", "the progress bar")
    import_demo("matplotlib", "the picture of the attention")
