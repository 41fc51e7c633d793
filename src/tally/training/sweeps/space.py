"""The space of a sweep: what ``-p NAME=...`` says, read and checked.

``a,b,c``: these values. ``LOW..HIGH``: a range; ``LOW..HIGH:STEP``: at these steps; ``log:LOW..HIGH``: even in its
logarithm.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tally.errors import SpecError
from tally.text import did_you_mean

Value: TypeAlias = bool | int | float | str

HINT = "For example: -p learning_rate=log:1e-4..1 -p train_batch_size=25,50,100 -p steps=100..500:100"
_TRUTH = {"true": True, "false": False}
_PLAIN = re.compile(r"-?(0|[1-9][0-9]*)(\.([0-9]*[1-9]|0))?([eE][+-]?[0-9]+)?")
"""A number that nobody writes to mean anything but its value."""


@dataclass(frozen=True, slots=True)
class Choices:
    """One of these values."""

    values: tuple[Value, ...]

    def grid(self) -> tuple[Value, ...]:
        return self.values


@dataclass(frozen=True, slots=True)
class Range:
    """From ``low`` to ``high``, both of which may come out; whole numbers if both are. log: even in the logarithm."""

    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def grid(self) -> tuple[Value, ...] | None:
        """All of its values; None if it has no steps."""
        if self.step is None:
            return tuple(range(int(self.low), int(self.high) + 1)) if self.whole and not self.log else None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.low + at * self.step for at in range(count))


Dimension: TypeAlias = Choices | Range
Space: TypeAlias = Mapping[str, Dimension]

MOST_COMBINATIONS = 10_000


def read(texts: Sequence[str], types: Mapping[str, type] | None = None) -> dict[str, Dimension]:
    """The space that ``NAME=...`` texts describe. types: of the parameters that there are; None: any name, and a type
    as each value looks. Raises SpecError with every problem."""
    found: dict[str, Dimension] = {}
    problems: list[str] = []
    for text in texts:
        name, equals, said = (part.strip() for part in text.partition("="))
        try:
            if not equals or not name or not said:
                raise ValueError("should be NAME=VALUES")
            if name in found:
                raise ValueError("is given twice")
            if types is not None and name not in types:
                raise ValueError(
                    f"there is no such parameter{did_you_mean(name, types)}; there are {', '.join(sorted(types))}"
                )
            found[name] = dimension(said, None if types is None else types[name])
        except ValueError as error:
            problems.append(f"-p {text[:200]}: {error}")
    if not texts:
        problems.append("-p NAME=VALUES: at least one parameter is needed")
    if problems:
        raise SpecError(problems, hint=HINT)
    return found


def dimension(text: str, kind: type | None = None) -> Dimension:
    """One parameter's values. kind: bool, int, float or str; None: as they look. Raises ValueError."""
    log, colon, rest = text.partition(":")
    if colon and log.strip().lower() == "log" and ".." in rest:
        return _range(rest, kind, log=True)
    if ".." in text and "," not in text and _begins_with_a_number(text):
        return _range(text, kind, log=False)
    values = tuple(_value(each.strip(), kind) for each in text.split(","))
    if len(set(map(repr, values))) < len(values):
        raise ValueError("a value is there twice")
    return Choices(values)


def _begins_with_a_number(text: str) -> bool:
    try:
        _number(text.partition("..")[0])
    except ValueError:
        return False
    return True


def _range(text: str, kind: type | None, *, log: bool) -> Range:
    ends, colon, steps = text.partition(":")
    first, _, last = ends.partition("..")
    if kind not in (None, int, float):
        raise ValueError("a range is of numbers; give its values, with commas between them")
    low, high = _number(first), _number(last)
    step = _number(steps) if colon else None
    if kind is int and not all(isinstance(each, int) for each in (low, high, step or 0)):
        raise ValueError("it takes whole numbers")
    if kind is float or any(isinstance(each, float) for each in (low, high, step)):
        low, high, step = float(low), float(high), None if step is None else float(step)
    if not low < high:
        raise ValueError(f"the range ends at {last.strip()}, which is not above {first.strip()}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range begins above 0, not at {first.strip()}")
    if log and step is not None:
        raise ValueError("a logarithmic range has no steps; give its values, with commas between them")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(f"a step is more than 0, and no more than the range: not {steps.strip()}")
    return Range(low, high, step, log)


def _number(text: str) -> int | float:
    """A whole number where it is written as one."""
    text = text.strip()
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not finite")
    return number


def _value(text: str, kind: type | None) -> Value:
    if not text:
        raise ValueError("a value is empty")
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _TRUTH:
            raise ValueError(f"{text!r} is neither true nor false")
        return _TRUTH[text.lower()]
    if kind is None:
        return _as_it_looks(text)
    number = _number(text)
    if kind is int and not isinstance(number, int):
        raise ValueError(f"{text!r} is not a whole number")
    return float(number) if kind is float else number


def _as_it_looks(text: str) -> Value:
    """A number or a truth value where it is written as one: ``007``, ``1.10``, ``1_000`` and ``True`` stay texts, as a
    script that is given them may mean more by them than a value."""
    if _PLAIN.fullmatch(text) and math.isfinite(float(text)):
        return _number(text)
    return _TRUTH.get(text, text)


def combinations(space: Space) -> list[dict[str, Value]]:
    """Every combination, the last parameter changing first. Raises SpecError for a range without steps, or too many."""
    grids = {name: each.grid() for name, each in space.items()}
    problems = [
        f"-p {name}: a grid needs values or steps, and a range has neither" for name, each in grids.items() if not each
    ]
    if problems:
        raise SpecError(problems, hint="Say a,b,c or LOW..HIGH:STEP, or draw at random: --sampler random")
    lists = [each for each in grids.values() if each]
    if (count := math.prod(map(len, lists))) > MOST_COMBINATIONS:
        raise SpecError(
            f"-p: the grid has {count:,} combinations, more than {MOST_COMBINATIONS:,}",
            hint="Give fewer values, or draw at random: --sampler random --trials N",
        )
    return [dict(zip(grids, each, strict=True)) for each in itertools.product(*lists)]
