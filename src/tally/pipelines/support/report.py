"""What is said of a workflow and of its templates, with the place in the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tally.errors import SpecError
from tally.pipelines.document import Document, Where, path_text, seconds_of
from tally.pipelines.support.fields import WHY, Fields

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(slots=True)
class Verdict:
    """What is to be said of one template. reasons: why it is not run here, if so. notes: what is passed over."""

    name: str
    kind: str
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """What is to be said of a workflow, and of its templates that are reached from its entrypoint and hooks."""

    workflow: Verdict
    templates: list[Verdict] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        return [reason for verdict in (self.workflow, *self.templates) for reason in verdict.reasons]

    @property
    def notes(self) -> list[str]:
        return [note for verdict in (self.workflow, *self.templates) for note in verdict.notes]


class Findings:
    """Takes down what is found of the workflow or, inside of :meth:`about`, of one template.

    Places are given as the way from there.
    """

    def __init__(self, document: Document) -> None:
        self.report = Report(Verdict("", "workflow"))
        self._verdict = self.report.workflow
        self.document: Document = document
        self.start: Where = ("spec",)

    @contextmanager
    def about(self, verdict: Verdict, document: Document, start: Where) -> Iterator[None]:
        kept = self._verdict, self.document, self.start
        self._verdict, self.document, self.start = verdict, document, start
        self.report.templates.append(verdict)
        try:
            yield
        finally:
            self._verdict, self.document, self.start = kept

    def at(self, where: Where) -> str:
        """``file:line:column``."""
        return self.document.at((*self.start, *where))

    def no(self, where: Where, what: str) -> None:
        self._verdict.reasons.append(f"{self.at(where)}: {self._subject(where)}{what}")

    def refuse(self, error: SpecError) -> None:
        """What names its place itself."""
        self._verdict.reasons += error.problems

    def no_key(self, where: Where, error: SpecError) -> None:
        """What is not known of a Secret or ConfigMap, and how it is given."""
        hint = error.hint[:1].lower() + error.hint[1:] if error.hint else ""
        self.no(where, f"{error.problems[0]}; {hint}")

    def note(self, where: Where, what: str) -> None:
        self._verdict.notes.append(f"{self._subject(where)}{what}")

    def _subject(self, where: Where) -> str:
        at = path_text(where)
        if self._verdict is self.report.workflow:
            return f"{at}: " if at else ""
        return f"template {self._verdict.name!r}{', ' + at if at else ''}: "

    def fields(self, value: Mapping[str, Any], known: Fields, where: Where) -> None:
        for name in value:
            if name in known.done:
                continue
            if name in known.passed:
                self.note((*where, name), "means nothing here and is passed over")
            else:
                self.no((*where, name), WHY.get(name, "is not done on this machine"))

    def supported(self, value: Mapping[str, Any], known: set[str] | frozenset[str], where: Where) -> None:
        for key in sorted(set(value) - known):
            self.no((*where, key), "is not done on this machine")

    def named(self, name: str, where: Where) -> None:
        if name and not _NAME.fullmatch(name):
            self.no(where, f"{name!r} is no name: letters, digits, - and _ make one")

    def duration(self, text: str, where: Where) -> None:
        self.read(seconds_of, text, where, lambda error: f"{text!r} {error}")

    def read(self, read: Callable[[str], Any], text: str, where: Where, told: Callable[[Exception], str] = str) -> Any:
        """What a text means, unless that is known only later. told: what is said of one that means nothing."""
        if "{{" in text:
            return None
        try:
            return read(text)
        except ValueError as error:
            self.no(where, told(error))
            return None
