"""The store of sweeps and their trials. One process drives a sweep at a time.

What a trial measures is its run's: see :mod:`tally.training.runs.store`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import sqlalchemy as sa

from tally.database import lease as leases
from tally.database.clock import now
from tally.database.leased import LONGEST_NAME, Lease, LeasedStore
from tally.database.tables import sweeps, trials
from tally.errors import RunNotFoundError, RunStateError
from tally.jobs.store import new_id
from tally.text import storable
from tally.training.runs.store import RunStore, plain

SweepState: TypeAlias = Literal["running", "interrupted", "failed", "finished"]
"""A sweep whose process was lost, or was stopped by its user, is interrupted."""
SWEEP_STATES: tuple[SweepState, ...] = get_args(SweepState)

TrialState: TypeAlias = Literal["running", "finished", "pruned", "failed"]
"""One that was running when the process of its sweep was lost stays so until the sweep is resumed."""


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """One sweep as the store knows it. Times are seconds since the epoch.

    kind: what its trials train: retrain, script. spec: all that it was given. folder: its files, on ``owner_host``.
    best: number of its best trial, once it is finished; best_value: of that. model: what was registered, as
    ``models:/name/number``. counts: of its trials by state. alive: whether a process drives it.
    """

    id: str
    name: str
    kind: str
    state: SweepState
    error: str | None
    created_at: float
    started_at: float
    finished_at: float | None
    owner_host: str | None
    folder: str
    spec: Mapping[str, Any] = field(repr=False)
    best: int | None
    model: str | None
    best_value: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    alive: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial. run_id: its run. attempts: how often it was begun. value, step: of the sweep's metric: the result and
    the step that it is of, or those at which it was pruned."""

    number: int
    state: TrialState
    attempts: int
    run_id: str
    parameters: Mapping[str, Any]
    value: float | None
    step: int | None
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class SweepPage(NamedTuple):
    """Some sweeps of a list, newest first. next: where the next page begins; None if this is the last."""

    sweeps: list[SweepRecord]
    next: str | None


