"""What ``train: KIND`` and ``sweep: KIND`` in a file stand for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from tally.errors import SpecError
from tally.jobs.spec import absolute, beside
from tally.text import did_you_mean
from tally.training.specs.base import TrainingSpec

WORDS = ("train", "sweep")

_KINDS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "train": {
        "anomaly": ("anomaly", "AnomalySpec"),
        "retrain": ("retrain", "RetrainSpec"),
        "style": ("style", "StyleSpec"),
        "script": ("script", "ScriptSpec"),
    },
    "sweep": {"retrain": ("sweep", "RetrainSweepSpec"), "script": ("sweep", "ScriptSweepSpec")},
}
"""Imported when they are used."""


def word_of(fields: Mapping[str, Any]) -> str | None:
    """``train`` or ``sweep``; None if the fields describe no training."""
    return next((word for word in WORDS if word in fields), None)


def kind_of(fields: Mapping[str, Any]) -> type[TrainingSpec]:
    """Raises SpecError for a kind that there is not."""
    word = word_of(fields)
    assert word is not None
    kinds, given = _KINDS[word], fields[word]
    if given not in kinds:
        near = did_you_mean(given, kinds) if isinstance(given, str) else ""
        raise SpecError(f"{word}: {given!r} is not one of {', '.join(kinds)}{near}")
    module, name = kinds[given]
    found: type[TrainingSpec] = getattr(import_module(f"tally.training.specs.{module}"), name)
    return found


def training_of(fields: Mapping[str, Any]) -> TrainingSpec:
    """The training that the fields of a file describe. Raises SpecError with every problem."""
    kind = kind_of(fields)
    if len(both := [word for word in WORDS if word in fields]) > 1:
        raise SpecError(f"{', '.join(both)}: one of them")
    return kind.of({name: value for name, value in fields.items() if name not in WORDS})


def placed(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a file in this folder, with absolute places. Raises SpecError for a kind that there is not."""
    kind = kind_of(fields)

    def place(value: Any, name: str) -> Any:
        match value:
            case str():
                return beside(folder, value, "model") if name in kind.models else absolute(value, folder)
            case list() | tuple():
                return [place(each, name) for each in value]
            case Mapping():
                return {key: place(each, name) for key, each in value.items()}
        return value

    return {name: place(value, name) if name in kind.places else value for name, value in fields.items()}
