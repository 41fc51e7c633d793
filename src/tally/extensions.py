"""What installed packages add to Tally, through Python's entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tally.errors import SpecError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints


def find(group: str, name: str) -> Any | None:
    """What an installed package offers in ``group`` under this name; None if none does.

    Raises SpecError where several packages offer it, or what is offered cannot be imported.
    """
    found = list({point.value: point for point in _points(group).select(name=name)}.values())
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
    return sorted({point.name for point in _points(group)})


def _points(group: str) -> EntryPoints:
    from importlib.metadata import entry_points  # takes time, and is mostly not needed

    return entry_points(group=group)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
