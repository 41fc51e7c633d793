"""What the scorers of tables share: columns to numbers and DataFrames, and answers to columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tally.scorers.tabular import tables

MIXED = pa.table(
    {
        "text": pa.array(["a", None], pa.large_string()),
        "view": pa.array(["x", "y"], pa.string_view()),
        "coded": pa.array(["p", "q"]).dictionary_encode(),
        "whole": [1, 2],
        "gaps": [1, None],
        "truth": [True, None],
        "money": pa.array([1, 2], pa.decimal128(9, 2)),
        "none": pa.nulls(2),
        "when": pa.array([1, None], pa.timestamp("us")),
    }
)


def test_a_dataframe_has_the_types_that_models_know() -> None:
    found = tables.frame(MIXED)
    assert {name: str(kind) for name, kind in found.dtypes.items()} == {
        **dict.fromkeys(("text", "view", "coded"), "object"),
        "whole": "int64",
        **dict.fromkeys(("gaps", "truth", "money", "none"), "float64"),
        "when": "datetime64[us]",
    }
    assert found["text"].tolist() == ["a", None]
    assert found["truth"].isna().tolist() == [False, True]
    assert found["money"].tolist() == [1.0, 2.0]
    assert tables.frame(MIXED.slice(0, 0)).shape == (0, 9)


def test_a_matrix_has_nan_where_values_are_missing() -> None:
    table = MIXED.select(["whole", "gaps", "truth", "none"])
    assert tables.is_numeric(table)
    assert not tables.is_numeric(MIXED)
    expected = [[1.0, 1.0, 1.0, np.nan], [2.0, np.nan, np.nan, np.nan]]
    assert np.array_equal(tables.matrix(table), expected, equal_nan=True)
    assert tables.matrix(table.slice(0, 0)).shape == (0, 4)


def test_missing_values_are_found_in_columns_of_any_type() -> None:
    found = tables.unusable(MIXED.drop_columns(["none"]), None, nan=False)
    assert {row: str(error) for row, error in found.items()} == {1: "text is null, which the model does not take"}
    assert tables.unusable(MIXED, None, nan=True) == {}
    infinite = pa.table({"text": ["a", "b"], "value": [1.0, float("-inf")]})
    assert list(tables.unusable(infinite, None, nan=True)) == [1]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (np.array([[1.0], [2.0]]), pa.float64(), [1.0, 2.0]),
        (np.array([[1, 2], [3, 4]]), pa.list_(pa.int64()), [[1, 2], [3, 4]]),
        (np.zeros((0, 3)), pa.list_(pa.float64()), []),
        (np.zeros((2, 0)), pa.list_(pa.float64()), [[], []]),
        (np.array(["a", "b"]), pa.string(), ["a", "b"]),
        (np.array([b"a", b"b"]), pa.string(), ["a", "b"]),
        (np.array(["a", None], object), pa.string(), ["a", None]),
        ([True, False], pa.bool_(), [True, False]),
    ],
)
def test_values_become_a_column(values: Any, kind: pa.DataType, expected: list[Any]) -> None:
    found = tables.column(values)
    assert found.type == kind
    assert found.to_pylist() == expected


def test_results_of_good_rows_stand_at_their_positions() -> None:
    errors = {0: ValueError("first"), 2: ValueError("third")}
    found: Any = tables.results(pa.table({"score": [1.0, float("nan")]}), errors, 4)
    assert found.rows["score"].to_pylist()[1] == 1.0
    assert found.rows.num_rows == 4
    assert {row: str(error) for row, error in found.errors.items()} == {
        0: "first",
        2: "third",
        3: "the model's score is NaN",
    }
