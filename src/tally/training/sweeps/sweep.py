"""A sweep: many trainings over a space of parameters, each a task of the engine and a run, under one lease.

Workers know no database: they report what they measure, and are stopped, through the engine. A sweep whose process was
killed goes on: what has ended stays, and trials that were running begin again with the same parameters, from their
checkpoints.
"""

from __future__ import annotations

import json
import logging
import math
import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tally.config import make_private
from tally.database.leased import Lease, folder_of
from tally.database.renewer import LeaseRenewer
from tally.database.waiting import Patience
from tally.engines.base import Engine, Limits
from tally.engines.factory import make_engine
from tally.errors import (
    OwnershipLostError,
    RunError,
    RunNotFoundError,
    RunStateError,
    SourceChangedError,
    SpecError,
    TallyError,
    WorkerError,
    error_line,
)
from tally.jobs.stop import Stop
from tally.jobs.store import new_id
from tally.models.registry import open_registry
from tally.storage import failure
from tally.storage.publish import write_whole
from tally.training.promotion import Promotion, Verdict
from tally.training.runs.store import EVENTS, RunStore
from tally.training.runs.store import Value as Measured
from tally.training.runs.tracking import FLUSH_SECONDS, DatabaseBook, Run, run
from tally.training.sweeps import sampling
from tally.training.sweeps.base import Ended, NotSharedError, Trials
from tally.training.sweeps.sampling import Judge, Past, SamplerName
from tally.training.sweeps.space import Choices, Space, Value, read
from tally.training.sweeps.store import SweepStore

log = logging.getLogger("tally")

ATTEMPTS = 3
"""How often a trial is begun whose worker is lost, without the sweep itself having been interrupted."""
STOP_SECONDS = 15.0
"""How long a trial may take to end, once it is asked to; a script has less (:mod:`tally.training.scripts.script`)."""
INPUTS, BOARD, PRINTED = "inputs.json", "tensorboard", "workers.txt"
"""In the sweep's folder: hashes of what is trained from; a folder for TensorBoard; what workers print."""
TRIAL = "trial"
"""The tag of a run that says which trial it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is swept. Raises SpecError with every problem.

    training: what each trial trains. texts: the space, ``NAME=...`` each: see :mod:`tally.training.sweeps.space`.
    trials: how many; None: the whole grid, or 20. metric: that trials are compared by; lowest: the lowest is the best.
    prune: stop trials that are worse than the median of others at the same step, but none before step ``prune_after``.
    register: the name under which the best becomes a version in the registry. alias, gate: whether that alias points at
    it then, see :mod:`tally.training.promotion`.
    """

    training: Trials
    texts: Sequence[str]
    metric: str
    lowest: bool
    sampler: SamplerName = "tpe"
    trials: int | None = None
    seed: int = 1
    prune: bool = False
    prune_after: int = 0
    register: str | None = None
    alias: str | None = None
    gate: Sequence[str] = ()
    name: str | None = None
    space: Space = field(init=False, repr=False)
    count: int = field(init=False, repr=False)
    promotion: Promotion | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        problems = [
            f"--{name}: at least {least}, not {value}"
            for name, value, least in (
                ("trials", 1 if self.trials is None else self.trials, 1),
                ("seed", self.seed, 0),
                ("prune-after", self.prune_after, 0),
            )
            if value < least
        ]
        if not self.metric.strip():
            problems.append("--metric: is empty")
        try:
            self.training.check_metric(self.metric)
        except SpecError as error:
            problems += error.problems
        promotion = None
        try:
            promotion = Promotion.of(self.register, self.alias, self.gate, metrics=self.training.measures)
        except SpecError as error:
            problems += error.problems
        object.__setattr__(self, "promotion", promotion)
        object.__setattr__(self, "space", read(self.texts, self.training.types))
        for corner in _corners(self.space):
            try:
                self.training.check(corner)
            except SpecError as error:
                problems += [each for each in error.problems if each not in problems]
        if problems:
            raise SpecError(problems)
        object.__setattr__(self, "count", sampling.count(self.sampler, self.space, self.trials))

    def to_dict(self) -> dict[str, Any]:
        """All of it but ``training``'s own, which is under that name as its ``to_dict`` gives it."""
        return {
            "training": self.training.to_dict(), "texts": list(self.texts), "metric": self.metric,
            "lowest": self.lowest, "sampler": self.sampler, "trials": self.trials, "seed": self.seed,
            "prune": self.prune, "prune_after": self.prune_after, "register": self.register, "alias": self.alias,
            "gate": list(self.gate), "name": self.name,
        }  # fmt: skip


