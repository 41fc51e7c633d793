from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tally.errors import ItemError, SourceChangedError, SourceNotFoundError, SpecError, StorageError
from tally.scorers.base import Scorer
from tally.sources.base import Chunk, ChunkLimit, Timings
from tally.sources.listing import is_table
from tally.sources.tables.ingest import Made, Query, TableFile, make
from tally.sources.tables.select import Selection, TableRequest
from tally.sources.tables.source import TableSource, fingerprint
from tally.storage import LocalStore
from tally.testing.sources import chunks_of

SCORER = Scorer()
SCORER.input, SCORER.batch_size = "table", 4


def parquet(path: Path, columns: Mapping[str, Any], **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **options)
    return str(path)


def text(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def plan(source: TableSource, items: int = 1000, size: int = 1 << 40) -> list[Chunk]:
    return list(source.plan(None, 0, lambda: ChunkLimit(items, size)))


class Outcome:
    """All that a source gives: rows by key, info by key, and errors by key."""

    def __init__(self, source: TableSource, chunks: list[Chunk] | None = None) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.info: dict[str, dict[str, Any]] = {}
        self.dead: dict[str, ItemError] = {}
        for chunk in plan(source) if chunks is None else chunks:
            keys = source.keys(chunk)
            for batch in source.read(chunk, SCORER, Timings()):
                named = [] if not len(batch.keys) else batch.keys.to_pylist()
                assert named == [keys[int(position)] for position in batch.positions]
                if named:
                    self.rows |= dict(zip(named, batch.values.to_pylist(), strict=True))
                    if batch.info is not None:
                        self.info |= dict(zip(named, batch.info.to_pylist(), strict=True))
                self.dead |= {keys[position]: error for position, error in batch.dead}

    @property
    def messages(self) -> dict[str, str]:
        return {key: error.message for key, error in self.dead.items()}


def prepared(tmp_path: Path, uris: str | list[str], **options: Any) -> TableSource:
    options.setdefault("features", None)
    source = TableSource.describe([uris] if isinstance(uris, str) else uris, **options).located(str(tmp_path / "work"))
    source.prepare()
    return source


def outcome(tmp_path: Path, uris: str | list[str], **options: Any) -> Outcome:
    return Outcome(prepared(tmp_path, uris, **options))


def problems(uris: str | list[str], **options: Any) -> list[str]:
    options.setdefault("features", None)
    with pytest.raises(SpecError) as raised:
        TableSource.describe([uris] if isinstance(uris, str) else uris, **options)
    return raised.value.problems


# -- what is a table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table"),
    [
        *(
            (name, True)
            for name in ("a.parquet", "b/A.CSV", "a.csv.gz", "a.b.jsonl.xz", "a.csv.zip", "a.arrow", "a.orc")
        ),
        *((name, False) for name in ("a.gz", ".csv", "a.parquet.gz", "a.json", "csv", "a.xls")),
    ],
)
def test_a_table_is_known_by_its_name(name: str, table: bool) -> None:
    assert is_table(name) is table


def test_a_folder_gives_its_tables_and_says_what_it_passed_over(tmp_path: Path) -> None:
    for name in ("a.parquet", "b/c.parquet"):
        parquet(tmp_path / "in" / name, {"x": [1.0]})
    text(tmp_path / "in/readme.txt", "")
    source = TableSource.describe([str(tmp_path / "in")], features=1)
    assert list(Outcome(source).rows) == ["a.parquet#1", "b/c.parquet#1"]
    assert source.remark() == (
        f"1 file passed over, not tables by their name: .txt 1; a glob such as '{tmp_path}/in/**/*' takes them all"
    )
    text(tmp_path / "other/readme.txt", "")
    with pytest.raises(
        SourceNotFoundError, match=r"the only file in .*other does not have the name of a table \(.txt 1\)\n.*\.parquet"
    ):
        TableSource.describe([str(tmp_path / "other")], features=1)


def test_other_names_are_refused_unless_csv_options_say_what_they_are(tmp_path: Path) -> None:
    place = text(tmp_path / "train.txt", "1 2.5\n2 3.5\n")
    sheet = text(tmp_path / "a.xls", "PK")
    assert problems([place, sheet]) == [
        "a.xls is a spreadsheet, which is not read; save its sheet as CSV",
        (
            "train.txt is not a table by its name (.parquet, .csv, .tsv, .jsonl, .arrow ...); "
            "with options for CSV, such as its delimiter, it is read as CSV"
        ),
    ]
    found = prepared(tmp_path, place, csv={"delim": " "})
    assert Outcome(found).rows["train.txt#2"] == {"column0": 2, "column1": 3.5}
    assert found.remark() == (
        "train.txt: the delimiter is a space and there is no header (columns are called column0 to column1)"
    )


# -- which columns ------------------------------------------------------------------------------------


