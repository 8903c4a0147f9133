"""Features of the columns of a table: numbers by mean and deviation, categories as a number for each of them.

What was measured on one table is kept, so that other tables with the same columns are read in the same way.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from anyattention.errors import InvalidConfigError
from anyattention.files import most_memory
from anyattention.training.delimited import Table, counted, listed

__all__ = [
    "MISSING",
    "Column",
    "columns_from_json",
    "columns_to_json",
    "described",
    "deviates",
    "measure_columns",
    "not_used",
    "read_columns",
]

MISSING = frozenset(("", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "None", "<NA>", "#N/A"))
"""What is missing in a column of numbers; in one of categories only an empty field is: "None" may be a category."""

# Below this share of the magnitude a deviation is rounding: that of twelve times 0.1 is 1e-17.
_ROUNDING = 1e-12

# Zeros do not lead thousands: 0,125 is a decimal number.
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_POINTS_OF_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+")

_MANY_CATEGORIES, _FEW_CATEGORIES = 1000, 20


class Column(NamedTuple):
    """How one column is read.

    Attributes:
        name: of the column.
        kind: "number" or "category".
        mean, deviation: of the numbers that there were; an infinite deviation is that of an array's column that was the
            same in all rows, which becomes 0.
        categories: that there were, in order; each has a column of zeros and ones.
        decimal_comma: whether numbers had a comma for the decimal point.
    """

    name: str
    kind: Literal["number", "category"]
    mean: float = 0.0
    deviation: float = 1.0
    categories: tuple[str, ...] = ()
    decimal_comma: bool = False

    @property
    def width(self) -> int:
        """Number of features that it becomes."""
        return 1 if self.kind == "number" else len(self.categories)


def deviates(deviation: Any, magnitude: Any) -> Any:
    """Whether a standard deviation of numbers of at most a magnitude is more than rounding; of tensors, for each."""
    return deviation > _ROUNDING * magnitude


class Measured(NamedTuple):
    """What was found in a table: how its columns are read, the columns with gaps, and what is to be told."""

    columns: tuple[Column, ...]
    notes: tuple[str, ...]


def measure_columns(
    table: Table, names: Sequence[str], *, categories: Collection[str] = (), ignored: Collection[str] = ()
) -> Measured:
    """Decide how the columns of a table are read.

    A column whose fields are all numbers is a number; one without any number is a category. A number's mean and
    deviation are those of the fields that are filled. Left out, which a note says, is a column without any field, one
    that is the same in every row, and one of text with over 1,000 different fields or mostly different ones (titles).

    Args:
        table: with the columns.
        names: of the columns that are features.
        categories: columns that are categories even though they have numbers.
        ignored: columns that are left out.

    Raises:
        InvalidInputError: a column that has numbers and text, a number that is not finite, or commas that may be the
            decimal point or between thousands; named with its line.
    """
    columns, notes = [], []
    for name in names:
        if name in ignored:
            continue
        values = table.columns[name]
        numbers = None if name in categories else _numbers(table, name)
        if numbers is None:
            column, note = _measured_category(table, name, values, name in categories)
            notes += [note] if note else []
            if column is not None:
                columns.append(column)
            continue
        filled = numbers[~np.isnan(numbers)]
        if not filled.size:
            notes.append(f"{table.place(name)}: not used, since no field is filled.")
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            mean, deviation = float(filled.mean()), float(filled.std())
        if not math.isfinite(mean) or not math.isfinite(deviation):
            raise table.fault(name, None, "numbers with a finite deviation", f"up to {np.abs(filled).max():g}")
        if deviates(deviation, float(np.abs(filled).max())):
            has_commas = _has_commas(table, name)
            notes += [_told_comma(table, name)] if has_commas else []
            columns.append(Column(name, "number", mean, deviation, decimal_comma=has_commas))
        else:
            notes.append(f"{table.place(name)}: not used, since its number is the same in every row.")
    return Measured(tuple(columns), tuple(notes))


def _measured_category(
    table: Table, name: str, values: Sequence[str], is_asked_for: bool
) -> tuple[Column | None, str | None]:
    counts = Counter(values)
    filled = len(values) - counts.pop("", 0)
    different = len(counts)
    if not different:
        return None, f"{table.place(name)}: not used, since no field is filled."
    if not is_asked_for and different > min(_MANY_CATEGORIES, max(_FEW_CATEGORIES, filled / 2)):
        return None, (
            f"{table.place(name)}: not used, since it is text with {different:,} different fields in {filled:,}."
        )
    if different == 1 and filled == len(values):
        return None, f"{table.place(name)}: not used, since it is the same in every row."
    return Column(name, "category", categories=tuple(sorted(counts))), None


def read_columns(
    table: Table, columns: Sequence[Column], *, as_they_are: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The features `(rows, sum of the columns' widths)` float32 of a table, and what is to be told of them.

    A number becomes (number - mean) / deviation, where it is missing 0, which is the mean. A category is 1 in its own
    column and 0 in the others; a missing one and one that was not there when the columns were measured has zeros only.

    Args:
        table: with the columns; others are not read.
        columns: as `measure_columns` made them.
        as_they_are: leave the numbers as they are; a missing one is the mean.

    Raises:
        InvalidInputError: a column is missing, a field of a number is none, or the features would take far more memory
            than the table.
    """
    width = sum(column.width for column in columns)
    if 4 * table.num_rows * width > most_memory(table.size):
        widest = max(columns, key=lambda column: column.width)
        raise table.fault(
            widest.name,
            None,
            f"features of at most {most_memory(table.size):,} bytes for the table's size",
            f"{widest.width:,} categories",
            hint=f"--ignore {widest.name} leaves the column out",
        )
    features = np.zeros((table.num_rows, width), dtype=np.float32)
    gaps: dict[str, int] = {}
    notes, start = [], 0
    for column in columns:
        values = table.require(column.name, "the training had it")
        if column.kind == "number":
            numbers = _numbers(table, column.name, must_be=True, decimal_comma=column.decimal_comma)
            assert numbers is not None
            if not column.decimal_comma and _has_commas(table, column.name):
                notes.append(_told_comma(table, column.name))
            is_missing = np.isnan(numbers)
            gaps[column.name] = int(is_missing.sum())
            numbers[is_missing] = column.mean
            scaled = numbers if as_they_are else (numbers - column.mean) / column.deviation
            with np.errstate(over="ignore"):
                features[:, start] = scaled
            if not np.isfinite(features[:, start]).all():
                row = int(np.argmin(np.isfinite(features[:, start])))
                raise table.fault(column.name, row, "a number of at most 1e38 deviations", repr(values[row]))
        else:
            places = {category: start + place for place, category in enumerate(column.categories)}
            found = np.array([places.get(value, -1) for value in values], dtype=np.int64)
            rows = np.flatnonzero(found >= 0)
            features[rows, found[rows]] = 1.0
            unknown: Counter[str] = Counter(value for value in values if value and value not in places)
            gaps[column.name] = len(values) - len(rows) - sum(unknown.values())
            if unknown:
                rows_told = counted(sum(unknown.values()), "row")
                notes.append(
                    f"{table.place(column.name)}: {listed(sorted(unknown))} in {rows_told}: the training had no such "
                    "category, so that it counts as none."
                )
        start += column.width
    return features, (*_told_gaps(table, gaps), *notes)


