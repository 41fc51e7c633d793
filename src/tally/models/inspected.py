"""What inspecting a model's content has found, kept in the cache for later processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from tally.errors import StorageError
from tally.models.hashing import content_hash
from tally.storage import cache_folder, open_store


def inspected_before(
    path: Path,
    options: Mapping[str, Any],
    *,
    trusted: bool,
    distributions: Sequence[str],
    files: Sequence[str] = (),
    inspect: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What ``inspect`` returned for the same content and options, or returns now.

    distributions: those whose versions matter, beside Tally's. files: those of the model in its folder, where it is
    more than one.
    """
    versions = []
    for name in ("tally-scoring", *distributions):
        with suppress(metadata.PackageNotFoundError):
            versions.append(metadata.version(name))
    facts = [versions, str(path), content_hash(path.parent, files or (path.name,)), dict(options), trusted]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    kept = cache_folder() / "inspected" / f"{digest}.json"
    with suppress(OSError, ValueError):
        return cast("dict[str, Any]", json.loads(kept.read_text("utf-8")))
    found = inspect()
    with suppress(StorageError):  # then it is inspected again next time
        open_store(kept.parent).write(kept.name, json.dumps(found).encode())
    return found
