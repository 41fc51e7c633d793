"""HDR brought down to what other videos are: numbers that standards state, and what eyes would notice."""

from __future__ import annotations

import numpy as np
import pytest

from tally.media.video.colour import BT709, HLG, PQ
from tally.media.video.tone import toned

BT2020 = 9


def gray(transfer: int, *signals: float) -> list[list[int]]:
    """What pixels of these signals, 0 to 1, become."""
    stored = np.rint(np.array(signals) * 65535).astype(np.uint16)
    return toned(np.repeat(stored[None, :, None], 3, axis=2), transfer, BT2020)[0].tolist()


@pytest.mark.parametrize(
    ("transfer", "signal", "level"),
    [
        (PQ, 0.0, 0),
        (PQ, 0.5081, 184),  # 100 cd/m2
        (PQ, 0.5807, 217),  # 203, reference white: BT.2408
        (PQ, 0.7518, 255),  # 1,000
        (PQ, 1.0, 255),
        (HLG, 0.0, 0),
        (HLG, 0.5, 143),  # 51 of 1,000: dark enough to stay as it is
        (HLG, 0.75, 217),  # reference white
        (HLG, 1.0, 255),
    ],
)
def test_known_brightness(transfer: int, signal: float, level: int) -> None:
    [pixel] = gray(transfer, signal)
    assert pixel == pytest.approx([level] * 3, abs=1)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_what_is_brighter_stays_brighter_and_gray_stays_gray(transfer: int) -> None:
    levels = np.array(gray(transfer, *np.linspace(0, 1, 2000)), int)
    assert (np.diff(levels, axis=0) >= 0).all()
    assert (levels.max(1) - levels.min(1)).max() <= 1
    assert len(np.unique(levels)) > 200


def test_colours_keep_their_hue_and_those_beyond_are_the_nearest() -> None:
    green = np.zeros((1, 1, 3), np.uint16)
    green[..., 1] = 30_000
    red, green_, blue = toned(green, PQ, BT2020)[0, 0]
    assert (red, blue) == (0, 0)  # no display of BT.709 shows this green
    assert green_ > 60
    same = toned(green, PQ, BT709)[0, 0]  # stored in the colours of other videos
    assert (same[0], same[2]) == (0, 0)
    assert 0 < same[1] < green_  # the same amount of a less saturated green is less of it


def test_a_tall_picture_is_as_its_parts() -> None:
    picture = np.random.default_rng(1).integers(0, 65536, (200, 7, 3), np.uint16)
    whole = toned(picture, HLG, BT2020)
    assert whole.shape == picture.shape
    assert np.array_equal(whole[150:], toned(picture[150:], HLG, BT2020))
