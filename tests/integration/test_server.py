"""The server's API, asked over HTTP, with jobs that really run."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any

import httpx2
import psutil
import pytest
from tests.extent import FULL
from tests.server import PATIENCE, Server, job, lengths, running, until
from tests.waiting import wait_for

from tally.jobs.facade import Jobs

STUCK = """
import os
import time
from pathlib import Path
from tally import Scorer

class Stuck(Scorer):
    input = "path"
    columns = {"length": "int64"}

    def score(self, batch):
        Path(os.environ["TALLY_HOME"], "stuck").write_text(str(os.getpid()))
        time.sleep(3600)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What requests may name: a scorer, and thirty items."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "quick.py").write_text(lengths())
    (folder / "slow.py").write_text(lengths(pause=0.2))
    (folder / "in").mkdir()
    for number in range(30):
        (folder / "in" / f"{number:02}.txt").write_text("x" * number)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        with running("--root", folder) as server:
            yield server


@pytest.fixture
def admin(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


def test_a_job_is_started_followed_and_asked(server: Server, admin: httpx2.Client, folder: Path) -> None:
    answer = admin.post("/jobs", json=job(folder, "whole"))
    assert answer.status_code == 202
    started = answer.json()
    assert (started["state"], started["items"]) == ("waiting", 0)

    states = []
    with admin.stream("GET", f"/jobs/{started['id']}/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        states += [json.loads(line[5:])["state"] for line in events.iter_lines() if line.startswith("data:")]
    assert states[-1] == "finished"  # the stream has ended by itself

    view = admin.get(f"/jobs/{started['id']}").json()
    assert (view["done"], view["dead"], view["items"], view["columns"]) == (30, 0, 30, {"length": "int64"})
    assert json.loads((folder / "whole" / "_manifest.json").read_text())["counts"]["rows"] == 30
    assert [each["id"] for each in admin.get("/jobs", params={"text": "whole"}).json()["jobs"]] == [started["id"]]


def test_results_are_asked_with_sql_and_nothing_else_is(admin: httpx2.Client, folder: Path) -> None:
    started = admin.post("/jobs", json=job(folder, "asked")).json()["id"]
    until(admin, started, lambda view: view["state"] == "finished")

    def ask(sql: str, limit: int = 100) -> httpx2.Response:
        return admin.post(f"/jobs/{started}/query", json={"sql": sql, "limit": limit})

    assert ask("select sum(length)::bigint as all from results").json() == {
        "columns": {"all": "int64"}, "rows": [{"all": sum(range(30))}], "truncated": False,
    }  # fmt: skip
    some = ask("select key from results", limit=3).json()
    assert (len(some["rows"]), some["truncated"]) == (3, True)
    for sql in (
        "from read_text('/etc/passwd')",
        "from '/etc/passwd'",
        "copy results to '/tmp/stolen.csv'",
        "attach '/tmp/other.db'",
        "select 1; select 2",
        "install httpfs",
        "set memory_limit = '100GB'",
        "no sql at all",
    ):
        answer = ask(sql)
        assert (answer.status_code, answer.json()["error"]["type"]) == (422, "SpecError"), sql
    many = ask("from range(1000000000000)")
    assert many.status_code == 422 or many.json()["truncated"]
    assert ask("select 1 as one").json()["rows"] == [{"one": 1}]  # it still answers


def test_rows_go_into_a_table_under_a_root(admin: httpx2.Client, folder: Path) -> None:
    fields = job(folder, "") | {"out": f"sqlite:///{folder / 'rows.db'}#lengths"}
    started = admin.post("/jobs", json=fields).json()["id"]
    until(admin, started, lambda view: view["state"] == "finished")
    with closing(sqlite3.connect(folder / "rows.db")) as connection:
        assert connection.execute("SELECT sum(length), count(*) FROM lengths").fetchall() == [(sum(range(30)), 30)]
    assert len(admin.get(f"/jobs/{started}/rows").json()["rows"]) == 30
    refused = admin.post("/jobs", json=fields | {"out": "sqlite:////etc/rows.db#lengths"})
    assert (refused.status_code, "may name" in refused.json()["error"]["message"]) == (422, True)


def test_the_same_job_again_is_a_failure_that_names_the_first(admin: httpx2.Client, folder: Path) -> None:
    first = admin.post("/jobs", json=job(folder, "again")).json()
    until(admin, first["id"], lambda view: view["state"] == "finished")
    second = admin.post("/jobs", json=job(folder, "again")).json()
    failed = until(admin, second["id"], lambda view: view["state"] == "failed")
    assert first["id"] in failed["error"]
    third = admin.post("/jobs", json=job(folder, "again"), params={"overwrite": "true"}).json()
    until(admin, third["id"], lambda view: view["state"] == "finished")


def test_dead_items_are_listed_and_replayed(admin: httpx2.Client, folder: Path) -> None:
    source = folder / "with-bad"
    source.mkdir()
    (source / "a.txt").write_text("fine")
    (source / "b.txt").write_text("bad")
    asked = job(folder, "dead") | {"source": [str(source)]}
    started = admin.post("/jobs", json=asked).json()
    ended = until(admin, started["id"], lambda view: view["state"] == "finished")
    assert (ended["done"], ended["dead"]) == (2, 1)
    dead = admin.get(f"/jobs/{started['id']}/dead").json()
    assert dead == {"dead": [{"key": "b.txt", "stage": "score", "error": dead["dead"][0]["error"]}], "next": None}
    assert "a bad item" in dead["dead"][0]["error"]

    (source / "b.txt").write_text("mended")
    assert admin.post(f"/jobs/{started['id']}/retry").status_code == 200
    replayed = until(admin, started["id"], lambda view: view["state"] == "finished" and view["dead"] == 0)
    assert replayed["rows"] == 2


def test_a_running_job_is_paused_resumed_and_cancelled(admin: httpx2.Client, folder: Path) -> None:
    asked = job(folder, "changed", scorer="slow", batch_size=1)
    started = admin.post("/jobs", json=asked).json()["id"]
    until(admin, started, lambda view: view["done"] > 0)
    assert admin.post(f"/jobs/{started}/pause").status_code == 200
    until(admin, started, lambda view: view["state"] == "paused")
    assert admin.post(f"/jobs/{started}/resume").status_code == 200
    until(admin, started, lambda view: view["state"] == "running")
    assert admin.post(f"/jobs/{started}/cancel").status_code == 200
    until(admin, started, lambda view: view["state"] == "cancelled")
    again = admin.post(f"/jobs/{started}/resume")
    assert (again.status_code, again.json()["error"]["type"]) == (409, "JobStateError")
    assert admin.delete(f"/jobs/{started}").status_code == 204
    assert admin.get(f"/jobs/{started}").status_code == 404


def test_what_cannot_begin_says_why(admin: httpx2.Client, folder: Path) -> None:
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    started = admin.post("/jobs", json=job(folder, "broken", scorer="broken")).json()
    failed = until(admin, started["id"], lambda view: view["state"] == "failed")
    assert "nothing_of_that_name" in failed["error"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"source": ["/etc"]}, "not under a folder that requests may name"),
        ({"source": ["../in"]}, "not under a folder that requests may name"),
        ({"out": "/etc/out"}, "not under a folder that requests may name"),
        ({"queue": {"base": "/etc"}}, "not under a folder that requests may name"),
        ({"model": "os:system"}, "names code of the server's own environment"),
        ({"model": "/etc/evil.py:Class"}, "not under a folder that requests may name"),
        ({"model": "http://127.0.0.1:9/model.onnx"}, "is a private address"),
        ({"model": "http://169.254.169.254/latest"}, "is a private address"),
        ({"webhook": "http://localhost/hook", "alerts": ["dead > 1"]}, "is a private address"),
        ({"push": "http://127.0.0.1/rows"}, "is a private address"),
        ({"push": "postgresql://localhost/db#t"}, "is a private address"),
        ({"push": "sqlite:////etc/rows.db#t"}, "not under a folder that requests may name"),
        ({"push": "env:SECRET"}, "a variable of the server's own environment"),
        ({"push": {"url": "https://1.1.1.1", "headers": {"X": "env:SECRET"}}}, "the server's own environment"),
        ({"batchsize": 3}, "batch_size"),
    ],
)
def test_what_may_not_be_named_is_refused(
    admin: httpx2.Client, folder: Path, fields: dict[str, Any], said: str
) -> None:
    answer = admin.post("/jobs", json=job(folder, "refused") | fields)
    assert answer.status_code == 422
    assert said in answer.text


