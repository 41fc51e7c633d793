"""Watches: each object that is uploaded to a folder or a bucket, once, starts a job from a template.

A look lists the place. What is new is noted first, and taken once it has not changed between two looks, so a file that
is still being written waits. An object is known by its name and its mark (a bucket's ETag; a file's size, time and
number): the same name with new content starts a job again, over the results of the one before. What jobs write is
never taken. Noting that an object is taken and adding its job to the line is one transaction, so that neither a kill
nor a second server makes two jobs of one object, or none.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

import sqlalchemy as sa

from tally.alerts.evaluation import unpaired
from tally.database.clock import now
from tally.database.tables import jobs, watch_objects, watches
from tally.errors import (
    DatabaseAwayError,
    JobNotFoundError,
    SourceNotFoundError,
    SpecError,
    TallyError,
    TriggerNotFoundError,
    error_line,
)
from tally.jobs.facade import Jobs
from tally.jobs.spec import JobSpec, make, settled
from tally.jobs.spec import read as read_spec
from tally.jobs.states import ENDED
from tally.jobs.store import JobStore, place_of
from tally.models.resolve import check_there
from tally.sinks.layout import is_working
from tally.sources.locations import compile_glob
from tally.storage import Entry, Store, is_url, open_store
from tally.text import did_you_mean, storable
from tally.triggers.notices import Notices

log = logging.getLogger("tally")

LOOK_SECONDS = 5.0
"""Seconds between two looks at a place."""
QUIET_SECONDS = 60.0
"""Between two looks at a folder of which there was no notice: it may lie on a server that gives none."""
PARALLEL = 4
"""Jobs of one watch that are not ended, at most, unless it says otherwise."""
SEEN = 10
"""Objects that are shown of a watch, unless more are asked for."""
NAME = r"^[^/\x00-\x1f\x7f]{1,128}$"
"""What a watch may be called: what an address has room for."""
NAMES = ("url", "name", "stem", "folder")

_URL = "{url}"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_AT_ONCE = 500
_WRITTEN = "written"
"""The state of what jobs have written: it is kept in mind, as asking again at each look would take long."""


@dataclass(frozen=True, slots=True)
class Watch:
    """One watch. url: the folder or bucket, absolute. pattern, exclude: globs; of names below it.
    template: the fields of the job file. error: of the last look, None if it went well."""

    name: str
    url: str
    pattern: str
    exclude: str | None
    template: dict[str, Any]
    file: str
    parallel: int
    paused: bool
    created_at: float
    looked_at: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Seen:
    """An object that a watch has seen. state: settling, taken or refused (no job can be made of it).

    seen_at: first with this content, in seconds since the epoch. job_id, job_state: of the job that it has started;
    job_state is None once that is deleted. error: of the job, or why there is none.
    """

    name: str
    state: str
    seen_at: float
    job_id: str | None
    job_state: str | None
    error: str | None


# -- the job of an object ----------------------------------------------------------------------------------------------


def read(path: str) -> dict[str, Any]:
    """The fields of a job file, with absolute paths. Raises SpecError or StorageError."""
    return job_fields(settled(read_spec(path)))


def job_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job, absolute, as those of a watch's template."""
    # What stands for a whole path was taken for a relative one.
    return {**fields, "source": [_URL if each.endswith(f"/{_URL}") else each for each in fields["source"]]}


def check(fields: Mapping[str, Any]) -> list[str]:
    """Every problem of the template."""
    used = {found[1] for value in _texts(fields) for found in _PLACEHOLDER.finditer(value)}
    problems = [
        f"there is no placeholder {name!r}{did_you_mean(name, NAMES)}; there are {', '.join(NAMES)}"
        for name in sorted(used - set(NAMES))
    ]
    if not problems and not any(found[1] in NAMES for found in _PLACEHOLDER.finditer(str(fields.get("out", "")))):
        problems.append(f"out: names no object ({fields.get('out')}): put {{name}} or {{stem}} into it")
    if not problems and list(fields.get("source", ())) != [_URL]:
        problems.append("source: should be '{url}', the object that has come")
    return problems + unpaired(fields)


