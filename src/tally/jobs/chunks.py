"""A job's chunks in the database: the statements that plan them, hand them out, and store what became of them.

All of it runs inside a transaction that has the job's row locked and its owner checked; see :class:`JobStore`.
A chunk is ``pending``, ``running`` or ``done``. Attempts are counted when they are handed out. An outcome counts only
if its chunk is running: of two attempts at one chunk, the first commit wins.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from tally.database.tables import chunks, dead_items
from tally.jobs.packed import PackedChunk, as_json, pack
from tally.sinks.base import Output
from tally.sources.base import Chunk
from tally.text import storable

IDS_PER_STATEMENT = 1000
"""Fewer than the parameters that either database allows in one statement."""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk as handed out: ``attempts`` counts this one too; ``losses`` counts lost workers."""

    id: int
    packed: PackedChunk
    attempts: int
    losses: int
    attempt: str

    @property
    def chunk(self) -> Chunk:
        return self.packed.unpacked()


@dataclass(frozen=True, slots=True)
class Dead:
    """An item that failed for good; ``chunk`` holds it alone, so that it can be replayed."""

    key: str
    stage: str
    error: str
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Done:
    """The outcome of one attempt. ``usage`` holds numbers to add to the job's."""

    id: int
    attempt: str
    count: int
    output: Output
    dead: Sequence[Dead] = ()
    usage: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lost:
    """A chunk that has to be run again. ``parts`` (perhaps just itself) replace it, each with the losses counted
    against it."""

    id: int
    parts: Sequence[tuple[Chunk, int]]


def new_nonce() -> str:
    """Names one change of a coordinator, however often it is tried."""
    return secrets.token_hex(6)


def attempt_id(first: int, chunk_id: int, nonce: str) -> str:
    """Names an attempt's output: its position in the source's order first, and unique by its end."""
    return f"{first:012d}-{nonce}{chunk_id:x}"


def of(table: sa.Table, job_ids: Sequence[str]) -> sa.ColumnElement[bool]:
    """Rows of these jobs, at least one. Of one, an index has them in order."""
    return table.c.job_id == job_ids[0] if len(job_ids) == 1 else table.c.job_id.in_(job_ids)