def test_a_class_is_named_with_its_file(admin: httpx2.Client, folder: Path) -> None:
    other = "class Other(tally.Scorer):\n    def score(self, batch):\n        raise ValueError\n"
    (folder / "two.py").write_text(f"{lengths()}\n{other}")
    wanted = job(folder, "class") | {"model": f"{folder / 'two.py'}:Lengths"}
    started = admin.post("/jobs", json=wanted).json()["id"]
    assert until(admin, started, lambda view: view["state"] == "finished")["done"] == 30
    for hidden in ("two.py:/../../etc/passwd", "two.py:No such", "two.py:"):
        answer = admin.post("/jobs", json=wanted | {"model": f"{folder}/{hidden}"})
        assert (answer.status_code, "tally models add NAME FILE.py:Class" in answer.text) == (422, True)


def test_links_do_not_lead_out_of_a_root(admin: httpx2.Client, folder: Path) -> None:
    (folder / "etc").symlink_to("/etc")
    answer = admin.post("/jobs", json=job(folder, "refused") | {"source": [str(folder / "etc")]})
    assert answer.status_code == 422


def test_roles(server: Server, admin: httpx2.Client, folder: Path) -> None:
    made = {role: admin.post("/keys", json={"name": role, "role": role}).json() for role in ("viewer", "operator")}
    with server.client(made["viewer"]["text"]) as viewer, server.client(made["operator"]["text"]) as operator:
        assert viewer.get("/jobs").status_code == 200
        refused = viewer.post("/jobs", json=job(folder, "by-viewer"))
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            403,
            "this needs the role operator, and 'viewer' is viewer",
        )
        assert operator.post("/jobs", json=job(folder, "by-operator")).status_code == 202
        assert operator.get("/keys").status_code == 403
        assert operator.delete("/jobs/0").status_code == 403
        key = made["viewer"]["id"]
        assert admin.post(f"/keys/{key}/revoke").json()["state"] == "revoked"
        assert viewer.get("/jobs").status_code == 401
    assert made["viewer"]["text"] not in admin.get("/keys").text
    lines = admin.get("/audit").json()
    assert ("operator", "start_job", 202) in [(each["who"], each["action"], each["status"]) for each in lines]


