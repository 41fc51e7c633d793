"""``tally.training.run()``: what a training logs while it runs.

A run belongs to the process that made it: a thread of that process writes what was logged, and renews the run's lease,
every few seconds, so that logging each step costs microseconds. In a script that ``tally train script`` has started,
the run is that command's, to which everything is sent.

All methods may be called from several threads.
"""

from __future__ import annotations

import atexit
import logging
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import quote, unquote

from tally.config import make_private
from tally.database.leased import Lease, folder_of
from tally.database.renewer import LeaseRenewer
from tally.database.waiting import Patience
from tally.errors import OwnershipLostError, RunStateError, SpecError, StorageError, error_line
from tally.jobs.store import new_id
from tally.storage import failure
from tally.text import storable
from tally.training.runs import origin
from tally.training.runs.child import ParentBook, parent
from tally.training.runs.cost import Meter
from tally.training.runs.mlflow_mirror import mirror_if_asked
from tally.training.runs.store import (
    EVENTS,
    LONGEST_METRIC,
    PICTURES,
    Figures,
    RunState,
    RunStore,
    Value,
    plain,
    without_secrets,
)

if TYPE_CHECKING:
    from tally.models.registry import ModelVersion
    from tally.training.runs.events import EventWriter

log = logging.getLogger("tally")

FLUSH_SECONDS = 2.0
"""Seconds between two writes of what was logged, and two renewals of the lease."""
MOST_BUFFERED = 20_000
"""Values that are kept until then; more are written at once."""
_LONGEST_PART = 200
_STEPS = 2**62
"""More do not fit into the database's column."""


class Book(Protocol):
    """Where a run's records go: the database, or the process that owns the run."""

    def record(self, values: Sequence[Value]) -> None: ...
    def flush(self) -> None: ...
    def change(self, **columns: Any) -> None: ...
    def register(self, folder: Path, name: str, **facts: Any) -> str: ...
    def finish(self, state: RunState, error: str | None) -> None: ...


