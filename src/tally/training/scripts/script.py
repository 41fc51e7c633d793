"""Training scripts: any Python file, in a process of its own, whose run is kept here.

The script works in a folder of the run, in which everything of its own folder is linked, but ``outputs/`` and
``logs/``: those are new for each run, and become part of it. So several runs of one script never meet.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tally import plain_yaml, processes
from tally.config import append_private
from tally.errors import ModelNotFoundError, RunError, RunStateError, SourceNotFoundError, SpecError
from tally.jobs.signals import stop_signals
from tally.masking import HIDDEN, mask
from tally.models.registry import ModelVersion, open_registry
from tally.storage import failure
from tally.storage.publish import write_whole
from tally.text import visible
from tally.training.promotion import Promoted, Promotion
from tally.training.runs import origin
from tally.training.runs.child import Office
from tally.training.runs.store import RunState, RunStore, is_secret, without_secrets
from tally.training.runs.tracking import DatabaseBook, Run, run
from tally.training.scripts import keeper, shim

COLLECTED = ("outputs", "logs")
"""Folders of a script that become part of its run."""
OUTPUT = "output.txt"
"""The file of what it prints."""
WORK = "work"
"""The folder that it works in."""
STOP_SECONDS = 10.0
"""How long a script may take to end, once it is asked to."""
GIVEN = "given.json"
"""The file of what the run was given: :meth:`ScriptTraining.to_dict`."""
RESUMED = "TALLY_RUN_RESUMED"
"""An environment variable that says to a script that its run goes on: ``1``."""
_LEFT_SECONDS = 15.0
"""How long is waited for the end of a script whose command was killed."""
_MOST_LINKS = 10_000
_DRAIN_SECONDS = 2.0
"""How long output is waited for once a script has ended: of children that it left behind."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a script ended. code: its exit code, negative for the signal that killed it. by_user: it was stopped.
    promoted: what became of its model, where that was asked for."""

    run_id: str
    state: RunState
    error: str | None
    code: int
    by_user: bool
    promoted: Promoted | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptTraining:
    """A script to be run once. Raises SpecError with every problem, SourceNotFoundError.

    parameters: become arguments ``--NAME VALUE``, texts as given; an empty text: ``--NAME`` alone.
    train_sets, test_sets: pairs of a table of labels and a folder of images, which become ``--train_sets LABELS IMAGES
    ...`` and ``--test_sets ...``. data: other data by name. arguments: more, as they are.
    folder: whose files the script finds in its current folder; that of the script by default.
    time_limit: seconds, after which it is killed with all its children. command: as it was typed, to be kept.
    """

    script: Path
    parameters: Mapping[str, str] = field(default_factory=dict)
    train_sets: Sequence[tuple[str, str]] = ()
    test_sets: Sequence[tuple[str, str]] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    folder: Path | None = None
    name: str | None = None
    time_limit: float | None = None
    command: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.script.is_file():
            raise SourceNotFoundError(f"there is no script {str(self.script)!r}")
        problems = [
            f"-p {name}: a parameter's name has letters, digits, '_', '-' and '.'"
            for name in self.parameters
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name.startswith("-")
        ]
        if self.folder is not None and not self.script.absolute().is_relative_to(self.folder.absolute()):
            problems.append(f"--folder {self.folder}: the script {self.script} does not lie in it")
        for flag, sets in (("--train-set", self.train_sets), ("--test-set", self.test_sets)):
            for labels, images in sets:
                if not Path(labels).is_file():
                    problems.append(f"{flag}: there is no table of labels {labels!r}")
                if not Path(images).exists():
                    problems.append(f"{flag}: there is no folder of images {images!r}")
        for name, place in self.data.items():
            if not Path(place).exists():
                problems.append(f"--data {name}: there is no file or folder {place!r}")
        if problems:
            raise SpecError(problems)

    def to_dict(self) -> dict[str, Any]:
        """All of it but its name and command, JSON-able, with absolute paths, and ``***`` in place of secrets."""
        return {
            "script": str(self.script.absolute()), "parameters": without_secrets(self.parameters),
            "train_sets": _absolute(self.train_sets), "test_sets": _absolute(self.test_sets),
            "data": {name: str(Path(place).absolute()) for name, place in self.data.items()},
            "arguments": [mask(each) if is_secret(each) else each for each in self.arguments],
            "time_limit": self.time_limit,
            "folder": None if self.folder is None else str(self.folder.absolute()),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScriptTraining:
        """The inverse of :meth:`to_dict`. Raises SourceNotFoundError, SpecError where something has gone, or a secret
        was not kept."""
        given = dict(values)
        folder, script = given.pop("folder"), Path(given.pop("script"))
        hidden = [f"-p {name}" for name, text in given["parameters"].items() if HIDDEN in text]
        hidden += [each for each in given["arguments"] if HIDDEN in each]
        if hidden:
            raise SpecError(
                f"{', '.join(hidden)} held a secret, which was not kept",
                hint="Have the script read it from the environment, and begin a new run.",
            )
        given |= {name: [(labels, images) for labels, images in given[name]] for name in ("train_sets", "test_sets")}
        return cls(script=script, folder=None if folder is None else Path(folder), **given)

    @property
    def argument_list(self) -> list[str]:
        """What the script finds in ``sys.argv``, after its own name."""
        found: list[str] = []
        for flag, sets in (("--train_sets", self.train_sets), ("--test_sets", self.test_sets)):
            if sets:
                found += [flag, *(str(Path(each).absolute()) for pair in sets for each in pair)]
        for name, value in self.parameters.items():
            found += [f"--{name}", value] if value else [f"--{name}"]
        return [*found, *self.arguments]

    def run(
        self,
        listen: Callable[[bytes], object] = lambda printed: None,
        *,
        begun: Callable[[Run], object] = lambda run: None,
        promotion: Promotion | None = None,
        resume: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run the script to its end, and return how it ended.

        listen: gets what it prints, as it prints it. begun: gets the run, before the script starts. promotion: of what
        the script registers by this name; a run without such a model has failed, and one that goes on knows it: see
        :meth:`~tally.training.promotion.Promotion.of_kept`. resume: the id of the run that goes
        on, in its folder; run_id, tags: of a new one. At Ctrl-C and SIGTERM the script is asked to end, and killed
        after STOP_SECONDS or at the second.
        Raises StorageError, OwnershipLostError, RunNotFoundError, RunStateError.
        """
        if promotion is not None:
            promotion.check()
        code = origin.code(self.script)
        if resume is not None:
            tracked = run(resume=resume, store=RunStore.open())
            tracked.book.change(code=code)
        else:
            tracked = run(
                self.name or self.script.stem, self.known_parameters, command=self.command, code=code,
                run_id=run_id, tags=tags, store=RunStore.open(),
            )  # fmt: skip
        with tracked:
            begun(tracked)
            if promotion is not None:
                promotion.keep(tracked.folder)
            write_whole(tracked.folder / GIVEN, json.dumps(self.to_dict(), indent=1).encode())
            for each, place in self.all_data.items():  # may take long: all of it is read
                tracked.log_data(each, place)
            assert isinstance(tracked.book, DatabaseBook)
            with Office(tracked, tracked.book) as office:
                followed = self.follow(tracked.folder, tracked.id, office.environment, listen, again=tracked.resumed)
            state, error = followed.verdict(office.ended)
            promoted = None
            if promotion is not None and state == "finished":
                try:
                    promoted = promotion.conclude(tracked, partial(_registered, tracked.book))
                except RunError as problem:
                    state, error = "failed", problem.message
            tracked.finish(state, error)
        return Ended(tracked.id, state, error, followed.code, followed.by_user, promoted)

    @property
    def known_parameters(self) -> dict[str, Any]:
        """As a run keeps them: numbers where they are some, true for a bare ``--NAME``."""
        return {name: _value(text) for name, text in self.parameters.items()}

    @property
    def all_data(self) -> dict[str, str]:
        """What it is trained from: name to place."""
        sets = {
            f"{what} {number} {part}": place
            for what, sets in (("train", self.train_sets), ("test", self.test_sets))
            for number, pair in enumerate(sets, 1)
            for part, place in zip(("labels", "images"), pair, strict=True)
        }
        return sets | dict(self.data)

    def _words(self, folder: Path) -> list[str]:
        """The command line of the script's process."""
        words = [sys.executable, str(self.script.absolute().relative_to(folder)), *self.argument_list]
        return [sys.executable, "-I", "-S", keeper.__file__, *words]

    def follow(
        self,
        place: Path,
        run_id: str,
        office: Mapping[str, str],
        listen: Callable[[bytes], object] = lambda printed: None,
        *,
        again: bool = False,
        stops: Callable[[Callable[[int], None]], AbstractContextManager[None]] = stop_signals,
    ) -> Followed:
        """Start the script and follow it to its end. It knows no database: see :mod:`tally.training.runs.child`.

        place: the run's folder. office: the environment of who keeps the run. again: the script goes on with what it
        has left there. stops: while this context lasts, it calls what it was given to stop the script, with 1, and
        with 2 to kill it. Raises StorageError, SpecError, RunStateError.
        """
        folder = (self.folder or self.script.parent).absolute()
        work = place / WORK
        try:
            printed = append_private(place / OUTPUT)
        except OSError as error:
            raise failure("write", str(place / OUTPUT), error) from error
        path = [str(Path(shim.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = processes.environment() | dict(office) | {
            "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "AZUREML_RUN_ID": run_id,
        }  # fmt: skip
        environment.pop(RESUMED, None)
        if again:
            environment[RESUMED] = "1"
        with printed:
            _wait_for_the_last(printed, run_id)
            try:
                _lay_out(folder, work, place, again=again)
            except OSError as error:
                raise failure("write", str(work), error) from error
            process = subprocess.Popen(
                self._words(folder),
                cwd=work, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=[printed.fileno()],  # whose lock lasts as long as that process
            )  # fmt: skip
            watched = _Watched(process, self.time_limit)
            tail = _Tail()

            def say(block: bytes) -> None:
                printed.write(block)
                printed.flush()
                tail.add(block)
                listen(block)

            try:
                with stops(watched.stop):
                    watched.follow(say)
            finally:
                watched.close()
        _collect(folder, work, place)
        return Followed(watched.code, watched.late, watched.by_user, self.time_limit, tail.line())


@dataclass(frozen=True, slots=True)
class Followed:
    """How a script's process ended. late: its time limit was over. said: the last line that it printed."""

    code: int
    late: bool
    by_user: bool
    limit: float | None
    said: str

    def verdict(self, told: tuple[RunState, str | None] | None) -> tuple[RunState, str | None]:
        """The run's state and error. told: by the script itself."""
        code = self.code
        last = f"; the last that it printed: {self.said}" if self.said else ""
        if self.late:
            return "killed", f"its time limit of {self.limit:g} s was over"
        if self.by_user:
            return "killed", "it was stopped by its user"
        if code < 0:
            return "killed", f"it was killed by {_signal_name(-code)}{last}"
        if code > 0:
            return "failed", f"the script ended with exit code {code}{last}"
        if told is not None and told[0] != "finished":
            return told
        return "finished", None


class _Watched:
    """A process and its group, followed to their end."""

    def __init__(self, process: subprocess.Popen[bytes], time_limit: float | None) -> None:
        self._process = process
        self._until = None if time_limit is None else time.monotonic() + time_limit
        self.late = False
        self._stopped = 0

    @property
    def code(self) -> int:
        return self._process.returncode

    @property
    def by_user(self) -> bool:
        """Whether the user has stopped it, and it has not ended in good order all the same."""
        return bool(self._stopped) and self.code != 0

    def stop(self, count: int) -> None:
        """Ask it to end, then kill it. Called by another thread."""
        self._stopped = count
        self._signal(signal.SIGTERM if count == 1 else signal.SIGKILL)
        if count == 1:
            threading.Timer(STOP_SECONDS, self._kill_if_alive).start()

    def _kill_if_alive(self) -> None:
        if self._process.poll() is None:
            self.kill()

    def kill(self) -> None:
        """Kill the whole group, and wait for the process."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Kill what it left behind, and hear no more of that."""
        self.kill()
        for each in (self._process.stdin, self._process.stdout):
            if each is not None:
                each.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # all of the group have ended
            os.killpg(self._process.pid, number)

    def follow(self, say: Callable[[bytes], object]) -> None:
        """Pass on what it prints until it has ended, or its time is over."""
        assert self._process.stdout is not None
        output = self._process.stdout
        os.set_blocking(output.fileno(), False)
        ended = False
        with selectors.DefaultSelector() as selector, _end_of(self._process) as end:
            selector.register(output, selectors.EVENT_READ)
            selector.register(end, selectors.EVENT_READ)
            while True:
                left = None if self._until is None else self._until - time.monotonic()
                if left is not None and left <= 0:
                    if not ended:
                        self.late = True
                        self.kill()
                    self._read(output, say)
                    return
                ready = [key.fileobj for key, _ in selector.select(left)]
                if output in ready and not self._read(output, say):
                    selector.unregister(output)
                    if ended:
                        return
                if end in ready:
                    ended = True
                    self._signal(signal.SIGKILL)  # the children that it left behind
                    selector.unregister(end)
                    self._until = time.monotonic() + _DRAIN_SECONDS
                if ended and output not in (key.fileobj for key in selector.get_map().values()):
                    return

    @staticmethod
    def _read(output: object, say: Callable[[bytes], object]) -> bool:
        """Pass on all there is; False once there is nothing more to come."""
        while block := output.read(1 << 16):  # type: ignore[attr-defined]
            say(block)
        return block is None


class _end_of:  # noqa: N801 - a context, like contextlib's
    """A file that becomes readable when a process has ended."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def __enter__(self) -> int:
        self._read, self._write = os.pipe()
        threading.Thread(target=self._wait, daemon=True, name="tally-script").start()
        return self._read

    def _wait(self) -> None:
        self._process.wait()
        os.close(self._write)

    def __exit__(self, *error: object) -> None:
        os.close(self._read)


class _Tail:
    """The end of what was printed."""

    def __init__(self) -> None:
        self._kept = b""

    def add(self, block: bytes) -> None:
        self._kept = (self._kept + block)[-8192:]

    def line(self) -> str:
        """The last line."""
        lines = [each for each in self._kept.decode("utf-8", "replace").splitlines() if each.strip()]
        return visible(lines[-1].strip())[:500] if lines else ""


def _registered(book: DatabaseBook, name: str) -> ModelVersion:
    """What the script has registered by this name last. Raises RunError."""
    for each in reversed(book.models):
        if each.startswith(f"models:/{name}/"):
            with suppress(ModelNotFoundError):  # of an earlier start of the script, and withdrawn
                return open_registry().get(each)
    there = f"; it registered {', '.join(book.models)}" if book.models else ""
    raise RunError(f"the script registered no model {name!r}{there}")


def _wait_for_the_last(printed: BinaryIO, run_id: str) -> None:
    """Until the script of an earlier start of this run has ended, with all that it has started: that of a command that
    was killed does so at once. Its lock on the file is ours then. Raises RunStateError."""
    until = time.monotonic() + _LEFT_SECONDS
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(printed, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > until:
            raise RunStateError(f"the script of run {run_id} still runs", hint="End its process first.")
        time.sleep(0.02)


def _lay_out(folder: Path, work: Path, place: Path, *, again: bool) -> None:
    """Link everything of the script's folder into a new one, or one that a script has left. Raises OSError,
    SpecError."""
    if not again:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    for each in work.iterdir():
        if _is_link_to(each, folder):  # of an earlier start: the script's folder may have changed since
            each.unlink()
    for number, each in enumerate(sorted(folder.iterdir())):
        if number == _MOST_LINKS:
            raise SpecError(
                f"{folder} holds more than {_MOST_LINKS:,} files and folders",
                hint="Put the script into a folder of its own, with what it needs.",
            )
        if each.name not in COLLECTED and not (work / each.name).exists():
            (work / each.name).symlink_to(each)
    for name in COLLECTED:
        if again and (place / name).is_dir() and not (work / name).exists():
            (place / name).rename(work / name)
        (work / name).mkdir(exist_ok=True)


def _collect(folder: Path, work: Path, place: Path) -> None:
    """Move what the script wrote into the run's folder, and remove the links."""
    for each in sorted(work.iterdir()):
        if _is_link_to(each, folder):
            each.unlink()
        elif each.name in COLLECTED and each.is_dir() and not each.is_symlink():
            if (place / each.name).is_dir():  # artifacts that were logged under such a name
                shutil.copytree(each, place / each.name, symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(each)
            elif any(each.iterdir()):
                each.rename(place / each.name)
            else:
                each.rmdir()
    with suppress(OSError):  # it wrote elsewhere, too
        work.rmdir()


def _is_link_to(path: Path, folder: Path) -> bool:
    """Whether it is a link that :func:`_lay_out` has made."""
    return path.is_symlink() and path.readlink() == folder / path.name


def _absolute(sets: Sequence[tuple[str, str]]) -> list[list[str]]:
    return [[str(Path(each).absolute()) for each in pair] for pair in sets]


def resumed(run_id: str) -> tuple[str, ScriptTraining]:
    """A run's id, and what it was given, to go on with it. Raises RunNotFoundError, RunError, SpecError,
    SourceNotFoundError."""
    record = RunStore.open().get(run_id)
    if record.sweep is not None:
        raise RunError(f"run {record.id} is a trial of sweep {record.sweep}", hint=f"tally sweep resume {record.sweep}")
    try:
        given = json.loads((Path(record.folder) / GIVEN).read_text("utf-8"))
    except OSError as error:
        raise RunError(
            f"run {record.id} cannot go on: {error.filename} is not there",
            hint="Only a run that 'tally train script' has begun on this machine goes on. "
            f"Begin another: tally runs reproduce {record.id} --run",
        ) from None
    return record.id, ScriptTraining.from_dict(given)


def _value(text: str) -> Any:
    """A parameter's text as it is kept: a number where it is one, true for a bare ``--NAME``."""
    if not text:
        return True
    try:
        return plain_yaml.value(text)
    except ValueError:
        return text


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
