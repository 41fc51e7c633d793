"""From a sweep that is kept to what it sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tally.training.retrain.retraining import Retraining
from tally.training.retrain.retraining import Watcher as RetrainWatcher
from tally.training.sweeps.base import Trials
from tally.training.sweeps.retrain import RetrainTrials
from tally.training.sweeps.script import ScriptTrials
from tally.training.sweeps.store import SweepRecord
from tally.training.sweeps.sweep import Sweep


def restored(record: SweepRecord, watcher: RetrainWatcher | None = None) -> Sweep:
    """What a kept sweep sweeps. watcher: is told of bottlenecks that have to be computed."""
    given = dict(record.spec)
    training = _KINDS[record.kind](given.pop("training"), watcher)
    return Sweep(training=training, **given)


def _retrain(given: Mapping[str, Any], watcher: RetrainWatcher | None) -> Trials:
    return RetrainTrials(Retraining.from_dict(given), device=given["device"], watcher=watcher)


def _script(given: Mapping[str, Any], watcher: RetrainWatcher | None) -> Trials:
    return ScriptTrials.from_dict(given)


_KINDS: Mapping[str, Callable[[Mapping[str, Any], RetrainWatcher | None], Trials]] = {
    RetrainTrials.kind: _retrain,
    ScriptTrials.kind: _script,
}
