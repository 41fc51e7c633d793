"""From an engine's name to the engine.

A new engine is one file and one line in :data:`BUILT_IN`. An installed package adds another by an entry point in the
group ``tally.engines``, whose name is the engine's and whose value is a class, a kind of :class:`Engine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from tally import extensions
from tally.engines.base import Engine
from tally.errors import SpecError
from tally.text import did_you_mean

GROUP = "tally.engines"
"""The entry points of other packages' engines."""

BUILT_IN: Mapping[str, tuple[str, str]] = {
    "local": ("tally.engines.local", "LocalEngine"),
    "ray": ("tally.engines.ray.engine", "RayEngine"),
}
"""Module and class by name. The module, and what it imports, is imported when the engine is chosen."""


def names() -> list[str]:
    """The engines that there are: built in, and of installed packages."""
    return sorted({*BUILT_IN, *extensions.names(GROUP)})


def checked(name: str) -> str:
    """The name itself. Raises ValueError if there is no such engine."""
    if name not in BUILT_IN and name not in names():
        raise ValueError(f"there is no such engine{did_you_mean(name, names())}; there are {', '.join(names())}")
    return name


def make_engine(
    name: str,
    *,
    cpus: float | None = None,
    gpus: float | None = None,
    memory: int | None = None,
    resources: Mapping[str, float] | None = None,
) -> Engine:
    """A new engine of that name, not started yet. For the options see :class:`Engine`.

    Raises SpecError where there is none, or the class that a package offers is no engine.
    """
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        kind = getattr(import_module(module), attribute)
    elif (kind := extensions.find(GROUP, name)) is None:
        known = names()
        raise SpecError(f"there is no engine {name!r}{did_you_mean(name, known)}", hint=f"Known: {', '.join(known)}.")
    if not (isinstance(kind, type) and issubclass(kind, Engine)):
        raise SpecError(f"the engine {name!r} of an installed package is not a subclass of tally.engines.base.Engine")
    engine: Engine = kind(cpus=cpus, gpus=gpus, memory=memory, resources=resources)
    return engine
