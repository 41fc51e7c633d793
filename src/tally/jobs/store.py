"""The job store: every job's state, kept so that any coordinator can continue where another was killed.

One coordinator owns a job at a time. Each of its changes names its token, inside the same transaction: a coordinator
that has lost its job changes nothing. Statements are portable between SQLite and PostgreSQL, except those that send
many rows (:mod:`tally.jobs.chunks`).

A connection that is cut leaves open whether the transaction was committed. So every change of a coordinator may be
repeated: those that would add up carry a nonce, which is kept in the rows that they change.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import sqlalchemy as sa

from tally.database import lease as leases
from tally.database import tables
from tally.database.clock import now
from tally.database.foreign import is_database
from tally.database.notify import notify
from tally.database.tables import dead_items, jobs
from tally.errors import JobNotFoundError, JobStateError, OwnershipLostError, SpecError
from tally.jobs import chunks, glance, outbox, received_keys, starts
from tally.jobs.chunks import Dead, Done, Lost, StoredChunk, new_nonce, of
from tally.jobs.packed import PackedChunk
from tally.jobs.states import ENDED, STATES, Request
from tally.push.target import Push
from tally.sinks.base import Output
from tally.sources.base import Chunk
from tally.storage import normalised
from tally.text import storable

CHANNEL = "tally_jobs"
"""PostgreSQL's NOTIFY channel for requests; the payload is the job's id."""

_SEARCHED_SOURCES = 16
"""Sources of a job, at most, that a search by text looks at."""

_ASKED_AT_ONCE = 500
"""Places, at most, that one statement asks for."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job as the store knows it. Times are seconds since the epoch.

    state: waiting, created, running, paused, interrupted, failed, finished or cancelled. A job whose coordinator
        was killed is still ``running`` in the table; it is reported as interrupted (``alive`` is false).
    wanted: the user's last request: run, pause or cancel.
    items: planned so far; all of them when ``planned``. done, dead: committed so far.
    output: what the job writes: ``kind`` (rows, images, video), ``format``, ``columns`` (name to type, or None),
        ``unit`` of its items, ``place`` as in the spec, and what else the sink needs to be opened for reading.
    place: where it writes, without trailing slashes.
    parent: of a part of a split job, the job that it is a part of; see :mod:`tally.jobs.split`. part: which it is:
        its ``number``, and ``shard`` or ``between``.
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
    output: dict[str, Any]
    place: str
    parent: str | None = None
    part: dict[str, Any] | None = None
    alive: bool = False

    @property
    def unit(self) -> str:
        """What its items are: items, frames or rows."""
        return str(self.output.get("unit", "items"))

    @property
    def assumed(self) -> list[str]:
        """What was taken for granted about model and data: one sentence each."""
        return list(self.model.get("assumed", ()))

    @property
    def is_retry(self) -> bool:
        """Whether it was finished before, and its dead items are being replayed. Its results are there."""
        return self.manifest is not None and self.state != "finished"


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some jobs of a list, newest first. next: where the next page begins; None if this is the last."""

    jobs: list[JobRecord]
    next: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """How far one part of a split job is. host: that of its coordinator, or of the last one; numbers count items."""

    number: int
    state: str
    host: str | None
    items: int
    done: int
    dead: int

    @classmethod
    def of(cls, record: JobRecord) -> Self:
        """What is shown of the part's row."""
        number = (record.part or {}).get("number", 0)
        return cls(number, record.state, record.owner_host, record.items, record.done, record.dead)


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to drive a job: sent with every change."""

    job_id: str
    token: str


class JobStore:
    """Reads and changes jobs. Safe to use from several threads; holds no state but the engine.

    A split job (:mod:`tally.jobs.split`) has parts, which are jobs that nobody finds but by their ids. What is asked of
    its chunks and dead items is asked of its parts'. When they are finished, all they have becomes the job's own.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    # -- finding jobs ------------------------------------------------------------------------------

    def get(self, job_id: str) -> JobRecord:
        """The job by its id, or by the unambiguous beginning of it. Raises JobNotFoundError."""
        found: Sequence[sa.RowMapping] = []
        if job_id.isascii() and job_id.isprintable():  # a database may refuse to compare other characters
            beginning = sa.and_(jobs.c.id.startswith(job_id, autoescape=True), _WHOLE)
            with self._read() as connection:
                for asked in (jobs.c.id == job_id, beginning):  # SQLite looks at every job for the second
                    if found := connection.execute(self._select().where(asked).limit(3)).mappings().all():
                        break
        if not job_id or not found:
            raise JobNotFoundError(f"no job {job_id!r}", hint="'tally jobs list' shows the jobs there are.")
        if len(found) > 1:
            some = ", ".join(row["id"] for row in found)
            raise JobNotFoundError(f"{job_id!r} is the beginning of several jobs: {some}", hint="Type more of it.")
        return _record(found[0])

    def newest(self, *, limit: int = 50) -> list[JobRecord]:
        """The newest jobs, newest first."""
        return self.list(limit=limit).jobs

    def find(self, fingerprint: str) -> JobRecord | None:
        """The newest job with this fingerprint that was not cancelled."""
        return self._newest_uncancelled(jobs.c.fingerprint == fingerprint)

    def at(self, place: str, *, begun: bool = False) -> JobRecord | None:
        """The newest job that writes to this place (as in the spec; trailing slashes do not count) and was not
        cancelled. place: also a table of a database, where a job's rows go. begun: leave out jobs that still wait, and
        those that failed before they had written anything."""
        there = _writes_to(place)
        return self._newest_uncancelled(sa.and_(there, jobs.c.fingerprint != "") if begun else there)

    def written(self, places: Iterable[str]) -> set[str]:
        """Those of these files and objects that are a job's output, lie in one, or are working files beside one."""
        within = {place: _upward(place_of(place)) for place in places}
        every = {path for paths in within.values() for path in paths}
        # What a job with one output file keeps beside it is called after that file.
        after = {path: [path[:dot] for dot in _dots(path)] for path in every}
        stems = {stem for path, begins in after.items() for stem in begins if path.startswith(".dead.", len(stem))}
        asked = sorted(every.union(*after.values()))
        beside = [jobs.c.place.startswith(f"{stem}.", autoescape=True) for stem in sorted(stems)]
        found: set[str] = set()
        with self._read() as connection:
            for begin in range(0, len(asked), _ASKED_AT_ONCE):
                those = jobs.c.place.in_(asked[begin : begin + _ASKED_AT_ONCE])
                found.update(connection.scalars(sa.select(jobs.c.place).where(those).distinct()))
            for begin in range(0, len(beside), _ASKED_AT_ONCE):
                any_of = sa.or_(*beside[begin : begin + _ASKED_AT_ONCE])
                found.update(connection.scalars(sa.select(jobs.c.place).where(any_of).distinct()))
        files = {place for place in found if "." in place.rpartition("/")[2]}
        stems &= {place.rpartition(".")[0] for place in files}

        def is_written(path: str) -> bool:
            return (
                path in found
                or not files.isdisjoint(after[path])
                or any(stem in stems and path.startswith(".dead.", len(stem)) for stem in after[path])
            )

        return {place for place, paths in within.items() if any(map(is_written, paths))}

    def orphaned(self) -> list[JobRecord]:
        """Running jobs without a coordinator: its lease has run out, or its process is gone. Oldest first.

        Of parts, those whose job is not stopped."""
        whole = jobs.alias()
        going = sa.select(whole.c.id).where(whole.c.state.in_(("running", "paused")))
        with self._read() as connection:
            running = sa.and_(jobs.c.state == "running", sa.or_(_WHOLE, jobs.c.parent.in_(going)))
            query = self._select().where(running, leases.is_lost(connection, jobs, running))
            rows = connection.execute(query.order_by(jobs.c.created_at, jobs.c.id)).mappings()
            return [_record(row) for row in rows]

    # -- reading one job ---------------------------------------------------------------------------

    def outputs(self, job_id: str, *, generation: int | None = None) -> Iterator[Output]:
        """Committed outputs in the source's order; of one generation, or of all."""
        table = tables.chunks
        query = (
            sa.select(table.c.output)
            .where(self._of(table, job_id), table.c.state == "done")
            .order_by(table.c.first, table.c.id)
        )
        if generation is not None:
            query = query.where(table.c.generation == generation)
        with self._read(stream=True) as connection, connection.execute(query).scalars() as found:
            for output in found:
                if output:
                    yield Output(**output)

    def dead(self, job_id: str) -> Iterator[Dead]:
        """Dead items in the source's order."""
        those = (self._of(dead_items, job_id), dead_items.c.retried.is_(None))
        query = sa.select(dead_items).where(*those).order_by(dead_items.c.first, dead_items.c.id)
        with self._read(stream=True) as connection, connection.execute(query) as found:
            for row in found.mappings():
                alone = PackedChunk(row["first"], 1, row["payload"]).unpacked()
                yield Dead(row["key"], row["stage"], row["error"], alone)

    def counts(self, job_id: str) -> dict[str, int]:
        """Number of chunks per state."""
        table = tables.chunks
        query = sa.select(table.c.state, sa.func.count()).where(self._of(table, job_id))
        with self._read() as connection:
            rows = connection.execute(query.group_by(table.c.state)).all()
        found = {str(row[0]): int(row[1]) for row in rows}
        return {"pending": 0, "running": 0, "done": 0, **found}

    def cells(self, job_id: str, *, limit: int) -> list[glance.Cell]:
        """The chunks at a glance; see :func:`tally.jobs.glance.cells`."""
        ids = self._ids(job_id)
        with self._read() as connection:
            return glance.cells(connection, ids, limit=limit)

    def pace(self, job_id: str, *, running: bool, limit: int) -> glance.Pace | None:
        """How fast the job was; see :func:`tally.jobs.glance.pace`."""
        ids = self._ids(job_id)
        with self._read() as connection:
            return glance.pace(connection, ids, running=running, limit=limit)

    def counts_by_state(self) -> dict[str, int]:
        """How many jobs are in each state, as :class:`JobRecord` reports it."""
        with self._read() as connection:
            running = sa.and_(jobs.c.state == "running", _WHOLE)
            rows = connection.execute(
                sa.select(jobs.c.state, sa.func.count()).where(_WHOLE).group_by(jobs.c.state)
            ).all()
            counts = dict.fromkeys(STATES, 0) | {str(row[0]): int(row[1]) for row in rows}
            gone = sa.select(sa.func.count()).where(running, leases.is_lost(connection, jobs, running))
            lost = connection.scalar(gone) or 0
        counts["running"], counts["interrupted"] = counts["running"] - lost, counts["interrupted"] + lost
        return counts

    def throughput(self, *, minutes: int = 60) -> list[int]:
        """Items of all jobs that were done in each of the last minutes, oldest first; the last one has just begun."""
        table = tables.chunks
        minute = sa.cast(sa.func.floor((now() - table.c.done_at) / 60), sa.Integer).label("minute")
        query = sa.select(minute, sa.func.sum(table.c.count)).where(table.c.done_at > now() - 60 * minutes)
        found = [0] * minutes
        with self._read() as connection:
            for ago, count in connection.execute(query.group_by(minute)):
                if 0 <= ago < minutes:
                    found[-1 - ago] += int(count)
        return found

    def known_keys(self, job_id: str, keys: Iterable[str]) -> dict[str, Literal["pending", "done"]]:
        """Those of the keys that were planned already, and whether their items are done (or dead)."""
        with self._read() as connection:
            return received_keys.known(connection, job_id, keys)

    def pushes(self, job_id: str) -> outbox.Pushes | None:
        """How far what the job pushes has come; None if it pushes nothing."""
        record = self.get(job_id)
        if not record.spec.get("push"):
            return None
        ids = self._ids(record.id)
        with self._read() as connection:
            each = [outbox.counts(connection, job) for job in ids]
            waiting, refused = (sum(numbers) for numbers in zip(*each, strict=True))
            first = [row for job in ids for row in outbox.refused(connection, job, 1)]
        scored = record.done - record.dead
        return outbox.Pushes(
            Push(**record.spec["push"]).shown, max(0, scored - waiting - refused), waiting, refused,
            f"{first[0][0]}: {first[0][1]}" if first else None,
        )  # fmt: skip

    def reasons(self, job_id: str, keys: Sequence[str]) -> dict[str, str]:
        """Why those of the items with these keys are dead that are."""
        query = sa.select(dead_items.c.key, dead_items.c.error).where(self._of(dead_items, job_id))
        with self._read() as connection:
            found = {
                row[0]: row[1] for row in connection.execute(query.where(dead_items.c.key.in_(map(storable, keys))))
            }
        return {key: found[storable(key)] for key in keys if storable(key) in found}

    # -- a user's changes --------------------------------------------------------------------------

    def create(
        self,
        *,
        fingerprint: str,
        spec: dict[str, Any],
        model: dict[str, Any],
        output: dict[str, Any],
        job_id: str | None = None,
        waiting: str | None = None,
        hold: float | None = None,
    ) -> JobRecord:
        """A new job, not yet owned by anybody.

        output: as in :class:`JobRecord`. waiting: the id of the waiting job that it is. Raises JobStateError where
            that does not wait any more.
        hold: seconds for which only this process may acquire it; others see that it is being started.
        """
        job_id = waiting or job_id or new_id()
        holding = {} if hold is None else leases.granted(leases.new_token(), hold)
        values = {
            "fingerprint": fingerprint, "spec": spec, "model": model, "state": "created",
            **_output_columns(output), **_search_columns(job_id, spec, model), **holding,
        }  # fmt: skip
        with self.engine.begin() as connection:
            if waiting is None:
                connection.execute(sa.insert(jobs).values(**_new_row(job_id) | values))
            elif not _leave_line(connection, job_id, **values):
                raise JobStateError(f"job {job_id} does not wait any more")
        return self.get(job_id)

    def enqueue(
        self, spec: dict[str, Any], *, who: str = "", overwrite: bool = False, request: str | None = None
    ) -> JobRecord:
        """A new job that waits for a server to start it; its model has not been looked at.

        who: asked for it. request: what names the request, of which one job comes, however often it is carried out.
        """
        job_id = new_id(request)
        try:
            with self.engine.begin() as connection:
                self.enqueue_in(connection, spec, who=who, overwrite=overwrite, job_id=job_id)
        except sa.exc.IntegrityError:
            if request is None:
                raise
        return self.get(job_id)

    def enqueue_in(
        self,
        connection: sa.Connection,
        spec: dict[str, Any],
        *,
        who: str = "",
        overwrite: bool = False,
        job_id: str | None = None,
    ) -> str:
        """As :meth:`enqueue`, in the caller's transaction; the new job's id."""
        job_id, model = job_id or new_id(), {"name": spec["model"]}
        values = {"fingerprint": "", "spec": spec, "model": model, "state": "waiting", "output": {}}
        values["place"] = place_of(spec["out"])
        connection.execute(sa.insert(jobs).values(**_new_row(job_id) | values, **_search_columns(job_id, spec, model)))
        starts.insert(connection, job_id, "submit", who=who, overwrite=overwrite)
        return job_id

    def writer_in(self, connection: sa.Connection, out: str) -> str | None:
        """A job that is not ended and writes to this place, in the caller's transaction; None if there is none."""
        there = (jobs.c.place == place_of(out), jobs.c.state.not_in((*ENDED, "failed")))
        found: str | None = connection.scalar(sa.select(jobs.c.id).where(*there).limit(1))
        return found

    def give_up(self, job_id: str, state: Literal["failed", "cancelled"], *, error: str | None = None) -> bool:
        """A waiting job is not started after all. False if it does not wait any more."""
        with self.engine.begin() as connection:
            return _leave_line(connection, job_id, state=state, error=error, finished_at=now())

    def respec(
        self,
        job_id: str,
        spec: dict[str, Any],
        *,
        model: dict[str, Any] | None = None,
        output: dict[str, Any] | None = None,
    ) -> JobRecord:
        """Let the job's next coordinator follow another spec of the same fingerprint: other workers or limits.

        model: the same model, available from another place. output: a better description of what the job writes.
        """
        record = self.get(job_id)
        values: dict[str, Any] = {"spec": spec, **_search_columns(job_id, spec, model or record.model)}
        if model is not None:
            values["model"] = model
        if output is not None:
            values |= _output_columns(output)
        with self.engine.begin() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**values))
        return self.get(job_id)

    def request(self, job_id: str, request: Request) -> None:
        """Ask the job's coordinator to run, pause or cancel. It looks once a second, on PostgreSQL at once."""
        with self.engine.begin() as connection:
            changed = connection.execute(
                sa.update(jobs).where(jobs.c.id == job_id, jobs.c.state.not_in(ENDED)).values(wanted=request)
            )
            notify(connection, CHANNEL, job_id)
        if changed.rowcount == 0:
            record = self.get(job_id)
            raise JobStateError(f"job {record.id} is {record.state}: there is nothing to {request}")

    def delete(self, job_id: str) -> None:
        """Forget the job and everything that belongs to it."""
        ids = self._ids(job_id)
        with self.engine.begin() as connection:
            for table in (tables.chunks, dead_items, tables.received_keys, tables.pushes):
                connection.execute(sa.delete(table).where(table.c.job_id.in_(ids)))
            connection.execute(sa.delete(jobs).where(jobs.c.id.in_(ids)))

    # -- the coordinator's changes -----------------------------------------------------------------

    def acquire(
        self,
        job_id: str,
        *,
        seconds: float,
        held: bool = False,
        retry: bool = False,
        token: str | None = None,
    ) -> Lease | None:
        """Take over the job. None if another process drives it. Raises JobStateError if it is cancelled or finished.

        held: also take a new job that the process which made it still holds: it has asked this one to drive the job.
        retry: also take a finished job, to open it again.
        token: of the lease, from :func:`tally.database.lease.new_token`. To repeat the call after its answer was lost,
            use the same one.
        Chunks that were handed out before are pending again. What the user asked for stays: whoever takes a job that
        was to be cancelled finds that wish.
        """
        job_id = self.get(job_id).id
        token = token or leases.new_token()
        with self.engine.begin() as connection:
            it = jobs.c.id == job_id
            row = connection.execute(self._select().where(it).with_for_update()).mappings().first()
            if row is None:
                raise JobNotFoundError(f"job {job_id} was deleted just now")
            record = _record(row)
            if record.state == "cancelled" or (record.state == "finished" and not retry):
                raise JobStateError(f"job {job_id} is {record.state}", hint=f"See it with: tally jobs show {job_id}")
            gone = record.owner is not None and not record.alive
            new = record.state == "created"
            held = new and (held or leases.is_this_process(record.owner_host, record.owner_pid))
            unmet = new or (record.wanted == "cancel" and record.state != "finished")
            acquired = leases.acquire(
                connection, jobs, it,
                token=token, seconds=seconds, instead_of=record.owner if gone or held else None,
                wanted=record.wanted if unmet else "run", state="running", error=None,
                started_at=sa.func.coalesce(jobs.c.started_at, now()), finished_at=None,
            )  # fmt: skip
            if not acquired:
                return None
            chunks.put_back(connection, job_id)
        return Lease(job_id, token)

    def renew(self, lease: Lease, *, seconds: float) -> str:
        """Extend the lease; returns the user's request: run, pause or cancel."""
        with self.engine.begin() as connection:
            if not leases.renew(connection, jobs, jobs.c.id == lease.job_id, token=lease.token, seconds=seconds):
                raise _lost(lease)
            return str(connection.scalar(sa.select(jobs.c.wanted).where(jobs.c.id == lease.job_id)))

    def confirm(self, lease: Lease) -> None:
        """Raises OwnershipLostError if the job has another owner by now; changes nothing."""
        with self._read() as connection:
            if not leases.confirm(connection, jobs, jobs.c.id == lease.job_id, token=lease.token):
                raise _lost(lease)

    def commit(
        self,
        lease: Lease,
        *,
        planned: Sequence[Chunk] = (),
        received: Sequence[Sequence[str]] = (),
        complete: bool = False,
        done: Sequence[Done] = (),
        lost: Sequence[Lost] = (),
        usage: Mapping[str, float] | None = None,
        push: Mapping[int, Mapping[str, outbox.Info | None]] | None = None,
        take: int = 0,
        nonce: str | None = None,
    ) -> tuple[list[Done], list[StoredChunk]]:
        """One transaction for everything since the last one: new chunks, outcomes, lost workers, the next hand-outs.

        received: of an endless source, the keys of each planned chunk, one for each item.
        complete: ``planned`` holds the last chunks there are.
        usage: numbers to add to the job's, beside those of the outcomes.
        push: by the numbers of chunks in ``done`` whose rows are to be pushed, the keys of what was scored, and what
            is told of each beside its rows.
        take: hand out up to that many pending chunks, in order.
        nonce: from :func:`new_nonce`. Repeated with the same nonce, before any other commit, nothing is done twice:
            the result is that of the first call, if that was carried out.
        Returns the outcomes that counted (their chunk was running), and the chunks handed out.
        Raises OwnershipLostError, with nothing changed, if the job has another owner.
        """
        nonce = nonce or new_nonce()
        with self.engine.begin() as connection:
            row = self._own(connection, lease)
            job_id = lease.job_id
            if row["nonce"] == nonce:
                return chunks.finished(connection, done, nonce), chunks.taken(connection, job_id, nonce)
            changes: dict[str, Any] = {"planned": 1} if complete else {}
            if planned:
                chunks.insert(connection, job_id, row["generation"], [(chunk, 0) for chunk in planned])
                changes["plan_cursor"] = planned[-1].cursor
                changes["items"] = planned[-1].first + planned[-1].count
            if received:
                received_keys.insert(connection, job_id, planned, received)
            replaced = bool(lost) and chunks.replace(connection, job_id, row["generation"], lost)
            counted = chunks.finish(connection, job_id, done, nonce) if done else []
            if push:
                outbox.add(connection, job_id, {each.id: each.output for each in counted if each.id in push}, push)
            if counted or usage:
                changes |= _totals(row, counted, usage or {})
            taken = chunks.take(connection, job_id, take, nonce) if take > 0 else []
            if changes or replaced or taken:
                changes["nonce"] = nonce
                connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**changes))
        return counted, taken

    def second_attempt(self, lease: Lease, chunk_id: int, *, nonce: str | None = None) -> str:
        """Count one more attempt at a running chunk (a straggler); returns the attempt's id.

        nonce: as for :meth:`commit`.
        """
        nonce = nonce or new_nonce()
        table = tables.chunks
        running = (table.c.id == chunk_id, table.c.job_id == lease.job_id, table.c.state == "running")
        with self.engine.begin() as connection:
            row = self._own(connection, lease)
            first = connection.scalar(sa.select(table.c.first).where(*running))
            if first is not None and row["nonce"] != nonce:
                connection.execute(sa.update(table).where(*running).values(attempts=table.c.attempts + 1))
                connection.execute(sa.update(jobs).where(jobs.c.id == lease.job_id).values(nonce=nonce))
        return chunks.attempt_id(first or 0, chunk_id, nonce)

    def advance(self, lease: Lease, *, nonce: str | None = None) -> int:
        """Settle this generation's output, so that it can be published: what is done from now on belongs to the next.

        Chunks that are not done move there too. nonce: as for :meth:`commit`. Returns the new generation.
        """
        nonce = nonce or new_nonce()
        table = tables.chunks
        with self.engine.begin() as connection:
            row = self._own(connection, lease)
            generation: int = row["generation"]
            if row["nonce"] == nonce:
                return generation
            generation += 1
            unfinished = (table.c.job_id == lease.job_id, table.c.state.in_(("pending", "running")))
            connection.execute(sa.update(table).where(*unfinished).values(generation=generation))
            changes = {"generation": generation, "nonce": nonce}
            connection.execute(sa.update(jobs).where(jobs.c.id == lease.job_id).values(**changes))
        return generation

    def unpushed(self, lease: Lease, *, limit: int, after: int = 0) -> list[outbox.Waiting]:
        """What waits to be pushed, oldest first, without what was refused. after: the id of one that is known."""
        with self._read() as connection:
            return outbox.waiting(connection, lease.job_id, limit, after)

    def pushed(self, lease: Lease, number: int, refused: Sequence[outbox.Refused] = ()) -> None:
        """What waited has arrived, but for what was refused. May be repeated."""
        with self.engine.begin() as connection:
            self._own(connection, lease)
            outbox.settle(connection, lease.job_id, number, refused)

    def push_refused_again(self, lease: Lease) -> None:
        """Have what was refused wait again."""
        with self.engine.begin() as connection:
            self._own(connection, lease)
            outbox.try_again(connection, lease.job_id)

    def refused(self, job_id: str) -> list[tuple[str, str]]:
        """Key and reason of each item that was refused when it was pushed."""
        with self._read() as connection:
            return outbox.refused(connection, job_id)

    def forget_keys(self, lease: Lease, *, older_than: float) -> int:
        """Forget keys that were planned more than so many seconds ago and whose items are done; returns how many."""
        with self.engine.begin() as connection:
            self._own(connection, lease)
            return received_keys.forget(connection, lease.job_id, older_than)

    def reopen(
        self,
        lease: Lease,
        replay: Iterable[Chunk],
        *,
        published: bool,
        model: dict[str, Any] | None = None,
        unmarked: Callable[[Chunk], Chunk] | None = None,
        nonce: str | None = None,
    ) -> None:
        """Replay the dead items as ``replay``, with ``model`` if it has grown.

        published: the output of this generation is finished already; the replay belongs to the next one.
        unmarked: see :meth:`tally.sources.base.Source.unmarked`; what is still to be done is mended, too.
        The replay may hold more items than were dead: what could not be read as one item may be many.
        The dead items of a finished job are kept, for :meth:`undo_retry`. nonce: as for :meth:`commit`.
        """
        replay = list(replay)
        nonce = nonce or new_nonce()
        with self.engine.begin() as connection:
            row = self._own(connection, lease)
            if row["nonce"] == nonce:
                return
            generation = row["generation"] + int(published)
            dead = (dead_items.c.job_id == lease.job_id, dead_items.c.retried.is_(None))
            if published:
                connection.execute(sa.update(dead_items).where(*dead).values(retried=1))
            else:
                connection.execute(sa.delete(dead_items).where(*dead))
            if unmarked is not None:
                chunks.rewrite(connection, lease.job_id, unmarked)
            chunks.insert(connection, lease.job_id, generation, [(chunk, 0) for chunk in replay])
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
        """Store a line for the user, once."""
        with self.engine.begin() as connection:
            row = self._own(connection, lease)
            if text not in row["remarks"]:
                remarks = [*row["remarks"], text]
                connection.execute(sa.update(jobs).where(jobs.c.id == lease.job_id).values(remarks=remarks))

    def assume(self, lease: Lease, text: str) -> None:
        """Store a line about what was taken for granted, once; see :attr:`JobRecord.assumed`."""
        with self.engine.begin() as connection:
            self._own(connection, lease)
            model = connection.scalar(sa.select(jobs.c.model).where(jobs.c.id == lease.job_id)) or {}
            assumed = model.get("assumed", [])
            if text not in assumed:
                model = {**model, "assumed": [*assumed, text]}
                connection.execute(sa.update(jobs).where(jobs.c.id == lease.job_id).values(model=model))

    def mark(self, lease: Lease, state: str) -> None:
        """Set the state to paused, or to running again."""
        with self.engine.begin() as connection:
            if not leases.change(connection, jobs, jobs.c.id == lease.job_id, token=lease.token, state=state):
                raise _lost(lease)

    def release(
        self, lease: Lease, state: str, *, error: str | None = None, manifest: dict[str, Any] | None = None
    ) -> None:
        """End this coordinator's work: the job is finished, paused, interrupted, failed or cancelled.

        Repeated before another process takes the job, it changes nothing.
        """
        values: dict[str, Any] = {"state": state}
        if manifest is not None:
            values["manifest"] = manifest
        with self.engine.begin() as connection:
            if self._put_down(connection, lease, error, values):
                chunks.put_back(connection, lease.job_id)
                if state == "finished":
                    retried = (dead_items.c.job_id == lease.job_id, dead_items.c.retried.is_not(None))
                    connection.execute(sa.delete(dead_items).where(*retried))

    def undo_retry(self, lease: Lease, *, error: str | None = None) -> None:
        """End this coordinator's work at the retry of a finished job: the job is as finished as it was before.

        What the retry committed is forgotten, so none of it may be published. error: why. Repeated as :meth:`release`.
        """
        table, job_id = tables.chunks, lease.job_id
        with self.engine.begin() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).mappings().one()
            before = row["manifest"]
            values: dict[str, Any] = {"state": "finished"}
            added = (table.c.job_id == job_id, table.c.generation > before["generation"])
            reopened = row["generation"] > before["generation"]
            if reopened:
                outputs = connection.scalars(sa.select(table.c.output).where(*added, table.c.state == "done"))
                size = sum(output["bytes"] for output in outputs if output)
                scored, dead = before["scored"], before["dead"]
                values |= {
                    "generation": before["generation"], "items": before["items"], "done": scored + dead, "dead": dead,
                    "rows": before["rows"], "bytes": row["bytes"] - size,
                }  # fmt: skip
            if self._put_down(connection, lease, error, values) and reopened:
                connection.execute(sa.delete(table).where(*added))
                dead_here = dead_items.c.job_id == job_id
                connection.execute(sa.delete(dead_items).where(dead_here, dead_items.c.retried.is_(None)))
                connection.execute(sa.update(dead_items).where(dead_here).values(retried=None))

    # -- split jobs --------------------------------------------------------------------------------

    def parts(self, job_id: str) -> list[JobRecord]:
        """The parts of a split job, in order; none of another job, or once they have become the job's own."""
        with self._read() as connection:
            rows = connection.execute(self._select().where(jobs.c.parent == job_id)).mappings()
            return _in_order(rows)

    def split(self, lease: Lease, parts: Sequence[dict[str, Any]], spec: dict[str, Any]) -> None:
        """Give the job parts, unless it has some. parts: as :attr:`JobRecord.part`. spec: theirs."""
        with self.engine.begin() as connection:
            self._own(connection, lease)
            if connection.scalar(sa.select(jobs.c.id).where(jobs.c.parent == lease.job_id).limit(1)) is not None:
                return
            it = jobs.c.id == lease.job_id
            row = connection.execute(sa.select(jobs).where(it)).mappings().one()
            same = {name: row[name] for name in ("model", "output", "place", "model_name")}
            for part in parts:
                own = {"fingerprint": "", "state": "created", "spec": spec, "parent": lease.job_id, "part": part}
                connection.execute(sa.insert(jobs).values(**_new_row(new_id()) | same | own))

    def gather(self, lease: Lease, *, seconds: float) -> list[JobRecord]:
        """Have the job's row say how far its parts are, together; returns them. seconds: that it was driven.

        It took no less than any of its parts: these go on while nobody drives it.
        """
        with self.engine.begin() as connection:
            self._own(connection, lease)
            rows = connection.execute(self._select().where(jobs.c.parent == lease.job_id)).mappings()
            parts = _in_order(rows)
            if parts:
                numbers = ("items", "done", "dead", "rows", "bytes")
                usage: dict[str, float] = {}
                for each in parts:
                    for name, number in each.usage.items():
                        usage[name] = usage.get(name, 0) + number
                changes = {name: sum(getattr(each, name) for each in parts) for name in numbers}
                usage["seconds"] = max(seconds, *(each.usage.get("seconds", 0.0) for each in parts))
                changes |= {"planned": int(all(each.planned for each in parts)), "usage": usage}
                connection.execute(sa.update(jobs).where(jobs.c.id == lease.job_id).values(**changes))
        return parts

    def share_of_dead(self, job_id: str) -> tuple[int, int]:
        """How many items of all parts of a split job are done, and how many of them dead."""
        query = sa.select(sa.func.sum(jobs.c.done), sa.func.sum(jobs.c.dead)).where(jobs.c.parent == job_id)
        with self._read() as connection:
            done, dead = connection.execute(query).one()
        return int(done or 0), int(dead or 0)

    def join(self, lease: Lease) -> None:
        """What the parts have becomes the job's own, in their order, and there are no parts any more.

        From now on it is a job like any other. The numbers in its row are those of :meth:`gather`.
        """
        with self.engine.begin() as connection:
            self._own(connection, lease)
            first = 0
            for part in _in_order(connection.execute(self._select().where(jobs.c.parent == lease.job_id)).mappings()):
                for table in (tables.chunks, dead_items):
                    theirs = sa.update(table).where(table.c.job_id == part.id)
                    connection.execute(theirs.values(job_id=lease.job_id, first=table.c.first + first))
                pushes = tables.pushes
                connection.execute(sa.update(pushes).where(pushes.c.job_id == part.id).values(job_id=lease.job_id))
                connection.execute(sa.delete(jobs).where(jobs.c.id == part.id))
                first += part.items

    # -- inside transactions -----------------------------------------------------------------------

    def _ids(self, job_id: str) -> list[str]:
        """The ids of the job and of its parts."""
        with self._read() as connection:
            return [job_id, *connection.scalars(sa.select(jobs.c.id).where(jobs.c.parent == job_id))]

    def _of(self, table: sa.Table, job_id: str) -> sa.ColumnElement[bool]:
        """Rows of the job and of its parts."""
        return of(table, self._ids(job_id))

    def _put_down(self, connection: sa.Connection, lease: Lease, error: str | None, values: dict[str, Any]) -> bool:
        """Give the lease back, and set ``values``. False, with nothing changed, if that was done already."""
        it = jobs.c.id == lease.job_id
        if connection.scalar(sa.select(jobs.c.nonce).where(it, jobs.c.owner.is_(None))) == lease.token:
            return False
        values = {**values, "error": error and storable(error), "nonce": lease.token}
        if values["state"] in ENDED:
            values["finished_at"] = now()
        if not leases.release(connection, jobs, it, token=lease.token, **values):
            raise _lost(lease)
        return True

    def _own(self, connection: sa.Connection, lease: Lease) -> sa.RowMapping:
        """Lock the job's row and check the token; every transaction of the coordinator begins here.

        Returns the row, without what is large and does not change.
        """
        owned = (jobs.c.id == lease.job_id, jobs.c.owner == lease.token)
        row = connection.execute(sa.select(*_SMALL).where(*owned).with_for_update()).mappings().first()
        if row is None:
            raise _lost(lease)
        return row

    def _select(self) -> sa.Select[Any]:
        return sa.select(jobs, now().label("clock"))

    def _newest_uncancelled(self, which: sa.ColumnElement[bool]) -> JobRecord | None:
        query = self._select().where(which, jobs.c.state != "cancelled", _WHOLE)
        with self._read() as connection:
            newest = query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(1)
            row = connection.execute(newest).mappings().first()
        return None if row is None else _record(row)

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

    # Last in the class: in what follows, ``list`` means this method.
    def list(
        self,
        *,
        state: str | None = None,
        model: str | None = None,
        place: str | None = None,
        text: str | None = None,
        since: float | None = None,
        until: float | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        """One page of the jobs, newest first.

        state: as in :class:`JobRecord`. model: the model's name. place: as for :meth:`at`.
        text: part of the id, model, sources or place, in upper or lower case.
        since, until: ``since <= created_at < until``.
        after: where the page begins: ``next`` of the page before. Raises SpecError for anything else.
        """
        conditions: Sequence[tuple[object, sa.ColumnElement[bool]]] = (
            (model, jobs.c.model_name == storable(model or "")),
            (place, _writes_to(place or "")),
            (text, jobs.c.search.contains(storable(text or "").lower(), autoescape=True)),
            (since, jobs.c.created_at >= (since or 0.0)),
            (until, jobs.c.created_at < (until or 0.0)),
        )
        query = self._select().where(_WHOLE, *(condition for given, condition in conditions if given is not None))
        if after is not None:
            query = query.where(sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(*_cursor(after)))
        query = query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit + 1)
        with self._read() as connection:
            if state is not None:
                query = query.where(_in_state(connection, state))
            found = [_record(row) for row in connection.execute(query).mappings()]
        last = found[limit - 1] if len(found) > limit else None
        return JobPage(found[:limit], None if last is None else page_after(last))


