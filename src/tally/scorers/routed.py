"""The model that each message chooses, in the place of a job's model; see :mod:`tally.models.route`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tally.errors import SpecError
from tally.models.base import Candidate, Kind, ModelRequest
from tally.models.hashing import combined
from tally.models.reference import ModelRef
from tally.models.route import Route
from tally.scorers.base import Results, Scorer


class RoutedKind(Kind):
    """No model of its own: it has no content, and its hash is that of nothing."""

    reads_files = False

    def resolve(self, found: Candidate, request: ModelRequest) -> ModelRef:
        Route(found.entry)
        if request.settings:
            raise SpecError(
                f"{', '.join(request.settings)}: cannot be set of models that messages choose",
                hint="Say it in each model's tally.yaml, and register that.",
            )
        return ModelRef(
            kind=self.name,
            name=found.entry,
            location=Path("/"),
            entry=found.entry,
            files=(),
            hash=combined(()),
            trusted=request.trust,
        )

    def create(self, ref: ModelRef) -> Scorer:
        return RoutedScorer(ref.entry, trusted=ref.trusted)

    def package(self, ref: ModelRef) -> dict[str, Any]:
        raise SpecError(f"{ref.name} is chosen by each message, and no model")


class RoutedScorer(Scorer):
    """Stands for the models that messages choose, until there is a message."""

    input = "bytes"

    def __init__(self, template: str, *, trusted: bool) -> None:
        self.template, self.trusted = template, trusted

    def score(self, batch: Any) -> Results:
        raise TypeError(f"{self.template} is chosen by each message")

    def describe(self) -> str:
        return f"{self.template}, as each message says"
