"""What becomes of a trained model: it is registered once, and a gate decides whether an alias points at it.

A gate is a list of conditions on what the training measured: ``accuracy >= 0.97``, and ``accuracy >= champion``: not
worse than the version that the alias ``champion`` points at. Which way is better, the sign says.
"""

from __future__ import annotations

import json
import math
import operator
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tally.errors import ModelNotFoundError, RunNotFoundError, SpecError
from tally.storage.publish import write_whole
from tally.text import did_you_mean
from tally.training.runs.store import RunStore
from tally.training.runs.tracking import DatabaseBook, Run

if TYPE_CHECKING:
    from tally.models.registry import ModelVersion, Registry

CHAMPION = "champion"
"""The alias that a gate decides about where no other is named."""
TAG = "gate"
"""The tag of a run that says what the gate decided, and why."""

SCHEDULE, INTERVAL, INTERVAL_START = "schedule", "interval", "interval_start"
"""Tags of a run that say for what it was trained: the interval in words, and its start, in seconds since the epoch."""
KEPT = "promotion.json"
"""In the run's folder: what is to become of its model, for when it goes on."""

_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(r"\s*(?P<metric>[^<>=]+?)\s*(?P<sign>>=|<=|>|<)\s*(?P<right>[^<>=]+?)\s*")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
# The shortest alias that leaves nothing over: 'champion-0.01' is less than the champion has, not an alias of that name.
_ALIAS = re.compile(rf"(?P<alias>[a-z0-9][a-z0-9._-]{{0,127}}?)(?:\s*(?P<way>[+-])\s*(?P<by>{_NUMBER}))?")
_NO_LIMIT = re.compile(r"nan|inf|infinity")
_BY_RUN = re.compile(r"run (?P<run>\S+)")
"""Who has set an alias, where a gate did."""


@dataclass(frozen=True, slots=True)
class Condition:
    """``metric sign limit``, or ``metric sign alias + limit``: relative to what the alias's version measured."""

    text: str
    metric: str
    sign: str
    limit: float
    alias: str | None = None

    @classmethod
    def of(cls, text: str) -> Condition:
        """Raises SpecError for what is no condition."""
        refusal = SpecError(
            f"gate: {text!r} is no condition",
            hint="Write 'METRIC >= NUMBER', or 'METRIC >= champion': not worse than the model with that alias, where "
            "more is better; '<=' where less is. 'METRIC >= champion - 0.01' lets it be a little worse.",
        )
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise refusal
        if re.fullmatch(_NUMBER, found["right"]):
            if not math.isfinite(limit := float(found["right"])):
                raise refusal
            return cls(text.strip(), found["metric"], found["sign"], limit)
        than = _ALIAS.fullmatch(found["right"])
        if than is None or than["alias"].isdigit() or _NO_LIMIT.fullmatch(than["alias"]):
            raise refusal
        by = float(than["by"] or 0) * (-1 if than["way"] == "-" else 1)
        if not math.isfinite(by):
            raise refusal
        return cls(text.strip(), found["metric"], found["sign"], by, than["alias"])


@dataclass(frozen=True, slots=True)
class Verdict:
    """passed: whether the alias points at the version now. why: in a sentence."""

    passed: bool
    why: str