def fill(fields: Mapping[str, Any], root: str, name: str) -> JobSpec:
    """The job for this object. ``{name}`` is its name below the watched place, ``{stem}`` the same without suffix,
    ``{folder}`` the part before its last slash, ``{url}`` its whole path or URL. Raises SpecError."""
    if ".." in name.split("/"):  # in a bucket, that is a name as any other; in a path, it leads out of a folder
        raise SpecError(f"{name!r} is no name below {root}")
    folder, _, last = name.rpartition("/")
    stem = name[: -len(last)] + (last.rpartition(".")[0] or last)
    values = {"url": f"{root.rstrip('/')}/{name}", "name": name, "stem": stem, "folder": folder}

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), value)
        if isinstance(value, Mapping):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [filled(inner) for inner in value]
        return value

    return make(**{key: filled(value) for key, value in fields.items()})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


# -- the store ---------------------------------------------------------------------------------------------------------


class WatchStore:
    """Watches and what they have seen, in one database. Safe to use from several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    def all(self) -> list[Watch]:
        """Every watch, by name."""
        with self.engine.connect() as connection:
            return [_watch(row) for row in connection.execute(sa.select(watches).order_by(watches.c.name)).mappings()]

    def get(self, name: str) -> Watch:
        """The watch. Raises TriggerNotFoundError."""
        found = {each.name: each for each in self.all()}
        if name not in found:
            raise TriggerNotFoundError(
                f"there is no watch {name!r}{did_you_mean(name, found)}", hint="See: tally watch list"
            )
        return found[name]

    def add(
        self, name: str, url: str, *, pattern: str, exclude: str | None, template: Mapping[str, Any], file: str,
        parallel: int = PARALLEL, existing: bool = False,
    ) -> tuple[Watch, int]:  # fmt: skip
        """A new watch, and how many objects are there already. existing: those start jobs, too.

        Raises SpecError if there is one of this name, or something is wrong with it, ModelNotFoundError, and what
        listing raises.
        """
        problems = check(template)
        if not re.fullmatch(NAME, name):
            problems.append(f"name: {name!r} should have 1 to 128 characters, and none of them a slash or a line's end")
        for glob in (pattern, exclude):
            if glob is not None:
                compile_glob(_anywhere(glob))
                if re.search(r"\{[^{}]*,[^{}]*\}", glob):
                    problems.append(
                        f"{glob!r}: braces stand for themselves; write a set ('*.[jp][pn]g') or two watches"
                    )
        if name in {each.name for each in self.all()}:
            problems.append(f"there is a watch {name!r} already; remove it first: tally watch delete {quote(name)}")
        if problems:
            raise SpecError(problems)
        check_there(str(template["model"]))
        look_into(url)
        watch = Watch(name, url, pattern, exclude, dict(template), file, parallel, False, 0.0, None, None)
        count = 0
        entries = _entries(watch)
        all_jobs = JobStore(self.engine)
        with self.engine.begin() as connection:
            connection.execute(
                sa.insert(watches).values(
                    name=name, url=url, pattern=pattern, exclude=exclude, template=dict(template), file=file,
                    parallel=parallel, paused=0, created_at=now(),
                )
            )  # fmt: skip
            while batch := list(islice(entries, _AT_ONCE)):
                written = _written(all_jobs, watch, batch)
                there = [each for each in batch if each.name not in written]
                count += len(there)
                if there and not existing:
                    rows = [_row(name, each, "passed") for each in there]
                    connection.execute(sa.insert(watch_objects).values(seen_at=now()), rows)
        return self.get(name), count

    def pause(self, name: str, paused: bool) -> Watch:
        """Take nothing more, or go on. What came meanwhile is taken then."""
        self.get(name)
        with self.engine.begin() as connection:
            connection.execute(sa.update(watches).where(watches.c.name == name).values(paused=int(paused)))
        return self.get(name)

    def delete(self, name: str) -> None:
        """Forget the watch; its jobs stay."""
        self.get(name)
        with self.engine.begin() as connection:
            connection.execute(sa.delete(watch_objects).where(watch_objects.c.watch == name))
            connection.execute(sa.delete(watches).where(watches.c.name == name))

    def counts(self, name: str) -> dict[str, int]:
        """How many objects are in each state: settling, taken, passed (there before), refused. What jobs write is not
        counted."""
        those = (watch_objects.c.watch == name, watch_objects.c.state != _WRITTEN)
        query = sa.select(watch_objects.c.state, sa.func.count()).where(*those)
        with self.engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(query.group_by(watch_objects.c.state))}

    def seen(self, name: str, *, limit: int = SEEN) -> list[Seen]:
        """The newest objects that are settling, taken or refused, newest first. Raises
        TriggerNotFoundError."""
        watch, store = self.get(name), JobStore(self.engine)
        those = (watch_objects.c.watch == name, watch_objects.c.state.in_(("settling", "taken", "refused")))
        newest = sa.select(watch_objects).where(*those).order_by(watch_objects.c.seen_at.desc(), watch_objects.c.name)
        with self.engine.connect() as connection:
            rows = connection.execute(newest.limit(limit)).mappings().all()
        found = []
        for row in rows:
            job_state, error = None, None
            if row["job_id"] is not None:
                with suppress(JobNotFoundError):
                    record = store.get(row["job_id"])
                    job_state, error = record.state, record.error
            elif row["state"] in ("refused", "settling"):
                error = self._why_not(watch, row["name"], store)
            found.append(Seen(row["name"], row["state"], row["seen_at"], row["job_id"], job_state, error))
        return found

    def looked(self, name: str, error: str | None) -> None:
        """Note how the look at the place went."""
        with self.engine.begin() as connection:
            found = sa.update(watches).where(watches.c.name == name)
            connection.execute(found.values(looked_at=now(), error=None if error is None else storable(error)))

    def known(self, name: str, entries: Sequence[Entry]) -> dict[str, str]:
        """The state of those of the entries that were seen before with the same content, by id."""
        ids = [_id(each) for each in entries]
        query = sa.select(watch_objects.c.object, watch_objects.c.state).where(watch_objects.c.watch == name)
        with self.engine.connect() as connection:
            rows = connection.execute(query.where(watch_objects.c.object.in_(ids))).all()
        return {row[0]: row[1] for row in rows}

    def settling(self, name: str) -> set[str]:
        """The ids of what is not yet still."""
        those = (watch_objects.c.watch == name, watch_objects.c.state == "settling")
        with self.engine.connect() as connection:
            return set(connection.scalars(sa.select(watch_objects.c.object).where(*those)))

    def forget(self, name: str, ids: Iterable[str]) -> None:
        """What was settling is not there any more: it has grown, or is gone."""
        wanted = list(ids)
        for begin in range(0, len(wanted), _AT_ONCE):
            those = watch_objects.c.object.in_(wanted[begin : begin + _AT_ONCE])
            mine = (watch_objects.c.watch == name, watch_objects.c.state == "settling", those)
            with self.engine.begin() as connection:
                connection.execute(sa.delete(watch_objects).where(*mine))

    def note_written(self, name: str, entries: Sequence[Entry]) -> None:
        """Keep in mind what a job has written: of each name, the newest content alone."""
        if entries:
            names = [storable(each.name) for each in entries]
            mine = (watch_objects.c.watch == name, watch_objects.c.state == _WRITTEN, watch_objects.c.name.in_(names))
            with self.engine.begin() as connection:
                connection.execute(sa.delete(watch_objects).where(*mine))
        self.note(name, entries, _WRITTEN)

    def note(self, name: str, entries: Sequence[Entry], state: str) -> None:
        """Keep in mind what was seen for the first time. Of two servers that see it, one notes it."""
        rows = {_id(each): _row(name, each, state) for each in entries}
        if not rows:
            return
        with self.engine.begin() as connection:
            if not _held(connection, name):
                return  # it was deleted meanwhile
            mine = (watch_objects.c.watch == name, watch_objects.c.object.in_(rows))
            known = set(connection.scalars(sa.select(watch_objects.c.object).where(*mine)))
            if new := [row for object_id, row in rows.items() if object_id not in known]:
                connection.execute(sa.insert(watch_objects).values(seen_at=now()), new)

    def take(self, watch: Watch, entry: Entry, store: JobStore, spec: JobSpec) -> str | None:
        """Add the object's job to the line, and note that it is taken; the job's id.

        None if another process did, where there is no room for it now, where a job that is not ended writes to the same
        place, and where the watch is paused or gone by now.
        """
        mine = (watch_objects.c.watch == watch.name, watch_objects.c.object == _id(entry))
        with self.engine.begin() as connection:
            if not _held(connection, watch.name, watches.c.paused == 0):
                return None
            if _open_jobs(connection, watch.name) >= watch.parallel:
                return None
            if store.writer_in(connection, spec.out) is not None:
                return None
            taken = sa.update(watch_objects).where(*mine, watch_objects.c.state == "settling").values(state="taken")
            if connection.execute(taken).rowcount == 0:
                return None
            job_id = store.enqueue_in(
                connection, spec.model_dump(mode="json"), who=f"watch {watch.name}", overwrite=True
            )
            connection.execute(sa.update(watch_objects).where(*mine).values(job_id=job_id))
        return job_id

    def rival(self, watch: Watch, name: str, out: str) -> str | None:
        """Another object of the watch, whose results are where this one's would be."""
        joined = sa.select(watch_objects.c.name).join(jobs, jobs.c.id == watch_objects.c.job_id)
        others = joined.where(watch_objects.c.watch == watch.name, watch_objects.c.name != storable(name))
        there = others.where(jobs.c.place == place_of(out), jobs.c.state == "finished")
        with self.engine.connect() as connection:
            found: str | None = connection.scalar(there.order_by(watch_objects.c.seen_at.desc()).limit(1))
        return found

    def _why_not(self, watch: Watch, name: str, store: JobStore) -> str | None:
        """Why no job is made of an object, or none yet; None if it is only not yet still."""
        try:
            spec = fill(watch.template, watch.url, name)
        except SpecError as problem:
            return str(problem)
        if (rival := self.rival(watch, name, spec.out)) is not None:
            return f"its results would replace those of {rival}: {spec.out}"
        with self.engine.connect() as connection:
            writer = store.writer_in(connection, spec.out)
        return None if writer is None else f"it waits for job {writer}, which writes to the same place"

    def refuse(self, watch: Watch, entry: Entry) -> None:
        """No job can be made of the object."""
        mine = (watch_objects.c.watch == watch.name, watch_objects.c.object == _id(entry))
        with self.engine.begin() as connection:
            connection.execute(sa.update(watch_objects).where(*mine).values(state="refused"))

    def open_jobs(self, name: str) -> int:
        """How many of its jobs are not ended."""
        with self.engine.connect() as connection:
            return _open_jobs(connection, name)


