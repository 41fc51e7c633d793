"""What comes with Tally to try it with: what draws pictures and a clip, and two small models (``tally:NAME``)."""

from __future__ import annotations

from pathlib import Path

MODELS = {"shapes": "tells eight drawn shapes apart", "strokes": "restyles with brush strokes"}
"""The name of each model, and what it does. Both are toys."""


def model(name: str) -> Path:
    """The folder of the model package with this name. Raises KeyError."""
    if name not in MODELS:
        raise KeyError(name)
    return Path(__file__).parent / name
