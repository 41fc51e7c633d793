"""Runs in MLflow: a mirror of what is kept here, on a tracking server that others look at (extra ``mlflow``).

A run is found again by its tag ``tally.run``: mirrored once more, it gets what is new. MLflow allows fewer signs in the
names of metrics and parameters than are used here (``mAP@0.5``): the others become ``_``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tally.errors import RunError, TallyError, error_line
from tally.masking import mask
from tally.optional import needed
from tally.training.runs.store import EVENTS, RunRecord, RunStore

log = logging.getLogger("tally")

TAG = "tally.run"
URI = "TALLY_MLFLOW"
"""The environment variable with the tracking server's URL: runs are mirrored there when they end."""
EXPERIMENT = "tally"
_FORBIDDEN = re.compile(r"[^\w./: -]")
_AT_ONCE, _PARAMETERS_AT_ONCE = 1000, 100
"""Metrics, and parameters or tags, of one request."""
_LONGEST_VALUE = 6000
_CLIENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Settings of its client, unless the environment has others: by itself it reports its use to its makers, and waits for
minutes for a server that is not there."""
_STATES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED", "interrupted": "FAILED"}


def mirror(store: RunStore, record: RunRecord, uri: str, *, experiment: str = EXPERIMENT) -> str:
    """Bring a run to a tracking server: parameters, metrics by step, tags, files and end. Returns its id there.

    uri: ``http://...``, or what else MLflow calls a tracking URI. Files are those of this machine.
    Raises RunError where MLflow is missing, does not answer, or refuses.
    """
    for name, value in _CLIENT.items():
        os.environ.setdefault(name, value)
    with needed("a mirror in MLflow needs", "mlflow", RunError):
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    try:
        client = MlflowClient(tracking_uri=uri)
        there = _there(client, record, experiment)
        run_id = there.info.run_id
        names = _names([*record.metrics])
        parameters = [
            Param(key, str(record.parameters[name])[:_LONGEST_VALUE])
            for name, key in _names([*record.parameters]).items()
            if key not in there.data.params
        ]
        for part in _parts(parameters, _PARAMETERS_AT_ONCE):
            client.log_batch(run_id, params=part)
        facts = {"tally.kind": record.kind, "tally.command": " ".join(record.command), "mlflow.source.git.commit":
                 record.code.get("commit"), "tally.code": record.code.get("hash"), "tally.error": record.error,
                 "tally.models": ", ".join(record.models), "tally.sweep": record.sweep, **record.tags}  # fmt: skip
        tags = [RunTag(key, str(text)[:_LONGEST_VALUE]) for key, text in _tags(facts) if text]
        for part in _parts(tags, _PARAMETERS_AT_ONCE):
            client.log_batch(run_id, tags=part)
        for name, curve in store.values(record.id).items():
            known = {each.step for each in client.get_metric_history(run_id, names[name])} if _old(there) else set()
            values = (
                Metric(names[name], value, round(at * 1000), step)
                for step, value, at in zip(curve.steps, curve.values, curve.times, strict=True)
                if step not in known
            )
            for part in _parts(values, _AT_ONCE):
                client.log_batch(run_id, metrics=part)
        folder = Path(record.folder)
        if folder.is_dir():
            for each in sorted(folder.iterdir()):
                if each.name != EVENTS:
                    (client.log_artifacts if each.is_dir() else client.log_artifact)(
                        run_id, str(each), *([each.name] if each.is_dir() else [])
                    )
        ended = None if record.finished_at is None else round(record.finished_at * 1000)
        if record.state != "running":
            client.set_terminated(run_id, _STATES[record.state], ended)
    except MlflowException as error:
        raise RunError(
            f"MLflow at {mask(uri)} does not take run {record.id}: {error_line(error)}",
            hint="Is it the right address, and does the server run?",
        ) from error
    return str(run_id)


def mirror_if_asked(store: RunStore, run_id: str) -> None:
    """Mirror a run that has ended where the environment says; what is wrong with that is a warning."""
    if uri := os.environ.get(URI):
        try:
            mirror(store, store.get(run_id), uri)
        except TallyError as error:
            log.warning("run %s is not mirrored: %s", run_id, error)


def _there(client: Any, record: RunRecord, experiment: str) -> Any:
    """The run on the server, made if it is not there yet."""
    found = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    runs = client.search_runs([experiment_id], f"tags.`{TAG}` = '{record.id}'", max_results=1)
    if runs:
        return runs[0]
    begun = round(record.created_at * 1000)
    return client.create_run(experiment_id, start_time=begun, tags={TAG: record.id}, run_name=record.name)


def _old(run: Any) -> bool:
    """Whether it was mirrored before."""
    return bool(run.data.metrics)


def _names(names: Sequence[str]) -> dict[str, str]:
    """Each name, and what it is called there: no two the same."""
    found: dict[str, str] = {}
    for name in names:
        plain = _FORBIDDEN.sub("_", name)[:240] or "_"
        number = 2
        key = plain
        while key in found.values():
            key, number = f"{plain} {number}", number + 1
        found[name] = key
    return found


def _tags(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, text in facts.items():
        yield _FORBIDDEN.sub("_", name)[:240], text


def _parts(values: Any, count: int) -> Iterator[list[Any]]:
    rest = iter(values)
    while part := list(islice(rest, count)):
        yield part
