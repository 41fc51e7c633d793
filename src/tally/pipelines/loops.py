"""What a step is repeated for: withItems, withParam, withSequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tally.pipelines.document import loaded, scalar_text
from tally.pipelines.expressions import ExpressionError
from tally.pipelines.values import Values

WORDS = ("withItems", "withParam", "withSequence")


def items(step: Mapping[str, Any], scope: Values) -> list[Any]:
    """What a step is repeated for. Raises ExpressionError."""
    if "withItems" in step:
        return list(scope.substituted(step["withItems"]))
    if "withParam" in step:
        text = scope.text(step["withParam"])
        try:
            found = loaded(text)
        except ValueError as error:
            raise ExpressionError(f"withParam is {text[:200]!r}, which is no JSON list: {error}") from None
        if not isinstance(found, list):
            raise ExpressionError(f"withParam is {text[:200]!r}, which is no list")
        return found
    return _sequence({key: scope.text(value) for key, value in step["withSequence"].items()})


def _sequence(given: Mapping[str, str]) -> list[str]:
    try:
        start = int(given.get("start") or 0)
        if "count" in given:
            end, step = start + int(given["count"]) - 1, 1
        else:
            end = int(given.get("end") or 0)
            step = 1 if end >= start else -1
        pattern = given.get("format") or "%d"
        return [pattern % each for each in range(start, end + step, step)]
    except (ValueError, TypeError) as error:
        raise ExpressionError(f"withSequence {dict(given)}: {error}") from None


def item_label(item: Any) -> str:
    if isinstance(item, Mapping):
        return ",".join(f"{key}:{scalar_text(item[key])}" for key in sorted(item))[:200]
    return scalar_text(item)[:200]


def item_of(text: str) -> Any:
    """A text as an item of a list: what is JSON is that."""
    try:
        return loaded(text)
    except ValueError:
        return text
