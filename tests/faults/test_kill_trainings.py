"""Scheduled trainings are killed, the trainer and the scheduler, and leave one version each.

Small ones with two kills by default; ``TALLY_TEST_FULL=1``: the real series, photos and picture, killed at random.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests import retraining
from tests.extent import FULL, first
from tests.faults.storms import start, tally
from tests.faults.test_kill_backfill import children, drivers, kill
from tests.waiting import wait_for

from tally import plain_yaml
from tally.errors import RunNotFoundError
from tally.models.registry import open_registry
from tally.training.promotion import TAG
from tally.training.runs.store import RunStore
from tally.training.style.network import SMALLEST_STYLE
from tally.triggers.store import Run, ScheduleStore

KILLS = 6
NO_TORCH = "PyTorch is not installed: pip install 'tally-scoring[train]'"


@dataclass(frozen=True)
class Scheduled:
    """A schedule of one interval that is over. home: of the installation that runs it."""

    folder: Path
    home: Path
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", self.folder / "log")

    def add(self, name: str, fields: Mapping[str, Any]) -> None:
        (self.folder / f"{name}.yaml").write_text(plain_yaml.dump(dict(fields)))
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        tick = f"{hour.minute} {hour.hour} * * *"
        begin = datetime.fromtimestamp(hour.timestamp() - 86_400, UTC)
        words = ("schedule", "add", name, self.folder / f"{name}.yaml", "--cron", tick, "--from", begin.isoformat())
        subprocess.run(tally(*words), check=True, timeout=60, capture_output=True)

    def run(self, name: str) -> Run:
        """The only run; there is none before it was planned."""
        (found,) = self.store.runs(name)
        return found

    @property
    def store(self) -> ScheduleStore:
        return ScheduleStore(RunStore.open().engine)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        return start(tally("schedule", "run", name), self.log)

    def is_trained(self, name: str, attempt: int) -> bool:
        """Whether a process trains the interval's run, at so many-th a try."""
        runs = self.store.runs(name)
        if not runs or runs[0].attempts != attempt or runs[0].training_id is None:
            return False
        try:
            return RunStore.open().get(runs[0].training_id).alive
        except RunNotFoundError:
            return False

    def kill_twice(self, name: str) -> None:
        """The trainer, while the scheduler goes on; then everything."""
        scheduler = self.start(name)
        wait_for(lambda: self.is_trained(name, 1), scheduler, told=self.log.read_text)
        kill(drivers(self.home)[0])
        wait_for(lambda: self.is_trained(name, 2), scheduler, told=self.log.read_text)
        self._kill_all(scheduler)

    def kill_at_random(self, name: str, *, longest: float, seed: int) -> int:
        """The trainer, the scheduler or both, until it is done or was disturbed enough; how often."""
        dice = random.Random(seed)
        killed = 0
        scheduler = self.start(name)
        while killed < KILLS:
            try:
                scheduler.wait(timeout=dice.uniform(1, longest))
                break
            except subprocess.TimeoutExpired:
                pass
            match dice.choice(["trainer", "scheduler", "everything"]) if drivers(self.home) else "scheduler":
                case "trainer":
                    kill(dice.choice(drivers(self.home)))
                case "scheduler":
                    scheduler.kill()
                    scheduler.wait()
                case _:
                    self._kill_all(scheduler)
            killed += 1
            if scheduler.poll() is not None:
                scheduler = self.start(name)
        scheduler.kill()
        scheduler.wait()
        return killed

    def _kill_all(self, scheduler: subprocess.Popen[bytes]) -> None:
        scheduler.kill()
        scheduler.wait()
        for driver in drivers(self.home):
            for each in [*children(driver), driver]:
                kill(each)

    def finish(self, name: str) -> Run:
        """Let it come to its end."""
        until = time.monotonic() + 900
        while True:  # a driver that was left is followed
            subprocess.run(tally("schedule", "run", name), check=True, timeout=900, capture_output=True)
            if (run := self.run(name)).state not in ("running", "pending") or time.monotonic() > until:
                return run


@pytest.fixture
def scheduled(tmp_path: Path, home: Path) -> Scheduled:
    return Scheduled(tmp_path, home)