def test_without_a_key_only_health_answers(server: Server) -> None:
    with httpx2.Client(base_url=server.url, timeout=60) as nobody:
        for path in ("/api/v1/jobs", "/api/v1/keys", "/api/v1/audit", "/api/v1/me"):
            answer = nobody.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "RefusedError")
        assert nobody.get("/healthz").json()["status"] == "ok"
        assert nobody.get("/readyz").json()["status"] == "ok"
        assert 'tally_jobs{state="running"}' in nobody.get("/metrics", timeout=60).text


def test_large_bodies_and_odd_requests_are_refused(server: Server, admin: httpx2.Client) -> None:
    assert admin.post("/jobs", content=b"x" * (2 << 20)).status_code == 413
    assert admin.post("/jobs", content=iter([b"x" * (2 << 20)])).status_code == 413
    assert admin.post("/jobs", json=[1]).status_code == 422
    assert admin.get("/jobs/..%2f..").status_code in (404, 422)
    assert admin.get("/jobs", params={"after": "nonsense"}).status_code == 422
    assert admin.get("/jobs", params={"limit": "0"}).status_code == 422


def test_who_has_connected_before_a_server_ends_gets_an_answer(folder: Path) -> None:
    """Also whose request is on its way by then, and whom nobody has accepted."""
    lost: list[str] = []
    answered = Semaphore(0)

    def ask(client: httpx2.Client) -> None:
        while True:
            try:
                status = client.get("/jobs", headers={"Connection": "close"}).status_code
            except httpx2.ConnectError:
                return
            except httpx2.HTTPError as error:
                lost.append(repr(error))
                return
            if status != 200:
                lost.append(str(status))
            answered.release()

    with running("--root", folder) as server, server.client() as client:
        threads = [Thread(target=ask, args=(client,)) for _ in range(16)]
        for each in threads:
            each.start()
        for _ in range(100):
            assert answered.acquire(timeout=PATIENCE)
        server.process.terminate()
        for each in threads:
            each.join()
    assert lost == []


