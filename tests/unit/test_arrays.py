"""Arrays of plain values are Arrow's own, and pandas is not imported for them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tally import arrays
from tally.arrays import array_of, no_rows, numbers_of, plain_array, scalar_of, texts_of, truths_of


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


@pytest.mark.parametrize("kind", ["int8", "uint16", "int32", "int64", "uint64", "float16", "float32", "float64", ">f8"])
def test_vectors_go_to_arrow_and_back(kind: str) -> None:
    values = np.array([3, 1, 0, 7, 2], kind)
    for given in (values, values[::2], values[:0]):
        found = array_of(given)
        found.validate(full=True)
        assert found.to_pylist() == given.tolist()
        assert found.type == pa.from_numpy_dtype(np.dtype(kind).newbyteorder("="))
        assert numbers_of(found).tolist() == given.tolist()
        assert numbers_of(found).dtype == np.dtype(kind).newbyteorder("=")
    whole = pa.chunked_array([array_of(values), array_of(values[3:]), array_of(values[:0])])
    assert numbers_of(whole).tolist() == [3, 1, 0, 7, 2, 7, 2]
    assert numbers_of(whole.slice(2, 4)).tolist() == [0, 7, 2, 7]
    assert numbers_of(whole.slice(0, 0)).tolist() == []


def test_a_null_among_floats_is_nan() -> None:
    found = numbers_of(pa.array([1.5, None, float("inf"), None, -2.0], pa.float32()).slice(1))
    assert found.dtype == np.float32
    assert str(found.tolist()) == "[nan, inf, nan, -2.0]"


def test_truth_values_go_to_arrow_and_back() -> None:
    values = np.arange(21) % 3 == 0
    for given in (values, values[5:], values[:0], values[:8]):
        found = array_of(given)
        found.validate(full=True)
        assert found.to_pylist() == given.tolist()
        assert truths_of(found).tolist() == given.tolist()
        assert truths_of(found[3:17]).tolist() == given[3:17].tolist()


@pytest.mark.parametrize("value", ["", "é", 5, -1, 2.5, True, False])
def test_scalars_are_as_arrow_makes_them(value: Any) -> None:
    assert scalar_of(value).equals(pa.scalar(value))


def test_texts_and_batches_without_rows() -> None:
    assert texts_of(["a", "é"]).equals(pa.array(["a", "é"]))
    assert texts_of([]).equals(pa.array([], pa.string()))
    schema = pa.schema([("a", pa.list_(pa.float32())), ("b", pa.struct([("c", pa.timestamp("us", "UTC"))]))])
    assert no_rows(schema).equals(pa.RecordBatch.from_pylist([], schema=schema))


def test_pandas_is_not_imported_for_rows_by_key() -> None:
    """By key, of which some are floats, with a key that has no model; and rows in the order of the source."""
    pytest.importorskip("pandas")
    code = """
import sys
import numpy as np, pyarrow as pa
from tally.scorers.per_key.batched_svms import BatchedSvms, Svm, Svms
from tally.scorers.per_key.keys import KeyIndex, _decide
from tally.sinks import merge
from tally.sources.tables.keys import Rows

def column(values, kind):
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, kind.to_pandas_dtype()))])

index = KeyIndex([column([3, 5, 4], pa.int64()), column([0.5, 2, 1], pa.float64())])
found = index.find([column([4, 3, 9, 3], pa.int32()), column([1, 0.5, 1, 2], pa.float64())])
one = np.ones((1, 1))
svms = BatchedSvms(Svms.of([Svm("rbf", 1.0, 0.0, 3, -0.5, np.zeros(1), np.ones(1), one, np.ones(1))] * 3))
rows = pa.Table.from_arrays([column([1.0, 9.0], pa.float64())], ["Value"])
decided = _decide(svms, found[[0, 1]], rows, np.arange(2), {})
order = column([2, 0, 1], pa.int64())
given = pa.RecordBatch.from_arrays([order, column([2.0, 0.0, 1.0], pa.float64())], ["at", "score"])
batches = list(merge.ordered([given], given.schema, "at"))

class Work:
    class made:
        files, bad = [("a.csv", 2), ("b.csv", 9)], 0

keys = Rows(Work).at(np.array([10, 0, 2]))
assert "pandas" not in sys.modules
assert found.tolist() == [2, 0, -1, -1]
assert decided.to_pylist() == [{"anomaly": False, "score": 0.5}, {"anomaly": True, "score": -0.5}]
assert [batch.to_pylist() for batch in batches] == [[{"score": 0.0}, {"score": 1.0}, {"score": 2.0}]]
assert keys.to_pylist() == ["b.csv#9", "a.csv#1", "b.csv#1"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