def _held(connection: sa.Connection, name: str, *where: sa.ColumnElement[bool]) -> bool:
    """Whether there is such a watch. Until the transaction ends, no other one deletes it, or has got this far."""
    held = sa.update(watches).where(watches.c.name == name, *where).values(paused=watches.c.paused)
    return connection.execute(held).rowcount > 0


def _open_jobs(connection: sa.Connection, name: str) -> int:
    joined = sa.select(sa.func.count()).select_from(watch_objects.join(jobs, jobs.c.id == watch_objects.c.job_id))
    open_ = joined.where(watch_objects.c.watch == name, jobs.c.state.not_in((*ENDED, "failed")))
    return int(connection.scalar(open_) or 0)


def _watch(row: sa.RowMapping) -> Watch:
    values = {name: row[name] for name in Watch.__slots__}
    return Watch(**values | {"paused": bool(row["paused"])})


def _id(entry: Entry) -> str:
    """Name and content of the object, hashed."""
    text = f"{entry.name}\0{entry.mark or entry.size}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _row(watch: str, entry: Entry, state: str) -> dict[str, Any]:
    return {"watch": watch, "object": _id(entry), "name": storable(entry.name), "state": state}


# -- looking -----------------------------------------------------------------------------------------------------------


def _anywhere(glob: str) -> str:
    """A pattern without a slash is for the last part of a name, in whatever folder."""
    return glob if "/" in glob else f"**/{glob}"


