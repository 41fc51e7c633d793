"""Sweeps over retrainings: bottlenecks are computed once, then each trial trains a last layer on a worker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tally.engines import task
from tally.engines.base import Engine, Reports
from tally.errors import SpecError
from tally.models.registry import registry_name
from tally.storage import failure
from tally.storage.publish import write_whole
from tally.training.promotion import Promotion
from tally.training.retrain.examples import Examples, Parameters
from tally.training.retrain.head import Evaluation, State, Trained, train
from tally.training.retrain.retraining import (
    CHECKPOINT,
    INPUTS,
    KIND,
    METRICS,
    Prepared,
    Retraining,
    Watcher,
    check,
    conclude,
    kept,
    measures,
    prepare,
)
from tally.training.retrain.summaries import Summaries
from tally.training.runs import origin
from tally.training.runs.cost import Meter
from tally.training.runs.events import EventWriter, can_write
from tally.training.runs.store import EVENTS, RunStore
from tally.training.runs.store import Value as Measured
from tally.training.runs.tracking import Run, run
from tally.training.sweeps.base import Ended, Trials, check_shared
from tally.training.sweeps.space import Value

CURVE = "curve.json"
"""In a run's folder, beside the checkpoint: all that was reported before it."""
EXAMPLES = "examples.npz"
REPORT_SECONDS = 0.1
"""Between two reports of a trial; each tells of all evaluations since."""
BACKLOG = 100

_OWN = ("test_batch_size", "validation_batch_size")
"""Parameters that change how a trial is measured, not what it learns."""
_FLAGS: Mapping[str, str] = {"early_stopping": "early-stopping"}


