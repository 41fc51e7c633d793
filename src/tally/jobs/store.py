"""The job store: every job's state, kept so that any coordinator can go on where another was killed.

One coordinator owns a job at a time. It proves that with its token in every statement that changes the
job, inside the same transaction: a coordinator that has lost its job changes nothing. Leases run by the
database's clock. Statements are portable between SQLite and PostgreSQL, but for those that send many rows.

A chunk is ``pending``, ``running`` or ``done``. Attempts are counted when they are handed out. An outcome
is committed only if its chunk is not done: of two attempts at one chunk, the first commit wins.

A connection that is cut leaves it open whether the transaction was committed. So every change of a coordinator may
be tried again: those that would add up carry a nonce, which is kept in the rows that they change.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import sqlalchemy as sa

from tally.database.clock import now
from tally.database.tables import chunks, dead_items, jobs
from tally.errors import JobNotFoundError, JobStateError, OwnershipLostError
from tally.sinks.base import Output
from tally.sources.base import Chunk
from tally.text import storable

ENDED = ("finished", "cancelled")
"""Job states that nothing leads out of, except ``jobs retry``."""

CHANNEL = "tally_jobs"
"""PostgreSQL's name for what is heard about jobs (NOTIFY): the id of one whose user wants something."""

_SOME = 1000
"""So many ids in one statement: fewer than the parameters that either database takes."""

_COMPRESSED_FROM = 1024
"""Bytes of a chunk's payload from which on it is compressed: below, that takes longer than it is worth."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job as the store knows it. Times are seconds since the epoch.

    state: created, running, paused, interrupted, failed, finished or cancelled. A job whose coordinator
        was killed is still ``running`` in the table; it is reported as interrupted (``alive`` is false).
    wanted: what the user asked for last: run, pause or cancel.
    items: planned so far; all of them when ``planned``. done, dead: committed so far.
    """

    id: str
    fingerprint: str
    spec: dict[str, Any] = field(repr=False)
    model: dict[str, Any]
    state: str
    wanted: str
    error: str | None
    remarks: list[str]
    generation: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    owner: str | None
    owner_host: str | None
    owner_pid: int | None
    lease_until: float | None
    plan_cursor: str | None
    planned: bool
    items: int
    done: int
    dead: int
    rows: int
    bytes: int
    usage: dict[str, Any]
    manifest: dict[str, Any] | None
    alive: bool = False

    @property
    def unit(self) -> str:
        """What its items are."""
        return {"video": "frames", "table": "rows"}.get(self.spec.get("media") or "", "items")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to drive a job: sent with every change."""

    job_id: str
    token: str


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk as handed out: ``attempts`` counts this one too; ``losses`` counts lost workers."""

    id: int
    chunk: Chunk
    attempts: int
    losses: int
    attempt: str


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
    """A chunk that has to be run again: ``parts`` (it may be just itself) take its place, each with the
    number of losses that counts against it."""

    id: int
    parts: Sequence[tuple[Chunk, int]]


