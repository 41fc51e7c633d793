from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tally.errors import ItemError, SpecError
from tally.scorers.base import Item, Pictured, Result, Scorer
from tally.scorers.vision.detection.rows import runs
from tally.scorers.vision.overlay import Overlay, colour_of, draw

GRAY = np.full((120, 160, 3), 90, np.uint8)  # lines are one pixel wide on it, tags 12 high


class Given(Scorer):
    """Gives the results that it was made with; its prepared value is the item's key."""

    def __init__(self, *results: Any) -> None:
        self.results: Any = results
        self.calls: list[Any] = []

    def load(self, artifacts: Path, device: str) -> None:
        self.calls.append((artifacts, device))

    def prepare(self, item: Item) -> Any:
        return item.key

    def score(self, batch: Sequence[Any]) -> Sequence[Result]:
        self.calls.append(list(batch))
        return self.results

    def describe(self) -> str:
        return "given on CPU"

    def close(self) -> None:
        self.calls.append("closed")


def box(xmin: float, ymin: float, xmax: float, ymax: float, label: str = "dog", **more: Any) -> dict[str, Any]:
    return {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax, "label": label, **more}


def test_quadrangles_points_and_masks_are_drawn() -> None:
    turned = box(40, 20, 120, 100, corners=[80, 20, 120, 60, 80, 100, 40, 60])
    drawn = changed(draw(GRAY, [turned]))
    assert drawn[60, 40:44].any()
    assert drawn[20:24, 80].any()
    assert not drawn[80:99, 40:44].any()  # no upright frame
    posed = box(40, 20, 120, 100, keypoints=[60, 60, 100, 60], keypoint_scores=[0.9, 0.1])
    drawn = changed(draw(GRAY, [posed]))
    assert drawn[60, 60]
    assert not drawn[60, 100]
    mask = np.zeros((240, 320), bool)  # of the original, twice as large
    mask[100:140, 100:200] = True
    masked = box(80, 40, 240, 200, mask=runs(mask, 0, 0, 320, 240), pixels=4000)
    drawn = changed(draw(GRAY, [masked], scale=(0.5, 0.5)))
    assert drawn[50:70, 50:100].all()
    assert not drawn[75:98, 45:115].any()


def test_a_mask_of_another_picture_makes_its_item_dead() -> None:
    answer = overlaid([box(1, 1, 9, 9, mask=[10**6, 5])])
    assert isinstance(answer, ItemError)
    assert "a mask of 1,000,005 pixels for a picture of 160x120" in answer.message


def changed(drawn: np.ndarray[Any, Any], picture: np.ndarray[Any, Any] = GRAY) -> np.ndarray[Any, Any]:
    """Which pixels differ: ``bool[h, w]``."""
    assert drawn.shape == picture.shape
    assert drawn.dtype == np.uint8
    return (drawn != picture).any(axis=2)


def overlaid(result: Any, picture: np.ndarray[Any, Any] = GRAY, **info: int) -> Any:
    overlay = Overlay(Given(result))
    (answer,) = overlay.score([overlay.prepare(Item("a.jpg", picture, info))])
    return answer.picture if isinstance(answer, Pictured) else answer


# ----------------------------------------------------------------------------------------------- boxes


def test_box_has_the_labels_colour_and_leaves_the_rest() -> None:
    drawn = draw(GRAY, [box(40, 50, 90, 100)])
    frame = np.zeros((120, 160), bool)
    frame[50:100, 40:90] = True
    frame[51:99, 41:89] = False
    assert (drawn[frame] == colour_of("dog")).all()
    rest = changed(drawn) & ~frame
    assert rest.any()  # the caption
    assert not rest[50:].any()
    assert not rest[:30].any()
    assert not rest[:, :40].any()
    assert (GRAY == 90).all()


