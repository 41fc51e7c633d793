"""What ``tally up`` was asked for: one frozen object, checked before anything is started."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from tally.errors import SpecError

DEFAULT_PORT = 8700


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server runs.

    host, port: where it listens. parallel: jobs that may run at once.
    roots: folders under which local paths in requests must lie. Without any, requests may name buckets and models of
        the registry only.
    price_per_hour: of one running worker; currency: what that is counted in.
    allow_hosts: private hosts that requests may name. max_upload: bytes of one upload.
    schedules: whether it starts runs of schedules that are due.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    parallel: int = 2
    roots: tuple[Path, ...] = ()
    price_per_hour: float = 0.0
    currency: str = "USD"
    allow_hosts: tuple[str, ...] = ()
    max_upload: int = 1 << 30
    schedules: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.port <= 65535:
            problems.append(f"--port must be between 0 and 65535, not {self.port}")
        if self.parallel < 1:
            problems.append(f"--parallel must be at least 1, not {self.parallel}")
        if self.max_upload < 1:
            problems.append("--max-upload must be at least 1")
        if self.price_per_hour < 0:
            problems.append(f"--price-per-hour must not be negative: {self.price_per_hour}")
        problems += [f"--root {root} is not a folder" for root in self.roots if not root.is_dir()]
        if problems:
            raise SpecError(problems)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
