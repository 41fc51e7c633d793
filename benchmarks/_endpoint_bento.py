"""The service of BentoML in benchmarks/endpoints.py."""

from __future__ import annotations

import base64

import bentoml

from _endpoint_models import BATCH, model


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Model:
    """Bodies in base64."""

    def __init__(self) -> None:
        self.predicted = model()

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=60_000, route="/score")
    def score(self, data: list[str]) -> list[int]:
        """One answer for each."""
        return self.predicted([base64.b64decode(each) for each in data])
