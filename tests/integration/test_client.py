"""``tally.Client`` and ``tally --server``: what can be done here can be done on a server, with the same words."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import click
import psutil
import pytest
from click.testing import CliRunner
from tests.server import Server, lengths, running
from tests.waiting import wait_for
from tests.workflows import waiting

import tally
from tally.cli.main import cli
from tally.errors import (
    JobNotFoundError,
    JobStateError,
    KeyNotFoundError,
    ModelNotFoundError,
    PipelineNotFoundError,
    PipelineStateError,
    RefusedError,
    RunNotFoundError,
    RunStateError,
    ServerAwayError,
    SourceNotFoundError,
    SpecError,
    TallyError,
    TriggerNotFoundError,
)
from tally.pipelines.steps import room
from tally.training.sweeps.store import SweepStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "quick.py").write_text(lengths())
    (folder / "slow.py").write_text(lengths(pause=0.3))
    (folder / "in").mkdir()
    for number in range(20):
        (folder / "in" / f"{number:02}.txt").write_text("x" * number)
    (folder / "in" / "20.txt").write_text("bad")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        with running("--root", folder, "--price-per-hour", 2) as server:
            yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[tally.Client]:
    with tally.Client(server.url, key=server.key) as client:
        yield client


def fields(folder: Path, out: str, **more: Any) -> dict[str, Any]:
    return {
        "source": folder / "in", "model": folder / "quick.py", "out": folder / out, "workers": 1, "batch_size": 1,
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(client: tally.Client, folder: Path) -> str:
    started = client.submit(**fields(folder, "whole"))
    *_, last = client.follow(started.id)
    assert (last.state, last.done, last.dead) == ("finished", 21, 1)
    return started.id


# -- the client --------------------------------------------------------------------------------------------------------


def test_jobs(client: tally.Client, folder: Path, finished: str) -> None:
    detail = client.get(str(folder / "whole"))
    assert (detail.id, detail.columns, detail.rows) == (finished, {"length": "int64"}, 20)
    assert [each.id for each in client.list(out=str(folder / "whole")).jobs] == [finished]
    assert [each.key for each in client.dead(finished)] == ["20.txt"]
    assert client.alerts(finished) == client.alerts(finished, send=True) == []
    with pytest.raises(JobNotFoundError, match="no job 'zzz'"):
        client.get("zzz")
    with pytest.raises(JobStateError):
        client.pause(finished)
    with pytest.raises(SpecError) as raised:
        client.submit(**fields(folder, "x", batchsize=1, source="/etc"))
    assert "batch_size" in str(raised.value)


def test_a_running_job_is_asked(client: tally.Client, folder: Path) -> None:
    started = client.submit(**fields(folder, "asked", model=folder / "slow.py"))
    for view in client.follow(started.id):
        if view.state == "running" and view.done and view.id == started.id:
            client.pause(started.id)
            break
    for view in client.follow(started.id):
        if view.state == "paused":
            client.resume(started.id)
        if view.state == "running" and view.done > 1:
            client.cancel(started.id)
            break
    *_, last = client.follow(started.id)
    assert last.state == "cancelled"
    client.delete(started.id)
    with pytest.raises(JobNotFoundError):
        client.get(started.id)


def test_dead_items_are_replayed(client: tally.Client, folder: Path, tmp_path: Path) -> None:
    (folder / "mended").mkdir()
    (folder / "mended" / "a.txt").write_text("a")
    (folder / "mended" / "b.txt").write_text("bad")
    started = client.submit(**fields(folder, "replayed", source=[folder / "mended"]))
    *_, last = client.follow(started.id)
    assert last.dead == 1
    (folder / "mended" / "b.txt").write_text("good")
    assert client.retry(started.id).starting
    *_, last = client.follow(started.id)
    assert (last.dead, last.rows) == (0, 2)


def test_results(client: tally.Client, finished: str, folder: Path, tmp_path: Path) -> None:
    table = client.results(finished)
    assert (table.num_rows, table.column_names) == (20, ["key", "length"])
    assert client.query(finished, "select sum(length)::bigint as s from results").to_pylist() == [{"s": 190}]
    assert client.query(finished, "from results", limit=3).num_rows == 3
    for order in ("source", "key"):
        assert [row["length"] for row in client.rows(finished, order=order)] == list(range(20))  # type: ignore[arg-type]
    names = [each.name for each in client.files(finished)]
    assert "_manifest.json" in names
    for name in names:
        path = client.download(finished, name, tmp_path / "file")
        assert path.read_bytes() == (folder / "whole" / name).read_bytes()
    with pytest.raises(SourceNotFoundError):
        client.download(finished, "../quick.py", tmp_path / "stolen")
    assert not (tmp_path / "stolen").exists()
    with pytest.raises(SpecError, match="can only be read"):
        client.query(finished, "create table x as from results")


def test_uploads_are_sources(client: tally.Client, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    (tmp_path / "pictures" / "a.txt").write_text("a")
    (tmp_path / "pictures" / "deep" / "b.txt").write_text("bb")
    (tmp_path / "pictures" / ".hidden").write_text("no")
    kept = client.upload(tmp_path / "pictures")
    assert [each.name for each in kept.files] == ["pictures/a.txt", "pictures/deep/b.txt"]
    started = client.submit(**fields(folder, "uploaded", source=kept.place))
    *_, last = client.follow(started.id)
    assert (last.state, last.rows) == ("finished", 2)
    assert [each.bytes for each in client.upload(tmp_path / "pictures" / "a.txt").files] == [1]
    with pytest.raises(SourceNotFoundError):
        client.upload(tmp_path / "nothing")


def test_models(client: tally.Client, folder: Path) -> None:
    first = client.add_model("lengths", folder / "quick.py", alias="champion", metadata={"by": "ada"})
    assert (str(first), first.aliases, first.metadata["by"]) == ("models:/lengths/1", ("champion",), "ada")
    assert client.add_model("lengths", folder / "quick.py").existed
    second = client.add_model("lengths", str(folder / "slow.py"))
    assert client.set_alias("lengths", "champion", second.version).version == 2
    assert client.set_alias("lengths", "passing", 1).aliases == ("passing",)
    assert client.remove_alias("lengths", "passing").version == 1
    assert client.rollback("lengths", "champion").version == 1
    assert client.tag_model("lengths", 2, {"stage": "trial"}).metadata["tags"] == {"stage": "trial"}
    assert [change.action for change in client.model("lengths").history][-1] == "rollback"
    client.remove_model("lengths", 2)
    assert [str(each) for each in client.models() if each.name == "lengths"] == ["models:/lengths/1"]
    with pytest.raises(ModelNotFoundError):
        client.model("nothing")
    started = client.submit(**fields(folder, "by-name", model="models:/lengths@champion"))
    *_, last = client.follow(started.id)
    assert (last.state, last.model.version) == ("finished", 1)


def test_schedules_watches_keys_and_figures(client: tally.Client, server: Server, folder: Path) -> None:
    job = fields(folder, "times/{interval_start:%Y%m%dT%H%M}")
    added = client.add_schedule("nightly", job, cron="0 3 * * *", catch_up="none")
    assert client.schedule("nightly").schedule == added == client.schedules()[0].schedule
    assert client.pause_schedule("nightly").paused
    with pytest.raises(JobStateError):
        client.run_schedule("nightly")
    assert not client.resume_schedule("nightly").paused
    assert client.run_schedule("nightly").state == "pending"

    (folder / "drop").mkdir()
    watch = client.add_watch("drop", str(folder / "drop"), fields(folder, "drops/{stem}", source="{url}"))
    assert (watch.there, client.watches()[0].watch.name, client.watch("drop").objects) == (0, "drop", {})
    assert client.pause_watch("drop").paused
    assert not client.resume_watch("drop").paused
    client.remove_watch("drop")

    made = client.add_key("bob", "viewer", days=1)
    with tally.Client(server.url, key=made.text) as viewer:
        assert viewer.me().name == "bob"
        with pytest.raises(RefusedError, match="needs the role operator") as raised:
            viewer.submit(**fields(folder, "refused"))
        assert raised.value.status == 403
        assert client.revoke_key(made.id).state == "revoked"
        with pytest.raises(RefusedError, match="revoked"):
            viewer.me()
    assert "bob" in [each.name for each in client.keys()]  # noqa: SIM118 - it is no dict
    assert client.audit(limit=5)
    assert client.figures().price_per_hour == 2
    for call in (client.queue_depth, client.queue_messages, client.replay_queue):
        with pytest.raises(SpecError, match="is a private address"):
            call("redis://127.0.0.1/0/stream")


def test_the_key_is_never_shown(server: Server) -> None:
    client = tally.Client(server.url, key=server.key)
    shown = f"{client!r} {client} {vars(client)!r} {client._http!r} {client._http.headers!r}"
    assert server.key not in shown
    for url, key in (
        ("ftp://x", "k"),
        ("http://u:p@host", "k"),
        (server.url, "bad\r\nX: y"),
        ("", ""),
        ("http://[", "k"),
    ):
        with pytest.raises(SpecError) as raised:
            tally.Client(url, key=key)
        assert "bad" not in str(raised.value)


def test_runs_of_a_server(server: Server, client: tally.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_HOME", psutil.Process(server.process.pid).environ()["TALLY_HOME"])
    with tally.training.run("far", {"rate": 0.5}, kind="retrain") as run:
        for step in range(10):
            run.log({"loss": step, "odd": math.inf}, step=step)
    assert [each.id for each in client.runs(kind="retrain", text="FAR", state="finished").runs] == [run.id]
    assert client.runs(state="failed").runs == []
    detail = client.run(run.id[:6])
    assert (detail.parameters, detail.metrics["loss"].most, detail.metrics["odd"].last) == ({"rate": 0.5}, 9, None)
    assert detail.environment["python"].startswith("3.")
    values = client.run_values(run.id, most=4)
    assert (values["loss"].steps, values["loss"].values) == ([0, 3, 6, 9], [0, 3, 6, 9])
    assert values["odd"].values == [None] * 4
    assert list(client.run_values(run.id, ["loss"])) == ["loss"]
    with pytest.raises(SpecError, match="no metric 'los'; did you mean 'loss'"):
        client.run_values(run.id, ["los"])
    client.delete_run(run.id)
    assert not run.folder.exists()
    with pytest.raises(RunNotFoundError):
        client.run(run.id)


def test_sweeps_of_a_server(server: Server, client: tally.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page in the API, its methods, and the commands for it, with ``--server`` and without."""
    home = Path(psutil.Process(server.process.pid).environ()["TALLY_HOME"])
    monkeypatch.setenv("TALLY_HOME", str(home))
    store = SweepStore.open()
    spec = {"texts": ["x=0..1"], "metric": "loss", "lowest": True, "sampler": "tpe", "seed": 1, "prune": False}
    lease = store.create(sweep_id="swept", name="far", kind="script", folder=str(home / "sweeps" / "swept"), spec=spec)
    (home / "sweeps" / "swept").mkdir(parents=True)
    for number, loss in enumerate((0.5, 0.25)):
        with tally.training.run(f"far {number}", {"x": number}, sweep="swept") as run:
            run.log("loss", loss)
        store.begin_trial(lease, number, run.id, {"x": number})
        store.end_trial(lease, number, "finished", value=loss, step=0)

    def said(*arguments: object, remote: bool = True) -> str:
        options = ["--server", server.url, "--key", server.key] if remote else []
        ran = CliRunner().invoke(cli, [*options, *map(str, arguments)])
        assert ran.exit_code == 0, ran.output
        return ran.output

    for arguments in (
        ("sweep", "list"), ("sweep", "show", "swe", "--best"), ("runs", "list", "--sweep", "swept"),
        ("runs", "show", run.id, "--metric", "loss"), ("runs", "compare", "--sweep", "swept", "--metric", "loss"),
        ("sweep", "delete", "swept", "--dry-run"), ("runs", "delete", run.id, "--dry-run"),
    ):  # fmt: skip
        there = said(*arguments)
        assert ("sweep" in arguments and "swept" in there) or run.id in there or "0.25" in there
        assert there == said(*arguments, remote=False)
    assert "trial 1 so far" in said("sweep", "show", "swept")
    detail = client.sweep("swe")
    assert (detail.state, detail.alive, detail.counts, detail.has_made) == ("running", True, {"finished": 2}, True)
    assert [each.value for each in detail.trials] == [0.5, 0.25]
    with pytest.raises(RunStateError, match="is running"):
        client.delete_sweep("swept")
    store.finish(lease, "finished", best=1)
    assert [(each.best, each.best_value) for each in client.sweeps(limit=1).sweeps] == [(1, 0.25)]
    assert run.id in said("runs", "delete", run.id, "--keep-files")
    assert run.folder.is_dir()
    assert "with 1 runs and its files in" in said("sweep", "delete", "swept")
    assert not (home / "sweeps" / "swept").exists()
    assert client.runs(sweep="swept").runs == []
    with pytest.raises(RunNotFoundError, match="no sweep 'swept'"):
        client.sweep("swept")
    for arguments in (("sweep", "resume", "x"), ("runs", "reproduce", "x"), ("sweep", "retrain", "-p", "seed=1")):
        ran = CliRunner().invoke(cli, ["--server", server.url, *arguments])
        assert "works from this machine" in ran.output


