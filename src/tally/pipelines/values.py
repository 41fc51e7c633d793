"""What ``{{…}}`` stands for: values by name, and their substitution in texts."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from tally.pipelines.document import scalar_text
from tally.pipelines.expressions import ExpressionError, evaluate
from tally.text import did_you_mean

TAG = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)

Artifact: TypeAlias = Mapping[str, Any]
"""Where an artifact is: ``{"at": path in the run's folder}``, or one of Argo's sources (raw, http, s3)."""


class Values:
    """Values by their full name, such as ``steps.flip.outputs.result``; a child sees its parent's.

    artifacts: by full names, too.
    """

    def __init__(self, parent: Values | None = None) -> None:
        self._flat: ChainMap[str, Any] = ChainMap({}, *(parent._flat.maps if parent else ()))
        self.artifacts: ChainMap[str, Artifact] = ChainMap({}, *(parent.artifacts.maps if parent else ()))
        self._live: dict[str, Callable[[], str]] = parent._live if parent else {}

    def __setitem__(self, name: str, value: Any) -> None:
        self._flat[name] = value

    def live(self, name: str, value: Callable[[], str]) -> None:
        """A value that changes: it is asked for whenever it is used."""
        self._live[name] = value

    def __getitem__(self, name: str) -> Any:
        if name in self._live:
            return self._live[name]()
        return self._flat[name]

    def __contains__(self, name: str) -> bool:
        return name in self._live or name in self._flat

    def names(self) -> list[str]:
        return [*self._live, *self._flat]

    def nested(self) -> dict[str, Any]:
        """As expressions see them: ``steps`` → ``flip`` → …; artifacts, too."""
        result: dict[str, Any] = {}
        for name in self.names():
            if not name.endswith((".parameters", ".json")) and name not in ("workflow.labels", "workflow.annotations"):
                _put(result, name, self[name])
        for name, artifact in self.artifacts.items():
            _put(result, name, dict(artifact))
        return result

    def substituted(self, value: Any, *, only_known: bool = False) -> Any:
        """The value with all ``{{…}}`` in its texts replaced. only_known: those that have no value here stay.

        Raises ExpressionError.
        """
        if isinstance(value, str):
            return self.text(value, only_known=only_known) if "{{" in value else value
        if isinstance(value, Mapping):
            return {key: self.substituted(each, only_known=only_known) for key, each in value.items()}
        if isinstance(value, list):
            return [self.substituted(each, only_known=only_known) for each in value]
        return value

    def text(self, text: str, *, only_known: bool = False) -> str:
        """Raises ExpressionError, also for what no value is known of."""

        def replaced(match: re.Match[str]) -> str:
            try:
                return self._replaced(match[1])
            except ExpressionError:
                if only_known:
                    return match[0]
                raise

        return TAG.sub(replaced, text)

    def _replaced(self, inside: str) -> str:
        if inside.startswith("="):
            try:
                return scalar_text(evaluate(inside[1:], self.nested()))
            except ExpressionError as error:
                raise ExpressionError(f"{{{{{inside}}}}}: {error}") from None
        name = inside.strip()
        if name in self:
            return scalar_text(self[name])
        raise ExpressionError(f"{{{{{name}}}}} has no value here{did_you_mean(name, self.names())}")


def _put(result: dict[str, Any], name: str, value: Any) -> None:
    *way, last = name.split(".")
    inside = result
    for each in way:
        inner = inside.get(each)
        if not isinstance(inner, dict):
            inner = inside[each] = {}
        inside = inner
    if not isinstance(inside.get(last), dict) or isinstance(value, dict):
        inside[last] = value


def bare(expression: str) -> str:
    """An expression that may be written with or without ``{{= }}``."""
    text = expression.strip()
    if text.startswith("{{=") and text.endswith("}}"):
        return text[3:-2]
    return text