def _entries(watch: Watch) -> Iterator[Entry]:
    """The objects that the watch is for, in order."""
    wanted = compile_glob(_anywhere(watch.pattern))
    unwanted = None if watch.exclude is None else compile_glob(_anywhere(watch.exclude))
    for entry in _opened(watch.url).list(marks=True):
        if is_working(entry.name):  # also of jobs of another database
            continue
        if wanted.fullmatch(entry.name) and not (unwanted and unwanted.fullmatch(entry.name)):
            yield entry


def _written(store: JobStore, watch: Watch, entries: Sequence[Entry]) -> set[str]:
    """The names of those that jobs have written."""
    names = {f"{watch.url.rstrip('/')}/{each.name}": each.name for each in entries}
    return {names[place] for place in store.written(names)}


class Watcher:
    """Looks at all watched places, and takes what is new, until it is stopped. Several may work beside each other."""

    def __init__(self, all_jobs: Jobs, *, taken: Callable[[], None] = lambda: None) -> None:
        """taken: called when a job was added to the line."""
        self._jobs, self._store, self._taken = all_jobs, WatchStore(all_jobs.store.engine), taken
        self._stopping = threading.Event()
        self._notices = Notices()
        self._looked: dict[str, float] = {}
        """When each place was looked at."""

    def stop(self) -> None:
        """Return soon from :meth:`run`."""
        self._stopping.set()

    def run(self) -> None:
        """Look again and again: at buckets every few seconds, at folders when something has changed in them."""
        try:
            while not self._stopping.is_set():
                try:
                    self.look(all_of_them=False)
                except DatabaseAwayError as error:
                    log.warning("%s", error.message)
                except Exception:  # this thread is the only one that looks
                    log.exception("looking at what is watched failed")
                self._stopping.wait(LOOK_SECONDS)  # what settles is left alone for so long
        finally:
            self._notices.close()

    def look(self, *, all_of_them: bool = True) -> None:
        """Look at each place once; or only at those where something may be new."""
        known = self._store.all()
        self._notices.keep(each.url for each in known if not each.paused)
        for watch in known:
            if watch.paused or self._stopping.is_set() or not (all_of_them or self._is_due(watch)):
                continue
            try:
                self._look_at(watch)
            except DatabaseAwayError:
                raise
            except Exception as error:  # the others are looked at all the same
                known_kind = isinstance(error, (TallyError, OSError))
                text = str(error) if known_kind else error_line(error)
                log.warning("watch %s: %s", watch.name, text, exc_info=None if known_kind else error)
                self._store.looked(watch.name, text)
            else:
                self._store.looked(watch.name, None)

    def _is_due(self, watch: Watch) -> bool:
        """What is settling is looked at again until it is taken, which may have to wait for other jobs."""
        return (
            is_url(watch.url)
            or self._notices.changed(watch.url)
            or watch.error is not None
            or time.monotonic() - self._looked.get(watch.name, -QUIET_SECONDS) >= QUIET_SECONDS
            or bool(self._store.settling(watch.name))
        )

    def _look_at(self, watch: Watch) -> None:
        self._looked[watch.name] = time.monotonic()
        room = watch.parallel - self._store.open_jobs(watch.name)
        entries = _entries(watch)
        unseen = self._store.settling(watch.name)
        while batch := list(islice(entries, _AT_ONCE)):
            known = self._store.known(watch.name, batch)
            unseen.difference_update(known)
            new = [each for each in batch if _id(each) not in known]
            written = _written(self._jobs.store, watch, new)
            self._store.note_written(watch.name, [each for each in new if each.name in written])
            self._store.note(watch.name, [each for each in new if each.name not in written], "settling")
            for each in batch:
                # Noted at an earlier look, and the same now: it has stopped growing.
                if room <= 0 or known.get(_id(each)) != "settling":
                    continue
                if self._take(watch, each):
                    room -= 1
                else:  # another server may have filled it
                    room = watch.parallel - self._store.open_jobs(watch.name)
        self._store.forget(watch.name, unseen)

    def _take(self, watch: Watch, entry: Entry) -> bool:
        try:
            spec = fill(watch.template, watch.url, entry.name)
        except SpecError as error:
            log.warning("watch %s: %s: %s", watch.name, entry.name, error)
            self._store.refuse(watch, entry)
            return False
        rival = self._store.rival(watch, entry.name, spec.out)
        if rival is not None and _opened(watch.url).exists(rival):
            log.warning("watch %s: %s: its results would replace those of %s", watch.name, entry.name, rival)
            self._store.refuse(watch, entry)
            return False
        job_id = self._store.take(watch, entry, self._jobs.store, spec)
        if job_id is None:
            return False
        log.info("watch %s: %s starts job %s", watch.name, entry.name, job_id)
        self._taken()
        return True


def look_into(url: str) -> None:
    """Raises SourceNotFoundError, SpecError or StorageError if the place cannot be watched."""
    next(iter(_opened(url).list()), None)


def _opened(url: str) -> Store:
    store = open_store(url)
    if store.is_local and not Path(url).is_dir():  # listing it would give nothing
        raise SourceNotFoundError(f"there is no folder {url}")
    return store