@pytest.mark.skipif(room.refusal() is not None, reason="steps cannot have a file system of their own here")
def test_pipelines_of_a_server(
    server: Server, client: tally.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that wait for a person go on and end in processes of the server's; commands say the same here."""
    home = Path(psutil.Process(server.process.pid).environ()["TALLY_HOME"])
    monkeypatch.setenv("TALLY_HOME", str(home))
    run, other = waiting(tmp_path), waiting(tmp_path)

    def said(*arguments: str, remote: bool = True, code: int = 0) -> str:
        options = ["--server", server.url, "--key", server.key] if remote else []
        ran = CliRunner().invoke(cli, [*options, "pipeline", *arguments])
        assert ran.exit_code == code, ran.output
        return ran.output

    for arguments in (("list",), ("list", "-n", "1"), ("logs", run), ("logs", run, "greet")):
        assert said(*arguments) == said(*arguments, remote=False)
    # But for how long it has been waiting.
    there, here = (re.sub(r"\d+s", "", said("show", run, remote=each)) for each in (True, False))
    assert there == here
    assert "ǁ approve" in there
    assert "postgres://u:***@h/d" in there
    page = client.pipelines(limit=1)
    assert [each.id for each in page.runs + client.pipelines(after=page.next).runs] == [other, run]
    detail = client.pipeline(run)
    assert (detail.state, detail.alive, detail.has_made) == ("waiting", False, True)
    (question,) = detail.questions
    assert [(each.name, each.choices, each.needed, each.suggested) for each in question.wanted] == [
        ("verdict", ["yes", "no"], True, "no"), ("note", [], False, ""),
    ]  # fmt: skip
    assert client.pipeline_logs(run)[0].lines == ["hello <b>world</b>"]
    with pytest.raises(SpecError, match=r"verdict=maybe: should be one of yes, no"):
        client.resume_pipeline(run, {"verdict": "maybe"})
    with pytest.raises(SpecError, match="no step 'aprove' waits; did you mean 'approve'"):
        client.resume_pipeline(run, {"verdict": "yes"}, step="aprove")
    assert "approve goes on" in said("resume", run, "approve", "-p", "verdict=yes")
    wait_for(lambda: client.pipeline(run).state == "succeeded", server.process)
    assert [each.lines for each in client.pipeline_logs(run)] == [
        ["hello <b>world</b>"], ["answer yes"], ["bye Succeeded"],
    ]  # fmt: skip
    with pytest.raises(PipelineStateError, match="is succeeded already"):
        client.cancel_pipeline(run)
    said("cancel", other)
    wait_for(lambda: client.pipeline(other).state == "cancelled", server.process)
    assert said("logs", other).splitlines()[-1].endswith("bye Failed")
    for each in (run, other):
        assert f"deleted {each}" in said("delete", each)
        assert not (home / "pipelines" / each).exists()
        with pytest.raises(PipelineNotFoundError, match=f"no pipeline '{each}'"):
            client.pipeline(each)
    for arguments in (("run", "x.yaml"), ("check", "x.yaml"), ("logs", "x", "--follow")):
        assert "works from this machine" in said(*arguments, code=2)


def test_there_is_a_method_for_each_route(
    server: Server, client: tally.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[tuple[str, str]] = set()

    class Enough(Exception):
        pass

    def note(method: str, path: str, **_: Any) -> Any:
        asked.add((method, re.sub(r"\b1\b", "{}", path)))
        raise Enough

    monkeypatch.setattr(client, "_send", note)
    monkeypatch.setattr(client, "_stream", note)
    monkeypatch.setattr(client, "_events", lambda path: note("GET", path))
    calls: list[Callable[[], Any]] = [
        lambda: client.submit(), lambda: client.get("1"), lambda: client.list(), lambda: next(client.follow("1")),
        lambda: client.pause("1"), lambda: client.resume("1"), lambda: client.retry("1"), lambda: client.cancel("1"),
        lambda: client.delete("1"), lambda: next(client.dead("1")), lambda: client.alerts("1"),
        lambda: client.printed("1"),
        lambda: client.alerts("1", send=True), lambda: client.query("1", ""), lambda: next(client.rows("1")),
        lambda: client.files("1"), lambda: client.download("1", "1", "/nowhere/1"), lambda: client.models(),
        lambda: client.model("1"), lambda: client.add_model("1", "s3://b/m"), lambda: client.set_alias("1", "1", 1),
        lambda: client.remove_alias("1", "1"),
        lambda: client.rollback("1", "1"), lambda: client.tag_model("1", 1, {}), lambda: client.remove_model("1", 1),
        lambda: client.schedules(), lambda: client.schedule("1"), lambda: client.add_schedule("1", {}, cron=""),
        lambda: client.pause_schedule("1"), lambda: client.resume_schedule("1"), lambda: client.run_schedule("1"),
        lambda: client.remove_schedule("1"), lambda: client.watches(), lambda: client.watch("1"),
        lambda: client.add_watch("1", "", {}), lambda: client.pause_watch("1"), lambda: client.resume_watch("1"),
        lambda: client.remove_watch("1"), lambda: client.queue_depth(""), lambda: client.queue_messages(""),
        lambda: client.replay_queue(""), lambda: client.upload(), lambda: client.me(), lambda: client.keys(),
        lambda: client.add_key("", "viewer"), lambda: client.revoke_key("1"), lambda: client.audit(),
        lambda: client.figures(), lambda: client.endpoints(), lambda: client.endpoint("1"),
        lambda: client.add_endpoint("1", ""), lambda: client.serve_version("1", ""),
        lambda: client.scale_endpoint("1", 1), lambda: client.split_endpoint("1", {}),
        lambda: client.reload_endpoint("1"), lambda: client.roll_back_endpoint("1"),
        lambda: client.endpoint_log("1"), lambda: client.remove_endpoint("1"), lambda: client.runs(),
        lambda: client.run("1"), lambda: client.run_values("1"), lambda: client.delete_run("1"),
        lambda: client.sweeps(), lambda: client.sweep("1"), lambda: client.delete_sweep("1"),
        lambda: client.pipelines(), lambda: client.pipeline("1"), lambda: client.pipeline_logs("1"),
        lambda: client.resume_pipeline("1"), lambda: client.cancel_pipeline("1"), lambda: client.delete_pipeline("1"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(Enough):
            call()
    with server.client() as plain:
        document = plain.get("/openapi.json").json()
    routes = {
        (method.upper(), re.sub(r"\{[^}]*\}", "{}", path.removeprefix("/api/v1/")))
        for path, methods in document["paths"].items()
        if path.startswith("/api/")
        for method in methods
    }
    assert asked == routes


def test_a_server_that_is_not_there_or_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tally.client._pause", lambda number: None)
    with pytest.raises(ServerAwayError, match="does not answer"):
        tally.Client("http://127.0.0.1:9", key="k").me()


def test_a_server_of_this_machine_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # which knows no method
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.raises(ServerAwayError, match="answered 501, and not as a server of Tally does"):
            tally.Client(f"http://127.0.0.1:{server.server_port}", key="k").me()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Unsteady(BaseHTTPRequestHandler):
    """Cuts each second answer off, and sends events in pieces."""

    count = 0
    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self.keys.append(self.headers["Idempotency-Key"])
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(b'{"replayed": 3}')

    def _answer(self, content: bytes) -> None:
        type(self).count += 1
        if self.path.endswith("/events"):
            view = {
                "id": "1", "state": "running", "alive": True, "model": {"name": "m"}, "source": [], "out": "o",
                "unit": "items", "kind": None, "planned": True, "items": 2, "done": self.count, "dead": 0, "rows": 0,
                "bytes": 0, "error": None, "assumed": [], "remarks": [], "created_at": 0, "started_at": None,
                "finished_at": None, "seconds": 0, "stages": {},
            }  # fmt: skip
            if self.count == 3:
                view |= {"state": "finished", "alive": False}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f": here\n\nevent: job\ndata: {json.dumps(view)}\n\ndata: cut o".encode())
        elif self.path.endswith("/me"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>a router's page</html>")
        elif self.count % 2:
            self.connection.close()
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> Iterator[tally.Client]:
    monkeypatch.setattr("tally.client._pause", lambda number: None)
    monkeypatch.setattr(_Unsteady, "count", 0)
    monkeypatch.setattr(_Unsteady, "keys", [])
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Unsteady)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    with tally.Client(f"http://127.0.0.1:{http.server_address[1]}", key="k") as client:
        yield client
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_request_whose_answer_was_lost_is_sent_again_as_the_same(unsteady: tally.Client) -> None:
    assert unsteady.replay_queue("redis://x/0/q") == 3
    assert len(_Unsteady.keys) == 2
    assert len({*_Unsteady.keys}) == 1


def test_following_goes_on_after_a_stream_was_cut(unsteady: tally.Client) -> None:
    assert [(view.done, view.state) for view in unsteady.follow("1")] == [
        (1, "running"), (2, "running"), (3, "finished"),
    ]  # fmt: skip


def test_another_program_at_the_address_is_named(unsteady: tally.Client) -> None:
    with pytest.raises(ServerAwayError, match="not understood"):
        unsteady.me()


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command on the server, and returns what it printed; what goes wrong is raised."""
    monkeypatch.setenv("TALLY_SERVER", server.url)
    monkeypatch.setenv("TALLY_KEY", server.key)

    def run(*words: object) -> str:
        done = CliRunner().invoke(cli, [*map(str, words)], standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return done.output

    return run


def test_jobs_are_run_and_asked_on_the_server(typed: Callable[..., str], folder: Path, home: Path) -> None:
    out = folder / "typed"
    options = ("--model", folder / "quick.py", "--out", out, "--workers", 1, "--batch-size", 1)
    said = typed("score", folder / "in", *options)
    assert "20 of 21 items scored" in said
    assert "finished" in typed("jobs", "list", "--out", out)
    assert json.loads(typed("jobs", "list", "--json", "--out", out))["done"] == 21
    assert "1 failed" in typed("jobs", "show", out)
    assert "20.txt\tscore\t" in typed("jobs", "dead", out)
    assert "no alerts" in typed("jobs", "alerts", out)
    typed("jobs", "watch", out)
    assert "190" in typed("query", out, "select sum(length) from results", "--csv")
    assert "1 failed" in typed("jobs", "retry", out, "--dead") + typed("jobs", "show", out)
    with pytest.raises(JobStateError):
        typed("jobs", "pause", out)
    assert "is deleted" in typed("jobs", "delete", out)
    assert not (home / "tally.db").exists(), "nothing of that happened here"


def test_a_job_is_named_by_its_place_as_it_is_seen_from_here(
    typed: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    typed("score", "in", "--model", "quick.py", "--out", "relative", "--workers", 1)
    assert "1 failed" in typed("jobs", "show", "relative")
    (folder / "relative").rename(folder / "elsewhere")
    assert "1 failed" in typed("jobs", "show", "relative")  # as of a job that waits
    assert "20.txt\tscore\t" in typed("jobs", "dead", "./relative/")
    for wrong in ("relativ", "./nowhere", ""):
        with pytest.raises(JobNotFoundError, match=f"no job {wrong!r}"):
            typed("jobs", "show", wrong)


def test_a_job_is_named_by_the_table_that_its_rows_go_to(
    typed: Callable[..., str], client: tally.Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    typed("score", "in", "--model", "quick.py", "--out", "sqlite:///rows.db#rows", "--workers", 1)
    assert "20 items delivered, 0 waiting, 0 refused" in typed("jobs", "show", "sqlite:///rows.db#rows")
    assert "finished" in typed("jobs", "list", "--out", "sqlite:///rows.db#rows")
    assert "190" in typed("query", "sqlite:///rows.db#rows", "select sum(length) from results", "--csv")
    pushes = client.get(f"sqlite:///{folder}/rows.db#rows").pushes
    assert pushes is not None
    assert (pushes.to, pushes.delivered) == (f"sqlite:///{folder}/rows.db#rows", 20)


def test_a_job_that_fails_on_the_server_fails_here(typed: Callable[..., str], folder: Path) -> None:
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    job = folder / "broken.yaml"
    job.write_text("source: in\nmodel: broken.py\nout: broken\n")
    with pytest.raises(TallyError, match="nothing_of_that_name"):
        typed("run", job)


def test_models_schedules_watches_and_keys_on_the_server(typed: Callable[..., str], folder: Path) -> None:
    assert "added models:/typed/1" in typed("models", "add", "typed", folder / "quick.py", "--alias", "first")
    assert "has this content already" in typed("models", "add", "typed", folder / "quick.py")
    assert "models:/typed@other is now version 1" in typed("models", "alias", "typed", "other", 1)
    assert "stage trial" in typed("models", "tag", "typed", 1, "stage=trial")
    assert "stage trial" in typed("models", "show", "typed")
    assert "typed" in typed("models", "list")
    with pytest.raises(TallyError, match="own machine only"):
        typed("models", "verify", "typed")

    job = folder / "timed.yaml"
    job.write_text(f"source: {folder}/in\nmodel: {folder}/quick.py\nout: {folder}/timed/{{interval_start:%Y%m%d}}\n")
    assert "runs next at" in typed("schedule", "add", "typed", job, "--cron", "0 4 * * *")
    assert "0 4 * * *" in typed("schedule", "list")
    assert "NEXT RUN" in typed("schedule", "show", "typed")
    assert "is paused" in typed("schedule", "pause", "typed")
    assert "is resumed" in typed("schedule", "resume", "typed")
    with pytest.raises(TallyError, match="own machine only"):
        typed("schedule", "backfill", "typed", "--from", "2026-01-01", "--to", "2026-01-02")
    assert "is removed" in typed("schedule", "remove", "typed")
    with pytest.raises(SpecError, match="cron"):
        typed("schedule", "add", "typed", job, "--cron", "nonsense")

    (folder / "typed-drop").mkdir()
    watched = folder / "watched.yaml"
    watched.write_text(f"source: '{{url}}'\nmodel: {folder}/quick.py\nout: {folder}/typed-drops/{{stem}}\n")
    assert "0 objects are there already" in typed("watch", "add", "typed", folder / "typed-drop", watched)
    assert "typed" in typed("watch", "list")
    assert f"{folder}/quick.py" in typed("watch", "show", "typed")
    assert "is paused" in typed("watch", "pause", "typed")
    assert "is forgotten" in typed("watch", "delete", "typed")
    with pytest.raises(TriggerNotFoundError, match="no watch 'typed'"):
        typed("watch", "show", "typed")
    with pytest.raises(KeyNotFoundError, match="no key"):
        typed("keys", "revoke", "0" * 12)

    key = re.search(r"key (\w+) for eve", typed("keys", "add", "eve"))
    assert key is not None
    assert "is revoked" in typed("keys", "revoke", key[1])
    assert "eve" in typed("keys", "list")
    with pytest.raises(SpecError, match="is a private address"):
        typed("queue", "depth", "redis://127.0.0.1/0/q")


@pytest.mark.parametrize(
    "words", [("up",), ("doctor",), ("train", "style"), ("new", "scorer"), ("simulate", "readings")]
)
def test_what_is_about_this_machine_says_so(typed: Callable[..., str], words: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError, match="works on this machine and not on a server"):
        typed(*words)


def test_ctrl_c_stops_following_and_not_the_job(server: Server, client: tally.Client, folder: Path) -> None:
    out = folder / "followed"
    command = [
        sys.executable, "-m", "tally", "--server", server.url, "--key", server.key, "score", folder / "in",
        "--model", folder / "slow.py", "--out", out, "--workers", "1", "--batch-size", "1",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    begun = lambda: [each for each in client.list(out=str(out)).jobs if each.state == "running" and each.done]  # noqa: E731
    wait_for(begun, process)
    time.sleep(1)  # it looks at the job now
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "continues on the server" in said
    assert "Traceback" not in said
    *_, last = client.follow(begun()[0].id)
    assert (last.state, last.done) == ("finished", 21)
