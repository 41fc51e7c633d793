"""Small pictures: how they are made while a picture is scored, and what galleries draw onto them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tally.errors import ItemError
from tally.jobs.pictures import drawable, kept_thumbnail, thumbnail
from tally.media.images import Decoding
from tally.scorers.base import Result, Scorer, Thumbnail, Thumbnailed
from tally.scorers.run import configured, run
from tally.scorers.vision.detection.rows import runs

BOX = {"xmin": 20.0, "ymin": 20.0, "xmax": 60.0, "ymax": 60.0}


def drawn(*rows: dict[str, Any], size: int = 100) -> np.ndarray[Any, Any]:
    """What is bright in the thumbnail of a dark picture of 200 x 100."""
    content = io.BytesIO()
    Image.new("RGB", (200, 100)).save(content, "PNG")
    made = Image.open(io.BytesIO(thumbnail(content.getvalue(), size, drawable(rows))))
    assert made.size == (size, size // 2)
    return np.asarray(made).max(axis=2) > 60


def mask(left: int, top: int, right: int, bottom: int) -> list[int]:
    """A mask of 200 x 100, set in a rectangle, as detectors give it."""
    return runs(np.ones((bottom - top, right - left), bool), left, top, 200, 100)


@pytest.mark.parametrize("form", ["list", "text"])
@pytest.mark.parametrize("size", [100, 200])
def test_masks_quadrangles_and_keypoints_are_drawn(form: str, size: int) -> None:
    def given(values: list[Any]) -> Any:  # CSV holds lists as text
        return values if form == "list" else str(values)

    half = size / 200
    plain = drawn(BOX, size=size)
    assert not plain[int(40 * half), int(40 * half)]
    masked = drawn({**BOX, "mask": given(mask(30, 30, 50, 50))}, size=size)
    assert masked[int(40 * half), int(40 * half)]
    assert not masked[int(25 * half), int(25 * half)]
    turned = drawn({**BOX, "corners": given([40, 20, 60, 40, 40, 60, 20, 40])}, size=size)
    assert turned[int(30 * half), int(50 * half)]  # on the way from one corner to the next
    assert not turned[int(21 * half) + 1, int(21 * half) + 1]  # and not where the box has its own
    points = {"keypoints": given([40, 40, 150, 80]), "keypoint_scores": given([0.9, 0.1])}
    dots = drawn({**BOX, **points}, size=size)
    assert dots[int(40 * half), int(40 * half)]
    assert not dots[int(80 * half), int(150 * half)]


@pytest.mark.parametrize(
    "damaged",
    [
        {"mask": [20_000, 1]},
        {"mask": [10, -5]},
        {"mask": [10**15]},
        {"mask": "[1, 2"},
        {"corners": [1, 2, 3]},
        {"corners": [float("nan")] * 8},
        {"keypoints": [1, 2, 3]},
        {"keypoints": [1, 2], "keypoint_scores": [1, 1]},
        {"keypoints": "none"},
    ],
    ids=["long", "negative", "bomb", "cut", "few", "nan", "odd", "scores", "text"],
)
def test_damage_costs_no_box(damaged: dict[str, Any]) -> None:
    found = drawn({**BOX, **damaged})
    assert found[10:30, 10].all()


@pytest.mark.parametrize(
    ("side", "size", "shown"), [(50, 100, (100, 50)), (150, 100, (100, 50)), (50, 1280, (320, 160))]
)
def test_boxes_are_where_they_belong_on_what_is_kept(side: int, size: int, shown: tuple[int, int]) -> None:
    small = io.BytesIO()
    Image.new("RGB", (side, side // 2)).save(small, "JPEG")
    kept = Thumbnail(small.getvalue(), 200, 100)
    made = Image.open(io.BytesIO(kept_thumbnail(kept, size, drawable([{**BOX, "mask": mask(30, 30, 50, 50)}]))))
    assert made.size == shown
    bright, scale = np.asarray(made).max(axis=2) > 60, shown[0] / 200
    assert bright[round(40 * scale), round(20 * scale)]
    assert bright[round(40 * scale), round(40 * scale)]  # the mask
    assert not bright[round(25 * scale), round(27 * scale)]
    assert not bright[round(80 * scale) :].any()
    plain = Image.open(io.BytesIO(kept_thumbnail(kept, size, [])))
    assert max(plain.size) == min(side, size)  # what has nothing to be read on it is not enlarged


class Shape(Scorer):
    """Tells the shape of what it is given, and changes it."""

    batch_size = 2

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self.size = size

    def score(self, batch: Sequence[Any]) -> Sequence[Result]:
        results = [ItemError("too dark") if picture.mean() < 5 else {"shape": picture.shape} for picture in batch]
        for picture in batch:
            picture[...] = 0
        return results


def file(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def kept(scorer: Scorer, content: bytes, side: int = 150, **decoding: Any) -> tuple[Any, Image.Image, tuple[int, int]]:
    """Its result, the small picture that came with it, and the size that it tells of the original."""
    [result] = run(configured(scorer, thumbnails=side, decoding=Decoding(**decoding)), [content])
    assert isinstance(result, Thumbnailed), result
    picture = Image.open(io.BytesIO(result.thumbnail.jpeg))
    assert picture.format == "JPEG"
    return result.result, picture, result.thumbnail[1:]


def test_a_small_picture_is_upright_and_of_what_the_model_saw() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide = Image.new("RGB", (400, 200), "red")
    wide.paste("blue", (0, 0, 200, 200))
    result, picture, size = kept(Shape(), file(wide, exif=exif, form="JPEG"))
    assert (result["shape"], picture.size, size) == ((400, 200, 3), (75, 150), (200, 400))
    pixels = np.asarray(picture).astype(int)
    assert pixels[20, 40, 2] > 200 > pixels[20, 40, 0] + 100  # blue is at the top
    assert pixels[130, 40, 0] > 200

    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    _, picture, size = kept(Shape(), file(clear), background=(255, 255, 255))
    assert (picture.size, size) == ((10, 10), (10, 10))  # not enlarged
    assert np.asarray(picture).min() > 250
    _, picture, _ = kept(Shape(), file(Image.new("RGB", (4000, 2), "white")))
    assert picture.size == (150, 1)


def test_jpegs_are_decoded_as_large_as_it_takes() -> None:
    content = file(Image.new("RGB", (1600, 1200), "red"), "JPEG")
    for asked, shape, expected in ((100, (150, 200, 3), (100, 75)), (600, (600, 800, 3), (600, 450))):
        result, picture, size = kept(Shape((64, 64)), content, asked)
        assert (result["shape"], picture.size, size) == (shape, expected, (1600, 1200))


def test_an_item_that_fails_has_none_and_costs_no_other() -> None:
    scorer = configured(Shape(), thumbnails=150)
    bright, dark = file(Image.new("RGB", (8, 8), "white")), file(Image.new("RGB", (8, 8)))
    results = run(scorer, [bright, dark, b"no picture", bright])
    assert [type(each) for each in results] == [Thumbnailed, ItemError, ItemError, Thumbnailed]

    class Wrong(Shape):
        def score(self, batch: Sequence[Any]) -> Any:
            return {"label": "one for all"}

    [result] = run(configured(Wrong(), thumbnails=150), [bright])
    assert "Wrong.score returned dict" in str(result)