def test_a_killed_server_loses_no_job(folder: Path, home: Path) -> None:
    """Three jobs, two of which run, one waits; the server is killed, and so is a coordinator; another server starts."""
    with running("--root", folder, "--parallel", 2) as first:
        with first.client() as client:
            asked = [job(folder, f"killed-{number}", scorer="slow", batch_size=1) for number in range(3)]
            ids = [client.post("/jobs", json=each).json()["id"] for each in asked]
            for each in ids[:2]:
                until(client, each, lambda view: view["done"] > 0)
            assert client.get(f"/jobs/{ids[2]}").json()["state"] == "waiting"
        coordinators = [each for each in psutil.process_iter(["cmdline"]) if ids[0] in (each.info["cmdline"] or ())]
        first.kill()
        assert len(coordinators) == 1
        os.kill(coordinators[0].pid, signal.SIGKILL)
        key = first.key
    with running("--root", folder, "--parallel", 2) as second, second.client(key) as client:
        assert second.key == ""
        for each in ids:
            ended = until(
                client, each, lambda view: view["state"] not in ("waiting", "running", "interrupted", "created")
            )
            assert (ended["state"], ended["done"], ended["rows"], ended["dead"]) == ("finished", 30, 30, 0)


def test_a_killed_job_is_not_shown_as_running(folder: Path, home: Path) -> None:
    """Nor is one whose parent has not asked about its end: a zombie is dead, too. A server goes on with it."""
    asked = job(folder, "orphan", scorer="slow")
    command = ["score", *asked["source"], "--model", asked["model"], "--out", asked["out"], "--batch-size", "1", "-q"]
    with subprocess.Popen([sys.executable, "-m", "tally", *command], stderr=subprocess.DEVNULL) as process:
        try:
            store = Jobs().store
            wait_for(lambda: any(record.done for record in store.newest(limit=1)), process)
            os.kill(process.pid, signal.SIGKILL)
            while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
            [record] = store.newest(limit=1)
            assert (record.state, record.alive) == ("interrupted", False)
            with running("--root", folder) as server, server.client() as client:
                ended = until(client, record.id, lambda view: view["state"] == "finished")
        finally:
            process.kill()
    assert (ended["done"], ended["rows"], ended["dead"]) == (30, 30, 0)


