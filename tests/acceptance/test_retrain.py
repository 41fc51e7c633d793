"""Real photos, retrained on a real backbone: how good it is, and that it answers as the original's client expects."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Ran
from tests.endpoints import serving

import tally
from tally.models.registry import open_registry
from tally.training.runs.store import RunRecord, RunStore

BACKBONE = "models/classify/mobilenet_v2_fp32_features.onnx"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bottlenecks")


@pytest.fixture
def retrained(cli: Callable[..., Ran], data: Path, cache: Path) -> Callable[..., RunRecord]:
    def run(image_dir: Path, *arguments: object) -> RunRecord:
        given = ("--image_dir", image_dir, "--backbone", data / BACKBONE, "--bottleneck_dir", cache, *arguments)
        ran = cli("train", "retrain", *given)
        assert ran.code == 0, ran.err
        return RunStore.open().list(kind="retrain").runs[0]

    return run


def test_animals_are_told_apart_and_answered_as_the_original_did(
    retrained: Callable[..., RunRecord], data: Path, tmp_path: Path, home: Path
) -> None:
    photos = data / "images" / "retrain_animals4"
    first = retrained(photos, "--register", "inception", "--testing_percentage", 20)
    assert first.metrics["test_accuracy"].last >= 0.95
    moved = Path(shutil.copytree(photos, tmp_path / "moved"))
    again = retrained(moved, "--register", "inception", "--testing_percentage", 20)
    assert again.tags["bottlenecks"] == "0 computed, 80 from the cache"
    assert again.metrics == first.metrics
    assert len(open_registry().show("inception").versions) == 1

    some = [photos / name for name in ("cat/cat01.jpeg", "elephant/elephant01.jpeg")]
    job = tally.score(some, "models:/inception", tmp_path / "rows", quiet=True, workers=1)
    rows = {row["key"]: row for row in job.results().to_pylist()}

    grpc = pytest.importorskip("grpc")
    from tests.grpc_client import PREDICTION, Client

    with (
        serving(tmp_path, "models:/inception", "--grpc-port", 0, environment={"TALLY_HOME": str(home)}) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        for photo in some:
            image = {"dtype": "DT_STRING", "string_val": [photo.read_bytes()]}  # a scalar
            answer = Client(channel).call(
                PREDICTION, "Predict", inputs={"image": image},
                model_spec={"name": "inception", "signature_name": "serving_default"},
            )  # fmt: skip
            classes, prediction = answer.outputs["classes"], answer.outputs["prediction"]
            assert set(answer.outputs) == {"classes", "prediction"}
            assert list(classes.string_val) == [b"cat", b"cow", b"dog", b"elephant"]
            assert [dim.size for dim in classes.tensor_shape.dim] == [4]
            assert [dim.size for dim in prediction.tensor_shape.dim] == [1, 4]
            row = rows[f"{photo.parent.name}/{photo.name}"]
            best = int(np.argmax(prediction.float_val))
            assert row["label"] == photo.parent.name == classes.string_val[best].decode()
            assert prediction.float_val[best] == pytest.approx(row["score"], abs=1e-5)
            assert sum(prediction.float_val) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("part", "testing"), [("", 10), ("train", 40)])
def test_cats_and_dogs_are_told_apart(retrained: Callable[..., RunRecord], data: Path, part: str, testing: int) -> None:
    """With the parts that the folders give, and with parts drawn from one of them."""
    found = retrained(data / "images" / "retrain_cat_dog" / part, "--testing_percentage", testing)
    assert found.metrics["test_accuracy"].last >= 0.97
    assert found.metrics["test_accuracy"].step == 3999
