"""What a scorer's class attributes may be: people write them by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from tally.errors import ModelLoadError
from tally.scorers.base import Input, Scorer, Window

_OUTPUTS = ("rows", "image")


def check(scorer: Scorer) -> None:
    """Raises ModelLoadError, with all that is wrong, if the scorer declares what no scorer may."""
    if problems := [f"{what}, not {value!r}" for what, value in _wrong(scorer)]:
        raise ModelLoadError(
            f"{type(scorer).__name__}: " + "; ".join(problems),
            hint="Correct the class attributes of the scorer, or what sets them.",
        )


def _wrong(scorer: Scorer) -> Iterator[tuple[str, Any]]:
    inputs = get_args(Input)
    checks: Mapping[str, tuple[Callable[[Any], bool], str]] = {
        "input": (lambda it: it in inputs, f"should be one of {', '.join(inputs)}"),
        "output": (lambda it: it in _OUTPUTS, f"should be {' or '.join(_OUTPUTS)}"),
        "batch_size": (lambda it: _is_count(it), "should be a whole number of at least 1"),
        "size": (
            lambda it: it is None or (_is_list(it) and len(it) == 2 and all(map(_is_count, it))),
            "should be (width, height) in pixels, or None",
        ),
        "columns": (
            lambda it: it is None or (isinstance(it, Mapping) and all(map(_is_text, [*it, *it.values()]))),
            "should map each column's name to its type, as in {'score': 'float32'}, or be None",
        ),
        "features": (
            lambda it: it is None or _is_count(it) or _are_names(it),
            "should be column names, how many there are, or None",
        ),
        "by": (_are_names, "should be column names"),
        "window": (lambda it: it is None or isinstance(it, Window), "should be a Window, or None"),
        "assumed": (_are_names, "should be sentences"),
    }
    for attribute, (is_right, what) in checks.items():
        value = getattr(scorer, attribute)
        if not is_right(value):
            yield f"{attribute} {what}", value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _are_names(value: Any) -> bool:
    return _is_list(value) and all(map(_is_text, value))