def test_lines_and_captions_grow_with_the_picture() -> None:
    large = np.full((2160, 3840, 3), 90, np.uint8)
    drawn = changed(draw(large, [box(1000, 1000, 2000, 2000)]), large)
    assert drawn[1500].sum() == 2 * 8
    assert 40 < drawn[:1000].any(axis=1).sum() < 90


def test_tag_without_room_above_is_inside_the_box_and_the_picture() -> None:
    drawn = changed(draw(GRAY, [box(130, 2, 158, 100, score=0.5)]))
    assert drawn[2:12, 156].all()  # moved to the left, up to the picture's edge
    assert not drawn[:2].any()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (box(-50, 60, 30, 500), (0, 60, 30, 120)),
        (box(100, 40.4, float("inf"), 99.6), (100, 40, 160, 100)),
        (box(-1e30, 30, 1e30, 80), (0, 30, 160, 80)),
        (box(20, 40, 20, 40), (20, 40, 21, 41)),
        (box(159.9, 119.9, 300, 300), (159, 119, 160, 120)),
    ],
)
def test_boxes_partly_outside_are_cut_off(given: dict[str, Any], shown: tuple[int, ...]) -> None:
    left, top, right, bottom = shown
    drawn = changed(draw(GRAY, [{**given, "label": ""}]))
    expected = np.zeros((120, 160), bool)
    expected[top:bottom, left:right] = True
    expected[top + 1 : bottom - 1, left + 1 : right - 1] = False
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize(
    "given",
    [
        box(float("nan"), 10, 50, 50),
        box(10, 10, 50, float("nan")),
        box(50, 10, 20, 50),
        box(10, 50, 50, 20),
        box(200, 10, 300, 50),
        box(-30, 10, -1, 50),
        {**box(0, 0, 0, 0), "xmin": None},
    ],
)
def test_boxes_that_are_none_are_left_out(given: dict[str, Any]) -> None:
    assert not changed(draw(GRAY, [given])).any()
    assert changed(draw(GRAY, [given, box(40, 50, 90, 100)])).any()


def test_picture_of_another_size_than_the_original() -> None:
    rows = [box(80, 100, 180, 200)]
    drawn = overlaid(rows, width=320, height=240)
    np.testing.assert_array_equal(drawn, draw(GRAY, [box(40, 50, 90, 100)]))


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 500, 3), (500, 3, 3)])
def test_tiny_pictures(shape: tuple[int, ...]) -> None:
    picture = np.full(shape, 90, np.uint8)
    assert changed(draw(picture, [box(-9, -9, 999, 999, score=0.5), {"label": "cat"}]), picture).any()


# -------------------------------------------------------------------------------------------- captions


def test_classes_are_listed_at_the_top_left() -> None:
    one = changed(draw(GRAY, [{"label": "cat", "index": 1, "score": 0.8}]))
    height, width = one.any(axis=1).sum(), one.any(axis=0).sum()
    assert one[:height, :width].mean() > 0.9
    rows = [{"label": name, "score": 0.1, "rank": rank} for rank, name in enumerate(["cat", "dog", "owl"], 1)]
    three = draw(GRAY, rows)
    assert [tuple(three[i * height, 0]) for i in range(3)] == [colour_of(name) for name in ("cat", "dog", "owl")]
    assert not changed(three)[3 * height :].any()
    assert changed(draw(GRAY, rows * 30))[-1].any()  # more than there is room for


def test_one_row_alone_and_share() -> None:
    drawn = overlaid({"label": "sky", "pixels": 10, "share": 0.25})
    np.testing.assert_array_equal(drawn, draw(GRAY, [{"label": "sky", "score": np.float32(0.25)}]))
    assert changed(drawn, draw(GRAY, [{"label": "sky"}])).any()


@pytest.mark.parametrize(
    "label", ["naïve", "猫 🐈", "مرحبا", "\ud800", "a\0\n\tb", "\u202e\u200d\U0010ffff", "x" * 9999, 0]
)
def test_any_label_can_be_drawn(label: Any) -> None:
    assert changed(draw(GRAY, [{"label": label}])).any()


