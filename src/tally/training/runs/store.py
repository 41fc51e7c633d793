"""The store of runs: what each training was given, measured and left, and who trains it now.

One process owns a running run at a time. Each of its changes names its token, inside the same transaction: a process
that has lost its run changes nothing. All changes may be repeated: values of a metric are written by name and step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tally.database import lease as leases
from tally.database.clock import now
from tally.database.tables import run_metrics, runs
from tally.errors import OwnershipLostError, RunNotFoundError, RunStateError, SpecError
from tally.jobs.store import new_id
from tally.masking import HIDDEN, mask
from tally.text import did_you_mean, storable

LEASE_SECONDS = 30.0
"""How long a run's lease lasts that is not renewed."""

RunState: TypeAlias = Literal["running", "interrupted", "failed", "killed", "finished"]
"""A run whose process was lost counts as interrupted. killed: by a signal, its time limit, or its user."""

RUN_STATES: tuple[RunState, ...] = get_args(RunState)

EVENTS, PICTURES = "events", "pictures"
"""Folders of a run's folder: TensorBoard's event files, and the pictures that were logged. The rest are artifacts."""

LONGEST_METRIC = 250
"""Characters of a metric's name."""
_LONGEST_NAME = 128


class Value(NamedTuple):
    """A metric's value at a step; ``at`` is the time, in seconds since the epoch."""

    name: str
    step: int
    value: float
    at: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known of all values of a metric: those of the last step, the least, the most (which are not NaN unless
    all are), and the number of steps."""

    last: float
    step: int
    least: float
    most: float
    count: int

    def with_value(self, value: float, step: int) -> Figures:
        """The figures with one value more."""
        later = step >= self.step
        return Figures(
            value if later else self.last,
            max(step, self.step),
            _least(self.least, value),
            -_least(-self.most, -value),
            self.count + 1,
        )

    @classmethod
    def of(cls, value: float, step: int) -> Figures:
        return cls(value, step, value, value, 1)

    @classmethod
    def of_curve(cls, curve: Curve) -> Figures:
        """Those of all values of a curve, which has one at least."""
        found = cls.of(curve.values[0], curve.steps[0])
        for value, step in zip(curve.values[1:], curve.steps[1:], strict=True):
            found = found.with_value(value, step)
        return found

    def to_json(self) -> list[Any]:
        return [_number(self.last), self.step, _number(self.least), _number(self.most), self.count]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Figures:
        last, step, least, most, count = values
        return cls(float(last), int(step), float(least), float(most), int(count))


def _least(one: float, other: float) -> float:
    return other if math.isnan(one) else one if math.isnan(other) else min(one, other)


def _number(value: float) -> float | str:
    """JSON has no infinity and no NaN; PostgreSQL refuses them. ``float`` reads these texts."""
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as the store knows it. Times are seconds since the epoch.

    kind: what trained: script, retrain, style, anomaly, ... sweep: the id of the sweep that it is a trial of.
    started_at: of its last start. folder: where its files are, on ``owner_host``.
    metrics: what is known of each. models: versions that it registered, as ``models:/name/number``.
    command: the arguments of the command line, the program first.
    code: ``file``, ``hash``, ``folder`` (current, when it began), ``commit``, ``dirty``, ``repository``.
    environment: ``python``, ``platform``, ``host``, ``packages`` (name to version), ``packages_hash``, ``tally``,
        ``processors``; empty in lists.
    data: name to ``place``, ``hash``, ``bytes``. cost: ``seconds``, ``processor_seconds``, ``peak_bytes``.
    alive: whether a process trains it.
    """

    id: str
    name: str
    kind: str
    sweep: str | None
    state: RunState
    error: str | None
    created_at: float
    started_at: float
    finished_at: float | None
    owner_host: str | None
    folder: str
    parameters: Mapping[str, Any]
    tags: Mapping[str, str]
    metrics: Mapping[str, Figures]
    models: Sequence[str]
    command: Sequence[str] = field(repr=False)
    code: Mapping[str, Any] = field(repr=False)
    environment: Mapping[str, Any] = field(repr=False)
    data: Mapping[str, Any] = field(repr=False)
    cost: Mapping[str, float]
    alive: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "metrics"} | {
            "metrics": {
                name: {"last": _number(each.last), "step": each.step, "least": _number(each.least),
                       "most": _number(each.most), "count": each.count}
                for name, each in self.metrics.items()
            }
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunPage:
    """Some runs of a list, newest first. next: where the next page begins; None if this is the last."""

    runs: list[RunRecord]
    next: str | None


@dataclass(frozen=True, slots=True)
class RunLease:
    """The right to change a run: sent with every change."""

    run_id: str
    token: str


def open_runs() -> RunStore:
    """The runs of this installation, as the environment's settings say."""
    from tally.config import settings
    from tally.database.connect import connect

    return RunStore(connect(settings().database))


class RunStore:
    """Reads and changes runs. Safe to use from several threads; holds no state but the engine."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    # -- for who trains ------------------------------------------------------------------------------------

    def create(
        self,
        *,
        name: str,
        kind: str,
        folder: str,
        run_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        sweep: str | None = None,
        command: Sequence[str] = (),
        code: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> RunLease:
        """A new run that this process trains from now on. See :class:`RunRecord`."""
        lease = RunLease(run_id or new_id(), leases.new_token())
        values = {
            "id": lease.run_id, "name": storable(name)[:_LONGEST_NAME], "kind": kind, "sweep": sweep,
            "state": "running", "created_at": now(), "started_at": now(), "folder": storable(folder),
            "parameters": without_secrets(parameters or {}), "tags": plain(tags or {}), "metrics": {}, "models": [],
            "command": plain(list(command)), "code": plain(code or {}), "environment": plain(environment or {}),
            "data": plain(data or {}), "cost": {},
        }  # fmt: skip
        with self.engine.begin() as connection:
            connection.execute(sa.insert(runs).values(**values, **leases.granted(lease.token, LEASE_SECONDS)))
        return lease

    def resume(self, run_id: str, *, reopen: bool = False) -> RunLease:
        """Train a run again that was interrupted, killed or has failed; this process does from now on.

        reopen: also one that is finished, which more is to be added to.
        Raises RunNotFoundError, RunStateError where it is finished or trained by another process.
        """
        record = self.get(run_id)
        it, token = runs.c.id == record.id, leases.new_token()
        with self.engine.begin() as connection:
            lost = leases.is_lost(connection, runs, it)
            owner = connection.scalar(sa.select(runs.c.owner).where(it, lost))
            allowed = sa.true() if reopen else runs.c.state != "finished"
            taken = leases.acquire(
                connection, runs, it, allowed, token=token, seconds=LEASE_SECONDS,
                instead_of=owner, state="running", error=None, started_at=now(), finished_at=None,
            )  # fmt: skip
        if not taken:
            state = self.get(record.id).state
            raise RunStateError(
                f"run {record.id} is {state}" + (", by another process" if state == "running" else ""),
                hint="Only a run that was interrupted, killed or has failed is resumed. "
                f"'tally runs show {record.id}' tells more.",
            )
        return RunLease(record.id, token)

    def write(self, lease: RunLease, values: Sequence[Value] = (), **columns: Any) -> None:
        """Renew the lease, write these values of metrics (those of the same name and step are replaced), and set
        columns of the run. Raises OwnershipLostError."""
        changes = {name: _column(name, value) for name, value in columns.items()}
        rows = list({(storable(each.name), each.step): each for each in values}.values())
        with self.engine.begin() as connection:
            it = runs.c.id == lease.run_id
            if not leases.renew(connection, runs, it, token=lease.token, seconds=LEASE_SECONDS, **changes):
                raise _lost(lease)
            if rows:
                _write_values(connection, lease.run_id, rows)

    def finish(self, lease: RunLease, state: RunState, *, error: str | None = None, **columns: Any) -> None:
        """End the run, and give the lease back. Raises OwnershipLostError."""
        changes = {name: _column(name, value) for name, value in columns.items()}
        with self.engine.begin() as connection:
            it = runs.c.id == lease.run_id
            # The host stays: the run's files are there.
            ended = {"owner_host": leases.host(), "finished_at": now(), "state": state}
            changes |= {**ended, "error": error and storable(error)}
            if not leases.release(connection, runs, it, token=lease.token, **changes):
                raise _lost(lease)

    # -- for everybody ---------------------------------------------------------------------------------------

    def get(self, run_id: str) -> RunRecord:
        """The run by its id, or by the unambiguous beginning of it. Raises RunNotFoundError."""
        found: Sequence[sa.RowMapping] = []
        if run_id and run_id.isascii() and run_id.isprintable():
            with self._read() as connection:
                for asked in (runs.c.id == run_id, runs.c.id.startswith(run_id, autoescape=True)):
                    if found := connection.execute(_select().where(asked).limit(3)).mappings().all():
                        break
        if not found:
            raise RunNotFoundError(f"no run {run_id!r}", hint="'tally runs list' shows the runs there are.")
        if len(found) > 1:
            some = ", ".join(row["id"] for row in found)
            raise RunNotFoundError(f"{run_id!r} is the beginning of several runs: {some}", hint="Type more of it.")
        return _record(found[0])

    def values(self, run_id: str, names: Sequence[str] | None = None, *, most: int | None = None) -> dict[str, Curve]:
        """The values of a run's metrics, each by step. Raises RunNotFoundError, SpecError for a name that is not there.

        names: of these metrics only. most: so many values of each at most, spread evenly, the last one among them.
        """
        record = self.get(run_id)
        it = run_metrics.c.run_id == record.id
        query = sa.select(run_metrics.c.name, run_metrics.c.step, run_metrics.c.value, run_metrics.c.at).where(it)
        if names is not None:
            query = query.where(run_metrics.c.name.in_(list(names)))
        curves: dict[str, Curve] = {}
        with self._read() as connection:
            for name, step, value, at in connection.execute(query.order_by(run_metrics.c.name, run_metrics.c.step)):
                curve = curves.setdefault(name, Curve([], [], []))
                curve.steps.append(int(step))
                curve.values.append(math.nan if value is None else float(value))
                curve.times.append(float(at))
        for each in names or ():
            if each not in curves:
                raise SpecError(
                    f"run {record.id} has no metric {each!r}{did_you_mean(each, record.metrics)}",
                    hint=f"It has {', '.join(sorted(record.metrics)) or 'none'}.",
                )
        return curves if most is None else {name: curve.thinned(most) for name, curve in curves.items()}

    def delete(self, run_id: str) -> RunRecord:
        """Forget a run; its folder stays, which the caller removes. Raises RunNotFoundError, RunStateError while it is
        being trained."""
        record = self.get(run_id)
        with self.engine.begin() as connection:
            it = runs.c.id == record.id
            free = sa.or_(runs.c.state != "running", leases.is_lost(connection, runs, it))
            if connection.execute(sa.delete(runs).where(it, free)).rowcount == 0:
                raise RunStateError(f"run {record.id} is being trained", hint="Stop its process first.")
        return record

    def _read(self) -> sa.Connection:
        return self.engine.connect().execution_options(reading=True)

    # Last in the class: in what follows, ``list`` means this method.
    def list(
        self,
        *,
        state: str | None = None,
        kind: str | None = None,
        sweep: str | None = None,
        text: str | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> RunPage:
        """One page of the runs, newest first.

        state, kind, sweep: as in :class:`RunRecord`. text: part of the id or name, in upper or lower case.
        after: where the page begins: ``next`` of the page before. Raises SpecError for anything else.
        """
        words = storable(text or "").lower()
        conditions: Sequence[tuple[object, sa.ColumnElement[bool]]] = (
            (kind, runs.c.kind == storable(kind or "")),
            (sweep, runs.c.sweep == storable(sweep or "")),
            (text, sa.func.lower(runs.c.id + " " + runs.c.name).contains(words, autoescape=True)),
        )
        query = _select_for_lists().where(*(condition for given, condition in conditions if given is not None))
        if after is not None:
            query = query.where(sa.tuple_(runs.c.created_at, runs.c.id) < sa.tuple_(*_cursor(after)))
        query = query.order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(limit + 1)
        with self._read() as connection:
            if state is not None:
                query = query.where(_in_state(connection, state))
            found = [_record(row) for row in connection.execute(query).mappings()]
        last = found[limit - 1] if len(found) > limit else None
        return RunPage(found[:limit], None if last is None else f"{last.created_at!r}:{last.id}")


class Curve(NamedTuple):
    """A metric's values by step, ascending; ``times`` are seconds since the epoch."""

    steps: list[int]
    values: list[float]
    times: list[float]

    def thinned(self, most: int) -> Curve:
        """At most so many of the values, spread evenly, the first and the last among them."""
        count = len(self.steps)
        if count <= most:
            return self
        kept = sorted({round(number * (count - 1) / max(1, most - 1)) for number in range(most)} | {count - 1})[-most:]
        return Curve(
            [self.steps[each] for each in kept],
            [self.values[each] for each in kept],
            [self.times[each] for each in kept],
        )


def plain(value: Any) -> Any:
    """The value as JSON can hold it everywhere: what is not finite, and what JSON does not know, becomes text."""
    if isinstance(value, Mapping):
        return {storable(str(key)): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return storable(value)
    try:  # a scalar of numpy or torch
        return plain(value.item())
    except (AttributeError, ValueError, TypeError, RuntimeError):
        return storable(str(value))


def without_secrets(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as they are kept: what a name or a URL says is a secret is hidden."""
    return {
        name: HIDDEN if isinstance(value, str) and is_secret(f"{name}={value}") else plain(value)
        for name, value in plain(parameters).items()
    }


def is_secret(assignment: str) -> bool:
    """Whether ``NAME=VALUE`` gives a secret away. ``max_tokens=512`` and ``tokenizer=bert`` do not."""
    return mask(assignment) != assignment and not _NO_SECRET.match(assignment)


_NO_SECRET = re.compile(r"(?i)[\w.-]*token(s|i[sz]er)[\w.-]*=[\w./-]*$")


def _column(name: str, value: Any) -> Any:
    if name == "metrics":
        return {storable(key): each.to_json() for key, each in value.items()}
    return storable(value) if isinstance(value, str) else plain(value)


def _write_values(connection: sa.Connection, run_id: str, rows: Sequence[Value]) -> None:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(run_metrics)
    changes = {"value": statement.excluded.value, "at": statement.excluded.at}
    statement = statement.on_conflict_do_update(index_elements=["run_id", "name", "step"], set_=changes)
    # Rows beside the statement: one with all of them in it takes SQLAlchemy a tenth of a second to put together.
    connection.execute(
        statement,
        [
            {
                "run_id": run_id, "name": storable(each.name), "step": each.step,
                "value": None if math.isnan(each.value) else each.value, "at": each.at,
            }
            for each in rows
        ],
    )  # fmt: skip


def _select() -> sa.Select[Any]:
    return sa.select(runs, now().label("clock"))


def _select_for_lists() -> sa.Select[Any]:
    """Without the hundreds of packages that each run's environment has."""
    return sa.select(*(each for each in runs.c if each.name != "environment"), now().label("clock"))


def _in_state(connection: sa.Connection, state: str) -> sa.ColumnElement[bool]:
    """As reported: a running run without a process is interrupted."""
    running = runs.c.state == "running"
    if state not in ("running", "interrupted"):
        return runs.c.state == state
    lost = leases.is_lost(connection, runs, running)
    return sa.and_(running, lost if state == "interrupted" else sa.not_(lost))


def _cursor(text: str) -> tuple[sa.ColumnElement[float], sa.ColumnElement[str]]:
    created_at, _, run_id = text.partition(":")
    try:
        at = float(created_at)
        if not math.isfinite(at):
            raise ValueError
    except ValueError:
        raise SpecError(f"--after takes the value printed at the end of the page before, not {text!r}") from None
    return sa.literal(at, sa.Double()), sa.literal(storable(run_id))


def _lost(lease: RunLease) -> OwnershipLostError:
    return OwnershipLostError(
        f"run {lease.run_id} was taken over by another process, or deleted; this one stops",
        hint=f"'tally runs show {lease.run_id}' tells more.",
    )


def _record(row: Mapping[Any, Any]) -> RunRecord:
    values = {name: row[name] for name in RunRecord.__slots__ if name in row}
    alive = leases.is_held(row)
    if values["state"] == "running" and not alive:
        values["state"] = "interrupted"
    values["metrics"] = {name: Figures.from_json(each) for name, each in row["metrics"].items()}
    return replace(RunRecord(**{"environment": {}, **values}), alive=alive)
