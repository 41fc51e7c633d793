"""The model registry: names, immutable versions, aliases with history and rollback.

A version's content is a model package (a folder with ``tally.yaml``), copied to ``<root>/sha256/<hash>`` of a folder
or a bucket and never changed there; identical content is kept once. Every use checks it against its hash.
Names, numbers and aliases are rows of the database. Statements are portable between SQLite and PostgreSQL,
and any number of processes may use one registry.
"""

from __future__ import annotations

import builtins
import getpass
import platform
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tally.database.tables import model_alias_history, model_aliases, model_versions
from tally.errors import ModelError, ModelNotFoundError, SpecError, StorageError
from tally.models.blobs import open_blobs
from tally.models.hashing import content_files, content_hash
from tally.models.mirror import fetched
from tally.models.package import write_package
from tally.models.reference import ModelRef
from tally.text import did_you_mean, storable

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))?")
_RETRIES = 100

_ADDED_ON = "added on"
"""The machine where a version was added, kept among its metadata."""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of one model.

    location: path or URL of the package's folder. bytes: size of its files.
    added_on: the machine, None if that is not known. metadata: given when it was added.
    existed: :meth:`Registry.add` found this very content, and added nothing.
    assumed: lines for the user: what was guessed about the model when it was added.
    """

    name: str
    version: int
    hash: str
    kind: str
    bytes: int
    created_at: datetime
    location: str
    added_on: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    existed: bool = False
    assumed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.version}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "uri": str(self),
            "hash": self.hash,
            "kind": self.kind,
            "bytes": self.bytes,
            "created_at": self.created_at.isoformat(timespec="seconds"),
            "location": self.location,
            "added_on": self.added_on,
            "metadata": dict(self.metadata),
            "aliases": list(self.aliases),
        }


@dataclass(frozen=True, slots=True)
class AliasChange:
    """``alias`` was made to point at ``version`` (action: set or rollback), or pointed there when it was removed
    (remove). who: did it; empty where that is not known."""

    alias: str
    version: int
    action: str
    at: datetime
    who: str = ""


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """A model with its versions and the changes of its aliases, both oldest first."""

    name: str
    versions: tuple[ModelVersion, ...]
    history: tuple[AliasChange, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "versions": [each.to_dict() for each in self.versions],
            "history": [
                {
                    "alias": each.alias,
                    "version": each.version,
                    "action": each.action,
                    "at": each.at.isoformat(timespec="seconds"),
                    "who": each.who,
                }
                for each in self.history
            ],
        }


def open_registry() -> Registry:
    """The registry of this installation, as the environment's settings say."""
    from tally.config import settings
    from tally.database.connect import connect

    where = settings()
    return Registry(connect(where.database), where.registry)


