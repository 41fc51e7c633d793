"""The store of pipelines' runs and of their nodes. One process drives a run at a time; each change names its lease."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import sqlalchemy as sa

from tally.database import lease as leases
from tally.database.clock import now
from tally.database.leased import LONGEST_NAME, Lease, LeasedStore
from tally.database.tables import pipeline_cache, pipeline_locks, pipeline_nodes, pipeline_runs
from tally.errors import PipelineNotFoundError, PipelineStateError
from tally.jobs.store import new_id
from tally.text import storable

RENEW_SECONDS = 10.0

RunState: TypeAlias = Literal["running", "waiting", "interrupted", "failed", "error", "cancelled", "succeeded"]
"""One whose process was lost, or was stopped by its user, is interrupted; one that only waits for a person, waiting."""
RUN_STATES: tuple[RunState, ...] = get_args(RunState)
ENDED: tuple[RunState, ...] = ("failed", "error", "cancelled", "succeeded")

Phase: TypeAlias = Literal["Pending", "Running", "Succeeded", "Failed", "Error", "Skipped", "Omitted"]
"""Argo's."""
DONE: tuple[Phase, ...] = ("Succeeded", "Failed", "Error", "Skipped", "Omitted")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as the store knows it. Times are seconds since the epoch.

    spec: the documents, and how it is run. folder: logs and artifacts, on ``owner_host``. alive: whether a process
    drives it.
    """

    id: str
    name: str
    state: RunState
    wanted: str | None
    error: str | None
    created_at: float
    started_at: float
    finished_at: float | None
    owner_host: str | None
    folder: str
    spec: Mapping[str, Any] = field(repr=False)
    parameters: Mapping[str, str]
    alive: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "spec"}


@dataclass(slots=True)
class Node:
    """One node of a run: a step, an attempt at one, a group. Its name is the way to it from the top.

    kind: Pod, Steps, StepGroup, DAG, TaskGroup, Retry, Suspend, HTTP, Resource, Skipped. parent: id of what it is part
    of. outputs: ``parameters``, ``artifacts``, ``result``. supplied: what a person gave to a step that waits.
    """

    name: str
    display: str
    kind: str
    template: str
    parent: str
    number: int = 0
    phase: Phase = "Pending"
    message: str | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    started_at: float | None = None
    finished_at: float | None = None
    supplied: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return node_id(self.name)

    @property
    def done(self) -> bool:
        return self.phase in DONE

    @property
    def failed(self) -> bool:
        return self.phase in ("Failed", "Error")

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id} | {name: getattr(self, name) for name in self.__slots__}


_CHANGE_NODE = sa.update(pipeline_nodes).where(
    pipeline_nodes.c.run_id == sa.bindparam("its_run"), pipeline_nodes.c.id == sa.bindparam("its_id")
)
_FORGET = sa.delete(pipeline_cache).where(
    pipeline_cache.c.cache == sa.bindparam("its_cache"), pipeline_cache.c.key == sa.bindparam("its_key")
)
_COLUMNS = tuple(name for name in Node.__slots__ if name != "supplied")


def node_id(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:20]


class RunPage(NamedTuple):
    """Some runs of a list, newest first. next: where the next page begins; None if this is the last."""

    runs: list[RunRecord]
    next: str | None


class Cached(NamedTuple):
    """Outputs that need not be made again, and the node that made them."""

    outputs: dict[str, Any]
    run_id: str
    node_id: str
    made_at: float
    age: float


class PipelineStore(LeasedStore[RunRecord]):
    """Reads and changes runs of pipelines."""

    table, word, command = pipeline_runs, "pipeline", "tally pipeline"
    missing, refused = PipelineNotFoundError, PipelineStateError

    # -- for who drives one --------------------------------------------------------------------------------

    def create(
        self,
        *,
        run_id: str | None = None,
        name: str,
        folder: str,
        spec: Mapping[str, Any],
        parameters: Mapping[str, str],
    ) -> Lease:
        """A new run that this process drives from now on."""
        values = {
            "name": storable(name)[:LONGEST_NAME], "folder": storable(folder), "spec": _plain(spec),
            "parameters": _plain(parameters),
        }  # fmt: skip
        return self._insert(Lease(run_id or new_id(), leases.new_token()), values)

    def resume(self, row_id: str, *, reopen: bool = False) -> Lease:
        """Drive a run that is not over and not driven. Raises PipelineNotFoundError, PipelineStateError."""
        allowed = sa.true() if reopen else pipeline_runs.c.state.not_in(ENDED)
        if (lease := self._take(row_id, allowed, state="running", error=None, finished_at=None)) is None:
            found = self.get(row_id)
            raise PipelineStateError(
                f"pipeline {found.id} is {found.state}" + (", by another process" if found.state == "running" else ""),
                hint=f"One that waits or was interrupted is resumed. 'tally pipeline show {found.id}' tells more.",
            )
        return lease

    def renew(self, lease: Lease) -> str | None:
        """Raises OwnershipLostError. Returns what the driver should do, other than go on."""
        with self.engine.begin() as connection:
            self._renew(connection, lease)
            wanted = connection.scalar(sa.select(pipeline_runs.c.wanted).where(pipeline_runs.c.id == lease.id))
        return str(wanted) if wanted is not None else None

    def save(self, lease: Lease, nodes: Iterable[Node], remembered: Iterable[tuple[str, str, Node]] = ()) -> None:
        """Keep nodes as they are now, new ones and known ones; what was supplied stays. Raises OwnershipLostError.

        remembered: nodes whose outputs are kept for other runs, too, in a cache under a key.
        """
        rows = [{"run_id": lease.id, "id": each.id, **{name: _plain(getattr(each, name)) for name in _COLUMNS}}
                for each in nodes]  # fmt: skip
        with self.engine.begin() as connection:
            self._renew(connection, lease)
            it = (pipeline_nodes.c.run_id == lease.id, pipeline_nodes.c.id.in_([row["id"] for row in rows]))
            known = set(connection.scalars(sa.select(pipeline_nodes.c.id).where(*it)))
            if fresh := [row for row in rows if row["id"] not in known]:
                connection.execute(sa.insert(pipeline_nodes), fresh)
            if changed := [{**row, "its_run": lease.id, "its_id": row["id"]} for row in rows if row["id"] in known]:
                connection.execute(_CHANGE_NODE, changed)
            if keep := {(cache, key): node for cache, key, node in remembered}:
                self._remember(connection, lease.id, keep)

    def finish(self, lease: Lease, state: RunState, *, error: str | None = None) -> None:
        """End the run, or put it down, and give the lease back. Raises OwnershipLostError."""
        with self.engine.begin() as connection:
            if state in ENDED:
                connection.execute(sa.delete(pipeline_locks).where(pipeline_locks.c.run_id == lease.id))
            self._end(connection, lease, state, error, {} if state in ENDED else {"finished_at": None})

    def supplied(self, lease: Lease, nodes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What was supplied to these nodes, by id, for those to which something was."""
        query = sa.select(pipeline_nodes.c.id, pipeline_nodes.c.supplied).where(
            pipeline_nodes.c.run_id == lease.id, pipeline_nodes.c.id.in_(nodes)
        )
        with self._read() as connection:
            return {row.id: row.supplied for row in connection.execute(query) if row.supplied is not None}

    def lock(self, lease: Lease, name: str, places: int, node: str) -> bool:
        """Take one of so many places; whether there was one. Raises OwnershipLostError."""
        with self.engine.begin() as connection:
            self._renew(connection, lease)
            held = connection.execute(
                sa.select(pipeline_locks).where(pipeline_locks.c.name == name).order_by(pipeline_locks.c.place)
            ).all()
            if any((row.run_id, row.node_id) == (lease.id, node) for row in held):
                return True
            free = next((each for each in range(places) if each not in {row.place for row in held}), None)
            if free is None:
                return False
            try:
                with connection.begin_nested():
                    connection.execute(
                        sa.insert(pipeline_locks).values(name=name, place=free, run_id=lease.id, node_id=node)
                    )
            except sa.exc.IntegrityError:  # another run was faster
                return False
        return True

    def unlock(self, lease: Lease, node: str) -> None:
        """Give back all places that a node holds."""
        with self.engine.begin() as connection:
            it = (pipeline_locks.c.run_id == lease.id, pipeline_locks.c.node_id == node)
            connection.execute(sa.delete(pipeline_locks).where(*it))

    def cached(self, cache: str, key: str) -> Cached | None:
        """Outputs that were remembered under a key."""
        it = (pipeline_cache.c.cache == cache, pipeline_cache.c.key == key)
        with self._read() as connection:
            row = connection.execute(sa.select(pipeline_cache, now().label("clock")).where(*it)).mappings().first()
        if row is None:
            return None
        return Cached(row["outputs"], row["run_id"], row["node_id"], row["made_at"], row["clock"] - row["made_at"])

    @staticmethod
    def _remember(connection: sa.Connection, run_id: str, keep: Mapping[tuple[str, str], Node]) -> None:
        """Keep nodes' outputs, each under a name of a cache and a key, in place of others."""
        clock = connection.scalar(sa.select(now()))
        rows = [
            {"cache": cache, "key": key, "outputs": _plain(node.outputs), "run_id": run_id, "node_id": node.id,
             "made_at": clock}
            for (cache, key), node in sorted(keep.items(), key=lambda each: each[0])
        ]  # fmt: skip
        for several in (rows, *([row] for row in rows)):
            try:
                with connection.begin_nested():
                    connection.execute(_FORGET, [{"its_cache": row["cache"], "its_key": row["key"]} for row in several])
                    connection.execute(sa.insert(pipeline_cache), several)
            except sa.exc.IntegrityError:  # another run remembers the same just now: one of them counts
                continue
            if several is rows:
                break

    # -- for everybody -----------------------------------------------------------------------------------------

    @classmethod
    def _record(cls, row: Mapping[Any, Any]) -> RunRecord:
        values = {name: row[name] for name in RunRecord.__slots__ if name in row}
        return RunRecord(**values | cls._standing(row))

    def _meant(self, text: str) -> Iterable[leases.Where]:
        """An id, a name, or the beginning of an id."""
        yield pipeline_runs.c.id == text
        yield pipeline_runs.c.name == text
        yield from super()._meant(text)

    def nodes(self, run_id: str) -> list[Node]:
        """The nodes of a run in the order in which they were begun."""
        query = sa.select(*(pipeline_nodes.c[name] for name in Node.__slots__)).where(pipeline_nodes.c.run_id == run_id)
        with self._read() as connection:
            return [Node(**row) for row in connection.execute(query.order_by(pipeline_nodes.c.number)).mappings()]

    def list(
        self,
        *,
        state: str | None = None,
        text: str | None = None,
        since: float | None = None,
        until: float | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> RunPage:
        """A page of the runs, newest first.

        state: as in :class:`RunRecord`. text: part of the id or name, in upper or lower case. since, until:
        ``since <= created_at < until``. after: ``next`` of the page before.
        """
        words = storable(text or "").lower()
        conditions: Sequence[tuple[object, sa.ColumnElement[bool]]] = (
            (text, sa.func.lower(pipeline_runs.c.id + " " + pipeline_runs.c.name).contains(words, autoescape=True)),
            (since, pipeline_runs.c.created_at >= (since or 0.0)),
            (until, pipeline_runs.c.created_at < (until or 0.0)),
        )
        query = sa.select(pipeline_runs, now().label("clock")).where(
            *(condition for given, condition in conditions if given is not None)
        )
        with self._read() as connection:
            if state is not None:
                query = query.where(self._in_state(connection, state))
            rows, following = self._page(connection, query, after, limit)
        return RunPage([self._record(row) for row in rows], following)

    def supply(self, run_id: str, node: str, values: Mapping[str, str]) -> None:
        """Let a node that waits for a person go on, with these values of its outputs."""
        it = (pipeline_nodes.c.run_id == run_id, pipeline_nodes.c.id == node, pipeline_nodes.c.phase == "Running")
        with self.engine.begin() as connection:
            connection.execute(sa.update(pipeline_nodes).where(*it).values(supplied=dict(values)))

    def want(self, run_id: str, wanted: str) -> None:
        """Say what a run's driver should do."""
        with self.engine.begin() as connection:
            connection.execute(sa.update(pipeline_runs).where(pipeline_runs.c.id == run_id).values(wanted=wanted))

    def delete(self, run_id: str) -> None:
        """Forget a run that no process drives, and what was remembered of it. Raises PipelineStateError."""
        record = self.get(run_id)
        it = pipeline_runs.c.id == record.id
        with self.engine.begin() as connection:
            free = leases.is_lost(connection, pipeline_runs, it)
            if not connection.execute(sa.delete(pipeline_runs).where(it, free)).rowcount:
                raise PipelineStateError(
                    f"pipeline {record.id} is running", hint=f"Stop it first: tally pipeline cancel {record.id}"
                )
            connection.execute(sa.delete(pipeline_cache).where(pipeline_cache.c.run_id == record.id))


def _plain(value: Any) -> Any:
    """A value in which every text is one that the database takes."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, Mapping):
        return {storable(str(key)): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