class RetrainTrials(Trials):
    """given: what all trials have in common. workers, device: for the backbone. watcher: is told of the bottlenecks."""

    kind = KIND
    types: ClassVar[Mapping[str, type] | None] = {
        each.name: type(each.default) for each in fields(Parameters) if each.name not in _OWN
    }
    goes_on = True

    def __init__(
        self, given: Retraining, *, workers: int | None = None, device: str = "auto", watcher: Watcher | None = None
    ) -> None:
        problems = [
            f"--{name}: a sweep writes no such file; the best trial's package is in its run, or --register-best it"
            for name in ("out", "output_graph", "output_labels", "summaries_dir")
            if getattr(given, name) is not None
        ]
        if given.distortions:
            said = [name for name, value in asdict(given.distortions).items() if value]
            problems.append(
                f"--{', --'.join(said)}: trials share bottlenecks that are computed once, and a distorted picture has "
                "none; sweep without, then train the best with it"
            )
        if given.fine_tune:
            problems.append("--fine-tune: trials share what the backbone makes of pictures; train the best with it")
        if problems:
            raise SpecError(problems)
        self.given = given
        self._workers, self._device, self._watcher = workers, device, watcher
        self._prepared: Prepared | None = None
        self._examples: Path | None = None
        self._data: dict[str, Any] = {}

    @property
    def measures(self) -> Sequence[str]:
        dataset = None if self._prepared is None else self._prepared.dataset
        return measures(final_test=self.given.final_test, dataset=dataset)

    def to_dict(self) -> dict[str, Any]:
        return self.given.to_dict() | {"device": self._device}

    def check(self, values: Mapping[str, Value]) -> None:
        if self._with(values).parameters.early_stopping and not self.given.validation_percentage:
            raise SpecError("--early-stopping: needs validation pictures, and --validation_percentage is 0")

    def check_metric(self, metric: str) -> None:
        if metric not in METRICS:
            raise SpecError(f"--metric {metric}: a retraining measures {', '.join(METRICS)}")
        if metric.startswith("validation") and not self.given.validation_percentage:
            raise SpecError(f"--metric {metric}: needs validation pictures, and --validation_percentage is 0")

    def _with(self, values: Mapping[str, Value]) -> Retraining:
        parameters: Any = dict(values)
        return replace(self.given, parameters=replace(self.given.parameters, **parameters))

    def prepare(self, folder: Path, engine: str) -> Mapping[str, str]:
        checked = check(self.given)
        self._prepared = prepared = prepare(
            self.given, checked, workers=self._workers, device=self._device, engine=engine, watcher=self._watcher
        )
        examples = prepared.examples
        self._examples = folder / EXAMPLES
        try:
            with self._examples.open("wb") as file:
                parts: Any = {f"part_{name}": rows for name, rows in examples.parts.items()}
                np.savez(file, features=examples.features, labels=examples.labels, classes=examples.classes, **parts)
        except OSError as error:
            raise failure("write", str(self._examples), error) from error
        for name, place in (("pictures", self.given.image_dir), ("backbone", self.given.backbone)):
            try:
                self._data[name] = origin.data(place)
            except OSError:  # a picture that cannot be read was left out, and has no hash
                self._data[name] = {"place": place}
        return prepared.inputs

    def setup(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return load_examples, (str(self._examples),)

    def parameters(self, values: Mapping[str, Value]) -> dict[str, Any]:
        return self._with(values).to_dict()

    def command(self, values: Mapping[str, Value]) -> Sequence[str]:
        return command(self._with(values))

    def describe(self, run: Run) -> None:
        assert self._prepared is not None
        write_whole(run.folder / INPUTS, json.dumps(self._prepared.inputs, indent=1).encode())
        run.book.change(data=self._data)
        found = self._prepared.bottlenecks
        run.tags["bottlenecks"] = f"{found.computed:,} computed, {found.cached:,} from the cache"

    def submit(self, engine: Engine, run: Run, values: Mapping[str, Value]) -> Future[Any]:
        def received(found: Sequence[tuple[int, float, Mapping[str, float]]]) -> None:
            run.book.record(
                [Measured(name, step, each, at) for step, at, metrics in found for name, each in metrics.items()]
            )

        return engine.submit(
            train_one,
            self._with(values).parameters,
            str(run.folder),
            dict(values),
            run.id,
            self.given.final_tensor_name,
            reports=Reports(received, BACKLOG),
        )

    def ended(self, run: Run, found: Any) -> Ended:
        return Ended(**found)

    def conclude(self, store: RunStore, run_id: str, values: Mapping[str, Value], register: str | None) -> str | None:
        assert self._prepared is not None
        given = self._with(values)
        with run(resume=run_id, reopen=True, store=store, kind=self.kind) as begun:
            begun.hparams = dict(values)
            state = State.from_file(begun.folder / CHECKPOINT)
            head, step = (state.best, state.best_step) if state.best is not None else (state.head, state.done - 1)
            trained = Trained(head, step, state, None)
            found = conclude(
                begun,
                given,
                self._prepared,
                trained,
                events=begun.folder / EVENTS,
                again=True,
                register=None if register is None else Promotion(name=registry_name(register)),
            )
        return found.model

    def measured(self, run: Run) -> Mapping[str, float] | None:
        return kept(run, State.from_file(run.folder / CHECKPOINT))


def command(given: Retraining) -> list[str]:
    """The command that trains this: ``tally train retrain ...``, with what is not as it is by itself."""
    plain = Retraining(image_dir=given.image_dir, backbone=given.backbone)
    words = ["tally", "train", "retrain", "--image_dir", given.image_dir, "--backbone", given.backbone]
    for name, value in given.settings.items():
        words += ["--set", f"{name}={json.dumps(value) if not isinstance(value, str) else value}"]
    before = plain.to_dict()
    for name, value in given.to_dict().items():
        if name in ("settings", "image_dir", "backbone") or value == before[name]:
            continue
        if name == "balanced":
            words.append("--plain-sampling")
        elif name == "keep_names":
            words.append("--keep-names")
        elif name == "final_test":
            words.append("--no-final-test")
        elif name in ("trust", "fine_tune"):
            words.append(f"--{name.replace('_', '-')}")
        else:
            words += [f"--{_FLAGS.get(name, name)}", repr(value) if isinstance(value, float) else str(value)]
    return words


# -- on a worker ---------------------------------------------------------------------------------------------


def load_examples(path: str) -> Examples:
    """What :meth:`RetrainTrials.prepare` wrote. Raises NotSharedError."""
    check_shared(path)
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    parts: Any = {name.removeprefix("part_"): rows for name, rows in arrays.items() if name.startswith("part_")}
    return Examples(arrays["features"], arrays["labels"], parts, int(arrays["classes"]))


def train_one(
    examples: Examples, parameters: Parameters, folder: str, values: Mapping[str, Value], run_id: str, tensor: str
) -> dict[str, Any]:
    """Train one head, from its checkpoint if there is one; returns the fields of :class:`Ended`.

    Reports lists of ``(step, time, metrics)``. Ends early once the task is asked to stop.
    """
    meter, place = Meter(), Path(folder)
    checkpoint, events = place / CHECKPOINT, place / EVENTS
    told = _Reporter(place / CURVE)
    begin = None
    if checkpoint.exists():
        begin = State.from_file(checkpoint)
        told.again(begin.done)
    summaries = None
    if can_write():
        summaries = Summaries(events, parameters.how_many_training_steps, tensor)
        with EventWriter(events) as file:
            file.hparams(values, name=run_id)

    def observe(evaluation: Evaluation) -> None:
        if summaries is not None:
            if evaluation.step == 0:
                summaries.graph(evaluation.head)
            summaries.evaluation(evaluation)

    def report(step: int, metrics: Mapping[str, float]) -> bool:
        told.add(step, metrics)
        return task.stopping()

    def keep(state: State) -> None:
        # In this order: a training that goes on from a checkpoint tells again what was measured before it.
        told.keep()
        if summaries is not None:
            summaries.flush()
        write_whole(checkpoint, state.to_bytes())

    try:
        trained = train(examples, parameters, report, begin=begin, observe=observe, keep=keep)
        keep(trained.state)
    finally:
        told.send()
        if summaries is not None:
            summaries.close()
    return {"step": trained.step, "stopped": trained.stopped, "cost": meter.cost()}


class _Reporter:
    """Sends evaluations to the trial's caller, some at a time, and keeps all of them in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._all: list[tuple[int, float, dict[str, float]]] = []
        self._sent = 0
        self._at = 0.0

    def again(self, done: int) -> None:
        """Tell what was measured in the first ``done`` steps, before this training was interrupted."""
        before = json.loads(self._path.read_text("utf-8"))
        self._all = [(step, at, metrics) for step, at, metrics in before if step < done]
        self.send()

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        self._all.append((step, time.time(), dict(metrics)))
        if time.monotonic() - self._at >= REPORT_SECONDS:
            self.send()

    def send(self) -> None:
        self._at = time.monotonic()
        if self._sent < len(self._all):
            task.report(self._all[self._sent :])
            self._sent = len(self._all)

    def keep(self) -> None:
        write_whole(self._path, json.dumps(self._all).encode())
