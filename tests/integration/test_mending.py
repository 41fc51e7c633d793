"""Tables with lines that cannot be read, mended and retried: what was finished stays, what is mended joins it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.extent import first

import tally
from tally.errors import StorageError, TallyError
from tally.jobs.facade import Jobs

ROWS = 12
BAD = (3, 7)


class Doubled(tally.Scorer):
    input = "table"
    features = ("value",)
    columns = {"twice": "float64"}  # noqa: RUF012
    batch_size = 4

    def score(self, batch: Any) -> Any:
        return [{"twice": 2.0 * value} for value in batch["value"].to_pylist()]


def write(path: Path, *, bad: tuple[int, ...], form: str, changed: int | None = None, rows: int = ROWS) -> None:
    """A table of two devices, of which some values are no numbers."""
    lines = [] if form == "jsonl" else ["device,value"]
    for number in range(rows):
        device, value = "ab"[number % 2], "oops" if number in bad else number + 0.5 + (number == changed)
        lines.append(json.dumps({"device": device, "value": value}) if form == "jsonl" else f"{device},{value}")
    path.write_text("\n".join(lines) + "\n")


def published(out: Path) -> dict[str, bytes]:
    """The files that readers of a finished output see."""
    return {each.name: each.read_bytes() for each in out.iterdir() if each.is_file()}


@pytest.mark.parametrize(
    ("form", "out", "by"),
    first(
        2,
        [
            ("csv", "out.csv", ("device",)),
            ("jsonl", "out", ()),
            ("csv", "out", ()),
            ("jsonl", "out.jsonl", ("device",)),
        ],
    ),
)
def test_what_is_mended_joins_what_was_scored(tmp_path: Path, form: str, out: str, by: tuple[str, ...]) -> None:
    table = tmp_path / f"t.{form}"
    write(table, bad=BAD, form=form)
    given: dict[str, Any] = {
        "keep": "device",
        "by": by,
        "quiet": True,
        "csv": {"types": {"value": "DOUBLE"}} if form == "csv" else {},
    }
    if form == "jsonl":
        del given["csv"]
    job = tally.score(table, Doubled, tmp_path / out, **given)
    assert [each["key"].split()[0] for each in job.dead().to_pylist()] == [table.name] * 2
    write(table, bad=BAD[1:], form=form)
    job.retry(quiet=True)
    assert (job.record.state, job.dead().num_rows, job.record.done) == ("finished", 1, ROWS)
    write(table, bad=(), form=form)
    job.retry(quiet=True)
    assert (job.record.state, job.dead().num_rows) == ("finished", 0)
    whole = tally.score(table, Doubled, tmp_path / f"whole-{out}", **given)

    def rows(each: tally.Job) -> list[Any]:
        return sorted((row["key"], row["device"], row["twice"]) for row in each.results().to_pylist())

    assert rows(job) == rows(whole)
    assert len(rows(job)) == ROWS


def test_a_source_that_is_another_is_refused_and_the_job_stays_finished(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    write(table, bad=BAD, form="csv")
    job = tally.score(table, Doubled, tmp_path / "out", quiet=True)
    before, dead = published(tmp_path / "out"), job.dead()
    changes: list[dict[str, int]] = [{"changed": 5}, {"rows": ROWS + 1}, {"rows": ROWS - 2}]
    for change in changes:
        write(table, bad=(), form="csv", **change)
        with pytest.raises(StorageError, match="not only the lines that could not be read") as caught:
            job.retry(quiet=True)
        assert "overwrite=True" in str(caught.value)
        assert published(tmp_path / "out") == before
        assert (job.record.state, job.record.dead, job.dead()) == ("finished", 2, dead)
    table.unlink()
    with pytest.raises(TallyError):
        job.retry(quiet=True)
    assert published(tmp_path / "out") == before
    write(table, bad=(), form="csv")
    job.retry(quiet=True)
    assert job.results().num_rows == ROWS


def test_windows_whose_readings_were_mended_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    lines = ["time,value", *(f"2026-01-01 00:{minute:02},{minute}" for minute in range(20))]
    table.write_text("\n".join([*lines[:5], "2026-01-01 00:04,oops", *lines[6:]]))

    class Means(Doubled):
        features = ("value_mean",)

        def score(self, batch: Any) -> Any:
            return [{"twice": 2.0 * value} for value in batch["value_mean"].to_pylist()]

    job = tally.score(table, Means, tmp_path / "out", time="time", window="10m", quiet=True)
    [dead] = job.dead().to_pylist()
    assert "windows are not retried: mend the line and score again with --overwrite" in dead["error"]
    before = published(tmp_path / "out")
    table.write_text("\n".join(lines))
    with pytest.raises(StorageError, match="over windows"):
        job.retry(quiet=True)
    assert published(tmp_path / "out") == before
    assert job.record.state == "finished"


def test_lines_that_a_quote_had_hidden_are_not_left_out_in_silence(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('value\n1\n"2\n3\n4\n')
    job = tally.score(table, Doubled, tmp_path / "out", quiet=True)
    assert (job.results().num_rows, job.dead().num_rows) == (1, 1)
    assert "if lines after it are missing, mend it" in job.dead().to_pylist()[0]["error"]
    before = published(tmp_path / "out")
    table.write_text("value\n1\n2\n3\n4\n")
    with pytest.raises(StorageError, match=r"it has 4 rows now, .* as it had 2"):
        job.retry(quiet=True)
    assert published(tmp_path / "out") == before
    assert tally.score(table, Doubled, tmp_path / "out", quiet=True, overwrite=True).results().num_rows == 4


def test_a_retry_that_is_killed_takes_nothing_away(tmp_path: Path) -> None:
    """The process is killed after each step that changes something, and the next one goes on."""
    table, out = tmp_path / "t.csv", tmp_path / "out"
    write(table, bad=BAD, form="csv")
    scorer = tmp_path / "doubled.py"
    scorer.write_text(
        "import tally\n\nclass Doubled(tally.Scorer):\n    input, features, batch_size = 'table', ('value',), 4\n"
        "    columns = {'twice': 'float64'}\n\n    def score(self, batch):\n"
        "        return [{'twice': 2.0 * value} for value in batch['value'].to_pylist()]\n"
    )
    job = tally.score(table, scorer, out, quiet=True)
    before = published(out)
    write(table, bad=(), form="csv")
    program = (
        "import os, sys\n"
        "from tally.jobs.facade import Jobs\nfrom tally.jobs.store import JobStore\n"
        "from tally.sinks.staging import StagedSink\n"
        "name, job = sys.argv[1:]\n"
        "owner = StagedSink if name in ('claim', 'finalize') else JobStore\n"
        "plain = getattr(owner, name)\n"
        "def killed(*given, **more):\n"
        "    plain(*given, **more)\n"
        "    os.kill(os.getpid(), 9)\n"
        "setattr(owner, name, killed)\n"
        "Jobs().run(job, retry_dead=True)\n"
    )
    for step in ("acquire", "claim", "reopen", "commit", "finalize"):
        ended = subprocess.run([sys.executable, "-c", program, step, job.id], capture_output=True, check=False)
        assert ended.returncode == -9, ended.stderr.decode()
        there = published(out)
        assert "_SUCCESS" in there
        if step != "finalize":
            assert there == before
        assert job.results().num_rows == (ROWS if step == "finalize" else ROWS - len(BAD))
    job.resume(quiet=True)
    assert (job.record.state, job.record.dead) == ("finished", 0)
    assert sorted(row["twice"] for row in job.results().to_pylist()) == [2 * (n + 0.5) for n in range(ROWS)]
    assert not (out / "_tally").exists()


def test_a_retry_is_cancelled_and_the_job_is_as_finished_as_it_was(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    write(table, bad=BAD, form="csv")
    job = tally.score(table, Doubled, tmp_path / "out", quiet=True)
    before = published(tmp_path / "out")
    jobs = Jobs()
    lease = jobs.store.acquire(job.id, seconds=60, retry=True)
    assert lease is not None
    sink = jobs.sink(job.id)
    sink.claim(job.id)
    jobs.store.reopen(lease, [each.chunk for each in jobs.dead(job.id)], published=True)
    jobs.store.release(lease, "interrupted")
    assert jobs.cancel(job.id).state == "finished"
    assert published(tmp_path / "out") == before
    assert (job.record.state, job.record.dead, job.dead().num_rows) == ("finished", 2, 2)


def test_what_a_refused_retry_says_to_do_works(tmp_path: Path) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "out.csv"
    scorer = tmp_path / "doubled.py"
    scorer.write_text(
        "import tally\n\nclass Doubled(tally.Scorer):\n    input, columns = 'table', {'twice': 'float64'}\n\n"
        "    def score(self, batch):\n        return [{'twice': 2 * float(x)} for x in batch['value'].to_pylist()]\n"
    )
    write(table, bad=(3,), form="csv")
    command = ["score", str(table), "--model", str(scorer), "--out", str(out)]

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tally", *words], capture_output=True, text=True, check=False)

    assert typed(*command).returncode == 0
    before = out.read_bytes()
    write(table, bad=(), form="csv")
    refused = typed("jobs", "retry", str(out), "--dead")
    assert refused.returncode == 1
    assert "give the command that began the job again, with --overwrite" in refused.stderr
    assert "--dead" not in refused.stderr
    assert out.read_bytes() == before
    assert typed(*command, "--overwrite").returncode == 0
    assert len(out.read_text().splitlines()) == ROWS + 1
