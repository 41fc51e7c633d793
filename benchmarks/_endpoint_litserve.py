"""The model of LitServe in benchmarks/endpoints.py."""

from __future__ import annotations

import base64

import litserve as ls

from _endpoint_models import model


class Api(ls.LitAPI):
    """Bodies in base64."""

    def setup(self, device: str) -> None:
        self.predicted = model()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads annotations: JSON has none
        return base64.b64decode(request["data"])

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, bodies: list[bytes]) -> list[int]:
        return self.predicted(bodies)

    def unbatch(self, output: list[int]) -> list[int]:
        return output

    def encode_response(self, output: int) -> dict[str, int]:
        return {"answer": output}
