"""``tally train retrain`` as its user types it: from folders of pictures to a model that scores."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Ran
from tests.retraining import COLOURS, backbone, photos

import tally
from tally.cli.train_retrain import _REPLACED
from tally.cli.train_retrain import retrain as command
from tally.errors import SourceChangedError
from tally.jobs.facade import Jobs
from tally.models.registry import open_registry
from tally.training.retrain import bottlenecks
from tally.training.retrain.dataset import read
from tally.training.runs.store import RunStore

Cli = Callable[..., Ran]

FLAGS = {
    "image_dir",
    "output_graph",
    "output_labels",
    "summaries_dir",
    "how_many_training_steps",
    "learning_rate",
    "testing_percentage",
    "validation_percentage",
    "eval_step_interval",
    "train_batch_size",
    "test_batch_size",
    "validation_batch_size",
    "print_misclassified_test_images",
    "model_dir",
    "bottleneck_dir",
    "final_tensor_name",
    "flip_left_right",
    "random_crop",
    "random_scale",
    "random_brightness",
    "architecture",
    "saved_model_dir",
}
"""Of TensorFlow's retrain.py."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures, a backbone, and a cache of bottlenecks that whichever test is the first here fills."""
    folder = tmp_path_factory.mktemp("retrain")
    (photos(folder / "photos") / "red" / "broken.png").write_bytes(b"\x89PNG but no more")
    return {"photos": folder / "photos", "backbone": backbone(folder / "backbone.onnx"), "cache": folder / "cache"}


@pytest.fixture
def retrain(cli: Cli, shared: dict[str, Path]) -> Cli:
    def run(*arguments: object, image_dir: Path | None = None) -> Ran:
        given = ("--image_dir", image_dir or shared["photos"], "--backbone", shared["backbone"])
        return cli("train", "retrain", *given, "--bottleneck_dir", shared["cache"], *arguments)

    return run


QUICK = ("--how_many_training_steps", 300, "--learning_rate", 0.1)


