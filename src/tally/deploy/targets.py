"""The targets: one table."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tally.deploy.base import Target
from tally.errors import SpecError
from tally.text import did_you_mean

TARGETS: Mapping[str, str | None] = {
    # The place of the class, imported when it is first used; None for what this version has not.
    "local": None,
    "aci": "tally.deploy.aci:AciTarget",
    "kubernetes": "tally.deploy.kubernetes.target:KubernetesTarget",
}


def get(name: str) -> type[Target[Any]]:
    """The target of this name. Raises SpecError for one that is not known, or not in this version."""
    if name not in TARGETS:
        raise SpecError(
            f"there is no target {name!r}{did_you_mean(name, TARGETS)}", hint=f"Targets are {', '.join(TARGETS)}."
        )
    place = TARGETS[name]
    if place is None:
        raise SpecError(
            f"the target {name} is not built in this version of Tally",
            hint="'tally serve MODEL --port 8890' serves a model on this machine.",
        )
    module, _, attribute = place.partition(":")
    found: type[Target[Any]] = getattr(import_module(module), attribute)
    return found
