"""The commands of the quickstart and of each how-to, typed as they stand, in order, in one folder.

What a reader is taken to have is in that folder: pictures, a clip, readings, models by the names that the pages use,
and the page's own files: a block that says ``file=NAME``, or begins with ``# NAME.yaml``. A message ``error: ...``
that follows a command has to be its answer, but for numbers, ids and paths. What needs a service, or takes long, says
so in the page, invisibly: ``<!-- not executed: REASON -->`` before a block; before the first heading, of the whole
page.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tests.pages import DOCS, REPOSITORY, Block, blocks, refused, without_details

Cli = Callable[..., Any]

PAGES = [DOCS / "quickstart.md", *sorted((DOCS / "how-to").glob("*.md"))]
WHOLE_PAGE = re.compile(r"\A<!-- not executed: (.+?) -->", re.DOTALL)
FILE = re.compile(r"file=(\S+)\n|\n# (\w+\.yaml)\n")
NAMED = re.compile(r"(?:(?:registered as|added) `?models:/|--register(?:-best)? |\bregister: |model-name=)([\w-]+)")

MODELS = {
    "squeezenet.onnx": "classify/squeezenet_fp16.onnx",
    "squeezenet/squeezenet.onnx": "classify/squeezenet_fp16.onnx",
    "squeezenet/imagenet_1000.txt": "labels/imagenet_1000.txt",
    "model.onnx": "classify/squeezenet_fp16.onnx",
    "labels.txt": "labels/imagenet_1000.txt",
    "yolox_nano.onnx": "detect/yolox_nano.onnx",
    "face_rfb320.onnx": "detect/face_rfb320.onnx",
    "coco_80.txt": "labels/coco_80.txt",
    "candy.onnx": "style/rain_princess_dyn.onnx",
    "rain_princess.onnx": "style/rain_princess_dyn.onnx",
    "mobilenet_features.onnx": "classify/mobilenet_v2_fp32_features.onnx",
    "features.onnx": "classify/mobilenet_v2_fp32_features.onnx",
    "deeplab_v3.onnx": "segment/deeplab_v3_257.onnx",
    "pascal_voc_21.txt": "labels/pascal_voc_21.txt",
    "coco.txt": "labels/coco_80.txt",
}


@pytest.fixture(scope="module")
def given(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader is taken to have."""
    skio = pytest.importorskip("skops.io")
    from sklearn.ensemble import IsolationForest

    folder = tmp_path_factory.mktemp("given")
    for name, model in MODELS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(data / "models" / model, folder / name)

    random = np.random.default_rng(5)
    for place, count in (("photos/cat", 10), ("photos/dog", 10), ("street", 2), ("new-photos", 2)):
        (folder / place).mkdir(parents=True)
        for number in range(count):
            picture = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((128, 96))
            picture.save(folder / place / f"{number:02}.jpg")
    (folder / "pictures.csv").write_text("path,label\n" + "".join(f"photos/cat/0{n}.jpg,cat\n" for n in range(3)))

    (folder / "weights").mkdir()
    (folder / "weights" / "threshold.txt").write_text("120")
    cat = folder / "photos" / "cat" / "00.jpg"
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "shard-000000.tar", "w") as shard:
        for name, content in (("0.jpg", cat.read_bytes()), ("0.cls", b"3"), ("0.json", b'{"caption": "a cat"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    (folder / "dataset").mkdir()
    held = {"image": [{"bytes": cat.read_bytes(), "path": "cat.jpg"}], "label": [0]}
    pq.write_table(pa.table(held), folder / "dataset" / "train.parquet")
    (folder / "climate.csv").write_text("time,temperature,humidity\n1,20.5,40\n2,21.0,45\n")

    with av.open(str(folder / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 40 * number, np.uint8), format="rgb24")
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode(None))
    (folder / "videos").mkdir()
    shutil.copyfile(folder / "clip.mp4", folder / "videos" / "a.mp4")

    times = pd.date_range("2026-11-20", periods=90, freq="2min", tz="UTC")
    parts = [
        pd.DataFrame({"TS": times, "Device": device, "Tag": tag, "Value": random.normal(50, 5, len(times))})
        for device in (1, 2)
        for tag in (1, 3)
    ]
    readings = pd.concat(parts, ignore_index=True)
    readings.to_parquet(folder / "readings.parquet")
    (folder / "readings").mkdir()
    (folder / "models").mkdir()
    for (device, tag), rows in readings.groupby(["Device", "Tag"]):
        rows.to_csv(folder / f"readings/{device}_{tag}.csv", index=False)
        skio.dump(
            IsolationForest(n_estimators=5, random_state=1).fit(rows[["Value"]]),
            folder / f"models/{device}_{tag}.skops",
        )
    skio.dump(IsolationForest(n_estimators=5, random_state=1).fit(readings[["Value"]]), folder / "model.skops")
    hourly = readings.groupby(["Device", "Tag", pd.Grouper(key="TS", freq="1h")])["Value"].agg(["mean", "max"])
    hourly = hourly.rename(columns=lambda name: f"Value_{name}")
    skio.dump(IsolationForest(n_estimators=5, random_state=1).fit(hourly), folder / "hourly.skops")
    columns = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 1]) for name in ("Tag", "Value", "sum")]
    graph = helper.make_graph([helper.make_node("Add", ["Tag", "Value"], ["sum"])], "sums", columns[:2], columns[2:])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "detector.onnx")
    text = readings.head(20).to_csv(index=False, sep=";", decimal=",")
    (folder / "measurements.txt").write_text(text, "latin-1")
    (folder / "pumps").mkdir()
    for (device, tag), series in readings.groupby(["Device", "Tag"]):
        series[["TS", "Value"]].to_csv(folder / "pumps" / f"{device}_{tag}.csv", index=False)
    return folder


