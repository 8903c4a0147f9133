"""Columns as features, beside pandas."""

import json
import random
import re

import numpy as np
import pytest

from anyattention.errors import InvalidConfigError, InvalidInputError
from anyattention.training.columns import (
    Column,
    columns_from_json,
    columns_to_json,
    described,
    measure_columns,
    read_columns,
)
from anyattention.training.delimited import Table

MISSING = ("", "NA", "NaN", "null", "None", "n/a", "<NA>")


def table(columns: dict[str, list[str]], **more) -> Table:
    count = len(next(iter(columns.values())))
    return Table("nodes.csv", columns, range(2, count + 2), size=1000, **more)


@pytest.mark.parametrize("seed", range(20))
def test_features_are_those_of_pandas(seed: int, require) -> None:
    pandas, generator = require("pandas"), random.Random(seed)
    count = generator.choice((2, 3, 5, 7, 11, 40))
    columns: dict[str, list[str]] = {}
    for place in range(generator.randrange(1, 6)):
        if generator.random() < 0.5:
            numbers = [repr(generator.gauss(5, 10 ** generator.randrange(-3, 6))) for _ in range(count)]
            columns[f"number {place}"] = [
                each if generator.random() < 0.8 else generator.choice(MISSING) for each in numbers
            ]
        else:
            columns[f"category {place}"] = [
                generator.choice(["", "red", "blue", "grün", "NA", "a, b"]) for _ in range(count)
            ]
    read = table(columns)
    measured = measure_columns(read, list(columns))
    found, notes = read_columns(read, measured.columns)
    expected = []
    for name, values in columns.items():
        if name.startswith("number"):
            series = pandas.to_numeric(pandas.Series([None if v in MISSING else v for v in values], dtype=object))
            series = series.astype(float)
            deviation = series.std(ddof=0)
            if not deviation > 0:
                assert f"column '{name}': not used" in " ".join(measured.notes)
                continue
            expected.append(((series.fillna(series.mean()) - series.mean()) / deviation).to_numpy()[:, None])
        else:
            series = pandas.Series([value or None for value in values], dtype=object)
            if set(values) <= set(MISSING) or (series.nunique() == 1 and series.notna().all()):
                assert f"column '{name}': not used" in " ".join(measured.notes)
                continue
            expected.append(pandas.get_dummies(series, dtype=float).sort_index(axis=1).to_numpy())
    whole = np.concatenate(expected, axis=1) if expected else np.zeros((count, 0))
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    assert found.dtype == np.float32
    gaps = [name for name, values in columns.items() if name in {c.name for c in measured.columns}
            and any(v in (MISSING if name.startswith("number") else ("",)) for v in values)]  # fmt: skip
    assert len(notes) == bool(gaps)
    for name in gaps:
        assert f"'{name}' (" in notes[0]
    # What was measured, through JSON, reads the rows in any order in the same way.
    order = list(range(count))
    generator.shuffle(order)
    turned = table({name: [values[row] for row in order] for name, values in reversed(columns.items())})
    kept = columns_from_json(json.loads(json.dumps(columns_to_json(measured.columns))))
    assert kept == measured.columns
    np.testing.assert_array_equal(read_columns(turned, kept)[0], found[order])


def test_numbers_as_they_are_and_a_decimal_comma() -> None:
    read = table({"x": ["1,5", "2", "NA"]}, decimal_comma=True)
    measured = measure_columns(read, ["x"])
    assert measured.columns == (Column("x", "number", 1.75, 0.25, decimal_comma=True),)
    assert measured.notes == ("nodes.csv, column 'x': a comma is the decimal point.",)
    assert len(read_columns(read, measured.columns)[1]) == 1  # the missing one
    assert columns_from_json(json.loads(json.dumps(columns_to_json(measured.columns)))) == measured.columns
    np.testing.assert_array_equal(read_columns(read, measured.columns, as_they_are=True)[0][:, 0], [1.5, 2, 1.75])
    # Where commas separate the fields, the same is text.
    assert measure_columns(table({"x": ["1,5", "2,5"]}), ["x"]).columns[0].kind == "category"


