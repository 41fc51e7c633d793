"""What a server is to start keeps its promises on every database: one process gets it, and no start is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.services import postgres_database

from tally.database.connect import connect
from tally.database.tables import jobs as jobs_table
from tally.database.tables import metadata, starts
from tally.errors import JobStateError, OwnershipLostError
from tally.jobs.facade import Jobs
from tally.jobs.spec import make
from tally.jobs.store import JobStore


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def jobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Jobs]:
    sqlite = f"sqlite:///{tmp_path / 'tally.db'}"
    engine = connect(sqlite if request.param == "sqlite" else request.getfixturevalue("postgres"))
    yield Jobs(JobStore(engine))
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(sa.delete(table))
    engine.dispose()


def enqueue(jobs: Jobs, number: int = 0) -> str:
    spec = make(source=["/nowhere/in"], model="/nowhere/model.onnx", out=f"/nowhere/out-{number}")
    return jobs.enqueue(spec, who="ada").id


def test_a_waiting_job_is_a_job_like_others(jobs: Jobs) -> None:
    job = enqueue(jobs)
    record = jobs.get(job)
    assert (record.state, record.alive, record.model["name"]) == ("waiting", False, "/nowhere/model.onnx")
    assert [each.id for each in jobs.list(state="waiting", text="nowhere/out").jobs] == [job]
    assert jobs.store.counts_by_state()["waiting"] == 1
    assert jobs.get("/nowhere/out-0").id == job
    assert jobs.store.at("/nowhere/out-0", begun=True) is None  # it has written nothing there
    with pytest.raises(JobStateError, match="has written nothing"):
        jobs.results(job)
    with pytest.raises(JobStateError, match="waits for a server"):
        jobs.run(job)
    assert jobs.cancel(job).state == "cancelled"
    jobs.delete(job)
    assert jobs.starts.waiting() == set()


def test_starts_are_claimed_in_order_by_one_each(jobs: Jobs) -> None:
    first, second = enqueue(jobs, 1), enqueue(jobs, 2)
    claimed = [jobs.starts.claim() for _ in range(3)]
    assert [each.job_id if each else None for each in claimed] == [first, second, None]
    assert claimed[0] is not None
    assert (claimed[0].action, claimed[0].who, claimed[0].attempts) == ("submit", "ada", 1)


def test_what_a_dead_process_claimed_is_claimed_again(jobs: Jobs) -> None:
    job = enqueue(jobs)
    lost = jobs.starts.claim()
    with jobs.store.engine.begin() as connection:
        connection.execute(sa.update(starts).values(owner_pid=2**22 + 1))  # no process has this id
    again = jobs.starts.claim()
    assert lost is not None
    assert again is not None
    assert (again.job_id, again.attempts) == (job, 2)
    with pytest.raises(OwnershipLostError):
        jobs.starts.get(job, lost.token or "")
    jobs.starts.settle(job, lost.token or "")  # changes nothing
    assert jobs.starts.waiting() == {job}
    jobs.starts.settle(job, again.token or "")
    assert jobs.starts.waiting() == set()


def test_what_is_put_back_is_claimed_again(jobs: Jobs) -> None:
    job = enqueue(jobs)
    claimed = jobs.starts.claim()
    assert claimed is not None
    returned = jobs.starts.put_back(job, claimed.token or "")
    assert returned is not None
    assert returned.attempts == 1
    assert jobs.starts.put_back(job, claimed.token or "") is None
    again = jobs.starts.claim()
    assert again is not None
    assert again.attempts == 2
    returned = jobs.starts.put_back(job, again.token or "", counted=False)
    assert returned is not None
    assert returned.attempts == 1
    assert jobs.starts.claim() is not None


def test_asked_twice_it_is_started_once(jobs: Jobs) -> None:
    job = enqueue(jobs)
    jobs.starts.ask(job, "resume")
    claimed = jobs.starts.claim()
    assert claimed is not None
    assert claimed.action == "submit"
    assert jobs.starts.claim() is None


def test_only_one_process_makes_the_waiting_job_a_real_one(jobs: Jobs) -> None:
    job = enqueue(jobs)
    record = jobs.get(job)
    described = {"kind": "rows", "format": "parquet", "unit": "items", "place": "/nowhere/out-0", "columns": None}
    fields = {"fingerprint": "f", "spec": record.spec, "model": {"name": "model"}, "output": described}
    assert jobs.store.create(**fields, waiting=job).state == "created"
    with pytest.raises(JobStateError, match="does not wait any more"):
        jobs.store.create(**fields, waiting=job)
    assert not jobs.store.give_up(job, "failed", error="late")
    assert jobs.get(job).state == "created"


@pytest.mark.parametrize(
    ("state", "action", "taken"),
    [
        ("interrupted", "resume", True),
        ("failed", "resume", True),
        ("finished", "resume", False),
        ("finished", "retry", True),
        ("cancelled", "resume", False),
        ("cancelled", "retry", False),
        ("waiting", "resume", True),
    ],
)
def test_what_can_be_asked_of_a_job(jobs: Jobs, state: str, action: str, taken: bool) -> None:
    job = enqueue(jobs)
    claimed = jobs.starts.claim()
    assert claimed is not None
    jobs.starts.settle(job, claimed.token or "")
    with jobs.store.engine.begin() as connection:
        connection.execute(sa.update(jobs_table).values(state=state))
    if not taken:
        with pytest.raises(JobStateError):
            jobs.ask_to_start(job, action)  # type: ignore[arg-type]
        assert jobs.starts.waiting() == set()
        return
    jobs.ask_to_start(job, action)  # type: ignore[arg-type]
    assert jobs.starts.waiting() == (set() if state == "waiting" else {job})
