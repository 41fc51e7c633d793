"""Asking endpoints over gRPC, with our own messages; tests import this where grpc is there."""

from __future__ import annotations

from typing import Any

import grpc
from tests.endpoints import PATIENCE

from tally.serving import protobuf

OIP = "inference.GRPCInferenceService"
PREDICTION = "tensorflow.serving.PredictionService"


class Client:
    """Calls methods with our own messages. metadata: goes with each call."""

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self.channel, self.metadata = channel, metadata

    def begin(self, service: str, method: str, /, timeout: float = PATIENCE, **fields: Any) -> Any:
        """A call that has been sent."""
        request, answer = protobuf.methods(service)[method]
        call = self.channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=protobuf.message(answer).FromString,
        )
        return call.future(protobuf.message(request)(**fields), timeout=timeout, metadata=self.metadata)

    def call(self, service: str, method: str, /, **fields: Any) -> Any:
        return self.begin(service, method, **fields).result()

    def refused(self, service: str, method: str, /, **fields: Any) -> tuple[str, str]:
        """The code and the details of an error."""
        error = self.begin(service, method, **fields).exception(PATIENCE)
        assert isinstance(error, grpc.RpcError), error
        return error.code().name, error.details()

    def close(self) -> None:
        self.channel.close()


def tensor(name: str, datatype: str, shape: list[int], **contents: Any) -> dict[str, Any]:
    """An input of the Open Inference Protocol. contents: where its values stand in the message itself."""
    return {"name": name, "datatype": datatype, "shape": shape, **({"contents": contents} if contents else {})}


def outputs(answer: Any) -> dict[str, list[Any]]:
    """The outputs of an answer whose tensors have contents."""
    found = {}
    for each in answer.outputs:
        [(_, values)] = each.contents.ListFields() or [(None, [])]
        found[each.name] = list(values)
    return found
