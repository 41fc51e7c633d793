"""What is served, and how: validated at the edge, then only read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tally.errors import SpecError
from tally.media.images import MAX_PIXELS, Decoding
from tally.models.reference import BATCH_LIMIT

KEYS = "TALLY_ENDPOINT_KEY"
"""The environment variable with the keys that clients of kept endpoints may use, separated by commas."""


def replicas_from(text: str) -> tuple[int, int]:
    """The least and the most processes, from ``2`` or ``0..4``. Raises ValueError."""
    least, dots, most = text.partition("..")
    return int(least), int(most if dots else least)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Limits:
    """replicas: (least, most) processes; with least 0, the first request waits until one is there.
    max_batch: items scored together; None: as the model says. max_delay: seconds that an incomplete batch waits.
    max_queue: requests that may wait for a replica. timeout: seconds from a request's arrival to its answer.
    idle: seconds without a request after which surplus replicas end. load_timeout: seconds that loading may take.
    threads: of numeric libraries, in each replica. payloads: a folder or a bucket for a sample of requests with their
    answers; payload_share: how large a sample, of 1. pages, background, max_pixels: of pictures, as
    :class:`tally.media.images.Decoding` says.
    """

    replicas: tuple[int, int] = (1, 1)
    max_batch: int | None = None
    max_delay: float = 0.005
    max_queue: int = 1024
    timeout: float = 60.0
    idle: float = 300.0
    load_timeout: float = 600.0
    threads: int = 1
    device: str = "auto"
    payloads: str | None = None
    payload_share: float = 1.0
    pages: Literal["first", "all"] = "first"
    background: tuple[int, int, int] | None = None
    max_pixels: int = MAX_PIXELS

    @property
    def decoding(self) -> Decoding:
        """How pictures are decoded."""
        return Decoding(self.max_pixels, self.background, self.pages)

    def problems(self) -> list[str]:
        """One line for each thing that is wrong."""
        least, most = self.replicas
        checks = (
            (0 <= least <= most and most >= 1, f"replicas: from 0 or more to 1 or more, not {least}..{most}"),
            (
                self.max_batch is None or 1 <= self.max_batch <= BATCH_LIMIT,
                f"max_batch: 1 to {BATCH_LIMIT}, not {self.max_batch}",
            ),
            (0 <= self.max_delay <= 60, f"max_delay: 0 to 60 seconds, not {self.max_delay}"),
            (1 <= self.max_queue <= 1_000_000, f"max_queue: 1 to 1,000,000 requests, not {self.max_queue}"),
            (0 < self.timeout <= 86_400, f"timeout: more than 0 and at most 86,400 seconds, not {self.timeout}"),
            (self.idle > 0, f"idle: more than 0 seconds, not {self.idle}"),
            (0 <= self.payload_share <= 1, f"payload_share: 0 to 1, not {self.payload_share}"),
            (self.pages in ("first", "all"), f"pages: first or all, not {self.pages!r}"),
            (self.max_pixels >= 1, f"max_pixels: 1 or more, not {self.max_pixels}"),
            (self.threads >= 1, f"threads: 1 or more, not {self.threads}"),
        )
        return [text for right, text in checks if not right]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model to serve. name: what clients call it. model: as ``tally score --model`` takes it.

    options: what :func:`tally.models.resolve.resolve` is told besides.
    """

    name: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def problems(self) -> list[str]:
        """One line for each thing that is wrong."""
        wrong = [f"{self.name}: {text}" for text in self.limits.problems()]
        if not _NAME.fullmatch(self.name):
            wrong.insert(
                0, f"a model is served under letters, digits, '.', '_' and '-', at most 128, not {self.name!r}"
            )
        return wrong


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """host, port: where to listen; port 0 for any that is free. grpc_port: the same for gRPC; None for no gRPC.
    keys: one of them has to come with each request, if there are any. max_body: bytes of a request's body.
    certificate, private_key: PEM files, for TLS. drain: seconds that requests have to end once the server is to stop.
    """

    models: tuple[ModelSettings, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int | None = None
    keys: tuple[str, ...] = field(default=(), repr=False)
    max_body: int = 64 << 20
    certificate: Path | None = None
    private_key: Path | None = None
    drain: float = 30.0

    def __post_init__(self) -> None:
        wrong = [text for model in self.models for text in model.problems()]
        names = [model.name for model in self.models]
        wrong += [f"two models are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
        if (self.certificate is None) != (self.private_key is None):
            wrong.append("TLS needs both a certificate and its private key")
        if not self.loopback and not self.keys:
            wrong.append(f"host {self.host} lets others reach the models, and there is no key")
        if wrong:
            raise SpecError(
                wrong,
                hint=None
                if self.loopback or self.keys
                else "Put one into TALLY_ENDPOINT_KEY, or into a file for --keys.",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("127.0.0.1", "::1", "localhost")
