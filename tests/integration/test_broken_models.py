"""A model per key that is cut off or damaged is one dead key, and a retry takes the mended file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.extent import first

from tally.jobs.facade import Jobs

skops_io = pytest.importorskip("skops.io")


def onnx_model(path: Path) -> None:
    """Twice the value, with constants enough to be damaged in."""
    wide = helper.make_tensor("wide", TensorProto.FLOAT, [1, 512], np.arange(512, dtype=np.float32))
    nodes = [
        helper.make_node("Add", ["x", "x"], ["y"]),
        helper.make_node("ReduceSum", ["wide"], ["unused"], keepdims=1),
    ]
    row = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", row[:1], row[1:], [wide])
    opsets = [helper.make_opsetid("", 17)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    onnx.checker.check_model(str(path))


def skops_model(path: Path) -> None:
    from sklearn.linear_model import LinearRegression

    x = np.arange(20.0).reshape(-1, 1)
    skops_io.dump(LinearRegression().fit(x, 2 * x[:, 0]), path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "make", "harm"),
    first(2, [("onnx", onnx_model, cut), ("skops", skops_model, flip), ("skops", skops_model, cut)]),
)
def test_a_broken_model_is_one_dead_key_and_retry_takes_the_mended_one(
    cli: Callable[..., Any], tmp_path: Path, suffix: str, make: Callable[[Path], None], harm: Callable[[Path], None]
) -> None:
    (tmp_path / "models").mkdir()
    for device in "abc":
        make(tmp_path / "models" / f"{device}.{suffix}")
    harm(tmp_path / "models" / f"b.{suffix}")
    rows = [f"{'abc'[n % 3]},{n}" for n in range(30)]
    (tmp_path / "in.csv").write_text("device,value\n" + "\n".join(rows) + "\n")
    ran = cli(
        *("score", tmp_path / "in.csv", "--model-per", f"device={tmp_path}/models/{{device}}.{suffix}"),
        *("--out", tmp_path / "out.parquet"),
    )
    assert ran.code == 0, ran.err
    [record] = Jobs().list().jobs
    [dead] = Jobs().dead(record.id)
    assert f"models/b.{suffix} cannot be opened: it is damaged or cut off" in dead.error
    assert Jobs().results(record.id).num_rows == 20

    make(tmp_path / "models" / f"b.{suffix}")
    ran = cli("jobs", "retry", record.id, "--dead")
    assert ran.code == 0, ran.err
    assert list(Jobs().dead(record.id)) == []
    found = Jobs().results(record.id).to_pydict()
    [values] = [found[name] for name in found if name in ("y", "prediction")]
    assert sorted(round(value, 6) for value in values) == [2.0 * n for n in range(30)]