class Run:
    """One training. Made by :func:`run`; ``with`` ends it: finished, failed after an exception, killed by Ctrl-C.

    id, name: of the run. folder: for files that belong to it; whatever lies there is an artifact, but for ``events/``
    (TensorBoard's event files) and ``pictures/``. parameters: as given. tags: a mapping of texts, to be changed.
    data: name to place of what it is trained from. book: where its records go. hparams: the parameters that TensorBoard
    compares runs by; None: all. resumed: whether it goes on after it was interrupted, killed or has failed.
    """

    def __init__(
        self,
        book: Book,
        *,
        run_id: str,
        name: str,
        folder: Path,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        figures: Mapping[str, Figures],
        data: Mapping[str, str],
        resumed: bool = False,
    ) -> None:
        self.resumed = resumed
        self.data: Mapping[str, str] = dict(data)
        self.hparams: Mapping[str, Any] | None = None
        self._last = {name: each.last for name, each in figures.items()}
        self.id, self.name, self.folder = run_id, name, folder
        self.parameters: Mapping[str, Any] = dict(parameters)
        self.tags = Tags(tags, lambda now: book.change(tags=now))
        self.book = book
        self._lock = threading.Lock()
        self._next = {name: each.step + 1 for name, each in figures.items()}
        self._events: EventWriter | None = None
        self._told = False
        self._ended = False

    # -- while it trains ---------------------------------------------------------------------------------------

    def log(self, name: str | Mapping[str, float], value: float | None = None, step: int | None = None) -> None:
        """Log a metric: ``log("loss", 0.3)``, or several of one step: ``log({"loss": 0.3, "accuracy": 0.9}, step=7)``.

        step: a whole number; one more than the last of that metric by default. What was logged of the same metric and
        step before is replaced. NaN and infinity are allowed. Raises SpecError for what is no number,
        OwnershipLostError once another process trains this run.
        """
        given = {name: value} if isinstance(name, str) else name
        at = time.time()
        with self._lock:
            values = [self._value(key, each, step, at) for key, each in given.items()]
            self._open()
        self.book.record(values)
        events = self.events
        if events is not None:
            by_step: dict[int, dict[str, float]] = {}
            for each in values:
                by_step.setdefault(each.step, {})[each.name] = each.value
            for at_step, scalars in by_step.items():
                events.add(at_step, scalars=scalars, at=at)

    def log_list(self, name: str, values: Sequence[float]) -> None:
        """Log several values of a metric, one at each of the next steps."""
        for each in values:
            self.log(name, each)

    def flush(self) -> None:
        """Have all that was logged be written when this returns: before a checkpoint, so that none of it is missing
        if the process is killed after that. Raises OwnershipLostError once another process trains this run."""
        self.book.flush()

    def log_image(self, name: str, picture: Any, step: int = 0) -> Path:
        """Log a picture: an array (height × width × 3, or height × width; uint8 or floats from 0 to 1), a PIL image, a
        matplotlib figure, encoded bytes, or a file's path. Returns the file that it became. Raises SpecError."""
        from tally.training.runs.pictures import as_picture, png

        with self._lock:
            self._open()
        pixels = as_picture(picture)
        path = self.folder.joinpath(PICTURES, *_folders(name), f"{int(step):09d}.png")
        _write(path, png(pixels))
        if self.events is not None:
            self.events.add(int(step), images={name: pixels})
        return path

    def log_artifact(self, path: str | Path, name: str | None = None) -> Path:
        """Copy a file or a folder into the run's folder; returns where it is there.

        name: there; the path's last part by default, with ``/`` for folders within. Raises SpecError, StorageError.
        """
        path = Path(path)
        to = _inside(self.folder, name or path.absolute().name)
        if not path.exists():
            raise SpecError(f"log_artifact: there is no file or folder {str(path)!r}")
        try:
            if path.resolve() != to.resolve():
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(path, to, dirs_exist_ok=True) if path.is_dir() else shutil.copy2(path, to)
        except OSError as error:
            raise StorageError(f"cannot copy {path} to {to}: {error.strerror or error}") from error
        return to

    def log_data(self, name: str, place: str | Path) -> None:
        """Say what it is trained from: a file or a folder, whose content's hash is kept. Raises StorageError."""
        try:
            found = origin.data(place)
        except OSError as error:
            raise failure("read", str(place), error) from error
        self.data = {**self.data, name: found["place"]}
        self.book.change(data={name: found})

    def last_values(self) -> dict[str, float]:
        """The value of each metric that was logged last."""
        with self._lock:
            return dict(self._last)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Add to the parameters."""
        self.parameters = {**self.parameters, **parameters}
        self.book.change(parameters=without_secrets(parameters))

    def register(
        self,
        package: str | Path,
        name: str,
        *,
        properties: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        alias: str | None = None,
        metrics: Mapping[str, float] | None = None,
        description: str | None = None,
        as_files: bool = False,
    ) -> str:
        """Add a model package (or a model's file) to the registry as the next version of ``name``, with this run's id.

        metrics: of the version; the last value of each metric by default.
        as_files: what no kind of model claims, and pickles, are kept as they are, for a script's ``--artifacts``.
        Returns ``models:/name/number``. A name's capital letters become small ones, as the registry has it.
        Raises as ``tally models add`` does, and SpecError for a folder that the run's own lies in.
        """
        place = Path(package).resolve()
        if place in self.folder.resolve().parents:
            raise SpecError(
                f"register: {str(package)!r} is {place}, the folder that all of the run lies in",
                hint="Give the file or folder of the model.",
            )
        facts: dict[str, Any] = {"properties": properties, "tags": tags, "alias": alias, "metrics": metrics}
        facts |= {"description": description, "as_files": as_files}
        return self.book.register(Path(package).absolute(), name, **facts)

    def registered(self, version: str) -> None:
        """Say that this version (``models:/name/number``) is of this run, where it was not :meth:`register` that added
        it."""
        self.book.change(models=[version])

    @property
    def events(self) -> EventWriter | None:
        """Writes the run's event files for TensorBoard; None where the package ``tensorboard`` is missing."""
        from tally.training.runs.events import EventWriter, can_write

        with self._lock:
            if self._events is None and not self._ended:
                if can_write():
                    self._events = EventWriter(self.folder / EVENTS)
                    if self.parameters:
                        self._events.hparams(without_secrets(self.hparams or self.parameters), name=self.id)
                    atexit.register(self._events.close)  # a script may end without more
                elif not self._told:
                    self._told = True
                    log.warning(
                        "run %s has no event files for TensorBoard: pip install 'tally-scoring[retrain]'", self.id
                    )
            return self._events

    # -- its end -----------------------------------------------------------------------------------------------

    def finish(self, state: RunState = "finished", error: str | None = None) -> None:
        """End it. May be repeated; the first time counts."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            events, self._events = self._events, None
        if events is not None:
            if self.parameters:
                events.session_end(state == "finished")
            events.close()
            atexit.unregister(events.close)
        self.book.finish(state, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.finish()
        elif isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            self.finish("killed", "it was interrupted")
        else:
            try:
                self.finish("failed", error_line(error))
            except OwnershipLostError:  # maybe what ``error`` says
                log.warning("run %s was taken over by another process", self.id)

    # -- inside ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._ended:
            raise RunStateError(f"run {self.id} has ended: nothing more is logged to it")

    def _value(self, name: str, value: Any, step: int | None, at: float) -> Value:
        _metric_name(name)
        try:
            number = float(value)
        except OverflowError:
            raise SpecError(
                f"log: the value of {name!r} is too large: a metric is {sys.float_info.max:.2g} at most",
                hint="Log its logarithm.",
            ) from None
        except (TypeError, ValueError):
            raise SpecError(
                f"log: the value of {name!r} should be a number, not {value!r}", hint="Texts are tags: run.tags[name]."
            ) from None
        step = self._next.get(name, 0) if step is None else _whole(name, step)
        self._next[name] = max(step + 1, self._next.get(name, 0))
        self._last[name] = number
        return Value(name, step, number, at)


class Tags(MutableMapping[str, str]):
    """Texts that are written whenever they change."""

    def __init__(self, tags: Mapping[str, str], write: Any) -> None:
        self._tags, self._write = dict(tags), write

    def __getitem__(self, name: str) -> str:
        return self._tags[name]

    def __setitem__(self, name: str, value: str) -> None:
        self._tags[str(name)] = str(value)
        self._write(dict(self._tags))

    def become(self, tags: Mapping[str, str]) -> None:
        """These, and no others."""
        self._tags = {str(name): str(text) for name, text in tags.items()}
        self._write(dict(self._tags))

    def __delitem__(self, name: str) -> None:
        del self._tags[name]
        self._write(dict(self._tags))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tags)

    def __len__(self) -> int:
        return len(self._tags)


class DatabaseBook:
    """Writes a run that this process owns into the database, every few seconds, from a thread.

    figures, data, parameters, models: what is known of it already. rebuilt: whether some values may be logged again, so
    that the figures are counted anew at the end. told: is given all that is recorded. measured: the cost, where another
    process trains.
    """

    def __init__(
        self, store: RunStore, lease: Lease, *, rebuilt: bool = False, before: Mapping[str, float] | None = None
    ) -> None:
        record = store.get(lease.id)
        self._store, self._lease, self._rebuilt = store, lease, rebuilt
        self._figures = dict(record.metrics)
        self._columns: dict[str, Any] = {
            "data": dict(record.data), "parameters": dict(record.parameters), "models": list(record.models),
        }  # fmt: skip
        self._meter = Meter(before)
        self.told: Callable[[Sequence[Value]], object] = lambda values: None
        self.measured: Mapping[str, float] | None = None
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._buffer: list[Value] = []
        self._changed: set[str] = set()
        self._lost: OwnershipLostError | None = None
        self._patience = Patience(what=f"run {lease.id}")
        self._renewer = LeaseRenewer(
            self._write, every=FLUSH_SECONDS, what=f"run {lease.id}", patience=self._patience, lost=self._is_lost
        )
        self._renewer.start()

    @property
    def models(self) -> list[str]:
        """The versions that it registered, in that order."""
        with self._lock:
            return list(self._columns["models"])

    @property
    def figures(self) -> dict[str, Figures]:
        """What is known of each metric."""
        with self._lock:
            return dict(self._figures)

    def at(self, step: int) -> dict[str, float]:
        """What was measured at a step."""
        self._patience(self.flush)
        curves = self._patience(lambda: self._store.values(self._lease.id))
        return {name: each.values[each.steps.index(step)] for name, each in curves.items() if step in each.steps}

    def cost(self) -> dict[str, float]:
        return self._meter.cost() if self.measured is None else dict(self.measured)

    def record(self, values: Sequence[Value]) -> None:
        with self._lock:
            self._check()
            for each in values:
                before = self._figures.get(each.name)
                self._figures[each.name] = (
                    Figures.of(each.value, each.step) if before is None else before.with_value(each.value, each.step)
                )
            self._buffer.extend(values)
            self._changed.add("metrics")
            full = len(self._buffer) >= MOST_BUFFERED
        self.told(values)
        if full:
            self.flush()

    def change(self, **columns: Any) -> None:
        with self._lock:
            self._check()
            for name, value in columns.items():
                known = self._columns.get(name)
                if name == "models":
                    value = list(dict.fromkeys([*(known or []), *value]))
                elif name in ("data", "parameters") and known:
                    value = {**known, **value}
                self._columns[name] = value
            self._changed.update(columns)

    def register(self, folder: Path, name: str, **facts: Any) -> str:
        with self._lock:
            self._check()
            metrics = facts.pop("metrics") or {
                key: each.last for key, each in self._figures.items() if math.isfinite(each.last)
            }
        version = register(self._lease.id, folder, name, metrics=metrics, **facts)
        self.change(models=[str(version)])
        return str(version)

    def flush(self) -> None:
        """Write what there is; a database that is away is waited for. Raises OwnershipLostError."""
        with self._lock:
            self._check()
        self._patience(self._write)

    def _write(self) -> None:
        """Write what there is, and renew the lease. Raises OwnershipLostError, DatabaseAwayError: then it is kept."""
        with self._writing:
            with self._lock:
                values, self._buffer = self._buffer, []
                changed, self._changed = self._changed, set()
                columns = self._now(changed)
            try:
                self._store.write(self._lease, values, **columns)
            except BaseException:
                with self._lock:
                    self._buffer = values + self._buffer
                    self._changed |= changed
                raise

    def finish(self, state: RunState, error: str | None) -> None:
        self._renewer.stop()
        if self._lost is not None:
            raise self._lost
        self._patience(self._write)
        if self._rebuilt:
            self._figures = {
                name: Figures.of_curve(curve) for name, curve in self._store.values(self._lease.id).items()
            }
        columns = {"metrics": self._figures, "cost": self.cost()}
        self._patience(lambda: self._store.finish(self._lease, state, error=error, **columns))
        mirror_if_asked(self._store, self._lease.id)

    def _now(self, changed: set[str]) -> dict[str, Any]:
        columns = {name: self._columns[name] for name in changed - {"metrics"}}
        if "metrics" in changed:
            columns |= {"metrics": dict(self._figures), "cost": self.cost()}
        return columns

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _is_lost(self, error: OwnershipLostError) -> None:
        self._lost = error
        log.warning("%s", error.message)


def run(
    name: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    kind: str = "script",
    folder: str | Path | None = None,
    tags: Mapping[str, str] | None = None,
    data: Mapping[str, str | Path] | None = None,
    run_id: str | None = None,
    resume: str | None = None,
    reopen: bool = False,
    sweep: str | None = None,
    command: Sequence[str] | None = None,
    code: Mapping[str, Any] | None = None,
    store: RunStore | None = None,
) -> Run:
    """A new run, to be used with ``with``; or one that goes on.

    name: for people; the id by default. folder: for its files; a new one below ``TALLY_HOME/runs`` by default.
    data: name to place of what it is trained from. run_id: of the new run. resume: the id of a run that was
    interrupted, killed or has failed: it is trained again, under its name, in its folder; reopen: also one that is
    finished. kind, sweep, command, code: what it says of itself, see
    :class:`tally.training.runs.store.RunRecord`. store: of another database.
    In a script that ``tally train script`` has started, it is that command's run.

    Raises SpecError, StorageError, RunNotFoundError, RunStateError.
    """
    if resume is None and store is None and (book := parent()) is not None:
        return _joined(book, parameters, tags, data)
    store = store or RunStore.open()
    before: Mapping[str, float] | None = None
    if resume is not None:
        lease = store.resume(resume, reopen=reopen)
        before = store.get(lease.id).cost
    else:
        run_id = run_id or new_id()
        place = Path(folder).absolute() if folder is not None else folder_of(RunStore.word, run_id)
        lease = store.create(
            run_id=run_id, name=name or run_id, kind=kind, folder=str(place), parameters=parameters, tags=tags,
            sweep=sweep, command=origin.command() if command is None else command,
            code=origin.code() if code is None else code, environment=origin.environment(),
        )  # fmt: skip
    record = store.get(lease.id)
    try:
        make_private(Path(record.folder))
    except OSError as error:
        store.finish(lease, "failed", error=f"cannot make its folder: {error.strerror}")
        raise StorageError(f"cannot make the run's folder {record.folder}: {error.strerror}") from error
    begun = Run(
        DatabaseBook(store, lease, rebuilt=resume is not None, before=before),
        run_id=record.id, name=record.name, folder=Path(record.folder),
        parameters={**record.parameters, **(parameters or {})}, tags=record.tags,
        figures=record.metrics, data={each: found["place"] for each, found in record.data.items()},
        resumed=resume is not None,
    )  # fmt: skip
    for each, where in (data or {}).items():
        begun.log_data(each, where)
    return begun


def _joined(
    book: ParentBook,
    parameters: Mapping[str, Any] | None,
    tags: Mapping[str, str] | None,
    data: Mapping[str, str | Path] | None,
) -> Run:
    """The run of the process that started this one, with these added."""
    known = book.ask("begin")
    begun = Run(
        book, run_id=known["id"], name=known["name"], folder=Path(known["folder"]), parameters=known["parameters"],
        tags=known["tags"], figures={name: Figures.from_json(each) for name, each in known["metrics"].items()},
        data=known["data"], resumed=known["resumed"],
    )  # fmt: skip
    if parameters:
        begun.log_parameters(parameters)
    for name, text in (tags or {}).items():
        begun.tags[name] = text
    for name, place in (data or {}).items():
        begun.log_data(name, place)
    return begun


def register(
    run_id: str,
    package: Path,
    name: str,
    *,
    metrics: Mapping[str, float],
    properties: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    alias: str | None = None,
    description: str | None = None,
    as_files: bool = False,
) -> ModelVersion:
    """Add a run's model to the registry, as :meth:`Run.register` says."""
    from tally.models.registry import open_registry, registry_name
    from tally.models.resolve import resolve
    from tally.scorers.scripts.files import as_package, is_no_model

    facts: dict[str, Any] = {"metrics": plain(metrics), "run": run_id}
    if description:
        facts["description"] = description
    if properties:
        facts["properties"] = plain(properties)
    if tags:
        facts["tags"] = {str(key): str(value) for key, value in tags.items()}
    registry, name = open_registry(), registry_name(name)
    if not as_files or not is_no_model(package):
        return registry.add(name, resolve(package), alias=alias, metadata=facts)
    with as_package(package) as folder:
        return registry.add(name, resolve(folder), alias=alias, metadata=facts)


def emptied(package: Path) -> Path:
    """The place of a package in a run's folder, without what a process has left there that was killed."""
    for each in (package, *package.parent.glob(f".{package.name}-*")):
        shutil.rmtree(each, ignore_errors=True)
    return package


def artifacts(folder: Path) -> list[str]:
    """The files of a run's folder that are neither event files nor logged pictures, by name."""
    found = (each.relative_to(folder) for each in folder.rglob("*") if each.is_file())
    return sorted(each.as_posix() for each in found if each.parts[0] not in (EVENTS, PICTURES))


def logged_pictures(folder: Path) -> dict[str, dict[int, Path]]:
    """The pictures that were logged: name to step to file."""
    found: dict[str, dict[int, Path]] = {}
    top = folder / PICTURES
    for each in sorted(top.rglob("*.png")):
        if each.stem.lstrip("-").isdigit() and each.parent != top and each.is_file():
            name = unquote("".join(each.parent.relative_to(top).parts))
            found.setdefault(name, {})[int(each.stem)] = each
    return found


def _folders(name: str) -> list[str]:
    """The folders, one in the other, of the pictures of this name: no file system takes all of a long one at once."""
    text = quote(storable(_metric_name(name)), safe=" @:,=+()")
    parts = [text[at : at + _LONGEST_PART] for at in range(0, len(text), _LONGEST_PART)]
    return [f"%2E{each[1:]}" if each.startswith(".") else each for each in parts]


def _metric_name(name: str) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_METRIC:
        raise SpecError(f"a metric's name is a text of 1 to {LONGEST_METRIC} characters, not {name!r}")
    return name


def _whole(name: str, step: Any) -> int:
    """A step as it is kept. Raises SpecError."""
    try:
        found = None if isinstance(step, bool) else int(step)
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None or found != step:
        raise SpecError(f"log: the step of {name!r} should be a whole number, not {step!r}")
    if abs(found) >= _STEPS:
        raise SpecError(f"log: the step of {name!r} is too large: steps are below {_STEPS:,}")
    return found


def _inside(folder: Path, name: str) -> Path:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or parts[0] in (EVENTS, PICTURES):
        raise SpecError(
            f"an artifact cannot be called {name!r}",
            hint=f"Its name is a path within the run's folder, and not in {EVENTS}/ or {PICTURES}/.",
        )
    return folder.joinpath(*parts)


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise failure("write", str(path), error) from error
