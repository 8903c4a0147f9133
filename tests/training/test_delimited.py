"""Tables of text, beside pandas and Python's csv."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyattention.errors import InvalidInputError
from anyattention.training.delimited import read_table

# What people write: commas, quotes, ends of lines, spaces, leading zeros, other scripts, and nothing.
FIELDS = st.one_of(
    st.sampled_from(
        ["", "007", "1", "-1.5", "a, b", 'say "hi"', "two\nlines", "naïve", "名前", "x;y", "\t", " padded ", "NA"]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6),
)
TABLES = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(FIELDS, min_size=width, max_size=width), min_size=1, max_size=7)
)


def write(path: Path, rows: list[list[str]], delimiter: str = ",", end: str = "\n", mark: bool = False) -> Path:
    content = io.StringIO()
    csv.writer(content, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(rows)
    path.write_bytes(content.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=TABLES, delimiter=st.sampled_from(",;\t"), end=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_any_table_as_pandas_reads_it(rows, delimiter, end, mark, tmp_path, require) -> None:
    names = ["id", *(f"column {place}" for place in range(1, len(rows[0])))]
    path = write(tmp_path / "table.csv", [names, *rows], delimiter, end, mark)
    table = read_table(path, ("id",))
    frame = require("pandas").read_csv(
        path,
        dtype=str,
        keep_default_na=False,
        na_filter=False,
        sep=delimiter,
        encoding="utf-8-sig",
        skip_blank_lines=False,
    )
    assert list(table.columns) == names
    for name in names:
        assert list(table.columns[name]) == [value.strip() for value in frame[name]]
    # Every row is named by the line where it begins.
    text = path.read_bytes().decode("utf-8-sig")
    firsts, before = [], 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    for _ in reader:
        firsts.append(before + 1)
        before = reader.line_num
    assert list(table.rows) == firsts[1:]


@pytest.mark.parametrize(
    ("text", "columns", "rows", "note"),
    [
        ("id,x\r\na,1\r\n\r\nb,2\r\n", {"id": ["a", "b"], "x": ["1", "2"]}, [2, 4], None),
        ("id; x\na; 1,5\n", {"id": ["a"], "x": ["1,5"]}, [2], "semicolons separate the fields"),
        ("id\tx, y\na\tb, c\n", {"id": ["a"], "x, y": ["b, c"]}, [2], "tabs separate the fields"),
        ("a;b,id\n1;2,x\n", {"a;b": ["1;2"], "id": ["x"]}, [2], None),
        ('id, "x, y"\na, "b, c"\n', {"id": ["a"], "x, y": ["b, c"]}, [2], None),
        (",id\n0,a\n", {"id": ["a"]}, [2], "a column without a name is not used"),
        ("id\n   a  \n  \nb", {"id": ["a", "", "b"]}, [2, 3, 4], None),
        ("id,x\n   \na,b\n", {"id": ["a"], "x": ["b"]}, [3], None),
        ("id,x", {"id": [], "x": []}, [], None),
        ("id,x\ra,1\rb,2\r", {"id": ["a", "b"], "x": ["1", "2"]}, [2, 3], None),
    ],
)
def test_what_is_between_the_fields(text, columns, rows, note, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    table = read_table(path, ("id",))
    assert {name: list(values) for name, values in table.columns.items()} == columns
    assert list(table.rows) == rows
    assert table.notes == (() if note is None else (f"{path}: {note}.",))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"line 1: expected the names of the columns, got an empty file"),
        (b"\n\n", r"line 1: expected the names of the columns"),
        (
            b"id,x\na,1\nb,1,2\n",
            r"table.csv, line 3: expected 2 fields, as in the first line, got 3\. a field with a comma",
        ),
        (b'id,x\n"a\nb",1\nc\n', r"line 4: expected 2 fields, as in the first line, got 1"),
        (b'id,x\na,"1\n', r"line 2: expected fields that are whole, .* got unexpected end of data"),
        (b'id,x\na,"1"2\n', r"line 2: expected fields that are whole"),
        (b'id,x\na,1\nb,"2\nc,3\nd,4\n', r"line 3: expected fields that are whole, .* got unexpected end of data"),
        (b"id,x\na,\xff\n", r"line 2: expected text in UTF-8, got the byte 0xff. save the file as UTF-8"),
        (b"\xff\xfei\x00d\x00", r"line 1: expected text in UTF-8, got a zero byte. a file of a spreadsheet"),
        (b"id,x,x\na,1,2\n", r"line 1: expected each column once, got 'x' twice"),
        (b"ID,x\na,1\n", r"expected a column 'id', got the columns 'ID', 'x'. 'ID' has other capital letters"),
        (b"name,x\na,1\n", r"table.csv: expected a column 'id', got the columns 'name', 'x'"),
    ],
)
def test_what_is_no_table(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=told):
        read_table(path, ("id",))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"expected a readable table \(CSV\), got No such file"):
        read_table(tmp_path / "none.csv", ("id",))
    with pytest.raises(InvalidInputError, match="not a file"):
        read_table(tmp_path, ("id",))


def test_a_field_over_the_limit_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("id\n" + "a" * 200_000 + "\n")
    with pytest.raises(
        InvalidInputError, match=r"line 2: expected fields that are whole.*field larger than field limit"
    ):
        read_table(path, ("id",))
