"""Jobs of a database that an earlier version of Tally wrote: they are listed, found, described and gone on with."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from tests.services import postgres_database

from tally.database import migrate
from tally.database.connect import connect
from tally.database.tables import alerts
from tally.jobs.chunks import Done
from tally.jobs.store import JobStore
from tally.sinks.base import Output, OutputDescription
from tally.sinks.factory import reopen
from tally.triggers.store import ScheduleStore

ROWS = Path(__file__).resolve().parents[1] / "before" / "schema_0003.json"

OUTPUTS = {
    "/old/rows": ("rows", "parquet", "items", False),
    "/old/merged.CSV": ("rows", "csv", "items", True),
    "/old/strict": ("rows", "jsonl", "items", False),
    "/old/watched": ("rows", "parquet", "items", False),
    "/old/pictures": ("images", None, "items", False),
    "/old/stopped-videos": ("video", "mp4", "frames", False),
    "/old/video.mkv": ("video", "mkv", "frames", True),
    "/old/stills": ("images", "jpg", "frames", False),
    "/old/new-pictures": ("images", "png", "items", False),
    # A scorer in Python that has not written anything says nothing of what it writes.
    "/old/unknown": ("rows", "parquet", "items", False),
    "/old/styled": ("images", None, "items", False),
    "/old/styled-videos": ("video", "mp4", "frames", False),
    "/old/styled.mp4": ("video", "mp4", "frames", False),
    "/old/masks": ("images", None, "items", False),
    "/old/areas": ("rows", "parquet", "items", False),
    "/old/boxes": ("images", None, "items", False),
    "/old/table.parquet": ("rows", "parquet", "rows", True),
    "/old/twice": ("rows", "parquet", "items", False),
    "/old/lost": ("rows", "parquet", "items", False),
}


def restore(url: str) -> None:
    """The database as ``tests/before/make.py`` found it."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.__file__).parent / "migrations"))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        then = sa.MetaData()
        then.reflect(connection)
        content = json.loads(ROWS.read_text())
        for table in then.sorted_tables:
            rows = [
                {name: _value(table.c[name], value) for name, value in row.items()}
                for row in content.get(table.name, ())
            ]
            if rows:
                connection.execute(sa.insert(table), rows)
            if rows and connection.dialect.name == "postgresql" and isinstance(rows[0].get("id"), int):
                last = max(row["id"] for row in rows)
                connection.execute(
                    sa.select(sa.func.setval(sa.func.pg_get_serial_sequence(table.name, "id"), sa.literal(last)))
                )
    engine.dispose()


def _value(column: sa.Column[Any], value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["base64"])
    if isinstance(column.type, sa.JSON):
        return sa.null() if value is None else json.loads(value)
    return value


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    """What that database becomes."""
    with ExitStack() as stack:
        url = f"sqlite:///{tmp_path / 'tally.db'}"
        if request.param == "postgresql":
            url = stack.enter_context(postgres_database())
        restore(url)
        store = JobStore(connect(url))
        yield store
        store.engine.dispose()


@pytest.fixture
def job(store: JobStore) -> Callable[[str], str]:
    """The id of the job that wrote there."""
    ids = {record.output["place"]: record.id for record in store.newest()}
    return ids.__getitem__


def test_every_job_says_what_its_output_is(store: JobStore) -> None:
    described = {}
    for record in store.newest():
        output = OutputDescription.from_json(record.output)
        described[output.place] = (output.kind, output.format, record.unit, output.merged)
        assert output.columns is None
        assert output.place == record.place == record.spec["out"].rstrip("/")
        sink = reopen(output)
        assert (sink.place, sink.describe().kind, sink.describe().merged) == (output.place, output.kind, output.merged)
    assert described == OUTPUTS


def test_jobs_are_found_by_their_place(store: JobStore, job: Callable[[str], str]) -> None:
    for place in OUTPUTS:
        for written in (place, place + "/"):
            found = store.at(written)
            if place == "/old/twice":
                assert found is None  # it is cancelled
            else:
                assert found is not None
                assert (found.id, found.place) == (job(place), place)


def test_jobs_are_listed(store: JobStore, job: Callable[[str], str]) -> None:
    def listed(**filters: Any) -> set[str]:
        return {record.output["place"] for record in store.list(**filters).jobs}

    assert listed(state="finished") == {
        "/old/rows", "/old/merged.CSV", "/old/watched", "/old/pictures", "/old/video.mkv", "/old/stills",
    }  # fmt: skip
    assert listed(state="failed") == {"/old/strict", "/old/stopped-videos"}
    assert listed(state="interrupted") == {"/old/lost"}
    assert [each.id for each in store.orphaned()] == [job("/old/lost")]
    assert listed(model="mosaic_720") == {"/old/styled", "/old/styled-videos", "/old/styled.mp4"}
    assert listed(text="MOSAIC") == listed(model="mosaic_720")
    assert listed(text="sensors.csv") == listed(place="/old/table.parquet") == {"/old/table.parquet"}
    assert listed(text=job("/old/boxes")) == {"/old/boxes"}
    pages, page = [], store.list(limit=4)
    pages += page.jobs
    while page.next is not None:
        page = store.list(limit=4, after=page.next)
        pages += page.jobs
    assert pages == store.newest()


def test_what_else_was_there_still_is(store: JobStore, job: Callable[[str], str]) -> None:
    strict = store.get(job("/old/strict"))
    assert (strict.items, strict.done, strict.dead) == (5, 5, 1)
    (dead,) = store.dead(strict.id)
    assert (dead.stage, dead.chunk.count) == ("score", 1)
    lease = store.acquire(strict.id, seconds=60)
    assert lease is not None
    store.reopen(lease, [dead.chunk], published=False)
    _, (taken,) = store.commit(lease, take=9)
    written = Output(["new.jsonl"], rows=1)
    store.commit(lease, done=[Done(taken.id, taken.attempt, taken.chunk.count, written)])
    assert written in list(store.outputs(strict.id))
    video = list(store.outputs(job("/old/stopped-videos")))
    assert all(file.endswith(".mp4") for each in video for file in each.files)
    assert store.get(job("/old/rows")).manifest is not None
    schedules = ScheduleStore(store.engine)
    running, waiting = reversed(schedules.runs("hourly"))
    assert (running.state, waiting.state) == ("running", "pending")
    taken_over = schedules.claim("hourly")  # its process is long gone
    assert taken_over is not None
    assert (taken_over.id, taken_over.attempts) == (running.id, 2)
    with store.engine.connect().execution_options(reading=True) as connection:
        found = {row.rule: row.state for row in connection.execute(sa.select(alerts))}
    assert found == {"anomalies > 0": "pending", "failed": "quiet"}
