"""The Celery application of photos.py: a worker process loads the model once, a task scores one batch."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery
from celery.signals import worker_process_init

from _contenders import REDIS, Model

app = Celery("bench", broker=REDIS, backend=REDIS)
app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
_model: Model | None = None


@worker_process_init.connect
def _open(**_: Any) -> None:
    global _model
    _model = Model(json.loads(os.environ["BENCH_MODEL"]))


@app.task
def score(paths: list[str]) -> list[tuple[str, int, float]]:
    """The rows of one batch."""
    assert _model is not None
    return _model(paths)
