"""Results as figures and tables: how a case that was measured is read, held to its aims and written as Markdown.

A case maps each contestant to its `harness.Timing`, or to a number. The contestant "anyattention" is ours and
"anyattention, ..." a variant of ours; a limit is the least that the machine needs for a part of the case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

OURS = "anyattention"
# By how their names begin.
_LIMITS = ("limit", "matrix rate", "reading ", "the same on cached rows", "its arithmetic")

Results = Mapping[str, Any]
Table = Callable[[Results], str]


@dataclass(frozen=True)
class Case:
    """What one case measured; the ratio of two timings is the median over the rounds, as the harness took it."""

    found: Mapping[str, Any]

    @property
    def limits(self) -> list[str]:
        # A limit of sorted points belongs to the variant that has them.
        return [name for name in self.found if name.startswith(_LIMITS) and not name.endswith(", sorted")]

    @property
    def others(self) -> list[str]:
        return [name for name in self.found if name != OURS and not name.startswith(_LIMITS)]

    def over(self, other: str) -> float:
        """The other's time, or number, over ours."""
        found = self.found[other]
        return found["ratio"] if isinstance(found, Mapping) else found / self.found[OURS]

    def memory_over(self, other: str) -> float:
        """The other's peak memory over ours."""
        return self.found[other]["peak_bytes"] / self.found[OURS]["peak_bytes"]

    def over_limit(self) -> float:
        """Our time over the largest limit."""
        return min(1 / self.over(name) for name in self.limits)

    def cells(self, unit: str) -> list[str]:
        """What `comparisons` shows: ours, the others over ours, ours over the limits, and the memory."""
        ours = self.found[OURS]
        others = [f"{name_of(name)} {figure(self.over(name))}" for name in self.others]
        limits = [f"{name} {figure(1 / self.over(name))}" for name in self.limits]
        if not isinstance(ours, Mapping):
            return [f"{figure(ours)} {unit}", "; ".join(others), "; ".join(limits), ""]
        # None: no more pages than were there before.
        peaks = [f"{figure(ours['peak_bytes'] / 2**20)} MiB"] if ours["peak_bytes"] else []
        peaks += [f"{name_of(name)} {figure(self.memory_over(name))}" for name in self.others if peaks]
        return [duration(ours["median"]), "; ".join(others), "; ".join(limits), "; ".join(peaks)]


class Aim(NamedTuple):
    """What was to be reached, in words, and whether a case does."""

    text: str
    holds: Callable[[Case], bool]


# The aims of the cases whose path fits a pattern such as "graph/kernels/*, forward".
Aims = Mapping[str, Sequence[Aim]]


def faster(times: float, other: str) -> Aim:
    return Aim(f"{times:g} x {other}", lambda case: case.over(other) >= times)


def lighter(times: float, other: str) -> Aim:
    return Aim(f"1/{times:g} of {other}'s memory", lambda case: case.memory_over(other) >= times)


def at_most(times: float, other: str) -> Aim:
    """Of our time, or number, over the other's."""
    return Aim(f"at most {times:.3g} x {name_of(other)}", lambda case: 1 / case.over(other) <= times)


def near_limit(times: float) -> Aim:
    return Aim(f"at most {times:g} x the larger limit", lambda case: case.over_limit() <= times)


def below(bound: float, number: str) -> Aim:
    """Of one number of a case."""
    return Aim(f"{number} at most {bound:g}", lambda case: case.found[number] <= bound)


def verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "missed"


def look_up(results: Results, path: str) -> Any:
    """What the results have at "file/case/title/..."."""
    file, *keys = path.split("/")
    found = results[file]["cases"]
    for key in keys:
        found = found[key]
    return found


def comparisons(*paths: str, aims: Aims, unit: str = "") -> Table:
    """A table of the cases at some paths: ours beside others, limits and aims."""
    columns = ["case", "ours", "others over ours", "ours over the limit", "peak memory; others over ours", "aim"]

    def write(results: Results) -> str:
        rows = []
        for path in paths:
            topic = f"{path.split('/')[-1]}: " if len(paths) > 1 else ""
            for title, case in _cases(results, path, lambda found: OURS in found):
                rows.append([topic + title, *case.cells(unit), _verdicts(case, f"{path}/{title}", aims)])
        return markdown(columns, rows)

    return write


def numbers(path: str, first: str, aims: Aims) -> Table:
    """A table of the plain numbers at a path: a row for each title, a column for each name."""

    def write(results: Results) -> str:
        found = dict(_cases(results, path, lambda row: not any(isinstance(cell, Mapping) for cell in row.values())))
        columns = list(dict.fromkeys(name for case in found.values() for name in case.found))
        rows = []
        for title, case in found.items():
            cells = [figure(case.found.get(name)) for name in columns]
            rows.append([title, *cells, _verdicts(case, f"{path}/{title}", aims)])
        return markdown([first, *columns, "aim"], rows)

    return write


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without the columns in which every cell is empty."""
    rows = list(rows)
    used = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    lines = [[line[place] for place in used] for line in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def name_of(contestant: str) -> str:
    """A variant of ours by its own name."""
    return contestant.removeprefix(f"{OURS}, ")


def figure(number: float | None) -> str:
    """Three digits; whole numbers as they are."""
    if number is None:
        return ""
    if isinstance(number, int) or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{float(f'{number:.3g}'):g}"


def duration(seconds: float) -> str:
    return f"{figure(seconds)} s" if seconds >= 1 else f"{figure(seconds * 1e3)} ms"


def _cases(results: Results, path: str, is_wanted: Callable[[Mapping[str, Any]], bool]) -> Iterator[tuple[str, Case]]:
    for title, found in look_up(results, path).items():
        if isinstance(found, Mapping) and is_wanted(found):
            yield title, Case(found)


def _verdicts(case: Case, path: str, aims: Aims) -> str:
    wanted = [aim for pattern, listed in aims.items() if fnmatchcase(path, pattern) for aim in listed]
    return "; ".join(f"{aim.text}: {verdict(aim.holds(case))}" for aim in wanted)
