"""Curves and parallel coordinates as drawings: numbers become places here, so that no script is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tally.training.runs.store import Curve

WIDE, TALL = 600, 200
"""Of a figure of curves, without its margins."""
AXES_WIDE, AXES_TALL = 1000, 260
"""Of parallel coordinates."""
COLOURS = 8
"""Runs that are told apart by colour; further ones begin again."""
_LOGARITHMIC = 100.0
"""A parameter whose values are all above 0 and differ by more is drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. path: for SVG. dots: single values, which no line joins. colour: from 0 on. last: the last value."""

    name: str
    path: str
    dots: Sequence[tuple[float, float]]
    colour: int
    last: float


@dataclass(frozen=True, slots=True)
class Figure:
    """Curves of one metric. least, most: of the values drawn. begin, end: of the steps."""

    metric: str
    lines: Sequence[Line]
    least: float
    most: float
    begin: int
    end: int


def figure(metric: str, curves: Sequence[tuple[str, int, Curve]]) -> Figure | None:
    """The curves (name, colour, values) of a metric; None where nothing is finite. What is not finite is a gap."""
    finite = [value for _, _, each in curves for value in each.values if math.isfinite(value)]
    if not finite:
        return None
    steps = [step for _, _, each in curves for step in each.steps]
    least, most, begin, end = min(finite), max(finite), min(steps), max(steps)
    lines = []
    for name, colour, curve in curves:
        path: list[str] = []
        dots: list[tuple[float, float]] = []
        run: list[tuple[float, float]] = []
        for step, value in [*zip(curve.steps, curve.values, strict=True), (0, math.nan)]:
            if math.isfinite(value):
                run.append((WIDE * _share(step, begin, end), TALL * (1 - _share(value, least, most))))
                continue
            if len(run) == 1:
                dots.append(run[0])
            elif run:
                path.append("M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in run))
            run = []
        lines.append(Line(name, " ".join(path), dots, colour % COLOURS, curve.values[-1]))
    return Figure(metric, lines, least, most, begin, end)


def _share(value: float, least: float, most: float) -> float:
    return 0.5 if most == least else value / (most - least) - least / (most - least)


@dataclass(frozen=True, slots=True)
class Axis:
    """One parameter or metric. at: its place from the left. ticks: places from the top, and what stands there."""

    name: str
    at: float
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool
    is_metric: bool


@dataclass(frozen=True, slots=True)
class Across:
    """One run across the axes. name: of it. path: for SVG. kind: best, or as its caller says."""

    name: str
    path: str
    colour: int
    kind: str


@dataclass(frozen=True, slots=True)
class Parallel:
    """Runs as lines across the axes."""

    axes: Sequence[Axis]
    lines: Sequence[Across]


@dataclass(frozen=True, slots=True)
class Column:
    """The values of a parameter or a metric, one for each run; None where a run has none."""

    name: str
    values: Sequence[Any]
    is_metric: bool = False


def parallel(runs: Sequence[tuple[str, str]], columns: Sequence[Column]) -> Parallel | None:
    """The runs (name, kind) across these columns; None where there are fewer than two axes. kind: "best" is drawn
    above the others."""
    drawn = [each for each in columns if any(_drawable(value) for value in each.values)]
    if len(drawn) < 2:
        return None
    axes, places = [], []
    for number, column in enumerate(drawn):
        at = AXES_WIDE * number / (len(drawn) - 1)
        ticks, logarithmic, found = _axis(column.values)
        axes.append(Axis(column.name, at, ticks, logarithmic, column.is_metric))
        places.append([None if place is None else (at, place) for place in found])
    lines = []
    for number, (name, kind) in enumerate(runs):
        path, joined = [], False
        for points in places:
            point = points[number]
            if point is not None:
                path.append(f"{'L' if joined else 'M'}{point[0]:.1f},{point[1]:.1f}")
            joined = point is not None
        lines.append(Across(name, " ".join(path), number % COLOURS, kind))
    return Parallel(axes, sorted(lines, key=lambda line: line.kind == "best"))


def _drawable(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _axis(values: Sequence[Any]) -> tuple[list[tuple[float, str]], bool, list[float | None]]:
    """Ticks, whether it is logarithmic, and the place of each value."""
    there = [each for each in values if _drawable(each)]
    if all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in there):
        least, most = min(there), max(there)
        logarithmic = least > 0 and most / least > _LOGARITHMIC
        low, high = (math.log(least), math.log(most)) if logarithmic else (least, most)
        found = [
            AXES_TALL * (1 - _share(math.log(each) if logarithmic else each, low, high)) if _drawable(each) else None
            for each in values
        ]
        ticks = {
            AXES_TALL * (1 - _share(each, low, high)): f"{shown:.4g}" for each, shown in ((low, least), (high, most))
        }
        return list(ticks.items()), logarithmic, found
    known = list(dict.fromkeys(map(str, there)))
    places = {text: AXES_TALL * (1 - _share(number, 0, len(known) - 1)) for number, text in enumerate(known)}
    return (
        [(place, text[:24]) for text, place in places.items()],
        False,
        [places[str(each)] if _drawable(each) else None for each in values],
    )


def shown(curves: Mapping[str, Curve], *, most: int) -> tuple[list[Figure], int]:
    """A figure for each metric of a run, so many at most, and how many more there are."""
    found = [each for name, curve in curves.items() if (each := figure(name, [(name, 0, curve)])) is not None]
    return found[:most], max(0, len(found) - most)
