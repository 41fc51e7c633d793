"""The model of MLServer in benchmarks/endpoints.py."""

from __future__ import annotations

import base64
from typing import Any

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from _endpoint_models import model


class Model(MLModel):
    """One BYTES input, base64."""

    async def load(self) -> bool:
        self.predicted = model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        data: Any = payload.inputs[0].data
        answers = self.predicted([base64.b64decode(each) for each in data])
        output = ResponseOutput(name="answer", shape=[len(answers)], datatype="INT64", data=answers)
        return InferenceResponse(model_name=self.name, outputs=[output])