@pytest.mark.parametrize("values", [["1,234", "2"], ["-1,234", "1,234,567", "5.5"], ["", "12,000"]])
def test_commas_that_may_be_between_thousands(values: list[str]) -> None:
    read = table({"x": values}, decimal_comma=True)
    row = next(row for row, value in enumerate(values) if "," in value)
    told = (
        f"line {row + 2}, column 'x': expected numbers whose commas are clearly decimal points, got '{values[row]}', "
    )
    with pytest.raises(InvalidInputError, match=f"{told}which may be thousands.*--category x .* --ignore x "):
        measure_columns(read, ["x"])
    assert measure_columns(read, ["x"], categories=["x"]).columns[0].kind == "category"
    # A training that had no such commas does not say what they are.
    with pytest.raises(InvalidInputError, match=told):
        read_columns(read, [Column("x", "number", 1.0, 1.0)])


@pytest.mark.parametrize("values", [["1,234", "2,5"], ["0,125", "1,250"], ["1,2345", "1,234"]])
def test_commas_that_are_decimal_points(values: list[str]) -> None:
    read = table({"x": values}, decimal_comma=True)
    (column,) = measure_columns(read, ["x"]).columns
    numbers = [float(value.replace(",", ".")) for value in values]
    assert column.mean == pytest.approx(np.mean(numbers))
    # What the training found holds for other tables, whose fields alone do not say it.
    later = table({"x": ["1,234", "2"]}, decimal_comma=True)
    features, notes = read_columns(later, [column], as_they_are=True)
    np.testing.assert_allclose(features[:, 0], [1.234, 2], rtol=1e-6)
    assert notes == ()
    assert read_columns(read, [column._replace(decimal_comma=False)])[1] == (
        "nodes.csv, column 'x': a comma is the decimal point.",
    )


def test_what_a_training_did_not_have() -> None:
    columns = measure_columns(table({"x": ["1", "3"], "colour": ["red", "blue"]}), ["x", "colour"]).columns
    features, notes = read_columns(table({"colour": ["green", "red", ""], "x": ["5", "", "1"]}), columns)
    np.testing.assert_array_equal(features, [[3, 0, 0], [0, 0, 1], [-1, 0, 0]])
    assert notes == (
        "nodes.csv: missing in column 'x' (1), 'colour' (1), of 3 rows: a missing number is the mean, a missing "
        "category is none.",
        "nodes.csv, column 'colour': 'green' in 1 row: the training had no such category, so that it counts as none.",
    )
    with pytest.raises(InvalidInputError, match=r"expected a column 'x', got the columns 'colour'\. the training"):
        read_columns(table({"colour": ["red"]}), columns)
    with pytest.raises(
        InvalidInputError, match="line 3, column 'x': expected a number, as in the training, got 'many'"
    ):
        read_columns(table({"colour": ["red", "red"], "x": ["1", "many"]}), columns)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            ["1", "2", "old"],
            "nodes.csv, line 4, column 'x': expected a number, as in 2 other rows, got 'old'. --category x ",
        ),
        (["A1", "2", "B3"], "line 2, column 'x': expected a number, as in 1 other row, got 'A1'"),
        (["1_000", "2", "3"], "got '1_000'"),
        (["1", "inf", "3"], "line 3, column 'x': expected a finite number, got 'inf'"),
        (["1", "1e999", "3"], "expected a finite number, got '1e999'"),
        (["1e308", "-1e308", "1e308"], "expected numbers with a finite deviation, got up to 1e+308"),
    ],
)
def test_half_numbers(values: list[str], told: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        measure_columns(table({"x": values}), ["x"])


def test_a_column_of_numbers_as_categories_and_one_left_out() -> None:
    read = table({"zip": ["007", "8", "007"], "name": ["a", "b", "1"]})
    measured = measure_columns(read, ["zip", "name"], categories=["zip"], ignored=["name"])
    assert measured.columns == (Column("zip", "category", categories=("007", "8")),)
    np.testing.assert_array_equal(read_columns(read, measured.columns)[0], [[1, 0], [0, 1], [1, 0]])
    assert described("Features", measured.columns) == "Features, categories: 'zip' (2 of them)."


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([""] * 30, "not used, since no field is filled"),
        (["NA"] * 30, "not used, since no field is filled"),
        (["0.1"] * 12, "not used, since its number is the same in every row"),
        (["1e100"] * 7 + [""], "not used, since its number is the same in every row"),
        (["5"] * 30, "not used, since its number is the same in every row"),
        (["one"] * 30, "not used, since it is the same in every row"),
        ([f"title {row}" for row in range(30)], "not used, since it is text with 30 different fields in 30"),
        (
            [f"title {row // 2}" for row in range(2004)],
            "not used, since it is text with 1,002 different fields in 2,004",
        ),
    ],
)
def test_columns_that_say_nothing(values: list[str], told: str) -> None:
    measured = measure_columns(table({"x": values}), ["x"])
    assert (measured.columns, measured.notes) == ((), (f"nodes.csv, column 'x': {told}.",))


