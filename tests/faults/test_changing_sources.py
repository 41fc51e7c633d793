"""Whole jobs whose source is replaced after a kill, or goes away while they run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.extent import first
from tests.faults.storms import SCORERS, rows, start, tally
from tests.waiting import wait_for

from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.storage import open_store

COUNT = 40


@pytest.fixture(autouse=True)
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GATE", str(tmp_path / "gate"))
    return tmp_path / "gate"


def begin(source: object, input: str, out: Path) -> subprocess.Popen[bytes]:  # noqa: A002
    """A job that has scored its first batch, and waits in the next."""
    command = tally("score", source, "--model", SCORERS / "gated.py", "--set", f"input={input}", "--out", out)
    process = start([*command, "--workers", "1"], out.with_name("log"))
    wait_for(lambda: latest() is not None and latest().done > 0, process, told=out.with_name("log").read_text)
    return process


def latest() -> JobRecord:
    return next(iter(Jobs().store.newest(limit=1)), None)  # type: ignore[return-value]


def killed(source: object, input: str, out: Path) -> JobRecord:  # noqa: A002
    """A job that was killed after its first batch."""
    process = begin(source, input, out)
    process.kill()
    process.wait(timeout=30)
    return latest()


def run(*arguments: object, code: int = 0) -> str:
    ran = subprocess.run(tally(*arguments), capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def held(out: Path) -> dict[str, str]:
    return {str(row["key"]): str(row["held"]) for row in rows(out)}


def dead(out: Path) -> list[str]:
    """The reasons of the job's dead items."""
    return [each.error for each in Jobs().store.dead(latest().id)]


def place(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> str:
    return str(tmp_path / "in") if name == "folder" else str(request.getfixturevalue(name))


@pytest.mark.parametrize(("where", "input"), first(2, [("folder", "path"), ("azure", "path"), ("s3", "bytes")]))
def test_files_that_were_replaced_between_kill_and_resume(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    gate: Path,
    where: str,
    input: str,  # noqa: A002
) -> None:
    source, out = place(request, tmp_path, where), tmp_path / "out"
    store = open_store(source)
    names = [f"{number:03}" for number in range(COUNT)]
    for name in names:
        store.write(name, b"old")
    record = killed(source, input, out)
    assert 0 < record.done < record.items
    for name in names:
        store.write(name, b"new")
    gate.touch()
    run("jobs", "resume", out, "-q")
    found, failed = held(out), dead(out)
    planned, later = names[: record.items], names[record.items :]
    assert [found[name] for name in later] == ["new"] * len(later), "these were planned after the change"
    assert {name: found[name] for name in planned if name in found} == dict.fromkeys(planned[: record.done], "old")
    assert len(failed) == record.items - record.done
    assert all("has changed since the job was planned" in reason for reason in failed)
    assert all("retry OUT --dead" in reason for reason in failed)

    run("jobs", "retry", out, "--dead", "-q")
    assert held(out) == {**dict.fromkeys(names, "new"), **dict.fromkeys(planned[: record.done], "old")}


@pytest.mark.parametrize("where", first(1, ["s3", "folder"]))
def test_a_table_that_was_replaced_between_kill_and_resume(
    request: pytest.FixtureRequest, tmp_path: Path, gate: Path, where: str
) -> None:
    source, out = place(request, tmp_path, where), tmp_path / "out"
    tables = {version: tmp_path / f"{version}.parquet" for version in ("old", "new")}
    for version, path in tables.items():
        pq.write_table(pa.table({"held": [version] * 50_000}), path)
    assert len({path.stat().st_size for path in tables.values()}) == 1
    open_store(source).upload("rows.parquet", tables["old"])
    record = killed(f"{source}/rows.parquet", "table", out)
    assert 0 < record.done < 50_000
    before = tmp_path / "before"
    if where == "folder":
        Path(source, "rows.parquet").rename(before)
    open_store(source).upload("rows.parquet", tables["new"])
    gate.touch()
    said = run("jobs", "resume", out, "-q", code=1)
    assert "rows.parquet has changed since the job was planned" in said
    assert "Put back what was there and resume the job" in said
    assert "--overwrite" in said
    assert latest().done == record.done, "nothing of the new one was scored"
    if where == "folder":
        before.rename(Path(source, "rows.parquet"))
        run("jobs", "resume", out, "-q")
        assert list(held(out).values()) == ["old"] * 50_000


def test_a_video_that_was_replaced_between_kill_and_resume(tmp_path: Path, gate: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, version in (("a", 0), ("b", 0), ("new", 255)):
        path = tmp_path / "new.mp4" if name == "new" else source / f"{name}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width = stream.height = 64
            for _ in range(20):
                picture = np.full((64, 64, 3), version, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    record = killed(source, "image", out)
    assert 0 < record.done < 20
    (tmp_path / "new.mp4").replace(source / "a.mp4")
    gate.touch()
    run("jobs", "resume", out, "-q")
    found = held(out)
    assert set(found.values()) == {"old"}
    assert [key for key in found if key.startswith("a.mp4")] == [f"a.mp4/{n:06}" for n in range(record.done)]
    assert [key for key in found if key.startswith("b.mp4")] == [f"b.mp4/{n:06}" for n in range(20)]
    assert any("a.mp4 has changed since the job was planned" in reason for reason in dead(out))


@pytest.mark.parametrize(("input", "empty"), [("bytes", True), ("path", False)])
def test_a_disk_that_is_unmounted_stops_the_job_and_costs_no_item(
    tmp_path: Path,
    gate: Path,
    input: str,  # noqa: A002
    empty: bool,
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(COUNT):
        (source / f"{number:03}").write_text("old")
    process = begin(source, input, out)
    source.rename(tmp_path / "disk")
    if empty:
        source.mkdir()
    gate.touch()
    assert process.wait(timeout=60) == 1
    log = out.with_name("log").read_text()
    assert f"{source} is gone, or is not the folder that it was: was its disk unmounted?" in log
    assert latest().dead == 0
    if empty:
        source.rmdir()
    (tmp_path / "disk").rename(source)
    run("jobs", "resume", out, "-q")
    assert held(out) == {f"{number:03}": "old" for number in range(COUNT)}
