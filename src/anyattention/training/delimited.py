"""Reads tables of text: comma, tab or semicolon between the fields, as spreadsheets and other programs write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyattention.errors import InvalidInputError
from anyattention.files import require_file

__all__ = ["Table", "counted", "listed", "read_table"]

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_FEWEST_LISTED = 12


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of text, and how to name a place in them.

    Attributes:
        source: what the table is called in messages, such as a path.
        columns: by name; all have one entry for each row, without spaces around it.
        rows: what each row is called in messages, such as "line 2".
        size: bytes that the table was read from.
        decimal_comma: whether numbers may have a comma for the decimal point.
        notes: what was done with the source that its author may not expect, a sentence each.
    """

    source: str
    columns: dict[str, Sequence[str]]
    rows: Sequence[object]
    size: int
    row_word: str = "line"
    column_word: str = "column"
    decimal_comma: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def place(self, column: str | None = None, row: int | None = None) -> str:
        """The name of a place: source, line and column."""
        parts = [self.source]
        if row is not None:
            parts.append(f"{self.row_word} {self.rows[row]}")
        if column is not None:
            parts.append(f"{self.column_word} {column!r}")
        return ", ".join(parts)

    def fault(self, column: str | None, row: int | None, expected: str, actual: str, **more: Any) -> InvalidInputError:
        """The error that names a place."""
        return InvalidInputError(argument=self.place(column, row), expected=expected, actual=actual, **more)

    def refuse_other_capitals(self, reserved: Sequence[str], ignored: Collection[str]) -> None:
        """Raise InvalidInputError where a column is named as a reserved one but for its capitals, and not ignored."""
        for name in self.columns:
            if name.lower() in reserved and name not in reserved and name not in ignored:
                source = f"{self.source}, line 1" if self.row_word == "line" else self.source
                raise InvalidInputError(
                    argument=f"{source}, {self.column_word} {name!r}",
                    expected=f"{name.lower()!r} in small letters, or another name",
                    actual=repr(name),
                    hint=f"rename the {self.column_word}, or leave it out by --ignore {name}",
                )

    def require(self, column: str, hint: str | None = None) -> Sequence[str]:
        """A column, or an error that names it and those that there are."""
        if column in self.columns:
            return self.columns[column]
        near = [name for name in self.columns if name.lower() == column.lower()]
        raise self.fault(
            None,
            None,
            f"{'an' if self.column_word[0] in 'aeiou' else 'a'} {self.column_word} {column!r}",
            f"the {self.column_word}s {listed(self.columns)}",
            hint=f"{near[0]!r} has other capital letters: names count as they are written" if near else hint,
        )


