"""Rows of databases are scored: with the values and types that they have there, of one moment, known by their keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import REPOSITORY, Ran
from tests.databases import KINDS, database, execute

import tally
from tally.errors import SourceChangedError, SpecError, StorageError, TallyError
from tally.jobs.spec import make
from tally.scorers.base import Scorer
from tally.sources.base import ChunkLimit
from tally.sources.sql.factory import opened
from tally.sources.sql.source import SqlSource

Cli = Callable[..., Ran]


class Doubled(Scorer):
    input = "table"
    features = ("Value",)
    columns = {"twice": "float64"}  # noqa: RUF012

    def score(self, batch: pa.Table) -> list[dict[str, float]]:
        return [{"twice": 2 * value} for value in batch["Value"].to_pylist()]


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[str]:
    with database("sqlite", tmp_path) as found:
        yield found


def readings(url: str, rows: int = 100) -> None:
    """The fifth original's table: SensorValues(TS, Device, Tag, Value)."""
    stamp = "DATETIME" if url.startswith(("sqlite", "mariadb")) else "TIMESTAMP"
    values = ", ".join(
        f"('2026-11-{1 + n % 28:02} {n % 24:02}:{n // 24 % 60:02}:00', {1 + n % 3}, {1 + n % 5}, {n / 4})"
        for n in range(rows)
    )
    execute(
        url,
        f"CREATE TABLE SensorValues (TS {stamp} NOT NULL, Device INT NOT NULL, Tag INT NOT NULL, Value FLOAT)",
        f"INSERT INTO SensorValues VALUES {values}",
    )


def test_a_query_is_scored(url: str, tmp_path: Path) -> None:
    readings(url)
    query = f"SELECT TS, Device, Tag, {value_of(url)} FROM SensorValues WHERE Device = 2 AND TS >= '2026-11-10'"
    job = tally.score(
        url,
        Doubled,
        tmp_path / "o",
        quiet=True,
        workers=1,
        query=query,
        key="Device,Tag,TS".lower() if url.startswith("postgresql") else "Device,Tag,TS",
    )
    expected = {
        f"2/{1 + n % 5}/2026-11-{1 + n % 28:02} {n % 24:02}:{n // 24:02}:00.000000": n / 2
        for n in range(100)
        if n % 3 == 1 and n % 28 >= 9
    }
    assert {row["key"]: row["twice"] for row in job.results().to_pylist()} == expected
    assert (job.manifest["source"], job.manifest["spec"]["query"]) == ([url], query)
    told = ["Value is FLOAT"] if url.startswith("mariadb") else []
    assert [each[:14] for each in job.manifest["warnings"]] == told
    read = job.manifest["source_read"]
    assert (read["database"], read["rows"]) == (url, len(expected))
    assert "of one moment" in read["snapshot"]


def value_of(url: str) -> str:
    """The column Value, which PostgreSQL would call value."""
    return 'Value AS "Value"' if url.startswith("postgresql") else "Value"


