"""A job that several coordinators share out gives what an unsplit one gives, and is one job to everybody."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.conftest import Ran
from tests.server import job as fields_of
from tests.server import lengths, running, until
from tests.videos import frames_of, write_clip
from tests.waiting import eventually

import tally
from tally.errors import JobError, JobStateError, SpecError
from tally.jobs import facade
from tally.jobs.events import Event, Events, Note
from tally.jobs.facade import Jobs
from tally.jobs.spec import make
from tally.jobs.split import Launcher
from tally.jobs.store import JobRecord
from tally.scorers.base import Scorer


class Length(Scorer):
    input = "bytes"

    def score(self, batch: list[bytes]) -> list[Any]:
        return [ValueError("bad") if each == b"bad" else {"length": len(each)} for each in batch]


class Inverted(Scorer):
    output = "image"

    def score(self, batch: list[Any]) -> list[Any]:
        return [255 - each for each in batch]


class Doubled(Scorer):
    input = "table"
    features = ("n",)

    def score(self, batch: pa.Table) -> list[dict[str, int]]:
        return [{"twice": 2 * n} for n in batch["n"].to_pylist()]


class Gated(Scorer):
    """Waits, but for the first batch, until the file ``gate`` is there."""

    input = "path"
    batch_size = 2

    def load(self, artifacts: Path, device: str) -> None:
        self.batches = 0

    def score(self, batch: list[Path]) -> list[dict[str, int]]:
        self.batches += 1
        gate = batch[0].parents[2] / "gate"
        while self.batches > 1 and not gate.exists():
            time.sleep(0.02)
        return [{"one": 1} for _ in batch]


class InThreads(Launcher):
    """Coordinators in threads of this process, which start sooner than processes. one_by_one: each after the last."""

    shared = True
    one_by_one = False

    def __init__(self) -> None:
        self._threads: dict[str, threading.Thread] = {}
        self._turn = threading.Lock()

    def start(self, part: JobRecord, *, retry_dead: bool) -> None:
        def drive() -> None:
            with self._turn:
                run()

        def run() -> None:
            try:
                Jobs().run(part.id, retry_dead=retry_dead)
            except JobError:
                pass  # its row says it

        thread = threading.Thread(target=drive if self.one_by_one else run)
        self._threads[part.id] = thread
        thread.start()

    def is_starting(self, part: JobRecord) -> bool:
        thread = self._threads.get(part.id)
        return thread is not None and thread.is_alive()


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> type[InThreads]:
    class Threads(InThreads):
        pass

    monkeypatch.setattr(facade, "Processes", Threads)
    return Threads


@pytest.fixture
def items(tmp_path: Path) -> Path:
    for number in range(40):
        path = tmp_path / "in" / f"{number % 3}" / f"{number:02}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(number))
    return tmp_path / "in"


def score(source: object, model: object, out: Path, **fields: Any) -> tally.Job:
    return tally.score(source, model, out, quiet=True, **{"workers": 2, **fields})  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_rows_and_files_are_those_of_an_unsplit_job(items: Path, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    whole = score(items, Length, tmp_path / "whole.csv")
    split = score(items, Length, tmp_path / "split.csv", split=3)  # in processes, as users have it
    assert (tmp_path / "split.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert [name for name in names(tmp_path) if name.startswith("split")] == ["split.csv", "split.csv.manifest.json"]
    same = ("files", "counts", "schema", "items", "scored", "dead", "rows", "output", "format")
    one, other = json.loads(json.dumps(whole.manifest)), json.loads(json.dumps(split.manifest))
    for manifest in (one, other):
        for file in manifest["files"]:
            del file["path"]
    assert {name: one[name] for name in same} == {name: other[name] for name in same}
    assert other["spec"]["split"] == 3
    listed = [json.loads(line)["id"] for line in cli("jobs", "list", "--json").out.splitlines()]
    assert listed == [split.id, whole.id]
    assert Jobs().parts(split.id) == []
    assert tally.Job(str(tmp_path / "split.csv")).id == split.id
    assert split.query("select count(*) as n from results").to_pylist() == [{"n": 40}]


def test_pictures_have_their_names(in_threads: type[InThreads], tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for number in range(12):
        picture = np.full((8, 8, 3), number, np.uint8)
        Image.fromarray(picture).save(tmp_path / "in" / ("a" if number % 2 else ".") / f"{number}.png")
    whole = score(tmp_path / "in", Inverted, tmp_path / "whole")
    split = score(tmp_path / "in", Inverted, tmp_path / "split", split=2)
    assert split.results().to_pylist() == whole.results().to_pylist()
    pictures = [name for name in names(tmp_path / "whole") if name.endswith(".png")]
    assert len(pictures) == 12
    assert [name for name in names(tmp_path / "split") if name.endswith(".png")] == pictures
    assert all(
        (tmp_path / "split" / each).read_bytes() == (tmp_path / "whole" / each).read_bytes() for each in pictures
    )


def test_a_table_is_shared_out_by_rows(in_threads: type[InThreads], tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(500)}), tmp_path / "in.parquet")
    whole = score(tmp_path / "in.parquet", Doubled, tmp_path / "whole")
    split = score(tmp_path / "in.parquet", Doubled, tmp_path / "split", split=2)
    by_key = {row["key"]: row for row in split.results().to_pylist()}
    assert len(by_key) == 500
    assert list(by_key) != [row["key"] for row in whole.results().to_pylist()]  # share after share
    assert by_key == {row["key"]: row for row in whole.results().to_pylist()}


def test_of_few_items_some_parts_have_none(in_threads: type[InThreads], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.bin\n")
    (tmp_path / "a.bin").write_bytes(b"123")
    split = score(None, Length, tmp_path / "split", items=tmp_path / "list.txt", split=3)
    assert split.results().to_pylist() == [{"key": "a.bin", "length": 3}]


def test_videos_are_shared_out_whole(in_threads: type[InThreads], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("one", "two"):
        write_clip(tmp_path / "in" / f"{name}.mp4", 6)
    job = score(tmp_path / "in", Inverted, tmp_path / "out", split=2)
    assert sorted(file["key"] for file in job.manifest["files"]) == ["one.mp4", "two.mp4"]
    assert [len(list(frames_of(tmp_path / "out" / f"{name}.mp4"))) for name in ("one", "two")] == [6, 6]
    with pytest.raises(SpecError, match="it is one video"):
        score(tmp_path / "in" / "one.mp4", Inverted, tmp_path / "one.mp4", split=2)


def test_dead_items_are_counted_over_the_whole_and_replayed(
    in_threads: type[InThreads], items: Path, tmp_path: Path
) -> None:
    in_threads.one_by_one = True
    last = sorted(path for path in items.rglob("*") if path.is_file())[-8:]
    for path in last:
        path.write_bytes(b"bad")
    # 40 % of the last part, which is scored when all others are: 20 % of the whole.
    job = score(items, Length, tmp_path / "out", split=2, max_dead=0.3, min_dead=10)
    assert (job.record.done, job.record.dead) == (40, 8)
    keys = [str(path.relative_to(items)) for path in last]
    assert job.dead().to_pydict()["key"] == keys

    for path in last:
        path.write_bytes(b"mended")
    job.retry(quiet=True)
    assert job.record.dead == 0
    assert {row["key"]: row["length"] for row in job.results().to_pylist()} == {
        str(path.relative_to(items)): path.stat().st_size for path in items.rglob("*") if path.is_file()
    }


def test_too_many_dead_items_stop_all_parts_and_a_retry_goes_on(
    in_threads: type[InThreads], items: Path, tmp_path: Path
) -> None:
    bad = sorted(path for path in items.rglob("*") if path.is_file())[::4]
    for path in bad:
        path.write_bytes(b"bad")
    with pytest.raises(JobError, match=r"stopped early: \d+ of the first \d+ items failed, over the limit of 10%"):
        score(items, Length, tmp_path / "out", split=2, max_dead=0.1, min_dead=4, batch_size=4)
    jobs = Jobs()
    record = jobs.get(str(tmp_path / "out"))
    assert record.state == "failed"
    assert record.error is not None
    assert f"tally jobs retry {record.id} --dead" in record.error
    assert not any(part.alive for part in jobs.store.parts(record.id))
    for path in bad:
        path.write_bytes(b"mended")
    job = tally.Job(record.id)
    job.retry(quiet=True)
    assert (job.state, job.record.done, job.record.dead) == ("finished", 40, 0)
    assert len(job.results().to_pylist()) == 40


@pytest.fixture
def conducted(
    in_threads: type[InThreads], items: Path, tmp_path: Path
) -> Iterator[tuple[Jobs, str, Callable[[Callable[[], object]], None], list[str]]]:
    """Jobs, the id of a split one that waits at its gate, a way to wait, and the notes that were told."""
    jobs, notes = Jobs(), list[str]()
    spec = make(source=[str(items)], model=f"{__file__}:Gated", out=str(tmp_path / "out"), workers=2, split=2)
    job = jobs.submit(spec).id

    def note(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    thread = threading.Thread(target=lambda: jobs.run(job, events=Events(note)))
    thread.start()

    def until(condition: Callable[[], object]) -> None:
        eventually(condition, told=lambda: jobs.get(job))

    until(lambda: len(jobs.store.parts(job)) == 2 and all(part.done for part in jobs.store.parts(job)))
    yield jobs, job, until, notes
    (tmp_path / "gate").touch()
    thread.join(60)
    assert not thread.is_alive()


def test_what_is_asked_of_the_job_is_asked_of_its_parts(
    conducted: tuple[Jobs, str, Callable[[Callable[[], object]], None], list[str]],
    tmp_path: Path,
    cli: Callable[..., Ran],
) -> None:
    jobs, job, until, notes = conducted
    assert notes[0] == "split into 2 parts by name: each lists its own"
    part = jobs.store.parts(job)[0].id
    assert "parts        2: 2 running" in cli("jobs", "show", job).out
    assert f"part of      job {job}" in cli("jobs", "show", part).out
    for change in (jobs.cancel, jobs.pause, jobs.delete, jobs.unpause):
        with pytest.raises(JobStateError, match=f"is a part of job {job}"):
            change(part)
    with pytest.raises(JobStateError, match="is running"):
        jobs.delete(job)
    # While it runs, its rows are those that its parts have committed.
    assert jobs.query(job, "select count(*) as n from results").to_pylist()[0]["n"] == sum(
        part.done for part in jobs.store.parts(job)
    )
    jobs.pause(job)
    until(lambda: jobs.get(job).state == "paused" and {each.state for each in jobs.store.parts(job)} == {"paused"})
    jobs.unpause(job)
    until(lambda: {each.state for each in [jobs.get(job), *jobs.store.parts(job)]} == {"running"})
    (tmp_path / "gate").touch()
    until(lambda: jobs.get(job).state == "finished")
    assert len(jobs.results(job).to_pylist()) == 40


def test_a_split_job_is_cancelled_as_a_whole(
    conducted: tuple[Jobs, str, Callable[[Callable[[], object]], None], list[str]], tmp_path: Path
) -> None:
    jobs, job, until, _ = conducted
    jobs.cancel(job)
    until(lambda: jobs.get(job).state == "cancelled")
    assert jobs.store.parts(job) == []
    assert not (tmp_path / "out" / "_tally").exists()
    jobs.delete(job)
    assert jobs.list().jobs == []


def test_what_cannot_be_split_is_refused(items: Path, tmp_path: Path) -> None:
    def refused(source: object, model: object, reason: str, **fields: Any) -> None:
        with pytest.raises(SpecError, match=reason) as raised:
            score(source, model, tmp_path / "no", split=2, **fields)
        assert raised.value.hint

    for part in ({"limit": 3}, {"sample": "10%"}, {"shard": "1/2"}):
        refused(items, Length, f"{next(iter(part))} asks for a part", **part)
    refused(items, Length, "log keeps the log of one coordinator", log=True)
    refused(
        items,
        Length,
        "push waits until the job is finished",
        push={"url": "postgresql://127.0.0.1/db#rows", "when": "finished"},
    )
    refused("redis://127.0.0.1/queue", Length, "the source has no end")
    refused(items, Length, "it is not said how many", engine="ray", workers=None)
    pq.write_table(pa.table({"n": [1, 2], "k": ["a", "b"]}), tmp_path / "in.parquet")
    refused(tmp_path / "in.parquet", Doubled, "gathered by key or window", by="k")
    with pytest.raises(SpecError, match="split"):
        score(items, Length, tmp_path / "no", split=1)
    assert not (tmp_path / "no").exists()


def test_a_server_starts_the_parts_and_shows_one_job(items: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(lengths(pause=0.2))
    with running("--parallel", "1", "--root", tmp_path) as server, server.client() as client:
        fields = fields_of(tmp_path, "out", scorer="slow", split=2, workers=2, batch_size=2)
        started = client.post("/jobs", json=fields).raise_for_status().json()
        busy = until(client, started["id"], lambda view: len(view["parts"]) == 2 and view["done"] > 0)
        assert {part["number"] for part in busy["parts"]} == {1, 2}
        # The coordinator of a part is killed: the server has another one go on.
        store = Jobs().store
        alive = next(part for part in store.parts(started["id"]) if part.alive)
        assert alive.owner_pid is not None
        psutil.Process(alive.owner_pid).kill()
        page = client.get(f"{server.url}/jobs/{started['id']}").raise_for_status().text
        assert "<h2>Parts</h2>" in page
        done = until(client, started["id"], lambda view: view["state"] == "finished")
        assert (done["done"], done["dead"], done["parts"]) == (40, 0, [])
        listed = client.get("/jobs").json()["jobs"]
        assert [each["id"] for each in listed] == [started["id"]]
        assert len(client.get(f"/jobs/{started['id']}/rows").raise_for_status().json()["rows"]) == 40
