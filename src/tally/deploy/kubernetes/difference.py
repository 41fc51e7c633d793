"""What applying an object would change, as the cluster itself says by a dry run, and applying it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from tally.deploy.base import Change, dump
from tally.kubernetes import Cluster, ConflictError, Object
from tally.masking import mask

_VOLATILE = ("managedFields", "resourceVersion", "uid", "generation", "creationTimestamp", "selfLink")
_UNTOLD = ("deployment.kubernetes.io/revision", "kubectl.kubernetes.io/last-applied-configuration")
REPLICAS = (".spec.replicas",)
"""A number of replicas is given only where nobody else is to say it: no autoscaler, and no scaling by hand."""


def put(
    cluster: Cluster,
    manifest: Mapping[str, Any],
    *,
    dry_run: bool = False,
    force: bool = False,
    ours: Collection[str] = REPLICAS,
) -> Object:
    """Apply an object; what it then is. ours: fields that are set also where others have. Raises ConflictError."""
    try:
        return cluster.apply(manifest, dry_run=dry_run, force=force)
    except ConflictError as error:
        if not set(error.fields) <= set(ours):
            raise
        return cluster.apply(manifest, dry_run=dry_run, force=True)


def change(what: str, live: Object | None, after: Object) -> Change | None:
    """From what is there to what would be; None where that is the same. what: its kind and name."""
    if live is None:
        return Change("create", what)
    lines = difflib.unified_diff(_lines(live), _lines(after), "now", "then", lineterm="", n=2)
    told = [mask(each) for each in lines]
    return Change("change", what, told[2:]) if told else None


def _lines(found: Object) -> list[str]:
    """An object as lines of YAML, without what changes by itself."""
    shown = copy.deepcopy({key: value for key, value in found.items() if key != "status"})
    metadata = shown["metadata"]
    for each in _VOLATILE:
        metadata.pop(each, None)
    if annotations := {key: each for key, each in (metadata.get("annotations") or {}).items() if key not in _UNTOLD}:
        metadata["annotations"] = annotations
    else:
        metadata.pop("annotations", None)
    return dump([shown], sort=True).splitlines()[1:]
