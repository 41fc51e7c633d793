"""Which files are networks of PyTorch, and what a user may say of how these are opened and run.

PyTorch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tally.errors import ModelLoadError
from tally.models.contents import content_of

PROGRAMS = ("exported", "torchscript")
"""Forms of files (:mod:`tally.models.contents`) that are whole networks."""


class TorchSettings(BaseModel):
    """How a network of PyTorch is opened and run.

    module: ``file.py:Class``, the network, where the file holds weights alone. arguments: what it is called with.
    compile: by ``torch.compile``, in each worker. channels_last: pictures and weights lie so in memory.
    autocast: to which type PyTorch may narrow what it reckons with. trusted: the file may run code; the user says so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str | None = None
    arguments: dict[str, Any] = {}
    compile: bool = False
    channels_last: bool = False
    autocast: Literal["bfloat16", "float16"] | None = None
    trusted: bool = False

    @classmethod
    def among(cls, options: Mapping[str, Any]) -> TorchSettings:
        """Those among a network's options."""
        return cls.model_validate({name: options[name] for name in cls.model_fields if name in options})

    @classmethod
    def problems_in(cls, options: Mapping[str, Any]) -> list[str]:
        """One line for each thing that is wrong with them."""
        from tally.models.package import problems_in

        return problems_in(cls, options)


OWN = tuple(TorchSettings.model_fields)
"""The options that say how a network is opened; the others say how pictures are prepared for it."""


def form_of(path: Path) -> str:
    """What a file of PyTorch is: one of :data:`PROGRAMS`, ``torch`` or ``pickle`` (what ``torch.save`` wrote), or
    ``safetensors``. Raises ModelLoadError for any other, with what it is."""
    content = content_of(path)
    if content is None:
        raise ModelLoadError(
            f"{path} is damaged, or no file of PyTorch", hint="Was it copied or downloaded completely?"
        )
    if content.form not in (*PROGRAMS, "torch", "pickle", "safetensors"):
        raise ModelLoadError(
            f"{path} is {content.name}, and neither a network nor weights of PyTorch", hint=content.hint
        )
    return content.form
