"""Jobs that keep small pictures of their items: whatever these come from, they can be looked at afterwards."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.archives import tar
from tests.conftest import Ran
from tests.objectstores import moto_s3

import tally
from tally.errors import SpecError
from tally.jobs.facade import Jobs
from tally.notebooks.view import item_pictures
from tally.storage import open_store

FIND = """import tally

class Find(tally.Scorer):
    columns = {"label": "string", **dict.fromkeys(["xmin", "ymin", "xmax", "ymax"], "float64")}
    batch_size = 4

    def score(self, batch):
        return [self.found(picture) for picture in batch]

    def found(self, picture):
        if picture[0, 0, 1] > 200:
            raise ValueError("too green")
        return [{"label": "red", "xmin": 0, "ymin": 0, "xmax": 100, "ymax": 50}] if picture[0, 0, 0] > 9 else []
"""


def png(colour: str, size: tuple[int, int] = (400, 200)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(autouse=True)
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("find.py").write_text(FIND)


PICTURES = {
    "a.png": png("red"),
    "b.png": png("blue"),
    "c.png": png("lime"),
    "d.png": b"no picture",
    "e.png": png("red"),
}
SCORED = ("a.png", "b.png", "e.png")


def write(source: str) -> tuple[str, str]:
    """Pictures in a source of that kind: its name, and what keys begin with."""
    match source:
        case "tar":
            Path("in.tar").write_bytes(tar(PICTURES))
            return "in.tar", "in.tar/"
        case "parquet":
            rows = [{"bytes": content, "path": name} for name, content in PICTURES.items()]
            pq.write_table(pa.table({"image": rows}), "in.parquet")
            return "in.parquet", "in.parquet/"
    Path("elsewhere").mkdir()
    for name, content in PICTURES.items():
        Path("elsewhere", name).write_bytes(content)
    if source == "list":
        Path("list.txt").write_text("".join(f"elsewhere/{name}\n" for name in PICTURES))
        return "list.txt", "elsewhere/"
    images = [{"id": number, "file_name": name} for number, name in enumerate(PICTURES)]
    Path("coco.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    os.rename("elsewhere", "images")  # noqa: PTH104
    return "coco.json", ""


@pytest.mark.parametrize("source", ["tar", "parquet", "list", "coco"])
def test_pictures_that_are_no_files_of_the_source_are_shown(source: str, cli: Callable[..., Ran]) -> None:
    name, prefix = write(source)
    listed = ["--items"] if source == "list" else []
    ran = cli("score", *listed, name, "--model", "find.py", "--thumbnails", 150, "--out", "out", "-q")
    assert ran.code == 0, ran.err
    kept = {row["key"]: row for row in pq.read_table("out/_thumbnails").to_pylist()}
    assert sorted(kept) == [prefix + each for each in SCORED]
    assert all((row["width"], row["height"]) == (400, 200) for row in kept.values())
    assert Image.open(io.BytesIO(kept[prefix + "b.png"]["thumbnail"])).size == (150, 75)
    manifest = json.loads(Path("out/_manifest.json").read_text())
    assert [(file["path"], file["rows"]) for file in manifest["thumbnails"]] == [("_thumbnails/part-00000.parquet", 3)]

    job = tally.Job("out")
    shown = item_pictures(Jobs(), job.record, limit=9, side=300)
    assert [key for key, _ in shown] == [prefix + "a.png", prefix + "e.png"]  # those in which something is
    picture = Image.open(io.BytesIO(shown[0][1])).convert("RGB")
    assert picture.size == (300, 150)
    edge, beside = picture.getpixel((74, 30)), picture.getpixel((90, 30))
    assert edge != beside  # the box ends at a quarter of the width
    assert beside == pytest.approx((254, 0, 0), abs=3)
    assert job.gallery() is not None


def test_what_is_mended_gets_its_own(cli: Callable[..., Ran]) -> None:
    Path("in").mkdir()
    for name, content in PICTURES.items():
        Path("in", name).write_bytes(content)
    assert cli("score", "in", "--model", "find.py", "--thumbnails", 64, "--out", "out.csv", "-q").code == 0
    Path("in/d.png").write_bytes(png("red", (30, 60)))
    ran = cli("jobs", "retry", "out.csv", "--dead", "-q")
    assert ran.code == 0, ran.err
    rows = pq.read_table("out.thumbnails").to_pylist()
    assert [row["key"] for row in rows] == ["a.png", "b.png", "e.png", "d.png"]
    assert (rows[-1]["width"], rows[-1]["height"]) == (30, 60)
    assert Image.open(io.BytesIO(rows[-1]["thumbnail"])).size == (30, 60)

    ran = cli("score", "in", "--model", "find.py", "--out", "out.csv", "-q")  # it is another job
    assert "--overwrite" in ran.err
    assert cli("score", "in", "--model", "find.py", "--out", "out.csv", "--overwrite", "-q").code == 0
    assert not list(Path().glob("out.thumbnails/*"))


def test_pictures_in_and_out_of_a_bucket(cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_s3() as service:
        service.enter(monkeypatch)
        bucket = service.make("thumbnails")
        open_store(bucket).write("in/shard.tar", tar(PICTURES))
        command = ("score", f"{bucket}/in/shard.tar", "--model", "find.py", "--thumbnails", 50, "-q")
        ran = cli(*command, "--overlay", "--out", f"{bucket}/drawn")
        assert ran.code == 0, ran.err
        names = {entry.name for entry in open_store(f"{bucket}/drawn").list()}
        assert names >= {"_thumbnails/part-00000.parquet", "shard.tar/a.png"}
        record = tally.Job(f"{bucket}/drawn").record
        kept = Jobs().thumbnails(record.id, [f"shard.tar/{name}" for name in PICTURES])
        assert sorted(kept) == [f"shard.tar/{name}" for name in SCORED]
        assert Image.open(io.BytesIO(kept["shard.tar/b.png"].jpeg)).size == (50, 25)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"source": "a.csv", "model": "rows.py"}, "thumbnails: is for pictures, and the model is given tables"),
        ({"source": "a.png", "model": "bytes.py"}, "thumbnails: is for pictures, and the model is given the content"),
        ({"source": "clip.mp4", "frames": "jpg"}, "thumbnails: is for pictures, and the source is a video"),
        ({"pages": "all"}, "thumbnails: shows one picture of each item"),
        ({"thumbnails": 5}, "thumbnails: .*16"),
        ({"source": "redis://127.0.0.1:1/0?stream=s"}, "thumbnails: is for sources with an end"),
    ],
    ids=["tables", "bytes", "video", "pages", "small", "queue"],
)
def test_what_has_no_thumbnails_is_refused(given: dict[str, Any], why: str, data: Path) -> None:
    Path("a.csv").write_text("x\n1\n")
    Path("a.png").write_bytes(png("red"))
    Path("clip.mp4").symlink_to(next((data / "video" / "plain").glob("*.mp4")))
    for name, kind in (("rows", "table"), ("bytes", "bytes")):
        Path(f"{name}.py").write_text(f"import tally\nclass S(tally.Scorer):\n    input = {kind!r}\n")
    fields = {"source": "a.png", "model": "find.py", "out": "out", "thumbnails": 150, "quiet": True, **given}
    with pytest.raises(SpecError, match=why):
        tally.score(**fields)
