"""COCO JSON as a source: its pictures are scored, and what is annotated in them is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.conftest import Ran

from tally import Job
from tally.errors import SpecError
from tally.sources.coco import open_coco

SCRIPT = """import tally

class Sides(tally.Scorer):
    columns = {"height": "int32", "width": "int32"}

    def score(self, batch):
        return [{"height": each.shape[0], "width": each.shape[1]} for each in batch]
"""

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "sides.py").write_text(SCRIPT)
    return f"{tmp_path}/sides.py:Sides"


def picture(path: Path, width: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (width, 8), "red").save(path)
    return path


def write(path: Path, images: list[Any], annotations: Any = (), categories: Any = CATEGORIES) -> Path:
    path.write_text(json.dumps({"images": images, "annotations": list(annotations), "categories": categories}))
    return path


def test_pictures_and_their_annotations(tmp_path: Path, model: str, cli: Callable[..., Ran]) -> None:
    picture(tmp_path / "a.png", 10)
    picture(tmp_path / "images" / "b.png", 20)
    elsewhere = picture(tmp_path / "elsewhere.png", 30)
    images = [
        {"id": 5, "file_name": "a.png"},
        {"id": 1, "file_name": "b.png", "coco_url": "http://127.0.0.1:1/never-asked"},
        {"id": 2, "file_name": "c.png", "coco_url": f"file://{elsewhere}"},
        {"id": 9, "file_name": "gone.png"},
        {"id": 10},
    ]
    annotations = [
        {"id": 21, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4.5], "segmentation": [[1, 2, 3, 4, 5, 6]]},
        {"id": 20, "image_id": 1, "category_id": 3, "bbox": [0, 0, 20, 8], "iscrowd": 1,
         "segmentation": {"counts": [4, 5], "size": [8, 20]}},
        {"id": 22, "image_id": 2, "category_id": 4, "bbox": [0, 0, -1, 8]},
        {"id": 22, "image_id": 99, "category_id": 3, "bbox": [0, 0, 1, 1]},
    ]  # fmt: skip
    listed = write(tmp_path / "instances.json", images, annotations)
    out = tmp_path / "out"
    ran = cli("score", listed, "--model", model, "--out", out)
    assert ran.code == 0, ran.err
    nothing: dict[str, Any] = {f"annotation_{each}": [] for each in ("ids", "labels", "boxes", "crowds")}
    assert pq.read_table(out / "part-00000.parquet").to_pylist() == [
        {"key": "a.png", "image_id": 5, **nothing, "height": 8, "width": 10},
        {
            "key": "b.png", "image_id": 1, "annotation_ids": [21, 20], "annotation_labels": ["dog", "cat"],
            "annotation_boxes": [[1, 2, 4, 6.5], [0, 0, 20, 8]], "annotation_crowds": [False, True],
            "height": 8, "width": 20,
        },
        {
            "key": "c.png", "image_id": 2, "annotation_ids": [22], "annotation_labels": [None],
            "annotation_boxes": [None], "annotation_crowds": [False], "height": 8, "width": 30,
        },
    ]  # fmt: skip
    for said in (
        "of 4 annotations",
        "1 has no box: bbox is not x, y, width and height (annotation 22)",
        "1 has no label: its category is not listed (category_id 4)",
        "1 is of a picture that is not listed, and left out (image_id 99)",
        "2 has a mask (polygons or RLE), which is not kept (annotation 21)",
    ):
        assert said in " ".join(ran.err.split()), said
    dead = dict(zip(*[Job(str(out)).dead().column(each).to_pylist() for each in ("key", "error")], strict=True))
    assert dead.keys() == {"gone.png", "instances.json#5"}
    assert "neither file_name nor coco_url" in dead["instances.json#5"]


def test_keys_and_columns_are_chosen(tmp_path: Path, model: str, cli: Callable[..., Ran]) -> None:
    picture(tmp_path / "train" / "a.png", 10)
    picture(tmp_path / "val" / "a.png", 12)
    images = [{"id": "one", "file_name": "train/a.png"}, {"id": "two", "file_name": "val/a.png"}]
    listed = write(tmp_path / "list.json", images, [{"id": "x", "image_id": "two", "category_id": 3, "bbox": [0] * 4}])
    out = tmp_path / "out.csv"
    ran = cli(
        "score", "--items", listed, "--key", "image_id", "--keep", "annotation_ids,annotation_boxes",
        "--model", model, "--out", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert out.read_text().splitlines() == [
        "key,annotation_ids,annotation_boxes,height,width",
        "one,[],[],8,10",
        'two,"[""x""]","[[0.0, 0.0, 0.0, 0.0]]",8,12',
    ]
    (tmp_path / "apart").mkdir()
    moved = listed.rename(tmp_path / "apart" / "list.json")
    again = cli(
        "score", moved, "--base", tmp_path, "--model", model, "--out", tmp_path / "other.csv", "--keep", "image_id"
    )
    assert again.code == 0, again.err
    assert "train/a.png,one,8,10" in (tmp_path / "other.csv").read_text()


def test_pictures_in_a_bucket(s3: str, model: str, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    from tally.storage import open_store

    store = open_store(f"{s3}/set")
    store.write("images/a.png", picture(tmp_path / "a.png", 10).read_bytes())
    store.write("all.json", json.dumps({"images": [{"id": 1, "file_name": "a.png"}]}).encode())
    ran = cli("score", f"{s3}/set/all.json", "--model", model, "--out", tmp_path / "out.csv", "--keep", "image_id")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out.csv").read_text() == "key,image_id,height,width\na.png,1,8,10\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"images": [', "is no JSON"),
        ('{"image": "a.png"}\n{"image": "b.png"}\n', "is no JSON"),
        ('{"pictures": []}', "it has no list 'images'"),
        ('{"images": ["a.png"]}', "images should be a list of objects, and has 'a.png'"),
        ('{"images": [], "annotations": {"a": 1}}', "annotations should be a list of objects"),
        ('{"images": [], "annotations": 7}', "annotations should be a list of objects, and has '7'"),
        ('{"images": [{"file_name": "a.png"}]}', "the id of images 1 is None, no number or text"),
        ('{"images": [{"id": 1}, {"id": 2}, {"id": 1}]}', "several images have the same id: 1"),
        ('{"images": [], "categories": [{"id": 1}, {"id": 1}]}', "several categories have the same id: 1"),
    ],
    ids=["cut", "lines", "other", "names", "annotations", "number", "no-id", "ids", "categories"],
)
def test_what_is_not_coco_is_refused(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SpecError, match=why):
        open_coco(str(tmp_path / "a.json"))


def test_what_is_wrong_with_the_job(tmp_path: Path, model: str, cli: Callable[..., Ran]) -> None:
    listed = write(tmp_path / "a.json", [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}])

    def refused(*options: object) -> str:
        ran = cli("score", *options, "--model", model, "--out", tmp_path / "out")
        assert ran.code
        return " ".join(ran.err.split())

    assert "several items have the same key: 'a.png' (2 times)" in refused(listed)
    assert "gives no 'image_ids'; did you mean 'image_id'?" in refused(listed, "--keep", "image_ids")
    assert "file_name or image_id as keys" in refused(listed, "--key", "id")
    assert "where: is for tables" in refused(listed, "--where", "id = 1")
    assert "there are 2 sources" in refused(listed, tmp_path / "b.png")
    assert "names no items" in refused(write(tmp_path / "none.json", []))
    assert "there is no list" in refused("--items", tmp_path / "nothing.json")
    results = tmp_path / "results.json"
    results.write_text('[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    assert "not clear which column" in refused("--items", results)
    assert "--items" in refused(results)


def test_a_list_of_objects_is_a_list_of_another_kind(tmp_path: Path, model: str, cli: Callable[..., Ran]) -> None:
    picture(tmp_path / "a.png", 10)
    (tmp_path / "list.json").write_text('[{"file_name": "a.png", "n": 3}]')
    out = tmp_path / "out.csv"
    ran = cli("score", "--items", tmp_path / "list.json", "--keep", "n", "--model", model, "--out", out)
    assert ran.code == 0, ran.err
    assert out.read_text() == "key,n,height,width\na.png,3,8,10\n"


EMPTY = """import tally

