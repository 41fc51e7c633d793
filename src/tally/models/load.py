"""From a reference to a model to a loaded scorer, on any machine: content that has changed since is refused."""

from __future__ import annotations

import inspect
import platform
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tally.errors import ModelChangedError, ModelLoadError, ModelNotFoundError, TallyError
from tally.models.hashing import check_content, file_hash
from tally.models.mirror import fetched, is_here
from tally.models.reference import Kind, ModelRef
from tally.scorers.base import Scorer
from tally.scorers.scripts.classes import import_class, scorer_class


def create(ref: ModelRef) -> Scorer:
    """The scorer, not loaded: tells its input, size, batch size, output and columns.

    Code, and what else is looked into for that, is fetched where it is not on this machine.
    """
    if ref.kind in ("script", "python", "object", "packed") and ref.origin is not None and not is_here(ref):
        ref = fetched(ref)
    options = dict(ref.options)
    path = ref.location / ref.entry
    if ref.kind == "packed":
        options["path"] = str(path)
    scorer: Scorer
    if ref.kind == "script":
        from tally.scorers.scripts.script import ScriptScorer

        return ScriptScorer(path, **options)
    if ref.kind not in ("object", "python"):
        return _ready_made(ref.kind, options)
    size = options.pop("batch_size", None)
    if ref.kind == "object":
        from tally.scorers.scripts import pickled

        check_content(ref.name, ref.location, ref.files, ref.hash)  # before anything in it runs
        scorer = pickled.load(path, ref.name, options)
    else:
        scorer = _constructed(ref, options)
    if size is not None:
        scorer.batch_size = size
    return scorer


def _ready_made(kind: Kind, options: dict[str, Any]) -> Scorer:
    if kind == "onnx":
        from tally.scorers.onnx.scorer import OnnxVisionScorer

        return OnnxVisionScorer(options)
    if kind == "onnx_table":
        from tally.scorers.tabular.onnx import OnnxTableScorer

        return OnnxTableScorer(options)
    if kind == "pyfunc":
        from tally.scorers.tabular.pyfunc import PyfuncScorer

        return PyfuncScorer(options)
    if kind == "packed":
        from tally.scorers.per_key.packed import PackedScorer

        return PackedScorer(options)
    if kind == "keyed":
        from tally.scorers.per_key.files import KeyedScorer

        return KeyedScorer(options)
    from tally.scorers.tabular.sklearn import SklearnScorer

    return SklearnScorer(options)


def _constructed(ref: ModelRef, options: Mapping[str, Any]) -> Scorer:
    file, separator, name = ref.entry.rpartition(".py:")
    found = scorer_class(ref.location / f"{file}.py", name) if separator else _imported_here(ref)
    try:
        return found(**options)
    except TallyError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{ref.entry}: making the scorer failed: {type(error).__name__}: {error}") from error


def _imported_here(ref: ModelRef) -> type[Scorer]:
    """The class ``module:Class``, as this machine has it. Only its own file travels with the reference."""
    try:
        found = import_class(ref.entry, ref.location)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{error.message} on {platform.node()}",
            hint=f"{error.hint} Workers on other machines need it installed there, "
            "or make it a package: 'tally new package NAME'.",
        ) from None
    ours = Path(inspect.getsourcefile(found) or "").absolute()
    known = ref.location.joinpath(*found.__module__.split("."))
    wanted = known / "__init__.py" if known.is_dir() else known.with_name(f"{known.name}.py")
    if ours != wanted and ours.is_file() and wanted.is_file() and file_hash(ours) != file_hash(wanted):
        raise ModelChangedError(
            f"model {ref}: {ours} on {platform.node()} is not what the job began with",
            hint=f"Install the same version of {found.__module__.partition('.')[0]} on every machine.",
        )
    return found


def verify(ref: ModelRef) -> None:
    """Raises ModelChangedError unless the content is still what it was when the model was resolved.

    Content that is not on this machine is fetched from its origin; ModelNotFoundError where it has none.
    """
    fetched(ref)


def load(ref: ModelRef, device: str) -> Scorer:
    """The scorer, loaded on ``device``, after checking that the content is still what it was.

    Content that is not on this machine is fetched from its origin, once for all processes.
    Raises ModelChangedError, ModelNotFoundError, ModelLoadError.
    """
    ref = fetched(ref)
    scorer = create(ref)
    try:
        scorer.load(ref.location / ref.artifacts, device)
    except TallyError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelLoadError(
            f"{ref}: load() failed: {type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
        ) from error
    return scorer
