from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tally.errors import ItemError, SpecError
from tally.media.images import Decoding
from tally.scorers.base import Item, Result, Scorer
from tally.scorers.run import configured, run
from tally.scorers.vision.overlay import Overlay


class Colour(Scorer):
    """Red of the first pixel; a black picture cannot be scored."""

    columns = {"red": "int64"}  # noqa: RUF012
    batch_size = 2

    def __init__(self) -> None:
        self.batches: list[int] = []

    def prepare(self, item: Item) -> Any:
        return item.value

    def score(self, batch: Sequence[Any]) -> Sequence[Result]:
        self.batches.append(len(batch))
        reds = [int(each[0, 0, 0]) for each in batch]
        return [{"red": red} if red else ItemError("black") for red in reds]


def tiff(*reds: int) -> bytes:
    first, *others = [Image.new("RGB", (4, 4), (red, 9, 9)) for red in reds]
    out = BytesIO()
    first.save(out, "tiff", save_all=True, append_images=others)
    return out.getvalue()


def test_each_page_is_a_row_and_no_more_than_a_batch_is_decoded_at_once() -> None:
    inner = Colour()
    scorer = configured(inner, decoding=Decoding(pages="all"))
    assert scorer.columns == {"page": "int64", "red": "int64"}
    files = [Item("a.tif", tiff(1, 2, 3, 4, 5)), Item("b.tif", tiff(7)), Item("c", np.full((4, 4, 3), 8, np.uint8))]
    found = run(scorer, files)
    assert found[0] == [{"page": page, "red": page + 1} for page in range(5)]
    assert found[1:] == [[{"page": 0, "red": 7}], [{"page": 0, "red": 8}]]
    assert inner.batches == [2, 2, 1, 1, 1]


def test_a_page_that_fails_makes_its_file_dead_and_no_other() -> None:
    scorer = configured(Colour(), decoding=Decoding(pages="all"))
    bad, good, cut = run(scorer, [Item("a", tiff(1, 0)), Item("b", tiff(3, 4)), Item("c", tiff(5)[:40])])
    assert isinstance(bad, ItemError)
    assert bad.message == "page 1: black"
    assert isinstance(cut, ItemError)
    assert [row["red"] for row in good] == [3, 4]  # type: ignore[union-attr, index, call-overload]


def test_the_pixel_limit_and_the_background_reach_the_decoder() -> None:
    out = BytesIO()
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(out, "png")
    assert run(configured(Colour(), decoding=Decoding(background=(77, 0, 0))), [out.getvalue()]) == [{"red": 77}]
    [refused] = run(configured(Colour(), decoding=Decoding(max_pixels=99)), [out.getvalue()])
    assert "over the limit of 9.9e-05 million" in str(refused)


def test_pages_go_with_rows_of_pictures_alone() -> None:
    boxes = Colour()
    boxes.columns = {"label": "string"}
    with pytest.raises(SpecError, match="the results of Overlay are pictures, and each file has one"):
        configured(Overlay(boxes), decoding=Decoding(pages="all"))
    other = Colour()
    other.input = "bytes"
    with pytest.raises(SpecError, match="is for pictures, and Colour takes 'bytes'"):
        configured(other, decoding=Decoding(pages="all"))