def test_memory_is_bounded_by_the_table() -> None:
    count = 40_000
    values = [f"v{row % 900}" for row in range(count)]
    read = Table("nodes.csv", {"x": values}, range(2, count + 2), size=count)
    measured = measure_columns(read, ["x"])
    with pytest.raises(
        InvalidInputError, match=r"column 'x': expected features of at most .* got 900 categories. --ignore x"
    ):
        read_columns(read, measured.columns)


@pytest.mark.parametrize(
    "given",
    [
        None,
        {},
        [{"name": "x"}],
        [{"name": "x", "number": [0, 0]}],
        [{"name": "x", "number": [0.1, 1.4e-17]}],
        [{"name": "x", "number": [0, float("nan")]}],
        [{"name": "x", "number": [0, "1"]}],
        [{"name": "x", "number": [0, 1], "decimal_comma": 1}],
        [{"name": "x", "number": [True, True]}],
        [{"name": 1, "number": [0, 1]}],
        [{"name": "x", "number": [0, 1], "more": 1}],
        [{"name": "x", "categories": []}],
        [{"name": "x", "categories": ["a", "a"]}],
        [{"name": "x", "categories": ["a", 1]}],
        [{"name": "x", "number": [0, 1]}, {"name": "x", "number": [0, 1]}],
    ],
)
def test_json_with_other_values(given) -> None:
    with pytest.raises(InvalidConfigError, match="columns: expected"):
        columns_from_json(given)


@pytest.mark.parametrize("values", [["1,234", "2,345,678"], ["", "12,000"]])
def test_thousands_where_commas_separate_the_fields(values: list[str]) -> None:
    read = table({"x": values})
    row = next(row for row, value in enumerate(values) if value)
    told = f"line {row + 2}, column 'x': expected numbers without commas between thousands, got '{values[row]}'"
    with pytest.raises(InvalidInputError, match=f"{told}.*--category x .* --ignore x "):
        measure_columns(read, ["x"])
    assert measure_columns(read, ["x"], categories=["x"]).columns[0].kind == "category"
    # What is no such number is text.
    assert measure_columns(table({"x": [*values, "many"]}), ["x"]).columns[0].kind == "category"


@pytest.mark.parametrize("value", ["1.234", "-12.345.678"])
def test_points_that_may_be_between_thousands(value: str) -> None:
    told = rf"line 3, column 'x': expected numbers without points .*, got '{value}', which may be thousands"
    read = table({"x": ["2,5", value, "3"]}, decimal_comma=True)
    with pytest.raises(InvalidInputError, match=told if value.count(".") == 1 else f"got '{value}'"):
        measure_columns(read, ["x"])
    # The training had decimal commas, so that points in files of the same kind may be thousands.
    column = Column("x", "number", 1.0, 1.0, decimal_comma=True)
    if value.count(".") == 1:
        with pytest.raises(InvalidInputError, match=told):
            read_columns(table({"x": ["2", value]}, decimal_comma=True), [column])
    # A point that cannot be between thousands is a decimal point, as is any where there is no decimal comma.
    features, _ = read_columns(table({"x": ["2,5", "0.125", "1.5"]}, decimal_comma=True), [column], as_they_are=True)
    np.testing.assert_array_equal(features[:, 0], [2.5, 0.125, 1.5])
    assert measure_columns(table({"x": ["1.234", "2.5"]}, decimal_comma=True), ["x"]).columns[0].kind == "number"
