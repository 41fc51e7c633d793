"""The same command again: after the model was mended, the database lost, staged files removed, a device refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tally
from tally.errors import JobStateError, OutputExistsError, SpecError, StorageError
from tally.jobs.facade import Jobs

Cli = Callable[..., Any]

SCRIPT = """
import os

def init():
    {init}

def run(mini_batch):
    return [{{"n": len(os.path.basename(each)){run}}} for each in mini_batch]
"""


@pytest.fixture
def items(tmp_path: Path) -> Path:
    folder = tmp_path / "items"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(str(number))
    return folder


def script(path: Path, *, init: str = "pass", run: str = "") -> Path:
    path.write_text(SCRIPT.format(init=init, run=run))
    return path


def results(out: Path) -> list[int]:
    return [row["n"] for row in pq.read_table(out).to_pylist()]


def test_a_mended_script_takes_the_place_of_one_that_scored_nothing(cli: Cli, tmp_path: Path, items: Path) -> None:
    model, out = tmp_path / "score.py", tmp_path / "out"
    command = ("score", items, "--model", model, "--out", out, "-q", "-w", 1)
    script(model, init="raise RuntimeError('no weights')")
    ran = cli(*command)
    assert (ran.code, "no weights" in ran.err, "give the same command again" in ran.err) == (1, True, True)
    script(model, run=" + unknown")
    ran = cli(*command)
    assert (ran.code, "all 4 items failed" in ran.err, "give the same command again" in ran.err) == (1, True, True)
    script(model)
    ran = cli(*command)
    assert ran.code == 0, ran.err
    assert results(out) == [5] * 4
    assert [record.state for record in Jobs().store.newest()] == ["finished"]


def begun(tmp_path: Path, items: Path, model: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tally.Job:
    """A job that has scored two of four items and was stopped."""
    from tally.jobs.store import JobStore

    class Stopped(Exception):
        pass

    plain = JobStore.commit

    def commit(self: Any, lease: Any, **more: Any) -> Any:
        if self.get(lease.job_id).done >= 2:
            raise Stopped("stopped")
        # One chunk is handed out at a time: of several, all might be done before the next look.
        return plain(self, lease, **more | {"take": min(more.get("take", 0), 1)})

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "commit", commit)
        with pytest.raises(Stopped):
            tally.score(items, model, tmp_path / "out", batch_size=1, workers=1, quiet=True, **fields)
    [record] = Jobs().store.newest()
    assert (record.state, record.done) == ("failed", 2)
    return tally.Job(record.id)


def test_a_place_with_other_results_is_replaced_only_on_request(
    tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = script(tmp_path / "score.py"), tmp_path / "out"
    job = begun(tmp_path, items, model, monkeypatch)
    script(model, run=" + 1")
    with pytest.raises(OutputExistsError, match=r"has scored \(2 items\) with another model; it failed") as caught:
        tally.score(items, model, out, batch_size=1, quiet=True)
    assert "overwrite=True" in str(caught.value)
    assert job.id in str(caught.value)
    script(model)
    with pytest.raises(OutputExistsError, match="another batch_size"):
        tally.score(items, model, out, batch_size=2, resume=True, quiet=True)
    again = tally.score(items, script(model, run=" + 1"), out, batch_size=1, overwrite=True, quiet=True)
    assert [row["n"] for row in again.results().to_pylist()] == [6] * 4


@pytest.mark.parametrize("how", ["overwrite", "mend"])
def test_a_lost_database_blocks_no_place(
    cli: Cli, tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch, home: Path, how: str
) -> None:
    model, out = script(tmp_path / "score.py"), tmp_path / "out"
    job = begun(tmp_path, items, model, monkeypatch)
    refused = cli("doctor", "--mend", out)
    assert (refused.code, f"is claimed by job {job.id}, which is failed" in refused.err) == (1, True)
    shutil.rmtree(home)
    with pytest.raises(OutputExistsError, match=f"claimed by job {job.id}, which is not in this database") as caught:
        tally.score(items, model, out, quiet=True)
    assert "tally doctor --mend" in str(caught.value)
    if how == "mend":
        ran = cli("doctor", "--mend", out)
        assert (ran.code, "is free again" in ran.out) == (0, True), ran.err
        assert "nothing to mend" in cli("doctor", "--mend", out).out
    assert tally.score(items, model, out, overwrite=how == "overwrite", quiet=True).results().num_rows == 4


@pytest.mark.parametrize("what", ["attempts", "all"])
def test_staged_files_that_are_gone_are_told_and_scored_again(
    tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model, out = script(tmp_path / "score.py"), tmp_path / "out"
    job = begun(tmp_path, items, model, monkeypatch)
    shutil.rmtree(out / "_tally" / "attempts" if what == "attempts" else out)
    with pytest.raises(StorageError, match="no longer") as caught:
        job.resume(quiet=True)
    assert ("overwrite=True" if what == "attempts" else "the command that began the job") in str(caught.value)
    again = tally.score(items, model, out, batch_size=1, overwrite=what == "attempts", quiet=True)
    assert again.results().num_rows == 4


def test_options_that_do_not_change_the_result_may_change_on_resume(
    cli: Cli, tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = script(tmp_path / "score.py")
    job = begun(tmp_path, items, model, monkeypatch, timeout=50.0)
    with pytest.raises(SpecError, match="batch_size: another value would give another result"):
        job.resume(batch_size=3, quiet=True)
    with pytest.raises(SpecError, match="device"):
        job.resume(device="gpu", quiet=True)
    ran = cli("jobs", "resume", job.id, "--device", "cpu", "--timeout", 70, "-w", "1", "-q")
    assert ran.code == 0, ran.err
    spec = job.record.spec
    assert (spec["device"], spec["timeout"], spec["workers"], job.record.state) == ("cpu", 70.0, [1, 1], "finished")
    with pytest.raises(JobStateError, match="is finished"):
        job.resume(device="cpu", quiet=True)