def test_every_problem_is_reported_together(tmp_path: Path) -> None:
    place = parquet(tmp_path / "a.parquet", {"Device": [1], "Value": [1.0], "TS": ["x"], "Tags": [[1]]})
    assert problems(
        place,
        features=["Valeu"],
        by=["device", "Tags", "Device", "Device"],
        keep=["Vaule"],
        time="TS",
        where="Valu > 1",
        aggregate=["mode"],
        csv={},
    ) == [
        "by: 'Device' is named twice",
        "by: there is no column 'device'; did you mean 'Device'? (there are Device, Value, TS, Tags)",
        "by: column 'Tags' holds list<element: int64>, which cannot be a key",
        "time: column 'TS' is string, not a timestamp",
        "aggregate: there is no 'mode' (quantiles are p5, p95, p99.9)",
        "keep: there is no column 'Vaule'; did you mean 'Value'? (there are Device, Value, TS, Tags)",
        "the model takes a column 'Valeu'; did you mean 'Value'? (there are Device, Value, TS, Tags)",
        "where: 'Valu > 1': Binder Error: Referenced column \"Valu\" not found in FROM clause!",
    ]


@pytest.mark.parametrize(
    ("wanted", "keep", "found"),
    [
        (2, [], ["a", "b"]),
        (2, ["b"], ["a", "b"]),
        (1, ["b"], ["a"]),
        (["b", "c"], [], ["b", "c"]),
        (None, [], ["key_", "at", "a", "b", "c", "flag"]),
    ],
)
def test_features_by_name_by_number_or_all(tmp_path: Path, wanted: Any, keep: list[str], found: list[str]) -> None:
    columns = {"key_": [1], "at": [datetime(2026, 1, 1, tzinfo=UTC)], "a": [1], "b": [Decimal("1.50")], "c": ["x"]}
    place = parquet(tmp_path / "a.parquet", columns | {"flag": [True]})
    source = TableSource.describe([place], features=wanted, by=["key_"], keep=keep, time="at")
    assert list(source.features) == found


def test_a_number_of_features_that_does_not_fit_is_explained(tmp_path: Path) -> None:
    place = parquet(tmp_path / "a.parquet", {"a": [1], "b": [1.0], "c": ["x"]})
    assert problems(place, features=3) == [
        "the model takes 3 numeric columns, and there are 2: a, b (c is text); is this a table such as it was made for?"
    ]


def test_windows_need_a_time_and_keep_nothing_else(tmp_path: Path) -> None:
    place = parquet(tmp_path / "a.parquet", {"a": [1], "at": [datetime(2026, 1, 1, tzinfo=UTC)]})
    assert problems(place, window=60) == ["window: needs 'time', the column of timestamps"]
    assert problems(place, window=60, time="at", keep=["a"]) == [
        "keep: a: a window has many values of it; with 'window', only keys are kept"
    ]
    assert problems(place, window=60, time="at", features=["a"]) == [
        "the model takes a column 'a' (there are a_mean)",
    ]


def test_options_for_csv_are_checked(tmp_path: Path) -> None:
    place = text(tmp_path / "a.csv", "a,b\n1,2\n")
    assert problems(
        place, csv={"delimiter": ";", "header": "yes", "skip": -1, "quote": "''", "encoding": "utf-99"}
    ) == [
        "csv: there is no option 'delimiter'; did you mean 'delim'?",
        "csv: header must be true or false, not 'yes'",
        "csv: skip must be a number of lines, not -1",
        "csv: quote must be one character, not \"''\"",
        "csv: there is no encoding 'utf-99'; examples are utf-8, utf-16, latin-1, cp1252",
    ]
    assert problems(place, csv={"types": {"c": "BIGINT", "a": "NUMBER", "b": "INT) FROM x --"}}) == [
        "csv: types: there is no column 'c'",
        "csv: types: a: there is no type 'NUMBER'; examples are BIGINT, DOUBLE, VARCHAR",
        "csv: types: b: there is no type 'INT) FROM x --'; examples are BIGINT, DOUBLE, VARCHAR",
    ]


def test_files_have_to_agree(tmp_path: Path) -> None:
    parquet(tmp_path / "in/a.parquet", {"x": [1], "y": ["a"]})
    parquet(tmp_path / "in/b.parquet", {"y": [1.5], "x": [2.5], "z": [1]})
    text(tmp_path / "in/c.csv", "x\n1\n")
    assert problems(str(tmp_path / "in")) == [
        "b.parquet has column 'z', which a.parquet lacks",
        "column 'y' is string in a.parquet and double in b.parquet",
        "c.csv lacks column 'y', which a.parquet has",
    ]


def test_integers_and_floats_of_several_files_are_widened(tmp_path: Path) -> None:
    parquet(tmp_path / "in/a.parquet", {"x": pa.array([1, 2], pa.int32()), "y": ["a", "b"]})
    parquet(tmp_path / "in/b.parquet", {"y": pa.array(["c"]).dictionary_encode(), "x": [2.5]})
    source = TableSource.describe([str(tmp_path / "in")], features=["x"], keep=["x", "y"])
    assert source.columns == {"x": "float64", "y": "string"}
    [chunk] = plan(source)
    for batch in source.read(chunk, SCORER, Timings()):
        assert batch.values.schema.types == [pa.float64()]
        assert batch.info.to_pylist() == [{"x": 1.0, "y": "a"}, {"x": 2.0, "y": "b"}, {"x": 2.5, "y": "c"}]


def test_names_that_differ_only_in_capitals_are_a_problem_where_sql_reads_them(tmp_path: Path) -> None:
    place = parquet(tmp_path / "a.parquet", {"x": [1], "X": [2]})
    assert Outcome(TableSource.describe([place], features=["X"])).rows == {"a.parquet#1": {"X": 2}}
    assert problems(place, by=["x"]) == ["columns 'x' and 'X' differ only in capitals; rename one of them"]


