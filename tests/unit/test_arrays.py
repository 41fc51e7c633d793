"""Arrays of plain values are Arrow's own, and pandas is not imported for them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pyarrow as pa
import pytest

from tally.sinks import arrays
from tally.sinks.arrays import plain_array


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "", "bc"], pa.string()),
        (["é", "日本", "", "a\0b", "\U0001f600"], pa.string()),
        ([1, -(2**63), 2**63 - 1], pa.int64()),
        ([0, 255], pa.uint8()),
        ([1.5, -0.0, float("inf"), float("nan"), 1e-320], pa.float64()),
        ([1.1, float("-inf"), 1e300, 1e-60], pa.float32()),
    ],
)
def test_plain_values_are_as_arrow_makes_them(values: list[Any], kind: pa.DataType) -> None:
    found = plain_array(values, kind)
    assert found is not None
    found.validate(full=True)
    assert found.type == kind
    assert str(found.to_pylist()) == str(pa.array(values, kind).to_pylist())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], pa.string()),
        (["a", None], pa.string()),
        (["a", 1], pa.string()),
        ([1, 2], pa.string()),
        (["a"], pa.large_string()),
        ([True, False], pa.int64()),
        ([1, 2.0], pa.float64()),
        ([1, 2], pa.float64()),
        ([1.5], pa.int64()),
        ([1.5], pa.float16()),
        ([256], pa.uint8()),
        ([-1], pa.uint64()),
        ([2**70], pa.int64()),
        ([[1.0]], pa.list_(pa.float64())),
        ([True], pa.bool_()),
        ([1], pa.timestamp("s")),
    ],
)
def test_all_others_are_left_to_arrow(values: list[Any], kind: pa.DataType) -> None:
    assert plain_array(values, kind) is None


def test_texts_that_are_too_long_together_are_left_to_arrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_LONGEST", 5)
    assert plain_array(["abc", "éa"], pa.string()) is None
    assert plain_array(["abc", "é"], pa.string()) is not None


def test_text_that_is_no_unicode_is_refused_as_by_arrow() -> None:
    for make in (plain_array, pa.array):
        with pytest.raises(UnicodeEncodeError):
            make(["a", "\udcff"], pa.string())


@pytest.mark.parametrize("declared", ["{'label': 'string', 'index': 'int64', 'score': 'float64'}", "None"])
def test_pandas_is_not_imported_for_plain_rows(declared: str) -> None:
    pytest.importorskip("pandas")
    code = (
        "import sys\n"
        "from tally.sinks.columns import build, schema_of\n"
        f"schema = schema_of({declared})\n"
        "rows = [{'label': 'cat', 'index': 1, 'score': 0.5}, {'label': 'd\u00f6g', 'index': 2, 'score': 0.25}]\n"
        "batch, dead = build(['a', 'b'], rows, schema)\n"
        "assert 'pandas' not in sys.modules\n"
        "assert [str(kind) for kind in batch.schema.types] == ['string', 'string', 'int64', 'double']\n"
        "assert not dead and batch.to_pylist() == [{'key': k, **row} for k, row in zip('ab', rows)]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
