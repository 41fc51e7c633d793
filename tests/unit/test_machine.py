"""What is told of workers is what this machine's processes are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("fastapi")

import sqlalchemy as sa

from tally.database.tables import jobs as table
from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.server.machine import Machine

WORKER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "held = bytearray(80 << 20); print(1, flush=True); input()"],
                         stdin=subprocess.PIPE)
input()
child.communicate(b"\\n")
"""


@pytest.fixture
def record() -> JobRecord:
    """A job that this process drives."""
    store = Jobs().store
    job = store.create(
        fingerprint="f", spec={"model": "m", "out": "/out"}, model={}, output={"kind": "rows", "place": "/out"}
    )
    store.acquire(job.id, seconds=600)
    return store.get(job.id)


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """A child of this process that has a child itself, which holds 80 MiB."""
    process = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.communicate(b"\n")


def test_workers_are_told_with_what_their_processes_take(
    record: JobRecord, worker: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (grandchild,) = psutil.Process(worker.pid).children()
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{grandchild.pid}, 300'\necho '{worker.pid}, 40'\necho '1, [N/A]'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    machine = Machine()

    (driven,) = machine.driven([record])
    assert (driven.job, driven.pid) == (record.id, os.getpid())
    assert driven.workers is not None
    (first,) = [each for each in driven.workers if each.pid == worker.pid]
    assert first.cpu is None
    assert first.memory > 80 << 20
    assert first.gpu == 340 << 20
    (driven,) = machine.driven([record])
    assert driven.workers is not None
    assert [each.cpu is None for each in driven.workers if each.pid == worker.pid] == [False]


def test_no_gpu_is_no_number(
    record: JobRecord, worker: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (driven,) = Machine().driven([record])
    assert driven.workers is not None
    assert {each.gpu for each in driven.workers} == {None}


def test_a_job_of_another_machine_has_workers_that_are_not_seen(record: JobRecord) -> None:
    jobs = Jobs()
    with jobs.store.engine.begin() as connection:
        connection.execute(sa.update(table).values(owner_host="elsewhere (4026531836)"))
    (driven,) = Machine().driven([jobs.store.get(record.id)])
    assert (driven.machine, driven.workers) == ("elsewhere", None)
    with jobs.store.engine.begin() as connection:
        connection.execute(sa.update(table).values(lease_until=0.0))
    assert Machine().driven([jobs.store.get(record.id)]) == []
