"""Every ready-made scorer in a process that has nothing but the model and the values: no job, source or sink."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pyarrow as pa
import pytest
import skops.io
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM
from tests.colours import model as colours

from tally.errors import ItemError
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.scorers.base import Item, Scorer
from tally.scorers.per_key import packed

CHILD = """
import pickle, sys
ref, runs = pickle.load(sys.stdin.buffer)
from tally.models.load import load
from tally.scorers.run import run
scorer = load(ref, "cpu")
results = [run(scorer, items) for items in runs]
scorer.close()
output = sys.stdout.buffer
pickle.dump((results, sorted(sys.modules)), output)
"""
JOBS = ("sqlalchemy", "alembic", "duckdb", "psycopg")
ARROW = ("pyarrow", "pandas")
BAD = b"\xff\xd8 no picture"


@dataclass(frozen=True)
class Case:
    """A model, good items, one that is bad, and a check of the results of the good ones.

    items: one value each, or for models of tables a table with one row each. bad: of the same kind, one item.
    error: what the bad one's error says.
    """

    ref: ModelRef
    items: Any
    bad: Any
    error: str
    check: Callable[[list[Any]], object]
    absent: Sequence[str] = field(default=(*JOBS, *ARROW))


def png(red: int, green: int, blue: int, size: tuple[int, int] = (20, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (red, green, blue)).save(file, "PNG")
    return file.getvalue()


RED, GREEN, BLUE = png(250, 0, 0), png(0, 250, 0), png(0, 0, 250)
PICTURES = [RED, GREEN, BLUE]


def graph(path: Path, nodes: list[onnx.NodeProto], shape: list[Any], *outputs: list[Any]) -> Path:
    """A model from ``x`` to ``y`` (and ``z``)."""
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip("yz", outputs, strict=False)],
    )
    path.write_bytes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return path


def constant(name: str, values: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.float32)))


def labels(found: list[Any]) -> list[str]:
    return [row["label"] for row in found]


# ----------------------------------------------------------------------------------------------- pictures


def classify(folder: Path) -> Case:
    ref = resolve(colours(folder / "m.onnx"), task="classify", settings={"labels": ["red", "green", "blue"]})
    return Case(ref, PICTURES, BAD, "damaged JPEG", lambda found: labels(found) == ["red", "green", "blue"])


def embed(folder: Path) -> Case:
    ref = resolve(colours(folder / "m.onnx"), task="embed", settings={"preprocess": {"mean": 0, "std": 1}})
    return Case(
        ref, PICTURES, BAD, "damaged JPEG", lambda found: [int(np.argmax(r["embedding"])) for r in found] == [0, 1, 2]
    )


def detect(folder: Path) -> Case:
    nodes = [
        constant("y", [[[0.1, 0.9], [0.8, 0.2]]]),
        constant("z", [[[0.25, 0.5, 0.75, 1.0], [0, 0, 0.1, 0.1]]]),
    ]
    ref = resolve(graph(folder / "m.onnx", nodes, [1, 3, 8, 8], [1, 2, 2], [1, 2, 4]), settings={"labels": ["face"]})
    box = {"xmin": 5, "ymin": 5, "xmax": 15, "ymax": 10, "label": "face", "score": pytest.approx(0.9)}
    return Case(ref, PICTURES, BAD, "damaged JPEG", lambda found: found == [[box]] * 3)


def restyle(folder: Path) -> Case:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    ref = resolve(graph(folder / "m.onnx", nodes, ["b", 3, "h", "w"], ["b", 3, "h", "w"]), settings={"batch_size": 8})
    pixels = [[250, 0, 0], [0, 250, 0], [0, 0, 250]]
    return Case(ref, PICTURES, BAD, "damaged JPEG", lambda found: [each[0, 0].tolist() for each in found] == pixels)


def segment(folder: Path) -> Case:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    path = graph(folder / "m.onnx", nodes, ["b", 8, 8, 3], ["b", 8, 8, 3])
    ref = resolve(path, task="segment", settings={"labels": ["r", "g", "b"]})
    return Case(
        ref, PICTURES, BAD, "damaged JPEG", lambda found: [labels(rows) for rows in found] == [["r"], ["g"], ["b"]]
    )


def arrays(folder: Path) -> Case:
    """Decoded pictures instead of files."""
    ref = resolve(colours(folder / "m.onnx"), task="classify", settings={"labels": ["red", "green", "blue"]})
    decoded = [np.asarray(Image.open(io.BytesIO(each))) for each in PICTURES]
    bad = np.zeros((10, 20, 3), np.float32)
    error = "OnnxVisionScorer takes a picture: a file's content, or uint8[height, width, 3], not float32[10, 20, 3]"
    return Case(ref, decoded, bad, error, lambda found: labels(found) == ["red", "green", "blue"])


SCORER = """
from tally import Scorer
class Mean(Scorer):
    def __init__(self, scale=1): self.scale = scale
    def load(self, artifacts, device): self.loaded = True
    def prepare(self, item): return item.value.mean(axis=(0, 1)) * self.scale
    def score(self, batch):
        assert self.loaded
        return [{"mean": value.tolist()} for value in batch]
