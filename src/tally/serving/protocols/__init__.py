"""The protocols that endpoints speak: one file each, one line each in this table."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from tally.serving.protocols.base import Protocol

PROTOCOLS = {
    "openinference": "tally.serving.protocols.openinference:OpenInference",
    "tfserving": "tally.serving.protocols.tfserving:TensorFlowServing",
    "azureml": "tally.serving.protocols.azureml:AzureML",
}
"""Name to class. Paths are looked up in this order."""


@cache
def get(name: str) -> Protocol:
    """The protocol of that name."""
    module, _, cls = PROTOCOLS[name].partition(":")
    protocol: Protocol = getattr(import_module(module), cls)()
    return protocol
