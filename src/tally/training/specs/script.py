"""``train: script``: the flags of ``tally train script`` as fields."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from tally.errors import RunError
from tally.training.promotion import withdraw
from tally.training.scripts.script import ScriptTraining, resumed
from tally.training.specs.base import Attempt, Duration, Text, Texts, TrainingSpec, made
from tally.training.sweeps.script import ScriptTrials


class OfScript(TrainingSpec):
    """See :class:`tally.training.scripts.script.ScriptTraining`. train_set, test_set: pairs ``[LABELS, IMAGES]``.
    checkpoints: the script goes on from what it has left, where it was killed.
    """

    places = ("script", "train_set", "test_set", "data", "folder")

    script: Text
    train_set: tuple[tuple[Text, Text], ...] = ()
    test_set: tuple[tuple[Text, Text], ...] = ()
    data: dict[str, Text] = Field(default={})
    arguments: Texts = ()
    folder: Text | None = None
    time_limit: Duration | None = None
    checkpoints: bool = False

    @field_validator("train_set", "test_set", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
        return [value] if is_pair else value

    @property
    def needs_name(self) -> bool:
        return False  # what becomes a model, the script says

    def check_there(self) -> None:
        made(self.training)

    def training(self, **more: Any) -> ScriptTraining:
        """Raises SpecError, SourceNotFoundError."""
        return ScriptTraining(
            script=Path(self.script), train_sets=self.train_set, test_sets=self.test_set, data=self.data,
            arguments=self.arguments, folder=Path(self.folder) if self.folder else None, time_limit=self.time_limit,
            **more,
        )  # fmt: skip


class ScriptSpec(OfScript):
    """param: become arguments ``--NAME VALUE``; true and nothing: ``--NAME`` alone."""

    trains = "script"

    param: dict[str, bool | int | float | str | None] = Field(default={})

    @property
    def goes_on(self) -> bool:
        return self.checkpoints

    @property
    def title(self) -> str:
        return self.name or Path(self.script).stem

    def check_there(self) -> None:
        made(self._whole)

    def _whole(self) -> ScriptTraining:
        given = {name: "" if value is None or value is True else _text(value) for name, value in self.param.items()}
        return self.training(parameters=given, name=self.title)

    def train(self, run_id: str, attempt: Attempt, *, again: bool) -> None:
        training = made(self._whole)
        if again:
            # What it had registered, it registers again.
            withdraw(run_id)
            with suppress(RunError):  # it was killed before it knew what it was given
                training = resumed(run_id)[1]
            ended = training.run(promotion=self.promotion, resume=run_id)
        else:
            command = ScriptTrials(training).command(training.known_parameters)
            ended = replace(training, command=[*command, *self.flags()]).run(
                promotion=self.promotion, run_id=run_id, tags=attempt.tags
            )
        if ended.by_user:
            raise KeyboardInterrupt
        if ended.state != "finished":
            raise RunError(f"run {ended.run_id} is {ended.state}: {ended.error}")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
