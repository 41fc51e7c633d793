"""Models of Keras, LiteRT and TensorFlow: the same answers as of these themselves."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.services import require, torch_library

from tally.errors import ItemError, ModelLoadError, UntrustedModelError
from tally.models.load import load
from tally.models.resolve import resolve
from tally.scorers.base import Item
from tally.scorers.run import run
from tally.scorers.vision.preprocess import Preprocess, Preprocessor

# Keras on PyTorch gives NumPy tensors that do not know its second version.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PREPROCESS = {"size": [16, 16], "resize": "squash", "scale": 1 / 127.5, "mean": 1.0, "layout": "nhwc"}


@pytest.fixture(scope="module")
def keras() -> Any:
    torch_library()
    there = find_spec("keras") is not None and find_spec("h5py") is not None
    require("Keras (make .venv/test-torch.stamp)", there)
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    keras.utils.set_random_seed(1)
    return keras


def picture(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def scored(path: Path, items: Any, *, trust: bool = False, **options: Any) -> list[Any]:
    scorer = load(resolve(path, settings=options, trust=trust), "cpu")
    try:
        return run(scorer, items)
    finally:
        scorer.close()


def classifier(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((16, 16, 3)), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(5, "softmax")]
    )


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
def test_pictures(keras: Any, tmp_path: Path, suffix: str) -> None:
    model = classifier(keras)
    model.save(tmp_path / f"model{suffix}")
    pictures = [picture(seed) for seed in range(4)]
    rows = scored(tmp_path / f"model{suffix}", pictures, task="classify", preprocess=PREPROCESS, labels=list("abcde"))
    made = [Preprocessor(Preprocess(**PREPROCESS))(Item("a", each)).tensor for each in pictures]
    shares = keras.ops.convert_to_numpy(model(np.stack(made)))
    assert [row["label"] for row in rows] == ["abcde"[at] for at in shares.argmax(axis=1)]
    np.testing.assert_allclose([row["score"] for row in rows], shares.max(axis=1), atol=1e-5)


@pytest.mark.parametrize("rescaled", [False, True])
def test_an_application_is_told_by_its_layers(keras: Any, tmp_path: Path, rescaled: bool) -> None:
    layers = keras.layers
    first = [layers.Rescaling(1 / 127.5, -1)] if rescaled else []
    own = [layers.Conv2D(4, 3, name="Conv1"), layers.Conv2D(4, 1, name="block_16_project")]
    end = [layers.GlobalAveragePooling2D(), layers.Dense(1000, "softmax")]
    keras.Sequential([keras.Input((32, 32, 3)), *first, *own, *end]).save(tmp_path / "model.keras")
    ref = resolve(tmp_path / "model.keras")
    [said] = [each for each in ref.assumed if each.startswith("preprocessing")]
    if rescaled:
        assert (ref.options["preprocess"]["scale"], ref.options["preprocess"]["mean"]) == (1.0, None)
        assert "a network of Keras that rescales pictures itself" in said
    else:
        assert ref.options["preprocess"]["scale"] == pytest.approx(1 / 127.5)
        assert "MobileNetV2 of Keras (told by block_16_project) takes RGB, -1..1" in said


def test_rows_of_numbers(keras: Any, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(2, "softmax")])
    model.save(tmp_path / "rows.keras")
    values = np.random.default_rng(0).normal(size=(6, 3))
    table = pa.table({name: values[:, at] for at, name in enumerate("abc")})
    rows = scored(tmp_path / "rows.keras", table, task="classify", labels=["no", "yes"])
    shares = keras.ops.convert_to_numpy(model(values.astype(np.float32)))
    np.testing.assert_allclose([row["score"] for row in rows], shares.max(axis=1), atol=1e-5)
    assert isinstance(scored(tmp_path / "rows.keras", table.set_column(0, "a", pa.array([None] * 6)))[0], ItemError)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_layers_of_code_take_trust(keras: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x * 2)]).save(path)
    with pytest.raises((UntrustedModelError, ModelLoadError), match="Lambda"):
        resolve(path)
    rows = scored(path, pa.table({"a": [1.0], "b": [2.0], "c": [3.0]}), trust=True)
    assert [*rows[0].values()] == [[2.0, 4.0, 6.0]]


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
def test_files_that_are_refused(keras: Any, tmp_path: Path) -> None:
    import h5py

    model = classifier(keras)
    model.save(tmp_path / "cut.keras")
    content = (tmp_path / "cut.keras").read_bytes()
    (tmp_path / "cut.keras").write_bytes(content[: len(content) // 2])
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file["weights"] = np.zeros(3)
    inputs = [keras.Input((2,)), keras.Input((3,))]
    keras.Model(inputs, keras.layers.Concatenate()(inputs)).save(tmp_path / "two.keras")
    for name, message in (
        ("cut.keras", "cannot be opened: "),
        ("weights.h5", "holds weights alone, or no model of Keras"),
        ("two.keras", "a model takes one tensor, this one has 2 inputs"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            resolve(tmp_path / name)


def test_a_quantized_model_of_tensorflow_lite(data: Path, tmp_path: Path) -> None:
    require("LiteRT (make .venv/test-torch.stamp)", find_spec("ai_edge_litert") is not None)
    from ai_edge_litert.interpreter import Interpreter

    path = data / "models/other_formats/mobilenet_v1_0.25_128_quant.tflite"
    labels = data / "models/labels/imagenet_1001_background.txt"
    pictures = [picture(seed) for seed in range(3)]
    ref = resolve(path, task="classify", labels=labels)
    rows = run(load(ref, "cpu"), pictures)
    other = resolve(data / "models/classify/mobilenet_v1_025_128_u8.onnx", task="classify", labels=labels)
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    preprocess = Preprocessor(Preprocess.model_validate(ref.options["preprocess"]))
    for each, row in zip(pictures, rows, strict=True):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], preprocess(Item("a", each)).tensor[None])
        interpreter.invoke()
        found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0]
        assert row["index"] == int(found.argmax())
        assert row["score"] == pytest.approx(found.max() / 256, abs=1e-6)
    right = run(load(other, "cpu"), pictures)
    assert [row["index"] for row in rows] == [row["index"] for row in right]
    (tmp_path / "cut.tflite").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelLoadError, match=r"cut\.tflite cannot be opened"):
        resolve(tmp_path / "cut.tflite")


def test_a_savedmodel_that_decodes_its_pictures_itself(tmp_path: Path) -> None:
    """As the graph that TensorFlow's retrain.py exported: one JPEG in, the names of all classes out."""
    if find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed: it is too large for these tests")
    import io

    import tensorflow
    from PIL import Image

    tf = tensorflow

    def serve(image: Any) -> Any:
        mean = tf.reduce_mean(tf.cast(tf.io.decode_jpeg(image, 3), tf.float32), [0, 1])
        return {"prediction": tf.nn.softmax(mean[None] / 50), "classes": tf.constant(["red", "green", "blue"])}

    def add(rows: Any) -> Any:
        return {"sum": tf.reduce_sum(rows, 1, keepdims=True)}

    module = tf.Module()
    module.serve = tf.function(serve, input_signature=[tf.TensorSpec([], tf.string, name="image")])
    module.add = tf.function(add, input_signature=[tf.TensorSpec([None, 3], tf.float32, name="rows")])
    tensorflow.saved_model.save(module, str(tmp_path / "1"), {"serving_default": module.serve})
    with pytest.raises(UntrustedModelError, match="a program, which may read and write files"):
        resolve(tmp_path / "1")
    jpegs = []
    for colour in ((250, 10, 10), (10, 10, 250)):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(content, "JPEG")
        jpegs.append(content.getvalue())
    rows = scored(tmp_path / "1", [jpegs[0], b"no picture", jpegs[1]], trust=True)
    assert [rows[0]["label"], rows[2]["label"]] == ["red", "blue"]
    assert rows[0]["score"] > 0.9
    assert isinstance(rows[1], ItemError)

    tensorflow.saved_model.save(module, str(tmp_path / "2"), {"serving_default": module.add})
    table = pa.table({"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [5.0, 6.0]})
    assert scored(tmp_path / "2", table, trust=True) == [{"sum": 9.0}, {"sum": 12.0}]
