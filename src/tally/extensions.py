"""What installed packages add to Tally, through Python's entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tally.errors import SpecError


def find(group: str, name: str) -> Any | None:
    """What an installed package offers in ``group`` under this name; None if none does.

    Raises SpecError where several packages offer it, or what is offered cannot be imported.
    """
    found = list({point.value: point for point in entry_points(group=group, name=name)}.values())
    if not found:
        return None
    if len(found) > 1:
        raise SpecError(
            f"{name!r} is offered by several packages: {', '.join(sorted(map(_package, found)))}",
            hint="Uninstall all but one of them.",
        )
    try:
        return found[0].load()
    except Exception as error:
        raise SpecError(
            f"{name!r} is offered by the package {_package(found[0])}, which cannot be used: "
            f"{type(error).__name__}: {error}"
        ) from error


def names(group: str) -> list[str]:
    """The names under which installed packages offer something in ``group``."""
    return sorted({point.name for point in entry_points(group=group)})


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
