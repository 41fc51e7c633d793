"""``tally train retrain --fine-tune``: all of a network of PyTorch is trained, by one worker or several."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tests.conftest import Ran
from tests.networks import network, package
from tests.retraining import COLOURS, photos
from tests.services import torch_library

import tally
from tally.database.tables import run_metrics
from tally.errors import ModelError, ModelLoadError, RunError, UntrustedModelError
from tally.jobs.stop import Stop
from tally.models.registry import open_registry
from tally.training.retrain import retraining
from tally.training.retrain.bottlenecks import Backbone, features
from tally.training.retrain.head import Evaluation, unpacked
from tally.training.runs.store import RunStore

Cli = Callable[..., Ran]

QUICK = ("--how_many_training_steps", 41, "--train_batch_size", 10, "--learning_rate", 0.3)


@pytest.fixture(scope="module")
def torch() -> Any:
    return torch_library()


@pytest.fixture(scope="module")
def shared(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fine-tune")
    (photos(folder / "photos", dict.fromkeys(COLOURS, 14)) / "red" / "broken.png").write_bytes(b"\x89PNG but no more")
    return {"photos": folder / "photos", "backbone": package(folder / "net"), "cache": folder / "cache"}


@pytest.fixture
def fine_tune(cli: Cli, shared: dict[str, Path]) -> Cli:
    def run(*arguments: object) -> Ran:
        given = ("--image_dir", shared["photos"], "--backbone", shared["backbone"])
        return cli("train", "retrain", "--fine-tune", *given, "--bottleneck_dir", shared["cache"], *QUICK, *arguments)

    return run


def checkpoint(run: str) -> dict[str, Any]:
    return unpacked(Path(RunStore.open().get(run).folder) / retraining.CHECKPOINT)


KILLED = """
import os, signal, sys
from tally.training.retrain import finetuning, retraining
finetuning.KEEP_SECONDS = 0
def die(evaluation):
    if evaluation.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    _, wanted = retraining.resumed(sys.argv[1])
    retraining.retrain(wanted, resume=sys.argv[1], watcher=retraining.Watcher(evaluated=die))