VALUES: dict[str, Any] = {
    "decimal": pa.array([Decimal("1.50"), None]),
    "dictionary": pa.array(["p", "q"]).dictionary_encode(),
    "large": pa.array(["p", "q"], pa.large_string()),
    "zoned": pa.array([datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2)))] * 2, pa.timestamp("ms", "+02:00")),
    "plain": pa.array([datetime(2026, 1, 1), None], pa.timestamp("ns")),  # noqa: DTZ001  # that is the point
    "flag": pa.array([True, False]),
    "day": pa.array([date(2026, 1, 1), date(2026, 1, 2)]),
    "small": pa.array([1, None], pa.uint8()),
}


@pytest.mark.parametrize("grouped", [False, True])
def test_every_scalar_type_comes_through(tmp_path: Path, grouped: bool) -> None:
    place = parquet(tmp_path / "a.parquet", VALUES | {"k": [1, 1]})
    found = outcome(tmp_path, place, features=["k"], keep=list(VALUES), by=["k"] if grouped else [])
    kept = pa.table({name: each.dictionary_decode() if name == "dictionary" else each for name, each in VALUES.items()})
    expected = kept.to_pylist()
    for at, row in enumerate(found.info.values()):
        assert {name: row[name] for name in VALUES} == expected[at]


@pytest.mark.parametrize("column", list(VALUES))
def test_any_scalar_can_be_a_key(tmp_path: Path, column: str) -> None:
    place = parquet(tmp_path / "a.parquet", {**VALUES, "x": [1.0, 2.0]})
    source = prepared(tmp_path, place, features=["x"], by=[column])
    groups = source.groups()
    assert sum(rows for _, _, rows in groups) == 2
    values = VALUES[column].dictionary_decode() if column == "dictionary" else VALUES[column]
    distinct = pc.unique(values).to_pylist()
    assert sorted((key[column] for key, _, _ in groups), key=str) == sorted(distinct, key=str)
    assert sorted(row["x"] for row in Outcome(source).rows.values()) == [1.0, 2.0]


# -- CSV ----------------------------------------------------------------------------------------------


BAD_LINES = 'id,Value,note\n1,1.5,"two\nlines"\n2,abc,x\n3,3,y\n4\n5,5,z,too,many\n6,6,"a"b\n7,7,w\n'


def test_a_bad_line_is_one_dead_item_with_file_line_and_column(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n},ok\n" for n in range(8, 40))
    found = outcome(tmp_path, text(tmp_path / "a.csv", BAD_LINES + rows), features=["Value"])
    assert found.messages == {
        "a.csv line 4": "a.csv, line 4, column 2 (Value): could not convert 'abc' to DOUBLE",
        "a.csv line 6": "a.csv, line 6, column 2: the line has 1 column, not 3",
        "a.csv line 7": "a.csv, line 7, column 4: the line has more than 3 columns",
        "a.csv line 8": "a.csv, line 8, column 3 (note): "
        "a quote is never closed, or text follows after it; what it opens is lost up to its end; if lines after it are "
        "missing, mend it and score again with --overwrite",
    }
    assert {error.stage for error in found.dead.values()} == {"read"}
    # Rows are counted with those that could not be read.
    assert {key: row["Value"] for key, row in list(found.rows.items())[:4]} == {
        "a.csv#1": 1.5,
        "a.csv#3": 3.0,
        "a.csv#7": 7.0,
        "a.csv#8": 8.0,
    }
    assert len(found.rows) == 35


def test_bad_lines_are_known_when_rows_are_grouped_too(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n},{'even' if n % 2 == 0 else 'odd'}\n" for n in range(8, 40))
    place = text(tmp_path / "a.csv", BAD_LINES + rows)
    source = prepared(tmp_path, place, features=["Value"], by=["note"])
    found = Outcome(source)
    assert found.rows["a.csv#8"] == {"note": "even", "Value": 8.0}
    assert [chunk.count for chunk in plan(source)] == [39]
    assert len(found.dead) == 4
    assert list(found.dead) == [key for key in source.keys(plan(source)[0]) if " line " in key]


def test_values_that_are_not_wanted_may_be_anything(tmp_path: Path) -> None:
    found = outcome(tmp_path, text(tmp_path / "a.csv", "a,b\n1,x\n2,3\n"), features=["a"])
    assert (list(found.rows.values()), found.dead) == ([{"a": 1}, {"a": 2}], {})


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_endings(tmp_path: Path, newline: str) -> None:
    place = text(tmp_path / "a.csv", newline.join(["a,b", "1,x", "2,y"]))
    assert list(outcome(tmp_path, place).rows.values()) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_mixed_line_endings(tmp_path: Path) -> None:
    place = text(tmp_path / "a.csv", "a,b\r\n1,x\n2,y\r\n3,z\n")
    assert [row["a"] for row in outcome(tmp_path, place).rows.values()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("encoding", "given"),
    [("utf-8-sig", {}), ("utf-16", {}), ("latin-1", {"encoding": "latin-1"}), ("cp1252", {"encoding": "cp1252"})],
)
def test_encodings(tmp_path: Path, encoding: str, given: dict[str, Any]) -> None:
    place = text(tmp_path / "a.csv", "größe,b\n1,café\n2,x\n".encode(encoding))
    assert list(outcome(tmp_path, place, csv=given).rows.values()) == [
        {"größe": 1, "b": "café"},
        {"größe": 2, "b": "x"},
    ]


