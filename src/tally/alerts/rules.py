"""Alert rules: conditions on a job that has ended, such as ``anomalies > 0`` or ``failed``."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass

from tally.text import did_you_mean

MEASURES = ("anomalies", "rows", "items", "dead", "dead_share", "seconds")
"""Measures that a rule compares with a number. dead_share: dead items among those done, 0 to 1. seconds: of work."""

EVENTS = ("failed", "no_data")
"""Events: rules that stand alone."""

_COMPARISONS = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_RULE = re.compile(r"\s*([^\s<>=!]*)\s*([<>=!]*)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rule:
    """A measure, a comparison and a number; of an event, its name alone."""

    name: str
    comparison: str | None = None
    number: float = 0.0

    def holds(self, value: float) -> bool:
        """Whether the rule is true of the measured value; for an event, 1 or 0."""
        return bool(value if self.comparison is None else _COMPARISONS[self.comparison](value, self.number))

    def __str__(self) -> str:
        return self.name if self.comparison is None else f"{self.name} {self.comparison} {shown(self, self.number)}"


def parse(text: str) -> Rule:
    """The rule that is written ``MEASURE COMPARISON NUMBER`` or ``EVENT``. Raises ValueError with all that is wrong."""
    name, comparison, number = _RULE.fullmatch(text).groups()  # type: ignore[union-attr]  # it matches anything
    problems = []
    if name in EVENTS:
        if comparison or number:
            problems.append(f"{name!r} stands alone")
    else:
        if name not in MEASURES:
            named = f"there is no measure {name!r}" if name else "names no measure"
            problems.append(named + (did_you_mean(name, (*MEASURES, *EVENTS)) or f"; there are {', '.join(MEASURES)}"))
        if comparison not in _COMPARISONS:
            compared = f"{comparison!r} is no comparison" if comparison else "compares with nothing"
            problems.append(f"{compared}; comparisons are {' '.join(_COMPARISONS)}")
        if comparison or number:
            problems += _wrong_number(name, number)
    if problems:
        raise ValueError("; ".join(problems))
    return Rule(name) if name in EVENTS else Rule(name, comparison, _number(number))


def checked(text: str) -> str:
    """The rule as it is stored and shown: ``dead_share>5%`` becomes ``dead_share > 5%``. Raises ValueError."""
    return str(parse(text))


def shown(rule: Rule, value: float) -> str:
    """A value of the rule's measure, as people write it."""
    return f"{100 * value:.10g}%" if rule.name == "dead_share" else f"{value:.15g}"


def _number(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _wrong_number(name: str, text: str) -> list[str]:
    try:
        number = _number(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        return [f"{text!r} is no number"]
    if name == "dead_share" and not 0 <= number <= 1:
        return [f"dead_share is a share such as 5% or 0.05, not {text}"]
    if text.endswith("%") and name in MEASURES and name != "dead_share":
        return [f"{text} is a share, and {name} is none; dead_share is"]
    return []
