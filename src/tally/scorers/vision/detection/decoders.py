"""Box decoders: one file for each family, the table of all of them, and the way from boxes to rows."""

from __future__ import annotations

from collections.abc import Mapping

from tally.scorers.vision.detection.base import Decoder
from tally.scorers.vision.detection.grids import GRIDS
from tally.scorers.vision.detection.named import NAMED
from tally.scorers.vision.detection.queries import QUERIES
from tally.scorers.vision.detection.yolo import YOLO

DECODERS: Mapping[str, Decoder] = {**YOLO, **QUERIES, **GRIDS, **NAMED}
"""The box decoders, by the names that ``decoder`` takes."""
