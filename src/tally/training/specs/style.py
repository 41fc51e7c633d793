"""``train: style``: the flags of ``tally train style`` as fields."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from tally.errors import SourceNotFoundError
from tally.training.runs.tracking import run
from tally.training.specs.base import Attempt, Text, TrainingSpec, as_fields
from tally.training.style import training as style
from tally.training.style.training import Step, Training


class StyleSpec(TrainingSpec):
    """See :class:`tally.training.style.training.Training`."""

    trains = "style"
    places = ("style", "content", "vgg")
    measures = style.METRICS

    style: Text
    content: Text | None = None
    steps: int = 1000
    size: int = 384
    strength: float = 1.0
    vgg: Text | None = None
    seed: int = 1

    def problems(self) -> list[str]:
        found = super().problems()
        with suppress(SourceNotFoundError):  # it may come by then
            found += as_fields(self._training)
        return found

    def check_there(self) -> None:
        self._training()

    def _training(self) -> Training:
        return Training(
            style=Path(self.style), content=Path(self.content) if self.content else None, steps=self.steps,
            size=self.size, strength=self.strength, vgg=Path(self.vgg) if self.vgg else None, seed=self.seed,
        )  # fmt: skip

    def train(self, run_id: str, attempt: Attempt, *, again: bool) -> None:
        training, promotion = self._training(), self.promotion
        assert promotion is not None

        def listen(step: Step) -> None:
            attempt.check()

        places = {name: value for name in self.places if (value := getattr(self, name)) is not None}
        given: dict[str, Any] = {"steps": self.steps, "size": self.size, "strength": self.strength, "seed": self.seed}
        given |= {name: Path(value).name for name, value in places.items()}
        begun = (
            run(resume=run_id)
            if again
            else run(
                self.title, given, kind=self.trains, run_id=run_id, tags=attempt.tags, data=places,
                command=self.command(),
            )
        )  # fmt: skip
        with begun:
            style.train(training, begun, promotion, listen=listen)

    def command(self) -> list[str]:
        """That trains the same."""
        words = ["tally", "train", "style"]
        for name, value in self.model_dump(exclude_defaults=True, exclude={*TrainingSpec.model_fields}).items():
            words += [f"--{name}", str(value)]
        return [*words, *self.flags()]
