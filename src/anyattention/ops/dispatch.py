"""The choice of an implementation: an ordered table, the first that can run the call, and the reasons."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anyattention.ambient import is_exported_to_onnx
from anyattention.errors import InvalidInputError, UnsupportedError

__all__ = ["Explanation", "Implementation", "choose", "explain"]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: what `implementation=` and `explain` call it.
        run: computes a call.
        refusal: why it cannot run a call, or None when it can. Reads shapes, dtypes and devices only, never
            values, so that the choice is the same under torch.compile.
    """

    name: str
    run: Callable[[Any], Any]
    refusal: Callable[[Any], str | None]


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs a call, and why each one before it in the table does not.

    Attributes:
        implementation: the name of the one that runs.
        refusals: (name, reason) of each one that was tried before it.
        notes: what the caller should know about the one that runs.
    """

    implementation: str
    refusals: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"runs: {self.implementation}"]
        lines += [f"not {name}: {reason}" for name, reason in self.refusals]
        return "\n".join([*lines, *self.notes])


def choose(table: Sequence[Implementation], call: Any, forced: str | None) -> Implementation:
    """The first implementation that can run the call; a forced one never falls back.

    ONNX has no operator of ours: what is exported to it is the reference.

    Raises:
        InvalidInputError: the forced name is not in the table.
        UnsupportedError: the forced implementation cannot run the call.
    """
    if forced is None and is_exported_to_onnx():
        forced = "reference"
    for candidate in table if forced is None else _candidates(table, forced):
        reason = candidate.refusal(call)
        if reason is None:
            return candidate
        if forced is not None:
            raise UnsupportedError(
                f"implementation={forced!r} cannot run this call: {reason}",
                argument="implementation",
                actual=forced,
            )
    raise UnsupportedError("no implementation can run this call", argument="implementation")


def explain(table: Sequence[Implementation], call: Any, forced: str | None, notes: tuple[str, ...] = ()) -> Explanation:
    """What `choose` does, with its reasons."""
    chosen = choose(table, call, forced)
    refusals = []
    for candidate in _candidates(table, forced):
        if candidate is chosen:
            break
        refusals.append((candidate.name, str(candidate.refusal(call))))
    return Explanation(chosen.name, tuple(refusals), notes)


def _candidates(table: Sequence[Implementation], forced: str | None) -> list[Implementation]:
    if forced is None:
        return list(table)
    named = [candidate for candidate in table if candidate.name == forced]
    if not named:
        raise InvalidInputError(
            argument="implementation",
            expected="one of " + ", ".join(repr(candidate.name) for candidate in table),
            actual=repr(forced),
        )
    return named
