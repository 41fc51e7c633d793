"""What the fields of a schedule's file describe."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tally.errors import SpecError
from tally.jobs.spec import shown
from tally.triggers.works.base import Work

_KINDS: Mapping[str, tuple[str, str]] = {
    "train": ("trainings", "TrainingWork"),
    "sweep": ("trainings", "TrainingWork"),
    "clean": ("cleanups", "CleanUpWork"),
    "pipeline": ("pipelines", "PipelineWork"),
    "apiVersion": ("pipelines", "PipelineWork"),
}
"""By the field that tells, imported when they are used; what has none of them is a job."""


def kind_of(fields: Mapping[str, Any]) -> type[Work]:
    """Raises SpecError for fields of several kinds."""
    words = [word for word in _KINDS if word in fields]
    if len(words) > 1:
        raise SpecError(f"{', '.join(words)}: a schedule does one of them")
    module, name = _KINDS[words[0]] if words else ("jobs", "JobWork")
    found: type[Work] = getattr(import_module(f"tally.triggers.works.{module}"), name)
    return found


def does(fields: Mapping[str, Any]) -> str:
    """What it is, in two words: ``job``, ``train anomaly``, ``clean jobs``, ``pipeline nightly.yaml``."""
    for word in _KINDS:
        if word in fields:
            given = fields[word]
            if word == "pipeline":
                return f"{word} {given.rpartition('/')[2]}"
            return f"{word} {given if isinstance(given, str) else ', '.join(map(str, given))}"
    return "job"


def told(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are shown to people: without secrets, and without what was read from other files."""
    hidden = kind_of(fields).verbatim
    return shown({name: value for name, value in fields.items() if name not in hidden})