"""


def test_all_of_a_network_is_trained_to_the_same_by_one_worker_by_two_and_after_a_kill(
    fine_tune: Cli, cli: Cli, shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: tuple[object, ...] = (
        "--early-stopping",
        50,
        "--flip_left_right",
        "--random_crop",
        20,
        "--random_brightness",
        10,
        "--summaries_dir",
        tmp_path / "logs",
    )
    one = fine_tune(*given, "--workers", 1)
    assert one.code == 0, one.err
    two = fine_tune(*given, "--workers", 2, "--register", "colours", "--print_misclassified_test_images")
    assert two.code == 0, two.err
    assert "red/broken.png: damaged PNG image" in two.err
    assert (
        " weights of {} and its new last layer are trained by 2 workers, on cpu".format(shared["backbone"]) in two.err
    )
    assert "Final test accuracy = " in two.out

    after, before = RunStore.open().list(kind="retrain").runs  # the newest first
    found, other = checkpoint(after.id), checkpoint(before.id)
    first = network(tmp_path / "again", width=8).state_dict()
    for name in found:
        if name == "measured":  # when, too
            continue
        np.testing.assert_allclose(found[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)
        if name == "network/body.0.weight":
            assert np.abs(found[name] - first[name.removeprefix("network/")].numpy()).max() > 1e-4, "it is trained"
    assert after.metrics["cross_entropy"].last < after.metrics["cross_entropy"].most
    assert after.models == ["models:/colours/1"]
    assert open_registry().get("models:/colours/1").metadata["properties"]["fine_tuned"]

    # The model in the registry is the trained network, not the one that was given.
    job = tally.score(shared["photos"], "models:/colours", tmp_path / "rows", quiet=True, workers=1)
    labels = [row["label"] == row["key"].split("/")[0] for row in job.results().to_pylist()]
    assert len(labels) == 42
    assert np.mean(labels) > 0.5
    folders = {path.parent.name for path in (tmp_path / "logs" / after.id).rglob("*tfevents*")}
    assert folders == {"train", "validation", "test"}
    assert (Path(after.folder) / "pictures" / "confusion_matrix").is_dir()

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # before its first step
        patch.setattr(retraining, "_trained", killed)
        fine_tune(*given, "--workers", 2)
    record = RunStore.open().list().runs[0]
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, script, record.id], capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert RunStore.open().get(record.id).state == "interrupted"
    assert checkpoint(record.id)["numbers"][0] >= 1
    ran = cli("train", "retrain", "--resume", record.id, "--workers", 1)
    assert f"--workers: 1, but run {record.id} began with 2" in ran.err
    with RunStore.open().engine.begin() as connection:  # nothing was written before the kill
        connection.execute(run_metrics.delete().where(run_metrics.c.run_id == record.id))
    ran = cli("train", "retrain", "--resume", record.id, "--register", "colours")
    assert ran.code == 0, ran.err
    curves, wanted = RunStore.open().values(record.id), RunStore.open().values(after.id)
    assert {name: (each.steps, each.values) for name, each in curves.items()} == {
        name: (each.steps, each.values) for name, each in wanted.items()
    }
    assert curves["accuracy"].steps == [0, 10, 20, 30, 40]
    assert "continued from step" in ran.err
    assert len(open_registry().show("colours").versions) == 1, "the same content, and so no new version"


def test_a_worker_that_is_lost_ends_the_training_and_it_goes_on_from_there(
    shared: dict[str, Path], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tally.training.retrain import finetuning

    before = {each.pid for each in psutil.Process().children(recursive=True)}

    def kill(evaluation: Evaluation) -> None:
        if evaluation.step == 10:
            working = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
            max(working, key=lambda each: each.memory_info().rss).kill()  # PyTorch is in the workers alone

    wanted = retraining.Retraining(
        image_dir=str(shared["photos"]),
        backbone=str(shared["backbone"]),
        bottleneck_dir=str(shared["cache"]),
        fine_tune=True,
        parameters=retraining.Parameters(how_many_training_steps=2000, train_batch_size=10),
    )
    monkeypatch.setattr(finetuning, "KEEP_SECONDS", 0)
    with pytest.raises(RunError, match="a worker of the training was lost, and the others ended with it") as caught:
        retraining.retrain(wanted, workers=2, watcher=retraining.Watcher(evaluated=kill))
    assert "--resume" in str(caught.value.hint)
    left = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
    assert [
        each for each in psutil.wait_procs(left, timeout=10)[1] if "resource_tracker" not in str(each.cmdline())
    ] == []
    [record] = RunStore.open().list().runs
    assert record.state == "failed"
    assert checkpoint(record.id)["numbers"][0] >= 1

    said, stop = [], Stop()

    def hear(line: str) -> None:
        said.append(line)
        stop()

    with pytest.raises(KeyboardInterrupt):
        retraining.retrain(wanted, resume=record.id, stop=stop, watcher=retraining.Watcher(say=hear))
    assert any(each.startswith("continued from step") for each in said)
    assert RunStore.open().get(record.id).state == "killed"


@pytest.mark.parametrize("form", ["pt2", "one at a time", "script", "state"])
def test_every_form_of_a_network_gives_what_it_gives_in_pytorch(torch: Any, tmp_path: Path, form: str) -> None:
    made, pictures = network(tmp_path), torch.rand(2, 3, 20, 24)
    file, settings = tmp_path / "net.pt2", {"preprocess.size": "24x20", "preprocess.scale": "1/255"}
    settings |= {"preprocess.mean": 0.0}
    if form == "state":
        file = file.with_suffix(".pth")
        torch.save({"state_dict": {f"module.{name}": each for name, each in made.state_dict().items()}}, file)
        settings["module"] = "net.py:Small"
    elif form == "script":
        file = file.with_suffix(".pt")
        with pytest.warns(DeprecationWarning, match="torch.jit"):
            torch.jit.trace(made, pictures).save(str(file))
    elif form == "pt2":
        dims = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(made, (pictures,), dynamic_shapes=dims), file)
    else:
        torch.export.save(torch.export.export(made, (pictures[:1],)), file)
    if form != "state":
        with pytest.raises(UntrustedModelError, match="may run whatever code it carries"):
            Backbone.of(str(file), settings, root=tmp_path / "cache")
    backbone = Backbone.of(str(file), settings, root=tmp_path / "cache", trust=True)
    assert backbone.network is not None
    assert backbone.hash == backbone.network.hash != backbone.ref.hash
    assert str(tmp_path) not in backbone.ref.location.joinpath(backbone.ref.entry).read_bytes().decode("latin-1")

    from tally.models.load import load
    from tally.scorers.base import Item

    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    scorer = load(backbone.ref, "cpu")
    found = features(scorer, scorer.prepare(Item("one", pixels)))
    with torch.no_grad():
        wanted = made(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255).mean((2, 3))[0]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "training", "message"),
    [
        ("Small", {"drop": 0.5}, True, "depends on those beside it, or on chance"),
        ("Classes", {}, False, "gives 10 probabilities of classes"),
    ],
)
def test_what_is_no_backbone_is_refused(
    torch: Any, tmp_path: Path, name: str, arguments: dict[str, Any], training: bool, message: str
) -> None:
    made, dims = network(tmp_path, name, **arguments).train(training), ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(made, (torch.rand(2, 3, 16, 16),), dynamic_shapes=dims), tmp_path / "net.pt2")
    with pytest.raises(ModelError, match=message) as caught:
        Backbone.of(str(tmp_path / "net.pt2"), root=tmp_path / "cache", trust=True)
    assert "--cut" not in str(caught.value.hint)


def test_weights_of_another_network_are_refused_with_what_differs(torch: Any, tmp_path: Path) -> None:
    torch.save(network(tmp_path, width=5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"it has 'body.0.weight' of shape \[5, 3, 3, 3\], and Small takes \[6, 3"):
        Backbone.of(str(tmp_path / "w.pth"), {"module": "net.py:Small"}, root=tmp_path / "cache")
    torch.save({"weights": Path("of")}, tmp_path / "w.pth")
    with pytest.raises(ModelLoadError, match=r"holds more than weights: it names pathlib[\w.]*Path") as caught:
        Backbone.of(str(tmp_path / "w.pth"), {"module": "net.py:Small"}, root=tmp_path / "cache")
    assert "weights_only" not in str(caught.value)
    spoilt = network(tmp_path).state_dict()
    spoilt["body.0.weight"][0, 0] = float("nan")
    torch.save(spoilt, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"weights that are NaN or infinite: body.0.weight\n"):
        Backbone.of(str(tmp_path / "w.pth"), {"module": "net.py:Small"}, root=tmp_path / "cache")
