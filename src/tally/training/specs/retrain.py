"""``train: retrain``: the flags of ``tally train retrain`` as fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from pydantic import Field, create_model

from tally.errors import SpecError
from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.models.resolve import check_there
from tally.training.retrain import retraining
from tally.training.retrain.distortions import Distortions
from tally.training.retrain.examples import Parameters
from tally.training.retrain.retraining import Retraining, Watcher
from tally.training.runs.store import RunStore
from tally.training.specs.base import Attempt, EngineName, TrainingSpec, as_fields, made
from tally.training.sweeps.retrain import command

_PARTS: Mapping[str, Any] = {"parameters": Parameters, "distortions": Distortions}
_ELSEWHERE = ("settings", "out", "output_graph", "output_labels", "summaries_dir")
"""Fields of a retraining that are called otherwise here, or that a run writes to a folder of its own."""
_KINDS = (Retraining, Parameters, Distortions)


def _declared() -> dict[str, Any]:
    """The fields of a retraining as pydantic wants them: name to type and default."""
    found: dict[str, Any] = {}
    for kind in _KINDS:
        hints = get_type_hints(kind)
        for each in fields(kind):
            if each.name not in (*_PARTS, *_ELSEWHERE, "balanced"):
                found[each.name] = (hints[each.name], ... if each.default is MISSING else each.default)
    return found


class _OfRetraining(TrainingSpec):
    """See :class:`tally.training.retrain.retraining.Retraining`, its Parameters and Distortions.

    settings: ``set``, options of the backbone.
    """

    trains = retraining.KIND
    places = ("image_dir", "backbone", "bottleneck_dir")
    models = ("backbone",)

    settings: dict[str, Any] = Field(default={}, alias="set")
    plain_sampling: bool = False
    workers: int | None = Field(default=None, ge=1)
    device: str = "auto"
    engine: EngineName = "local"

    @property
    def metrics(self) -> Sequence[str]:
        own: Any = self
        return retraining.measures(final_test=own.final_test)

    def problems(self) -> list[str]:
        return super().problems() + as_fields(self.retraining)

    def check_there(self) -> None:
        check_there(str(self.backbone))  # type: ignore[attr-defined]

    def retraining(self) -> Retraining:
        """Raises SpecError."""
        given = {name: getattr(self, name) for name in _declared()} | {"balanced": not self.plain_sampling}
        problems: list[str] = []
        parts: dict[str, Any] = {}
        for name, kind in _PARTS.items():
            values = {each.name: given.pop(each.name) for each in fields(kind)}

            def make(name: str = name, kind: Any = kind, values: Any = values) -> None:
                parts[name] = kind(**values)

            problems += as_fields(make)
        if problems:
            raise SpecError(problems)
        return Retraining(**given, settings=self.settings, **parts)

    def train(self, run_id: str, attempt: Attempt, *, again: bool) -> None:
        given = made(self.retraining)
        workers = self.workers
        if again:  # whatever the file says by now: it goes on as it began
            given = Retraining.from_dict(RunStore.open().get(run_id).parameters)
            workers = None if given.fine_tune else workers  # as many as it began with
        retraining.retrain(
            given, register=self.promotion, resume=run_id if again else None, run_id=None if again else run_id,
            name=self.title, tags=attempt.tags, command=self.command(given), workers=workers, device=self.device,
            engine=self.engine, stop=attempt.stop, watcher=watcher(attempt),
        )  # fmt: skip

    def command(self, given: Retraining) -> list[str]:
        """That trains the same."""
        return [*command(given), *self.flags()]


RetrainSpec: Any = create_model("RetrainSpec", __base__=_OfRetraining, **_declared())


def watcher(attempt: Attempt) -> Watcher:
    """Tells in the log what happens, and stops the job that computes bottlenecks."""

    def drive(jobs: Jobs, job: str) -> JobRecord:
        return jobs.see_through(job, stop=attempt.stop)

    return Watcher(say=attempt.say, drive=drive)