"""


def means(found: list[Any]) -> bool:
    return [row["mean"] for row in found] == [[500, 0, 0], [0, 500, 0], [0, 0, 500]]


def python_file(folder: Path) -> Case:
    (folder / "mean.py").write_text(SCORER)
    return Case(resolve(folder / "mean.py", settings={"scale": 2}), PICTURES, BAD, "damaged JPEG", means)


def python_package(folder: Path) -> Case:
    (folder / "package").mkdir()
    (folder / "package" / "mean.py").write_text(SCORER)
    (folder / "package" / "tally.yaml").write_text("entry: mean.py:Mean\noptions: {scale: 2}\n")
    return Case(resolve(folder / "package"), PICTURES, BAD, "damaged JPEG", means)


def live_object(folder: Path) -> Case:
    class Twice(Scorer):
        """Of the calling program."""

        def score(self, batch: Any) -> Any:
            return [{"mean": (picture.mean(axis=(0, 1)) * 2).tolist()} for picture in batch]

    return Case(resolve(Twice()), PICTURES, BAD, "damaged JPEG", means)


# ------------------------------------------------------------------------------------------------ scripts

SCRIPT = """
import json, os
from azureml.contrib.services.aml_request import AMLRequest, rawhttp
from azureml.contrib.services.aml_response import AMLResponse
def init():
    global folder
    folder = os.environ["AZUREML_MODEL_DIR"]
def size_of(content):
    if content.startswith(b"bad"):
        raise ValueError("cannot score this")
    return {"size": len(content)}
