"""A training as a file describes it: the fields are the flags of its command.

It can be taken up again by another process, at any moment: an interval of a schedule has one run, and one version.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tally.engines.factory import checked as engine_name
from tally.errors import RunNotFoundError, SpecError
from tally.jobs.spec import problem_of
from tally.jobs.stop import Stop
from tally.jobs.store import new_id
from tally.text import seconds
from tally.training.promotion import TAG, Promotion, withdraw
from tally.training.runs.store import RunRecord, RunState, RunStore

LOOK_SECONDS = 1.0
"""Between two looks whether another process still trains."""

_FLAG = re.compile(r"--([\w-]+)")

Found = TypeVar("Found")


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """What one text with commas stands for."""
    return tuple(part for each in value.split(",") if (part := each.strip())) if isinstance(value, str) else value


def _duration(value: Any) -> Any:
    return seconds(value) if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_one_or_more)]
"""One, or a list."""
Names = Annotated[tuple[Text, ...], BeforeValidator(listed)]
"""A list, or one text with commas."""
EngineName = Annotated[str, AfterValidator(engine_name)]
Duration = Annotated[float, BeforeValidator(_duration), Field(gt=0)]
"""Seconds, or a text such as ``5m``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try at a training. before: the id that the try before it was given, of which it may be the rest; None if
    there was none. assign: is told the id before anything is begun. tags: of the run. say: gets lines.
    """

    before: str | None
    assign: Callable[[str], None]
    tags: Mapping[str, str] = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)
    say: Callable[[str], None] = lambda line: None

    def check(self) -> None:
        """Raises KeyboardInterrupt once it is asked to stop."""
        if self.stop.asked:
            raise KeyboardInterrupt


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of it. id: of the run, or of the sweep. state: of it; error: why. model: ``models:/NAME/N``.
    verdict: whether its alias points at it, and why; None where none was asked for."""

    id: str
    state: RunState
    error: str | None
    model: str | None
    verdict: str | None


class TrainingSpec(BaseModel, ABC):
    """The fields that all have in common.

    trains: the kind of its runs. places: fields that name files, folders or URLs, from the file's folder on. models:
    those that name a model. measures: names of metrics; None: any.
    registered: ``register``, the model's name in the registry. alias, gate: see :mod:`tally.training.promotion`.
    name: of the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    trains: ClassVar[str]
    places: ClassVar[Sequence[str]] = ()
    models: ClassVar[Sequence[str]] = ()
    measures: ClassVar[Sequence[str] | None] = None

    registered: Text | None = Field(default=None, alias="register")
    alias: Text | None = None
    gate: Texts = ()
    name: Text | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """A valid one. Raises SpecError with every problem. Nothing of what it names is looked at."""
        problems = []
        spec = None
        try:
            spec = cls.model_validate(fields)
        except ValidationError as error:
            problems += [problem_of(each, cls) for each in error.errors()]
            wrong = {each["loc"][0] for each in error.errors() if each["loc"]}
            others = {name: value for name, value in fields.items() if name not in wrong}
            # Something stands in for what is missing, so that what is wrong with the others is told, too.
            missing = {each["loc"][0]: each["loc"][0] for each in error.errors() if each["type"] == "missing"}
            with suppress(ValidationError):
                spec = cls.model_validate(others | missing)
        if spec is not None:
            problems += spec.problems()
        if problems:
            raise SpecError(problems)
        return spec if spec is not None else cls.model_validate(fields)

    def problems(self) -> list[str]:
        """What is wrong beyond the types of its fields; :meth:`describe` finds it."""
        if self.needs_name and self.registered is None:
            return [
                "register: is needed, the model's name in the registry",
                *as_fields(lambda: Promotion.of("model", self.alias, self.gate, metrics=self.metrics)),
            ]
        return as_fields(lambda: self.promotion)

    @property
    def metrics(self) -> Sequence[str] | None:
        """Those that it measures with these fields."""
        return self.measures

    @property
    def needs_name(self) -> bool:
        """Whether its model is always registered."""
        return True

    @property
    def goes_on(self) -> bool:
        """Whether a run whose process was lost goes on; otherwise another begins in its place."""
        return True

    @property
    def promotion(self) -> Promotion | None:
        """Raises SpecError with every problem."""
        return Promotion.of(self.registered, self.alias, self.gate, metrics=self.metrics)

    def flags(self) -> list[str]:
        """Of the command that trains the same: what becomes of its model."""
        promotion = self.promotion
        return [] if promotion is None else promotion.flags()

    def check_gate(self) -> None:
        """Raises SpecError where its gate compares with what there is not."""
        if (promotion := self.promotion) is not None:
            promotion.check()

    @property
    def title(self) -> str:
        """The name of its run."""
        return self.name or self.registered or self.trains

    def check_there(self) -> None:
        """Raises SpecError, SourceNotFoundError, ModelNotFoundError where something that it names is not there."""

    def named(self) -> Iterable[tuple[str, str]]:
        """Places that it names, each with its field."""
        for name in self.places:
            for place in texts_in(getattr(self, name)):
                yield ("model" if name in self.models else name), place

    def see_through(self, attempt: Attempt) -> Trained:
        """Train, or go on, or wait for the process that does; it may have been done before.

        Raises KeyboardInterrupt once it is asked to stop, and what the training raises.
        """
        record = self._before(attempt)
        if record is not None and record.state == "finished":
            return self._told(record)
        if record is not None and not self.goes_on:
            withdraw(record.id)
        again = record is not None and self.goes_on
        run_id = record.id if record is not None and again else new_id()
        if not again:
            # Before it begins: a process that is killed between the two leaves an id that no run has.
            attempt.assign(run_id)
        attempt.check()
        self.check_gate()
        self.train(run_id, attempt, again=again)
        return self._told(RunStore.open().get(run_id))

    @abstractmethod
    def train(self, run_id: str, attempt: Attempt, *, again: bool) -> None:
        """Train as the run with this id, a new one or (``again``) one that goes on, to its end."""

    def _before(self, attempt: Attempt) -> RunRecord | None:
        """The run of the try before, once no process trains it any more."""
        runs = RunStore.open()
        if attempt.before is None:
            return None
        while True:
            try:
                record = runs.get(attempt.before)
            except RunNotFoundError:
                return None
            if record.kind != self.trains:  # the schedule was changed meanwhile
                return None
            if not record.alive:
                return record
            attempt.check()
            attempt.stop.wait(LOOK_SECONDS)

    def _told(self, record: RunRecord) -> Trained:
        mine = [each for each in record.models if self.registered is None or _is_of(each, self.registered)]
        model = mine[-1] if mine else None
        return Trained(record.id, record.state, record.error, model, record.tags.get(TAG))


def _is_of(version: str, name: str) -> bool:
    from tally.models.registry import registry_name

    return version.startswith(f"models:/{registry_name(name)}/")


def as_fields(make: Callable[[], object]) -> list[str]:
    """The problems of what is made, with fields where they name flags."""
    try:
        make()
    except SpecError as error:
        return [_FLAG.sub(lambda found: found[1].replace("-", "_"), each) for each in error.problems]
    return []


def made(make: Callable[[], Found]) -> Found:
    """What is made. Raises SpecError, with fields where its problems name flags."""
    problems = as_fields(make)
    if problems:
        raise SpecError(problems)
    return make()


def texts_in(value: Any) -> Iterable[str]:
    """All texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from texts_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from texts_in(each)
