"""Which jobs that have lost their coordinator a server goes on with: those whose files it sees."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from tests.server import lengths

import tally

pytest.importorskip("fastapi")

from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.server.supervisor import Supervisor


@pytest.fixture
def record(tmp_path: Path) -> JobRecord:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"a")
    (tmp_path / "lengths.py").write_text(lengths())
    job = tally.score(tmp_path / "in", model=tmp_path / "lengths.py", out=tmp_path / "out", workers=1)
    return Jobs().get(job.id)


def test_a_container_that_is_started_again_knows_its_jobs_by_their_output(record: JobRecord, tmp_path: Path) -> None:
    """Its process ids are others, and so is its host."""
    reaches = Supervisor(Jobs(), parallel=1)._reaches
    elsewhere = replace(record, owner_host="elsewhere (1)")
    assert reaches(record)
    assert reaches(elsewhere)
    (tmp_path / "in").rename(tmp_path / "moved")
    assert not reaches(elsewhere), "its source is not here"
    (tmp_path / "moved").rename(tmp_path / "in")
    shutil.rmtree(tmp_path / "out")
    assert not reaches(elsewhere), "a folder of this name may be another one"
    (tmp_path / "out").mkdir()
    assert not reaches(elsewhere)


def test_where_the_output_is_in_a_bucket_the_name_tells(record: JobRecord) -> None:
    reaches = Supervisor(Jobs(), parallel=1)._reaches
    out = {**record.spec, "out": "s3://bucket/out"}
    assert reaches(replace(record, spec=out, owner_host=f"{socket.gethostname()} (1)"))
    assert not reaches(replace(record, spec=out, owner_host="elsewhere (1)"))
    assert reaches(replace(record, spec={**out, "source": ["s3://bucket/in"]}, owner_host="elsewhere (1)"))