def batches(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """The ids in parts, each for one statement."""
    return (ids[begin : begin + IDS_PER_STATEMENT] for begin in range(0, len(ids), IDS_PER_STATEMENT))


# -- planning and handing out --------------------------------------------------------------------------


def insert(connection: sa.Connection, job_id: str, generation: int, new: Sequence[tuple[Chunk, int]]) -> None:
    """Add pending chunks, each with the losses counted against it."""
    if not new:
        return
    if connection.dialect.name == "postgresql":
        rows = [
            {"first": chunk.first, "count": chunk.count, "losses": losses, "payload": pack(chunk).hex()}
            for chunk, losses in new
        ]
        given = {"rows": json.dumps(rows), "job": job_id, "generation": generation}
        connection.execute(_INSERT_ON_POSTGRES, given)
    else:
        connection.exec_driver_sql(
            _INSERT_ON_SQLITE,
            [(job_id, generation, chunk.first, chunk.count, losses, pack(chunk)) for chunk, losses in new],
        )


def take(connection: sa.Connection, job_id: str, limit: int, nonce: str) -> list[StoredChunk]:
    """Hand out up to ``limit`` pending chunks, in the source's order."""
    pending = (chunks.c.job_id == job_id, chunks.c.state == "pending")
    order = (chunks.c.first, chunks.c.id)
    rows = connection.execute(sa.select(*_HANDED_OUT).where(*pending).order_by(*order).limit(limit)).all()
    if rows:
        number, first, *_ = rows[-1]
        connection.execute(
            sa.update(chunks)
            .where(*pending, sa.tuple_(*order) <= sa.tuple_(sa.literal(first), sa.literal(number)))
            .values(state="running", attempts=chunks.c.attempts + 1, nonce=nonce)
        )
    return [_handed_out(row, nonce, before=1) for row in rows]


def taken(connection: sa.Connection, job_id: str, nonce: str) -> list[StoredChunk]:
    """The chunks that the commit with that nonce handed out."""
    running = (chunks.c.job_id == job_id, chunks.c.state == "running", chunks.c.nonce == nonce)
    rows = connection.execute(sa.select(*_HANDED_OUT).where(*running).order_by(chunks.c.first, chunks.c.id)).all()
    return [_handed_out(row, nonce) for row in rows]


def rewrite(connection: sa.Connection, job_id: str, change: Callable[[Chunk], Chunk]) -> None:
    """Change what waits to be handed out; the items stay the same."""
    query = sa.select(chunks.c.id, chunks.c.first, chunks.c.count, chunks.c.payload)
    pending = query.where(chunks.c.job_id == job_id, chunks.c.state == "pending")
    for number, first, count, payload in connection.execute(pending).all():
        chunk = PackedChunk(first, count, payload).unpacked()
        if (changed := change(chunk)) is not chunk:
            connection.execute(sa.update(chunks).where(chunks.c.id == number).values(payload=pack(changed)))


def put_back(connection: sa.Connection, job_id: str) -> None:
    """Make all chunks that were handed out pending again."""
    running = (chunks.c.job_id == job_id, chunks.c.state == "running")
    connection.execute(sa.update(chunks).where(*running).values(state="pending"))


_HANDED_OUT = [chunks.c[name] for name in ("id", "first", "count", "payload", "attempts", "losses")]


def _handed_out(row: Sequence[Any], nonce: str, before: int = 0) -> StoredChunk:
    number, first, count, payload, attempts, losses = row  # by name it takes several times as long
    packed, attempt = PackedChunk(first, count, payload), attempt_id(first, number, nonce)
    return StoredChunk(number, packed, attempts + before, losses, attempt)


# -- what became of them -------------------------------------------------------------------------------


def replace(connection: sa.Connection, job_id: str, generation: int, lost: Sequence[Lost]) -> bool:
    """Replace the chunks by their parts, except those that are done by now. Whether there were any."""
    running = _running(connection, job_id, [each.id for each in lost])
    replaced = {each.id: each for each in lost if each.id in running}
    # Inserted before the deletion: SQLite would give a part the id that has become free, and a late outcome of the
    # lost chunk would pass for that part's.
    insert(connection, job_id, generation, [part for each in replaced.values() for part in each.parts])
    for ids in batches(list(replaced)):
        connection.execute(sa.delete(chunks).where(chunks.c.job_id == job_id, chunks.c.id.in_(ids)))
    return bool(replaced)


def finish(connection: sa.Connection, job_id: str, done: Sequence[Done], nonce: str) -> list[Done]:
    """Store the outcomes that count, and their dead items; returns them: for each running chunk, the first."""
    first = {each.id: each for each in reversed(done)}
    counted = [each for each in done if first[each.id] is each]
    if connection.dialect.name == "postgresql":
        rows = [{"chunk": each.id, "by": each.attempt, "made": _written(each.output)} for each in counted]
        changed = connection.execute(_DONE_ON_POSTGRES, {"rows": json.dumps(rows), "nonce": nonce, "job": job_id})
    else:
        some = [(each.attempt, _written(each.output), nonce, each.id, job_id) for each in counted]
        changed = connection.exec_driver_sql(_DONE_ON_SQLITE, some)
    if changed.rowcount < len(counted):
        counted = finished(connection, counted, nonce)
    if dead := [each for one in counted for each in one.dead]:
        connection.execute(
            sa.insert(dead_items),
            [
                {
                    "job_id": job_id, "key": storable(each.key), "stage": each.stage,
                    "error": storable(each.error), "first": each.chunk.first, "payload": pack(each.chunk),
                }
                for each in dead
            ],
        )  # fmt: skip
    return counted


def finished(connection: sa.Connection, done: Sequence[Done], nonce: str) -> list[Done]:
    """The outcomes among ``done`` that the commit of that nonce has stored."""
    stored: set[tuple[int, str]] = set()
    for ids in batches([each.id for each in done]):
        query = sa.select(chunks.c.id, chunks.c.attempt).where(chunks.c.id.in_(ids), chunks.c.nonce == nonce)
        stored.update((row.id, row.attempt) for row in connection.execute(query.where(chunks.c.state == "done")))
    return [each for each in done if (each.id, each.attempt) in stored]


def _running(connection: sa.Connection, job_id: str, ids: Sequence[int]) -> set[int]:
    found: set[int] = set()
    for some in batches(ids):
        query = sa.select(chunks.c.id).where(chunks.c.id.in_(some), chunks.c.job_id == job_id)
        found.update(connection.scalars(query.where(chunks.c.state == "running")))
    return found


def _written(output: Output) -> str:
    fields = {"files": output.files, "rows": output.rows, "bytes": output.bytes, "facts": output.facts}
    return as_json(fields).decode()


# A commit holds thousands of rows. PostgreSQL is sent them as one JSON document: a statement for each row costs several
# times as much. SQLite gets them as they are: their way through SQLAlchemy takes longer than the database does.
# What may hold characters that PostgreSQL's JSON functions refuse is text inside the document. The statistics of a
# table that grows this fast are outdated and say that hardly any chunk is running; coalesce() keeps the planner from
# relying on them.
_DONE_ON_POSTGRES = sa.text(
    """
    UPDATE chunks
    SET state = 'done', attempt = given.by, output = CAST(given.made AS json), payload = NULL, nonce = :nonce,
        done_at = CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)
    FROM json_to_recordset(CAST(:rows AS json)) AS given(chunk bigint, by text, made text)
    WHERE chunks.id = given.chunk AND coalesce(chunks.job_id = :job AND chunks.state = 'running', false)
    """
)
_DONE_ON_SQLITE = (
    "UPDATE chunks SET state = 'done', attempt = ?, output = ?, payload = NULL, nonce = ?, "
    "done_at = (julianday('now') - 2440587.5) * 86400.0 WHERE id = ? AND job_id = ? AND state = 'running'"
)
_INSERT_ON_POSTGRES = sa.text(
    """
    INSERT INTO chunks (job_id, generation, first, count, state, attempts, losses, payload)
    SELECT :job, :generation, first, count, 'pending', 0, losses, decode(payload, 'hex')
    FROM json_to_recordset(CAST(:rows AS json)) AS given(first bigint, count integer, losses integer, payload text)
    """
)
_INSERT_ON_SQLITE = (
    "INSERT INTO chunks (job_id, generation, first, count, state, attempts, losses, payload) "
    "VALUES (?, ?, ?, ?, 'pending', 0, ?, ?)"
)
