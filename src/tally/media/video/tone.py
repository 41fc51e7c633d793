"""HDR pictures brought down to the brightness and colours of other videos, BT.709 on a display after BT.1886.

Light is in units of HDR's reference white, 203 cd/m2 (ITU-R BT.2408). Sources: the perceptual quantizer's EOTF, hybrid
log-gamma's inverse OETF and OOTF from ITU-R BT.2100, colours from ITU-R BT.2087; the curve is the Moebius one of
FFmpeg's filter ``tonemap``: what is dark stays as it is, and highlights are pressed together without a bend.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np

from tally.media.video.colour import BT709, PQ

_Light: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

WHITE = 203.0
"""cd/m2 of HDR's reference white."""
PEAK = 1000 / WHITE
"""What is as bright as this becomes white; so is what is brighter. It is the nominal peak of hybrid log-gamma."""
_LINEAR = 0.3
"""Light up to this stays as it is."""
_GAMMA = 2.4
_ROWS = 64
"""Rows that are looked at together: a whole picture's light would take 24 bytes a pixel, several times."""

_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
_P3 = 12
_TO_BT709 = {
    _P3: np.array([[1.2249, -0.2247, -0.0002], [-0.0420, 1.0420, 0.0], [-0.0197, -0.0786, 1.0983]], np.float32),
    # BT.2020's, also where nothing is stated: HDR has these.
    None: np.array([[1.6605, -0.5876, -0.0729], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1188]], np.float32),
}


def toned(
    stored: np.ndarray[Any, np.dtype[np.uint16]], transfer: int, primaries: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture as other videos have them.

    stored: ``uint16[height, width, 3]`` RGB, as the video has it, 0 to 65,535.
    transfer, primaries: in FFmpeg's numbering, see :class:`~tally.media.video.metadata.Colour`.
    Returns ``uint8[height, width, 3]`` RGB.
    """
    light_of, level_of = _light_of(transfer), _level_of()
    colours = None if primaries == BT709 else _TO_BT709.get(primaries, _TO_BT709[None])
    found = np.empty(stored.shape, np.uint8)
    for top in range(0, len(stored), _ROWS):
        light: _Light = light_of[stored[top : top + _ROWS]]
        if transfer != PQ:  # how bright hybrid log-gamma is shown depends on the whole pixel
            light *= np.power(light @ _LUMINANCE, np.float32(0.2))[..., None] * np.float32(PEAK)
        if colours is not None:
            light = np.maximum(light @ colours.T, 0)
        brightest = light.max(2, keepdims=True)
        light *= _pressed(brightest) / np.maximum(brightest, np.float32(1e-6))
        found[top : top + _ROWS] = level_of[(np.sqrt(np.minimum(light, 1)) * 65535).astype(np.uint16)]
    return found


def _pressed(light: _Light) -> _Light:
    j, peak = _LINEAR, PEAK
    a = -j * j * (peak - 1) / (j * j - 2 * j + peak)
    b = (j * j - 2 * j * peak + peak) / (peak - 1)
    scale = (b * b + 2 * b * j + j * j) / (b - a)
    return np.where(light > j, np.float32(scale) * (light + np.float32(a)) / (light + np.float32(b)), light)


@cache
def _light_of(transfer: int) -> _Light:
    """The light of each stored number: of hybrid log-gamma the scene's, 0 to 1, of others the display's."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:
        power = signal ** (1 / (2523 / 4096 * 128))
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        light = 10_000 / WHITE * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / (2610 / 16384))
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    found: _Light = light.astype(np.float32)
    return found


@cache
def _level_of() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What is stored for each square root of light: finer than light itself where it is dark."""
    root = np.arange(65536) / 65535
    return np.rint(255 * root ** (2 / _GAMMA)).astype(np.uint8)