class Wide(tally.Scorer):
    columns = {"label": "string", "xmin": "float32"}

    def score(self, batch):
        return [[{"label": "wide", "xmin": 1}] if each.shape[1] > 15 else [] for each in batch]
"""


@pytest.mark.parametrize("out", ["out", "out.csv"])
def test_a_picture_in_which_nothing_is_found_keeps_its_annotations(
    tmp_path: Path, cli: Callable[..., Ran], out: str
) -> None:
    (tmp_path / "wide.py").write_text(EMPTY)
    for name, width in (("a.png", 10), ("b.png", 20)):
        picture(tmp_path / name, width)
    (tmp_path / "c.png").write_bytes(b"no picture")
    annotations = [{"id": 7, "image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4]}]
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate("abc")]
    listed = write(tmp_path / "instances.json", images, annotations)
    command = (
        "score",
        listed,
        "--model",
        f"{tmp_path}/wide.py",
        "--thumbnails",
        32,
        "--keep",
        "annotation_labels",
        "-q",
    )
    ran = cli(*command, "--empty-rows", "--out", tmp_path / out)
    assert ran.code == 0, ran.err
    sql = "select * replace (annotation_labels::varchar as annotation_labels) from results"
    assert Job(str(tmp_path / out)).query(sql).to_pylist() == [
        {"key": "a.png", "annotation_labels": "[cat]", "label": None, "xmin": None},
        {"key": "b.png", "annotation_labels": "[]", "label": "wide", "xmin": 1.0},
    ]
    ran = cli(*command, "--empty-rows", "--overlay", "--out", tmp_path / "drawn")
    assert "empty_rows: is for rows" in ran.err
