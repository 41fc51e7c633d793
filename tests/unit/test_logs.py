"""Logs of workers have an end, whatever workers print."""

from __future__ import annotations

import os
from pathlib import Path

from tally.engines import logs


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