class Registry:
    """engine: a database that has the tables of ``tally.database.tables``. root: of the content, a folder or a bucket's
    URL."""

    def __init__(self, engine: sa.Engine, root: str | Path) -> None:
        self.engine = engine
        self.root = root
        self._blobs = open_blobs(root)

    def add(
        self,
        name: str,
        model: ModelRef,
        *,
        alias: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        who: str | None = None,
    ) -> ModelVersion:
        """Copy a model into the registry as the next version of ``name``.

        model: from :func:`tally.models.resolve.resolve`.
        metadata: anything JSON can hold; ``metrics`` in it is shown by ``tally models show``.
        who: for the alias's history; None for who runs this process.
        Content that ``name`` already has is not added again: that version is returned, with ``existed``.
        """
        _check_name("name", name)
        if alias is not None:
            check_alias(alias)
        ref = fetched(model)
        digest, size = self._store(ref)
        facts = {**(metadata or {}), _ADDED_ON: platform.node()}
        version, existed = self._insert(name, digest, ref.kind, size, facts)
        if not self._blobs.has(digest):  # the last other use of it was removed meanwhile
            self._store(ref)
        if alias is not None:
            self.alias(name, alias, version, who=who)
        added = self._version(name, version)
        return replace(added, existed=existed, assumed=ref.assumed)

    def list(self) -> builtins.list[ModelVersion]:
        """Every version of every model, by name and number."""
        return self._versions()

    def show(self, name: str) -> RegisteredModel:
        """A model's versions and alias history. Raises ModelNotFoundError."""
        versions = self._versions(name)
        if not versions:
            raise self._unknown(name)
        with self._reading() as connection:
            rows = connection.execute(
                sa.select(model_alias_history)
                .where(model_alias_history.c.name == name)
                .order_by(model_alias_history.c.id)
            ).all()
        history = tuple(AliasChange(row.alias, row.version, row.action, _time(row.at), row.who or "") for row in rows)
        return RegisteredModel(name, tuple(versions), history)

    def get(self, uri: str) -> ModelVersion:
        """The version that ``models:/name`` (the newest), ``models:/name/3`` or ``models:/name@alias`` means.

        Raises SpecError, ModelNotFoundError.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise SpecError(
                f"{uri!r} is not the name of a registered model",
                hint="Write models:/name, models:/name/3 or models:/name@alias.",
            )
        name, number, alias = match["name"], match["version"], match["alias"]
        versions = self._versions(name)
        if not versions:
            raise self._unknown(name)
        if alias is not None:
            for each in versions:
                if alias in each.aliases:
                    return each
            known = sorted(alias for each in versions for alias in each.aliases)
            raise ModelNotFoundError(
                f"model {name!r} has no alias {alias!r}" + did_you_mean(alias, known),
                hint=f"It has {', '.join(known)}." if known else f"Make one: tally models alias {name} {alias} VERSION",
            )
        if number is None:
            return versions[-1]
        for each in versions:
            if str(each.version) == number:
                return each
        known = [str(each.version) for each in versions]
        raise ModelNotFoundError(
            f"model {name!r} has no version {number}",
            hint=f"It has {', '.join(known)}." + ("" if number.isdigit() else f" An alias is written {name}@{number}."),
        )

    def alias(self, name: str, alias: str, version: int, *, who: str | None = None) -> ModelVersion:
        """Make ``alias`` point at a version from now on."""
        check_alias(alias)
        found = self._version(name, version)
        for _ in range(_RETRIES):
            try:
                with self.engine.begin() as connection:
                    self._hold(connection, name, version)
                    self._point(connection, name, alias, version)
                    self._remember(connection, name, alias, version, "set", who)
                break
            except sa.exc.IntegrityError:  # the same alias was made by somebody else just now
                continue
        return replace(found, aliases=tuple(sorted({*found.aliases, alias})))

    def rollback(self, name: str, alias: str, *, who: str | None = None) -> ModelVersion:
        """Make ``alias`` point where it pointed before it was last set; again, to the one before that.

        Raises ModelError if there is nothing to go back to.
        """
        self.get(f"models:/{name}@{alias}")  # says what is wrong with the names
        with self.engine.begin() as connection:
            # Also a lock: two rollbacks at once go back two steps, one after the other.
            connection.execute(
                sa.update(model_aliases)
                .where(model_aliases.c.name == name, model_aliases.c.alias == alias)
                .values(version=model_aliases.c.version)
            )
            changes = connection.execute(
                sa.select(model_alias_history.c.version, model_alias_history.c.action)
                .where(model_alias_history.c.name == name, model_alias_history.c.alias == alias)
                .order_by(model_alias_history.c.id)
            ).all()
            there = set(
                connection.scalars(
                    sa.select(model_versions.c.version).where(
                        model_versions.c.name == name, model_versions.c.removed_at.is_(None)
                    )
                )
            )
            earlier = _earlier([(row.version, row.action) for row in changes], there)
            if earlier is None:
                raise ModelError(
                    f"{name}@{alias} has no earlier version to go back to",
                    hint=f"'tally models show {name}' lists what it pointed at.",
                )
            self._hold(connection, name, earlier)
            self._point(connection, name, alias, earlier)
            self._remember(connection, name, alias, earlier, "rollback", who)
        return self._version(name, earlier)

    def unalias(self, name: str, alias: str, *, who: str | None = None) -> ModelVersion:
        """Remove ``alias``; returns the version that it pointed at. Made again, it has nothing to go back to.

        Raises ModelNotFoundError.
        """
        version = self.get(f"models:/{name}@{alias}").version
        it = (model_aliases.c.name == name, model_aliases.c.alias == alias)
        with self.engine.begin() as connection:
            connection.execute(sa.update(model_aliases).where(*it).values(version=model_aliases.c.version))  # a lock
            pointed = connection.scalar(sa.select(model_aliases.c.version).where(*it))
            if pointed is not None:  # else it was removed just now
                version = pointed
                connection.execute(sa.delete(model_aliases).where(*it))
                self._remember(connection, name, alias, version, "remove", who)
        return self._version(name, version)

    def tag(self, name: str, version: int, tags: Mapping[str, str | None]) -> ModelVersion:
        """Set tags of a version, shown as ``tags`` of its metadata; None takes one away. Content stays as it is."""
        self._version(name, version)
        it = (model_versions.c.name == name, model_versions.c.version == version)
        with self.engine.begin() as connection:
            self._hold(connection, name, version)
            facts = dict(connection.scalar(sa.select(model_versions.c.facts).where(*it)) or {})
            merged = {**facts.get("tags", {}), **tags}
            kept = {key: value for key, value in merged.items() if value is not None}
            facts = {key: value for key, value in facts.items() if key != "tags"} | ({"tags": kept} if kept else {})
            connection.execute(sa.update(model_versions).where(*it).values(facts=facts))
        return self._version(name, version)

    def verify(self, name: str, version: int) -> ModelVersion:
        """Compare the content that is kept of a version with its hash.

        Raises ModelChangedError, ModelNotFoundError where there is none, StorageError.
        """
        found = self._version(name, version)
        with self._explained(found):
            self._blobs.check(found.hash, str(found))
        return found

    def fetch(self, version: ModelVersion) -> Path:
        """A folder of this machine with a version's package, checked. Raises as :meth:`verify` does."""
        with self._explained(version):
            return self._blobs.fetch(version.hash, str(version))

    def mirror(self, version: ModelVersion) -> str | None:
        """The URL from where every machine fetches a version's content; None if the registry is a folder."""
        return self._blobs.mirror(version.hash)

    @contextmanager
    def _explained(self, version: ModelVersion) -> Iterator[None]:
        """Content that is not there may be on the machine where it was added."""
        try:
            yield
        except ModelNotFoundError as error:
            here = platform.node()
            name = version.name
            if version.added_on in (None, here) or self._blobs.mirror(version.hash) is not None:
                error.hint = (
                    "Is TALLY_REGISTRY what it was when the model was added? If so, add the model again: "
                    f"tally models add {name} MODEL"
                )
            else:
                error.message += f"; it was added on {version.added_on}"
                error.hint = (
                    "Set TALLY_REGISTRY, on all machines, to a folder or a bucket that all of them see, and add the "
                    f"model again: tally models add {name} MODEL"
                )
            raise

    def remove(self, name: str, version: int) -> None:
        """Remove a version; its number is not used again.

        Raises ModelError while an alias points at it.
        """
        found = self._version(name, version)
        with self.engine.begin() as connection:
            self._hold(connection, name, version)
            aliases = connection.scalars(
                sa.select(model_aliases.c.alias)
                .where(model_aliases.c.name == name, model_aliases.c.version == version)
                .order_by(model_aliases.c.alias)
            ).all()
            if aliases:
                raise ModelError(
                    f"{found} cannot be removed: {', '.join(f'{name}@{each}' for each in aliases)} points at it",
                    hint=f"Point it elsewhere first: tally models alias {name} {aliases[0]} VERSION",
                )
            connection.execute(
                sa.update(model_versions)
                .where(model_versions.c.name == name, model_versions.c.version == version)
                .values(removed_at=time.time())
            )
            kept = connection.scalar(
                sa.select(sa.func.count())
                .select_from(model_versions)
                .where(model_versions.c.hash == found.hash, model_versions.c.removed_at.is_(None))
            )
        if not kept:
            self._blobs.remove(found.hash)

    # rows

    def _reading(self) -> sa.Connection:
        return self.engine.connect().execution_options(reading=True)

    def _versions(self, name: str | None = None) -> builtins.list[ModelVersion]:
        versions = sa.select(model_versions).where(model_versions.c.removed_at.is_(None))
        aliases = sa.select(model_aliases).order_by(model_aliases.c.alias)
        if name is not None:
            versions = versions.where(model_versions.c.name == name)
            aliases = aliases.where(model_aliases.c.name == name)
        with self._reading() as connection:
            rows = connection.execute(versions.order_by(model_versions.c.name, model_versions.c.version)).all()
            pointing: dict[tuple[str, int], builtins.list[str]] = {}
            for each in connection.execute(aliases):
                pointing.setdefault((each.name, each.version), []).append(each.alias)
        return [
            ModelVersion(
                name=row.name,
                version=row.version,
                hash=row.hash,
                kind=row.kind,
                bytes=row.bytes,
                created_at=_time(row.created_at),
                location=self._blobs.address(row.hash),
                added_on=row.facts.get(_ADDED_ON),
                metadata={key: value for key, value in row.facts.items() if key != _ADDED_ON},
                aliases=tuple(pointing.get((row.name, row.version), ())),
            )
            for row in rows
        ]

    def _version(self, name: str, version: int) -> ModelVersion:
        return self.get(f"models:/{name}/{version}")

    def _unknown(self, name: str) -> ModelNotFoundError:
        names = sorted({each.name for each in self._versions()})
        return ModelNotFoundError(
            f"there is no model {name!r} in the registry" + did_you_mean(name, names),
            hint="'tally models list' shows them all."
            if names
            else "It is empty: 'tally models add NAME PATH' adds one.",
        )

    def _insert(self, name: str, digest: str, kind: str, size: int, facts: dict[str, Any]) -> tuple[int, bool]:
        """The version's number, and whether it was there before."""
        for _ in range(_RETRIES):
            # One statement, so one state of the table: either the same content is seen, or the number that
            # somebody else is about to take collides with ours.
            with self._reading() as connection:
                rows = connection.execute(
                    sa.select(model_versions.c.version, model_versions.c.hash, model_versions.c.removed_at).where(
                        model_versions.c.name == name
                    )
                ).all()
            for row in rows:
                if row.hash == digest and row.removed_at is None:
                    return row.version, True
            version = max((row.version for row in rows), default=0) + 1
            try:
                with self.engine.begin() as connection:
                    connection.execute(
                        sa.insert(model_versions).values(
                            name=name,
                            version=version,
                            hash=digest,
                            kind=kind,
                            bytes=size,
                            facts=facts,
                            created_at=time.time(),
                        )
                    )
            except sa.exc.IntegrityError:
                continue
            return version, False
        raise ModelError(f"no version number of {name!r} was free in {_RETRIES} tries", hint="Try again.")

    @staticmethod
    def _hold(connection: sa.Connection, name: str, version: int) -> None:
        """Lock a version's row until the transaction ends: no alias is set while it is being removed."""
        held = connection.execute(
            sa.update(model_versions)
            .where(
                model_versions.c.name == name,
                model_versions.c.version == version,
                model_versions.c.removed_at.is_(None),
            )
            .values(removed_at=None)
        )
        if held.rowcount != 1:
            raise ModelNotFoundError(f"models:/{name}/{version} was removed just now")

    @staticmethod
    def _point(connection: sa.Connection, name: str, alias: str, version: int) -> None:
        changed = connection.execute(
            sa.update(model_aliases)
            .where(model_aliases.c.name == name, model_aliases.c.alias == alias)
            .values(version=version)
        )
        if changed.rowcount == 0:
            connection.execute(sa.insert(model_aliases).values(name=name, alias=alias, version=version))

    @staticmethod
    def _remember(connection: sa.Connection, name: str, alias: str, version: int, action: str, who: str | None) -> None:
        connection.execute(
            sa.insert(model_alias_history).values(
                name=name,
                alias=alias,
                version=version,
                action=action,
                at=time.time(),
                who=storable((_user() if who is None else who)[:200]),
            )
        )

    # content

    def _store(self, ref: ModelRef) -> tuple[str, int]:
        """Copy the model's package to where its hash says; the hash and its size in bytes."""
        try:
            with self._blobs.building() as folder:
                package = folder / "package"
                write_package(ref, package)
                digest = content_hash(package)
                size = sum(path.stat().st_size for _, path in content_files(package, (".",)))
                self._blobs.put(package, digest)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"cannot copy {ref.name} to {self.root}: {error.strerror or error}",
                hint="Set TALLY_REGISTRY, or TALLY_HOME, to a folder with enough room that can be written to.",
            ) from error
        return digest, size


def _earlier(changes: Sequence[tuple[int, str]], there: Collection[int]) -> int | None:
    """Where an alias goes back to: sets stack up, a rollback takes off what came after its version, a removal all."""
    stack: list[int] = []
    for version, action in changes:
        if action == "remove":
            stack.clear()
            continue
        if action == "rollback":
            while stack and stack[-1] != version:
                stack.pop()
        if not stack or stack[-1] != version:
            stack.append(version)
    return next((each for each in reversed(stack) if each in there and each != stack[-1]), None)


def _user() -> str:
    """Who runs this process; empty where the system has no name for that."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def registry_name(text: str) -> str:
    """``text`` as a name that the registry allows. Raises SpecError if no character is left."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:128]
    if not name:
        raise SpecError(f"{text!r} cannot be a model's name", hint="Give one with --name: small letters, digits, '-'.")
    return name


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"the {what} {name!r} is not allowed",
            hint="Up to 128 small letters, digits, '.', '_' and '-', the first of them a letter or digit.",
        )


def check_alias(alias: str) -> None:
    _check_name("alias", alias)
    if alias.isdigit():
        raise SpecError(f"the alias {alias!r} is a number, as versions are", hint="Choose a word: staging, production.")