def test_text_that_is_not_utf8_is_a_fault_of_its_line_or_of_the_header(tmp_path: Path) -> None:
    found = outcome(tmp_path, text(tmp_path / "a.csv", b"a,b\n1,x\n2,caf\xe9\n3,y\n"))
    assert found.messages == {
        "a.csv line 3": "a.csv, line 3, column 2 (b): not valid UTF-8; name the file's encoding, "
        "as in csv encoding=latin-1"
    }
    assert list(found.rows) == ["a.csv#1", "a.csv#3"]
    with pytest.raises(StorageError, match=r"b\.csv, line 1, column 2: byte 0xe9 is not valid UTF-8"):
        TableSource.describe([text(tmp_path / "b.csv", b"a,caf\xe9\n1,x\n")], features=None)
    with pytest.raises(StorageError, match=r"c\.csv, line 3, column 2: .* \(read as utf-16"):
        TableSource.describe(
            [text(tmp_path / "c.csv", "a,b\n1,x\n2,y".encode("utf-16-le") + b"\0")],
            features=None,
            csv={"encoding": "utf-16-le"},
        )


@pytest.mark.parametrize(
    ("content", "given", "expected"),
    [
        ("a;b\n1,5;2\n", {"decimal_separator": ","}, {"a": 1.5, "b": 2}),
        ("# made by x\na,b\n1,2\n", {"comment": "#"}, {"a": 1, "b": 2}),
        ("made by x\n\na,b\n1,2\n", {"skip": 2}, {"a": 1, "b": 2}),
        ("a,b\n1,NA\n", {"nullstr": ["NA", "-"]}, {"a": 1, "b": None}),
        ("a,b\n1,31.12.2025\n", {"dateformat": "%d.%m.%Y"}, {"a": 1, "b": date(2025, 12, 31)}),
        ("2011,2012\n1,2\n", {"header": True}, {"2011": 1, "2012": 2}),
        ("a,b\n01,2\n", {"types": {"a": "integer", "b": "varchar"}}, {"a": 1, "b": "2"}),
        ("a,a,\n1,2,3\n", {}, {"a": 1, "a_1": 2, "column2": 3}),
        ("a,b\n'x,y',2\n", {"quote": "'"}, {"a": "x,y", "b": 2}),
        ("a\tb\n01\t9999999999999999999\n", {}, {"a": "01", "b": "9999999999999999999"}),
        ("a,b\ntrue,2026-01-01T00:00:00+02:00\n", {}, {"a": True, "b": datetime(2025, 12, 31, 22, tzinfo=UTC)}),
    ],
)
def test_what_a_csv_file_can_be(tmp_path: Path, content: str, given: Any, expected: Any) -> None:
    assert list(outcome(tmp_path, text(tmp_path / "a.csv", content), csv=given).rows.values()) == [expected]


def test_a_title_above_the_columns_is_explained(tmp_path: Path) -> None:
    place = text(tmp_path / "a.csv", "Readings of May\na,b,c\n1,2,3\n4,5,6\n")
    with pytest.raises(StorageError, match=r"a\.csv, line 1, column 2: the first line has 1 columns, .* have 3"):
        TableSource.describe([place], features=None)


def test_fractions_after_whole_numbers_are_no_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tally.sources.tables.delimited.SAMPLE_ROWS", 2)
    found = outcome(tmp_path, text(tmp_path / "a.csv", "k,v\n1,1\n2,2\n3,3\n4,4.5\n"), features=["v"], by=["k"])
    assert list(found.rows.values())[2:] == [{"k": 3, "v": 3.0}, {"k": 4, "v": 4.5}]


def test_a_column_without_values_is_one_of_numbers_if_the_model_takes_it(tmp_path: Path) -> None:
    place = text(tmp_path / "a.csv", "a,b\n1,\n2,\n")
    source = prepared(tmp_path, place, features=["b"], keep=["a"])
    [batch] = source.read(plan(source)[0], SCORER, Timings())
    assert batch.values.schema.types == [pa.float64()]


