"""``sweep: retrain`` and ``sweep: script``: the flags of ``tally sweep`` as fields."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pydantic import Field, create_model

from tally.errors import RunNotFoundError
from tally.jobs.store import new_id
from tally.training.promotion import TAG
from tally.training.retrain.retraining import METRICS
from tally.training.runs.store import RunStore
from tally.training.specs.base import LOOK_SECONDS, Attempt, EngineName, Text, Trained, TrainingSpec, as_fields, made
from tally.training.specs.retrain import RetrainSpec, watcher
from tally.training.specs.script import OfScript
from tally.training.sweeps.base import Trials
from tally.training.sweeps.kinds import restored
from tally.training.sweeps.retrain import RetrainTrials
from tally.training.sweeps.sampling import SamplerName
from tally.training.sweeps.script import ScriptTrials
from tally.training.sweeps.store import SweepRecord, SweepStore
from tally.training.sweeps.sweep import Sweep, Watcher, sweep


class _OfSweep(TrainingSpec):
    """See :class:`tally.training.sweeps.sweep.Sweep`. param: NAME to VALUES, as of ``-p``, or a list of values."""

    param: dict[str, bool | int | float | str | list[bool | int | float | str]] = Field(min_length=1)
    trials: int | None = None
    parallel: int | None = Field(default=None, ge=1)
    engine: EngineName = "local"
    sampler: SamplerName = "tpe"
    sweep_seed: int = 1
    prune: bool = False

    @abstractmethod
    def trained(self, attempt: Attempt | None) -> tuple[Trials, dict[str, Any]]:
        """What each trial trains, and what else the sweep is told. Raises SpecError."""

    def _sweep(self, attempt: Attempt | None = None) -> Sweep:
        training, more = self.trained(attempt)
        texts = [f"{name}={_values(value)}" for name, value in self.param.items()]
        return Sweep(
            training=training, texts=texts, sampler=self.sampler, trials=self.trials, seed=self.sweep_seed,
            prune=self.prune, register=self.registered, alias=self.alias, gate=self.gate, name=self.title, **more,
        )  # fmt: skip

    def see_through(self, attempt: Attempt) -> Trained:
        record = self._sweep_before(attempt)
        if record is not None and record.state == "finished":
            return self._of_sweep(record)
        sweep_id = record.id if record is not None else new_id()
        if record is None:
            attempt.assign(sweep_id)
        attempt.check()
        # What was begun goes on as it began, whatever the file says by now.
        wanted = made(lambda: self._sweep(attempt)) if record is None else restored(record, watcher(attempt))
        given = {"sweep_id": sweep_id} if record is None else {"resume": sweep_id}
        sweep(
            wanted,
            parallel=self.parallel,
            engine=self.engine,
            tags=attempt.tags,
            stop=attempt.stop,
            watcher=Watcher(say=attempt.say),
            **given,
        )
        return self._of_sweep(SweepStore.open().get(sweep_id))

    def train(self, run_id: str, attempt: Attempt, *, again: bool) -> None:
        raise NotImplementedError("a sweep has many runs")

    def _sweep_before(self, attempt: Attempt) -> SweepRecord | None:
        while attempt.before is not None:
            try:
                record = SweepStore.open().get(attempt.before)
            except RunNotFoundError:
                return None
            if record.kind != self.trains or not record.alive:
                return record if record.kind == self.trains else None
            attempt.check()
            attempt.stop.wait(LOOK_SECONDS)
        return None

    def _of_sweep(self, record: SweepRecord) -> Trained:
        best = next((each for each in SweepStore.open().trials(record.id) if each.number == record.best), None)
        verdict = None if best is None else RunStore.open().get(best.run_id).tags.get(TAG)
        return Trained(record.id, record.state, record.error, record.model, verdict)


class _OfRetrainSweep(_OfSweep):
    """metric, prune_after: see :class:`tally.training.sweeps.sweep.Sweep`."""

    validation_batch_size: int = -1
    metric: Text = next(iter(METRICS))
    prune_after: int | None = None

    def problems(self) -> list[str]:
        return super().problems() + as_fields(self._sweep)

    def trained(self, attempt: Attempt | None) -> tuple[Trials, dict[str, Any]]:
        own: Any = self  # the fields of a retraining are there, too
        given = own.retraining()
        tell = None if attempt is None else watcher(attempt)
        trials = RetrainTrials(given, workers=own.workers, device=own.device, watcher=tell)
        after = given.parameters.how_many_training_steps // 10 if self.prune_after is None else self.prune_after
        # A metric that there is not, the sweep refuses.
        return trials, {"metric": self.metric, "lowest": METRICS.get(self.metric, True), "prune_after": after}


RetrainSweepSpec: Any = create_model("RetrainSweepSpec", __base__=(_OfRetrainSweep, RetrainSpec))


class ScriptSweepSpec(_OfSweep, OfScript):
    """metric, lowest, prune_after: see :class:`tally.training.sweeps.sweep.Sweep`."""

    trains = "script"

    metric: Text
    lowest: bool = False
    prune_after: int = 0

    def check_there(self) -> None:
        made(self._sweep)

    def trained(self, attempt: Attempt | None) -> tuple[Trials, dict[str, Any]]:
        given = {"metric": self.metric, "lowest": self.lowest, "prune_after": self.prune_after}
        return ScriptTrials(self.training(), goes_on=self.checkpoints), given


def _values(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_values(each) for each in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
