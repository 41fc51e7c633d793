"""Colour matrices and ranges, with defaults for videos that do not state them."""

from __future__ import annotations

from tally.media.video.metadata import Colour

BT709, UNSPECIFIED, BT601 = 1, 2, 5
LIMITED = 1
PQ, HLG = 16, 18
HDR = (PQ, HLG)
"""Transfers for a brighter display than other videos are made for: the perceptual quantizer and hybrid log-gamma."""

_COMPUTED = frozenset({BT709, 4, BT601, 6, 7, 9})


def matrix_for(colour: Colour, height: int) -> int:
    """The matrix to and from RGB (``AVColorSpace``).

    If it is unspecified, or one that FFmpeg's scaler does not know: the one that players assume for that height.
    """
    if colour.matrix in _COMPUTED:
        return colour.matrix
    return BT709 if height >= 720 else BT601


def range_for(colour: Colour) -> int:
    """The range (``AVColorRange``); limited if unspecified."""
    return colour.range or LIMITED


def scored(colour: Colour) -> Colour:
    """Of the pictures that are scored, and of a video that is written: HDR is brought down to BT.709."""
    return Colour(LIMITED, BT709, BT709, BT709) if colour.transfer in HDR else colour
