"""The store of sweeps and their trials. One process drives a sweep at a time; each change names its lease's token.

What a trial measures is its run's: see :mod:`tally.training.runs.store`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import sqlalchemy as sa

from tally.database import lease as leases
from tally.database.clock import now
from tally.database.tables import sweeps, trials
from tally.errors import OwnershipLostError, RunNotFoundError, RunStateError
from tally.jobs.store import new_id
from tally.text import storable
from tally.training.runs.store import LEASE_SECONDS, plain

SweepState: TypeAlias = Literal["running", "interrupted", "failed", "finished"]
"""A sweep whose process was lost, or was stopped by its user, is interrupted."""
SWEEP_STATES: tuple[SweepState, ...] = get_args(SweepState)

TrialState: TypeAlias = Literal["running", "finished", "pruned", "failed"]
"""One that was running when the process of its sweep was lost stays so until the sweep is resumed."""
_LONGEST_NAME = 128


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """One sweep as the store knows it. Times are seconds since the epoch.

    kind: what its trials train: retrain, script. spec: all that it was given. folder: its files, on ``owner_host``.
    best: number of its best trial. model: what was registered, as ``models:/name/number``. alive: whether a process
    drives it.
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
    """Some sweeps of a list, newest first. more: whether there are older ones."""

    sweeps: list[SweepRecord]
    more: bool


@dataclass(frozen=True, slots=True)
class SweepLease:
    """The right to change a sweep: sent with every change."""

    sweep_id: str
    token: str


def open_sweeps() -> SweepStore:
    """The sweeps of this installation, as the environment's settings say."""
    from tally.config import settings
    from tally.database.connect import connect

    return SweepStore(connect(settings().database))