def test_a_packed_file_that_was_cut_off_is_said(tmp_path: Path) -> None:
    packed = gzip.compress(b"a,b\n" + os.urandom(100_000).hex().encode() + b",1\n" * 1000)
    place = text(tmp_path / "a.csv.gz", packed[: len(packed) // 2])
    with pytest.raises(StorageError, match=r"cannot read a\.csv\.gz: "):
        prepared(tmp_path, place)


def test_empty_files_are_nothing_to_score(tmp_path: Path) -> None:
    empty = text(tmp_path / "empty.csv", "")
    with pytest.raises(SourceNotFoundError, match=r"nothing to score: empty\.csv is empty"):
        TableSource.describe([empty], features=None)
    source = prepared(tmp_path, text(tmp_path / "head.csv", "a,b\n"))
    with pytest.raises(SourceNotFoundError, match=r"nothing to score: .*head\.csv holds no rows"):
        plan(source)
    nothing = TableSource.describe([parquet(tmp_path / "a.parquet", {"a": pa.array([], pa.int64())})], features=1)
    with pytest.raises(SourceNotFoundError, match="holds no rows"):
        plan(nothing)


# -- JSON Lines ---------------------------------------------------------------------------------------


def test_a_bad_line_of_json_is_one_dead_item(tmp_path: Path) -> None:
    lines = [json.dumps({"id": n, "v": n / 2, "s": "123"}) for n in range(30)]
    lines[3:3] = ["", '{"id": 1, "v": "abc"}', "not json", "[1, 2]", '{"id": 99}']
    found = outcome(
        tmp_path, text(tmp_path / "a.jsonl", "\n".join(lines) + '\n{"id": 5, "v": tru'), features=["id", "v"]
    )
    assert found.messages == {
        "a.jsonl line 5": "a.jsonl, line 5, column v: could not convert 'abc' to DOUBLE",
        "a.jsonl line 6": "a.jsonl, line 6, column 1: not a JSON object",
        "a.jsonl line 7": "a.jsonl, line 7, column 1: not a JSON object",
        "a.jsonl line 36": "a.jsonl, line 36, column 1: not a JSON object",
    }
    assert found.rows["a.jsonl#3"] == {"id": 2, "v": 1.0}
    assert found.rows["a.jsonl#7"] == {"id": 99, "v": None}
    assert found.rows["a.jsonl#8"] == {"id": 3, "v": 1.5}
    assert len(found.rows) == 31


def test_types_of_json_are_those_that_it_says(tmp_path: Path) -> None:
    row = {"a": "123", "b": 1, "c": 1.5, "d": True, "e": None, "f": [1, 2], "g.h": {"x": 1}, "t": "2026-01-01 00:00:00"}
    found = outcome(tmp_path, text(tmp_path / "a.jsonl", json.dumps(row)))
    assert found.rows["a.jsonl#1"] == row | {
        "f": "[1,2]",
        "g.h": '{"x":1}',
        "t": datetime.fromisoformat("2026-01-01T00:00:00"),
    }


def test_files_of_json_need_not_have_the_same_columns(tmp_path: Path) -> None:
    text(tmp_path / "in/a.jsonl", '{"a": 1}\n')
    text(tmp_path / "in/b.jsonl", '{"b": 2}\n')
    assert list(outcome(tmp_path, str(tmp_path / "in")).rows.values()) == [{"a": 1, "b": None}, {"a": None, "b": 2}]


# -- conditions ---------------------------------------------------------------------------------------


def test_a_condition_chooses_rows_by_any_column(tmp_path: Path) -> None:
    place = text(tmp_path / "a.csv", "a,b\n1,x\n2,y\n3,x\n")
    assert outcome(tmp_path, place, features=["a"], where="b = 'x'").rows == {"a.csv#1": {"a": 1}, "a.csv#3": {"a": 3}}
    source = TableSource.describe([place], features=["a"], where="b = 'z'").located(str(tmp_path / "other"))
    source.prepare()
    with pytest.raises(SourceNotFoundError, match=r"no row of .* meets the condition \"b = 'z'\""):
        plan(source)


@pytest.mark.parametrize("where", ["b ==", "nothing = 1", "a IN (SELECT column0 FROM read_csv('/etc/passwd'))"])
def test_a_condition_that_cannot_be_is_a_problem(tmp_path: Path, where: str) -> None:
    [problem] = problems(parquet(tmp_path / "a.parquet", {"a": [1], "b": ["x"]}), where=where)
    assert problem.startswith(f"where: {where!r}: ")
    assert "\n" not in problem


# -- keys ---------------------------------------------------------------------------------------------


def readings(path: Path, counts: Mapping[Any, int]) -> str:
    """A table whose rows of each key are spread over it."""
    rows = sorted((number, key) for key, count in counts.items() for number in range(count))
    columns = {"device": [key for _, key in rows], "value": [float(number) for number, _ in rows]}
    return parquet(path, columns, row_group_size=7)


def test_a_chunk_holds_whole_keys_as_far_as_it_may(tmp_path: Path) -> None:
    source = prepared(tmp_path, readings(tmp_path / "a.parquet", {1: 3, 2: 4, 3: 25, 4: 2}), by=["device"])
    chunks = plan(source, items=8)
    devices = [[row["device"] for row in Outcome(source, [chunk]).rows.values()] for chunk in chunks]
    assert devices == [[1] * 3 + [2] * 4, [3] * 8, [3] * 8, [3] * 8, [3] + [4] * 2]
    assert [row["value"] for row in Outcome(source, chunks[:1]).rows.values()] == [0, 1, 2, 0, 1, 2, 3]


def test_a_key_without_a_model_is_one_dead_item(tmp_path: Path) -> None:
    place = readings(tmp_path / "a.parquet", {1: 3, 2: 4, 3: 1})
    missing = {2, 3}

    def reason(key: Mapping[str, Any]) -> str | None:
        return f"there is no model for device {key['device']}" if key["device"] in missing else None

    source = prepared(tmp_path, place, features=["value"], by=["device"], missing_reason=reason)
    found = Outcome(source)
    assert len(found.rows) == 3
    assert found.messages == {
        "device=2": "there is no model for device 2 (4 rows)",
        "device=3": "there is no model for device 3 (1 row)",
    }
    dead = [source.slice(chunk, at, at + 1) for chunk in plan(source) for at in range(chunk.count)][3:]
    assert [list(source.keys(each)) for each in dead] == [["device=2"], ["device=3"]]
    missing.remove(2)
    [again] = source.combine(dead)
    assert again.count == 5
    replayed = Outcome(source, [again])
    assert [row["value"] for row in replayed.rows.values()] == [0, 1, 2, 3]
    assert list(replayed.dead) == ["device=3"]


def test_planning_goes_on_with_the_keys_that_had_no_model_then(tmp_path: Path) -> None:
    place = readings(tmp_path / "a.parquet", {1: 2, 2: 2, 3: 2})
    source = prepared(tmp_path, place, by=["device"], missing_reason=lambda key: "none" if key["device"] == 2 else None)
    first, *_ = chunks = plan(source, items=3)
    assert [chunk.count for chunk in chunks] == [3, 2]
    rest = prepared(tmp_path, place, by=["device"], missing_reason=lambda key: None)
    assert list(rest.plan(first.cursor, 3, lambda: ChunkLimit(3, 1 << 30))) == chunks[1:]


def test_what_tells_of_models_stays_with_the_planner(tmp_path: Path) -> None:
    source = prepared(
        tmp_path, readings(tmp_path / "a.parquet", {1: 2}), by=["device"], missing_reason=lambda key: None
    )
    chunks = plan(source)
    there = pickle.loads(pickle.dumps(source))
    assert there.missing_reason is None
    assert Outcome(there, chunks).rows == Outcome(source).rows


def test_a_key_that_has_a_model_by_now_is_cut_to_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tally.sources.tables.source._COMBINE", 4)
    place = readings(tmp_path / "a.parquet", {1: 10, 2: 1})
    source = prepared(tmp_path, place, by=["device"], missing_reason=lambda key: "none" if key["device"] == 1 else None)
    [chunk] = plan(source)
    again = prepared(tmp_path, place, by=["device"], missing_reason=lambda key: None)
    combined = again.combine([source.slice(chunk, 0, 1)])
    assert [each.count for each in combined] == [4, 4, 2]
    assert [row["value"] for row in Outcome(again, combined).rows.values()] == list(range(10))


def test_a_key_may_be_null(tmp_path: Path) -> None:
    place = parquet(tmp_path / "a.parquet", {"device": [None, "a", None], "value": [1, 2, 3]})
    source = prepared(
        tmp_path, place, by=["device"], missing_reason=lambda key: "none" if key["device"] is None else None
    )
    assert Outcome(source).messages == {"device=null": "none (2 rows)"}


def test_rows_of_many_files_tell_where_they_stood(tmp_path: Path) -> None:
    for name in "ba":
        readings(tmp_path / f"in/{name}.parquet", {1: 2, 2: 2})
    source = prepared(tmp_path, str(tmp_path / "in"), by=["device"])
    found = Outcome(source)
    assert list(found.rows) == [f"{name}.parquet#{row}" for part in (1, 2) for name in "ab" for row in (part, part + 2)]
    assert [row["_order"] for row in found.info.values()] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_training_reads_one_key_at_a_time(tmp_path: Path) -> None:
    source = prepared(tmp_path, readings(tmp_path / "a.parquet", {"p": 3, "q": 2}), features=["value"], by=["device"])
    assert source.groups() == [({"device": "p"}, 0, 3), ({"device": "q"}, 3, 2)]
    assert source.group_table(3, 2).to_pydict() == {"device": ["q", "q"], "value": [0.0, 1.0]}


# -- windows ------------------------------------------------------------------------------------------


def windows(tmp_path: Path, rows: list[tuple[str, Any]], **options: Any) -> dict[str, dict[str, Any]]:
    place = text(tmp_path / "a.csv", "at,v\n" + "".join(f"{at},{v}\n" for at, v in rows))
    given = {"time": "at", "window": 300, "aggregate": ["mean", "min", "max", "last", "count"]} | options
    return outcome(tmp_path, place, **given).rows


def test_windows_gather_what_was_read_in_them(tmp_path: Path) -> None:
    rows: list[tuple[str, Any]] = [
        ("2026-01-01 00:04:59.999", 1),
        ("2026-01-01 00:20:00", 9),  # what lies between is not there
        ("2026-01-01 00:00:00", 2),  # backward
        ("2026-01-01 00:04:59.999", 6),  # at the same time as the first, but later in the file
        ("2026-01-01 00:03:00", ""),
    ]
    assert windows(tmp_path, rows) == {
        "2026-01-01T00:00:00": {"v_mean": 3.0, "v_min": 1, "v_max": 6, "v_last": 6, "count": 4},
        "2026-01-01T00:20:00": {"v_mean": 9.0, "v_min": 9, "v_max": 9, "v_last": 9, "count": 1},
    }


@pytest.mark.parametrize(
    ("window", "begins"),
    [
        (0.25, "2026-01-07T13:59:59.750000"),
        (60, "2026-01-07T13:59:00"),
        (86_400, "2026-01-07T00:00:00"),
        (7 * 86_400, "2026-01-05T00:00:00"),
    ],
)
def test_where_windows_begin(tmp_path: Path, window: float, begins: str) -> None:
    assert list(windows(tmp_path, [("2026-01-07 13:59:59.900", 1)], window=window)) == [begins]


def test_times_with_a_zone_are_those_of_utc(tmp_path: Path) -> None:
    place = text(tmp_path / "a.csv", "at,v\n2026-01-01T00:07:00+02:00,1\n")
    source = prepared(tmp_path, place, time="at", window=3600)
    found = Outcome(source)
    assert found.rows == {"2025-12-31T22:00:00Z": {"v_mean": 1.0}}
    assert found.info == {"2025-12-31T22:00:00Z": {"at": datetime(2025, 12, 31, 22, tzinfo=UTC)}}
    assert source.columns == {"at": "timestamp[us, tz=UTC]"}


def test_a_row_without_a_time_is_in_no_window_and_that_is_said(tmp_path: Path) -> None:
    source = prepared(tmp_path, text(tmp_path / "a.csv", "at,v\n2026-01-01,1\n,2\n"), time="at", window=60)
    assert list(Outcome(source).rows) == ["2026-01-01T00:00:00"]
    assert source.remark() == "1 row is in no window: without a time"


# -- work files ---------------------------------------------------------------------------------------


def test_work_files_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = prepared(tmp_path, readings(tmp_path / "a.parquet", {1: 3}), by=["device"])
    expected = Outcome(source).rows
    monkeypatch.setattr("tally.sources.tables.source.make", None)
    again = prepared(tmp_path, str(tmp_path / "a.parquet"), by=["device"])
    assert Outcome(again).rows == expected


def test_a_source_that_changed_is_an_error(tmp_path: Path) -> None:
    place = readings(tmp_path / "a.parquet", {1: 3})
    prepared(tmp_path, place, by=["device"])
    readings(tmp_path / "a.parquet", {1: 4})
    with pytest.raises(StorageError, match=r"the source has changed(.|\n)*--overwrite"):
        prepared(tmp_path, place, by=["device"])
    with pytest.raises(StorageError, match="the source has changed"):
        prepared(tmp_path, place, by=["device"], features=["value"])


def test_what_was_never_made_cannot_be_planned(tmp_path: Path) -> None:
    source = TableSource.describe([readings(tmp_path / "a.parquet", {1: 3})], features=None, by=["device"])
    with pytest.raises(TypeError, match=r"at\(place\)"):
        plan(source)
    with pytest.raises(StorageError, match="the work files of the table are not at"):
        plan(source.located(str(tmp_path / "work")))


def test_of_several_that_make_them_at_once_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TableSource.describe([readings(tmp_path / "a.parquet", {1: 3})], features=None, by=["device"])
    source = source.located(str(tmp_path / "work"))
    both = threading.Barrier(2)

    def together(inputs: list[TableFile], query: Any, folder: Path) -> Made:
        made = make(inputs, query, folder)
        both.wait(30)
        return made

    monkeypatch.setattr("tally.sources.tables.source.make", together)
    threads = [threading.Thread(target=source.prepare) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(Outcome(source).rows) == 3
    assert sorted(path.is_dir() for path in (tmp_path / "work").iterdir()) == [False, True]


def _killed(place: str, scratch: str) -> None:
    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    LocalStore.write = die  # type: ignore[method-assign, assignment]
    TableSource.describe([place], features=None, by=["device"]).located(scratch).prepare()


def test_what_a_killed_process_left_behind_is_removed(tmp_path: Path) -> None:
    place = readings(tmp_path / "a.parquet", {1: 3})
    scratch = str(tmp_path / "work")
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(place, scratch))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    [left] = (tmp_path / "work").iterdir()
    source = prepared(tmp_path, place, by=["device"])
    assert not left.exists()
    assert len(Outcome(source).rows) == 3


def test_a_disk_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    text(tmp_path / "work", "a file")
    with pytest.raises(StorageError, match=r"cannot write .*work/table-.*: a part of the path is a file"):
        prepared(tmp_path, readings(tmp_path / "a.parquet", {1: 3}), by=["device"])


# -- Parquet in place ---------------------------------------------------------------------------------


def test_chunks_end_where_row_groups_do_if_that_is_near(tmp_path: Path) -> None:
    place = parquet(tmp_path / "a.parquet", {"x": range(100)}, row_group_size=10)
    assert [chunk.count for chunk in plan(TableSource.describe([place], features=1), items=25)] == [20] * 5
    assert [chunk.count for chunk in plan(TableSource.describe([place], features=1), items=6)] == [6, 4] * 10


def test_chunks_are_bounded_by_the_bytes_of_the_columns_that_are_read(tmp_path: Path) -> None:
    place = parquet(tmp_path / "a.parquet", {"x": range(1000), "y": ["y" * 100] * 1000}, use_dictionary=False)
    assert len(plan(TableSource.describe([place], features=["x"]), size=80_000)) == 1
    assert len(plan(TableSource.describe([place], features=["y"]), size=20_000)) > 4


def test_batches_are_windows_whatever_could_not_be_read(tmp_path: Path) -> None:
    """A damaged page costs its rows; those before and in other files are read."""
    place = parquet(tmp_path / "in/a.parquet", {"x": range(300_000)}, row_group_size=100_000, use_dictionary=False)
    meta = pq.read_metadata(place).row_group(1).column(0)
    content = bytearray(Path(place).read_bytes())
    start = meta.data_page_offset
    content[start : start + meta.total_compressed_size] = os.urandom(meta.total_compressed_size)
    Path(place).write_bytes(content)
    parquet(tmp_path / "in/b.parquet", {"x": [1, 2]})
    source = TableSource.describe([str(tmp_path / "in")], features=1)
    scorer = Scorer()
    scorer.input, scorer.batch_size = "table", 50_000
    [chunk] = plan(source, items=1_000_000)
    batches = list(source.read(chunk, scorer, Timings()))
    assert [(batch.start, batch.stop) for batch in batches] == [
        (start, min(start + 50_000, 300_002)) for start in range(0, 300_002, 50_000)
    ]
    assert sum(len(batch.keys) for batch in batches) == 100_002
    [message] = {error.message for batch in batches for _, error in batch.dead}
    assert message.startswith("a.parquet cannot be read: ")
    assert batches[-1].keys.to_pylist()[-1] == "b.parquet#2"


@pytest.mark.parametrize("marked", [True, False])
def test_a_file_that_changed_since_it_was_planned_is_not_read(tmp_path: Path, marked: bool) -> None:
    """marked: False is a job of an earlier version, which knew a file by its number of rows."""
    place = parquet(tmp_path / "a.parquet", {"x": [1, 2, 3]})
    source = TableSource.describe([place], features=1)
    [chunk] = plan(source)
    if not marked:
        del chunk.payload["pieces"][0][6]
    assert len(Outcome(source, [chunk]).rows) == 3
    parquet(tmp_path / "a.parquet", {"x": [1, 2]})
    with pytest.raises(SourceChangedError, match=r"a\.parquet has changed since the job was planned") as caught:
        Outcome(source, [chunk])
    assert "--overwrite" in str(caught.value)


def test_what_is_no_parquet_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*a\.parquet: it is no Parquet file"):
        TableSource.describe([text(tmp_path / "a.parquet", "a,b\n1,2\n")], features=None)
    with pytest.raises(StorageError, match=r"cannot read .*a\.arrow: it is no Arrow file"):
        TableSource.describe([text(tmp_path / "a.arrow", "a,b\n1,2\n")], features=None)


def test_scattered_rows_are_replayed_together(tmp_path: Path) -> None:
    source = TableSource.describe([parquet(tmp_path / "a.parquet", {"x": range(50)}, row_group_size=20)], features=1)
    [chunk] = plan(source)
    mark = LocalStore(tmp_path).marked("a.parquet")[1]
    dead = [source.slice(chunk, at, at + 1) for at in (3, 4, 19, 20, 49)]
    [again] = source.combine(dead)
    assert again.count == 5
    assert again.payload["pieces"] == [["rows", 0, "a.parquet", *run, 50, mark] for run in ((3, 5), (19, 21), (49, 50))]
    assert [row["x"] for row in Outcome(source, [again]).rows.values()] == [3, 4, 19, 20, 49]


@pytest.mark.parametrize("features", [["Value"], 1])
def test_faults_in_a_column_that_is_scored_and_kept_cost_their_lines(tmp_path: Path, features: Any) -> None:
    lines = ["Device,Value", *(f"{n},{n}.5" for n in range(9))]
    lines[3], lines[6] = "2,abc", "5,"
    place = tmp_path / "readings.csv"
    place.write_text("\n".join(lines) + "\n")
    source = prepared(tmp_path, str(place), features=features, by=["Device"], keep=["Value"])
    assert dict(source.columns)["Value"] == "float64"
    chunks = chunks_of(source, 100)
    dead = [key for chunk in chunks for key in source.keys(chunk) if "line" in key]
    assert dead == ["readings.csv line 4"]
    assert sum(chunk.count for chunk in chunks) == 9


def test_each_footer_is_read_once_by_who_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()

    def counting(real: Any) -> Any:
        def count(where: Any, *args: Any, **options: Any) -> Any:
            if Path(where).parent == tmp_path / "in":
                opened[Path(where).name] += 1
            return real(where, *args, **options)

        return count

    monkeypatch.setattr(pq, "ParquetFile", counting(pq.ParquetFile))
    monkeypatch.setattr(pq, "read_metadata", counting(pq.read_metadata))
    for number in range(5):
        readings(tmp_path / f"in/{number}.parquet", {1: 2, 2: 3})
    once = {f"{number}.parquet": 1 for number in range(5)}
    for options in ({}, {"by": ["device"]}, {"where": "device = 2"}):
        opened.clear()
        source = prepared(tmp_path / str(len(options)), str(tmp_path / "in"), features=["value"], **options)
        chunks = plan(source)
        assert sum(chunk.count for chunk in chunks) == (15 if "where" in options else 25)
        assert opened == once
        shutil.rmtree(tmp_path / str(len(options)), ignore_errors=True)


def test_a_file_that_changed_since_it_was_looked_at_is_planned_as_it_is(tmp_path: Path) -> None:
    source = prepared(tmp_path, readings(tmp_path / "in/a.parquet", {1: 2}), features=["value"])
    readings(tmp_path / "in/a.parquet", {1: 700, 2: 50})
    assert sum(chunk.count for chunk in plan(source)) == 750


def test_jobs_begun_by_earlier_versions_know_their_work_files(tmp_path: Path) -> None:
    """The fingerprint in their marker was made of the names that things had then."""
    request = TableRequest(("value",), ("device",), ("at",), "value > 1", None, None, ("mean",))
    selection = Selection(
        ("value",), {"device": "int64"}, {"device": pa.int64(), "value": pa.float64(), "at": pa.timestamp("us")}
    )
    query = Query(request, selection, {}, {"device": "BIGINT"})
    assert fingerprint([], query) == "dc45f66edb929eab506316a648472592dcf70334683daf486e10d6e4a3632d06"
