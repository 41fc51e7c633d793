"""A training in each interval: one run, or one sweep, and one version of its model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from tally.errors import RunError
from tally.jobs.signals import stop_on_signals
from tally.jobs.stop import Stop
from tally.training.promotion import INTERVAL, INTERVAL_START, SCHEDULE
from tally.training.specs.base import Attempt, TrainingSpec
from tally.training.specs.kinds import placed, training_of
from tally.triggers.works.base import Ended, Taken, Work

log = logging.getLogger("tally")


@dataclass(frozen=True, slots=True)
class TrainingWork(Work):
    spec: TrainingSpec
    is_sweep: bool

    @classmethod
    def read(cls, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
        return placed(fields, folder)

    @classmethod
    def make(cls, fields: Mapping[str, Any]) -> Self:
        return cls(training_of(fields), "sweep" in fields)

    def named(self) -> Iterable[tuple[str, str]]:
        return self.spec.named()

    def check_there(self) -> None:
        self.spec.check_there()

    def check_named(self) -> None:
        self.spec.check_gate()

    def see_through(self, taken: Taken) -> Ended:
        run, stop = taken.run, Stop()
        column = "sweep_id" if self.is_sweep else "training_id"
        assign = partial(self._assign, taken, column)
        attempt = Attempt(
            before=getattr(run, column), assign=assign, stop=stop, say=log.info,
            tags={SCHEDULE: run.schedule, INTERVAL: taken.span, INTERVAL_START: str(run.interval_start)},
        )  # fmt: skip
        with stop_on_signals(stop):
            try:
                trained = self.spec.see_through(attempt)
            except KeyboardInterrupt:
                return Ended("stopped")
        if trained.state != "finished":
            raise RunError(f"{column.removesuffix('_id')} {trained.id} is {trained.state}: {trained.error}")
        return Ended("finished", trained.verdict or trained.model or "it registered no model")

    @staticmethod
    def _assign(taken: Taken, column: str, training: str) -> None:
        taken.patiently(lambda: taken.assign(**{column: training}))