class JobStore:
    """Reads and changes jobs. Safe to use from several threads; holds no state but the engine."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    # -- reading -----------------------------------------------------------------------------------

    def get(self, job_id: str) -> JobRecord:
        """The job by its id, or by the unambiguous beginning of it. Raises JobNotFoundError."""
        query = self._select().where(jobs.c.id.startswith(job_id, autoescape=True)).limit(3)
        rows: Sequence[sa.RowMapping] = []
        if job_id.isascii() and job_id.isprintable():  # what no id holds, a database may refuse to compare
            with self._read() as connection:
                rows = connection.execute(query).mappings().all()
        exact = [row for row in rows if row["id"] == job_id]
        found = exact or rows
        if not job_id or not found:
            raise JobNotFoundError(f"no job {job_id!r}", hint="'tally jobs list' shows the jobs there are.")
        if len(found) > 1:
            some = ", ".join(row["id"] for row in found)
            raise JobNotFoundError(f"{job_id!r} is the beginning of several jobs: {some}", hint="Type more of it.")
        return _record(found[0])

    def newest(self, *, limit: int = 50) -> list[JobRecord]:
        """The newest jobs, newest first."""
        query = self._select().order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        with self._read() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def find(self, fingerprint: str) -> JobRecord | None:
        """The newest job with this fingerprint that was not cancelled."""
        query = (
            self._select()
            .where(jobs.c.fingerprint == fingerprint, jobs.c.state != "cancelled")
            .order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
            .limit(1)
        )
        with self._read() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _record(row)

    def outputs(self, job_id: str, *, generation: int | None = None) -> Iterator[Output]:
        """Committed outputs in the source's order; of one generation, or of all."""
        query = (
            sa.select(chunks.c.output)
            .where(chunks.c.job_id == job_id, chunks.c.state == "done")
            .order_by(chunks.c.first, chunks.c.id)
        )
        if generation is not None:
            query = query.where(chunks.c.generation == generation)
        with self._read(stream=True) as connection, connection.execute(query).scalars() as found:
            for output in found:
                if output:
                    yield Output(**output)

    def dead(self, job_id: str) -> Iterator[Dead]:
        """Dead items in the source's order."""
        query = sa.select(dead_items).where(dead_items.c.job_id == job_id).order_by(dead_items.c.first, dead_items.c.id)
        with self._read(stream=True) as connection, connection.execute(query) as found:
            for row in found.mappings():
                yield Dead(row["key"], row["stage"], row["error"], _unpack(row["first"], 1, row["payload"]))

    def counts(self, job_id: str) -> dict[str, int]:
        """Number of chunks per state."""
        query = sa.select(chunks.c.state, sa.func.count()).where(chunks.c.job_id == job_id)
        with self._read() as connection:
            rows = connection.execute(query.group_by(chunks.c.state)).all()
        found = {str(row[0]): int(row[1]) for row in rows}
        return {"pending": 0, "running": 0, "done": 0, **found}

    # -- a user's changes --------------------------------------------------------------------------

    def create(
        self,
        *,
        fingerprint: str,
        spec: dict[str, Any],
        model: dict[str, Any],
        job_id: str | None = None,
        hold: float | None = None,
    ) -> JobRecord:
        """A new job, not yet owned by anybody.

        hold: for so many seconds only this process may acquire it, and others see that it is being started.
        """
        job_id = job_id or new_id()
        holding: dict[str, Any] = {}
        if hold is not None:
            holding = {"owner": secrets.token_hex(16), **here(hold)}
        with self.engine.begin() as connection:
            connection.execute(
                sa.insert(jobs).values(
                    id=job_id, fingerprint=fingerprint, spec=spec, model=model, state="created", wanted="run",
                    remarks=[], generation=0, created_at=now(), planned=0, items=0, done=0, dead=0, rows=0,
                    bytes=0, usage={}, **holding,
                )
            )  # fmt: skip
        return self.get(job_id)

    def respec(self, job_id: str, spec: dict[str, Any], *, model: dict[str, Any] | None = None) -> JobRecord:
        """Let the job's next coordinator follow another spec of the same fingerprint: other workers or limits.

        model: the same model, to be had from another place.
        """
        values = {"spec": spec} if model is None else {"spec": spec, "model": model}
        with self.engine.begin() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**values))
        return self.get(job_id)

    def want(self, job_id: str, wanted: str) -> None:
        """Ask the job's coordinator to run, pause or cancel; it looks about once a second."""
        with self.engine.begin() as connection:
            changed = connection.execute(
                sa.update(jobs).where(jobs.c.id == job_id, jobs.c.state.not_in(ENDED)).values(wanted=wanted)
            )
            if connection.dialect.name == "postgresql":  # a hint to look at once; who misses it looks all the same
                connection.execute(sa.select(sa.func.pg_notify(CHANNEL, job_id)))
        if changed.rowcount == 0:
            record = self.get(job_id)
            raise JobStateError(f"job {record.id} is {record.state}: there is nothing to {wanted}")

    def delete(self, job_id: str) -> None:
        """Forget the job, its chunks and its dead items."""
        with self.engine.begin() as connection:
            for table in (chunks, dead_items):
                connection.execute(sa.delete(table).where(table.c.job_id == job_id))
            connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))

    # -- the coordinator's changes -----------------------------------------------------------------

    def acquire(self, job_id: str, *, seconds: float, held: bool = False, token: str | None = None) -> Lease | None:
        """Take the job over, if nobody drives it: its lease has run out, or its process is gone.

        held: also a new job that its creator holds, who has asked this process to drive it.
        token: of the lease, from :func:`new_token`; the same when this is tried again, as the answer was lost.
        What was handed out before goes back to pending. Returns None while somebody else has it.
        """
        record = self.get(job_id)
        token = token or new_token()
        gone = record.owner is not None and not record.alive
        new = record.state == "created"
        held = new and (held or (record.owner_host, record.owner_pid) == (_host(), os.getpid()))
        free = sa.or_(jobs.c.owner.is_(None), jobs.c.owner == token, jobs.c.lease_until < now())
        if gone or held:
            free = sa.or_(free, jobs.c.owner == record.owner)
        with self.engine.begin() as connection:
            taken = connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == record.id, free)
                .values(
                    owner=token, **here(seconds), wanted=record.wanted if new else "run", state="running", error=None,
                    started_at=sa.func.coalesce(jobs.c.started_at, now()), finished_at=None,
                )
            )  # fmt: skip
            if taken.rowcount == 0:
                return None
            connection.execute(
                sa.update(chunks)
                .where(chunks.c.job_id == record.id, chunks.c.state == "running")
                .values(state="pending")
            )
        return Lease(record.id, token)

    def renew(self, lease: Lease, *, seconds: float) -> str:
        """Extend the lease; returns what the user wants: run, pause or cancel."""
        with self.engine.begin() as connection:
            self._own(connection, lease, lease_until=now() + seconds)
            return str(connection.scalar(sa.select(jobs.c.wanted).where(jobs.c.id == lease.job_id)))

    def confirm(self, lease: Lease) -> None:
        """Raises OwnershipLostError if the job has another owner by now; changes nothing."""
        query = sa.select(jobs.c.id).where(jobs.c.id == lease.job_id, jobs.c.owner == lease.token)
        with self._read() as connection:
            if connection.scalar(query) is None:
                raise _lost(lease)

    def commit(
        self,
        lease: Lease,
        *,
        planned: Sequence[Chunk] = (),
        complete: bool = False,
        done: Sequence[Done] = (),
        lost: Sequence[Lost] = (),
        usage: Mapping[str, float] | None = None,
        take: int = 0,
        nonce: str | None = None,
    ) -> tuple[list[Done], list[StoredChunk]]:
        """One transaction of all that has come up: new chunks, outcomes, lost workers, the next hand-outs.

        complete: ``planned`` holds the last chunks there are.
        usage: numbers to add to the job's, beside those of the outcomes.
        take: hand out up to that many pending chunks, in order.
        nonce: from :func:`new_nonce`. Tried again with the same one, before any other commit, it is not done twice:
            it answers what the first try did, if that was carried out.
        Returns the outcomes that counted (their chunk was not done yet), and the chunks handed out.
        Raises OwnershipLostError, with nothing changed, if the job has another owner.
        """
        nonce = nonce or new_nonce()
        with self.engine.begin() as connection:
            row = self._own(connection, lease)
            if row["nonce"] == nonce:
                return self._answer(connection, lease, nonce, done)
            changes: dict[str, Any] = {}
            if planned or complete:
                changes |= self._add(connection, row, planned, complete)
            replaced = bool(lost) and self._replace(connection, row, lost)
            counted = self._finish(connection, row, done, nonce) if done else []
            if counted or usage:
                changes |= _totals(row, counted, usage or {})
            taken = self._take(connection, lease, take, nonce) if take > 0 else []
            if changes or replaced or taken:
                changes["nonce"] = nonce
                connection.execute(sa.update(jobs).where(jobs.c.id == lease.job_id).values(**changes))
        return counted, taken

    def again(self, lease: Lease, chunk_id: int, *, nonce: str | None = None) -> str:
        """Count one more attempt at a running chunk (a straggler); returns the attempt's id.

        nonce: as for :meth:`commit`.
        """
        nonce = nonce or new_nonce()
        it = (chunks.c.id == chunk_id, chunks.c.job_id == lease.job_id, chunks.c.state == "running")
        with self.engine.begin() as connection:
            row = self._own(connection, lease)
            first = connection.scalar(sa.select(chunks.c.first).where(*it))
            if first is not None and row["nonce"] != nonce:
                connection.execute(sa.update(chunks).where(*it).values(attempts=chunks.c.attempts + 1))
                connection.execute(sa.update(jobs).where(jobs.c.id == lease.job_id).values(nonce=nonce))
        return _attempt_id(first or 0, chunk_id, nonce)

    def reopen(
        self,
        lease: Lease,
        replay: Iterable[Chunk],
        *,
        published: bool,
        model: dict[str, Any] | None = None,
        nonce: str | None = None,
    ) -> None:
        """Replay the dead items as ``replay``, with ``model`` if it has grown.

        published: the output of this generation is finished already; the replay is the next one.
        The replay may hold more items than were dead: what was one item then may be many now.
        nonce: as for :meth:`commit`.
        """
        replay = list(replay)
        nonce = nonce or new_nonce()
        with self.engine.begin() as connection:
            row = self._own(connection, lease)
            if row["nonce"] == nonce:
                return
            generation = row["generation"] + int(published)
            connection.execute(sa.delete(dead_items).where(dead_items.c.job_id == lease.job_id))
            _insert(connection, lease.job_id, generation, [(chunk, 0) for chunk in replay])
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == lease.job_id)
                .values(
                    **({} if model is None else {"model": model}),
                    nonce=nonce,
                    generation=generation,
                    dead=0,
                    done=row["done"] - row["dead"],
                    items=row["items"] - row["dead"] + sum(chunk.count for chunk in replay),
                )
            )

    def remark(self, lease: Lease, text: str) -> None:
        """Keep a line for the user."""
        with self.engine.begin() as connection:
            row = self._own(connection, lease)
            if text not in row["remarks"]:
                self._own(connection, lease, remarks=[*row["remarks"], text])

    def mark(self, lease: Lease, state: str) -> None:
        """Show that the job is paused, or running again."""
        with self.engine.begin() as connection:
            self._own(connection, lease, state=state)

    def release(
        self, lease: Lease, state: str, *, error: str | None = None, manifest: dict[str, Any] | None = None
    ) -> None:
        """End this coordinator's work: the job is finished, paused, interrupted, failed or cancelled.

        Repeated, before anybody else takes the job, it changes nothing.
        """
        values: dict[str, Any] = {
            "state": state, "error": error if error is None else storable(error),
            "owner": None, "owner_host": None, "owner_pid": None, "lease_until": None, "nonce": lease.token,
        }  # fmt: skip
        if state in ENDED:
            values["finished_at"] = now()
        if manifest is not None:
            values["manifest"] = manifest
        with self.engine.begin() as connection:
            released = sa.select(jobs.c.nonce).where(jobs.c.id == lease.job_id, jobs.c.owner.is_(None))
            if connection.scalar(released) == lease.token:
                return
            self._own(connection, lease, **values)
            connection.execute(
                sa.update(chunks)
                .where(chunks.c.job_id == lease.job_id, chunks.c.state == "running")
                .values(state="pending")
            )

    # -- inside transactions -----------------------------------------------------------------------

    def _own(self, connection: sa.Connection, lease: Lease, **values: Any) -> sa.RowMapping:
        """Lock the job's row and check the token; every transaction of the coordinator begins here.

        Returns the row, without what is large and does not change.
        """
        it = [jobs.c.id == lease.job_id, jobs.c.owner == lease.token]
        if values:
            if connection.execute(sa.update(jobs).where(*it).values(**values)).rowcount == 0:
                raise _lost(lease)
            del it[1]  # it may have been released just now
        row = connection.execute(sa.select(*_STANDING).where(*it).with_for_update()).mappings().first()
        if row is None:
            raise _lost(lease)
        return row

    def _add(
        self, connection: sa.Connection, row: sa.RowMapping, planned: Sequence[Chunk], complete: bool
    ) -> dict[str, Any]:
        _insert(connection, row["id"], row["generation"], [(chunk, 0) for chunk in planned])
        changes: dict[str, Any] = {"planned": 1} if complete else {}
        if planned:
            changes["plan_cursor"] = planned[-1].cursor
            changes["items"] = planned[-1].first + planned[-1].count
        return changes

    def _replace(self, connection: sa.Connection, row: sa.RowMapping, lost: Sequence[Lost]) -> bool:
        """Put the parts in the place of the chunks, but of those that are done by now. Whether there were any."""
        running = self._running(connection, row["id"], [each.id for each in lost])
        replaced = {each.id: each for each in lost if each.id in running}
        # Inserted before the deletion: SQLite would give one of them the id that has become free, and a
        # late outcome of the lost chunk would pass for that part's.
        _insert(connection, row["id"], row["generation"], [part for each in replaced.values() for part in each.parts])
        for ids in _batches(list(replaced)):
            connection.execute(sa.delete(chunks).where(chunks.c.job_id == row["id"], chunks.c.id.in_(ids)))
        return bool(replaced)

    def _finish(self, connection: sa.Connection, row: sa.RowMapping, done: Sequence[Done], nonce: str) -> list[Done]:
        """Those of the outcomes that count: the first for each chunk that is still running."""
        first = {each.id: each for each in reversed(done)}
        counted = [each for each in done if first[each.id] is each]
        if connection.dialect.name == "postgresql":
            rows = [{"chunk": each.id, "by": each.attempt, "made": _made(each.output)} for each in counted]
            given = {"rows": json.dumps(rows), "nonce": nonce, "job": row["id"]}
            changed = connection.execute(_DONE_ON_POSTGRES, given).rowcount
        else:
            some = [(each.attempt, _made(each.output), nonce, each.id, row["id"]) for each in counted]
            changed = connection.exec_driver_sql(_DONE_ON_SQLITE, some).rowcount
        if changed < len(counted):
            counted = self._finished(connection, counted, nonce)
        if dead := [each for one in counted for each in one.dead]:
            connection.execute(
                sa.insert(dead_items),
                [
                    {
                        "job_id": row["id"], "key": storable(each.key), "stage": each.stage,
                        "error": storable(each.error), "first": each.chunk.first, "payload": _pack(each.chunk),
                    }
                    for each in dead
                ],
            )  # fmt: skip
        return counted

    def _running(self, connection: sa.Connection, job_id: str, ids: Sequence[int]) -> set[int]:
        """Those of the chunks that are running."""
        found: set[int] = set()
        for some in _batches(ids):
            query = sa.select(chunks.c.id).where(chunks.c.id.in_(some), chunks.c.job_id == job_id)
            found.update(connection.scalars(query.where(chunks.c.state == "running")))
        return found

    def _take(self, connection: sa.Connection, lease: Lease, limit: int, nonce: str) -> list[StoredChunk]:
        it = (chunks.c.job_id == lease.job_id, chunks.c.state == "pending")
        place = (chunks.c.first, chunks.c.id)
        rows = connection.execute(sa.select(*_HANDED_OUT).where(*it).order_by(*place).limit(limit)).all()
        if rows:
            number, first, *_ = rows[-1]
            connection.execute(
                sa.update(chunks)
                .where(*it, sa.tuple_(*place) <= sa.tuple_(sa.literal(first), sa.literal(number)))
                .values(state="running", attempts=chunks.c.attempts + 1, nonce=nonce)
            )
        return [_handed_out(row, nonce, before=1) for row in rows]

    def _answer(
        self, connection: sa.Connection, lease: Lease, nonce: str, done: Sequence[Done]
    ) -> tuple[list[Done], list[StoredChunk]]:
        """What the commit of that nonce has done already."""
        taken = sa.select(*_HANDED_OUT).where(
            chunks.c.job_id == lease.job_id, chunks.c.state == "running", chunks.c.nonce == nonce
        )
        rows = connection.execute(taken.order_by(chunks.c.first, chunks.c.id)).all()
        return self._finished(connection, done, nonce), [_handed_out(row, nonce) for row in rows]

    def _finished(self, connection: sa.Connection, done: Sequence[Done], nonce: str) -> list[Done]:
        """Those of the outcomes that the commit of that nonce has stored."""
        stored: set[tuple[int, str]] = set()
        for ids in _batches([each.id for each in done]):
            query = sa.select(chunks.c.id, chunks.c.attempt).where(chunks.c.id.in_(ids), chunks.c.nonce == nonce)
            stored.update((row.id, row.attempt) for row in connection.execute(query.where(chunks.c.state == "done")))
        return [each for each in done if (each.id, each.attempt) in stored]

    def _select(self) -> sa.Select[Any]:
        return sa.select(jobs, now().label("clock"))

    def _read(self, *, stream: bool = False) -> sa.Connection:
        options: dict[str, Any] = {"reading": True}
        if stream:
            options |= {"stream_results": True, "yield_per": 1000}
        connection = self.engine.connect()
        if stream and connection.dialect.name == "postgresql":  # it locks nothing, and its reader may take long
            try:
                connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            except BaseException:
                connection.close()
                raise
        return connection.execution_options(**options)


