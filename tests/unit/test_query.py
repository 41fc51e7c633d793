"""SQL over results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tally.errors import SpecError
from tally.sinks.base import Output
from tally.sinks.factory import sink_for
from tally.sinks.query import query, rows
from tally.sinks.staging import StagedSink
from tally.sources.base import Chunk

RESULTS = [
    {"label": "007", "score": 0.5, "box": [1, 2], "more": {"a": 1}, "day": "2024-05-06"},
    {"label": "", "score": None, "box": [], "more": {"a": None}, "day": None},
    {"label": 'a, "b"\nc', "score": 1.25, "box": None, "more": None, "day": "x"},
]
DEAD = [{"key": "z", "stage": "read", "error": "cut off"}]


def written(sink: StagedSink, *attempts: list[dict[str, Any]]) -> list[Output]:
    sink.claim("job")
    outputs = []
    for number, results in enumerate(attempts):
        writer = sink.open(f"attempt-{number}", Chunk(0, len(results), {}))
        assert writer.add([f"{number}{i}" for i in range(len(results))], results) == []
        outputs.append(writer.close())
    return outputs


@pytest.fixture
def sink(tmp_path: Path) -> StagedSink:
    return sink_for(str(tmp_path / "out"), output="rows")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("out", "parquet"),
        ("out", "jsonl"),
        ("out", "csv"),
        ("it's [1] * {x}/out", "parquet"),
        ("it's [1] * {x}/out.csv", None),
        ("it's [1] * {x}/out.jsonl", None),
    ],
)
def test_values_come_back_as_they_were(tmp_path: Path, name: str, form: str | None) -> None:
    sink = sink_for(str(tmp_path / name), output="rows", format=form)
    outputs = written(sink, RESULTS)
    expected = [{"key": f"0{i}", **row} for i, row in enumerate(RESULTS)]
    assert rows(sink, outputs).to_pylist() == expected
    sink.finalize(outputs, [], {"job": "job"})
    assert rows(sink, outputs).to_pylist() == expected


def test_views_of_results_and_dead(sink: StagedSink) -> None:
    outputs = written(sink, RESULTS)
    sql = "select count(*) as n, (select any_value(error) from dead) as error from results"
    answer = [{"n": 3, "error": "cut off"}]
    assert query(sink, outputs, sql, DEAD).to_pylist() == answer
    assert query(sink, outputs, sql + ";", pa.Table.from_pylist(DEAD)).to_pylist() == answer


def test_nothing_yet(sink: StagedSink) -> None:
    assert rows(sink, []).schema.names == ["key"]
    sink.claim("job")
    assert query(sink, [], "select count(key) as n from results").to_pylist() == [{"n": 0}]


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_a_finished_job_without_rows(tmp_path: Path, form: str) -> None:
    sink = sink_for(str(tmp_path / "out"), output="rows", format=form, columns={"label": "string", "n": "int64"})
    sink.claim("job")
    sink.finalize([], DEAD, {"job": "job"})
    assert rows(sink, []).schema.names == ["key", "label", "n"]
    assert rows(sink, []).num_rows == 0


def test_parts_with_different_columns(sink: StagedSink) -> None:
    outputs = written(sink, [{"a": 1}], [{"a": 1.5, "b": "x"}], [{"b": None, "c": [1]}])
    expected = [
        {"key": "00", "a": 1.0, "b": None, "c": None},
        {"key": "10", "a": 1.5, "b": "x", "c": None},
        {"key": "20", "a": None, "b": None, "c": [1]},
    ]
    assert rows(sink, outputs).to_pylist() == expected
    sink.finalize(outputs, [], {"job": "job"})
    assert rows(sink, outputs).to_pylist() == expected


@pytest.mark.parametrize(
    "sql",
    ["with x as (from results) select * from x", "describe results", "summarize results", "explain from results"],
)
def test_what_reads_is_allowed(sink: StagedSink, sql: str) -> None:
    assert query(sink, written(sink, RESULTS), sql).num_rows > 0


@pytest.mark.parametrize(
    "sql",
    [
        "create table t as from results",
        "drop view results",
        "insert into dead values ('a', 'b', 'c')",
        "copy results to '{0}/stolen.csv'",
        "set lock_configuration = false",
        "attach '{0}/other.db'",
        "install httpfs",
        "load httpfs",
        "pragma database_list",
        "from '{0}/secret.csv'",
        "from read_text('{0}/secret.csv')",
        "from read_csv('{0}/secret.csv')",
        "from glob('{0}/*')",
        "from outputs",
        "with x as (insert into dead values ('a', 'b', 'c')) select 1",
        "explain analyze select 1",
        "explain copy results to '{0}/stolen.csv'",
    ],
)
def test_nothing_else_can_be_read_or_changed(sink: StagedSink, tmp_path: Path, sql: str) -> None:
    (tmp_path / "secret.csv").write_text("secret\n1\n")
    outputs = written(sink, RESULTS)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SpecError):
        query(sink, outputs, sql.format(tmp_path), DEAD)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "around",
    [
        "{0}",
        "explain analyze {0}",
        "explain (analyze) {0}",
        "Explain /* x */ ANALYZE {0}",
        "with x as ({0}) select 1",
        "with x as not materialized ({0}) from x where false",
        "with y as (select 1), x as ({0}) from y union all from x",
        "select (with x as ({0}) select 1)",
    ],
)
def test_the_files_of_the_results_cannot_be_written_either(sink: StagedSink, tmp_path: Path, around: str) -> None:
    outputs = written(sink, RESULTS)
    [part] = tmp_path.rglob("*.parquet")
    copy = f"copy (select 'forged' as label) to '{part}' (format parquet, use_tmp_file false)"
    with pytest.raises(SpecError):
        query(sink, outputs, around.format(copy))
    assert rows(sink, outputs)["label"].to_pylist() == [row["label"] for row in RESULTS]


def test_what_is_called_copy_may_be_read(sink: StagedSink) -> None:
    outputs = written(sink, [{"copy": "a copy"}])
    assert query(sink, outputs, "select copy from results where copy like '%copy%'").to_pylist() == [{"copy": "a copy"}]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("selec 1", 'syntax error at or near "selec"'),
        ("select nope from results", 'Referenced column "nope" not found'),
        ("from nowhere", "nowhere"),
        ("select 1; select 2", "2 statements"),
        ("  -- nothing", "no statement"),
        ("select cast(label as int) from results", "Could not convert"),
    ],
)
def test_mistakes_are_said_in_one_line(sink: StagedSink, sql: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        query(sink, written(sink, RESULTS), sql)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert "Error:" not in caught.value.message
    if "statement" not in message:
        assert caught.value.hint == (
            "There are results(key, label, score, box, more, day) and dead(key, stage, error)."
        )


def test_a_job_that_is_finalized_meanwhile(sink: StagedSink, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = written(sink, RESULTS)
    look, looks = sink.committed, []

    def committed(given: Any) -> Any:
        found = look(given)
        looks.append(found)
        if len(looks) == 1:
            sink.finalize(outputs, [], {"job": "job"})
        return found

    monkeypatch.setattr(sink, "committed", committed)
    assert rows(sink, outputs).num_rows == 3
    assert len(looks) == 2


def test_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = sink_for("memory://query/out", output="rows")
    outputs = written(sink, RESULTS[:2], RESULTS[2:])
    assert rows(sink, outputs)["label"].to_pylist() == [row["label"] for row in RESULTS]
    sink.finalize(outputs, [], {"job": "job"})
    assert rows(sink, outputs)["label"].to_pylist() == [row["label"] for row in RESULTS]