def test_what_processes_write_is_read(server: Server, admin: httpx2.Client, folder: Path, home: Path) -> None:
    (folder / "loud.py").write_text(
        lengths().replace(
            "def score(self, batch):", 'def score(self, batch):\n        print("took", len(batch), "\\x1b[2J")'
        )
    )
    started = admin.post("/jobs", json=job(folder, "loud", scorer="loud", batch_size=10)).json()["id"]

    def log() -> dict[str, list[str]]:
        told: dict[str, list[str]] = admin.get(f"/jobs/{started}/log").json()
        return told

    until(admin, started, lambda view: view["state"] == "finished")
    deadline = time.monotonic() + PATIENCE  # the state is there before the line
    while f"job {started} is finished" not in "".join(log()["coordinator"]):
        assert time.monotonic() < deadline, log()
        time.sleep(0.05)
    assert log()["workers"] == ["took 10 \\x1b[2J"] * 3
    assert admin.get(f"/jobs/{started}/log", params={"lines": 1}).json()["workers"] == ["took 10 \\x1b[2J"]
    assert admin.get("/jobs/nosuchjob/log").status_code == 404
    # The same on this machine, of a job without a server.
    command = ["score", str(folder / "in"), "--model", str(folder / "loud.py"), "--out", str(folder / "loud-too"), "-q"]
    subprocess.run([sys.executable, "-m", "tally", *command], check=True)
    told = subprocess.run(
        [sys.executable, "-m", "tally", "jobs", "log", str(folder / "loud-too")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "took" in told.stdout
    assert "workers:" in told.stderr


def test_a_cancelled_job_leaves_no_process(folder: Path, home: Path) -> None:
    """Not even where its scorer never returns."""
    (folder / "stuck.py").write_text(STUCK)
    with running("--root", folder) as server, server.client() as client:
        started = client.post("/jobs", json=job(folder, "stuck", scorer="stuck")).json()["id"]
        until(client, started, lambda view: (home / "stuck").exists())
        family = psutil.Process(server.process.pid).children(recursive=True)
        mine = [each for each in family if started in each.cmdline() or str(each.pid) == (home / "stuck").read_text()]
        assert len(mine) == 2, "its coordinator and its worker"
        began = time.monotonic()
        assert client.post(f"/jobs/{started}/cancel").status_code == 200
        _, alive = psutil.wait_procs(mine, PATIENCE)
        assert not alive
        if FULL:  # on a machine that does nothing else
            assert time.monotonic() - began < 5
        assert client.get(f"/jobs/{started}").json()["state"] == "cancelled"


def test_others_are_not_let_in_before_there_is_a_key(home: Path) -> None:
    pytest.importorskip("fastapi")
    command = [sys.executable, "-m", "tally", "up", "--host", "0.0.0.0", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "nobody has a key" in ended.stderr
    assert "tally keys add" in ended.stderr


def test_logs_are_json_where_that_is_asked_for(folder: Path, home: Path, tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("wb") as log,
        running("--root", folder, "--log-format", "json", log=log) as server,
        server.client() as client,
    ):
        started = client.post("/jobs", json=job(folder, "logged")).json()["id"]
        until(client, started, lambda view: view["state"] == "finished")
    lines = (home / "logs" / f"{started}.coordinator.log").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert {each["job"] for each in found} == {started}
    assert found[-1]["message"] == f"job {started} is finished"
    (begun,) = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())  # libraries are silent
    assert (begun["message"], begun["job"]) == (f"job {started} has a process: submit", started)


def test_metrics_tell_of_running_jobs(server: Server, admin: httpx2.Client, folder: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def sampled() -> dict[tuple[str, ...], float]:
        text = httpx2.get(f"{server.url}/metrics", timeout=60).text
        families = list(text_string_to_metric_families(text))
        assert all(family.documentation for family in families)
        return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}

    started = admin.post("/jobs", json=job(folder, "measured", scorer="slow", batch_size=1)).json()["id"]
    until(admin, started, lambda view: view["done"] > 0)
    samples = sampled()
    view = admin.get(f"/jobs/{started}").json()
    assert samples["tally_jobs", "running"] >= 1
    assert 0 < samples["tally_job_items_done_total", started] <= view["done"]
    assert samples["tally_job_rows_total", started] == samples["tally_job_items_done_total", started]
    assert samples["tally_job_items_dead_total", started] == 0
    assert samples["tally_job_items_queued", started] > 0
    assert samples["tally_job_chunks_total", started] >= 1
    assert samples["tally_job_chunk_seconds_total", started] > 0
    assert samples["tally_job_stage_seconds_total", started, "score"] > 0
    assert samples["tally_job_workers", started] == 1
    admin.post(f"/jobs/{started}/cancel")
    until(admin, started, lambda view: view["state"] == "cancelled")
    assert not [name for name in sampled() if started in name]
