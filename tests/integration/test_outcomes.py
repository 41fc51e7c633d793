"""What becomes of a job when its surroundings fail or its user changes their mind: exit code, message, remains."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.waiting import wait_for

import tally
from tally.errors import JobExistsError, JobStateError, ModelChangedError
from tally.jobs.facade import Jobs
from tally.sinks.staging import StagedSink
from tally.sources.base import ChunkLimit, Timings
from tally.sources.files import FileSource

Cli = Callable[..., Any]

SCORER = '''
import os
import random
import time
from pathlib import Path

import tally


class Plain(tally.Scorer):
    """Gives a row; of ``wait`` when the file $GATE is there, and of ``large`` one of 60,000 bytes.

    While it waits, there is a file $GATE.waiting.
    """

    input = "bytes"
    batch_size = 1
    columns = {"bytes": "int64", "text": "string"}

    def score(self, batch):
        while batch[0] == b"wait" and not (gate := Path(os.environ["GATE"])).exists():
            gate.with_suffix(".waiting").touch()
            time.sleep(0.01)
        return [
            {"bytes": len(data), "text": random.randbytes(30_000).hex() if data == b"large" else ""} for data in batch
        ]
'''


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "plain.py"
    path.write_text(SCORER)
    return path


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Items that hold ``wait`` are not scored before this file exists."""
    path = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(path))
    return path


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts small file systems of their own; of an options string, ``size=2m``."""
    mounted: list[Path] = []

    def mount(options: str, place: Path | None = None) -> Path:
        place = place or tmp_path / f"disk{len(mounted)}"
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if place in mounted:
            command = ["mount", "-o", f"remount,{options}", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        if place not in mounted:
            mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=False)


def put(folder: Path, *contents: bytes, names: str = "{:02}.bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        (folder / names.format(number)).write_bytes(content)
    return folder


def fill(place: Path) -> Path:
    """Use up a file system's space."""
    path = place / "fill"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return path
    raise AssertionError("a write that writes nothing")


def keys(out: Path) -> list[str]:
    """The keys of all rows, each as often as it is there."""
    parts = [out] if out.is_file() else sorted(out.glob("part-*.parquet"))
    return sorted(key for part in parts for key in pq.read_table(part)["key"].to_pylist())


def names(count: int) -> list[str]:
    return [f"{number:02}.bin" for number in range(count)]


def refused(ran: Any, *words: str, code: int = 1) -> None:
    """The command failed, and its message says what happened, on what, and what next; without a traceback."""
    assert ran.code == code, ran.err
    assert "error: " in ran.err
    for each in words:
        assert each in ran.err
    assert "\n  " in ran.err.partition("error: ")[2], "no next step"
    assert "Traceback" not in ran.err
    assert ran.out == ""


