"""Watches: each object once, after it has stopped growing; on a folder and on a bucket."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Ran

from tally.errors import SourceNotFoundError, SpecError
from tally.jobs.facade import Jobs
from tally.storage import open_store
from tally.triggers import watch as watches
from tally.triggers.watch import Watcher, WatchStore, fill

TEMPLATE = {"source": ["{url}"], "model": "/models/style.onnx", "out": "/out/{stem}_processed.mp4"}


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
    assert watched.started() == ["a.mp4", "a.mp4"]


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
    watched.look(1)
    assert watched.started() == ["a.mp4"]


def test_what_jobs_write_starts_none(watched: Watched) -> None:
    watched.add(template=TEMPLATE | {"out": f"{watched.place}/{{stem}}_processed.mp4"})
    watched.files.write("a.mp4", b"1")
    watched.look()
    [record] = watched.jobs.list().jobs
    output = {"kind": "video", "format": "mp4", "unit": "frames", "place": record.spec["out"], "columns": None}
    watched.jobs.store.create(
        fingerprint="f", spec=record.spec, model={"name": "m", "kind": "onnx", "hash": "h"}, output=output,
        waiting=record.id,
    )  # fmt: skip
    watched.files.write("a_processed.mp4", b"1")
    watched.files.write("a_processed.mp4._tally/attempts/x.mp4", b"1")
    watched.files.write("a_processed_too.mp4", b"1")  # a user's own
    watched.look(3)
    assert watched.started() == ["a.mp4", "a_processed_too.mp4"]


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
        ({"out": "/out/{nme}"}, "did you mean 'name'"),
    ],
)
def test_templates_that_cannot_work(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Watched(str(tmp_path)).add(template=TEMPLATE | change)


def test_what_placeholders_stand_for() -> None:
    spec = fill(TEMPLATE | {"out": "s3://b/{folder}/{stem}|{name}"}, "s3://in/x", "deep/a.b.mp4")
    assert (spec.source, spec.out) == (("s3://in/x/deep/a.b.mp4",), "s3://b/deep/deep/a.b|deep/a.b.mp4")


def test_the_commands(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "job.yaml"
    file.write_text("source: '{url}'\nmodel: style.onnx\nout: 'out/{stem}.mp4'\n")
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
    assert cli("watch", "add", "x", tmp_path / "nowhere", file).code == 1
    with pytest.raises(SourceNotFoundError):
        watches.look_into(str(tmp_path / "nowhere"))
