"""The targets: one table."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tally.deploy.base import Fleet, Target
from tally.errors import SpecError
from tally.text import did_you_mean

TARGETS: Mapping[str, str] = {
    # The place of the class, imported when it is first used.
    "local": "tally.deploy.local:LocalTarget",
    "aci": "tally.deploy.aci:AciTarget",
    "kubernetes": "tally.deploy.kubernetes.target:KubernetesTarget",
}


FLEETS: Mapping[str, str] = {
    "kubernetes": "tally.deploy.kubernetes.fleet:KubernetesFleet",
}
"""Targets whose endpoints only they themselves remember."""


def fleet(name: str, **where: str | None) -> Fleet:
    """All endpoints at the target of this name. where: what its class takes; None for what was not said.

    Raises SpecError for a target that is not known, or needs what is not installed.
    """
    kind = get(name)
    if name not in FLEETS:
        raise SpecError(
            f"endpoints at the target {name} are not listed here", hint=f"Those of {', '.join(FLEETS)} are."
        )
    try:
        made: type[Fleet] = _imported(FLEETS[name])
    except ModuleNotFoundError as error:
        raise SpecError(f"the target {kind.name} cannot be asked: {error}", hint=kind.needs) from None
    return made(**where)


def get(name: str) -> type[Target[Any]]:
    """The target of this name. Raises SpecError for one that is not known."""
    if name not in TARGETS:
        raise SpecError(
            f"there is no target {name!r}{did_you_mean(name, TARGETS)}", hint=f"Targets are {', '.join(TARGETS)}."
        )
    found: type[Target[Any]] = _imported(TARGETS[name])
    return found


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