class Process:
    """``tally`` in a process of its own."""

    def __init__(self, log: Path, *arguments: object) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tally", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Until the condition holds; fails when the process ends first."""
        wait_for(condition, self.process, seconds, lambda: self.output)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait(timeout=60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*arguments: object) -> Process:
        started.append(Process(tmp_path / f"log{len(started)}", *arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def newest() -> Any:
    """The newest job, once there is one."""
    return next(iter(Jobs().store.newest(limit=1)), None)


def done() -> int:
    return newest().done if newest() else 0


# ------------------------------------------------------------------------------------------------ disks


def test_a_disk_that_is_full_at_the_start(cli: Cli, tmp_path: Path, model: Path, mount: Callable[..., Path]) -> None:
    items, disk = put(tmp_path / "items", b"1", b"22"), mount("size=1m")
    fill(disk)
    for out in ("out", "deep/er/out", "out.csv"):
        refused(cli("score", items, "--model", model, "--out", disk / out), f"{disk}/{out}", "the disk is full", "room")
    assert [path.name for path in disk.iterdir()] == ["fill"]
    assert cli("jobs", "list").out == ""


@pytest.mark.parametrize("out", ["out", "out.parquet"])
def test_a_disk_that_becomes_full(cli: Cli, tmp_path: Path, model: Path, mount: Callable[..., Path], out: str) -> None:
    items, disk = put(tmp_path / "items", *[b"large"] * 60), mount("size=1m")
    ran = cli("score", items, "--model", model, "--out", disk / out, "--workers", 2)
    refused(ran, "the disk is full", str(disk / out), "What is done is saved", "tally jobs resume")
    record = newest()
    assert record.state == "failed"
    assert 0 < record.done < 60
    assert f"next         tally jobs resume {record.id}" in cli("jobs", "show", record.id).out
    mount("size=30m", disk)
    ran = cli("jobs", "resume", record.id)
    assert (ran.code, ran.out) == (0, ""), ran.err
    assert keys(disk / out) == names(60)
    assert not list(disk.rglob("*tally*"))


def test_a_full_disk_under_the_database(
    cli: Cli, tmp_path: Path, model: Path, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    items, disk = put(tmp_path / "items", b"1"), mount("size=1m")
    fill(disk)
    monkeypatch.setenv("TALLY_HOME", str(disk / "home"))
    refused(cli("score", items, "--model", model, "--out", tmp_path / "out"), "database", str(disk), "TALLY_HOME")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_read_only(
    cli: Cli, tmp_path: Path, model: Path, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    items, disk = put(tmp_path / "items", b"1"), mount("size=1m")
    earlier = disk / "earlier"
    assert cli("score", items, "--model", model, "--out", earlier).code == 0
    mount("ro", disk)
    score = ("score", items, "--model", model, "--out")
    refused(cli(*score, disk / "out"), f"cannot write {disk}/out", "the file system is read-only", "Choose a place")
    refused(cli(*score, earlier, "--overwrite"), "the file system is read-only")
    assert keys(earlier) == names(1)
    assert (earlier / "_SUCCESS").exists()
    assert [record.spec["out"] for record in Jobs().store.newest()] == [str(earlier)]
    monkeypatch.setenv("TALLY_HOME", str(disk / "home"))
    refused(cli(*score, tmp_path / "out"), "database", "Read-only file system", "Set TALLY_HOME")
    refused(cli("jobs", "list"), "database", "Read-only file system", "Set TALLY_HOME")


def test_a_database_that_cannot_be_opened(
    cli: Cli, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = put(tmp_path / "items", b"1")
    score = ("score", items, "--model", model, "--out", tmp_path / "out")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "file"))
    refused(cli(*score), f"TALLY_HOME must name a folder, but '{tmp_path}/file' is a file", code=2)
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TALLY_DATABASE", "mysql://me:secret@host/db")
    refused(cli(*score), "TALLY_DATABASE must be a sqlite:/// or postgresql:// URL", code=2)
    assert "secret" not in cli(*score).err
    monkeypatch.setenv("TALLY_DATABASE", f"sqlite:///{tmp_path}/file")
    refused(cli(*score), "database", "file is not a database")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- sources


def test_sources_that_are_not_there(cli: Cli, tmp_path: Path, model: Path) -> None:
    put(tmp_path / "photos", b"1")
    (tmp_path / "empty").mkdir()

    def score(source: object) -> Any:
        return cli("score", source, "--model", model, "--out", tmp_path / "out")

    refused(score(tmp_path / "fotos"), f"no file or folder {tmp_path}/fotos", f"did you mean '{tmp_path}/photos'")
    refused(score(tmp_path / "empty"), f"{tmp_path}/empty holds no files to score")
    refused(score(tmp_path / "photos" / "*.jpg"), f"no file matches {tmp_path}/photos/*.jpg")
    refused(score(tmp_path / "photos" / "x" / "y.bin"), f"there is no file or folder {tmp_path}/photos/x/y.bin")
    refused(score("s4://bucket/photos"), "s4://bucket/photos")
    refused(cli("score", tmp_path / "photos", "--model", tmp_path / "plain.onnx", "--out", "o"), "there is no model")
    assert not (tmp_path / "out").exists()
    assert cli("jobs", "list").out == ""


def test_empty_files(cli: Cli, tmp_path: Path, data: Path) -> None:
    model, out = data / "models" / "classify" / "mobilenet_v1_025_128_u8.onnx", tmp_path / "out.csv"
    photos = put(tmp_path / "photos", b"", b"", names="{}.jpg")
    ran = cli("score", photos, "--model", model, "--out", out)
    refused(ran, "all 2 items failed; the first was 0.jpg: the file is empty (0 bytes)", "tally jobs dead", "retry")
    assert not out.exists()
    good = (data / "images" / "photos" / "parrot.jpg").read_bytes()
    (photos / "1.jpg").write_bytes(good)
    # Nothing had been scored, so that the same command is not in anybody's way.
    ran = cli("score", photos, "--model", model, "--out", out)
    assert ran.code == 0, ran.err
    assert "1 of 2 items scored" in ran.err
    assert "tally jobs dead" in ran.err
    assert [line.split(",")[0] for line in out.read_text().splitlines()] == ["key", "1.jpg"]
    assert (tmp_path / "out.dead.csv").read_text() == "key,stage,error\n0.jpg,decode,the file is empty (0 bytes)\n"
    (photos / "0.jpg").write_bytes(good)
    ran = cli("jobs", "retry", out, "--dead")
    assert ran.code == 0, ran.err
    assert sorted(line.split(",")[0] for line in out.read_text().splitlines()) == ["0.jpg", "1.jpg", "key"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("out.csv", "out.csv.manifest.json", "photos", "tally-home")
    ]


def test_names_of_every_kind(tmp_path: Path, model: Path) -> None:
    items = tmp_path / "items"
    deep = Path(*["d" * 200] * 15)
    given = [
        "plain",
        "ünï 日本 🦉",
        "new\nline",
        "quo\"te, 'comma'; tab\t",
        "n" * 255,
        str(deep / "deep"),
        "-dash",
        "[1]*?",
    ]
    for name in given:
        (items / name).parent.mkdir(parents=True, exist_ok=True)
        (items / name).write_text("x")
    Path(os.fsdecode(os.fsencode(items) + b"/caf\xe9")).write_text("x")
    expected = sorted([*given, "caf\\xe9"])
    for out in ("out", "out.csv", "out.jsonl"):
        job = tally.score(items, model, tmp_path / out, workers=1, quiet=True)
        assert sorted(job.results()["key"].to_pylist()) == expected
        assert sorted(job.query("select key from results")["key"].to_pylist()) == expected
        assert job.record.dead == 0


def test_one_file_several_and_the_same_twice(tmp_path: Path, model: Path) -> None:
    items = put(tmp_path / "items", b"1", b"22", b"333")
    job = tally.score(items / "01.bin", model, tmp_path / "one", workers=1, quiet=True)
    assert job.results().to_pylist() == [{"key": "01.bin", "bytes": 2, "text": ""}]
    job = tally.score([items / "01.bin", items, items / "*.bin"], model, tmp_path / "several", workers=1, quiet=True)
    assert sorted(job.results()["key"].to_pylist()) == names(3)


def test_links_that_lead_in_circles(tmp_path: Path, model: Path) -> None:
    items = put(tmp_path / "items" / "sub", b"1", b"22").parent
    (items / "sub" / "up").symlink_to("..")
    (items / "itself").symlink_to("itself")
    (items / "broken").symlink_to("nowhere")
    (items / "again").symlink_to(items / "sub" / "00.bin")
    job = tally.score(items, model, tmp_path / "out", workers=1, quiet=True)
    assert sorted(job.results()["key"].to_pylist()) == ["again", "sub/00.bin", "sub/01.bin"]
    dead = {row["key"]: row["error"] for row in job.dead().to_pylist()}
    assert set(dead) <= {"itself", "broken"}
    assert "there is no such file" in dead["broken"]


@pytest.mark.parametrize("source", ["", "/", "/**/*", "/*"])
@pytest.mark.parametrize("out", ["out", "below/out/", "out.csv"])
def test_a_job_does_not_score_its_own_output(tmp_path: Path, model: Path, source: str, out: str) -> None:
    items = put(tmp_path / "items", b"1", b"22", b"333")
    job = tally.score(f"{items}{source}", model, f"{items}/{out}", workers=1, quiet=True)
    assert sorted(job.results()["key"].to_pylist()) == names(3)
    job = tally.score(f"{items}{source}", model, f"{items}/{out}", workers=1, quiet=True, overwrite=True)
    assert (job.record.items, sorted(job.results()["key"].to_pylist())) == (3, names(3))


def test_a_file_that_goes_before_it_is_read(tmp_path: Path, model: Path, gate: Path, start: Any) -> None:
    items = put(tmp_path / "items", b"wait", *[b"1"] * 60)
    process = start("score", items, "--model", model, "--out", tmp_path / "out", "--workers", 1)
    process.until(lambda: newest() is not None and newest().items)
    (items / "60.bin").unlink()
    gate.touch()
    assert process.end() == 0, process.output
    assert "60 of 61 items scored" in process.output
    assert keys(tmp_path / "out") == names(60)
    [dead] = list(Jobs().store.dead(newest().id))
    assert (dead.key, dead.stage) == ("60.bin", "read")
    assert dead.error == f"cannot read {items}/60.bin: there is no such file or folder"


# ----------------------------------------------------------------------------------------------- output


def test_output_places_that_are_taken(cli: Cli, tmp_path: Path, model: Path) -> None:
    items, other = put(tmp_path / "items", b"1", b"22"), put(tmp_path / "other", b"1")
    out = tmp_path / "out"
    assert cli("score", items, "--model", model, "--out", out).code == 0
    job = newest().id
    refused(cli("score", items, "--model", model, "--out", out), f"job {job} already did this same job", "--overwrite")
    refused(cli("score", other, "--model", model, "--out", out), f"holds the results of job {job}", "--overwrite")
    refused(cli("score", items, "--model", model, "--out", items), f"{items} is not empty: 2 files", "another output")
    (tmp_path / "mine.csv").write_text("mine")
    refused(cli("score", items, "--model", model, "--out", tmp_path / "mine.csv"), "Tally did not write it")
    refused(cli("score", items, "--model", model, "--out", tmp_path / "mine.csv", "--overwrite"), "did not write it")
    assert (tmp_path / "mine.csv").read_text() == "mine"
    refused(cli("score", items, "--model", model, "--out", items / "00.bin"), "is a file", ".csv", code=2)
    assert keys(out) == names(2)
    assert [record.id for record in Jobs().store.newest()] == [job]

    ran = cli("score", other, "--model", model, "--out", out, "--overwrite")
    assert ran.code == 0, ran.err
    assert keys(out) == names(1)
    assert json.loads((out / "_manifest.json").read_text())["job"] == newest().id != job
    refused(cli("query", job, "select 1"), f"the results of job {job} at {out} were replaced by those of job")


def test_a_job_that_is_about_to_begin_has_no_results_yet(
    cli: Cli, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is there before its place is: whoever looks between the two is not told that results are gone."""
    claim, told = StagedSink.claim, []

    def late(sink: StagedSink, job_id: str, *, overwrite: bool = False) -> None:
        if not told:
            with pytest.raises(JobStateError) as refusal:
                Jobs().query(job_id, "select 1")
            told.append(refusal.value.message)
        claim(sink, job_id, overwrite=overwrite)

    monkeypatch.setattr(StagedSink, "claim", late)
    items = put(tmp_path / "items", b"1")
    assert cli("score", items, "--model", model, "--out", tmp_path / "out").code == 0
    assert told == [f"job {newest().id} has not begun: there are no results yet"]


def test_overwriting_leaves_what_is_not_tallys(cli: Cli, tmp_path: Path, model: Path) -> None:
    items, out = put(tmp_path / "items", b"1", b"22"), tmp_path / "out"
    assert cli("score", items, "--model", model, "--out", out).code == 0
    (out / "notes.txt").write_text("mine")
    refused(cli("score", items, "--model", model, "--out", out, "--overwrite"), "notes.txt")
    assert keys(out) == names(2)
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    (items / "02.bin").write_bytes(b"333")
    assert cli("score", items, "--model", model, "--out", out, "--overwrite").code == 0
    assert keys(out) == names(3)


@pytest.mark.parametrize("same", [True, False], ids=["the same job", "two jobs"])
def test_two_at_the_same_moment_into_one_place(tmp_path: Path, model: Path, gate: Path, start: Any, same: bool) -> None:
    items = put(tmp_path / "items", b"wait", b"22", b"333")
    other = items if same else put(tmp_path / "other", b"wait", b"22", b"333")
    both = [start("score", each, "--model", model, "--out", tmp_path / "out", "-w", 1) for each in (items, other)]
    both[0].until(lambda: any(each.process.poll() is not None for each in both) or sum(map(scored, both)) > 1)
    gate.touch()
    assert sorted(each.end() for each in both) == [0, 1], [each.output for each in both]
    loser = next(each for each in both if each.process.returncode)
    assert "error: " in loser.output
    assert "Traceback" not in loser.output
    known = ("is being written by job", "is this same job", "has just been")
    assert any(words in loser.output for words in known), loser.output
    assert keys(tmp_path / "out") == names(3)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert [record.state for record in Jobs().store.newest()] == ["finished"]


def scored(process: Process) -> bool:
    return "items scored" in process.output


# --------------------------------------------------------------------------- stopping, and going on again


@pytest.fixture
def running(tmp_path: Path, model: Path, gate: Path, start: Any) -> Process:
    """A job that has scored some of its 20 items, and cannot end before the gate opens."""
    items = put(tmp_path / "items", *[b"1"] * 8, b"wait", *[b"1"] * 11)
    process: Process = start("score", items, "--model", model, "--out", tmp_path / "out", "--workers", 2)
    process.until(lambda: done() >= 4 and gate.with_suffix(".waiting").exists())
    return process


def test_while_a_job_runs(cli: Cli, tmp_path: Path, model: Path, gate: Path, running: Process) -> None:
    job, out = newest().id, tmp_path / "out"
    score = ("score", tmp_path / "items", "--model", model, "--out", out)
    refused(cli(*score), f"job {job} is this same job, and is under way", f"tally jobs watch {job}")
    refused(cli(*score, "--resume"), " goes on with it", "There is nothing to resume")
    refused(cli(*score, "--overwrite"), f"job {job} is this same job, and is under way")
    refused(cli("jobs", "delete", job), f"job {job} is running", f"tally jobs cancel {job}")
    assert "driven by" in cli("jobs", "show", out).out
    [[count]] = [list(row.values()) for row in tally.Job(job).query("select count(*) from results").to_pylist()]
    assert 4 <= count < 20

    assert cli("jobs", "pause", out).code == 0
    running.until(lambda: newest().state == "paused")
    assert cli("jobs", "list").out.splitlines()[1].split()[1] == "paused"
    ran = cli("jobs", "resume", out)
    assert (ran.code, ran.out) == (0, f"job {job} was told to continue; follow it with: tally jobs watch {job}\n")
    running.until(lambda: newest().state == "running")
    gate.touch()
    ran = cli("jobs", "watch", out)
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "finished: 20/20 (100%), 0 failed"
    assert running.end() == 0
    assert "paused; go on with: tally jobs resume" in running.output
    assert "resumed" in running.output
    assert keys(out) == names(20)


def test_cancelling_from_elsewhere(cli: Cli, tmp_path: Path, running: Process) -> None:
    job = newest().id
    assert cli("jobs", "cancel", job).out == f"job {job} is cancelled\n"
    assert running.end() == 1
    assert f"job {job} is cancelled" in running.output
    assert newest().state == "cancelled"
    assert not (tmp_path / "out" / "_tally").exists()
    refused(cli("jobs", "resume", job), f"job {job} is cancelled")
    place = str(tmp_path / "out")
    gone = f"error: no job {place!r}: job {job}, which was to write there, is cancelled"
    refused(cli("jobs", "show", place), gone, f"See it with: tally jobs show {job}")
    assert cli("jobs", "delete", job).code == 0
    assert newest() is None


def test_ctrl_c_twice_and_then_on_with_other_options(
    cli: Cli, tmp_path: Path, model: Path, gate: Path, running: Process
) -> None:
    running.signal(signal.SIGINT)
    running.until(lambda: "stopping: running chunks are finished and saved (again to kill them)" in running.output)
    running.signal(signal.SIGINT)
    assert running.end() == 130
    record = newest()
    assert f"job {record.id} is interrupted: {record.done:,} items are done and saved\n" in running.output
    assert f"  Go on with: tally jobs resume {record.id}\n" in running.output
    assert "Traceback" not in running.output
    assert record.state == "interrupted"
    assert record.usage["seconds"] > 0

    score = ("score", tmp_path / "items", "--model", model, "--out", tmp_path / "out", "--workers", 1)
    refused(cli(*score), f"job {record.id} is this same job, and was interrupted", f"tally jobs resume {record.id}")
    gate.touch()
    ran = cli(*score, "--price-per-hour", 2, "--resume")
    assert ran.code == 0, ran.err
    assert "cost: " in ran.err
    assert newest().id == record.id
    assert newest().spec["workers"] == [1, 1]
    assert keys(tmp_path / "out") == names(20)


def test_a_stop_before_anything_is_scored_is_in_nobodys_way(
    cli: Cli, tmp_path: Path, model: Path, gate: Path, start: Any
) -> None:
    items = put(tmp_path / "items", b"wait")
    process = start("score", items, "--model", model, "--out", tmp_path / "out")
    process.until(gate.with_suffix(".waiting").exists)
    process.signal(signal.SIGINT)
    process.until(lambda: "stopping" in process.output)
    process.signal(signal.SIGINT)
    assert process.end() == 130
    assert "Traceback" not in process.output
    assert "tally jobs resume" in process.output
    gate.touch()
    ran = cli("score", items, "--model", model, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert [record.state for record in Jobs().store.newest()] == ["finished"]


def test_deleting_and_starting_again(cli: Cli, tmp_path: Path, model: Path, gate: Path, running: Process) -> None:
    running.process.kill()
    running.end()
    job, out = newest().id, tmp_path / "out"
    assert newest().state == "interrupted"
    refused(cli("score", tmp_path / "items", "--model", tmp_path / "plain.py", "--out", out), "was interrupted")
    assert "and its unfinished output" in cli("jobs", "delete", job, "--dry-run").out
    assert newest().id == job
    gate.touch()
    ran = cli("score", tmp_path / "items", "--model", model, "--out", out, "--overwrite")
    assert ran.code == 0, ran.err
    assert keys(out) == names(20)
    [record] = Jobs().store.newest()
    assert record.id != job
    assert cli("jobs", "delete", out).out == f"job {record.id} is deleted\n"
    assert keys(out) == names(20)  # finished results stay
    refused(cli("jobs", "show", record.id), f"no job {record.id!r}", "tally jobs list")


def test_deleting_an_unfinished_job_removes_what_it_wrote(cli: Cli, tmp_path: Path, running: Process) -> None:
    running.process.kill()
    running.end()
    assert cli("jobs", "delete", tmp_path / "out").code == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert newest() is None


def test_a_model_that_changes_between(cli: Cli, tmp_path: Path, model: Path, gate: Path, running: Process) -> None:
    running.process.kill()
    running.end()
    record = newest()
    gate.touch()
    model.write_text(SCORER + "\n# changed\n")
    ran = cli("jobs", "resume", record.id)
    refused(ran, "plain", "changed since the job began", str(tmp_path))
    with pytest.raises(ModelChangedError):
        tally.Job(record.id).resume(quiet=True)
    # As another model it is another job, and the place is not free for that.
    ran = cli("score", tmp_path / "items", "--model", model, "--out", tmp_path / "out", "--resume")
    refused(ran, f"holds what job {record.id} has scored", "--overwrite", f"tally jobs resume {record.id}")
    model.write_text(SCORER)
    ran = cli("jobs", "resume", record.id)
    assert ran.code == 0, ran.err
    assert keys(tmp_path / "out") == names(20)


@pytest.mark.parametrize("answer", ["y", "", "n"])
def test_somebody_at_the_keyboard_is_asked(
    tmp_path: Path, model: Path, gate: Path, running: Process, answer: str
) -> None:
    running.process.kill()
    running.end()
    job = newest().id
    gate.touch()
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "tally", "score", str(tmp_path / "items"), "--model", str(model)]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    answered = False
    while select.select([keyboard], [], [], 60)[0]:
        try:
            shown += os.read(keyboard, 65536)
        except OSError:  # the other end is closed
            break
        if not answered and f"Resume job {job}? [Y/n]:".encode() in shown:
            os.write(keyboard, answer.encode() + b"\n")
            answered = True
    os.close(keyboard)
    code = process.wait(timeout=60)
    text = shown.decode()
    assert answered, text
    assert "Traceback" not in text
    assert f"job {job} is this same job, and was interrupted" in text
    if answer == "n":
        assert code == 1
        assert f"tally jobs resume {job}" in text
        assert newest().state == "interrupted"
    else:
        assert code == 0, text
        assert "20 of 20 items scored" in text
        assert newest().id == job
        assert keys(tmp_path / "out") == names(20)


def test_the_same_from_python(tmp_path: Path, model: Path) -> None:
    items, out = put(tmp_path / "items", b"1", b"22"), tmp_path / "out"
    job = tally.score(items, model, out, workers=1, quiet=True)
    with pytest.raises(JobExistsError) as refused:
        tally.score(items, model, out, workers=1, quiet=True)
    assert refused.value.job_id == job.id
    again = tally.score(items, model, out, workers=1, quiet=True, overwrite=True)
    assert again.results().num_rows == 2
    again.delete()
    assert keys(out) == names(2)


def test_what_is_dead_holds_nothing_in_memory(tmp_path: Path) -> None:
    """The frames of an error's traceback would keep the picture that was being decoded."""
    photos = put(tmp_path / "photos", b"\xff\xd8\xff\xe0 no more", b"", names="{}.jpg")
    (photos / "2.jpg").symlink_to("nowhere")
    source = FileSource.describe([str(photos)], "image")
    [chunk] = source.plan(None, 0, lambda: ChunkLimit(10, 2**20))
    [batch] = source.read(chunk, tally.Scorer(), Timings())
    assert [position for position, _ in batch.dead] == [0, 1, 2]
    for _, error in batch.dead:
        assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)