"""
FORMS = {
    "raw": "@rawhttp\ndef run(request): return AMLResponse(json.dumps(size_of(request.get_data(False))), 200)",
    "bytes": "def run(image): return size_of(image)",
    "json": "def run(raw_data): return json.dumps(size_of(raw_data.encode()))",
    "mini_batch": "def run(mini_batch): return [size_of(open(path, 'rb').read()) for path in mini_batch]",
}


def script(form: str) -> Callable[[Path], Case]:
    def made(folder: Path) -> Case:
        (folder / "score.py").write_text(f"{SCRIPT}{FORMS[form]}\n")
        ref = resolve(folder / "score.py")
        assert ref.options["form"] == form
        return Case(
            ref,
            [b"1", b"22", b"333"],
            b"bad",
            "ValueError: cannot score this (score.py, line",
            lambda found: found == [{"size": 1}, {"size": 2}, {"size": 3}],
        )

    return made


def script_of_paths(folder: Path) -> Case:
    """Files that are on the disk already."""
    case = script("mini_batch")(folder)
    for number in range(3):
        (folder / f"{number}.bin").write_bytes(b"x" * (number + 1))
    paths = [folder / f"{number}.bin" for number in range(3)]
    return Case(case.ref, paths, folder / "missing.bin", "FileNotFoundError: ", case.check)


def script_of_files_read(folder: Path) -> Case:
    """Files that are read for a script of bytes."""
    case = script("bytes")(folder)
    for number in range(3):
        (folder / f"{number}.bin").write_bytes(b"x" * (number + 1))
    paths = [folder / f"{number}.bin" for number in range(3)]
    return Case(case.ref, paths, folder / "missing.bin", "cannot read ", case.check)


def script_of_frames(folder: Path) -> Case:
    text = "def init(): ...\ndef run(df):\n    assert (df['a'] > 0).all(), 'negative'\n    return df['a'] * df['b']\n"
    (folder / "score.py").write_text(text)
    rows = pa.table({"a": [1.0, 2.0, 3.0], "b": [1, 2, 3]})
    return Case(
        resolve(folder / "score.py"),
        rows,
        pa.table({"a": [-1.0], "b": [1]}),
        "AssertionError: negative (score.py, line 3)",
        lambda found: found == [{"prediction": 1.0}, {"prediction": 4.0}, {"prediction": 9.0}],
        JOBS,
    )


# ------------------------------------------------------------------------------------------------- tables

VALUES = np.random.default_rng(3).normal(20, 2, (60, 2))


def onnx_table(folder: Path) -> Case:
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.array([[1], [10]], np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    (folder / "m.onnx").write_bytes(helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString())
    rows = pa.table({"b": [1.0, 2.0, 3.0], "unused": ["x", "y", "z"], "a": [0.0, 1.0, 2.0]})
    return Case(
        resolve(folder / "m.onnx", settings={"features": "a,b"}),
        rows,
        pa.table({"b": [None], "unused": ["x"], "a": [0.0]}, schema=rows.schema),
        "b is null",
        lambda found: [row["y"] for row in found] == [10, 21, 32],
        JOBS,
    )


def sklearn(folder: Path) -> Case:
    frame = pd.DataFrame(VALUES, columns=["a", "b"])
    skops.io.dump(LogisticRegression().fit(frame, np.where(VALUES[:, 0] > 20, "high", "low")), folder / "m.skops")
    rows = pa.table({"a": [10.0, 30.0, 12.0], "b": [20.0, 20.0, 20.0]})
    return Case(
        resolve(folder / "m.skops"),
        rows,
        pa.table({"a": [float("nan")], "b": [20.0]}),
        "a is NaN",
        lambda found: labels(found) == ["low", "high", "low"],
        JOBS,
    )


def pyfunc(folder: Path) -> Case:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        mlflow = pytest.importorskip("mlflow.pyfunc", reason="mlflow is not installed (pip install mlflow-skinny)")
        from mlflow.models import infer_signature

        (folder / "code.py").write_text(
            "import mlflow\n"
            "class Model(mlflow.pyfunc.PythonModel):\n"
            "    def predict(self, context, model_input, params=None): return model_input['n'] * 2\n"
            "mlflow.models.set_model(Model())\n"
        )
        signature = infer_signature(pd.DataFrame({"n": [1, 2]}))
        mlflow.save_model(
            folder / "model", python_model=str(folder / "code.py"), signature=signature, pip_requirements=[]
        )
    return Case(
        resolve(folder / "model", trust=True),
        pa.table({"n": pa.array([1.0, 2.0, 3.0])}),
        pa.table({"n": [2.5]}),
        "n is 2.5, but the model's signature says long",
        lambda found: [row["n"] for row in found] == [2, 4, 6],
        ("alembic", "duckdb"),
    )


def detector(level: float) -> Any:
    values = np.random.default_rng(int(level)).normal(level, 2, (40, 1))
    return make_pipeline(StandardScaler(), OneClassSVM(nu=0.1)).fit(values)


READINGS = pa.table({"Device": [1, 2, 1], "Value": [20.0, 40.0, 90.0]})
NO_MODEL = pa.table({"Device": [3], "Value": [20.0]})


def is_anomaly(found: list[Any]) -> bool:
    return [row["anomaly"] for row in found] == [False, False, True]


def packed_models(folder: Path) -> Case:
    models = (packed.Model({"Device": device}, detector(device * 20)) for device in (1, 2))
    packed.write(folder / "pumps", models, by=["Device"])
    return Case(resolve(folder / "pumps"), READINGS, NO_MODEL, "no model", is_anomaly, JOBS)


def keyed_models(folder: Path) -> Case:
    for device in (1, 2):
        skops.io.dump(detector(device * 20), folder / f"{device}.skops")
    ref = resolve(f"{folder}/{{Device}}.skops", by=("Device",))
    return Case(ref, READINGS, NO_MODEL, "no model", is_anomaly, JOBS)


CASES: dict[str, Callable[[Path], Case]] = {
    **{each.__name__: each for each in (classify, embed, detect, restyle, segment, arrays)},
    **{each.__name__: each for each in (python_file, python_package, live_object)},
    **{f"script-{form}": script(form) for form in FORMS},
    **{each.__name__: each for each in (script_of_paths, script_of_files_read, script_of_frames)},
    **{each.__name__: each for each in (onnx_table, sklearn, pyfunc, packed_models, keyed_models)},
}


def scored(ref: ModelRef, runs: Sequence[Any]) -> tuple[list[list[Any]], list[str]]:
    """The results of each run in a fresh process, and the modules that were imported there."""
    ran = subprocess.run(
        [sys.executable, "-c", CHILD], input=pickle.dumps((ref, runs)), capture_output=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr.decode()
    results, modules = pickle.loads(ran.stdout)
    return results, modules


@pytest.mark.parametrize("name", CASES)
def test_results_without_a_job_and_one_bad_item_costs_only_itself(name: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    if isinstance(case.items, pa.Table):
        with_bad: Any = pa.concat_tables([case.items[:1], case.bad, case.items[1:]])
        with_keys: Any = case.items
    else:
        with_bad = [case.items[0], case.bad, *case.items[1:]]
        with_keys = [Item(f"folder/{number}.png", value) for number, value in enumerate(case.items)]

    (alone, disturbed, keyed), modules = scored(case.ref, [case.items, with_bad, with_keys])

    assert case.check(alone), alone
    assert len(disturbed) == 4
    bad = disturbed.pop(1)
    assert isinstance(bad, ItemError)
    assert case.error in bad.message
    for results in (disturbed, keyed):
        assert len(results) == len(alone)
        assert all(np.array_equal(one, other) for one, other in zip(results, alone, strict=True))
    loaded = {module.partition(".")[0] for module in modules}
    assert loaded.isdisjoint(case.absent)
    assert [module for module in modules if module.startswith(("tally.jobs", "tally.database", "tally.sinks"))] == []