def events(folder: Path) -> dict[str, Any]:
    """What TensorBoard finds in each folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for each in sorted({path.parent for path in folder.rglob("*tfevents*")}):
        found[each.name] = EventAccumulator(str(each), size_guidance={"images": 0, "scalars": 0})
        found[each.name].Reload()
    return found


def test_folders_of_pictures_become_a_model_that_scores(
    retrain: Cli, cli: Cli, shared: dict[str, Path], tmp_path: Path
) -> None:
    kept = tmp_path / "logs" / "of somebody else" / "events.out.tfevents.1"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    places = {"output_graph": "g/model.onnx", "output_labels": "l.txt", "saved_model_dir": "saved/1"}
    given = [each for flag, name in places.items() for each in (f"--{flag}", tmp_path / name)]
    ran = retrain(
        *QUICK, *given, "--bottleneck_dir", tmp_path / "cache", "--summaries_dir", tmp_path / "logs",
        "--register", "colours", "--print_misclassified_test_images", "--final_tensor_name", "colour",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "73 pictures go through" in ran.err
    assert "1 picture cannot be read and is left out: red/broken.png: damaged PNG image" in ran.err
    assert re.search(r"^Final test accuracy = (100.0|\d\d.\d)% \(N=\d+\)$", ran.out, re.MULTILINE)
    assert "registered as models:/colours/1" in ran.out

    [record] = RunStore.open().list(kind="retrain").runs
    assert record.state == "finished"
    assert record.metrics["test_accuracy"].last >= 0.9
    assert record.data["pictures"]["files"] == 73
    shown = cli("runs", "show", record.id)
    assert "backbone.onnx" in shown.out
    assert "has other content" not in cli("runs", "reproduce", record.id).err
    assert record.tags["bottlenecks"] == "72 computed, 0 from the cache"
    assert record.models == ["models:/colours/1"]
    package = tmp_path / "saved" / "1"
    assert (tmp_path / "l.txt").read_text() == (package / "labels.txt").read_text() == "blue\ngreen\nred\n"
    assert (tmp_path / "g" / "model.onnx").read_bytes() == (package / "model.onnx").read_bytes()
    assert kept.read_text() == "mine"

    job = tally.score(shared["photos"], "models:/colours", tmp_path / "rows", quiet=True, workers=1)
    rows = job.results().to_pylist()
    assert len(rows) == 72
    assert np.mean([row["label"] == row["key"].split("/")[0] for row in rows]) > 0.9

    found = events(tmp_path / "logs" / record.id)
    assert set(found) == {"train", "validation", "test"}
    for part in ("train", "validation"):
        tags = found[part].Tags()
        summaries = [
            f"final_training_ops/{what}/summaries/{figure}"
            for what in ("weights", "biases")
            for figure in ("mean", "stddev_1", "max", "min")
        ]
        assert set(tags["scalars"]) == {"accuracy_1", "cross_entropy_1", *summaries}
        assert set(tags["histograms"]) == {
            "final_training_ops/weights/summaries/histogram", "final_training_ops/biases/summaries/histogram",
            "final_training_ops/Wx_plus_b/pre_activations", "activations",
        }  # fmt: skip
        steps = [each.step for each in found[part].Scalars("accuracy_1")]
        assert steps == [*range(0, 300, 10), 299]
    assert {node.name for node in found["train"].Graph().node} >= {"colour", "final_training_ops/Wx_plus_b/add"}
    assert "confusion_matrix" in found["test"].Tags()["images"]


def test_everything_comes_from_the_cache_a_second_time_wherever_the_pictures_are(
    retrain: Cli, shared: dict[str, Path], tmp_path: Path
) -> None:
    retrain(*QUICK, "--register", "colours")
    hashes = []
    for place in (shared["photos"], shutil.move(shutil.copytree(shared["photos"], tmp_path / "a"), tmp_path / "b")):
        ran = retrain(*QUICK, "--register", "colours", image_dir=Path(place))
        assert "all 73 bottlenecks are in the cache" in ran.err, ran.err
        assert "registered as models:/colours/1" in ran.out
        hashes.append(RunStore.open().list(limit=1).runs[0].data["pictures"]["hash"])
    assert hashes[0] == hashes[1]
    [damaged, cut, *_] = sorted(shared["cache"].glob("*/*/*.bottleneck"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cut.write_bytes(cut.read_bytes()[:-4])
    ran = retrain(*QUICK, "--register", "colours")
    assert "71 of 73 bottlenecks are in the cache; 2 pictures go through" in ran.err
    assert "2 damaged entries of the cache of bottlenecks were computed again" in ran.err
    assert "registered as models:/colours/1" in ran.out
    assert damaged.read_bytes() == content


def test_one_more_picture_that_cannot_be_read_is_left_out(
    retrain: Cli, shared: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shared["photos"], tmp_path / "photos"))
    assert retrain(*QUICK, image_dir=folder).code == 0
    (folder / "blue" / "torn.jpg").write_bytes(b"\xff\xd8 and no more")
    ran = retrain(*QUICK, image_dir=folder)
    assert ran.code == 0, ran.err
    assert "blue/torn.jpg: " in ran.err
    ran = retrain(*QUICK, image_dir=folder)
    assert "all 74 bottlenecks are in the cache" in ran.err
    assert "blue/torn.jpg: " in ran.err


def test_a_killed_job_of_bottlenecks_is_gone_on_with(
    shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is killed after its job has finished, and before its rows are in the cache: they are not lost."""
    dataset = read(photos(tmp_path / "photos", dict.fromkeys(COLOURS, 12)))
    model = bottlenecks.Backbone.of(str(shared["backbone"]))

    def killed(self: object, picture: str, features: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(bottlenecks.Cache, "write", killed)
        with pytest.raises(SystemExit):
            bottlenecks.compute(dataset, model, root=tmp_path / "cache", workers=1)
    driven: list[str] = []
    _, found = bottlenecks.compute(
        dataset, model, root=tmp_path / "cache", drive=lambda jobs, job: driven.append(job) or jobs.run(job)
    )
    assert driven == []
    assert found.features.shape == (36, 12)
    assert [*(tmp_path / "cache").glob("*/job-*")] == []


def test_the_cache_keeps_nothing_of_a_picture_that_changed_and_no_reason_that_may_pass(
    shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path / "photos", dict.fromkeys(COLOURS, 12))
    model, changing, torn = (
        bottlenecks.Backbone.of(str(shared["backbone"])),
        folder / "red/003.png",
        folder / "red/t.png",
    )
    torn.write_bytes(b"\x89PNG but no more")
    before = changing.read_bytes()

    def changed(jobs: Any, job: str) -> Any:
        changing.write_bytes((folder / "blue/003.png").read_bytes())
        return jobs.see_through(job)

    with monkeypatch.context() as patch:  # as where the library that reads it is not installed
        said = "HEIC is not supported without more libraries: pip install 'tally-scoring[pictures]'"
        found = Jobs.dead
        patch.setattr(Jobs, "dead", lambda jobs, job: [replace(each, error=said) for each in found(jobs, job)])
        with pytest.raises(SourceChangedError, match=r"red/003\.png changed while bottlenecks were computed"):
            bottlenecks.compute(read(folder), model, root=tmp_path / "cache", workers=1, drive=changed)
    changing.write_bytes(before)
    told: list[str] = []
    dataset, again = bottlenecks.compute(read(folder), model, root=tmp_path / "cache", workers=1, say=told.append)
    assert "35 of 37 bottlenecks are in the cache; 2 pictures go through" in told[0]
    assert "HEIC" not in dataset.remarks[-1]
    _, anew = bottlenecks.compute(read(folder), model, root=tmp_path / "other", workers=1)
    assert np.array_equal(again.features, anew.features)


KILLED = """
import os, signal, sys
from tally.training.retrain import head, retraining
head.KEEP_SECONDS = 0
def die(evaluation):
    if evaluation.step == 120:
        os.kill(os.getpid(), signal.SIGKILL)
_, wanted = retraining.resumed(sys.argv[1])
retraining.retrain(wanted, resume=sys.argv[1], watcher=retraining.Watcher(evaluated=die))
"""


def test_a_killed_run_goes_on_to_the_same_model(retrain: Cli, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from tally.training.retrain import retraining

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # before its first step
        patch.setattr(retraining, "_trained", killed)
        ran = retrain(*QUICK, "--early-stopping", 500)
    [record] = RunStore.open().list().runs
    assert record.state == "killed"
    assert f"tally train retrain --resume {record.id}" in ran.err
    done = subprocess.run([sys.executable, "-c", KILLED, record.id], capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert RunStore.open().get(record.id).state == "interrupted"
    assert (
        "--learning_rate: a run that goes on has"
        in cli("train", "retrain", "--resume", record.id, "--learning_rate", "1").err
    )
    ran = cli("train", "retrain", "--resume", record.id, "--register", "colours")
    assert ran.code == 0, ran.err
    assert "continued from step 111" in ran.err
    curves = RunStore.open().values(record.id, ["accuracy", "validation_cross_entropy"])
    assert [each.steps for each in curves.values()] == [[*range(0, 300, 10), 299]] * 2
    shown = events(Path(record.folder) / "events")
    for part in ("train", "validation"):
        assert {each.step for each in shown[part].Scalars("accuracy_1")} == {*range(0, 300, 10), 299}
    retrain(*QUICK, "--early-stopping", 500, "--register", "colours")
    assert len(open_registry().show("colours").versions) == 1
    assert "is finished" in cli("train", "retrain", "--resume", record.id).err


def test_what_early_stopping_keeps_is_what_is_registered_and_judged(
    retrain: Cli, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tally.training.retrain import retraining

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    # So few pictures tell little: the loss goes up and down.
    wild = ("--how_many_training_steps", 300, "--learning_rate", 1, "--train_batch_size", 5, "--early-stopping", 4)
    wild += ("--validation_batch_size", 2)
    promoting = ("--register", "colours", "--gate", "test_accuracy >= champion")
    ran = retrain(*wild, *promoting, "--no-final-test")
    assert ran.code != 0
    assert "'test_accuracy' is not measured" in ran.err
    assert "'test_accuracy' is not measured" in retrain(*wild, *promoting, "--testing_percentage", 0).err
    assert "has no alias 'champoin'" in retrain(*wild, *promoting[:3], "test_accuracy >= champoin").err
    assert RunStore.open().list().runs == []
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "_trained", killed)
        retrain(*wild, *promoting)
    [record] = RunStore.open().list().runs
    ran = cli("train", "retrain", "--resume", record.id, "--gate", "validation_cross_entropy < 1000")
    assert (
        "from now on --register colours --alias champion --gate 'validation_cross_entropy < 1000'; it began" in ran.err
    )
    record = RunStore.open().get(record.id)
    [version] = open_registry().show("colours").versions
    assert version.aliases == ("champion",)
    curve = RunStore.open().values(record.id)["validation_cross_entropy"]
    lowest = min(zip(curve.values, curve.steps, strict=True))
    assert lowest[1] < curve.steps[-1]
    assert record.tags["weights"] == f"those of step {lowest[1]}"
    metrics = version.metadata["metrics"]
    assert metrics["validation_cross_entropy"] == lowest[0] < record.metrics["validation_cross_entropy"].last
    assert metrics["test_accuracy"] == record.metrics["test_accuracy"].last
    assert f"validation_cross_entropy is {lowest[0]:g}, and < 1000" in record.tags["gate"]


def test_a_run_does_not_go_on_with_other_pictures(
    retrain: Cli, cli: Cli, shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tally.training.retrain import retraining

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    folder = Path(shutil.copytree(shared["photos"], tmp_path / "photos"))
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "_trained", killed)
        retrain(*QUICK, image_dir=folder)
    [record] = RunStore.open().list().runs
    (folder / "red" / "001.png").unlink()
    ran = cli("train", "retrain", "--resume", record.id)
    assert ran.code == 1
    assert f"the pictures at {folder} have changed since it began" in ran.err


def test_every_flag_of_the_original_is_kept_mapped_or_refused(retrain: Cli, tmp_path: Path) -> None:
    known = {option.lstrip("-") for parameter in command.params for option in parameter.opts}
    assert known >= FLAGS
    for flag, hint in _REPLACED.items():
        ran = retrain(f"--{flag}", "x")
        assert ran.code == 2
        assert hint in ran.err
    assert "--learning_rate" in retrain("--learning_rat", "1").err
    (tmp_path / "there").mkdir()
    ran = retrain("--output_graph", tmp_path / "graph.pb", "--random_crop", -1, "--eval_step_interval", 0)
    assert re.findall(r"--(\w+): ", ran.err) == [
        "eval_step_interval", "random_crop", "output_graph"
    ]  # fmt: skip
    assert "backbone.onnx has a value 'means' already" in retrain("--final_tensor_name", "means").err
    assert "is there already" in retrain("--saved_model_dir", tmp_path / "there").err
    assert RunStore.open().list().runs == []


def test_distorted_pictures_train_on_workers(retrain: Cli, tmp_path: Path) -> None:
    ran = retrain(
        "--how_many_training_steps", 12, "--train_batch_size", 10, "--flip_left_right", "--random_brightness", 10,
        "--no-final-test", "--workers", 1, "--plain-sampling",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    [record] = RunStore.open().list().runs
    assert (record.parameters["flip_left_right"], record.parameters["balanced"]) == (True, False)
    assert record.metrics["cross_entropy"].count == 3
    assert "test_accuracy" not in record.metrics
    assert os.path.isfile(Path(record.folder) / "model" / "model.onnx")  # noqa: PTH113
