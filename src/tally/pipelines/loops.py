"""What a step is repeated for: withItems, withParam, withSequence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


_VERB = re.compile(r"%(?:%|([-+ 0]*[0-9]*)(.?))", re.DOTALL)


def _sequence(given: Mapping[str, str]) -> list[str]:
    def verb(match: re.Match[str]) -> str:
        """What Go calls a number in a format, as Python does."""
        if match[0] != "%%" and match[2] not in ("d", "v", "x", "X", "o"):
            raise ValueError(f"the format {match[0]!r} is not known here")
        return "%%" if match[0] == "%%" else f"%{match[1]}{'d' if match[2] == 'v' else match[2]}"

    try:
        start = int(given.get("start") or 0)
        if "end" in given:
            end = int(given["end"])
        elif (count := int(given["count"])) == 0:
            return []
        else:
            end = start + count - 1
        step = 1 if end >= start else -1
        pattern = _VERB.sub(verb, given.get("format") or "%d")
        return [pattern % each for each in range(start, end + step, step)]
    except (ValueError, TypeError) as error:
        raise ExpressionError(f"withSequence {dict(given)}: {error}") from None


def item_label(item: Any) -> str:
    if isinstance(item, Mapping):
        return ",".join(f"{key}:{scalar_text(item[key])}" for key in sorted(item))[:200]
    return scalar_text(item)[:200]


def item_of(text: str) -> Any:
    """A result as an item of a list: what is JSON is that."""
    try:
        return loaded(text)
    except ValueError:
        return text


def items_of(texts: Sequence[str]) -> list[Any]:
    """Parameters as items of a list, as Argo has it: lists and mappings if all of them are such, else texts."""
    found = [item_of(each) for each in texts]
    return found if all(isinstance(each, (list, dict)) for each in found) else list(texts)
