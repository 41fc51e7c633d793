"""What installed packages add to Tally, through Python's entry points.

An extension says in ``contract_version`` which version of the contracts it was written for; left out, it is the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from tally.errors import SpecError, TallyError, error_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

T = TypeVar("T")
R = TypeVar("R")

CONTRACT_VERSION = 1
"""Of the contracts of sources, sinks, engines and kinds of model. It grows when what fulfilled them no longer does."""


def find(group: str, name: str) -> Any | None:
    """What an installed package offers in ``group`` under this name; None if none does.

    Raises SpecError where several packages offer it, or what is offered cannot be imported or is written for another
    version of the contracts.
    """
    found = list({point.value: point for point in _points(group).select(name=name)}.values())
    if not found:
        return None
    if len(found) > 1:
        raise SpecError(
            f"{name!r} is offered by several packages: {', '.join(sorted(map(_package, found)))}",
            hint="Uninstall all but one of them.",
        )
    offered = f"{name!r} is offered by the package {_package(found[0])}, which cannot be used"
    try:
        extension = found[0].load()
    except Exception as error:
        raise SpecError(f"{offered}: {type(error).__name__}: {error}") from error
    written_for = getattr(extension, "contract_version", 1)
    if written_for != CONTRACT_VERSION:
        raise SpecError(
            f"{offered}: it is written for version {written_for} of Tally's contracts, and this Tally has version "
            f"{CONTRACT_VERSION}",
            hint="Install a release of the package for this version of Tally.",
        )
    return extension


def call(group: str, name: str, extension: Callable[[T], R], given: T) -> R:
    """Have an extension make what it offers. Raises Tally's errors as they are, and SpecError for any other."""
    try:
        return extension(given)
    except TallyError:
        raise
    except Exception as error:
        packages = ", ".join(sorted({_package(point) for point in _points(group) if point.name == name}))
        raise SpecError(f"{name!r}, which the package {packages} offers, failed: {error_line(error)}") from error


def names(group: str) -> list[str]:
    """The names under which installed packages offer something in ``group``."""
    return sorted({point.name for point in _points(group)})


def _points(group: str) -> EntryPoints:
    from importlib.metadata import entry_points  # takes time, and is mostly not needed

    return entry_points(group=group)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
