"""What ``tally up`` was asked for: one frozen object, checked before anything is started."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tally.errors import SpecError
from tally.server.auth.roles import Role

DEFAULT_PORT = 8700


@dataclass(frozen=True, slots=True)
class OidcSettings:
    """An identity provider, and whom of its accounts is let in.

    issuer: its URL. client_id, secret: how it knows this server. admins, operators, viewers: mail addresses, or
        ``@example.com`` for everybody there.
    """

    issuer: str
    client_id: str
    secret: str = field(repr=False)
    admins: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    viewers: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """What is wrong with it."""
        found = []
        try:
            url = urlsplit(self.issuer)
        except ValueError as error:
            return [f"--oidc-issuer {self.issuer!r} is no URL: {error}"]
        if not (url.scheme == "https" or (url.scheme == "http" and _is_loopback(url.hostname or ""))):
            found.append(f"--oidc-issuer must be an https:// URL, not {self.issuer!r}")
        if not self.client_id:
            found.append("--oidc-issuer needs --oidc-client-id")
        if not self.secret:
            found.append("--oidc-issuer needs the client's secret in TALLY_OIDC_SECRET")
        allowed = (*self.admins, *self.operators, *self.viewers)
        if not allowed:
            found.append("--oidc-issuer lets nobody in without --oidc-admin, --oidc-operator or --oidc-viewer")
        found += [f"{each!r} is neither a mail address nor @ and a domain" for each in allowed if each.count("@") != 1]
        return found

    def role_of(self, mail: str) -> Role | None:
        """The role of who has this address; None if that is not let in."""
        names = {mail.lower(), "@" + mail.lower().rpartition("@")[2]}
        lists: tuple[tuple[Role, tuple[str, ...]], ...] = (
            ("admin", self.admins), ("operator", self.operators), ("viewer", self.viewers)
        )  # fmt: skip
        return next((role for role, allowed in lists if names & {each.lower() for each in allowed}), None)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server runs.

    host, port: where it listens. parallel: jobs that may run at once.
    roots: folders under which local paths in requests must lie. Without any, requests may name buckets and models of
        the registry only.
    price_per_hour: of one running worker; currency: what that is counted in.
    allow_hosts: private hosts that requests may name. max_upload: bytes of one upload.
    schedules: whether it starts runs of schedules that are due. oidc: who else may log in.
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
    oidc: OidcSettings | None = None

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
        if self.oidc is not None:
            problems += self.oidc.problems()
        if problems:
            raise SpecError(problems)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return _is_loopback(self.host)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