def new_id() -> str:
    """A new job's id: short enough to type, random enough never to meet another."""
    alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
    return "".join(secrets.choice(alphabet) for _ in range(10))


def new_token() -> str:
    """What proves that a lease is one's own."""
    return secrets.token_hex(16)


def new_nonce() -> str:
    """Names one change of a coordinator, however often it is tried."""
    return secrets.token_hex(6)


_STANDING = [column for column in jobs.c if column.name not in ("spec", "model", "manifest")]
_HANDED_OUT = [chunks.c[name] for name in ("id", "first", "count", "payload", "attempts", "losses")]


def _attempt_id(first: int, chunk_id: int, nonce: str) -> str:
    """Names an attempt's output: begins with the place in the order, ends with what makes it its own."""
    return f"{first:012d}-{nonce}{chunk_id:x}"


def _handed_out(row: Sequence[Any], nonce: str, before: int = 0) -> StoredChunk:
    number, first, count, payload, attempts, losses = row  # by name it takes several times as long
    chunk = _unpack(first, count, payload)
    return StoredChunk(number, chunk, attempts + before, losses, _attempt_id(first, number, nonce))


def _lost(lease: Lease) -> OwnershipLostError:
    return OwnershipLostError(
        f"job {lease.job_id} has been taken over by another coordinator; this one stops",
        hint=f"Follow it with: tally jobs watch {lease.job_id}",
    )


