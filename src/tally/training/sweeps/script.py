"""Sweeps over one's own training script: each trial is a process of its own, below a worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tally.engines import task
from tally.engines.base import Engine
from tally.errors import RunError
from tally.storage import failure
from tally.training.runs import origin
from tally.training.runs.child import Office
from tally.training.runs.cost import Meter
from tally.training.runs.store import RunStore, plain
from tally.training.runs.tracking import DatabaseBook, Run, run
from tally.training.scripts.script import Followed, ScriptTraining
from tally.training.sweeps.base import Ended, Trials, check_shared
from tally.training.sweeps.space import Value

LOOK_SECONDS = 0.1
"""Between two looks whether a trial is to be stopped."""


class ScriptTrials(Trials):
    """given: what all trials have in common. goes_on: whether the script goes on from its own checkpoints, which it
    finds where it has left them: then a trial that is lost does so, in its run."""

    kind = "script"

    def __init__(self, given: ScriptTraining, *, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self.given = replace(given, script=given.script.absolute())
        self._offices: dict[str, Office] = {}
        self._data: dict[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        return self.given.to_dict() | {"goes_on": self.goes_on}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScriptTrials:
        """The inverse of :meth:`to_dict`. Raises SourceNotFoundError, SpecError where something has gone."""
        given = dict(values)
        goes_on = given.pop("goes_on", False)
        return cls(ScriptTraining.from_dict({"parameters": {}, **given}), goes_on=goes_on)

    def _with(self, values: Mapping[str, Value]) -> ScriptTraining:
        return replace(self.given, parameters={name: _text(value) for name, value in values.items()})

    def check(self, values: Mapping[str, Value]) -> None:
        self._with(values)

    def prepare(self, folder: Path, engine: str) -> Mapping[str, str]:
        self.code = code = origin.code(self.given.script)
        for name, place in self.given.all_data.items():
            try:
                self._data[name] = origin.data(place)
            except OSError as error:
                raise failure("read", str(place), error) from error
        inputs = {name: str(each["hash"]) for name, each in self._data.items() if "hash" in each}
        return inputs | {"code": str(code["hash"])}

    def setup(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _nothing, ()

    def parameters(self, values: Mapping[str, Value]) -> dict[str, Any]:
        return self._with(values).known_parameters

    def command(self, values: Mapping[str, Value]) -> Sequence[str]:
        given = self._with(values)
        words = ["tally", "train", "script", str(given.script)]
        for name, text in given.parameters.items():
            words += ["-p", f"{name}={text}"]
        for flag, sets in (("--train-set", given.train_sets), ("--test-set", given.test_sets)):
            for pair in sets:
                words += [flag, *(str(Path(each).absolute()) for each in pair)]
        for name, place in given.data.items():
            words += ["--data", f"{name}={Path(place).absolute()}"]
        if given.folder is not None:
            words += ["--folder", str(given.folder)]
        if given.time_limit is not None:
            words += ["--time-limit", f"{given.time_limit:g}s"]
        return [*words, *(["--", *given.arguments] if given.arguments else [])]

    def describe(self, run: Run) -> None:
        if self._data:
            run.book.change(data=self._data)

    def submit(self, engine: Engine, run: Run, values: Mapping[str, Value]) -> Future[Any]:
        assert isinstance(run.book, DatabaseBook)
        office = self._offices[run.id] = Office(run, run.book, host=engine.host)
        office.__enter__()
        return engine.submit(train_one, self._with(values), str(run.folder), run.id, office.environment, run.resumed)

    def ended(self, run: Run, found: Any) -> Ended:
        followed: Followed = found["followed"]
        state, error = followed.verdict(self._offices[run.id].ended)
        reason = None if state == "finished" else error or f"the script said that it is {state}"
        return Ended(None, reason, followed.by_user, found["cost"])

    def released(self, run: Run) -> None:
        if (office := self._offices.pop(run.id, None)) is not None:
            office.__exit__()

    def conclude(self, store: RunStore, run_id: str, values: Mapping[str, Value], register: str | None) -> str | None:
        from tally.models.registry import open_registry, registry_name
        from tally.models.resolve import resolve

        record = store.get(run_id)
        if register is None:
            return record.models[-1] if record.models else None
        if not record.models:
            raise RunError(
                f"run {run_id}, the best trial, has registered no model that could become {register!r}",
                hint="Have the script call tally.training.run().register(package, name), or Azure ML's "
                "register_model; then begin a new sweep.",
            )
        name = registry_name(register)
        metrics = {each: figures.last for each, figures in record.metrics.items()}
        facts = {"metrics": plain(metrics), "run": run_id, "properties": plain(dict(values))}
        version = str(open_registry().add(name, resolve(record.models[-1]), metadata=facts))
        if version not in record.models:
            with run(resume=run_id, reopen=True, store=store) as begun:
                begun.book.change(models=[*record.models, version])
        return version


def _text(value: Value) -> str:
    """As an argument of a command."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


# -- on a worker ---------------------------------------------------------------------------------------------


def _nothing() -> None:
    """How a worker is set up that starts scripts."""


def train_one(
    state: None, training: ScriptTraining, folder: str, run_id: str, office: Mapping[str, str], again: bool
) -> dict[str, Any]:
    """Run the script to its end; returns ``followed`` and ``cost``. It is ended once the task is asked to stop."""
    for place in (folder, training.script):
        check_shared(place)
    meter = Meter()
    followed = training.follow(Path(folder), run_id, office, again=again, stops=_stops)
    return {"followed": followed, "cost": meter.cost()}


@contextmanager
def _stops(stop: Callable[[int], None]) -> Iterator[None]:
    """While the context lasts, call ``stop`` once the task is asked to stop."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            if task.stopping():
                stop(1)
                return

    thread = threading.Thread(target=look, name="tally-trial", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