def page_after(record: JobRecord) -> str:
    """Where the page of jobs begins that follows this one."""
    return f"{record.created_at!r}:{record.id}"


def new_id(name: str | None = None) -> str:
    """A new job's id: short enough to type, random enough never to meet another. name: of which it is the same."""
    alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
    drawn = secrets.token_bytes(10) if name is None else hashlib.sha256(name.encode()).digest()[:10]
    return "".join(alphabet[each % len(alphabet)] for each in drawn)


# A row without what is large and does not change.
_SMALL = [column for column in jobs.c if column.name not in ("spec", "model", "manifest", "output", "search")]


def place_of(out: str) -> str:
    """A place as it is stored and looked for."""
    return storable(normalised(out))


_WHOLE = jobs.c.parent.is_(None)
"""Jobs that are no parts of others."""


def _in_order(rows: Iterable[Mapping[Any, Any]]) -> list[JobRecord]:
    """Parts of a job, in the order of what is theirs."""
    return sorted(map(_record, rows), key=lambda each: (each.part or {}).get("number", 0))


def _writes_to(place: str) -> sa.ColumnElement[bool]:
    if is_database(place):
        url: sa.ColumnElement[str] = jobs.c.spec[("push", "url")].as_string()
        return url == place
    return jobs.c.place == place_of(place)


