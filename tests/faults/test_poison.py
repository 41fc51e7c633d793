"""One item that crashes, hangs, bloats or raises costs that item, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

import tally
from tally.errors import JobError
from tally.jobs.facade import Jobs

SCORERS = Path(__file__).with_name("scorers")


@pytest.fixture
def items(tmp_path: Path) -> Path:
    folder = tmp_path / "items"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03}.bin").write_bytes(b"x" * number)
    return folder


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"crash", "killed by SIGSEGV"),
        (b"exit", "exit code 3"),
        (b"hang", "longer than its time limit of 8 s"),
        (b"eat", "over its limit of"),
        (b"raise", "ValueError: this file says raise"),
    ],
)
def test_poison_costs_one_item(items: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    (items / "030-poison.bin").write_bytes(content)
    job = tally.score(
        items,
        SCORERS / "poison.py",
        tmp_path / "out",
        workers=2,
        # On a busy machine, an item that is not to blame may take seconds.
        timeout=8 if content == b"hang" else None,
        memory="600MiB",
        quiet=True,
    )
    dead = job.dead().to_pylist()
    assert [each["key"] for each in dead] == ["030-poison.bin"]
    assert reason in dead[0]["error"]
    rows = job.results().to_pylist()
    assert sorted(row["key"] for row in rows) == [f"{number:03}.bin" for number in range(60)]
    assert all(row["bytes"] == int(row["key"][:3]) for row in rows)


def test_dead_items_are_replayed_once_mended(items: Path, tmp_path: Path) -> None:
    poison = items / "030-poison.bin"
    poison.write_bytes(b"raise")
    job = tally.score(items, SCORERS / "poison.py", tmp_path / "out", workers=1, quiet=True)
    assert job.record.dead == 1
    poison.write_bytes(b"mended")
    job.retry(quiet=True)
    record = job.record
    assert (record.state, record.done, record.dead, record.generation) == ("finished", 61, 0, 1)
    rows = job.results().to_pylist()
    assert len(rows) == 61
    assert {"key": "030-poison.bin", "bytes": 6} in rows


def test_a_stopped_job_is_mended_and_finishes_whole(items: Path, tmp_path: Path) -> None:
    for number in range(40):
        (items / f"{number:03}.bin").write_bytes(b"raise")
    with pytest.raises(JobError, match="stopped early"):
        tally.score(items, SCORERS / "poison.py", tmp_path / "out", workers=1, max_dead="10%", min_dead=8, quiet=True)
    record = Jobs().store.newest(limit=1)[0]
    assert 0 < record.dead <= record.done < 60
    for number in range(40):
        (items / f"{number:03}.bin").write_bytes(b"x" * number)
    job = tally.Job(record.id).retry(quiet=True)
    assert (job.record.state, job.record.done, job.record.dead) == ("finished", 60, 0)
    assert sorted((row["key"], row["bytes"]) for row in job.results().to_pylist()) == [
        (f"{number:03}.bin", number) for number in range(60)
    ]


def test_a_job_in_which_everything_fails_stops_early(tmp_path: Path) -> None:
    folder = tmp_path / "items"
    folder.mkdir()
    for number in range(30_000):
        (folder / f"{number:05}.bin").touch()
    scorer = tmp_path / "failing.py"
    text = (SCORERS / "failing.py").read_text()
    # Slowly, so that a coordinator that has to wait for a core does not find everything done.
    scorer.write_text(text.replace("        raise", "        __import__('time').sleep(0.001)\n        raise"))
    assert scorer.read_text() != text
    with pytest.raises(JobError, match=r"stopped early: [\d,]+ of the first [\d,]+ items failed.*model server is away"):
        tally.score(folder, scorer, tmp_path / "out", workers=2, quiet=True)
    record = Jobs().store.newest(limit=1)[0]
    assert record.state == "failed"
    assert 1000 <= record.done < 30_000


def test_a_small_job_in_which_everything_fails_is_no_success(tmp_path: Path) -> None:
    folder = tmp_path / "items"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.bin").touch()
    with pytest.raises(JobError, match="all 3 items failed"):
        tally.score(folder, SCORERS / "failing.py", tmp_path / "out", workers=1, quiet=True)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
