"""The protocols that endpoints speak: one file each, one line each in these tables."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import cast

from tally.serving.protocols.base import GrpcProtocol, Protocol

PROTOCOLS = {
    "openinference": "tally.serving.protocols.openinference:OpenInference",
    "tfserving": "tally.serving.protocols.tfserving:TensorFlowServing",
    "azureml": "tally.serving.protocols.azureml:AzureML",
}
"""Name to class, of those over HTTP. Paths are looked up in this order."""

GRPC_PROTOCOLS = {
    "openinference-grpc": "tally.serving.protocols.openinference_grpc:OpenInferenceGrpc",
    "tfserving-grpc": "tally.serving.protocols.tfserving_grpc:TensorFlowServingGrpc",
}
"""The same of those over gRPC."""


@cache
def get(name: str) -> Protocol:
    """The protocol of that name."""
    module, _, cls = (PROTOCOLS | GRPC_PROTOCOLS)[name].partition(":")
    protocol: Protocol = getattr(import_module(module), cls)()
    return protocol


def over_grpc() -> list[GrpcProtocol]:
    """All protocols over gRPC. Raises ModuleNotFoundError where what they need is not installed."""
    return [cast("GrpcProtocol", get(name)) for name in GRPC_PROTOCOLS]
