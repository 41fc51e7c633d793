"""Scores pictures with ONNX vision models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tally.models.reference import ModelRef
from tally.scorers.base import Scorer
from tally.scorers.onnx.pictures import OnnxPictureOptions, PictureRuntime, inspect
from tally.scorers.onnx.session import OnnxRuntime, external_names
from tally.scorers.runtime import Runtime
from tally.scorers.vision.kind import VisionKind
from tally.scorers.vision.scorer import VisionScorer


class OnnxKind(VisionKind):
    """ONNX models of pictures."""

    def recognises(self, path: Path) -> bool:
        from tally.scorers.tabular.onnx import takes_table

        return not takes_table(path)

    def companions(self, path: Path) -> list[str]:
        return external_names(path)

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        return inspect(path, options)

    def create(self, ref: ModelRef) -> Scorer:
        return OnnxVisionScorer(ref.options)


class OnnxVisionScorer(VisionScorer):
    """Scores pictures with an ONNX model; options as :func:`~tally.scorers.onnx.pictures.inspect` returns them."""

    options_type = OnnxPictureOptions

    def open(self, path: Path, device: str) -> Runtime:
        options, alike = self.options, self.options.preprocess.size is not None
        assert isinstance(options, OnnxPictureOptions)
        model = OnnxRuntime.best(path, device, threads=options.threads, alike=alike)
        order = options.size_order or "width, height"
        return PictureRuntime(model, path, nchw=options.preprocess.layout != "nhwc", order=order)
