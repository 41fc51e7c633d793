"""What a training logs is kept, whatever ends it; and what cannot be logged is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from tests import colours

import tally
from tally.database.tables import runs
from tally.errors import OwnershipLostError, RunStateError, SpecError
from tally.models.registry import open_registry
from tally.training.runs import tracking
from tally.training.runs.child import Office
from tally.training.runs.compare import best_first, has_result
from tally.training.runs.events import EventWriter, Node, histogram
from tally.training.runs.pictures import as_picture
from tally.training.runs.store import Figures, RunStore
from tally.training.runs.tracking import artifacts, logged_pictures


def test_a_run_keeps_all_that_was_logged(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("a,b\n")
    model = colours.model(tmp_path / "colours.onnx")
    given = {"lr": np.float32(0.5), "api_key": "abc", "tokenizer": "bert", "url": "s3://me:pw@host/x"}
    with tally.training.run("pets", given, data={"labels": tmp_path / "labels.csv"}) as run:
        for step in range(3):
            run.log({"loss": 1 / (1 + step), "mAP@0.5:0.95": step / 10}, step=10 * step)
        run.log("loss", math.nan)  # at step 21
        run.log_list("values", [np.int64(3), 4.5])
        run.log_image("seen/cat", np.ones((4, 6)), 7)
        run.log_artifact(tmp_path / "labels.csv", "given/labels.csv")
        run.tags["area"] = "x"
        run.log_parameters({"seed": 1})
        uri = run.register(model, "Pets", alias="champion", properties={"size": 8}, tags={"by": "me"})
        assert uri == "models:/pets/1"
        assert run.last_values()["values"] == 4.5
        for wrong in (("loss", "much"), ("", 1.0), ("loss", 1.0, 0.5)):
            with pytest.raises(SpecError):
                run.log(*wrong)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="within the run's folder"):
            run.log_artifact(model, "../outside")
    with pytest.raises(RunStateError, match="has ended"):
        run.log("loss", 1.0)
    store = RunStore.open()
    record = store.get(run.id)
    assert (record.state, record.name, record.error, record.models) == ("finished", "pets", None, [uri])
    kept = {"lr": 0.5, "seed": 1, "api_key": "***", "tokenizer": "bert", "url": "***"}
    assert dict(record.parameters) == kept
    assert run.parameters["api_key"] == "abc"
    assert (record.tags, list(record.data)) == ({"area": "x"}, ["labels"])
    assert record.data["labels"]["bytes"] == 4
    assert record.metrics["mAP@0.5:0.95"] == Figures(0.2, 20, 0.0, 0.2, 3)
    assert (record.metrics["loss"].step, record.metrics["loss"].least) == (21, 1 / 3)
    curve = store.values(run.id)["loss"]
    assert (curve.steps, curve.values[:3]) == ([0, 10, 20, 21], [1.0, 0.5, 1 / 3])
    assert record.cost["processor_seconds"] > 0
    assert record.environment["packages"]["numpy"] == np.__version__
    assert artifacts(run.folder) == ["given/labels.csv"]
    [picture] = logged_pictures(run.folder)["seen/cat"].values()
    assert as_picture(picture).shape == (4, 6, 3)
    version = open_registry().get("models:/pets@champion")
    assert version.metadata["run"] == run.id
    assert version.metadata["metrics"]["values"] == 4.5
    assert (version.metadata["properties"], version.metadata["tags"]) == ({"size": 8}, {"by": "me"})


def test_pictures_are_kept_under_names_of_any_script_and_length() -> None:
    names = ["猫" * 83, "x" * 250, "..", ".hidden/" + "." * 240, "5.png", "a%2Fb", "a/b"]
    with tally.training.run() as run:
        places = [run.log_image(name, np.zeros((2, 3)), 4) for name in names]
    assert logged_pictures(run.folder) == {name: {4: place} for name, place in zip(names, places, strict=True)}
    assert artifacts(run.folder) == []


def test_a_run_that_failed_or_diverged_is_not_the_best() -> None:
    values = {"diverged": -math.inf, "failed": 0.1, "worse": 0.5, "best": 0.2, "nan": math.nan}
    for name, value in values.items():
        run = tally.training.run(name)
        run.log("loss", value)
        run.finish("failed" if name == "failed" else "finished")
    records = RunStore.open().list().runs
    assert [each.name for each in best_first(records, "loss", lowest=True)] == [
        "best", "worse", "failed", "diverged", "nan",
    ]  # fmt: skip
    assert {each.name for each in records if has_result(each, "loss")} == {"best", "worse"}


def test_what_is_flushed_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 3600.0)
    store = RunStore.open()
    with tally.training.run("flushed") as run:
        run.log("loss", 2.0)
        run.flush()
        assert store.values(run.id)["loss"].values == [2.0]
        assert isinstance(run.book, tracking.DatabaseBook)
        with Office(run, run.book) as office, monkeypatch.context() as patch:  # as a script has it
            for name, text in office.environment.items():
                patch.setenv(name, text)
            script = tally.training.run()
            assert script.id == run.id
            script.log("loss", 1.0)
            script.flush()
            assert store.values(run.id)["loss"].values == [2.0, 1.0]


def test_how_a_run_ends_and_goes_on() -> None:
    with pytest.raises(ZeroDivisionError), tally.training.run("one") as failed:  # noqa: PT012
        failed.log({"loss": 3.0}, step=1)
        failed.log({"loss": 2.0}, step=2)
        raise ZeroDivisionError("by zero")
    store = RunStore.open()
    assert (store.get(failed.id).state, store.get(failed.id).error) == ("failed", "ZeroDivisionError: by zero")
    with pytest.raises(KeyboardInterrupt), tally.training.run(resume=failed.id) as again:  # noqa: PT012
        assert (again.id, again.folder, again.name) == (failed.id, failed.folder, "one")
        again.log({"loss": 1.0}, step=2)  # logged again, after the checkpoint of step 1
        again.log("loss", 0.5)
        raise KeyboardInterrupt
    record = store.get(failed.id)
    assert record.state == "killed"
    assert record.metrics["loss"] == Figures(0.5, 3, 0.5, 3.0, 3)
    assert store.values(failed.id)["loss"].values == [3.0, 1.0, 0.5]


def test_who_has_lost_a_run_cannot_change_it() -> None:
    store = RunStore.open()
    run = tally.training.run("two")
    with store.engine.begin() as connection:
        connection.execute(sa.update(runs).where(runs.c.id == run.id).values(owner="somebody else"))
    run.log("loss", 1.0)
    with pytest.raises(OwnershipLostError, match="taken over by another process"):
        run.finish()
    assert (store.get(run.id).metrics, store.values(run.id)) == ({}, {})


def test_event_files_hold_what_tensorboard_shows(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams import metadata

    values = np.array([0.0, 1.0, 1.0, 4.0, math.nan, math.inf])
    with EventWriter(tmp_path) as writer:
        writer.hparams({"lr": 0.5, "name": "x", "layers": [1, 2]}, name="one")
        writer.add(
            3, scalars={"loss": 0.25}, histograms={"weights": values}, images={"cat": np.zeros((2, 5, 3), np.uint8)}
        )
        writer.graph([Node("input", "Placeholder", shape=(None, 3)), Node("head/MatMul", "MatMul", ["input"])])
        writer.session_end()
    [file] = tmp_path.iterdir()
    found: dict[str, Any] = {}
    for event in EventFileLoader(str(file)).Load():
        found |= {each.tag: each for each in event.summary.value}
        if event.graph_def:
            found["graph"] = event.graph_def
    assert found["loss"].tensor.float_val == [0.25]
    assert found["cat"].tensor.string_val[:2] == [b"5", b"2"]
    assert found["weights"].metadata.plugin_data.plugin_name == "histograms"
    start = metadata.parse_session_start_info_plugin_data(
        found[metadata.SESSION_START_INFO_TAG].metadata.plugin_data.content
    )
    assert start.hparams["lr"].number_value == 0.5
    assert start.hparams["layers"].string_value == "[1, 2]"
    assert {metadata.SESSION_END_INFO_TAG, "graph"} <= set(found)
    counted = histogram(values)
    assert (counted["num"], counted["min"], counted["max"], counted["sum"]) == (4, 0, 4, 6)
    assert sum(counted["bucket"]) == 4
    assert histogram(np.full(3, 2.0))["bucket"] == [3]
    assert histogram(np.array([math.nan]))["num"] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((2, 3, 5)), "of shape"),
        (np.full((2, 2), 3.0), "from 3 to 3"),
        (np.zeros((2, 2), np.int64), "int64"),
        (np.full((2, 2), math.nan), "nan"),
        (b"no picture", "cannot be read"),
        ("/nowhere.png", "cannot be read"),
    ],
)
def test_what_is_no_picture_is_refused(given: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        as_picture(given)