def _new_row(job_id: str) -> dict[str, Any]:
    return {
        "id": job_id, "wanted": "run", "remarks": [], "generation": 0, "created_at": now(), "planned": 0, "items": 0,
        "done": 0, "dead": 0, "rows": 0, "bytes": 0, "usage": {},
    }  # fmt: skip


def _leave_line(connection: sa.Connection, job_id: str, **values: Any) -> bool:
    """Change a job that waits to be started. False if it does not wait any more."""
    waits = (jobs.c.id == job_id, jobs.c.state == "waiting")
    return connection.execute(sa.update(jobs).where(*waits).values(**values)).rowcount > 0


def _upward(place: str) -> list[str]:
    """The place, and the folders above it."""
    parts = place.split("/")
    return ["/".join(parts[:count]) for count in range(2, len(parts) + 1)]


def _dots(path: str) -> Iterator[int]:
    """Where the dots of its last part are."""
    begin = path.rfind("/") + 1
    return (number for number, letter in enumerate(path[begin:], begin) if letter == ".")


def _output_columns(output: dict[str, Any]) -> dict[str, Any]:
    return {"output": output, "place": place_of(output["place"])}


def _search_columns(job_id: str, spec: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    name = storable(model.get("name") or "")
    sources = (spec.get("source") or ())[:_SEARCHED_SOURCES]
    words = [job_id, spec.get("model") or "", name, *sources, spec.get("out") or ""]
    return {"model_name": name, "search": storable(" ".join(words)).lower()}


def _in_state(connection: sa.Connection, state: str) -> sa.ColumnElement[bool]:
    """As reported: a running job without a coordinator is interrupted."""
    if state not in ("running", "interrupted"):
        return jobs.c.state == state
    running = jobs.c.state == "running"
    lost = leases.is_lost(connection, jobs, running)
    if state == "running":
        return sa.and_(running, sa.not_(lost))
    return sa.or_(jobs.c.state == "interrupted", sa.and_(running, lost))


def _cursor(text: str) -> tuple[sa.ColumnElement[float], sa.ColumnElement[str]]:
    created_at, _, job_id = text.partition(":")
    try:
        at = float(created_at)
        if not math.isfinite(at):
            raise ValueError
        return sa.literal(at, sa.Double()), sa.literal(storable(job_id))
    except ValueError:
        raise SpecError(f"--after takes the value printed at the end of the page before, not {text!r}") from None


def _lost(lease: Lease) -> OwnershipLostError:
    return OwnershipLostError(
        f"job {lease.job_id} has been taken over by another coordinator; this one stops",
        hint=f"Follow it with: tally jobs watch {lease.job_id}",
    )


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
    values["output"], values["place"] = row["output"] or {}, row["place"] or ""
    alive = leases.is_held(row)
    if values["state"] == "running" and not alive:
        values["state"] = "interrupted"
    return JobRecord(**values, alive=alive)