@pytest.fixture
def one_core() -> Any:
    """Jobs take a worker for each core that this process may use: one is enough here."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def executed(page: Path) -> list[Block]:
    return [] if WHOLE_PAGE.match(page.read_text("utf-8")) else [each for each in blocks(page) if not each.not_executed]


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.commands for b in executed(page))], ids=lambda p: p.stem
)
def test_commands_do_what_the_page_says(
    page: Path, given: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(given, folder)
    monkeypatch.chdir(folder)
    shown = executed(page)
    for block in shown:
        if found := FILE.match(f"{block.mark}\n{block.text}"):
            Path(found[1] or found[2]).write_text(block.text, "utf-8")
    for block, refusal in refused(shown):
        for command in block.commands:
            ran = cli(*shlex.split(command, comments=True)[1:])
            assert (ran.code != 0) == (refusal is not None), f"{block}: {command}\n{ran.out}{ran.err}\n{__doc__}"
            if refusal is not None:
                assert without_details(refusal) in without_details(ran.err[ran.err.index("error: ") :]), (
                    f"{block}: {command}"
                )


def test_each_page_has_models_of_its_own() -> None:
    """Whoever follows two pages does not score with the other's model."""
    pages: dict[str, set[str]] = {}
    for page in PAGES:
        for name in NAMED.findall(page.read_text("utf-8")):
            pages.setdefault(name, set()).add(page.stem)
    assert {"sensors", "pumps", "faces", "pets"} <= pages.keys()
    assert {name: where for name, where in pages.items() if len(where) > 1} == {}


SAME_JOB = {"quickstart": {"predictions"}}
"""Written to twice on purpose: the page shows what is said then."""


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", *PAGES], ids=lambda p: p.stem)
def test_each_command_writes_to_a_place_of_its_own(page: Path) -> None:
    """Whoever types a page line by line is not told that the output is there already."""
    outs = [
        out.strip("\"'").rstrip("/")
        for block in blocks(page)
        for line in block.text.replace("\\\n", " ").splitlines()
        for out in re.findall(r"\btally (?:score|train|sweep) .*?(?:--out|-o)[ =](\S+)", line)
    ]
    assert {out for out in outs if outs.count(out) > 1} == SAME_JOB.get(page.stem, set())
