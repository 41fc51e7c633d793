"""Endpoints that are kept: what is to be served stands in the database, and a process serves it.

A command changes the spec, and the process follows it: it loads what is new, changes shares and replicas, and says what
it serves. So an endpoint outlives commands, servers and crashes: whoever supervises starts a process for each whose
lease is free. The history keeps what was served before, for a rollback.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import sqlalchemy as sa

from tally.config import settings
from tally.database import lease as leases
from tally.database.clock import now
from tally.database.tables import endpoints
from tally.errors import EndpointError, EndpointNotFoundError, OwnershipLostError, SpecError
from tally.jobs.printed import tail
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.serving.settings import Limits
from tally.text import did_you_mean, storable

LEASE_SECONDS = 20.0
PORT = 8890
MAX_BODY = 64 << 20
HISTORY = 20
"""How many earlier specs are kept."""
LONGEST_PAUSE = 300.0

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""Of an endpoint."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of the model. model: as the user wrote it, with ``options`` of resolving it; ref: what it was."""

    model: str
    ref: ModelRef
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """What is to be served.

    versions: number to version. split: number to its share of the requests. shadows: number to the share (0 to 1) of
    requests of which it gets a copy. limits: of each version; ``limits.replicas`` of each that the split names.
    host, port: where; port 0 for any that is free. grpc_port: the same for gRPC; None for no gRPC. max_body: bytes.
    drain: seconds that requests have to end once the endpoint is to.
    """

    versions: Mapping[str, Version]
    split: Mapping[str, float]
    limits: Limits = field(default_factory=Limits)
    shadows: Mapping[str, float] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = PORT
    max_body: int = MAX_BODY
    grpc_port: int | None = None
    drain: float = 30.0

    def __post_init__(self) -> None:
        wrong = self.limits.problems()
        if self.grpc_port and self.grpc_port == self.port:
            wrong.append(f"grpc_port: {self.grpc_port} is the port of HTTP already")
        wrong += [f"split: there is no version {each!r}" for each in self.split if each not in self.versions]
        wrong += [f"shadow: there is no version {each!r}" for each in self.shadows if each not in self.versions]
        wrong += [f"split: the share of {n} should be 0 or more, not {s}" for n, s in self.split.items() if s < 0]
        wrong += [
            f"shadow: the share of {n} should be 0 to 1, not {s}" for n, s in self.shadows.items() if not 0 <= s <= 1
        ]
        if not any(share > 0 for share in self.split.values()):
            wrong.append("split: one version at least needs a share")
        if wrong:
            raise SpecError(wrong)

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "limits": asdict(self.limits),
            "versions": {
                number: {"model": each.model, "options": dict(each.options), "ref": each.ref.to_dict()}
                for number, each in self.versions.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EndpointSpec:
        limits = dict(values["limits"])
        limits["replicas"] = tuple(limits["replicas"])
        if limits.get("background") is not None:
            limits["background"] = tuple(limits["background"])
        versions = {
            number: Version(each["model"], ModelRef.from_dict(each["ref"]), each["options"])
            for number, each in values["versions"].items()
        }
        return cls(**{**values, "limits": Limits(**limits), "versions": versions})

    @property
    def listening(self) -> tuple[Any, ...]:
        """What cannot be changed while it listens."""
        return self.host, self.port, self.grpc_port, self.max_body

    def with_model(self, version: Version, *, share: float | None = None) -> EndpointSpec:
        """The same with another version of the model: alone, or with this share (0 to 1) of the requests beside those
        there are. Raises SpecError where its number is that of another model's, beside which it is to be served."""
        number = number_of(version.ref, self.versions)
        if share is None:
            return replace(self, versions={number: version}, split={number: 100.0}, shadows={})
        self._check_number(number, version)
        total = sum(value for name, value in self.split.items() if name != number)
        rest = (
            {name: value / total * 100 * (1 - share) for name, value in self.split.items() if name != number}
            if total
            else {}
        )
        split = {**rest, number: 100 * share if rest else 100.0}
        others = {name: each for name, each in self.versions.items() if name != number}
        return replace(self, versions={**others, number: version}, split=split)  # last: its alias means it from now on

    def with_instead(self, old: str, version: Version) -> EndpointSpec:
        """The same with a version in the place of the one of that number: with its share and its copies, beside all
        others. If it is one of those already, a canary that the alias has come to name, that gets the shares of both,
        and no copies any more. Raises SpecError where its number is that of another model's."""
        before = self.versions[old].ref
        if (before.hash, before.version) == (version.ref.hash, version.ref.version):
            return replace(self, versions={**self.versions, old: version})
        number = number_of(version.ref, self.versions)
        self._check_number(number, version)
        merged = number in self.versions

        def renamed(shares: Mapping[str, float]) -> dict[str, float]:
            found: dict[str, float] = {}
            for name, share in shares.items():
                name = number if name == old else name
                found[name] = found.get(name, 0.0) + share
            return found

        versions = {number if name == old else name: each for name, each in self.versions.items()}
        shadows = {name: share for name, share in renamed(self.shadows).items() if not (merged and name == number)}
        return replace(self, versions={**versions, number: version}, split=renamed(self.split), shadows=shadows)

    def _check_number(self, number: str, version: Version) -> None:
        there = self.versions.get(number)
        if there is not None and there.ref.hash != version.ref.hash:
            raise SpecError(
                f"version {number} of this endpoint is {there.model} already, and {version.model} would be its version "
                f"{number}, too",
                hint="Serve it alone, without a share, or put one of the two into an endpoint of its own.",
            )


def number_of(ref: ModelRef, versions: Mapping[str, Version] = {}) -> str:
    """The number of a version: that of the registry, or the next that is free; the same content keeps its own."""
    if ref.version is not None:
        return str(ref.version)
    for number, each in versions.items():
        if each.ref.hash == ref.hash:
            return number
    return str(max((int(each) for each in versions if each.isdigit()), default=0) + 1)


@dataclass(frozen=True, slots=True)
class Deployment:
    """An endpoint, as its row has it. Times are seconds since the epoch.

    history: what was served before, oldest first: ``spec``, ``revision``, ``changed_at``, ``changed_by``.
    observed: what the process that serves it says: ``revision``, ``url``, ``grpc`` (``HOST:PORT``), ``state``
    (starting, ready or failed), ``error``, ``pools``. alive: whether there is such a process; host: where it runs, or
    ran last.
    """

    name: str
    spec: EndpointSpec
    history: Sequence[Mapping[str, Any]]
    revision: int
    created_at: float
    changed_at: float
    changed_by: str
    observed: Mapping[str, Any]
    alive: bool
    failures: int
    host: str | None = None

    @property
    def here(self) -> bool:
        """Whether it is served on this machine."""
        return self.alive and self.host == leases.host()

    @property
    def settled(self) -> bool:
        """Whether the last change is served, or has failed."""
        return self.observed.get("revision") == self.revision and self.observed.get("state") in ("ready", "failed")

    @property
    def state(self) -> str:
        """ready, starting, changing, failed or down."""
        state = str(self.observed.get("state", "starting"))
        if not self.alive:
            return "failed" if state == "failed" else "down" if self.observed else "starting"
        return "changing" if state == "ready" and self.observed.get("revision") != self.revision else state

    @property
    def url(self) -> str | None:
        """Where it is served."""
        return self.observed.get("url") if self.alive else None

    @property
    def grpc(self) -> str | None:
        """Where it is served over gRPC: ``HOST:PORT``."""
        return self.observed.get("grpc") if self.alive else None


LookUp: TypeAlias = Callable[[str, Mapping[str, Any]], ModelRef]


def _look_up(model: str, options: Mapping[str, Any]) -> ModelRef:
    return resolve(model, **options)


class DeploymentStore:
    """The endpoints in one database. Safe to use from several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    # -- for people -----------------------------------------------------------------------------------------

    def get(self, name: str) -> Deployment:
        """Raises EndpointNotFoundError."""
        with self._engine.connect() as connection:
            row = connection.execute(_select().where(endpoints.c.name == name)).mappings().first()
            if row is None:
                names = list(connection.scalars(sa.select(endpoints.c.name).order_by(endpoints.c.name)))
                raise EndpointNotFoundError(
                    f"there is no endpoint {name!r}{did_you_mean(name, names)}",
                    hint="'tally endpoints list' shows them.",
                )
        return _deployment(row)

    def list(self) -> list[Deployment]:
        """All, by name."""
        with self._engine.connect() as connection:
            return [_deployment(row) for row in connection.execute(_select().order_by(endpoints.c.name)).mappings()]

    def check_new(self, name: str) -> None:
        """Raises SpecError where an endpoint cannot have that name, EndpointError where one has it."""
        if not NAME.fullmatch(name):
            raise SpecError(f"an endpoint's name has lower-case letters, digits and '-', at most 63, not {name!r}")
        with self._engine.connect() as connection:
            if connection.scalar(sa.select(endpoints.c.name).where(endpoints.c.name == name)) is not None:
                raise _taken(name)

    def create(self, name: str, spec: EndpointSpec, *, who: str = "") -> Deployment:
        """Have this served from now on. Raises SpecError, EndpointError where the name is taken."""
        self.check_new(name)
        try:
            with self._engine.begin() as connection:
                connection.execute(
                    sa.insert(endpoints).values(
                        name=name, spec=spec.to_dict(), history=[], revision=1, created_at=now(), changed_at=now(),
                        changed_by=storable(who), observed={}, failures=0, start_at=0.0,
                    )
                )  # fmt: skip
        except sa.exc.IntegrityError:
            raise _taken(name) from None
        return self.get(name)

    def change(self, name: str, changed: Callable[[EndpointSpec], EndpointSpec], *, who: str = "") -> Deployment:
        """Serve something else from now on; what is the same is no change, unless it could not be served.
        Raises EndpointNotFoundError, and what ``changed`` raises."""
        while True:
            before = self.get(name)
            spec = changed(before.spec)
            if spec == before.spec and [*spec.versions] == [*before.spec.versions] and before.state != "failed":
                return before
            earlier = {
                "spec": before.spec.to_dict(), "revision": before.revision, "changed_at": before.changed_at,
                "changed_by": before.changed_by,
            }  # fmt: skip
            if self._write(before, spec, [*before.history, earlier][-HISTORY:], who):
                return self.get(name)

    def scale(self, name: str, replicas: tuple[int, int], *, who: str = "") -> Deployment:
        """Keep so many replicas, (least, most), of each version that gets requests. Raises as :meth:`change`,
        SpecError."""
        return self.change(name, lambda spec: replace(spec, limits=replace(spec.limits, replicas=replicas)), who=who)

    def share_out(
        self, name: str, split: Mapping[str, float], shadows: Mapping[str, float], *, who: str = ""
    ) -> Deployment:
        """Share out requests anew; as in :class:`EndpointSpec`. Raises as :meth:`change`, SpecError."""
        return self.change(name, lambda spec: replace(spec, split=split, shadows=shadows), who=who)

    def reload(self, name: str, *, look_up: LookUp = _look_up, who: str = "") -> Deployment:
        """Look up the model of the version with the most requests again, an alias say, and serve what it is now: with
        its share, beside the other versions.

        look_up: of a model as it was asked for, and the options for that. Raises as :meth:`change`, and what
        ``look_up`` raises.
        """

        def again(spec: EndpointSpec) -> EndpointSpec:
            most = max(spec.split, key=lambda each: spec.split[each])
            old = spec.versions[most]
            return spec.with_instead(most, replace(old, ref=look_up(old.model, old.options)))

        return self.change(name, again, who=who)

    def roll_back(self, name: str, *, who: str = "") -> Deployment:
        """Serve what was served before the last change. Raises EndpointError where there was nothing."""
        while True:
            before = self.get(name)
            if not before.history:
                raise EndpointError(f"endpoint {name} has served nothing before this")
            if self._write(before, EndpointSpec.from_dict(before.history[-1]["spec"]), before.history[:-1], who):
                return self.get(name)

    def _write(self, before: Deployment, spec: EndpointSpec, history: Sequence[Any], who: str) -> bool:
        """Whether nobody else has changed it meanwhile."""
        unchanged = (endpoints.c.name == before.name, endpoints.c.revision == before.revision)
        values = {
            "spec": spec.to_dict(), "history": list(history), "revision": before.revision + 1, "changed_at": now(),
            "changed_by": storable(who), "failures": 0, "start_at": 0.0,
        }  # fmt: skip
        with self._engine.begin() as connection:
            return connection.execute(sa.update(endpoints).where(*unchanged).values(**values)).rowcount > 0

    def printed(self, name: str, *, lines: int) -> Sequence[str]:
        """The last lines that the endpoint's process and its replicas have printed on this machine, with secrets
        masked; none where another machine serves it. Raises EndpointNotFoundError."""
        self.get(name)
        return tail(settings().endpoint_log_of(name), lines)

    def delete(self, name: str) -> None:
        """Serve it no more: its process answers what it has, and ends. Raises EndpointNotFoundError."""
        self.get(name)
        with self._engine.begin() as connection:
            connection.execute(sa.delete(endpoints).where(endpoints.c.name == name))

    # -- for who serves and supervises ------------------------------------------------------------------------

    def to_start(self) -> Sequence[str]:
        """Those that nobody serves, and whose time to be tried again has come."""
        with self._engine.connect() as connection:
            due = (leases.is_lost(connection, endpoints), endpoints.c.start_at <= now())
            return list(connection.scalars(sa.select(endpoints.c.name).where(*due).order_by(endpoints.c.name)))

    def claim(self, name: str) -> str | None:
        """A token to serve it with; None if another process does. Raises EndpointNotFoundError."""
        self.get(name)
        token = leases.new_token()
        mine = endpoints.c.name == name
        with self._engine.begin() as connection:
            owner = connection.scalar(
                sa.select(endpoints.c.owner).where(mine, leases.is_lost(connection, endpoints, mine))
            )
            taken = leases.acquire(
                connection, endpoints, mine, token=token, seconds=LEASE_SECONDS, instead_of=owner, observed={}
            )
        return token if taken else None

    def observe(self, name: str, token: str, observed: Mapping[str, Any]) -> Deployment | None:
        """Say what is served, and renew the lease. Returns the endpoint; None once it has been deleted.

        Raises OwnershipLostError if another process serves it by now.
        """
        mine = endpoints.c.name == name
        working = {"failures": 0} if observed.get("state") == "ready" else {}
        with self._engine.begin() as connection:
            kept = leases.renew(
                connection, endpoints, mine, token=token, seconds=LEASE_SECONDS, observed=dict(observed), **working
            )
            row = connection.execute(_select().where(mine)).mappings().first()
        if row is None:
            return None
        if not kept:
            raise OwnershipLostError(f"endpoint {name} is served by another process by now")
        return _deployment(row)

    def give_back(self, name: str, token: str, *, error: str | None = None) -> None:
        """Serve it no more here. error: why it cannot be served; it is tried again after a pause that grows."""
        mine = endpoints.c.name == name
        with self._engine.begin() as connection:
            failures = connection.scalar(sa.select(endpoints.c.failures).where(mine)) or 0
            revision = connection.scalar(sa.select(endpoints.c.revision).where(mine))
            values: dict[str, Any] = {}
            if error is not None:
                pause = min(2.0**failures, LONGEST_PAUSE)
                observed = {"state": "failed", "error": error, "revision": revision, "at": time.time()}
                values = {"failures": failures + 1, "start_at": now() + pause, "observed": observed}
            leases.release(connection, endpoints, mine, token=token, **values)


def _taken(name: str) -> EndpointError:
    return EndpointError(f"there is an endpoint {name!r} already")


def _select() -> sa.Select[Any]:
    return sa.select(endpoints, now().label("clock"))


def _deployment(row: sa.RowMapping) -> Deployment:
    return Deployment(
        row["name"],
        EndpointSpec.from_dict(row["spec"]),
        row["history"],
        row["revision"],
        row["created_at"],
        row["changed_at"],
        row["changed_by"],
        row["observed"],
        leases.is_held(row),
        row["failures"],
        row["owner_host"],
    )