def test_values_keep_their_types(url: str) -> None:
    kind = url.partition(":")[0]
    zoned = {"mariadb": "TIMESTAMP(6) NULL", "sqlite": "TIMESTAMP"}.get(kind, "TIMESTAMPTZ")
    moment = "2026-03-29 01:30:00.25" + ("" if kind == "mariadb" else "+00:00")
    unsigned = "BIGINT UNSIGNED" if kind == "mariadb" else "NUMERIC(20, 0)"
    blob = {"postgresql": "BYTEA"}.get(kind, "BLOB")
    raw = {"postgresql": r"'\x00ff'", "duckdb": r"'\x00\xFF'::BLOB"}.get(kind, "x'00ff'")
    number = 2**53 if kind == "sqlite" else 2**64 - 1  # SQLite would make a float of it
    text = "JSON" if kind != "postgresql" else "JSONB"
    times = "DATETIME(6)" if kind == "mariadb" else "TIMESTAMP"
    execute(
        url,
        f"CREATE TABLE t (n INT, big {unsigned}, price DECIMAL(30, 12), f DOUBLE PRECISION, b {blob}, s TEXT, "
        f"d DATE, moment {times}, zoned {zoned}, j {text})",
        f"INSERT INTO t VALUES (7, {number}, 0.10, 0.1, {raw}, 'it''s\n 100% \\ ü', '2026-02-28', "
        f"'2026-02-28 23:59:59.000001', '{moment}', '{{\"a\": [1, null]}}')",
        f"INSERT INTO t VALUES ({', '.join(['NULL'] * 10)})",
    )
    with opened(url, "SELECT * FROM t ORDER BY n IS NULL") as query:
        schema = query.schema
        [batch] = list(query.batches())
    full, empty = batch.to_pylist()
    assert set(empty.values()) == {None}
    assert json.loads(full.pop("j")) == {"a": [1, None]}
    assert full == {
        "n": 7,
        "big": number,
        "price": Decimal("0.1"),
        "f": 0.1,
        "b": b"\x00\xff",
        "s": "it's\n 100% \\ ü" if kind != "mariadb" else "it's\n 100%  ü",
        "d": date(2026, 2, 28),
        "moment": datetime(2026, 2, 28, 23, 59, 59, 1),  # noqa: DTZ001
        "zoned": datetime(2026, 3, 29, 1, 30, 0, 250_000, UTC),
    }
    assert schema.field("price").type == pa.decimal128(30, 12)
    assert schema.field("zoned").type == pa.timestamp("us", "UTC")
    assert schema.field("moment").type == pa.timestamp("us")
    assert pa.types.is_integer(schema.field("n").type)


@pytest.mark.parametrize(
    ("setup", "query", "problem"),
    [
        ("CREATE TABLE t (v INTEGER); INSERT INTO t VALUES (1), ('abc')", "SELECT * FROM t", "holds 'abc'"),
        ("CREATE TABLE t (v DATE); INSERT INTO t VALUES ('2026-02-30')", "SELECT * FROM t", "holds '2026-02-30'"),
        ("CREATE TABLE t (v); INSERT INTO t VALUES (1), ('abc')", "SELECT * FROM t", "several types: integer, text"),
        (
            "CREATE TABLE t (v NUMERIC); INSERT INTO t VALUES (1.5), (9007199254740993)",
            "SELECT * FROM t",
            "holds 9007199",
        ),
        (
            "CREATE TABLE t (v TIMESTAMP); INSERT INTO t VALUES ('2026-01-01 10:00:00+0200'), ('2026-01-01 10:00:00')",
            "SELECT * FROM t",
            "have a zone, and others have none",
        ),
        (
            "CREATE TABLE t (v TIMESTAMP); INSERT INTO t VALUES ('2026-01-01 10:00:00+02:00'), ('2026-01-01')",
            "SELECT * FROM t",
            "holds '2026-01-01 10:00:00\\+02:00'",
        ),
        (
            "CREATE TABLE t (v TIMESTAMP); INSERT INTO t VALUES ('2026-01-01 10:00:00.123456789')",
            "SELECT * FROM t",
            "holds '2026-01-01 10:00:00.123456789'",
        ),
        ("CREATE TABLE t (v TIME); INSERT INTO t VALUES ('10:00:00+02:00')", "SELECT * FROM t", "holds '10:00:00"),
        ("CREATE TABLE t (v INTEGER)", "SELECT v, v AS V FROM t", "two columns of the name 'V'"),
        ("CREATE TABLE t (v INTEGER)", "SELECT w FROM t", "no such column: w"),
        ("CREATE TABLE t (v INTEGER)", "ATTACH 'other.db' AS x", "does not take it"),
        ("CREATE TABLE t (v INTEGER)", "DELETE FROM t", "does not take it"),
        ("CREATE TABLE t (v INTEGER)", "SELECT 1 AS a; SELECT 2 AS b", "does not take it"),
    ],
)
def test_what_is_not_as_it_says_is_refused(sqlite: str, setup: str, query: str, problem: str) -> None:
    execute(sqlite, *setup.split("; "))
    with pytest.raises((SpecError, StorageError), match=problem), opened(sqlite, query) as found:
        list(found.batches())


