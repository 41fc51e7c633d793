"""Rows go into databases each once, as they are committed or all at once; into MongoDB, as documents."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from tests.conftest import Ran
from tests.databases import KINDS, database, execute, in_table
from tests.mongodb import StandIn, stand_in
from tests.sizes import rows_of, write_items

from tally.errors import OwnershipLostError, SpecError, StorageAwayError, StorageError
from tally.jobs.facade import Jobs
from tally.push.base import Parcel, Receiver, Refusal
from tally.push.factory import open_receiver
from tally.push.target import Push

Cli = Callable[..., Ran]
FACTS = {"job": "j1", "model": "m", "version": 3}


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_items(tmp_path, 30)


EXPECTED = [(f"i{number:03}.jpg", n, *row) for number in range(30) for n, row in enumerate(rows_of(number))]


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def duck(tmp_path: Path) -> Iterator[str]:
    with database("duckdb", tmp_path) as found:
        yield found


def receiver(url: str, table: str = "found", **more: Any) -> Receiver:
    return open_receiver(Push(url=f"{url}#{table}", **more), FACTS)


def parcel(name: str, keys: list[str], **columns: Any) -> Parcel:
    return Parcel(name, keys, pa.table(columns))


# -- all at once -------------------------------------------------------------------------------------------------------


def test_rows_are_there_all_at_once(url: str) -> None:
    parcels = [
        parcel("p1", ["a", "b"], key=["a", "a"], n=[1, 2]),
        parcel("p2", ["c"], key=["c"], n=[3]),
    ]
    first = receiver(url)
    first.check(parcels[0].rows.schema, begun=False)
    first.deliver(parcel("p0", ["b", "z"], key=["b", "z"], n=[8, 9]))
    seen: list[list[tuple[Any, ...]]] = []

    def lost() -> None:
        if not url.startswith(("duckdb", "sqlite")):  # which nobody else can look into meanwhile
            seen.append(list(in_table(url)))
        raise OwnershipLostError("another one has it")

    with pytest.raises(OwnershipLostError):
        first.deliver_all(lambda: parcels, confirm=lost)
    with pytest.raises(OwnershipLostError):
        first.deliver(parcels[0], confirm=lost)
    before = [("b", 0, 8), ("z", 0, 9)]
    assert in_table(url) == before
    assert all(each == before for each in seen)
    for _ in range(2):  # as after a kill
        first.deliver_all(lambda: parcels)
        assert in_table(url) == [("a", 0, 1), ("a", 1, 2), ("c", 0, 3), ("z", 0, 9)]
    first.close()


def test_a_job_whose_rows_appear_when_it_is_finished(cli: Cli, items: Path, tmp_path: Path) -> None:
    with database("postgresql", tmp_path) as url:
        push = ("--push", "{when: finished}")
        given = ("score", items, "--model", tmp_path / "sizes.py", "--out", f"{url}#found", "--batch-size", 4, *push)
        execute(url, "CREATE TABLE found (key TEXT, item_row INT, size BIGINT CHECK (size < 25), part FLOAT8)")
        ran = cli(*given)
        assert ran.code == 1
        assert "refuses an item, so that none of them is there" in ran.err
        assert in_table(url) == []
        execute(url, "ALTER TABLE found DROP CONSTRAINT found_size_check")
        ran = cli(*given, "--resume")
        assert ran.code == 0, ran.err
        assert in_table(url) == EXPECTED
        assert "30 items delivered" in cli("jobs", "show", f"{url}#found").out


@pytest.mark.parametrize(
    ("push", "problem"),
    [
        ({"url": "https://h/x", "when": "finished"}, "when: finished is for tables"),
        ({"url": "mongodb://h/d#c", "when": "finished"}, "shows each document as it is written"),
        ({"url": "mongodb://h/d#c", "body": {"_id": 1}}, "without _id"),
        ({"url": "duckdb:///f#t", "body": {"a": 1}}, "body is for web addresses and documents"),
        ({"url": "mongodb://me:secret@h/d#c"}, "holds a password"),
        ({"url": "mongodb://h/#c"}, "names no server and database"),
    ],
)
def test_what_cannot_be_meant_is_refused(push: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Push(**push)


# -- DuckDB ------------------------------------------------------------------------------------------------------------


def test_duckdb_keeps_every_type(duck: str) -> None:
    rows = pa.table(
        {
            "key": ["a", "a", "b"],
            "big": pa.array([2**64 - 1, None, 0], pa.uint64()),
            "price": pa.array([Decimal("0.10"), None, None], pa.decimal128(30, 12)),
            "at": pa.array([datetime(2026, 3, 29, 1, 30, tzinfo=UTC), None, None], pa.timestamp("us", "UTC")),
            "nan": [float("nan"), None, 1.5],
            "boxes": [[{"xmin": 1.5, "label": "cat"}], None, []],
            "raw": [b"\x00\xff", None, b""],
            "day": [date(2026, 1, 2), None, None],
        }
    )
    into = receiver(duck)
    into.check(rows.schema, begun=False)
    assert into.deliver(Parcel("p1", ["a", "b", "c"], rows)) == []
    with duckdb.connect(duck.removeprefix("duckdb:///")) as connection:
        found = connection.sql("SELECT * EXCLUDE item_row FROM found ORDER BY key, item_row").to_arrow_table()
    # One NaN is no other's equal, and DuckDB's UTC has another name.
    assert str(found.to_pylist()).replace("Etc/UTC", "UTC") == str(rows.to_pylist())
    assert found.schema.field("big").type == pa.uint64()
    assert found["boxes"].to_pylist()[0] == [{"xmin": 1.5, "label": "cat"}]


def test_intervals_keep_their_nanoseconds(url: str) -> None:
    rows = pa.table({"key": ["a", "b"], "took": pa.array([123_456_789, -1], pa.duration("ns"))})
    into = receiver(url)
    into.check(rows.schema, begun=False)
    assert into.deliver(Parcel("p1", ["a", "b"], rows)) == []
    assert in_table(url) == [("a", 0, 123_456_789), ("b", 0, -1)]
    into.close()


def test_what_a_column_holds_may_be_known_late(url: str) -> None:
    key = "`key`" if url.startswith("mariadb") else "key"
    into = receiver(url)
    into.check(None, begun=False)
    assert into.deliver(parcel("p1", ["a", "b"], key=["a", "b"], n=[1, 2], score=[None, None])) == []
    assert into.deliver(parcel("p2", ["c"], key=["c"], n=[3], score=[0.5], **{"a label": ["cat"]})) == []
    assert into.deliver(parcel("p3", ["a"], key=["a"], n=[4], score=[None])) == []
    found = in_table(url, f"SELECT {key}, n, score FROM found ORDER BY 1")
    assert found == [("a", 4, None), ("b", 2, None), ("c", 3, 0.5)]
    into.close()
    whole = receiver(url, "whole")
    parcels = [parcel("p1", ["a"], key=["a"], n=[1], score=[None]), parcel("p2", ["c"], key=["c"], n=[3], score=[0.5])]
    if url.startswith("duckdb"):
        whole.deliver_all(lambda: parcels)
        assert in_table(url, "SELECT key, score FROM whole ORDER BY 1") == [("a", None), ("c", 0.5)]
    else:
        with pytest.raises(StorageError, match="lacks 'score'") as lacks:
            whole.deliver_all(lambda: parcels)
        execute(url, str(lacks.value.hint).partition(": ")[2])
        whole.deliver_all(lambda: parcels)
        assert in_table(url, f"SELECT {key}, score FROM whole ORDER BY 1") == [("a", None), ("c", 0.5)]
    whole.close()


def test_values_that_a_database_has_none_for_cost_their_item_alone(url: str) -> None:
    kind = url.partition(":")[0]
    far = pa.array([0, 2**62, 0, None], pa.timestamp("us", "UTC"))
    day = pa.array([None, None, 99_999_999, 0], pa.date32())
    rows = pa.table({"key": list("abcd"), "at": far, "day": day, "n": [1.0, 2.0, 3.0, float("inf")]})
    into = receiver(url)
    into.check(rows.schema, begun=False)
    refused = [each.key for each in into.deliver(Parcel("p1", list("abcd"), rows))]
    assert refused == {"duckdb": [], "mariadb": ["b", "c", "d"]}.get(kind, ["b", "c"])
    name = "`key`" if kind == "mariadb" else "key"
    assert [each for (each,) in in_table(url, f"SELECT {name} FROM found ORDER BY 1")] == [
        each for each in "abcd" if each not in refused
    ]
    into.close()


def test_duckdb_tables_of_the_users_own(duck: str) -> None:
    into = receiver(duck)
    rows = {"key": ["a"], "n": [300]}
    for columns, problem in (
        ("k VARCHAR", "has no column 'key'"),
        ("key VARCHAR", "lacks 'n'"),
        ("key VARCHAR, n TINYINT", "column 'n' is TINYINT there, and the results hold '300'"),
    ):
        execute(duck, f"CREATE TABLE found ({columns})")
        with pytest.raises(StorageError, match=problem) as refused:
            into.deliver(parcel("p", ["a"], **rows))
        if "lacks" in problem:
            execute(duck, str(refused.value.hint).partition(": ")[2])
            assert into.deliver(parcel("p", ["a"], **rows)) == []
        execute(duck, "DROP TABLE found")
    execute(duck, "CREATE TABLE found (key VARCHAR, n BIGINT CHECK (n < 5))")
    refused_items = into.deliver(parcel("p", list("abc"), key=list("abc"), n=[1, 9, 3]))
    assert [each.key for each in refused_items] == ["b"]
    assert in_table(duck) == [("a", 1), ("c", 3)]
    execute(duck, "DROP TABLE found")
    with pytest.raises(StorageError, match="not there any more"):
        into.deliver(parcel("p", ["a"], **rows))


def test_duckdb_waits_for_others(duck: str) -> None:
    execute(duck, "CREATE TABLE found (key VARCHAR, n BIGINT)")
    hold = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, duck.removeprefix("duckdb:///")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"open\n"
    with pytest.raises(StorageAwayError, match="lock"):
        receiver(duck).deliver(parcel("p", ["a"], key=["a"], n=[1]))
    other.communicate()
    assert receiver(duck).deliver(parcel("p", ["a"], key=["a"], n=[1])) == []


# -- MongoDB -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mongo() -> Iterator[tuple[str, StandIn]]:
    pytest.importorskip("pymongo")
    with stand_in() as found:
        yield found


def test_documents_by_key(cli: Cli, items: Path, tmp_path: Path, mongo: tuple[str, StandIn]) -> None:
    url, behind = mongo
    job = tmp_path / "job.yaml"
    job.write_text(
        f"source: items\nmodel: sizes.py\nout: {url}#inferences\n"
        "push: {body: {image: '{key}', results: '{rows}', by: '{model} of {job}', date: '{now}'}}\n"
    )
    ran = cli("run", job)
    assert ran.code == 0, ran.err
    [record] = Jobs().list().jobs
    found = behind.documents["cocoonaks.inferences"]
    rows: dict[str, list[dict[str, Any]]] = {f"i{n:03}.jpg": [] for n in range(30)}
    for key, _, size, part in EXPECTED:
        rows[key].append({"size": size, "part": part})
    assert {key: each["results"] for key, each in found.items()} == rows
    assert set(behind.writes.values()) == {1}
    assert found["i001.jpg"]["by"] == f"sizes of {record.id}"
    assert f"{url}#inferences: 30 items delivered" in cli("jobs", "show", f"{url}#inferences").out


def test_documents_keep_values_or_are_refused(mongo: tuple[str, StandIn]) -> None:
    url, behind = mongo
    into = receiver(url, "boxes")
    into.check(None, begun=False)
    moment = datetime(2026, 3, 29, 1, 30, 0, 250_000, UTC)
    assert into.deliver(parcel("p", ["a", "none"], key=["a", "a"], label=["cat", "dog"], at=[moment, None])) == []
    assert behind.documents["cocoonaks.boxes"] == {
        "a": {
            "_id": "a",
            "rows": [{"label": "cat", "at": moment.replace(tzinfo=None)}, {"label": "dog", "at": None}],
        },
        "none": {"_id": "none", "rows": []},
    }
    assert into.deliver(parcel("p", ["a"], key=["a"], label=["bird"])) == []  # a retry updates
    assert behind.documents["cocoonaks.boxes"]["a"]["rows"] == [{"label": "bird"}]
    cut = moment.replace(microsecond=1)
    keys = ["cut", "long", "big", "fine"]
    refused = into.deliver(
        parcel(
            "p",
            keys,
            key=keys,
            at=[cut, None, None, None],
            n=pa.array([1, 1, 2**64 - 1, 2], pa.uint64()),
            price=pa.array([1, Decimal("1" * 38), 1, 1], pa.decimal128(38, 0)),
            far=pa.array([0, 0, 0, 2**62], pa.timestamp("us")),
        )
    )
    assert [each.key for each in refused] == ["cut", "long", "big"]
    assert "more digits than the 34" in refused[1].reason
    assert "MongoDB keeps milliseconds" in refused[0].reason
    assert "fine" in behind.documents["cocoonaks.boxes"]
    into.close()


def test_documents_that_the_server_refuses(mongo: tuple[str, StandIn]) -> None:
    url, behind = mongo
    into = receiver(url, "c")
    deliver = lambda: into.deliver(parcel("p", list("abc"), key=list("abc"), n=[1, 2, 3]))  # noqa: E731
    behind.fault = lambda document: {"code": 121} if document["_id"] == "b" else None
    assert deliver() == [Refusal("b", "as the test asks")]
    assert set(behind.documents["cocoonaks.c"]) == {"a", "c"}
    tries = iter([{"code": 11000}, None])  # another one was faster
    behind.fault = lambda document: next(tries) if document["_id"] == "b" else None
    assert deliver() == []
    behind.fault = lambda document: {"code": 16500, "RetryAfterMs": 1}  # Cosmos DB
    with pytest.raises(StorageAwayError, match="as the test asks"):
        deliver()
    into.close()


def test_a_server_of_documents_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pymongo")
    monkeypatch.setattr("tally.push.mongodb._SECONDS", 0.2)
    into = receiver("mongodb://127.0.0.1:1/d", "c")
    with pytest.raises(StorageAwayError, match="does not answer"):
        into.deliver(parcel("p", ["a"], key=["a"], n=[1]))
    into.close()
    monkeypatch.setenv("TALLY_ALLOWED_HOSTS", "other")
    with pytest.raises(StorageError, match="not among the hosts allowed"):
        receiver("mongodb://127.0.0.1:1/d", "c")
    monkeypatch.setenv("STORE", "mongodb://me:hush-hush@127.0.0.1:1/d")
    with pytest.raises(SpecError, match="when: finished is for tables") as refused:
        open_receiver(Push(url="env:STORE#c", when="finished"), FACTS)
    assert "hush" not in str(refused.value)
