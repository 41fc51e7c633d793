"""The targets: one table."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tally.deploy.base import Target
from tally.errors import SpecError
from tally.text import did_you_mean

TARGETS: Mapping[str, str] = {
    # The place of the class, imported when it is first used.
    "local": "tally.deploy.local:LocalTarget",
    "aci": "tally.deploy.aci:AciTarget",
    "kubernetes": "tally.deploy.kubernetes.target:KubernetesTarget",
}


def get(name: str) -> type[Target[Any]]:
    """The target of this name. Raises SpecError for one that is not known."""
    if name not in TARGETS:
        raise SpecError(
            f"there is no target {name!r}{did_you_mean(name, TARGETS)}", hint=f"Targets are {', '.join(TARGETS)}."
        )
    module, _, attribute = TARGETS[name].partition(":")
    found: type[Target[Any]] = getattr(import_module(module), attribute)
    return found
