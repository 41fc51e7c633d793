"""Bodies and documents, one for each item: a template, in which names stand for what is known of the item."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tally.errors import SpecError
from tally.push.base import KEY, Parcel
from tally.sinks.columns import json_text, rows_of

_NAME = re.compile(r"\{([^{}]+)\}")

Rows = Sequence[Mapping[str, Any]]


def by_key(parcel: Parcel) -> dict[str, Rows]:
    """The rows of each item, without its key; also of one that has none."""
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in parcel.keys}
    for row in rows_of(parcel.rows):
        found.setdefault(row.pop(KEY), []).append(row)
    return dict(found)


def filled(template: Any, facts: Mapping[str, Any], key: str, rows: Rows, info: Mapping[str, Any]) -> Any:
    """The template for one item; without one, its key, what is told of it, and its rows.

    facts: ``job``, ``model`` and ``version``. info: what is told of the item once, and not in each row.
    Raises SpecError where the template names what there is not.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [{name: value for name, value in row.items() if name not in info} for row in rows]
    known = {**info, **({"version": info["model_version"]} if "model_version" in info else {})}
    values = {**(rows[0] if rows else {}), **facts, **known, "key": key, "rows": rows, "now": now}

    def value(name: str) -> Any:
        if name not in values and rows:
            raise SpecError(f"the body names {{{name}}}, and there are {', '.join(values)}")
        return values.get(name)

    whole = {"key": "{key}", **{each: f"{{{each}}}" for each in info}, "rows": "{rows}"}
    return fill(whole if template is None else template, value)


def fill(template: Any, value: Any) -> Any:
    """The template with ``{name}`` replaced by ``value(name)``. Text that is one name becomes the value itself."""
    if isinstance(template, Mapping):
        return {name: fill(each, value) for name, each in template.items()}
    if isinstance(template, list):
        return [fill(each, value) for each in template]
    if not isinstance(template, str):
        return template
    if whole := _NAME.fullmatch(template):
        return value(whole[1])
    return _NAME.sub(lambda found: _as_text(value(found[1])), template)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json_text(value)
