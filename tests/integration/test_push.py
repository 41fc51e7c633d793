"""Rows go to where they are pushed, each once, whoever is killed or away; what is refused is not lost, and told."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa
from tests.databases import database, engine_of, execute, in_table
from tests.extent import first
from tests.sizes import SCORER, rows_of, write_items
from tests.waiting import wait_for

from tally.alerts import webhook
from tally.errors import JobNotFoundError, StorageAwayError, StorageError
from tally.jobs.facade import Jobs
from tally.jobs.outbox import Pushes
from tally.push.base import Parcel
from tally.push.bodies import fill
from tally.push.factory import open_receiver
from tally.push.target import Push

Cli = Callable[..., Any]
FACTS = {"job": "j1", "model": "m", "version": 3}


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_items(tmp_path, 40)


def expected() -> dict[str, list[dict[str, Any]]]:
    return {
        f"i{number:03}.jpg": [{"size": size, "part": part} for size, part in rows_of(number)] for number in range(40)
    }


class Hook:
    """A web receiver. answer: by the posted JSON, the status. got: what was accepted, by its id."""

    def __init__(self) -> None:
        self.got: dict[str, Any] = {}
        self.seen: list[str] = []
        self.headers: dict[str, str] = {}
        self.body = b""
        self.answer: Callable[[Any], int] = lambda body: 200
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                name, posted = self.headers["webhook-id"], json.loads(body)
                status = hook.answer(posted)
                hook.seen.append(name)
                if 200 <= status < 300:
                    hook.got[name] = posted
                    hook.headers, hook.body = dict(self.headers), body
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"as the test asks")

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/hook"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    made = Hook()
    yield made
    made.close()


# -- web addresses -----------------------------------------------------------------------------------------------------


def test_each_item_is_posted_in_the_form_that_the_job_says(
    cli: Cli, items: Path, tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSS_KEY", "hush")
    monkeypatch.setenv(webhook.SECRET, "whsec_" + "c2VjcmV0" * 6)
    job = tmp_path / "job.yaml"
    job.write_text(
        f"source: items\nmodel: sizes.py\nout: out\npush:\n  url: {hook.url}\n"
        "  headers: {Authentication-Key: 'env:TSS_KEY'}\n"
        "  body: {type: ai-result, payload: {image: '{key}', boxes: '{rows}', by: '{model} of {job}'}}\n"
    )
    ran = cli("run", job)
    assert ran.code == 0, ran.err
    assert "all rows have arrived at http://127.0.0.1" in ran.err
    [record] = Jobs().list().jobs
    assert sorted(hook.got.values(), key=lambda each: str(each["payload"]["image"])) == [
        {"type": "ai-result", "payload": {"image": key, "boxes": rows, "by": f"sizes of {record.id}"}}
        for key, rows in expected().items()
    ]
    assert hook.headers["Authentication-Key"] == "hush"
    stamp = int(hook.headers["webhook-timestamp"])
    signed = webhook.signature(webhook.secret(), hook.headers["webhook-id"], stamp, hook.body)
    assert hook.headers["webhook-signature"] == signed
    assert "hush" not in json.dumps(record.spec)


def test_several_items_go_in_one_request(cli: Cli, items: Path, tmp_path: Path, hook: Hook) -> None:
    ran = cli(
        *("score", items, "--model", tmp_path / "sizes.py", "--out", tmp_path / "out.csv", "--batch-size", 16),
        *("--push", f"{{url: '{hook.url}', items: 16}}"),
    )
    assert ran.code == 0, ran.err
    posted = [each for some in hook.got.values() for each in some]
    assert {each["key"]: each["rows"] for each in posted} == expected()
    assert max(map(len, hook.got.values())) == 16
    assert len(posted) == 40


def test_what_is_refused_costs_itself_and_is_pushed_again_on_resuming(
    cli: Cli, items: Path, tmp_path: Path, hook: Hook
) -> None:
    hook.answer = lambda body: 422 if "i007.jpg" in json.dumps(body) else 200
    ran = cli(
        *("score", items, "--model", tmp_path / "sizes.py", "--out", tmp_path / "out.csv"),
        *("--push", f"{{url: '{hook.url}', items: 8}}"),
    )
    assert ran.code == 1
    assert (
        "one item was refused where rows are pushed; the first was i007.jpg: answered 422: as the test asks" in ran.err
    )
    [record] = Jobs().list().jobs
    assert record.state == "failed"
    shown = cli("jobs", "show", record.id).out
    assert "39 items delivered, 0 waiting, 1 refused (the first: i007.jpg: answered 422: as the test asks)" in shown
    assert hook.url not in shown  # it may be a secret
    before = dict(hook.got)
    assert {each["key"] for some in before.values() for each in _several(some)} == {*expected()} - {"i007.jpg"}
    hook.answer = lambda body: 200
    ran = cli("jobs", "resume", record.id)
    assert ran.code == 0, ran.err
    pushes = json.loads(cli("jobs", "show", record.id, "--json").out)["pushes"]
    assert (pushes["delivered"], pushes["waiting"], pushes["refused"]) == (40, 0, 0)
    [again] = [posted for name, posted in hook.got.items() if name not in before]
    assert _several(again) == [{"key": "i007.jpg", "rows": expected()["i007.jpg"]}]
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + sum(map(len, expected().values()))


def _several(posted: Any) -> list[Any]:
    return posted if isinstance(posted, list) else [posted]


def test_a_receiver_that_takes_nothing_fails_the_job_at_once(cli: Cli, items: Path, tmp_path: Path, hook: Hook) -> None:
    hook.answer = lambda body: 401
    given = ("score", items, "--model", tmp_path / "sizes.py", "--out", tmp_path / "out.csv", "--push", hook.url)
    ran = cli(*given)
    assert ran.code == 1
    assert "takes no rows: it answered 401" in ran.err
    hook.answer = lambda body: 200
    ran = cli(*given, "--resume")
    assert ran.code == 0, ran.err
    assert {each["key"]: each["rows"] for each in hook.got.values()} == expected()


def test_while_a_receiver_is_away_the_job_waits_and_a_kill_loses_nothing(
    items: Path, tmp_path: Path, hook: Hook
) -> None:
    hook.answer = lambda body: 503
    command = [
        *(sys.executable, "-m", "tally", "score", str(items), "--model", str(tmp_path / "sizes.py")),
        *("--out", str(tmp_path / "out.csv"), "--push", hook.url),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: hook.seen and [each for each in Jobs().list().jobs if each.done == 40], process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert hook.got == {}
    waiting = Jobs().pushes(str(tmp_path / "out.csv"))
    assert waiting is not None
    assert (waiting.delivered, waiting.waiting, waiting.refused) == (0, 40, 0)
    half = {"left": 20}

    def answer(body: Any) -> int:
        half["left"] -= 1
        return 200 if half["left"] >= 0 else 503

    hook.answer = answer
    resumed = subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL)
    wait_for(lambda: half["left"] < 0, resumed)
    resumed.send_signal(signal.SIGKILL)
    resumed.wait()
    hook.answer = lambda body: 200
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {each["key"]: each["rows"] for each in hook.got.values()} == expected()
    assert Counter(each["key"] for each in hook.got.values()) == dict.fromkeys(expected(), 1)  # known by their id


def test_text_of_one_name_becomes_its_value() -> None:
    values = {"rows": [1, 2], "key": "a", "score": 0.5}
    found = fill({"all": "{rows}", "of": ["{key}: {score}", "{score}", 7], "{key}": None}, values.get)
    assert found == {"all": [1, 2], "of": ["a: 0.5", 0.5, 7], "{key}": None}


@pytest.mark.parametrize("out", ["postgresql://host/db", "postgresql://host/db#", "mongodb://host/db"])
def test_a_database_without_a_table_is_no_output(cli: Cli, items: Path, tmp_path: Path, out: str) -> None:
    ran = cli("score", items, "--model", tmp_path / "sizes.py", "--out", out)
    assert (ran.code, "error: out: is a database, and names no table or collection of it\n" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("push", "problem"),
    [
        ("ftp://host/x", "should be an address"),
        ("sqlite:///#t", "names no server and database, or no file"),
        ("postgresql://[#t", "names no server and database, or no file"),
        ("postgresql://h:999999/d#t", "names no server and database, or no file"),
        ("postgresql://host/db", "should end with the table's name"),
        ("postgresql://me:secret@host/db#t", "holds a password"),
        ({"url": "sqlite:///x.db#t", "items": 5}, "items and headers are for web addresses"),
        ({"url": "https://h/x", "headers": {"X-Api-Key": "abc"}}, "the header X-Api-Key is a secret"),
        ({"url": "https://h/x", "headers": {"A\r\nB": "abc"}}, "is no header"),
        ({"url": "https://h/x", "nonsense": 1}, "nonsense"),
    ],
)
def test_what_cannot_be_meant_is_refused(cli: Cli, items: Path, tmp_path: Path, push: Any, problem: str) -> None:
    ran = cli("score", items, "--model", tmp_path / "sizes.py", "--out", tmp_path / "o", "--push", json.dumps(push))
    assert ran.code == 2
    assert problem in ran.err
    assert "secret@" not in ran.err
    assert "Traceback" not in ran.err


# -- tables ------------------------------------------------------------------------------------------------------------

KINDS = ("sqlite", "postgresql", "mariadb")
FEW = pytest.mark.parametrize("url", first(1, KINDS[1:]), indirect=True)


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield found


def test_rows_go_into_a_table_each_once(cli: Cli, items: Path, tmp_path: Path, url: str) -> None:
    given = ("score", items, "--model", tmp_path / "sizes.py", "--out", f"{url}#found", "--batch-size", 8)
    ran = cli(*given)
    assert ran.code == 0, ran.err
    rows = [(key, n, row["size"], row["part"]) for key, found in expected().items() for n, row in enumerate(found)]
    assert in_table(url) == rows
    assert cli("query", f"{url}#found", "select count(*) as n from results").out.split() == ["n", str(len(rows))]
    assert re.search(rf"pushed +to {re.escape(url)}#found: 40 items delivered", cli("jobs", "show", f"{url}#found").out)
    (items / "i004.jpg").write_bytes(b"x" * 3)  # had two rows, and gives none
    (items / "i005.jpg").write_bytes(b"x" * 1)
    assert cli(*given, "--overwrite").code == 0
    changed = {**expected(), "i004.jpg": [], "i005.jpg": [{"size": 1, "part": 0.5}]}
    assert in_table(url) == [
        (key, n, row["size"], row["part"]) for key, found in changed.items() for n, row in enumerate(found)
    ]
    before = in_table(url)
    again = cli(*given)
    assert f"the results are in {url}#found\n" in again.err, again.err
    for part in ("--limit", 3), ("--shard", "1/2"):  # as a first try, or day by day
        ran = cli(*given, *part)
        assert ran.code == 0, ran.err
        assert in_table(url) == before, "the same rows, once"


def test_values_arrive_to_the_last_digit(url: str) -> None:
    at = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)
    columns = {
        "whole": pa.array([2**63 - 1, None], "int64"),
        "huge": pa.array([2**64 - 1, 0], "uint64"),
        "money": pa.array([Decimal("12345678901234567890.123456789"), None], pa.decimal128(38, 9)),
        "fine": pa.array([0.1 + 0.2, 1e-300], "float64"),
        "text": pa.array(["naïve 🙂 'quoted' \\ \n", ""], "string"),
        "zoned": pa.array([at, None], pa.timestamp("us", "UTC")),
        "day": pa.array([at.date(), None], pa.date32()),
        "raw": pa.array([bytes(range(256)), b""], "binary"),
        "yes": pa.array([True, False], "bool"),
        "boxes": pa.array([[{"x": 1.5}], []], pa.list_(pa.struct([("x", pa.float64())]))),
    }
    rows = pa.table({"key": ["a", "b"], **columns})
    receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
    assert receiver.deliver(Parcel("p1", ["a", "b"], rows)) == []
    assert receiver.deliver(Parcel("p1", ["a", "b"], rows)) == []  # as after a kill
    receiver.close()
    engine = engine_of(url)
    table = sa.Table("found", sa.MetaData(), autoload_with=engine)
    with engine.connect() as connection:
        first, second = connection.execute(sa.select(table).order_by(table.c.key)).mappings().all()
    assert (first["whole"], Decimal(first["huge"]), Decimal(first["money"])) == (
        2**63 - 1, 2**64 - 1, Decimal("12345678901234567890.123456789"),
    )  # fmt: skip
    assert (first["text"], first["raw"], bool(first["yes"])) == (
        "naïve 🙂 'quoted' \\ \n", bytes(range(256)), True,
    )  # fmt: skip
    assert sorted(in_table(url, "SELECT fine FROM found")) == [(1e-300,), (0.1 + 0.2,)]
    assert (first["zoned"].replace(tzinfo=UTC), first["day"]) == (at, at.date())
    boxes = first["boxes"]
    assert (json.loads(boxes) if isinstance(boxes, str) else boxes) == [{"x": 1.5}]
    assert (second["whole"], second["money"], second["text"], second["raw"]) == (None, None, "", b"")
    assert (second["zoned"], second["day"], bool(second["yes"])) == (None, None, False)


def test_boxes_go_into_a_table_though_postgresql_has_names_of_its_own(url: str) -> None:
    names = ("xmin", "ymin", "xmax", "ymax", "ctid")
    rows = pa.table({"key": ["a", "a"], **{name: [n + 0.5, n + 1.5] for n, name in enumerate(names)}})
    receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
    for part in ("p1", "p1", "p2"):  # also where the table is there already
        receiver.check(rows.schema, begun=False)
        assert receiver.deliver(Parcel(part, ["a"], rows)) == []
    receiver.close()
    stored = [f"{name}_" if "postgresql" in url and name[0] in "xc" else name for name in names]
    assert in_table(url, f"SELECT {', '.join(stored)} FROM found ORDER BY item_row") == [
        (0.5, 1.5, 2.5, 3.5, 4.5), (1.5, 2.5, 3.5, 4.5, 5.5),
    ]  # fmt: skip


def test_a_table_of_the_users_own_gets_what_it_has_columns_for(url: str) -> None:
    execute(url, "CREATE TABLE found (key_id INTEGER)" if "mariadb" not in url else "CREATE TABLE found (k INT)")
    rows = pa.table({"key": ["a"], "size": [1]})
    receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
    with pytest.raises(StorageError, match="has no column 'key'"):
        receiver.deliver(Parcel("p1", ["a"], rows))
    execute(url, "DROP TABLE found")
    quoted = "`key`" if "mariadb" in url else "key"
    execute(url, f"CREATE TABLE found ({quoted} VARCHAR(100), note VARCHAR(10) DEFAULT 'mine')")
    with pytest.raises(StorageError, match="lacks 'size'") as lacking:
        receiver.deliver(Parcel("p1", ["a"], rows))
    execute(url, str(lacking.value.hint).partition(": ")[2])
    assert receiver.deliver(Parcel("p1", ["a"], rows)) == []
    assert receiver.deliver(Parcel("p2", ["a"], rows.set_column(1, "size", pa.array([2])))) == []
    assert in_table(url, f"SELECT {quoted}, note, size FROM found") == [("a", "mine", 2)]
    with pytest.raises(StorageError, match=r"'size' is BIGINT.* there, and the results hold double"):
        receiver.deliver(Parcel("p3", ["a"], rows.set_column(1, "size", pa.array([2.5]))))
    receiver.close()


def test_an_item_that_the_database_refuses_costs_itself_alone(url: str) -> None:
    quoted = "`key`" if "mariadb" in url else "key"
    execute(url, f"CREATE TABLE found ({quoted} VARCHAR(100), size BIGINT CHECK (size < 5))")
    keys = [f"k{n}" for n in range(10)]
    receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
    refused = receiver.deliver(Parcel("p1", [*keys, "long" * 200], pa.table({"key": keys, "size": list(range(10))})))
    receiver.close()
    assert sorted(each.key[:4] for each in refused) == ["k5", "k6", "k7", "k8", "k9", "long"]
    assert len(in_table(url, "SELECT size FROM found")) == 5


@FEW
def test_a_table_that_has_gone_is_not_made_anew_for_the_rest(cli: Cli, items: Path, tmp_path: Path, url: str) -> None:
    engine, process = engine_of(url), None
    # It is not to be done before it is killed, however busy the machine is.
    (tmp_path / "sizes.py").write_text(
        "import time\n" + SCORER.replace("return [", "time.sleep(0.2)\n        return [", 1)
    )
    command = [
        *(sys.executable, "-m", "tally", "score", str(items), "--model", str(tmp_path / "sizes.py")),
        *("--out", f"{url}#found", "--batch-size", "1", "-q"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: (pushes := _pushes(url)) is not None and pushes.delivered > 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    execute(url, "ALTER TABLE found RENAME TO aside")
    ran = cli("jobs", "resume", f"{url}#found")
    assert ran.code == 1
    assert "found is not there any more, and rows of this job had arrived in it" in ran.err
    assert not sa.inspect(engine).has_table("found")
    execute(url, "ALTER TABLE aside RENAME TO found")
    assert cli("jobs", "resume", f"{url}#found").code == 0
    assert in_table(url) == [
        (key, n, row["size"], row["part"]) for key, found in expected().items() for n, row in enumerate(found)
    ]


def _pushes(url: str) -> Pushes | None:
    with suppress(JobNotFoundError):
        return Jobs().pushes(f"{url}#found")
    return None


def test_a_table_that_goes_while_rows_come_is_told_at_once(url: str) -> None:
    rows = pa.table({"key": ["a"], "size": [1]})
    receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
    receiver.check(None, begun=False)
    receiver.deliver(Parcel("p1", ["a"], rows))
    execute(url, "DROP TABLE found")
    with pytest.raises(StorageError, match="found takes no rows") as gone:
        receiver.deliver(Parcel("p2", ["a"], rows))
    assert not isinstance(gone.value, StorageAwayError)
    with pytest.raises(StorageError, match="is not there any more"):
        receiver.deliver(Parcel("p2", ["a"], rows))
    receiver.close()


def test_a_table_without_the_columns_is_refused_before_anything_is_scored(
    cli: Cli, items: Path, tmp_path: Path, url: str
) -> None:
    quoted = "`key`" if "mariadb" in url else "key"
    given = ("score", items, "--model", tmp_path / "sizes.py", "--out", f"{url}#found")
    for columns, problem in (
        ("note INTEGER", "has no column 'key'"),
        (f"{quoted} VARCHAR(100), size BIGINT", "lacks 'part'"),
        (f"{quoted} VARCHAR(100), size BIGINT, part VARCHAR(9)", "column 'part' is VARCHAR"),
    ):
        execute(url, f"CREATE TABLE found ({columns})")
        ran = cli(*given)
        assert ran.code == 1
        assert problem in ran.err
        record = Jobs().get(f"{url}#found")
        assert (record.state, record.done) == ("failed", 0)
        execute(url, "DROP TABLE found")
    assert cli(*given).code == 0
    assert len(in_table(url)) == sum(map(len, expected().values()))


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_database_that_lets_nobody_in_is_told_before_anything_is_scored(
    cli: Cli, items: Path, tmp_path: Path, kind: str
) -> None:
    with database(kind, tmp_path) as url:
        for wrong in (f"{url}_not_there", re.sub("://([^@]*@)?", "://tally_nobody@", url)):
            ran = cli("score", items, "--model", tmp_path / "sizes.py", "--out", f"{wrong}#found")
            if kind == "mariadb" and ran.code == 0:
                continue  # a server that lets everybody in
            assert ran.code == 1
            assert "does not let us in: " in ran.err
            record = Jobs().get(f"{wrong}#found")
            assert (record.state, record.done) == ("failed", 0)


def _done(process: subprocess.Popen[bytes], least: int) -> bool:
    """Whether so many items are done, or the job has ended."""
    page = Jobs().list().jobs
    return process.poll() is not None or bool(page and page[0].done >= least)


@FEW
def test_a_job_that_is_killed_again_and_again_leaves_each_row_once(items: Path, tmp_path: Path, url: str) -> None:
    command = [
        *(sys.executable, "-m", "tally", "score", str(items), "--model", str(tmp_path / "sizes.py")),
        *("--out", f"{url}#found", "--batch-size", "1", "--resume", "-q"),
    ]
    for least in (1, 12, 25):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(partial(_done, process, least), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 or "already did this same job" in done.stderr, done.stderr
    assert in_table(url) == [
        (key, n, row["size"], row["part"]) for key, found in expected().items() for n, row in enumerate(found)
    ]


def test_rows_of_another_that_come_meanwhile_are_no_reason_to_refuse_the_item(tmp_path: Path) -> None:
    with database("postgresql", tmp_path) as url:
        receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
        assert receiver.deliver(Parcel("p1", ["b"], pa.table({"key": ["b"], "n": [1]}))) == []
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with engine_of(url).connect() as other, ThreadPoolExecutor(1) as pool:
            other.exec_driver_sql("INSERT INTO found (key, item_row, n) VALUES ('a', 0, 2)")
            ours = pool.submit(receiver.deliver, Parcel("p2", ["a"], pa.table({"key": ["a"], "n": [3]})))
            while in_table(url, waiting) == [(0,)]:
                assert not ours.done()
            other.commit()
            assert ours.result() == []
        receiver.close()
        assert in_table(url) == [("a", 0, 3), ("b", 0, 1)]


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        ("NUMERIC(6,1)", pa.array([Decimal("1.25")]), "decimal128"),
        ("VARCHAR(2)", pa.array(["ab   "]), "longer text"),
        ("BIGINT", pa.array([2.5]), "double"),
        ("BIGINT", pa.array(["x"]), "string"),
    ],
)
def test_a_column_that_would_change_values_is_refused(url: str, kind: str, values: Any, told: str) -> None:
    quoted = "`key`" if "mariadb" in url else "key"
    execute(url, f"CREATE TABLE found ({quoted} VARCHAR(100), v {kind})")
    receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
    with pytest.raises(StorageError, match=rf"column 'v' is .* there, and the results hold {told}"):
        receiver.deliver(Parcel("p1", ["a"], pa.table({"key": ["a"], "v": values})))
    receiver.close()
    assert in_table(url, "SELECT * FROM found") == []


def test_whole_numbers_and_times_are_not_what_a_column_makes_of_them(tmp_path: Path) -> None:
    with database("sqlite", tmp_path) as url:
        execute(url, "CREATE TABLE found (key TEXT, v NUMERIC)")
        receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
        with pytest.raises(StorageError, match="the results hold int64"):  # it would keep a float64
            receiver.deliver(Parcel("p1", ["a"], pa.table({"key": ["a"], "v": [2**53 + 1]})))
        receiver.close()
    with database("postgresql", tmp_path) as url:
        execute(url, "CREATE TABLE found (key TEXT, v TIMESTAMP)")
        receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
        zoned = pa.table({"key": ["a"], "v": pa.array([datetime(2026, 1, 1, tzinfo=UTC)])})
        with pytest.raises(StorageError, match="the results hold times with a zone"):
            receiver.deliver(Parcel("p1", ["a"], zoned))
        receiver.close()


def test_keys_that_differ_in_capitals_are_two_and_columns_are_refused(url: str) -> None:
    receiver = open_receiver(Push(url=f"{url}#found"), FACTS)
    receiver.deliver(Parcel("p1", ["A", "a"], pa.table({"key": ["A", "a"], "n": [1, 2]})))
    receiver.deliver(Parcel("p2", ["a"], pa.table({"key": ["a"], "n": [3]})))
    assert sorted(in_table(url, "SELECT n FROM found")) == [(1,), (3,)]
    receiver.close()
    for name, columns in (("b", {"x": [1], "X": [2]}), ("c", {"item_row": [1]})):
        receiver = open_receiver(Push(url=f"{url}#{name}"), FACTS)
        with pytest.raises(StorageError, match="which databases do not tell from another one"):
            receiver.deliver(Parcel("p1", ["a"], pa.table({"key": ["a"], **columns})))
        receiver.close()
