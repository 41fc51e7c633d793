"""Workers that start, and import what they are going to need, while the job is still being put together.

This module is imported before anything that takes long to import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tally.engines.base import Engine
from tally.engines.factory import make_engine
from tally.jobs.spec import JobSpec
from tally.models import kinds

if TYPE_CHECKING:
    from tally.engines.kept import KeptEngine

_MODULES = ("tally.jobs.worker", "tally.sources.files", "tally.sinks.columns")
"""What nearly every job's workers import."""
_FILE = re.compile(r"^(?:file|entry):\s*['\"]?([^\s'\"#:]+)", re.MULTILINE)


@contextmanager
def prestarted(spec: JobSpec, kept: KeptEngine | None = None) -> Iterator[Engine | None]:
    """An engine whose workers are starting, to be given to :meth:`tally.jobs.facade.Jobs.run`; stopped in the end.

    kept: the engine to take; its workers may be there already.
    None where starting early gains nothing: workers of a cluster are placed by its coordinator, those of a split job
    are its parts'.
    """
    if spec.engine != "local" or spec.split is not None:
        yield None
        return
    engine = make_engine(spec.engine) if kept is None else kept
    least = spec.workers[0] if spec.workers is not None else engine.default_slots()
    engine.prepare(slots=max(1, least), modules=(*_MODULES, *kinds.modules_for(_model_file(spec.model))))
    try:
        yield engine
    finally:
        engine.stop(kill=True)


def _model_file(model: str) -> str:
    """The name of the model's file, also where a package names it; a guess, which costs only time if it is wrong."""
    described = Path(model, "tally.yaml")
    try:
        found = _FILE.search(described.read_text("utf-8"))
    except (OSError, ValueError):
        return model
    return found[1] if found is not None else model
