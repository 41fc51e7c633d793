"""Whole jobs over real photos: right answers, bad files set aside, nothing else touched."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import tally

Cli = Callable[..., Any]


def answers(data: Path) -> list[dict[str, str]]:
    with (data / "images" / "imagenet" / "labels.csv").open(newline="") as file:
        names = ("file", "truth", "wnid", "label", "mobilenet", "mobilenet_score", "squeezenet", "squeezenet_score")
        return [dict(zip(names, line, strict=True)) for line in list(csv.reader(file))[1:]]


def rows_of(job: tally.Job) -> list[dict[str, Any]]:
    return sorted(job.results().to_pylist(), key=lambda row: (row["key"], -row.get("score", 0)))


# ------------------------------------------------------------------------------------------ right answers


def test_mobilenet_reproduces_every_photo(data: Path, tmp_path: Path) -> None:
    job = tally.score(
        data / "images" / "imagenet",
        data / "models" / "classify" / "mobilenet_v2_fp32.onnx",
        tmp_path / "out",
        task="classify",
        labels=str(data / "models" / "labels" / "imagenet_1001_background.txt"),
        quiet=True,
    )
    rows = {row["key"]: row for row in job.results().to_pylist()}
    expected = answers(data)
    assert sorted(rows) == sorted(each["file"] for each in expected)
    assert len(rows) == job.results().num_rows == 100
    for each in expected:
        row = rows[each["file"]]
        assert row["index"] - 1 == int(each["mobilenet"]), each["file"]  # a background class is first
        assert row["score"] == pytest.approx(float(each["mobilenet_score"]), abs=0.01), each["file"]
    assert rows["n01440764_tench.JPEG"]["label"] == "tench, Tinca tinca"


def test_squeezenet_in_half_precision_reproduces_every_photo(data: Path, tmp_path: Path) -> None:
    job = tally.score(
        data / "images" / "imagenet",
        data / "models" / "classify" / "squeezenet_fp16.onnx",
        tmp_path / "out.csv",
        labels=str(data / "models" / "labels" / "imagenet_1000.txt"),
        settings={"preprocess.channels": "bgr", "preprocess.mean": [104, 117, 123]},
        quiet=True,
    )
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    assert len(rows) == job.record.rows == 100
    for each in answers(data):
        row = rows[each["file"]]
        assert int(row["index"]) == int(each["squeezenet"]), each["file"]
        assert float(row["score"]) == pytest.approx(float(each["squeezenet_score"]), abs=0.01), each["file"]


def test_rows_do_not_depend_on_the_batch(data: Path, tmp_path: Path) -> None:
    one, many = (
        rows_of(
            tally.score(
                data / "images" / "imagenet",
                data / "models" / "classify" / "mobilenet_v2_u8.onnx",
                tmp_path / f"batch{size}",
                batch_size=size,
                settings={"top": 3},
                quiet=True,
            )
        )
        for size in (1, 32)
    )
    assert len(one) == 300
    assert one == many


def test_photos_are_scored_upright(data: Path, tmp_path: Path) -> None:
    job = tally.score(
        data / "images" / "exif_orientation" / "Portrait_*.jpg",
        data / "models" / "classify" / "mobilenet_v2_fp32.onnx",
        tmp_path / "out",
        quiet=True,
    )
    rows = rows_of(job)
    assert [row["key"] for row in rows] == [f"Portrait_{number}.jpg" for number in range(9)]
    assert len({row["index"] for row in rows}) == 1  # the scores differ: each was compressed by itself once turned

    # The same pixels, stored in eight ways, and without loss.
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    turned = tmp_path / "turned"
    turned.mkdir()
    with Image.open(data / "images" / "exif_orientation" / "Portrait_1.jpg") as image:
        small = image.resize((300, 450))
    for tag, transpose in stored.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        picture = small if transpose is None else small.transpose(Image.Transpose(transpose))
        picture.save(turned / f"{tag}.png", exif=exif)
    job = tally.score(turned, data / "models" / "classify" / "mobilenet_v2_fp32.onnx", tmp_path / "again", quiet=True)
    rows = rows_of(job)
    assert len(rows) == 8
    assert {(row["label"], row["score"]) for row in rows} == {(rows[0]["label"], rows[0]["score"])}


def test_embeddings_know_what_is_alike(data: Path, tmp_path: Path) -> None:
    hopper = [data / "images" / "odd" / name for name in ("hopper.jpg", "hopper.png", "hopper.bmp", "hopper.webp")]
    job = tally.score(
        [*hopper, data / "images" / "photos" / "parrot.jpg"],
        data / "models" / "classify" / "mobilenet_v2_fp32_features.onnx",
        tmp_path / "out",
        task="embed",
        quiet=True,
    )
    rows = {row["key"].rpartition("/")[2]: np.array(row["embedding"]) for row in job.results().to_pylist()}
    assert {vector.shape for vector in rows.values()} == {(1280,)}

    def alike(one: str, other: str) -> float:
        a, b = rows[one], rows[other]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert alike("hopper.png", "hopper.bmp") > 0.999
    assert alike("hopper.png", "hopper.jpg") > 0.9
    assert alike("hopper.png", "parrot.jpg") < 0.6


def test_segments_as_rows_and_as_pictures(data: Path, tmp_path: Path) -> None:
    photos = [data / "images" / "photos" / name for name in ("cat_720p.jpg", "bird_segmentation.bmp")]
    model = data / "models" / "segment" / "deeplab_v3_257.onnx"
    labels = str(data / "models" / "labels" / "pascal_voc_21.txt")
    job = tally.score(photos, model, tmp_path / "rows", labels=labels, quiet=True)
    shares = {(row["key"], row["label"]): row["share"] for row in job.results().to_pylist()}
    assert shares["cat_720p.jpg", "cat"] == pytest.approx(0.355, abs=0.005)
    assert shares["bird_segmentation.bmp", "bird"] == pytest.approx(0.197, abs=0.005)
    job = tally.score(photos, model, tmp_path / "masks", settings={"output": "image"}, quiet=True)
    masks = {path.name.partition(".")[0]: path for path in (tmp_path / "masks").rglob("*.png")}
    assert sorted(masks) == ["bird_segmentation", "cat_720p"]
    for photo in photos:
        with Image.open(photo) as image, Image.open(masks[photo.stem]) as mask:
            assert mask.size == image.size
            marked = float((np.asarray(mask.convert("L")) > 0).mean())
        label = "cat" if photo.stem == "cat_720p" else "bird"
        assert marked == pytest.approx(shares[photo.name, label], abs=0.01)


@pytest.mark.parametrize(
    ("model", "settings"),
    [("candy_720", {"preprocess.channels": "bgr"}), ("mosaic_720", {}), ("rain_princess_dyn", {})],
)
def test_restyled_pictures(data: Path, tmp_path: Path, model: str, settings: dict[str, Any]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    sizes = {"cat.png": (301, 170), "dog.jpg": (320, 240), "deep/er/parrot.webp": (150, 210)}
    for name, size in sizes.items():
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        source = {"cat.png": "cat_720p.jpg", "dog.jpg": "dog.jpg"}.get(name, "parrot.jpg")
        with Image.open(data / "images" / "photos" / source) as image:
            image.convert("RGB").resize(size).save(photos / name)
    out = tmp_path / "pictures"
    job = tally.score(
        photos, data / "models" / "style" / f"{model}.onnx", out, task="restyle", settings=settings, quiet=True
    )
    assert job.record.dead == 0
    for name, size in sizes.items():
        with Image.open(out / name) as styled, Image.open(photos / name) as photo:
            assert styled.size == size
            assert styled.format == photo.format
            after, before = (np.asarray(image.convert("L"), float).ravel() for image in (styled, photo))
        assert after.min() < 40
        assert after.max() > 215
        # In another style, and yet the same scene.
        assert np.corrcoef(after, before)[0, 1] > 0.4
        assert np.abs(after - before).mean() > 8


# -------------------------------------------------------------------------------------- bad files among them


@contextmanager
def peak_of_workers() -> Iterator[list[int]]:
    """Bytes of memory that a process started here held at most, looked at every few hundredths of a second."""
    peak = [0]
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.03):
            for child in psutil.Process().children(recursive=True):
                try:
                    peak[0] = max(peak[0], child.memory_info().rss)
                except psutil.Error:
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


@pytest.fixture
def mixture(data: Path, tmp_path: Path) -> Path:
    """Copies of 20 good photos, all odd ones and all hostile files, in one folder."""
    folder = tmp_path / "mixture"
    folder.mkdir()
    for kind, files in {
        "good": sorted((data / "images" / "imagenet").glob("*.JPEG"))[:20],
        "odd": sorted((data / "images" / "odd").iterdir()),
        "hostile": sorted((data / "hostile" / "images").iterdir()),
    }.items():
        for file in files:
            shutil.copyfile(file, folder / f"{kind}_{file.name}")
    return folder


def test_bad_files_cost_only_themselves(cli: Cli, data: Path, mixture: Path, tmp_path: Path) -> None:
    model = data / "models" / "classify" / "mobilenet_v2_u8.onnx"
    with peak_of_workers() as peak:
        ran = cli("score", mixture / "*", "--model", model, "--out", tmp_path / "out", "--workers", 2)
    assert ran.code == 0, ran.err
    # The largest that is not refused by its header announces 84 million pixels, for which Pillow takes 650 MiB;
    # a worker decodes two at a time.
    assert 50 * 2**20 < peak[0] < 1.75 * 2**30
    job = tally.Job(json.loads(cli("jobs", "show", tmp_path / "out", "--json").out)["id"])
    every = {path.name for path in mixture.iterdir()}
    rows, dead = rows_of(job), {row["key"]: row for row in job.dead().to_pylist()}
    assert {row["key"] for row in rows} | set(dead) == every
    assert len(rows) + len(dead) == len(every) == job.record.items

    # Every good photo has the row that it has alone.
    alone = tally.score(mixture / "good_*", model, tmp_path / "alone", quiet=True)
    assert [row for row in rows if row["key"].startswith("good_")] == rows_of(alone)
    assert alone.record.dead == 0
    # Odd ones are pictures: of those that Pillow reads, none is dead.
    assert {key for key in dead if key.startswith("odd_")} == set()
    assert len(dead) > 100

    for each in dead.values():
        assert each["stage"] == "decode"
        assert 10 < len(each["error"]) < 300
        assert each["error"].isprintable()
        for words in ("Traceback", "object at 0x", "Error:", "PIL"):
            assert words not in each["error"], each
    assert dead["hostile_derived_bomb_13000x13000_rgb.png"]["error"] == (
        "13000x13000 = 169.0 million pixels is over the limit of 128 million (max_pixels raises it)"
    )
    assert dead["hostile_derived_zero_bytes.jpg"]["error"] == "the file is empty (0 bytes)"

    shown = cli("jobs", "dead", tmp_path / "out", "-n", 1000).out.splitlines()
    assert {tuple(line.split("\t")) for line in shown} == {tuple(each.values()) for each in dead.values()}
    limited = cli("jobs", "dead", tmp_path / "out", "-n", 3)
    assert len(limited.out.splitlines()) == 3
    assert f"... and {len(dead) - 3} more (-n {len(dead)})" in limited.err

    # Mended files join the results; what was right before is as it was.
    parrot = data / "images" / "photos" / "parrot.jpg"
    mended = ["hostile_derived_bomb_13000x13000_rgb.png", "hostile_derived_zero_bytes.jpg"]
    for name in mended:
        shutil.copyfile(parrot, mixture / name)
    ran = cli("jobs", "retry", tmp_path / "out", "--dead")
    assert ran.code == 0, ran.err
    after = {row["key"]: row for row in rows_of(job)}
    assert job.record.dead == len(dead) - 2
    assert [after.pop(name)["index"] for name in mended] == [89, 89]  # a macaw
    assert list(after.values()) == rows
    assert set(dead) - {row["key"] for row in job.dead().to_pylist()} == set(mended)


def test_a_folder_gives_the_files_that_are_pictures_by_name(cli: Cli, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(data / "images" / "photos", folder)
    ran = cli(
        *(
            "score",
            folder,
            "--model",
            data / "models/classify/mobilenet_v1_025_128_u8.onnx",
            "--out",
            tmp_path / "o.csv",
        )
    )
    assert ran.code == 0, ran.err
    assert "1 file passed over, not images by their name: without suffix 1" in ran.err
    assert f"'{folder}/**/*' takes them all" in ran.err
    assert "17 of 17 items scored" in ran.err


# ----------------------------------------------------------------------------------------- models and devices


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lfs_pointer_named.onnx", ["Git LFS pointer of 134 bytes", "git lfs pull"]),
        ("custom_op_noisy_relu.onnx", ["the operator NoisyRelu", "standard ONNX operators"]),
        ("superres_needs_ort_extensions.onnx", ["DecodeImage", "onnxruntime-extensions"]),
        ("sklearn_0.19.2_pickle_model_1_1", ["is a pickle", "--trust"]),
        ("derived_fastestdet_truncated_60pct.onnx", ["damaged or cut short (598,901 bytes)", "again"]),
    ],
)
def test_hostile_models_are_refused(cli: Cli, data: Path, tmp_path: Path, name: str, words: list[str]) -> None:
    model = data / "hostile" / "models" / name
    ran = cli("score", data / "images" / "photos", "--model", model, "--out", tmp_path / "out")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: ")
    assert str(model) in ran.err
    assert ran.err.count("\n") == 2
    for each in words:
        assert each in ran.err
    assert not (tmp_path / "out").exists()
    assert cli("jobs", "list").out == ""


def test_every_hostile_model_is_tried(data: Path) -> None:
    assert len(list((data / "hostile" / "models").iterdir())) == 5


def test_a_trusted_pickle_of_another_scikit_learn_is_told_as_that(cli: Cli, data: Path, tmp_path: Path) -> None:
    model = data / "hostile" / "models" / "sklearn_0.19.2_pickle_model_1_1"
    ran = cli("score", data / "images" / "photos", "--model", model, "--out", tmp_path / "out", "--trust")
    assert ran.code == 1
    assert "was saved with another version of scikit-learn" in ran.err


def test_a_device_that_is_not_there(cli: Cli, data: Path, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    score = (
        *("score", data / "images" / "photos" / "parrot.jpg", "--out", tmp_path / "out"),
        *("--model", data / "models" / "classify" / "mobilenet_v2_u8.onnx"),
    )
    ran = cli(*score, "--device", "cuda")
    assert ran.code == 1
    assert "error: device cuda was asked for, but this ONNX Runtime has only" in ran.err
    assert "onnxruntime-gpu" in ran.err
    assert "Traceback" not in ran.err
    # Without that wish the same command works, and says where it runs.
    ran = cli(*score)
    assert ran.code == 0, ran.err
    assert "mobilenet_v2_u8.onnx on CPU (1 thread), classify, 224x224" in ran.err
