"""Folders that transformers saved as a kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tally.models.base import Kind
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer
from tally.scorers.transformers.options import inspect, is_saved


class TransformersKind(Kind):
    """Folders that ``save_pretrained`` of transformers wrote: a model, and its processor or tokenizer."""

    reads_files = False

    def recognises(self, path: Path) -> bool:
        return is_saved(path)

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        return inspect(path.parent, options)

    def create(self, ref: ModelRef) -> Scorer:
        from tally.scorers.transformers import scorer

        return scorer.create(ref.options)
