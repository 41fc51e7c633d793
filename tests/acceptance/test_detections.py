"""Whole detection jobs give the reference boxes, photo by photo."""

from __future__ import annotations

import csv
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SIDES = ("xmin", "ymin", "xmax", "ymax")


@pytest.fixture(scope="module")
def expected(data: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    found: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(
        (data / "images" / "detections_reference.json").read_text()
    )
    assert len(found) == 44
    return found


@pytest.fixture(scope="module")
def photos(data: Path, expected: Mapping[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos of the reference, and no others, under the same names."""
    folder = tmp_path_factory.mktemp("photos")
    for key in expected:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).symlink_to(data / key)
    return folder


def by_key(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        found[row["key"]].append(row)
    return found


def agree(rows: list[Mapping[str, Any]], wanted: list[dict[str, Any]], what: str) -> None:
    """The same boxes, strongest first, within a pixel and 0.01 of score."""
    assert len(rows) == len(wanted), what
    for row, box in zip(rows, wanted, strict=True):
        assert [float(row[side]) for side in SIDES] == pytest.approx(box["box"], abs=1), what
        assert float(row["score"]) == pytest.approx(box["score"], abs=0.01), what
        assert row["label"] == box.get("label", "face"), what


def test_the_references_hold_for_upright_photos(photos: Path, expected: Mapping[str, object]) -> None:
    # They were made from the stored pixels; Tally turns photos upright first. None of these is to be turned, so that
    # both see the same.
    for key in expected:
        with Image.open(photos / key) as image:
            assert image.getexif().get(0x0112, 1) == 1, key


@pytest.mark.parametrize("out", ["boxes", "boxes.csv"])
@pytest.mark.parametrize(
    ("model", "entry", "options"),
    [
        ("yolox_nano", "yolox_nano", ["--labels", "coco_80.txt"]),
        ("face_rfb320", "faces_rfb320", ["--labels", "face.txt"]),
    ],
)
def test_boxes_equal_the_reference(
    cli: Callable[..., Any],
    data: Path,
    photos: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    entry: str,
    options: list[str],
    out: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(data / "models" / "labels" / "coco_80.txt", "coco_80.txt")
    Path("face.txt").write_text("face\n")
    ran = cli("score", photos, "--model", data / f"models/detect/{model}.onnx", "-t", "detect", *options, "--out", out)
    assert ran.code == 0, ran.err
    assert "44 of 44 items scored" in ran.err
    answer = cli("query", out, "select * from results", "--json")
    rows = by_key(json.loads(line) for line in answer.out.splitlines())
    if out == "boxes.csv":
        with Path(out).open(newline="") as file:
            reader = csv.DictReader(file)
            assert set(reader.fieldnames or ()) >= {"key", "label", "score", *SIDES}
            assert by_key(reader).keys() == rows.keys()
    for key, answers in expected.items():
        agree(rows.pop(key, []), answers[entry], key)
    assert not rows


def test_fastestdet_finds_the_dog_the_car_and_the_bicycle(
    cli: Callable[..., Any], data: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """The reference holds the other two detectors; of this one the scores on one photo are known."""
    out = tmp_path / "boxes"
    ran = cli(
        *("score", data / "images" / "photos" / "dog.jpg", "--model", data / "models/detect/fastestdet.onnx"),
        *("--task", "detect", "--labels", data / "models/labels/coco_80.txt", "--out", out),
    )
    assert ran.code == 0, ran.err
    rows = [
        json.loads(line) for line in cli("query", out, "from results order by score desc", "--json").out.splitlines()
    ]
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        best.setdefault(row["label"], row)
    assert {label: round(row["score"], 2) for label, row in best.items()} == {"car": 0.78, "dog": 0.77, "bicycle": 0.73}
    for box in expected["images/photos/dog.jpg"]["yolox_nano"][:2]:
        assert [best[box["label"]][side] for side in SIDES] == pytest.approx(box["box"], abs=20)


def test_boxes_are_in_pixels_of_the_upright_photo(cli: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    """A photo that is stored lying down, with the tag that says so, gives the boxes of the upright one."""
    photos = tmp_path / "photos"
    photos.mkdir()
    with Image.open(data / "images" / "photos" / "dog.jpg") as image:
        image.save(photos / "upright.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise for viewing
        image.transpose(Image.Transpose.ROTATE_90).save(photos / "lying.png", exif=exif)
    ran = cli(
        "score", photos, "--model", data / "models/detect/yolox_nano.onnx", "-t", "detect", "-o", tmp_path / "out"
    )
    assert ran.code == 0, ran.err
    answer = cli("query", tmp_path / "out", "select * from results", "--json")
    rows = by_key(json.loads(line) for line in answer.out.splitlines())
    assert len(rows["upright.png"]) >= 3
    assert [{**row, "key": ""} for row in rows["lying.png"]] == [{**row, "key": ""} for row in rows["upright.png"]]
