"""``train: anomaly``: the flags of ``tally train anomaly`` as fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from tally.training.anomaly import training as anomaly
from tally.training.anomaly.training import Recipe, Step, Training
from tally.training.runs.tracking import run
from tally.training.specs.base import Attempt, Duration, Names, Text, Texts, TrainingSpec, as_fields, made


class AnomalySpec(TrainingSpec):
    """See :class:`tally.training.anomaly.training.Training` and its Recipe. detector: ``kind``."""

    trains = "anomaly"
    places = ("source",)
    measures = anomaly.METRICS

    source: Texts = Field(min_length=1)
    by: Names
    value: Names
    detector: Literal["ocsvm", "isolation-forest"] = Field(default="ocsvm", alias="kind")
    nu: float = 0.01
    gamma: float | Literal["scale", "auto"] = "scale"
    time: Text | None = None
    time_unit: Text | None = None
    timezone: Text | None = None
    window: Duration | None = None
    aggregate: Names = ("mean",)
    path_columns: Text | None = None
    where: Text | None = None
    csv: dict[str, Any] = Field(default={})
    max_rows: int = 2000
    workers: int | None = None
    seed: int = 1

    @field_validator("nu", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        return float(value.strip()[:-1]) / 100 if isinstance(value, str) and value.strip().endswith("%") else value

    def problems(self) -> list[str]:
        return super().problems() + as_fields(self._training)

    def _training(self) -> Training:
        recipe = Recipe(kind=self.detector, nu=self.nu, gamma=self.gamma, max_rows=self.max_rows, seed=self.seed)
        return Training(
            sources=self.source, by=self.by, values=self.value, recipe=recipe, time=self.time, time_unit=self.time_unit,
            timezone=self.timezone, window=self.window, aggregate=self.aggregate, path_columns=self.path_columns,
            where=self.where, csv=self.csv, workers=self.workers,
        )  # fmt: skip

    def train(self, run_id: str, attempt: Attempt, *, again: bool) -> None:
        training, promotion = made(self._training), self.promotion
        assert promotion is not None

        def listen(step: Step) -> None:
            attempt.check()

        given = self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"name", "registered", "gate"})
        begun = (
            run(resume=run_id)
            if again
            else run(self.title, given, kind=self.trains, run_id=run_id, tags=attempt.tags, command=self.command())
        )
        with begun:
            anomaly.train(training, begun, promotion, listen=listen, say=attempt.say)

    def command(self) -> list[str]:
        """That trains the same."""
        words = ["tally", "train", "anomaly", *self.source]
        others = {"source", "csv", *TrainingSpec.model_fields}
        for name, value in self.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=others).items():
            shown = ",".join(value) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", f"{shown}s" if name == "window" else shown]
        return [*words, *self.flags()] + [
            word for name, value in self.csv.items() for word in ("--csv", f"{name}={value}")
        ]
