"""Tables of labelled boxes become what detectors are trained from; what is wrong with one is told by its row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from tally.cli.main import cli
from tally.errors import OutputExistsError, SpecError
from tally.training.labels.formats import convert, example
from tally.training.labels.table import read

HALF = {"label": "cup", "topX": 0.25, "topY": 0.5, "bottomX": 0.75, "bottomY": 1.0}
LID = {"type": "a lid", "topX": 0.0, "topY": 0.1, "bottomX": 0.5, "bottomY": 0.2}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (200, 100)).save(folder / "a.jpg")
    Image.new("RGB", (40, 80)).save(folder / "more" / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # upright, it is 50 wide and 20 high
    Image.new("RGB", (20, 50)).save(folder / "b.jpg", exif=exif)
    return folder


def table(place: Path, *rows: tuple[str, Any, Any]) -> Path:
    with place.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_url", "label", "label_confidence"])
        writer.writerows((url, str(boxes), str(sure)) for url, boxes, sure in rows)
    return place


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    flat = HALF | {"bottomX": 0.25}
    return table(
        tmp_path / "labels.csv",
        ("AmlDatastore://store/images/a.jpg", [HALF, LID, flat], [1.0, 0.4, 1.0]),
        ("https://host/more/a.jpg?sig=x%2Fy", [HALF], [0.9]),
        ("b.jpg", [HALF], []),
        ("more/../b.jpg", [], []),
    )


def test_a_table_is_read(images: Path, labels: Path) -> None:
    found = read(labels, images)
    assert [(each.picture.relative_to(images).as_posix(), each.width, each.height) for each in found.pictures] == [
        ("a.jpg", 200, 100), ("more/a.jpg", 40, 80), ("b.jpg", 50, 20), ("b.jpg", 50, 20),
    ]  # fmt: skip
    first = found.pictures[0].boxes
    assert [(b.label, b.xmin, b.ymin, b.xmax, b.ymax) for b in first] == [
        ("cup", 50, 50, 150, 100), ("a lid", 0, 10, 100, 20),
    ]  # fmt: skip
    assert [(b.xmin, b.ymin, b.xmax, b.ymax) for b in found.pictures[2].boxes] == [(12.5, 10, 37.5, 20)]
    assert (found.empty, found.unsure) == (1, 0)
    surer = read(labels, images, confidence=0.5)
    assert (len(surer.pictures[0].boxes), surer.unsure) == (1, 1)
    lines = labels.with_suffix(".jsonl")
    lines.write_text(json.dumps({"image_url": "b.jpg", "label": [{**HALF, "topX": 300, "bottomX": 10}]}))
    [only] = read(lines, images, units="pixels").pictures[0].boxes
    assert (only.xmin, only.xmax) == (10, 50)  # cut off at the picture's edge


def test_fractions_are_no_pixels_and_a_box_of_nothing_is_told(images: Path, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"row 1: a box reaches to 0.75, 1, which is one pixel at most; leave out --units"
    ):
        read(labels, images, units="pixels")
    small = HALF | {"bottomX": 0.251, "bottomY": 0.501}  # a hundredth of a pixel of the picture
    found = read(table(tmp_path / "small.csv", ("b.jpg", [HALF, small], [])), images)
    assert (len(found.pictures[0].boxes), found.empty) == (1, 1)
    words = ["train", "labels", "--train-set", labels, images, "--format", "yolov5", "-o", tmp_path / "out"]
    told = CliRunner().invoke(cli, [*map(str, words)], standalone_mode=False, catch_exceptions=False)
    assert "no --test-set: dataset.yaml has the pictures for training as val, too" in told.output


def test_the_four_formats(images: Path, labels: Path, tmp_path: Path) -> None:
    one = table(tmp_path / "test.csv", ("b.jpg", [HALF], [1.0]))

    def converted(form: str) -> Path:
        words = ["train", "labels", "--train-set", labels, images, "--test-set", one, images, "--format", form]
        told = CliRunner().invoke(
            cli, [*map(str, words), "-o", str(tmp_path / form)], standalone_mode=False, catch_exceptions=False
        )
        assert "4 pictures with 4 boxes to train, 1 pictures with 1 boxes to test; classes: a lid, cup" in told.output
        assert "labels.csv: 1 boxes without area were left out" in told.output
        return tmp_path / form

    yolo = converted("yolov3")
    lines = (yolo / "train.txt").read_text().splitlines()
    assert lines[0] == f"{images}/a.jpg 50,50,150,100,1 0,10,100,20,0"
    assert lines[3] == f"{images}/b.jpg"
    assert (yolo / "labels.txt").read_text() == "a lid\ncup\n"

    rows = list(csv.reader((converted("csv") / "train.csv").read_text().splitlines()))
    assert rows[0] == ["class", "filename", "height", "width", "xmax", "xmin", "ymax", "ymin"]
    assert rows[1] == ["cup", "a.jpg", "100", "200", "150", "50", "100", "50"]
    assert (tmp_path / "csv" / "labelmap.pbtxt").read_text().startswith('item {\n  id: 1\n  name: "a lid"\n}')

    folders = converted("yolov5")
    described = yaml.safe_load((folders / "dataset.yaml").read_text())
    assert described == {
        "train": f"{folders}/images/train", "val": f"{folders}/images/val", "nc": 2, "names": ["a lid", "cup"],
    }  # fmt: skip
    assert (folders / "labels/train/a.txt").read_text().splitlines()[0] == "1 0.500000 0.750000 0.500000 0.500000"
    pictures, texts = (
        sorted(each.stem for each in (folders / what / "train").iterdir()) for what in ("images", "labels")
    )
    assert pictures == texts
    assert len(texts) == 4

    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader = PyRecordReader_New(str(converted("tfrecord") / "train.record"))
    reader.GetNext()
    found = example().FromString(reader.record()).features.feature
    assert list(found["image/object/class/text"].bytes_list.value) == [b"cup", b"a lid"]
    assert list(found["image/object/class/label"].int64_list.value) == [2, 1]
    assert list(found["image/object/bbox/xmin"].float_list.value) == [0.25, 0.0]
    assert found["image/encoded"].bytes_list.value[0] == (images / "a.jpg").read_bytes()
    # Two pictures are called a.jpg: by that alone, the boxes of one would be the other's.
    assert {row[1] for row in rows[1:]} == {"a.jpg", "more/a.jpg", "b.jpg"}
    reader.GetNext()
    found = example().FromString(reader.record()).features.feature
    assert found["image/filename"].bytes_list.value[0] == b"more/a.jpg"
    with pytest.raises(OutputExistsError):
        converted("csv")


def test_names_that_meet_and_labels_of_any_script(tmp_path: Path) -> None:
    from google.protobuf import struct_pb2, text_format

    rows = []
    for number, name in enumerate(("x-2.jpg", "a/x.jpg", "b/x.jpg")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 100)).save(tmp_path / "images" / name)
        rows.append((name, [HALF | {"label": f"{number} \N{DOG FACE}"}], []))
    read_back = read(table(tmp_path / "labels.csv", *rows), tmp_path / "images")
    classes = convert({"train": read_back.pictures}, "yolov5", tmp_path / "yolo")
    texts = {each.name: each.read_text()[0] for each in (tmp_path / "yolo/labels/train").iterdir()}
    assert texts == {"x-2.txt": "0", "x.txt": "1", "x-2-2.txt": "2"}
    convert({"train": read_back.pictures}, "csv", tmp_path / "csv")
    names = [line for line in (tmp_path / "csv/labelmap.pbtxt").read_text("utf-8").splitlines() if "name:" in line]
    told = [text_format.Parse(f"string_value: {each.split(': ')[1]}", struct_pb2.Value()) for each in names]
    assert [each.string_value for each in told] == classes == [f"{number} \N{DOG FACE}" for number in range(3)]
    torn = read(table(tmp_path / "torn.csv", ("x-2.jpg", [HALF | {"label": "two\nlines"}], [])), tmp_path / "images")
    with pytest.raises(SpecError, match=r"a line for each class, and 'two\\nlines' is none"):
        convert({"train": torn.pictures}, "yolov3", tmp_path / "yolov3")


def test_the_message_is_that_of_tensorflow() -> None:
    """The bytes are those that TensorFlow's own tutorial prints."""
    written = (
        b"\nR\n\x14\n\x08feature2\x12\x08\n\x06\n\x04goat\n\x14\n\x08feature3\x12\x08\x12\x06\n\x04[\xd3|?"
        b"\n\x11\n\x08feature0\x12\x05\x1a\x03\n\x01\x00\n\x11\n\x08feature1\x12\x05\x1a\x03\n\x01\x04"
    )
    found = example().FromString(written).features.feature
    assert (found["feature0"].int64_list.value, found["feature1"].int64_list.value) == ([0], [4])
    assert found["feature2"].bytes_list.value == [b"goat"]
    assert found["feature3"].float_list.value == pytest.approx([0.9876])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("gone.jpg", [HALF], []), "1 pictures are not in .*: gone.jpg"),
        (("a.jpg", [HALF], []), "may be .*a.jpg or .*a.jpg"),
        (("b.jpg", "cup", []), "row 1: label is no list: 'cup'"),
        (("b.jpg", [{"label": "x"}], []), "a box has no topX, topY, bottomX, bottomY"),
        (("b.jpg", [HALF | {"label": None}], []), "a box has no label"),
        (("b.jpg", [HALF | {"bottomX": 300}], []), "no fractions of the picture; say --units pixels"),
        (("b.jpg", [HALF], [0.5, 0.5]), "1 boxes, but label_confidence 2"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(images: Path, tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        read(table(tmp_path / "wrong.csv", row), images)


@pytest.mark.parametrize("form", ["csv", "jsonl", "folder"])
def test_results_of_a_detector_become_coco(images: Path, tmp_path: Path, form: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"key": "more/a.jpg", "xmin": 4.0, "ymin": 8.0, "xmax": 24.0, "ymax": 48.0, "label": "lid", "score": 0.9},
        {"key": "b.jpg", "xmin": -3.0, "ymin": 2.0, "xmax": 60.0, "ymax": 12.5, "label": "cup", "score": 0.8},
        {"key": "b.jpg", "xmin": 1.0, "ymin": 1.0, "xmax": 9.0, "ymax": 9.0, "label": "cup", "score": 0.3},
        {"key": "b.jpg", "xmin": 2.0, "ymin": 2.0, "xmax": 9.0, "ymax": 9.0, "label": "cup", "score": 0.0},
        {"key": "c.jpg", **dict.fromkeys(("xmin", "ymin", "xmax", "ymax", "label", "score"))},  # nothing is in it
    ]
    Image.new("RGB", (30, 60)).save(images / "c.jpg")
    results = tmp_path / ("results" if form == "folder" else f"results.{form}")
    if form == "csv":
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif form == "jsonl":
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        results.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), results / "part-00000.parquet")
        pq.write_table(pa.Table.from_pylist(rows), results / "left-over.parquet")
        (results / "_manifest.json").write_text(json.dumps({"files": [{"path": "part-00000.parquet"}]}))
    out = tmp_path / "out"
    arguments = [
        "train",
        "labels",
        "--train-set",
        results,
        images,
        "--format",
        "coco",
        "--confidence",
        "0.5",
        "-o",
        out,
    ]
    ran = CliRunner().invoke(cli, [str(each) for each in arguments])
    assert ran.exit_code == 0, ran.output
    made = json.loads((out / "train.json").read_text())
    assert [(each["file_name"], each["width"], each["height"]) for each in made["images"]] == [
        ("more/a.jpg", 40, 80), ("b.jpg", 50, 20), ("c.jpg", 30, 60),
    ]  # fmt: skip
    assert [(each["image_id"], each["category_id"], each["bbox"]) for each in made["annotations"]] == [
        (1, 2, [4.0, 8.0, 20.0, 40.0]), (2, 1, [0.0, 2.0, 50.0, 10.5]),
    ]  # fmt: skip
    assert made["categories"] == [{"id": 1, "name": "cup"}, {"id": 2, "name": "lid"}]