@dataclass(frozen=True, slots=True)
class Promoted:
    """version: in the registry. verdict: None where no alias was asked for."""

    version: ModelVersion
    verdict: Verdict | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """Under which name a model is registered, and which alias points at it if all conditions hold.

    alias: None: none is asked for; a gate without one decides about :data:`CHAMPION`.
    """

    name: str
    alias: str | None = None
    gate: tuple[Condition, ...] = ()

    @classmethod
    def of(
        cls, name: str | None, alias: str | None, gate: Iterable[str], *, metrics: Iterable[str] | None = None
    ) -> Promotion | None:
        """From what a user wrote; None where nothing is to be registered. metrics: that the training measures, where
        that is known. Raises SpecError with every problem."""
        from tally.models.registry import check_alias, registry_name

        problems: list[str] = []
        hints: list[str] = []
        conditions = []
        for text in gate:
            try:
                conditions.append(condition := Condition.of(text))
            except SpecError as error:
                problems += error.problems
                hints.append(error.hint or "")
                continue
            if metrics is not None:
                problems += _unmeasured([condition], metrics)
        if conditions and alias is None:
            alias = CHAMPION
        if alias is not None:
            try:
                check_alias(alias)
            except SpecError as error:
                problems += error.problems
        if name is None and (alias is not None or problems):
            problems.append("alias, gate: they are about a model that is registered; give its name, too: register")
        if problems:
            raise SpecError(problems, hint=hints[0] if hints else None)
        return None if name is None else cls(name=registry_name(name), alias=alias, gate=tuple(conditions))

    def check(self, metrics: Iterable[str] | None = None) -> None:
        """Before it is trained. metrics: that it will measure, where that is known.

        Raises SpecError if a condition can never hold, or compares with an alias that the model has not: that of a
        misspelt name would hold each time.
        """
        problems = [] if metrics is None else _unmeasured(self.gate, metrics)
        hint = None
        others = [each for each in self.gate if each.alias is not None and each.alias != self.alias]
        known = _aliases(self.name) if others else set()
        for each in others:
            if each.alias not in known:
                comparable = sorted({*known, self.alias or CHAMPION})
                problems.append(
                    f"gate: {each.text!r}: model {self.name!r} has no alias {each.alias!r}"
                    f"{did_you_mean(each.alias or '', comparable)}"
                )
                hint = f"It is compared with {', '.join(comparable)}. An alias with a number at its end: 'x-2 + 0'."
        if problems:
            raise SpecError(problems, hint=hint)

    def keep(self, folder: Path) -> None:
        """Have a run, whose folder this is, know it when it goes on. Raises OSError."""
        kept = {"register": self.name, "alias": self.alias, "gate": [each.text for each in self.gate]}
        write_whole(folder / KEPT, json.dumps(kept, indent=1).encode())

    @classmethod
    def of_kept(
        cls,
        folder: Path,
        name: str | None,
        alias: str | None,
        gate: Iterable[str],
        *,
        metrics: Iterable[str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Promotion | None:
        """Of a run that goes on: what it began with, and in its place what is given now, which is said. As :meth:`of`
        otherwise."""
        try:
            kept = json.loads((folder / KEPT).read_text("utf-8"))
        except FileNotFoundError:  # it was not to be registered
            return cls.of(name, alias, gate, metrics=metrics)
        given = {"register": name, "alias": alias, "gate": list(gate)}
        now = kept | {word: value for word, value in given.items() if value}
        found = cls.of(now["register"], now["alias"], now["gate"], metrics=metrics)
        before = cls.of(kept["register"], kept["alias"], kept["gate"])
        assert found is not None
        assert before is not None
        if found != before:
            say(f"from now on {found}; it began with {before}")
        return found

    def __str__(self) -> str:
        return shlex.join(self.flags())

    def flags(self) -> list[str]:
        """Of the command that trains."""
        words = ["--register", self.name, *(["--alias", self.alias] if self.alias else [])]
        return words + [word for each in self.gate for word in ("--gate", each.text)]

    def conclude(
        self, run: Run, add: Callable[[str], ModelVersion], *, measured: Mapping[str, float] | None = None
    ) -> Promoted:
        """Register the model of a run, and decide about the alias.

        May be repeated, also after the process was killed within: a run has one version of this name.
        add: registers it under the name that it is given. measured: by this model; None: the last that the run
        measured. Raises what add raises, and ModelNotFoundError.
        """
        from tally.models.registry import open_registry

        registry = open_registry()
        version = _version_of(registry, self.name, run.id) or add(self.name)
        run.registered(str(version))
        return Promoted(version, self.decide(run, version, registry, measured=measured))

    def decide(
        self, run: Run, version: ModelVersion, registry: Registry, *, measured: Mapping[str, float] | None = None
    ) -> Verdict | None:
        """Have the alias point at the version if every condition holds of what it measured; the run says so.

        It stays where a later interval of the run's schedule has set it. measured: as of :meth:`conclude`.
        """
        if self.alias is None:
            return None
        if measured is None:
            assert isinstance(run.book, DatabaseBook)
            measured = {name: each.last for name, each in run.book.figures.items()}
        judged = [_judged(each, measured, version, registry, self.alias) for each in self.gate]
        failed = [why for holds, why in judged if not holds]
        # It may have been decided before the process was killed, or the same model may have been trained before.
        is_already = self.alias in registry.get(str(version)).aliases
        if failed:
            how = f"is {self.alias} already, and would not become it now" if is_already else "does not become"
            how += "" if is_already else f" {self.alias}"
            verdict = Verdict(is_already, f"{version} {how}: {'; '.join(failed)}")
        elif not is_already and (later := _later(registry, version.name, self.alias, run)) is not None:
            verdict = Verdict(False, f"{version} does not become {self.alias}: {later}")
        else:
            if not is_already:
                registry.alias(version.name, self.alias, version.version, who=f"run {run.id}")
            reasons = "; ".join(why for _, why in judged)
            verdict = Verdict(True, f"{version} is {self.alias}" + (f": {reasons}" if reasons else ""))
        run.tags[TAG] = verdict.why
        return verdict


def _version_of(registry: Registry, name: str, run_id: str) -> ModelVersion | None:
    """The version of this name that the run has registered."""
    try:
        versions = registry.show(name).versions
    except ModelNotFoundError:
        return None
    return next((each for each in reversed(versions) if each.metadata.get("run") == run_id), None)


def _unmeasured(gate: Iterable[Condition], metrics: Iterable[str]) -> list[str]:
    """The problems of conditions on what is not measured."""
    known = sorted(metrics)
    return [
        f"gate: {each.metric!r} is not measured{did_you_mean(each.metric, known)}; this training measures "
        f"{', '.join(known)}"
        for each in gate
        if each.metric not in known
    ]


def _aliases(name: str) -> Collection[str]:
    """Those that a model has."""
    from tally.models.registry import open_registry

    try:
        versions = open_registry().show(name).versions
    except ModelNotFoundError:
        return set()
    return {alias for each in versions for alias in each.aliases}


def _later(registry: Registry, name: str, alias: str, run: Run) -> str | None:
    """Why the alias stays where it is: a later interval of the run's schedule has set it."""
    if (mine := _interval(run.tags)) is None:
        return None
    last = next((each for each in reversed(registry.show(name).history) if each.alias == alias), None)
    by = None if last is None or last.action != "set" else _BY_RUN.fullmatch(last.who)
    if last is None or by is None:
        return None
    try:
        tags = RunStore.open().get(by["run"]).tags
    except RunNotFoundError:
        return None
    other = _interval(tags)
    if other is None or other[0] != mine[0] or other[1] <= mine[1]:
        return None
    return f"a later interval, {tags.get(INTERVAL)}, has set it to models:/{name}/{last.version}"


def _interval(tags: Mapping[str, str]) -> tuple[str, int] | None:
    """The schedule and the start of its interval that a run was for; None if for none."""
    schedule, start = tags.get(SCHEDULE), tags.get(INTERVAL_START, "")
    return (schedule, int(start)) if schedule is not None and start.lstrip("-").isdecimal() else None


def _judged(
    condition: Condition, measured: Mapping[str, float], version: ModelVersion, registry: Registry, alias: str
) -> tuple[bool, str]:
    """Whether a condition holds, and why. alias: the one that is to be set, which there may not be yet."""
    metric, holds = condition.metric, _SIGNS[condition.sign]
    if metric not in measured:
        known = f"it measured {', '.join(sorted(measured))}" if measured else "it measured nothing"
        return False, f"{metric} was not measured{did_you_mean(metric, measured)} ({known})"
    value = measured[metric]
    if not math.isfinite(value):
        return False, f"{metric} is {value:g}, which is compared with nothing"
    limit, than = condition.limit, ""
    if condition.alias is not None:
        try:
            champion = registry.get(f"models:/{version.name}@{condition.alias}")
        except ModelNotFoundError:
            yet = " yet" if condition.alias == alias else ""  # another one was removed while it was trained
            return condition.alias == alias, f"{metric} is {value:g}, and there is no {condition.alias}{yet}"
        if champion.version == version.version:
            return True, f"it is {condition.alias} already"
        before = _measured(champion, metric)
        if before is None or not math.isfinite(before):
            return False, (
                f"of {champion}, the {condition.alias}, no {metric} is known to compare with (decide yourself: tally "
                f"models alias {version.name} {condition.alias} {version.version})"
            )
        limit, than = before + condition.limit, f", from {before:g} of {champion}"
    if holds(value, limit):
        return True, f"{metric} is {value:g}, and {condition.sign} {limit:g}{than}"
    return False, f"{metric} is {value:g}, and not {condition.sign} {limit:g}{than}"


def _measured(version: ModelVersion, metric: str) -> float | None:
    """What is known of a registered version: by itself, or by its run."""
    known = version.metadata.get("metrics") or {}
    if metric not in known and (run_id := version.metadata.get("run")):
        try:
            figures = RunStore.open().get(run_id).metrics.get(metric)
        except RunNotFoundError:
            return None
        return None if figures is None else figures.last
    try:
        return float(known[metric])
    except (KeyError, TypeError, ValueError):
        return None


def withdraw(run_id: str) -> None:
    """Remove the versions that a run has registered before its process was lost, as another run begins in its place.

    One that an alias points at stays.
    """
    from tally.models.registry import open_registry

    registry = open_registry()
    for each in registry.list():
        if each.metadata.get("run") == run_id and not each.aliases:
            registry.remove(each.name, each.version)