def readings(path: Path) -> Path:
    dice = np.random.default_rng(5)
    lines = [f"{device},{value}" for device in range(40) for value in dice.normal(device, 1, 60).round(4)]
    path.write_text("\n".join(["device,value", *lines]) + "\n")
    return path


def anomaly(folder: Path, data: Callable[[], Path]) -> dict[str, Any]:
    if not FULL:
        source = readings(folder / "readings.csv")
        return {"train": "anomaly", "source": str(source), "by": "device", "value": "value", "gate": "keys >= 40"}
    series = [str(each) for each in sorted((data() / "sensors" / "nab").rglob("*.csv"))]
    if not series:
        pytest.skip("there are no series of NAB")
    for number, each in enumerate(series):
        text = Path(each).read_text().splitlines()
        lines = [f"series,{text[0]}", *(f"{Path(each).stem},{line}" for line in text[1:] if line.strip())]
        (folder / f"{number:03}.csv").write_text("\n".join(lines) + "\n")
    return {
        "train": "anomaly", "source": str(folder / "*.csv"), "by": "series", "value": "value", "time": "timestamp",
        "window": "10m", "gate": "keys >= 10",
    }  # fmt: skip


def retrain(folder: Path, data: Callable[[], Path]) -> dict[str, Any]:
    if not FULL:
        images, network = retraining.photos(folder / "photos"), retraining.backbone(folder / "backbone.onnx")
        more: dict[str, Any] = {"how_many_training_steps": 2000, "gate": "test_accuracy >= 0.5"}
    else:
        images = data() / "images" / "retrain_cat_dog"
        network = data() / "models" / "classify" / "mobilenet_v2_fp32_features.onnx"
        more = {"gate": ["test_accuracy >= 0.97", "test_accuracy >= champion"]}
    cache = str(folder / "bottlenecks")
    return {"train": "retrain", "image_dir": str(images), "backbone": str(network), "bottleneck_dir": cache, **more}


def style(folder: Path, data: Callable[[], Path]) -> dict[str, Any]:
    pytest.importorskip("torch", reason=NO_TORCH)
    pytest.importorskip("torch.utils.tensorboard", reason=NO_TORCH)
    if FULL:
        picture = next(iter(sorted((data() / "images").rglob("*.jp*g"))))
        return {
            "train": "style",
            "style": str(picture),
            "steps": 40,
            "size": SMALLEST_STYLE,
            "gate": "loss/style < 1000",
        }
    picture = folder / "waves.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (200, 200, 3), np.uint8)).save(picture)
    return {"train": "style", "style": str(picture), "steps": 4, "size": SMALLEST_STYLE, "gate": "loss/style < 1e9"}


@pytest.mark.parametrize("described", first(1, [retrain, anomaly, style]))
def test_a_training_that_is_killed_leaves_one_version(
    scheduled: Scheduled,
    request: pytest.FixtureRequest,
    described: Callable[[Path, Callable[[], Path]], dict[str, Any]],
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'tally-scoring[sklearn]'")
    folder = scheduled.folder / "data"
    folder.mkdir()
    given = described(folder, lambda: Path(request.getfixturevalue("data")))
    scheduled.add("killed", {**given, "register": "killed"})
    if FULL:
        longest = {"anomaly": 6.0, "retrain": 12.0, "style": 30.0}[given["train"]]
        print(f"kills: {scheduled.kill_at_random('killed', longest=longest, seed=1)}")
    else:
        scheduled.kill_twice("killed")
    run = scheduled.finish("killed")

    assert (run.state, run.error) == ("finished", None), scheduled.log.read_text()
    (version,) = open_registry().show("killed").versions
    assert version.aliases == ("champion",)
    assert [each.action for each in open_registry().show("killed").history] == ["set"]
    (record,) = RunStore.open().list(kind=given["train"]).runs
    assert (record.id, record.state, list(record.models)) == (run.training_id, "finished", [str(version)])
    assert version.metadata["run"] == record.id
    assert record.tags["schedule"] == "killed"
    assert run.outcome is not None
    assert run.outcome.startswith(f"{version} is champion: ")
    assert record.tags[TAG] == run.outcome
    assert not drivers(scheduled.home)

    scheduled.add("quiet", {**given, "register": "quiet"})
    scheduled.finish("quiet")
    (undisturbed,) = open_registry().show("quiet").versions
    assert undisturbed.hash == version.hash