def test_a_table_that_is_not_there_is_told_as_such(cli: Cli, tmp_path: Path, sqlite: str) -> None:
    execute(sqlite, "CREATE TABLE t (v INTEGER)")
    (tmp_path / "detector.py").write_text(DETECTOR)
    ran = cli("score", f'{sqlite}#"t"', "--model", tmp_path / "detector.py", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "does not give the table '\"t\"': no such table" in ran.err
    assert "without quotes: #TABLE or #SCHEMA.TABLE" in ran.err


@pytest.mark.parametrize("zone", ["+0200", "+02", "+02:00"])
def test_times_of_sqlite_have_the_zone_that_they_say(sqlite: str, zone: str) -> None:
    execute(sqlite, "CREATE TABLE t (v TIMESTAMP)", f"INSERT INTO t VALUES ('2026-01-01 10:00:00.250{zone}')")
    with opened(sqlite, "SELECT * FROM t") as found:
        [batch] = found.batches()
    assert batch.to_pylist() == [{"v": datetime(2026, 1, 1, 8, 0, 0, 250_000, UTC)}]


def test_floats_of_mariadb_keep_their_digits_or_it_is_told(tmp_path: Path) -> None:
    with database("mariadb", tmp_path) as url:
        execute(url, "CREATE TABLE t (v FLOAT, `o``dd` FLOAT)", "INSERT INTO t VALUES (16777215, 1.2345678), (NULL, 3)")
        expected = [{"v": 16777215.0, "o`dd": float(np.float32(1.2345678))}, {"v": None, "o`dd": 3.0}]
        with opened(url, "SELECT * FROM `t`") as found:  # as a table after # is asked for
            assert [each.remark for each in found.columns] == ["", ""]
            [batch] = found.batches()
        assert batch.to_pylist() == expected
        with opened(url, "SELECT v FROM t") as found:
            assert "of which the database writes six digits" in found.columns[0].remark
        with opened(url, "SELECT CAST(v AS DOUBLE) AS v FROM t") as found:
            assert found.columns[0].remark == ""
            [batch] = found.batches()
        assert batch.to_pylist()[0] == {"v": 16777215.0}


def test_types_of_duckdb_that_arrow_lacks_are_text(tmp_path: Path) -> None:
    with database("duckdb", tmp_path) as url:
        execute(url, "CREATE TABLE t AS SELECT 1 AS n, '10:00:00+02'::TIMETZ AS at, '101'::BIT AS bits")
        with opened(url, "SELECT * FROM t ORDER BY n") as found:
            [batch] = found.batches()
        assert batch.to_pylist() == [{"n": 1, "at": "10:00:00+02", "bits": "101"}]


def test_decimals_without_digits_are_told(tmp_path: Path) -> None:
    with database("postgresql", tmp_path) as url:
        execute(url, "CREATE TABLE t (v NUMERIC, i INTERVAL)", "INSERT INTO t VALUES (0.5), (9007199254740993)")
        with opened(url, "SELECT v FROM t") as found:
            assert "taken for float64" in found.columns[0].remark
            with pytest.raises(StorageError, match="holds 9007199254740993"):
                list(found.batches())
        with pytest.raises(SpecError, match="months have no length"), opened(url, "SELECT i FROM t"):
            pass
        with opened(
            url,
            "SELECT ARRAY[1, 2] AS a, ARRAY['x', NULL] AS t, 'x'::\"char\" AS c, '10.0.0.1'::inet AS ip, '50%' AS p",
        ) as found:
            [batch] = found.batches()
        assert batch.to_pylist() == [{"a": [1, 2], "t": ["x", None], "c": "x", "ip": "10.0.0.1", "p": "50%"}]
        with pytest.raises(SpecError, match="does not take it"), opened(url, "DROP TABLE t"):
            pass
        execute(url, "CREATE SEQUENCE s")
        with opened(url, "SELECT nextval('s') AS n") as found, pytest.raises(psycopg.Error, match="read-only"):
            list(found.batches())


def test_rows_are_of_one_moment(url: str) -> None:
    if not url.startswith(("postgresql", "mariadb")):
        pytest.skip("nobody else writes to a file that is being read")
    readings(url, 10)
    with opened(url, "SELECT Device FROM SensorValues") as found:
        execute(url, "DELETE FROM SensorValues WHERE Device = 1")
        assert sum(batch.num_rows for batch in found.batches()) == 10


def source(url: str, work: Path, **options: Any) -> SqlSource:
    options = {"features": ("Value",), **options}
    made = SqlSource.of(url, options.pop("query", None), **options).located(str(work))
    made.prepare()
    return made


def keys(made: SqlSource) -> list[str]:
    return [key for chunk in made.plan(None, 0, lambda: ChunkLimit(1000, 1 << 30)) for key in made.keys(chunk)]


def test_rows_of_a_table_are_numbered_selected_and_gathered(sqlite: str, tmp_path: Path) -> None:
    readings(sqlite)
    table = f"{sqlite}#SensorValues"
    numbered = source(table, tmp_path / "1")
    assert keys(numbered) == [f"SensorValues#{n}" for n in range(1, 101)]
    by = source(table, tmp_path / "2", by=["Device"], where="Tag < 3", key="Device,Tag,TS")
    assert [(each["Device"], rows) for each, _, rows in by.groups()] == [(1, 14), (2, 13), (3, 13)]
    assert keys(by)[0] == "1/1/2026-11-01 00:00:00.000000"
    windows = source(table, tmp_path / "3", by=["Device"], time="TS", window=86_400, features=("Value_mean",))
    assert keys(windows)[0] == "1/2026-11-01T00:00:00"
    assert len(keys(windows)) == len({(n % 3, n % 28) for n in range(100)})


def test_what_was_read_is_read_once(sqlite: str, tmp_path: Path) -> None:
    readings(sqlite)
    made = source(f"{sqlite}#SensorValues", tmp_path / "w")
    before = keys(made)
    execute(sqlite, "DELETE FROM SensorValues WHERE Device = 1")
    again = source(f"{sqlite}#SensorValues", tmp_path / "w")  # as a job that is resumed
    assert keys(again) == before
    assert again.facts() == made.facts()
    with pytest.raises(SourceChangedError):
        source(sqlite, tmp_path / "w", query="SELECT Value FROM SensorValues")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "names no table"),
        ({"query": "SELECT 1 AS Value", "key": "Id"}, "key: there is no column 'Id'"),
        ({"query": "SELECT Value, Device FROM SensorValues", "key": "Device"}, "several rows have the same: 1"),
        ({"query": "SELECT Value, NULL AS k FROM SensorValues", "key": "k"}, "rows have none"),
        ({"query": "SELECT Value, x'ff01' AS k FROM SensorValues", "key": "k"}, "'k' holds binary, which is no key"),
        ({"query": "SELECT Device FROM SensorValues"}, "the model takes a column 'Value'"),
        ({"query": "SELECT * FROM SensorValues WHERE 1 = 0"}, "gives no rows"),
        ({"query": "SELECT * FROM SensorValues", "where": "Valu > 1"}, "Valu"),
    ],
)
def test_what_cannot_be_meant_is_refused(sqlite: str, tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    readings(sqlite)
    with pytest.raises(TallyError, match=problem):
        source(sqlite, tmp_path / "w", **options)


@pytest.mark.parametrize(
    ("source", "options", "problem"),
    [
        ("sqlite:///x.db", {"query": "SELECT 1", "csv": {"delim": ";"}}, "csv: is for files"),
        ("sqlite:///x.db", {"query": "SELECT 1", "base": "x"}, "base: is for lists of items only"),
        ("x.csv", {"query": "SELECT 1"}, "query: is for databases only"),
        ("sqlite:///x.db", {"query": "SELECT 1"}, "there is no file"),
        ("mongodb://h/d#c", {}, "is no database that rows are read from"),
    ],
)
def test_options_are_for_their_sources(tmp_path: Path, source: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(TallyError, match=problem):
        tally.score(source, Doubled, tmp_path / "out", quiet=True, **options)


def test_spellings_of_a_query() -> None:
    common = {"model": "m.onnx", "out": "o"}
    plain = make(source="postgresql://h/d?sslmode=require", query="SELECT '100%' WHERE a#>b", **common)
    assert make(source="postgresql://h/d?sslmode=require&query=SELECT '100%' WHERE a#>b", **common) == plain
    assert make(source="postgresql://h/d?sslmode=require&query=SELECT%20'100%25'%20WHERE%20a%23%3Eb", **common) == plain
    assert make(source="sqlite:///x.db?query=SELECT 'a//b'", **common).query == "SELECT 'a//b'"
    assert make(source="sqlite:///x.db#t", **common).source == (f"sqlite:///{Path.cwd()}/x.db#t",)
    assert make(source="env:READINGS", query="SELECT 1", **common).source == ("env:READINGS",)
    for wrong, problem in [
        ({"source": "postgresql://h/d?query=SELECT 1", "query": "SELECT 2"}, "so is one in the URL"),
        ({"source": "postgresql://me:secret@h/d", "query": "SELECT 2"}, "holds a password"),
        ({"source": "postgresql:///d#t"}, "names no server"),
    ]:
        with pytest.raises(SpecError, match=problem) as refused:
            make(**wrong, **common)
        assert "secret@" not in str(refused.value)


def test_a_password_stays_where_it_is(sqlite: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READINGS", "postgresql://me:hush-hush@127.0.0.1:1/none")
    (tmp_path / "s.py").write_text("import tally\nclass S(tally.Scorer):\n    input = 'table'\n")
    ran = cli("score", "env:READINGS", "--query", "SELECT 1", "--model", tmp_path / "s.py", "--out", tmp_path / "o")
    assert ran.code == 1
    assert "postgresql://me@127.0.0.1:1/none does not answer" in ran.err
    assert "hush" not in ran.err
    ran = cli("score", "env:NOTHING#t", "--model", tmp_path / "s.py", "--out", tmp_path / "o")
    assert "NOTHING is not set" in ran.err
    assert ran.code == 2


class Picky(Scorer):
    input = "table"
    features = ("Value",)

    def score(self, batch: pa.Table) -> list[dict[str, float]]:
        if any(value is None for value in batch["Value"].to_pylist()):
            raise ValueError("no value")
        return [{"twice": 2 * value} for value in batch["Value"].to_pylist()]


def test_dead_rows_are_replayed_as_they_are_by_now(sqlite: str, tmp_path: Path) -> None:
    execute(sqlite, "CREATE TABLE t (id INT, Value INT)", "INSERT INTO t VALUES (1, 10), (2, NULL), (3, 30), (4, NULL)")
    job = tally.score(f"{sqlite}#t", Picky, tmp_path / "out", quiet=True, workers=1, key="id")
    assert {row["key"] for row in job.results().to_pylist()} == {"1", "3"}
    execute(sqlite, "UPDATE t SET Value = 20 WHERE id = 2", "DELETE FROM t WHERE id = 1")
    job.retry(quiet=True)
    assert (job.record.state, job.record.dead) == ("finished", 1)
    rows = {row["key"]: row["twice"] for row in job.results().to_pylist()}
    assert rows == {"1": 20, "3": 60, "2": 40}
    execute(sqlite, "DELETE FROM t WHERE id = 4")
    with pytest.raises(StorageError, match="has no row 4 any more"):
        job.retry(quiet=True)


def test_rows_without_keys_are_not_replayed_once_they_are_read_anew(sqlite: str, tmp_path: Path) -> None:
    readings(sqlite, 5)
    made = source(f"{sqlite}#SensorValues", tmp_path / "w")
    [chunk] = made.plan(None, 0, lambda: ChunkLimit(1000, 1 << 30))
    dead = made.alone(chunk, 2, "SensorValues#3")
    assert [made.keys(each)[0] for each in made.combine([dead])] == ["SensorValues#3"]
    made.renew()
    made.prepare()
    with pytest.raises(StorageError, match="no keys by which they are known"):
        made.combine([dead])


DETECTOR = """
import tally


class Detector(tally.Scorer):
    input = "table"
    features = ("Value",)
    columns = {"anomaly": "bool"}

    def score(self, batch):
        return [{"anomaly": value > 100} for value in batch["Value"].to_pylist()]
"""


class Length(Scorer):
    input = "bytes"
    columns = {"length": "int64"}  # noqa: RUF012

    def score(self, batch: list[bytes]) -> list[dict[str, int]]:
        return [{"length": len(each)} for each in batch]


def test_a_query_is_a_list_of_files(sqlite: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"four")
    execute(
        sqlite,
        "CREATE TABLE photos (id INT, path TEXT, split TEXT)",
        f"INSERT INTO photos VALUES (1, '{tmp_path}/a.bin', 'test'), (2, 'a.bin', 'test'), (3, 'b.bin', 'train')",
    )
    query = f"{sqlite}?query=SELECT id, path, split FROM photos WHERE split = 'test'"
    job = tally.score(None, Length, tmp_path / "o", quiet=True, workers=1, items=query, key="id", keep=["split"])
    assert job.results().to_pylist() == [{"key": "1", "split": "test", "length": 4}]
    [dead] = job.dead().to_pylist()
    assert (dead["key"], "a database has no folder (base names one)" in dead["error"]) == ("2", True)


def test_detectors_are_trained_from_a_database(sqlite: str, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    readings(sqlite, 90)
    query = "SELECT Device, Value FROM SensorValues WHERE Device < 3"
    given = ("--by", "Device", "--value", "Value", "--workers", 1)
    ran = cli("train", "anomaly", f"{sqlite}?query={query}", *given, "--out", tmp_path / "m")
    assert ran.code == 0, ran.err
    assert pq.read_table(tmp_path / "m" / "models.parquet").num_rows == 2
    for source, problem in (
        (("sqlite:///x.db#t", "b.csv"), "is a database, and there are others"),
        (("postgresql://me:hush-hush@h/d#t",), "holds a password"),
    ):
        ran = cli("train", "anomaly", *source, *given, "--out", tmp_path / "none")
        assert (ran.code, problem in ran.err, "hush" in ran.err) == (2, True, False), ran.err


def test_the_job_of_the_page_reads_each_interval(cli: Cli, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "how-to" / "sql.md").read_text()
    job = page.partition("# job.yaml\n")[2].partition("```")[0]
    (tmp_path / "detector.py").write_text(DETECTOR)
    with database("postgresql", tmp_path) as url:
        for written, meant in (
            ("postgresql://db.internal/plant", url),
            ("models:/pumps@champion", "detector.py"),
            ("alerts: [anomalies > 0, no_data, failed]\nwebhook: env:ALERT_URL\n", ""),
        ):
            assert written in job
            job = job.replace(written, meant)
        (tmp_path / "job.yaml").write_text(job)
        execute(
            url,
            'CREATE TABLE "SensorValues" ("TS" TIMESTAMPTZ, "Device" INT, "Tag" INT, "Value" FLOAT8)',
            "INSERT INTO \"SensorValues\" VALUES ('2026-11-20 07:59:59+00', 1, 1, 1), "
            "('2026-11-20 08:00:00+00', 1, 1, 2), ('2026-11-20 08:59:59.5+00', 2, 1, 300), "
            "('2026-11-20 10:59:59+01', 1, 1, 4), ('2026-11-20 10:00+00', 1, 1, 5)",
        )
        hourly = ("--cron", "0 * * * *", "--timezone", "Europe/Berlin")
        added = cli("schedule", "add", "pumps", tmp_path / "job.yaml", *hourly)
        assert added.code == 0, added.err
        ran = cli("schedule", "backfill", "pumps", "--from", "2026-11-20T09:00", "--to", "2026-11-20T11:00")
    assert ran.code == 0, ran.err
    rows = {
        folder.name: sorted(pq.read_table(sorted(folder.glob("part-*"))).drop_columns("TS").to_pylist(), key=str)
        for folder in (tmp_path / "predictions").iterdir()
    }
    assert rows == {
        "2026-11-20T08": [
            {"key": "1/1/2026-11-20 08:00:00.000000Z", "Value": 2.0, "anomaly": False},
            {"key": "2/1/2026-11-20 08:59:59.500000Z", "Value": 300.0, "anomaly": True},
        ],
        "2026-11-20T09": [{"key": "1/1/2026-11-20 09:59:59.000000Z", "Value": 4.0, "anomaly": False}],
    }