def described(what: str, columns: Sequence[Column]) -> str:
    """The columns of features in a sentence."""
    if not columns:
        return f"{what}: none."
    numbers = [column.name for column in columns if column.kind == "number"]
    categories = [f"{column.name!r} ({column.width:,} of them)" for column in columns if column.kind == "category"]
    parts = [f"numbers: {listed(numbers)}"] if numbers else []
    if categories:
        more = f" and {len(categories) - 10:,} more" if len(categories) > 10 else ""
        parts.append(f"categories: {', '.join(categories[:10])}{more}")
    return f"{what}, {'; '.join(parts)}."


def not_used(table: Table, names: Sequence[str], columns: Sequence[Column]) -> tuple[str, ...]:
    """What is to be told of columns that the training did not use."""
    others = [name for name in names if name not in {column.name for column in columns}]
    if not others:
        return ()
    return (f"{table.source}: not used, since the training did not: {table.column_word} {listed(others)}.",)


def _told_gaps(table: Table, gaps: dict[str, int]) -> tuple[str, ...]:
    holes = [f"{name!r} ({count:,})" for name, count in gaps.items() if count]
    if not holes:
        return ()
    shown = ", ".join(holes[:10]) + (f" and {len(holes) - 10:,} more" if len(holes) > 10 else "")
    return (
        f"{table.source}: missing in {table.column_word} {shown}, of {table.num_rows:,} rows: a missing number is the "
        "mean, a missing category is none.",
    )


def _has_commas(table: Table, name: str) -> bool:
    return table.decimal_comma and any("," in value for value in table.columns[name])


def _told_comma(table: Table, name: str) -> str:
    return f"{table.place(name)}: a comma is the decimal point."


def _refuse_thousands(table: Table, name: str, *, must_be: bool) -> None:
    """Raise InvalidInputError where each field with a comma may be meant as thousands: 1,234."""
    values = table.columns[name]
    rows = [row for row, value in enumerate(values) if "," in value]
    if rows and all(_THOUSANDS.fullmatch(values[row]) for row in rows):
        hint = "write such numbers without commas, or with a decimal point"
        raise table.fault(
            name,
            rows[0],
            "numbers whose commas are clearly decimal points",
            f"{values[rows[0]]!r}, which may be thousands",
            hint=hint if must_be else f"{hint}; {_other_ways(table, name)}",
        )


def _refuse_all_thousands(table: Table, name: str) -> None:
    """Raise InvalidInputError where each field of a column of text is a number with commas between thousands."""
    values = table.columns[name]
    filled = [row for row, value in enumerate(values) if value not in MISSING]
    if filled and not table.decimal_comma and all(_THOUSANDS.fullmatch(values[row]) for row in filled):
        raise table.fault(
            name,
            filled[0],
            "numbers without commas between thousands",
            repr(values[filled[0]]),
            hint=_other_ways(table, name),
        )


