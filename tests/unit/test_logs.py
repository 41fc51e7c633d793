"""Logs of workers have an end, whatever workers print; those of other processes can be read by programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tally.engines import logs
from tally.errors import SpecError
from tally.logs import log_to_stderr


def test_head_and_tail_are_kept_while_workers_append(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    worker = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    line = b"%07d " + b"x" * 1015 + b"\n"
    try:
        os.write(worker, b"the first\n")
        logs.bound(log)
        for number in range(40_000):
            os.write(worker, line % number)
            if number % 1000 == 999:
                logs.bound(log)
                assert log.stat().st_size <= logs.MOST_BYTES
    finally:
        os.close(worker)
    kept = log.read_bytes()
    lines = kept.splitlines()
    assert lines[0] == b"the first"
    assert lines[1] == line.strip() % 0
    assert lines[-1] == line.strip() % 39_999
    assert b"MiB left out]" in kept
    numbers = [int(each[:7]) for each in lines if each[:7].isdigit()]
    assert numbers == sorted(numbers)
    assert numbers[-3000:] == list(range(37_000, 40_000))


def test_a_log_that_is_not_there_is_no_matter(tmp_path: Path) -> None:
    logs.bound(tmp_path / "none.log")
    assert not (tmp_path / "none.log").exists()


def logged(log_format: str, statements: str) -> list[str]:
    """The lines of a process that logs."""
    program = f"import logging\nfrom tally.logs import about, log_to_stderr\nlog_to_stderr()\n{statements}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TALLY_LOG_FORMAT": log_format}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stderr.splitlines()


def test_lines_are_json_and_tell_job_and_chunk_where_they_are_known() -> None:
    lines = logged(
        "json",
        "from tally.jobs.events import Finished, WorkerLost, write_to_log\n"
        "log = logging.getLogger('tally')\n"
        "log.warning('https://user:hunter2@host/ %s', 'a\\nb \\x1b[2J')\n"
        "with about('one'):\n"
        "    write_to_log(WorkerLost(96, 32, 'it crashed: password=hunter2'))\n"
        "    with about('two'):\n"
        "        log.info('which of them is not known')\n"
        "    try:\n"
        "        raise ValueError('token=hunter2')\n"
        "    except ValueError:\n"
        "        log.exception('it failed')\n"
        "log.info('said by whom knows', extra={'job': 'three'})\n",
    )
    assert "hunter2" not in "".join(lines)
    found = [json.loads(line) for line in lines]
    assert [each.get("job") for each in found] == [None, "one", None, "one", "three"]
    assert [each.get("chunk") for each in found] == [None, {"first": 96, "count": 32}, None, None, None]
    assert [each["level"] for each in found] == ["warning", "info", "info", "error", "info"]
    assert found[0]["message"] == "https://user:***@host/ a\nb \x1b[2J"
    assert "Traceback" in found[3]["trace"]
    assert datetime.fromisoformat(found[0]["time"]).tzinfo is not None


def test_lines_are_text_otherwise() -> None:
    (line,) = logged("", "logging.getLogger('tally').info('password=hunter2 \\x1b[2J')")
    assert line.endswith("INFO password=*** \\x1b[2J")


def test_a_format_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLY_LOG_FORMAT", "xml")
    with pytest.raises(SpecError, match="must be text or json, not 'xml'"):
        log_to_stderr()
