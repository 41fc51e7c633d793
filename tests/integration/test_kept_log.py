"""``log: true``: what was logged about a job stands beside its output, also over kills and resumes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.extent import first
from tests.objectstores import moto_s3
from tests.server import lengths
from tests.waiting import wait_for

from tally.jobs.facade import Jobs
from tally.jobs.kept_log import merged
from tally.storage import open_store

ERROR = "cannot reach https://ana:hunter2@example.org/x?token=hunter2"


@pytest.fixture
def folder(tmp_path: Path, home: Path) -> Path:
    (tmp_path / "quick.py").write_text(lengths(error=ERROR))
    (tmp_path / "slow.py").write_text(lengths(pause=0.3, error=ERROR))
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number:02}.txt").write_text("x" * number)
    return tmp_path


def lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode().splitlines()]


def begun(content: bytes) -> int:
    """How many processes had the job."""
    return sum("begins or goes on" in line["message"] for line in lines(content))


def test_a_log_beside_a_folder_and_beside_a_file(folder: Path, cli: Callable[..., Any]) -> None:
    (folder / "in" / "bad.txt").write_text("bad")
    options = ("score", folder / "in", "--model", folder / "quick.py", "--workers", 1, "--batch-size", 1, "--log")
    assert cli(*options, "--out", folder / "out").code == 0
    found = lines((folder / "out" / "_log.jsonl").read_bytes())
    manifest = json.loads((folder / "out" / "_manifest.json").read_text())
    assert manifest["log_file"] == {"path": "_log.jsonl"}
    assert {line["job"] for line in found} == {manifest["job"]}
    assert sum(line["chunk"]["count"] for line in found if "chunk" in line and "rows in" in line["message"]) == 13
    (dead,) = [line for line in found if line["message"].startswith("bad.txt: ")]
    assert "ValueError" in dead["message"]
    assert "hunter2" not in str(found)
    assert cli("query", folder / "out", "select count(*) as n from results").out.split()[-1] == "12"

    assert cli(*options, "--out", folder / "out", "--overwrite").code == 0
    again = lines((folder / "out" / "_log.jsonl").read_bytes())
    assert {line["job"] for line in again} == {json.loads((folder / "out" / "_manifest.json").read_text())["job"]}
    assert cli(*options[:-1], "--out", folder / "out", "--overwrite").code == 0
    assert not (folder / "out" / "_log.jsonl").exists()  # it was the log of results that are gone

    assert cli(*options, "--out", folder / "rows.csv").code == 0
    assert begun((folder / "rows.csv.log.jsonl").read_bytes()) == 1
    (folder / "in" / "bad.txt").write_text("mended")
    assert cli("jobs", "retry", folder / "rows.csv", "--dead").code == 0
    assert begun((folder / "rows.csv.log.jsonl").read_bytes()) == 2  # what was there stays

    (folder / "other.csv.log.jsonl").write_text("somebody's")
    told = cli(*options, "--out", folder / "other.csv")
    assert (told.code, "other.csv.log.jsonl exists already" in told.err) == (1, True)


@pytest.mark.parametrize("ending", first(1, [signal.SIGKILL, signal.SIGINT]))
def test_a_log_goes_on_where_it_was(folder: Path, cli: Callable[..., Any], ending: signal.Signals) -> None:
    options = ("score", folder / "in", "--model", folder / "slow.py", "--workers", 1, "--batch-size", 1, "--log")
    command = [sys.executable, "-m", "tally", *map(str, options), "--out", str(folder / "out")]
    _until_some_is_done(command, ending)
    assert cli(*options, "--out", folder / "out", "--resume").code == 0
    content = (folder / "out" / "_log.jsonl").read_bytes()
    assert begun(content) == 2
    told = ["begins" if "begins or" in line["message"] else "chunk" for line in lines(content) if _is_told(line)]
    assert told[:2] == ["begins", "chunk"]  # what came before the end of the first process
    assert told[-1] == "chunk"
    assert told[2:].count("begins") == 1


def test_another_machine_goes_on_with_what_was_logged_before(
    folder: Path, home: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto_s3() as service:
        service.enter(monkeypatch)
        out = f"{service.make('logs')}/out"
        options = ("score", folder / "in", "--model", folder / "slow.py", "--workers", 1, "--batch-size", 1, "--log")
        _until_some_is_done([sys.executable, "-m", "tally", *map(str, options), "--out", out], signal.SIGINT)
        (log,) = (home / "logs").glob("*.jsonl")
        log.rename(folder / "of-another-machine")
        assert cli(*options, "--out", out, "--resume").code == 0
        assert begun(open_store(out).read("_log.jsonl")) == 2
        assert not open_store(out).exists("_tally/work/log.jsonl")


def test_what_two_machines_have_logged_is_put_in_order() -> None:
    first, second, third = (b'{"time": "2026-01-0%d", "message": "%d"}\n' % (day, day) for day in (1, 2, 3))
    assert merged(first, b"") == merged(b"", first) == merged(first, first) == first
    assert merged(first + second, first) == first + second
    assert merged(first + third, first + second) == first + second + third


def _is_told(line: dict[str, Any]) -> bool:
    return "begins or goes on" in line["message"] or " rows in " in line["message"]


def _until_some_is_done(command: list[str], ending: signal.Signals) -> None:
    with subprocess.Popen(command) as process:
        jobs = Jobs()
        wait_for(lambda: any(each.done > 1 for each in jobs.list().jobs), process)
        process.send_signal(ending)
        process.wait()