class SweepStore:
    """Reads and changes sweeps. Safe to use from several threads; holds no state but the engine."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    # -- for who drives one --------------------------------------------------------------------------------

    def create(
        self, *, sweep_id: str | None = None, name: str | None, kind: str, folder: str, spec: Mapping[str, Any]
    ) -> SweepLease:
        """A new sweep that this process drives from now on."""
        lease = SweepLease(sweep_id or new_id(), leases.new_token())
        values = {
            "id": lease.sweep_id, "name": storable(name or lease.sweep_id)[:_LONGEST_NAME], "kind": kind,
            "state": "running", "created_at": now(), "started_at": now(), "folder": storable(folder),
            "spec": plain(spec),
        }  # fmt: skip
        with self.engine.begin() as connection:
            connection.execute(sa.insert(sweeps).values(**values, **leases.granted(lease.token, LEASE_SECONDS)))
        return lease

    def resume(self, sweep_id: str) -> SweepLease:
        """Drive a sweep that is not finished and that no process drives. Raises RunNotFoundError, RunStateError."""
        record = self.get(sweep_id)
        it, token = sweeps.c.id == record.id, leases.new_token()
        with self.engine.begin() as connection:
            owner = connection.scalar(sa.select(sweeps.c.owner).where(it, leases.is_lost(connection, sweeps, it)))
            taken = leases.acquire(
                connection, sweeps, it, sweeps.c.state != "finished", token=token, seconds=LEASE_SECONDS,
                instead_of=owner, state="running", error=None, started_at=now(), finished_at=None,
            )  # fmt: skip
        if not taken:
            state = self.get(record.id).state
            raise RunStateError(
                f"sweep {record.id} is {state}" + (", by another process" if state == "running" else ""),
                hint=f"Only one that was interrupted or has failed is resumed. 'tally sweep show {record.id}' tells "
                "more.",
            )
        return SweepLease(record.id, token)

    def renew(self, lease: SweepLease) -> None:
        """Raises OwnershipLostError."""
        self._change(lease)

    def begin_trial(self, lease: SweepLease, number: int, run_id: str, parameters: Mapping[str, Any]) -> None:
        """A trial that begins, or begins once more. Raises OwnershipLostError."""
        with self.engine.begin() as connection:
            self._renewed(connection, lease)
            it = (trials.c.sweep_id == lease.sweep_id, trials.c.number == number)
            again = {"state": "running", "run_id": run_id, "attempts": trials.c.attempts + 1, "error": None}
            if not connection.execute(sa.update(trials).where(*it).values(**again)).rowcount:
                connection.execute(
                    sa.insert(trials).values(
                        sweep_id=lease.sweep_id, number=number, state="running", attempts=1, run_id=run_id,
                        parameters=plain(parameters),
                    )
                )  # fmt: skip

    def end_trial(
        self,
        lease: SweepLease,
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
            self._renewed(connection, lease)
            it = (trials.c.sweep_id == lease.sweep_id, trials.c.number == number)
            connection.execute(sa.update(trials).where(*it).values(**values))

    def finish(self, lease: SweepLease, state: SweepState, *, error: str | None = None, **columns: Any) -> None:
        """End the sweep, or put it down, and give the lease back. Raises OwnershipLostError."""
        ended = {"owner_host": leases.host(), "finished_at": now(), "state": state, "error": error and storable(error)}
        with self.engine.begin() as connection:
            it = sweeps.c.id == lease.sweep_id
            if not leases.release(connection, sweeps, it, token=lease.token, **ended, **columns):
                raise _lost(lease)

    def _change(self, lease: SweepLease) -> None:
        with self.engine.begin() as connection:
            self._renewed(connection, lease)

    @staticmethod
    def _renewed(connection: sa.Connection, lease: SweepLease) -> None:
        it = sweeps.c.id == lease.sweep_id
        if not leases.renew(connection, sweeps, it, token=lease.token, seconds=LEASE_SECONDS):
            raise _lost(lease)

    # -- for everybody -----------------------------------------------------------------------------------------

    def get(self, sweep_id: str) -> SweepRecord:
        """The sweep by its id, or by the unambiguous beginning of it. Raises RunNotFoundError."""
        found: Sequence[sa.RowMapping] = []
        if sweep_id and sweep_id.isascii() and sweep_id.isprintable():
            with self._read() as connection:
                for asked in (sweeps.c.id == sweep_id, sweeps.c.id.startswith(sweep_id, autoescape=True)):
                    if found := connection.execute(_select().where(asked).limit(3)).mappings().all():
                        break
        if not found:
            raise RunNotFoundError(f"no sweep {sweep_id!r}", hint="'tally sweep list' shows the sweeps there are.")
        if len(found) > 1:
            some = ", ".join(row["id"] for row in found)
            raise RunNotFoundError(f"{sweep_id!r} is the beginning of several sweeps: {some}", hint="Type more of it.")
        return _record(found[0])

    def trials(self, sweep_id: str) -> list[TrialRecord]:
        """The trials that have begun, by number."""
        query = sa.select(*(trials.c[name] for name in TrialRecord.__slots__)).where(trials.c.sweep_id == sweep_id)
        with self._read() as connection:
            return [TrialRecord(**row) for row in connection.execute(query.order_by(trials.c.number)).mappings()]

    def list(self, limit: int = 50) -> SweepPage:
        """The newest sweeps."""
        query = _select().order_by(sweeps.c.created_at.desc(), sweeps.c.id.desc()).limit(limit + 1)
        with self._read() as connection:
            found = [_record(row) for row in connection.execute(query).mappings()]
        return SweepPage(found[:limit], len(found) > limit)

    def _read(self) -> sa.Connection:
        return self.engine.connect().execution_options(reading=True)


def _select() -> sa.Select[Any]:
    return sa.select(sweeps, now().label("clock"))


def _record(row: Mapping[Any, Any]) -> SweepRecord:
    record = SweepRecord(**{name: row[name] for name in SweepRecord.__slots__ if name in row})
    alive = leases.is_held(row)
    return replace(
        record, alive=alive, state="interrupted" if record.state == "running" and not alive else record.state
    )


def _lost(lease: SweepLease) -> OwnershipLostError:
    return OwnershipLostError(
        f"sweep {lease.sweep_id} was taken over by another process; this one stops",
        hint=f"'tally sweep show {lease.sweep_id}' tells more.",
    )