def _corners(space: Space) -> list[dict[str, Value]]:
    """Combinations in which each parameter's extreme values are at least once: what is wrong, is wrong there."""
    ends = {name: each.values if isinstance(each, Choices) else (each.low, each.high) for name, each in space.items()}
    longest = max(map(len, ends.values()))
    return [{name: each[min(at, len(each) - 1)] for name, each in ends.items()} for at in range(longest)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Who is told what happens. say: a line. begun: the sweep's id, its folder, and the trials that it has in all.
    decided: a trial's number, and how it ended."""

    say: Callable[[str], None] = lambda line: None
    begun: Callable[[str, Path, int], None] = lambda sweep, folder, count: None
    decided: Callable[[int, Past], None] = lambda number, past: None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a sweep ended. trials: by number. best: number of the best; run: its run. model: ``models:/NAME/N``. verdict:
    whether the alias points at it, where one was asked for."""

    sweep: str
    trials: Mapping[int, Past]
    best: int
    run: str
    model: str | None
    verdict: Verdict | None


def sweep(
    wanted: Sweep,
    *,
    parallel: int | None = None,
    engine: str = "local",
    resume: str | None = None,
    sweep_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    stop: Stop | None = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Run a sweep to its end, as a new one or (``resume``, an id) one that was interrupted, has failed or was killed.

    parallel: trials at once; one for each core by default. engine: who runs them, see :mod:`tally.engines.factory`:
    workers on other machines need the files of this one at the same place, ``TALLY_HOME`` among them. sweep_id: of a
    new one. tags: of the best run, if an alias is to point at its model. stop: once asked, trials are put down with a
    checkpoint, and KeyboardInterrupt is raised.

    Raises RunError where Optuna is missing, or no trial has a result; RunStateError, OwnershipLostError; and what
    ``training.prepare`` and ``training.conclude`` raise.
    """
    sampling.library()
    if parallel is not None and parallel < 1:
        raise SpecError(f"--parallel: at least 1, not {parallel}")
    if wanted.promotion is not None:
        wanted.promotion.check()
    store, runs, stop, watcher = SweepStore.open(), RunStore.open(), stop or Stop(), watcher or Watcher()
    if resume is None:
        sweep_id = sweep_id or new_id()
        folder = folder_of(SweepStore.word, sweep_id)
        lease = store.create(
            sweep_id=sweep_id, name=wanted.name, kind=wanted.training.kind, folder=str(folder), spec=wanted.to_dict()
        )
    else:
        lease = store.resume(resume)
        folder = Path(store.get(lease.id).folder)
    drive = _Drive(wanted, store, runs, lease, folder, tags or {}, stop, watcher)
    return drive.run(parallel, engine)


@dataclass(slots=True)
class _Live:
    """A trial that a worker trains."""

    run: Run
    future: Future[Any]


class _Drive:
    """The process that hands trials to workers. One thread does all of it; others put events into ``_events``."""

    def __init__(
        self,
        wanted: Sweep,
        store: SweepStore,
        runs: RunStore,
        lease: Lease,
        folder: Path,
        tags: Mapping[str, str],
        stop: Stop,
        watcher: Watcher,
    ) -> None:
        self._wanted, self._store, self._runs, self._lease = wanted, store, runs, lease
        self._folder, self._tags, self._stop, self._watcher = folder, tags, stop, watcher
        self._training = wanted.training
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._patience = Patience(what=f"sweep {lease.id}")
        self._past: dict[int, Past] = {}
        self._runs_of: dict[int, str] = {}
        self._attempts: dict[int, int] = {}
        self._live: dict[int, _Live] = {}
        self._again: deque[int] = deque()
        # Trials that have ended, and are not decided yet: their result, or why they failed.
        self._ended: dict[int, tuple[float | None, int | None, str | None]] = {}
        self._judges: dict[int, Judge] = {}
        self._decided: set[int] = set()
        self._stopping = False

    # -- for Stop ------------------------------------------------------------------------------------------

    def stop(self, *, now: bool = False) -> None:
        self._events.put(("stop", now))

    # -- from end to end -----------------------------------------------------------------------------------

    def run(self, parallel: int | None, engine: str) -> Outcome:
        sweep_id = self._lease.id
        renewer = LeaseRenewer(
            lambda: self._store.renew(self._lease), every=FLUSH_SECONDS, what=f"sweep {sweep_id}",
            patience=self._patience, lost=lambda error: self._events.put(("lost", error)),
        )  # fmt: skip
        try:
            with renewer:
                make_private(self._folder)
                self._watcher.begun(sweep_id, self._folder, self._wanted.count)
                self._remember(self._training.prepare(self._folder, engine))
                if self._wanted.promotion is not None:
                    self._wanted.promotion.check(self._training.measures)  # more is known of that now
                self._recall()
                self._train(parallel, engine)
                best = self._best()
                self._watcher.say(f"the best is trial {best}")
                model = self._training.conclude(
                    self._runs, self._runs_of[best], self._past[best].parameters, self._wanted.register
                )
                verdict = self._verdict(self._runs_of[best], model)
            self._patience(lambda: self._store.finish(self._lease, "finished", best=best, model=model))
        except OwnershipLostError:
            raise
        except (KeyboardInterrupt, GeneratorExit):
            self._put_down("interrupted", "it was stopped by its user")
            raise
        except BaseException as error:
            self._put_down("failed", error_line(error))
            raise
        return Outcome(sweep_id, self._past, best, self._runs_of[best], model, verdict)

    def _verdict(self, best: str, model: str | None) -> Verdict | None:
        """Whether the alias points at the model of the best run."""
        promotion = self._wanted.promotion
        if model is None or promotion is None or promotion.alias is None:
            return None
        registry = open_registry()
        with run(resume=best, reopen=True, store=self._runs) as begun:
            begun.tags.update(self._tags)
            return promotion.decide(begun, registry.get(model), registry, measured=self._training.measured(begun))

    def _put_down(self, state: Any, error: str) -> None:
        with suppress(OwnershipLostError):
            self._patience(lambda: self._store.finish(self._lease, state, error=error))

    def _remember(self, inputs: Mapping[str, str]) -> None:
        """Raises SourceChangedError if what trials are trained from is not what the sweep began with."""
        place = self._folder / INPUTS
        if place.exists():
            known = json.loads(place.read_text("utf-8"))
            changed = [name for name, content in inputs.items() if known.get(name) != content]
            if changed:
                raise SourceChangedError(
                    f"sweep {self._lease.id}: the {', '.join(changed)} have changed since it began",
                    hint="Begin a new sweep; trials that were trained from other data cannot be compared.",
                )
        write_whole(place, json.dumps(dict(inputs), indent=1).encode())

    def _recall(self) -> None:
        """What is known of trials, when a sweep goes on."""
        known = self._store.trials(self._lease.id)
        mine = {each.run_id for each in known}
        for each in self._runs.list(sweep=self._lease.id, limit=100_000).runs:
            # Begun just before the process was killed. One with metrics was given up: its trial has another run.
            if each.id not in mine and not each.alive and not each.metrics:
                self._runs.remove(each)
        for trial in known:
            past = Past(trial.parameters)
            self._past[trial.number], self._runs_of[trial.number] = past, trial.run_id
            if trial.state == "running":
                self._again.append(trial.number)
                continue
            past.values = self._curve(trial.run_id)
            if trial.state == "pruned":
                past.state, past.value, past.step = "pruned", trial.value, trial.step
                self._decided.add(trial.number)
            else:
                self._ended[trial.number] = (trial.value, trial.step, trial.error)
        if known:
            ended = len(known) - len(self._again)
            self._watcher.say(f"{ended:,} trials have ended already; {len(self._again):,} that were running go on")

    def _curve(self, run_id: str) -> dict[int, float]:
        metric = self._wanted.metric
        if metric not in self._runs.get(run_id).metrics:
            return {}
        curve = self._runs.values(run_id, [metric])[metric]
        return dict(zip(curve.steps, curve.values, strict=True))

    # -- trials --------------------------------------------------------------------------------------------

    def _train(self, parallel: int | None, name: str) -> None:
        self._decide(None)
        engine = make_engine(name)
        slots = min(parallel or engine.default_slots(), max(1, self._wanted.count))
        function, arguments = self._training.setup()
        engine.start(function, arguments, slots=slots, limits=Limits(), log=self._folder / PRINTED)
        in_order = False
        try:
            self._stop.attach(self)
            while not self._stopping or self._live:
                while not self._stopping and len(self._live) < slots and (number := self._next()) is not None:
                    self._begin(engine, number)
                if not self._live and not self._stopping:
                    break
                self._handle(engine, self._events.get())
            in_order = True
        finally:
            engine.stop(kill=not in_order)
            for live in self._live.values():
                self._training.released(live.run)
                with suppress(TallyError):
                    live.run.finish("killed", "its sweep was stopped")
        if self._stopping:
            raise KeyboardInterrupt

    def _next(self) -> int | None:
        """The trial to be begun next, of those that were running before, or new."""
        if self._again:
            return self._again.popleft()
        number = len(self._past)
        return number if number < self._wanted.count else None

    def _begin(self, engine: Engine, number: int) -> None:
        wanted, training = self._wanted, self._training
        if number not in self._past:
            others = [self._past[each] for each in sorted(self._past)]
            drawn = sampling.draw(
                wanted.sampler, wanted.space, seed=wanted.seed, number=number, past=others, lowest=wanted.lowest
            )
            self._past[number] = Past(drawn)
        past = self._past[number]
        self._judges.pop(number, None)
        begun = self._run(number, past.parameters)
        # What was measured before is told again, or it is not, by a script.
        past.values = self._curve(begun.id) if begun.resumed else {}
        self._runs_of[number] = begun.id
        self._attempts[number] = self._attempts.get(number, 0) + 1
        self._patience(lambda: self._store.begin_trial(self._lease, number, begun.id, past.parameters))
        self._link(number, begun)
        assert isinstance(begun.book, DatabaseBook)
        begun.book.told = lambda values: self._events.put(("values", number, values))
        future = training.submit(engine, begun, past.parameters)
        self._live[number] = _Live(begun, future)
        future.add_done_callback(lambda done: self._events.put(("done", number, done)))

    def _run(self, number: int, values: Mapping[str, Value]) -> Run:
        """The run of a trial: the one that it had, where that goes on, or a new one."""
        training, before = self._training, self._runs_of.get(number)
        if before is not None and training.goes_on:
            try:
                return run(resume=before, reopen=True, store=self._runs)
            except RunNotFoundError:  # somebody has deleted it
                pass
            except RunStateError:
                # Its lease is not over yet, though this process has the sweep's: of a machine that is gone.
                raise RunStateError(
                    f"run {before} of trial {number} is still held by the process that was lost",
                    hint="Try again in half a minute.",
                ) from None
        name = self._wanted.name or self._lease.id
        begun = run(
            f"{name} {number}", training.parameters(values), kind=training.kind, sweep=self._lease.id,
            tags={TRIAL: str(number)}, command=training.command(values), code=training.code, store=self._runs,
        )  # fmt: skip
        training.describe(begun)
        return begun

    def _link(self, number: int, begun: Run) -> None:
        """Have TensorBoard find the trial in the folder of the sweep."""
        board = self._folder / BOARD
        try:
            board.mkdir(exist_ok=True)
            for old in board.glob(f"{number:04d} *"):
                old.unlink()
            (board / f"{number:04d} {begun.id}").symlink_to(begun.folder / EVENTS)
        except OSError as error:
            raise failure("write", str(board), error) from error

    def _handle(self, engine: Engine, event: tuple[Any, ...]) -> None:
        match event:
            case ("values", number, values):
                self._measured(engine, number, values)
            case ("done", number, future):
                self._done(number, future)
                self._decide(engine)
            case ("stop", now):
                self._stopping = True
                for live in self._live.values():
                    engine.stop_task(live.future, seconds=0 if now else STOP_SECONDS)
            case ("lost", error):
                raise error

    def _measured(self, engine: Engine, number: int, values: Sequence[Measured]) -> None:
        past = self._past[number]
        if past.state != "running":  # it has been judged, and is about to stop
            return
        mine = {each.step: each.value for each in values if each.name == self._wanted.metric}
        if mine:
            past.values.update(mine)
            self._decide_one(engine, number)

    def _done(self, number: int, future: Future[Any]) -> None:
        """A trial's task is over: note its result, or have it begin again."""
        live, past = self._live.pop(number), self._past[number]
        training, begun = self._training, live.run
        pruned = past.state == "pruned"
        ended = Ended()
        lost: WorkerError | None = None
        try:
            found = future.result()
        except CancelledError:
            lost = WorkerError("it was stopped before it began")
        except WorkerError as error:
            lost = error
        except NotSharedError:  # no other trial would do better
            begun.finish("failed", "its worker does not see the sweep's files")
            raise
        except Exception as error:
            ended = Ended(error=error_line(error))
        else:
            ended = training.ended(begun, found)
        training.released(begun)
        assert isinstance(begun.book, DatabaseBook)
        begun.book.measured = ended.cost or begun.book.measured
        if pruned:
            begun.tags["pruned"] = f"at step {past.step}"
            begun.finish("finished")
            self._settle(number)
        elif self._stopping and (lost is not None or ended.stopped):
            begun.finish("killed", "its sweep was stopped by its user")
        elif lost is not None and self._attempts[number] < ATTEMPTS:
            begun.finish("interrupted", lost.message)
            self._watcher.say(f"trial {number} is begun again: {lost.message}")
            self._again.append(number)
        else:
            value, step, reason = self._result(past, ended, lost)
            begun.finish("failed" if reason else "finished", reason)
            state: Any = "failed" if reason else "finished"
            self._patience(
                lambda: self._store.end_trial(self._lease, number, state, value=value, step=step, error=reason)
            )
            self._ended[number] = (value, step, reason)

    def _result(
        self, past: Past, ended: Ended, lost: WorkerError | None
    ) -> tuple[float | None, int | None, str | None]:
        """A trial's value, the step that it is of, and why it failed."""
        metric = self._wanted.metric
        if lost is not None:
            return None, None, f"its worker was lost {ATTEMPTS} times: {lost.message}"
        if ended.error is not None:
            return None, None, ended.error
        if not past.values:
            return None, None, f"it has not measured {metric!r}: see --metric"
        step = max(past.values) if ended.step is None else ended.step
        value = past.values.get(step, past.values[max(past.values)])
        if not math.isfinite(value):
            return None, None, f"{metric} is {value} at step {step}"
        return value, step, None

    # -- verdicts ------------------------------------------------------------------------------------------

    def _decide(self, engine: Engine | None) -> None:
        """Look at all trials that are not decided, in order: a verdict may make another possible."""
        for number in sorted(self._past.keys() - self._decided):
            self._decide_one(engine, number)

    def _decide_one(self, engine: Engine | None, number: int) -> None:
        """Prune a trial, or have its result count, as soon as those before it allow that."""
        past = self._past[number]
        if past.state != "running":
            return
        if self._wanted.prune:
            judge = self._judge(number)
            if judge is None:
                return
            if (at := judge.pruned_at(past.values)) is not None:
                past.state, past.step, past.value = "pruned", at, past.values[at]
                if (live := self._live.get(number)) is None:
                    self._settle(number)
                elif engine is not None:
                    engine.stop_task(live.future, seconds=STOP_SECONDS)
                self._is_decided(number)
                return
        if number in self._ended:
            value, step, error = self._ended[number]
            past.state, past.value, past.step = "failed" if error else "finished", value, step
            self._is_decided(number)

    def _judge(self, number: int) -> Judge | None:
        """None while trials that this one is judged against are not decided."""
        if number not in self._judges:
            against = sampling.judged_against(number)
            if not self._decided.issuperset(against):
                return None
            self._judges[number] = Judge(
                [self._past[each] for each in against], lowest=self._wanted.lowest, after=self._wanted.prune_after
            )
        return self._judges[number]

    def _settle(self, number: int) -> None:
        """Write that a trial was pruned."""
        past = self._past[number]
        self._patience(lambda: self._store.end_trial(self._lease, number, "pruned", value=past.value, step=past.step))

    def _is_decided(self, number: int) -> None:
        self._decided.add(number)
        self._judges.pop(number, None)
        self._watcher.decided(number, self._past[number])

    def _best(self) -> int:
        """Raises RunError if no trial has a result."""
        finished = {number: each for number, each in self._past.items() if each.state == "finished"}
        if not finished:
            reasons = [self._ended[number][2] for number in sorted(self._ended)]
            raise RunError(
                f"none of {len(self._past):,} trials has a result" + (f"; the first: {reasons[0]}" if reasons else ""),
                hint=f"'tally sweep show {self._lease.id}' tells of each; 'tally runs show RUN' of one.",
            )
        sign = 1 if self._wanted.lowest else -1
        return min(finished, key=lambda number: (sign * (finished[number].value or 0.0), number))
