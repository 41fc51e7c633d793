"""Watches: each object once, after it has stopped growing; on a folder and on a bucket."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.conftest import Ran

from tally import demo
from tally.database.tables import jobs, watch_objects
from tally.errors import ModelNotFoundError, SourceNotFoundError, SpecError
from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.storage import open_store
from tally.triggers import watch as watches
from tally.triggers.watch import Watcher, WatchStore, fill

STYLE = demo.model("strokes")
TEMPLATE = {"source": ["{url}"], "model": str(STYLE), "out": "/out/{stem}_processed.mp4"}


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "bucket":
        bucket: str = request.getfixturevalue("s3")
        return f"{bucket}/in"
    (tmp_path / "in").mkdir()
    return str(tmp_path / "in")


class Watched:
    """A watched place, and the jobs that it has started."""

    def __init__(self, place: str) -> None:
        self.jobs, self.place, self.files = Jobs(), place, open_store(place)
        self.store, self.watcher = WatchStore(self.jobs.store.engine), Watcher(self.jobs)

    def add(self, **options: object) -> int:
        template = options.pop("template", TEMPLATE)
        given = {"pattern": "*.mp4", "exclude": None, "file": "job.yaml", **options}
        return self.store.add("incoming", self.place, template=template, **given)[1]  # type: ignore[arg-type]

    def look(self, times: int = 2) -> None:
        for _ in range(times):
            self.watcher.look()

    def started(self) -> list[str]:
        """The sources of its jobs, oldest first, without the place."""
        records = self.jobs.list(limit=1000).jobs[::-1]
        return [each.removeprefix(self.place + "/") for record in records for each in record.spec["source"]]


@pytest.fixture
def watched(place: str) -> Watched:
    return Watched(place)


def test_each_upload_starts_a_job_once(watched: Watched) -> None:
    watched.files.write("before.mp4", b"1")
    assert watched.add() == 1
    watched.files.write("a.mp4", b"1")
    watched.files.write("deep/b.mp4", b"1")
    watched.files.write("a.txt", b"1")
    watched.look(5)
    assert watched.started() == ["a.mp4", "deep/b.mp4"]
    record = watched.jobs.list(text="deep").jobs[0]
    assert (record.state, record.spec["out"]) == ("waiting", "/out/deep/b_processed.mp4")
    assert watched.store.counts("incoming") == {"passed": 1, "taken": 2}


def test_what_was_there_is_taken_if_asked(watched: Watched) -> None:
    watched.files.write("before.mp4", b"1")
    assert watched.add(existing=True) == 1
    watched.look()
    assert watched.started() == ["before.mp4"]


def test_new_content_under_an_old_name_starts_a_job_again(watched: Watched) -> None:
    watched.add()
    watched.files.write("a.mp4", b"1")
    watched.look()
    watched.files.write("a.mp4", b"2")
    watched.look(3)
    assert watched.started() == ["a.mp4"], "both would write to one place: it waits"
    [record] = watched.jobs.list().jobs
    assert f"waits for job {record.id}" in (watched.store.seen("incoming")[0].error or "")
    ended(watched, record)
    watched.look(1)
    assert watched.started() == ["a.mp4", "a.mp4"]


def ended(watched: Watched, record: JobRecord) -> None:
    """The waiting job has been finished."""
    with watched.store.engine.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == record.id).values(state="finished"))


def test_two_objects_whose_results_would_be_at_one_place(watched: Watched) -> None:
    watched.add(pattern="*")
    watched.files.write("a.mp4", b"1")
    watched.look()
    watched.files.write("a.mov", b"1")
    watched.look(3)
    assert watched.started() == ["a.mp4"]
    ended(watched, watched.jobs.list().jobs[0])
    watched.look(1)
    assert watched.started() == ["a.mp4"]
    refused = watched.store.seen("incoming")[0]
    assert (refused.name, refused.state) == ("a.mov", "refused")
    assert refused.error == "its results would replace those of a.mp4: /out/a_processed.mp4"
    watched.files.delete(["a.mp4"])
    watched.files.write("a.mov", b"new")
    watched.look(3)
    assert watched.started() == ["a.mp4", "a.mov"], "it has replaced the other one"


def test_what_grows_waits(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    watched = Watched(str(tmp_path / "in"))
    watched.add()
    growing = tmp_path / "in" / "a.mp4"
    for size in range(1, 5):
        growing.write_bytes(b"x" * size)
        os.utime(growing, ns=(size * 10**9, size * 10**9))
        watched.look(1)
        assert watched.started() == []
        assert watched.store.counts("incoming") == {"settling": 1}  # its earlier sizes are forgotten
    watched.look(1)
    assert watched.started() == ["a.mp4"]
    assert watched.store.counts("incoming") == {"taken": 1}


def test_what_goes_before_it_is_still_is_forgotten(watched: Watched) -> None:
    watched.add()
    watched.files.write("a.mp4", b"1")
    watched.look(1)
    assert watched.store.counts("incoming") == {"settling": 1}
    watched.files.delete(["a.mp4"])
    watched.look(1)
    assert watched.store.counts("incoming") == {}


def begun(watched: Watched, record: JobRecord) -> None:
    """The waiting job has begun, so what it writes is known."""
    output = {"kind": "video", "format": "mp4", "unit": "frames", "place": record.spec["out"], "columns": None}
    watched.jobs.store.create(
        fingerprint="f", spec=record.spec, model={"name": "m", "kind": "onnx", "hash": "h"}, output=output,
        waiting=record.id,
    )  # fmt: skip


def test_what_jobs_write_starts_none(watched: Watched) -> None:
    watched.add(template=TEMPLATE | {"out": f"{watched.place}/{{stem}}_processed.mp4"})
    watched.files.write("a.mp4", b"1")
    watched.look()
    [record] = watched.jobs.list().jobs
    begun(watched, record)
    watched.files.write("a_processed.mp4", b"1")
    watched.files.write("a_processed.mp4.tally/attempts/x.mp4", b"1")
    watched.files.write("a_processed.mp4.manifest.json", b"1")
    watched.files.write("a_processed_too.mp4", b"1")  # a user's own
    watched.look(3)
    assert watched.started() == ["a.mp4", "a_processed_too.mp4"]


def test_what_jobs_write_is_not_counted_and_kept_once(watched: Watched) -> None:
    watched.add(pattern="*", template=TEMPLATE | {"out": f"{watched.place}/{{stem}}_processed.mp4"})
    watched.files.write("a.mp4", b"1")
    watched.look()
    begun(watched, watched.jobs.list().jobs[0])
    for size in range(1, 4):
        for name in ("a_processed.mp4", "a_processed.dead.jsonl", "a_processed.mp4.tally/attempts/x.mp4"):
            watched.files.write(name, b"x" * size)
        watched.files.write("other.mp4.tally/job.json", b"x" * size)  # of a job of another database
        watched.look()
    assert watched.started() == ["a.mp4"]
    assert watched.store.counts("incoming") == {"taken": 1}
    with watched.store.engine.connect() as connection:
        kept = sorted(connection.scalars(sa.select(watch_objects.c.name)))
    assert kept == ["a.mp4", "a_processed.dead.jsonl", "a_processed.mp4"]
    watched.store.delete("incoming")
    assert watched.add(pattern="*") == 1  # nor are they "there already"


def test_only_so_many_at_once(watched: Watched) -> None:
    watched.add(parallel=2)
    for name in "abcd":
        watched.files.write(f"{name}.mp4", b"1")
    watched.look(3)
    assert watched.started() == ["a.mp4", "b.mp4"]
    watched.jobs.cancel(watched.jobs.list().jobs[0].id)
    watched.look(2)
    assert watched.started() == ["a.mp4", "b.mp4", "c.mp4"]


def test_pausing_and_restarting_lose_nothing(watched: Watched) -> None:
    watched.add()
    watched.store.pause("incoming", True)
    watched.files.write("a.mp4", b"1")
    watched.look()
    assert watched.started() == []
    watched.store.pause("incoming", False)
    Watcher(watched.jobs).look()
    Watcher(watched.jobs).look()  # as after a restart
    assert watched.started() == ["a.mp4"]
    watched.store.delete("incoming")
    assert watched.store.all() == []


def test_two_servers_start_one_job(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.add()
    watched.files.write("a.mp4", b"1")
    watched.look(1)
    other = Watcher(watched.jobs)
    take = WatchStore.take

    def after_another(self: WatchStore, *given: object) -> str | None:
        monkeypatch.setattr(WatchStore, "take", take)
        other.look()
        return take(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(WatchStore, "take", after_another)
    watched.look(1)
    assert watched.started() == ["a.mp4"]


def test_two_servers_keep_to_what_may_run_at_once(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.add(parallel=1)
    for name in "ab":
        watched.files.write(f"{name}.mp4", b"1")
    watched.look(1)
    other = Watcher(watched.jobs)
    take = WatchStore.take

    def after_another(self: WatchStore, *given: object) -> str | None:
        monkeypatch.setattr(WatchStore, "take", take)
        other.look()
        return take(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(WatchStore, "take", after_another)
    watched.look(2)
    assert watched.started() == ["a.mp4"]


def test_nothing_is_kept_of_a_watch_that_was_deleted_meanwhile(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.add()
    watched.files.write("a.mp4", b"1")
    known = WatchStore.known

    def after_it_is_deleted(self: WatchStore, *given: object) -> dict[str, str]:
        monkeypatch.setattr(WatchStore, "known", known)
        self.delete("incoming")
        return known(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(WatchStore, "known", after_it_is_deleted)
    watched.look(1)
    with watched.store.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(watch_objects)) == 0
    assert watched.add() == 1


def test_a_watch_that_was_paused_meanwhile_takes_nothing(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.add()
    watched.files.write("a.mp4", b"1")
    watched.look(1)
    take = WatchStore.take

    def after_a_pause(self: WatchStore, *given: object) -> str | None:
        self.pause("incoming", True)
        return take(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(WatchStore, "take", after_a_pause)
    watched.look(1)
    assert watched.started() == []


def test_what_goes_wrong_with_one_watch_is_said_and_leaves_the_others(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.add()
    watched.store.add("broken", watched.place, pattern="*", exclude=None, template=TEMPLATE, file="job.yaml")
    watched.files.write("a.mp4", b"1")
    known = WatchStore.known

    def fails(self: WatchStore, name: str, *given: object) -> dict[str, str]:
        if name == "broken":
            raise KeyError("nobody has thought of this")
        return known(self, name, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(WatchStore, "known", fails)
    watched.look()
    assert watched.started() == ["a.mp4"]
    assert watched.store.get("broken").error == "KeyError: 'nobody has thought of this'"


def test_a_place_that_is_away_is_said_and_looked_at_again(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    watched = Watched(str(tmp_path / "in"))
    watched.add(pattern="*", template=TEMPLATE)
    (tmp_path / "in" / "a").write_text("1")
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    (tmp_path / "in").write_text("no folder")
    watched.look()
    assert watched.store.get("incoming").error is not None
    (tmp_path / "in").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "in")
    watched.look()
    assert (watched.store.get("incoming").error, watched.started()) == (None, ["a"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"out": "/out/all.mp4"}, "names no object"),
        ({"source": ["/in/a.mp4"]}, "should be '{url}'"),
        ({"alerts": ["failed"]}, "there is no webhook to send them to"),
        ({"out": "/out/{nme}"}, "did you mean 'name'"),
    ],
)
def test_templates_that_cannot_work(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Watched(str(tmp_path)).add(template=TEMPLATE | change)


def test_braces_that_would_match_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="braces stand for themselves"):
        Watched(str(tmp_path)).add(pattern="*.{jpg,png}")


def test_a_name_that_leads_out_of_the_place_starts_no_job() -> None:
    for name in ("../a.mp4", "deep/../../a.mp4", ".."):
        with pytest.raises(SpecError, match="is no name below s3://bucket/in"):
            fill(TEMPLATE, "s3://bucket/in", name)
    assert fill(TEMPLATE, "s3://bucket/in", "a..mp4").out == "/out/a._processed.mp4"


def test_what_placeholders_stand_for() -> None:
    spec = fill(TEMPLATE | {"out": "s3://b/{folder}/{stem}|{name}"}, "s3://in/x", "deep/a.b.mp4")
    assert (spec.source, spec.out) == (("s3://in/x/deep/a.b.mp4",), "s3://b/deep/deep/a.b|deep/a.b.mp4")


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("modle", "Did you mean .*model"),
        ("models:/nothing@champion", "tally models"),
        ("s3://{bucket}/nothing.onnx", "A model is|there is no|nothing"),
        ("nowhere_at_all:Class", "installed in"),
        ("nothing.py:Class", "A model is one of"),
    ],
)
def test_a_model_that_is_not_there_is_refused_at_once(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch, model: str, hint: str
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    model = model.replace("s3://{bucket}", s3)
    with pytest.raises(ModelNotFoundError) as refused:
        Watched(str(tmp_path)).add(template=TEMPLATE | {"model": model})
    assert re.search(hint, f"{refused.value}")
    assert WatchStore(Jobs().store.engine).all() == []


def test_a_model_beside_the_command_is_found_by_the_server_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "job.yaml").write_text("source: '{url}'\nmodel: bright.py:Bright\nout: 'out/{stem}'\n")
    (tmp_path / "here" / "bright.py").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert watches.read(str(tmp_path / "job.yaml"))["model"] == f"{tmp_path}/here/bright.py:Bright"
    (tmp_path / "job2.yaml").write_text("source: '{url}'\nmodel: 'models:/{name}@a'\nout: 'out/{stem}'\n")
    assert watches.read(str(tmp_path / "job2.yaml"))["model"] == "models:/{name}@a"
    (tmp_path / "bright.py").touch()
    assert watches.read(str(tmp_path / "job.yaml"))["model"] == f"{tmp_path}/bright.py:Bright"


def test_a_watch_is_shown_with_its_objects_jobs_and_errors(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    (tmp_path / "in").mkdir()
    watched = Watched(str(tmp_path / "in"))
    watched.add(exclude="*processed*", template=TEMPLATE | {"every": "{stem}"})  # a number, of which few names are one
    for name in ("3.mp4", "a.mp4"):
        watched.files.write(name, b"1")
    watched.look()
    [record] = watched.jobs.list().jobs
    watched.jobs.store.give_up(record.id, "failed", error="the model is broken\nfor a long reason")
    watched.files.write("7.mp4", b"1")
    watched.look(1)
    shown = cli("watch", "show", "incoming").out
    for words in (
        ["place", str(tmp_path / "in")], ["exclude", "*processed*"], ["model", str(STYLE)], ["every", "{stem}"],
        ["objects", "1 refused, 1 settling, 1 taken"],
    ):  # fmt: skip
        assert re.search(r"\s+".join(map(re.escape, words)), shown), words
    rows = {line.split()[0]: line for line in shown.splitlines() if ".mp4 " in line and line[:1] != " "}
    assert re.search(rf"taken .* {record.id} +failed +the model is broken$", rows["3.mp4"].rstrip())
    assert re.search("refused .* every: ", rows["a.mp4"])
    assert "settling" in rows["7.mp4"]
    given = json.loads(cli("watch", "show", "incoming", "--json", "-n", "1").out)
    assert [each["name"] for each in given["seen"]] == ["7.mp4"]
    assert "did you mean 'incoming'" in cli("watch", "show", "incomin").err


def test_the_commands(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "job.yaml"
    file.write_text(f"source: '{{url}}'\nmodel: {STYLE}\nout: 'out/{{stem}}.mp4'\n")
    added = cli("watch", "add", "incoming", tmp_path / "in", file, "--pattern", "*.mp4")
    assert added.code == 0, added.err
    assert "0 objects are there already" in added.out
    assert WatchStore(Jobs().store.engine).get("incoming").template["out"] == f"{tmp_path}/out/{{stem}}.mp4"
    assert "incoming" in cli("watch", "list").out
    assert "already" in cli("watch", "add", "incoming", tmp_path / "in", file).err
    assert cli("watch", "pause", "incoming").code == 0
    assert "paused" in cli("watch", "list").out
    assert cli("watch", "resume", "incoming").code == 0
    assert "did you mean 'incoming'" in cli("watch", "pause", "incomin").err
    assert cli("watch", "delete", "incoming").code == 0
    assert "a slash" in cli("watch", "add", "x/y", tmp_path / "in", file).err
    assert cli("watch", "add", "x", tmp_path / "nowhere", file).code == 1
    with pytest.raises(SourceNotFoundError):
        watches.look_into(str(tmp_path / "nowhere"))


def test_a_folder_is_listed_when_something_has_changed_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once a minute: what other machines write to it gives no notice."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    watched = Watched(str(folder))
    watched.add()
    listed: list[str] = []
    look_at = watched.watcher._look_at
    monkeypatch.setattr(watched.watcher, "_look_at", lambda watch: (listed.append(watch.name), look_at(watch)))

    def looks_until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not done():
            assert time.monotonic() < deadline
            watched.watcher.look(all_of_them=False)
            time.sleep(0.05)

    def is_quiet() -> bool:
        before = len(listed)
        watched.watcher.look(all_of_them=False)
        return len(listed) == before

    try:
        # The first looks: there was nothing before, and the system's notices have begun.
        looks_until(lambda: len(listed) == 2)
        assert is_quiet()
        (folder / "deep" / "a.mp4").write_bytes(b"1")
        looks_until(lambda: watched.started() == ["deep/a.mp4"])
        looks_until(is_quiet)
        monkeypatch.setattr(watches, "QUIET_SECONDS", 0.0)
        assert not is_quiet()
    finally:
        watched.watcher._notices.close()


def test_a_folder_that_was_away_is_looked_at_when_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    watched = Watched(str(folder))
    watched.add()
    watched.watcher.look(all_of_them=False)
    folder.rename(tmp_path / "away")
    deadline = time.monotonic() + 30
    while watched.store.get("incoming").error is None:
        assert time.monotonic() < deadline
        watched.watcher.look()
    (tmp_path / "away" / "b.mp4").write_bytes(b"1")
    (tmp_path / "away").rename(folder)
    while watched.started() != ["b.mp4"]:
        assert time.monotonic() < deadline
        watched.watcher.look(all_of_them=False)
    watched.watcher._notices.close()