def _refuse_points_of_thousands(table: Table, name: str) -> None:
    """Raise InvalidInputError where a column of decimal commas has a point that may be between thousands: 1.234."""
    values = table.columns[name]
    for row, value in enumerate(values):
        if _POINTS_OF_THOUSANDS.fullmatch(value):
            raise table.fault(
                name,
                row,
                "numbers without points beside those with a decimal comma",
                f"{value!r}, which may be thousands",
                hint="write such numbers without points between thousands",
            )


def _other_ways(table: Table, name: str) -> str:
    return f"--category {name} reads the {table.column_word} as categories, --ignore {name} leaves it out"


def _numbers(table: Table, name: str, *, must_be: bool = False, decimal_comma: bool = False) -> np.ndarray | None:
    """The numbers `(rows,)` float64 of a column, NaN where they are missing; None where no field is one.

    Raises:
        InvalidInputError: some fields are numbers and some are not (or must be), one is not finite, or commas may be
            between thousands and are not known to be decimal points, or points may where commas are decimal points.
    """
    values = table.columns[name]
    if table.decimal_comma and not decimal_comma:
        _refuse_thousands(table, name, must_be=must_be)
    found = _converted(values)
    if found is None and table.decimal_comma:
        found = _converted([value.replace(",", ".") if value.count(",") == 1 else value for value in values])
    if found is None:
        parsed = [_number(value, table.decimal_comma) for value in values]
        wrong = next(row for row, number in enumerate(parsed) if number is None)
        good = sum(number is not None for number, value in zip(parsed, values, strict=True) if value not in MISSING)
        if not good and not must_be:
            _refuse_all_thousands(table, name)
            return None
        raise table.fault(
            name,
            wrong,
            "a number, as in the training" if must_be else f"a number, as in {counted(good, 'other row')}",
            repr(values[wrong]),
            hint=None if must_be else _other_ways(table, name),
        )
    if table.decimal_comma and (decimal_comma or _has_commas(table, name)):
        _refuse_points_of_thousands(table, name)
    infinite = np.isinf(found)
    if infinite.any():
        row = int(np.argmax(infinite))
        raise table.fault(name, row, "a finite number", repr(values[row]))
    return found


def _converted(values: Sequence[str]) -> np.ndarray | None:
    try:
        found = np.array([math.nan if value in MISSING else float(value) for value in values], dtype=np.float64)
    except ValueError:
        return None
    # Python's own spelling of 1000 as 1_000 is no number in a table.
    return None if any("_" in value for value in values) else found


def _number(value: str, decimal_comma: bool) -> float | None:
    if value in MISSING:
        return math.nan
    if decimal_comma and value.count(",") == 1:
        value = value.replace(",", ".")
    try:
        return None if "_" in value else float(value)
    except ValueError:
        return None


def columns_to_json(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The columns as JSON's types."""
    return [
        {"name": column.name, "number": [column.mean, column.deviation if math.isfinite(column.deviation) else None]}
        | ({"decimal_comma": True} if column.decimal_comma else {})
        if column.kind == "number"
        else {"name": column.name, "categories": list(column.categories)}
        for column in columns
    ]


def columns_from_json(given: object) -> tuple[Column, ...]:
    """The columns of what `columns_to_json` made.

    Raises:
        InvalidConfigError: an unknown name, or a value of another type or out of range.
    """
    if not isinstance(given, list):
        raise InvalidConfigError(argument="columns", expected="a list", actual=type(given).__name__)
    columns = tuple(_column_from_json(each) for each in given)
    if len({column.name for column in columns}) < len(columns):
        raise InvalidConfigError(argument="columns", expected="each name once", actual=listed(c.name for c in columns))
    return columns


def _column_from_json(given: Any) -> Column:
    if isinstance(given, dict) and isinstance(given.get("name"), str):
        name, numbers, categories = given["name"], given.get("number"), given.get("categories")
        # JSON has no infinity.
        is_constant = isinstance(numbers, list) and numbers[1:] == [None]
        if (
            set(given) - {"decimal_comma"} == {"name", "number"}
            and given.get("decimal_comma", True) is True
            and isinstance(numbers, list)
            and len(numbers) == 2
            and all(type(each) in (int, float) and abs(each) < 1e308 for each in numbers[: 1 if is_constant else 2])
            and (is_constant or deviates(numbers[1], abs(numbers[0])))
        ):
            deviation = math.inf if is_constant else float(numbers[1])
            return Column(name, "number", float(numbers[0]), deviation, decimal_comma="decimal_comma" in given)
        if (
            set(given) == {"name", "categories"}
            and isinstance(categories, list)
            and all(isinstance(each, str) for each in categories)
            and len(set(categories)) == len(categories) > 0
        ):
            return Column(name, "category", categories=tuple(categories))
    raise InvalidConfigError(
        argument="columns",
        expected="a name with a number [mean, deviation above 0 and above rounding] or with different categories",
        actual=repr(given)[:200],
    )
