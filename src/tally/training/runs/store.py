"""The store of runs: what each training was given, measured and left, and who trains it now.

All changes may be repeated: values of a metric are written by name and step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tally.database import lease as leases
from tally.database.clock import now
from tally.database.leased import LONGEST_NAME, Lease, LeasedStore
from tally.database.tables import run_metrics, runs
from tally.errors import RunNotFoundError, RunStateError, SpecError
from tally.jobs.store import new_id
from tally.masking import HIDDEN, mask
from tally.text import did_you_mean, storable

RunState: TypeAlias = Literal["running", "interrupted", "failed", "killed", "finished"]
"""A run whose process was lost counts as interrupted. killed: by a signal, its time limit, or its user."""

RUN_STATES: tuple[RunState, ...] = get_args(RunState)

PACKAGE = "model"
"""Folder of a run's folder: the package of the model that it trained, where Tally has written that."""
EVENTS, PICTURES = "events", "pictures"
"""Folders of a run's folder: TensorBoard's event files, and the pictures that were logged. The rest are artifacts."""

LONGEST_METRIC = 250
"""Characters of a metric's name."""


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


class RunStore(LeasedStore[RunRecord]):
    """Reads and changes runs."""

    table, word, command = runs, "run", "tally runs"
    missing, refused = RunNotFoundError, RunStateError

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
    ) -> Lease:
        """A new run that this process trains from now on. See :class:`RunRecord`."""
        values = {
            "name": storable(name)[:LONGEST_NAME], "kind": kind, "sweep": sweep, "folder": storable(folder),
            "parameters": without_secrets(parameters or {}), "tags": plain(tags or {}), "metrics": {}, "models": [],
            "command": plain(list(command)), "code": plain(code or {}), "environment": plain(environment or {}),
            "data": plain(data or {}), "cost": {},
        }  # fmt: skip
        return self._insert(Lease(run_id or new_id(), leases.new_token()), values)

    def write(self, lease: Lease, values: Sequence[Value] = (), **columns: Any) -> None:
        """Renew the lease, write these values of metrics (those of the same name and step are replaced), and set
        columns of the run. Raises OwnershipLostError."""
        changes = {name: _column(name, value) for name, value in columns.items()}
        rows = list({(storable(each.name), each.step): each for each in values}.values())
        with self.engine.begin() as connection:
            self._renew(connection, lease, **changes)
            if rows:
                _write_values(connection, lease.id, rows)

    def finish(self, lease: Lease, state: RunState, *, error: str | None = None, **columns: Any) -> None:
        """End the run, and give the lease back. Raises OwnershipLostError."""
        changes = {name: _column(name, value) for name, value in columns.items()}
        with self.engine.begin() as connection:
            self._end(connection, lease, state, error, changes)

    # -- for everybody ---------------------------------------------------------------------------------------

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

    def remove(self, record: RunRecord, *, keep_files: bool = False) -> None:
        """Forget a run, and remove its folder if Tally has made it. Raises RunStateError while it is being trained."""
        with self.engine.begin() as connection:
            it = runs.c.id == record.id
            free = sa.or_(runs.c.state != "running", leases.is_lost(connection, runs, it))
            if connection.execute(sa.delete(runs).where(it, free)).rowcount == 0:
                raise RunStateError(f"run {record.id} is being trained", hint="Stop its process first.")
        if not keep_files:
            self._remove_folder(record)

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
        with self._read() as connection:
            if state is not None:
                query = query.where(self._in_state(connection, state))
            found, next_ = self._page(connection, query, after, limit)
        return RunPage([self._record(row) for row in found], next_)

    @classmethod
    def _record(cls, row: Mapping[Any, Any]) -> RunRecord:
        values = {name: row[name] for name in RunRecord.__slots__ if name in row}
        values["metrics"] = {name: Figures.from_json(each) for name, each in row["metrics"].items()}
        return RunRecord(**{"environment": {}, **values, **cls._standing(row)})


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


def _select_for_lists() -> sa.Select[Any]:
    """Without the hundreds of packages that each run's environment has."""
    return sa.select(*(each for each in runs.c if each.name != "environment"), now().label("clock"))
