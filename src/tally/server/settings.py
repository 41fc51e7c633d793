"""What ``tally up`` was asked for: one frozen object, checked before anything is started."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tally.errors import SpecError
from tally.network import is_loopback
from tally.server.auth.roles import Role

DEFAULT_PORT = 8700
MOST_WARM = 86_400.0
GITHUB = "https://github.com"
_ACCOUNT = re.compile(r"@?[A-Za-z0-9][A-Za-z0-9_-]{0,38}")


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
        if not _is_safe(self.issuer):
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
        return _highest(self.admins, self.operators, self.viewers, lambda each: each in names)


@dataclass(frozen=True, slots=True)
class GitHubSettings:
    """GitHub, and whom of its accounts is let in.

    client_id, secret: how it knows this server. url: of a GitHub Enterprise Server, or GitHub's. admins, operators,
        viewers: names of accounts, or ``@name`` for the members of an organisation.
    """

    client_id: str
    secret: str = field(repr=False)
    url: str = GITHUB
    admins: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    viewers: tuple[str, ...] = ()

    @property
    def api(self) -> str:
        """Where it is asked who somebody is."""
        return "https://api.github.com" if self.url == GITHUB else f"{self.url}/api/v3"

    @property
    def organisations(self) -> tuple[str, ...]:
        """Those whose members are let in."""
        return tuple(each[1:] for each in self._allowed if each.startswith("@"))

    @property
    def _allowed(self) -> tuple[str, ...]:
        return (*self.admins, *self.operators, *self.viewers)

    def problems(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if not self.client_id:
            found.append("logging in with GitHub needs --github-client-id")
        if not self.secret:
            found.append("--github-client-id needs the client's secret in TALLY_GITHUB_SECRET")
        if not _is_safe(self.url):
            found.append(f"--github-url must be an https:// URL, not {self.url!r}")
        if not self._allowed:
            found.append(
                "--github-client-id lets nobody in without --github-admin, --github-operator or --github-viewer"
            )
        found += [
            f"{each!r} is neither the name of an account nor @ and an organisation"
            for each in self._allowed
            if not _ACCOUNT.fullmatch(each)
        ]
        return found

    def role_of(self, login: str, is_member: Callable[[str], bool]) -> Role | None:
        """The role of the account of that name; None if it is not let in. is_member: of an organisation."""

        def fits(each: str) -> bool:
            return is_member(each[1:]) if each.startswith("@") else each == login.lower()

        return _highest(self.admins, self.operators, self.viewers, fits)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server runs.

    host, port: where it listens. parallel: jobs that may run at once. keep_warm: seconds for which the workers of a
        job that has finished are kept for the next one of the same model; 0 keeps none.
    roots: folders under which local paths in requests must lie. Without any, requests may name buckets and models of
        the registry only.
    price_per_hour: of one running worker; currency: what that is counted in.
    allow_hosts: private hosts that requests may name. max_upload: bytes of one upload.
    schedules: whether it starts runs of schedules that are due. oidc, github: who else may log in.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    parallel: int = 2
    keep_warm: float = 60.0
    roots: tuple[Path, ...] = ()
    price_per_hour: float = 0.0
    currency: str = "USD"
    allow_hosts: tuple[str, ...] = ()
    max_upload: int = 1 << 30
    schedules: bool = True
    oidc: OidcSettings | None = None
    github: GitHubSettings | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.port <= 65535:
            problems.append(f"--port must be between 0 and 65535, not {self.port}")
        if self.parallel < 1:
            problems.append(f"--parallel must be at least 1, not {self.parallel}")
        if not 0 <= self.keep_warm <= MOST_WARM:
            problems.append(f"--keep-warm must be between 0 and {MOST_WARM:g} seconds, not {self.keep_warm:g}")
        if self.max_upload < 1:
            problems.append("--max-upload must be at least 1")
        if self.price_per_hour < 0:
            problems.append(f"--price-per-hour must not be negative: {self.price_per_hour}")
        problems += [f"--root {root} is not a folder" for root in self.roots if not root.is_dir()]
        if self.oidc is not None:
            problems += self.oidc.problems()
        if self.github is not None:
            problems += self.github.problems()
        if problems:
            raise SpecError(problems)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def _highest(
    admins: tuple[str, ...], operators: tuple[str, ...], viewers: tuple[str, ...], fits: Callable[[str], bool]
) -> Role | None:
    """The highest role in whose list something fits. fits: told names in small letters."""
    lists: tuple[tuple[Role, tuple[str, ...]], ...] = (("admin", admins), ("operator", operators), ("viewer", viewers))
    return next((role for role, allowed in lists if any(fits(each.lower()) for each in allowed)), None)


def _is_safe(url: str) -> bool:
    """Whether nobody reads along what is sent there."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (
            parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        )
    except ValueError:
        return False