def test_text_is_black_or_white_by_luminance() -> None:
    for label in ("bus", "cell phone"):
        colour = colour_of(label)
        tag = draw(GRAY, [{"label": label}])[changed(draw(GRAY, [{"label": label}]))].astype(int)
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 128
        assert (tag.max(axis=1).min() < 60) if bright else (tag.min(axis=1).max() > 200)


def test_colours_are_distinct_and_the_same_in_every_process() -> None:
    assert len({colour_of(f"class {i}") for i in range(200)}) > 40
    code = "from tally.scorers.vision.overlay import colour_of; print(colour_of('dog'))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(colour_of("dog"))


# ------------------------------------------------------------------------------------------ the scorer


def test_one_call_for_the_batch_and_exceptions_pass() -> None:
    failed = ItemError("no")
    inner = Given([box(40, 50, 90, 100)], failed, [])
    overlay = Overlay(inner)
    results = overlay.score([overlay.prepare(Item(key, GRAY)) for key in "abc"])
    assert inner.calls == [["a", "b", "c"]]
    assert isinstance(results[0], Pictured)
    assert isinstance(results[2], Pictured)
    assert changed(results[0].picture).any()
    assert results[0].rows == [box(40, 50, 90, 100)]
    assert results[1] is failed
    assert not changed(results[2].picture).any()
    assert results[2].picture is not GRAY
    assert results[2].rows == []


def test_what_the_inner_scorer_raises_is_raised() -> None:
    class Failing(Given):
        def score(self, batch: Sequence[Any]) -> Sequence[Result]:
            raise RuntimeError("out of memory")

    overlay = Overlay(Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        overlay.score([overlay.prepare(Item("a", GRAY))])


def test_what_is_not_one_result_per_item_is_left_to_the_caller() -> None:
    for results in ([[], []], {"label": "cat"}, None):
        inner = Given()
        inner.results = results
        overlay = Overlay(inner)
        assert overlay.score([overlay.prepare(Item("a", GRAY))]) is results


def test_the_rest_is_the_inner_scorers(tmp_path: Path) -> None:
    inner = Given()
    inner.size, inner.batch_size, inner.input, inner.columns = (32, 32), 3, "frame", {"label": "string"}
    overlay = Overlay(inner)
    assert (overlay.input, overlay.output, overlay.size, overlay.columns) == ("frame", "image", None, inner.columns)
    assert overlay.batch_size == 3
    overlay.batch_size = 5
    assert inner.batch_size == overlay.batch_size == 5
    overlay.load(tmp_path, "cpu")
    overlay.close()
    assert inner.calls == [(tmp_path, "cpu"), "closed"]
    assert overlay.describe() == "given on CPU, drawn onto the picture"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": "image"}, "Given are pictures themselves"),
        ({"input": "table"}, "Given takes 'table'"),
        ({"input": "path"}, "no picture to draw on"),
        ({"columns": {"embedding": "list<float32>"}}, "Given gives only embedding"),
    ],
)
def test_scorers_that_cannot_be_drawn(change: Mapping[str, Any], words: str) -> None:
    inner = Given()
    for name, value in change.items():
        setattr(inner, name, value)
    with pytest.raises(SpecError, match=words):
        Overlay(inner)


@pytest.mark.parametrize(
    "result", [{"embedding": [1.0]}, [{"label": "a"}, {}], np.zeros((2, 2, 3), np.uint8), None, [1]]
)
def test_results_that_cannot_be_drawn(result: Any) -> None:
    answer = overlaid(result)
    assert isinstance(answer, ItemError)
    assert "a.jpg: overlay: the result has neither boxes nor labels" in str(answer)


def test_a_box_that_is_no_number() -> None:
    answer = overlaid([{**box(1, 1, 5, 5), "xmin": "left"}])
    assert isinstance(answer, ItemError)
    assert "left" in str(answer)