def counted(count: int, noun: str) -> str:
    """A number of things: "1 row", "2,000 rows"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(names: Any) -> str:
    """Names in a sentence, the first dozen of them."""
    shown = [repr(name) for name in names]
    more = len(shown) - _FEWEST_LISTED
    return ", ".join(shown[:_FEWEST_LISTED]) + (f" and {more:,} more" if more > 0 else "") if shown else "none"


def read_table(path: Path, required: Sequence[str]) -> Table:
    """The table of a file: UTF-8, with or without a byte order mark, with any ends of lines, quoted where needed.

    The first line has the names of the columns. The fields stand between commas, tabs or semicolons, whichever the
    first line has; spaces around a field are dropped, and so are blank lines.

    Args:
        path: of the file.
        required: columns that must be there; they tell which delimiter it is.

    Raises:
        InvalidInputError: no such file, no UTF-8, a broken quotation, a row with too many or too few fields, a column
            that is there twice or missing.

    Cost: memory of some ten times the file.
    """
    text, size = _read_text(path)
    delimiter = _delimiter_of(text, required)
    header, fields, lines = _parse(path, text, delimiter)
    names = [name.strip() for name in header]
    for place, name in enumerate(names):
        if name and name in names[:place]:
            raise InvalidInputError(argument=f"{path}, line 1", expected="each column once", actual=f"{name!r} twice")
    notes = [] if delimiter == "," else [f"{path}: {_DELIMITERS[delimiter]} separate the fields."]
    if "" in names:
        notes.append(f"{path}: a column without a name is not used.")
    width = len(names)
    table = Table(
        source=str(path),
        columns={name: [field.strip() for field in fields[place::width]] for place, name in enumerate(names) if name},
        rows=lines,
        size=size,
        decimal_comma=delimiter != ",",
        notes=tuple(notes),
    )
    for name in required:
        table.require(name)
    return table


def _read_text(path: Path) -> tuple[str, int]:
    try:
        size = require_file(path)
        content = path.read_bytes()
    except OSError as fault:
        actual = fault.strerror or str(fault)
        raise InvalidInputError(argument=str(path), expected="a readable table (CSV)", actual=actual) from fault
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise InvalidInputError(
            argument=f"{path}, line {line}",
            expected="text in UTF-8",
            actual="a zero byte",
            hint="a file of a spreadsheet must be saved as CSV, in UTF-8",
        )
    try:
        return content.decode("utf-8-sig"), size
    except UnicodeDecodeError as fault:
        line = content[: fault.start].count(b"\n") + 1
        raise InvalidInputError(
            argument=f"{path}, line {line}",
            expected="text in UTF-8",
            actual=f"the byte 0x{content[fault.start]:02x}",
            hint="save the file as UTF-8",
        ) from fault


def _delimiter_of(text: str, required: Sequence[str]) -> str:
    """The delimiter by which the first line has most of the required columns, and else most columns."""

    def fits(delimiter: str) -> tuple[int, int]:
        try:
            names = next((row for row in _reader(text[: 1 << 16], delimiter) if row), [])
        except csv.Error:
            return 0, 0
        return sum(name.strip() in required for name in names), 0 if names == [] else len(names)

    return max(_DELIMITERS, key=fits)


def _reader(text: str, delimiter: str) -> Any:
    # strict: a quotation without an end would take in the rest of the file.
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)


def _parse(path: Path, text: str, delimiter: str) -> tuple[list[str], list[str], Sequence[int]]:
    """The first line's fields, those of all others in a row, and the lines where these begin."""
    reader = _reader(text, delimiter)
    header: list[str] = []
    # One list for all fields: a million small ones would keep the garbage collector busy.
    fields: list[str] = []
    width, before = 0, 0
    try:
        for row in reader:
            if len(row) == width and width:
                fields += row
            elif row and not width:
                header, width = row, len(row)
            elif not _is_blank(row):
                raise InvalidInputError(
                    argument=f"{path}, line {before + 1}",
                    expected=f"{width} fields, as in the first line",
                    actual=f"{len(row)}",
                    hint='a field with a comma, a semicolon or a tab in it must be quoted: "a, b"',
                )
            before = reader.line_num
    except csv.Error as fault:
        # A quotation without an end is told at the end of the file: the row began where it should have ended.
        raise InvalidInputError(
            argument=f"{path}, line {before + 1}",
            expected='fields that are whole, those with a quote in them as "a ""b"" c"',
            actual=str(fault),
        ) from fault
    if not width:
        raise InvalidInputError(argument=f"{path}, line 1", expected="the names of the columns", actual="an empty file")
    count = len(fields) // width
    if reader.line_num == count + 1:
        return header, fields, range(2, count + 2)
    return header, fields, _first_lines(text, delimiter, width)[1:]


def _is_blank(row: list[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def _first_lines(text: str, delimiter: str, width: int) -> list[int]:
    """The lines where the rows begin, that of the names first."""
    reader = _reader(text, delimiter)
    lines, before = [], 0
    for row in reader:
        if len(row) == width:
            lines.append(before + 1)
        before = reader.line_num
    return lines