def best_of(record: SweepRecord, trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The best trial; of a sweep that goes on, so far."""
    sign = 1 if record.spec["lowest"] else -1
    finished = [each for each in trials if each.state == "finished" and each.value is not None]
    if record.best is not None:
        return next((each for each in trials if each.number == record.best), None)
    return min(finished, key=lambda each: (sign * (each.value or 0.0), each.number), default=None)


class SweepStore(LeasedStore[SweepRecord]):
    """Reads and changes sweeps."""

    table, word, command = sweeps, "sweep", "tally sweep"
    missing, refused = RunNotFoundError, RunStateError

    # -- for who drives one --------------------------------------------------------------------------------

    def create(
        self, *, sweep_id: str | None = None, name: str | None, kind: str, folder: str, spec: Mapping[str, Any]
    ) -> Lease:
        """A new sweep that this process drives from now on."""
        lease = Lease(sweep_id or new_id(), leases.new_token())
        values = {
            "name": storable(name or lease.id)[:LONGEST_NAME], "kind": kind, "folder": storable(folder),
            "spec": plain(spec),
        }  # fmt: skip
        return self._insert(lease, values)

    def renew(self, lease: Lease) -> None:
        """Raises OwnershipLostError."""
        with self.engine.begin() as connection:
            self._renew(connection, lease)

    def begin_trial(self, lease: Lease, number: int, run_id: str, parameters: Mapping[str, Any]) -> None:
        """A trial that begins, or begins once more. Raises OwnershipLostError."""
        with self.engine.begin() as connection:
            self._renew(connection, lease)
            it = (trials.c.sweep_id == lease.id, trials.c.number == number)
            again = {"state": "running", "run_id": run_id, "attempts": trials.c.attempts + 1, "error": None}
            if not connection.execute(sa.update(trials).where(*it).values(**again)).rowcount:
                connection.execute(
                    sa.insert(trials).values(
                        sweep_id=lease.id, number=number, state="running", attempts=1, run_id=run_id,
                        parameters=plain(parameters),
                    )
                )  # fmt: skip

    def end_trial(
        self,
        lease: Lease,
        number: int,
        state: TrialState,
        *,
        value: float | None = None,
        step: int | None = None,
        error: str | None = None,
    ) -> None:
        """Raises OwnershipLostError."""
        values = {"state": state, "value": value, "step": step, "error": error and storable(error)}
        with self.engine.begin() as connection:
            self._renew(connection, lease)
            it = (trials.c.sweep_id == lease.id, trials.c.number == number)
            connection.execute(sa.update(trials).where(*it).values(**values))

    def finish(self, lease: Lease, state: SweepState, *, error: str | None = None, **columns: Any) -> None:
        """End the sweep, or put it down, and give the lease back. Raises OwnershipLostError."""
        with self.engine.begin() as connection:
            self._end(connection, lease, state, error, columns)

    # -- for everybody -----------------------------------------------------------------------------------------

    def get(self, row_id: str) -> SweepRecord:
        record = super().get(row_id)
        with self._read() as connection:
            return _with_trials(connection, [record])[0]

    def remove(self, record: SweepRecord) -> None:
        """Forget a sweep and its trials, with their runs, and remove all folders that Tally has made. What was
        registered stays. May be repeated, if it was interrupted. Raises RunStateError while it or a trial is driven."""
        lease = self._take(record.id, sa.true())
        if lease is None:
            raise RunStateError(f"sweep {record.id} is running", hint="Stop its process first.")
        try:
            runs = RunStore(self.engine)
            while found := runs.list(sweep=record.id, limit=1000).runs:
                for each in found:
                    runs.remove(each)
                self.renew(lease)
        except BaseException:
            self._give_back(lease)
            raise
        self._remove_folder(record)
        with self.engine.begin() as connection:
            connection.execute(sa.delete(sweeps).where(sweeps.c.id == lease.id, sweeps.c.owner == lease.token))

    def trials(self, sweep_id: str) -> Sequence[TrialRecord]:
        """The trials that have begun, by number."""
        query = sa.select(*(trials.c[name] for name in TrialRecord.__slots__)).where(trials.c.sweep_id == sweep_id)
        with self._read() as connection:
            return [TrialRecord(**row) for row in connection.execute(query.order_by(trials.c.number)).mappings()]

    def list(self, *, after: str | None = None, limit: int = 50) -> SweepPage:
        """One page of the sweeps, newest first. after: where it begins: ``next`` of the page before."""
        with self._read() as connection:
            found, next_ = self._page(connection, sa.select(sweeps, now().label("clock")), after, limit)
            return SweepPage(_with_trials(connection, [self._record(row) for row in found]), next_)

    @classmethod
    def _record(cls, row: Mapping[Any, Any]) -> SweepRecord:
        values = {name: row[name] for name in SweepRecord.__slots__ if name in row}
        return SweepRecord(**values | cls._standing(row))


def _with_trials(connection: sa.Connection, records: Sequence[SweepRecord]) -> list[SweepRecord]:
    """The same, with what their trials say."""
    mine = trials.c.sweep_id.in_([each.id for each in records])
    counted = sa.select(trials.c.sweep_id, trials.c.state, sa.func.count()).where(mine)
    best = sa.select(sweeps.c.id, trials.c.value).where(
        mine, trials.c.sweep_id == sweeps.c.id, trials.c.number == sweeps.c.best
    )
    counts: dict[str, dict[str, int]] = {}
    for sweep_id, state, number in connection.execute(counted.group_by(trials.c.sweep_id, trials.c.state)):
        counts.setdefault(sweep_id, {})[state] = number
    values: dict[str, float | None] = {row.id: row.value for row in connection.execute(best)}
    return [replace(each, counts=counts.get(each.id, {}), best_value=values.get(each.id)) for each in records]