def _batches(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (ids[begin : begin + _SOME] for begin in range(0, len(ids), _SOME))


def _insert(connection: sa.Connection, job_id: str, generation: int, new: Sequence[tuple[Chunk, int]]) -> None:
    if not new:
        return
    if connection.dialect.name == "postgresql":
        rows = [
            {"first": chunk.first, "count": chunk.count, "losses": losses, "payload": _pack(chunk).hex()}
            for chunk, losses in new
        ]
        given = {"rows": json.dumps(rows), "job": job_id, "generation": generation}
        connection.execute(_INSERT_ON_POSTGRES, given)
    else:
        connection.exec_driver_sql(
            _INSERT_ON_SQLITE,
            [(job_id, generation, chunk.first, chunk.count, losses, _pack(chunk)) for chunk, losses in new],
        )


# A commit holds thousands of rows. PostgreSQL is sent them as one document: a statement for each row costs several
# times as much. SQLite gets them as they are: on their way through SQLAlchemy they take longer than in the database.
# What may hold characters that PostgreSQL's JSON functions refuse is text inside of the document. A table that grows so
# fast has outdated statistics, by which hardly any chunk is running; coalesce() keeps the planner from trusting them.
_DONE_ON_POSTGRES = sa.text(
    """
    UPDATE chunks
    SET state = 'done', attempt = given.by, output = CAST(given.made AS json), payload = NULL, nonce = :nonce
    FROM json_to_recordset(CAST(:rows AS json)) AS given(chunk bigint, by text, made text)
    WHERE chunks.id = given.chunk AND coalesce(chunks.job_id = :job AND chunks.state = 'running', false)
    """
)
_DONE_ON_SQLITE = (
    "UPDATE chunks SET state = 'done', attempt = ?, output = ?, payload = NULL, nonce = ? "
    "WHERE id = ? AND job_id = ? AND state = 'running'"
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


def _made(output: Output) -> str:
    return json.dumps({"files": output.files, "rows": output.rows, "bytes": output.bytes, "facts": output.facts})


def _pack(chunk: Chunk) -> bytes:
    text = json.dumps(chunk.payload, separators=(",", ":")).encode("ascii")
    return zlib.compress(text, 1) if len(text) >= _COMPRESSED_FROM else text


def _unpack(first: int, count: int, payload: bytes) -> Chunk:
    text = payload if payload[:1] == b"{" else zlib.decompress(payload)
    return Chunk(first, count, json.loads(text))


def _totals(row: sa.RowMapping, counted: Sequence[Done], more: Mapping[str, float]) -> dict[str, Any]:
    usage = dict(row["usage"])
    for each in (more, *(done.usage for done in counted)):
        for name, number in each.items():
            usage[name] = usage.get(name, 0) + number
    return {
        "done": row["done"] + sum(each.count for each in counted),
        "dead": row["dead"] + sum(len(each.dead) for each in counted),
        "rows": row["rows"] + sum(each.output.rows for each in counted),
        "bytes": row["bytes"] + sum(each.output.bytes for each in counted),
        "usage": usage,
    }


def _record(row: Mapping[Any, Any]) -> JobRecord:
    values = {name: row[name] for name in JobRecord.__slots__ if name in row}
    values["planned"] = bool(values["planned"])
    alive = values["owner"] is not None and is_alive(row)
    if values["state"] == "running" and not alive:
        values["state"] = "interrupted"
    return JobRecord(**values, alive=alive)


def here(seconds: float) -> dict[str, Any]:
    """The columns that say that this process has a job for so long."""
    return {"owner_host": _host(), "owner_pid": os.getpid(), "lease_until": now() + seconds}


def _host() -> str:
    """Where process ids mean the same: the host, and on Linux its process namespace (a container has its own)."""
    try:
        return f"{socket.gethostname()} ({os.stat('/proc/self/ns/pid').st_ino})"  # noqa: PTH116
    except OSError:
        return socket.gethostname()


def is_alive(row: Mapping[Any, Any]) -> bool:
    """Whether the job's coordinator still holds its lease and, if it ran on this host, still exists."""
    if row["lease_until"] is None or row["lease_until"] < row["clock"]:
        return False
    if row["owner_host"] == _host():
        return row["owner_pid"] == os.getpid() or bool(psutil.pid_exists(row["owner_pid"]))
    return True
