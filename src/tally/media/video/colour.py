"""Which colours are meant where a video does not say."""

from __future__ import annotations

from tally.media.video.facts import Colour

BT709, UNSPECIFIED, BT601 = 1, 2, 5
LIMITED = 1

_COMPUTED = frozenset({BT709, 4, BT601, 6, 7, 9})


def matrix_for(colour: Colour, height: int) -> int:
    """The matrix from RGB (``AVColorSpace``); unspecified: what players take for a picture of such a height.

    So it is for the few that FFmpeg's scaler cannot compute with, too.
    """
    if colour.matrix in _COMPUTED:
        return colour.matrix
    return BT709 if height >= 720 else BT601


def range_for(colour: Colour) -> int:
    """The range (``AVColorRange``); unspecified is limited."""
    return colour.range or LIMITED
