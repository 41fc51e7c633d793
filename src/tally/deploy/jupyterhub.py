"""Values of the Helm chart Zero to JupyterHub: notebooks for those whom GitHub says belong to an organisation.

What the chart takes: https://z2jh.jupyter.org/en/stable/resources/reference.html. Nothing secret is in it: the hub
reads the application's id and secret from a Secret of its namespace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tally.deploy.quantities import amount
from tally.deploy.spec import LABEL, SUBDOMAIN
from tally.errors import SpecError

HOME = "/home/jovyan"
"""The home of a user in the images that the chart is made for."""
SHARED = f"{HOME}/shared"
ID_KEY, SECRET_KEY = "client-id", "client-secret"
"""What the entries of the Secret are called."""

_LOGIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,37}[A-Za-z0-9])?")
_TEAM = re.compile(rf"{_LOGIN.pattern}(?::[a-z0-9][a-z0-9_-]*)?")
_IMAGE = re.compile(r"(?P<name>[a-z0-9][\w./-]*(?::[0-9]+/[\w./-]+)?):(?P<tag>[\w][\w.-]{0,127})")
_MAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")


@dataclass(frozen=True, kw_only=True)
class HubSpec:
    """Notebooks on a cluster. Raises SpecError with every problem.

    host: the name that browsers reach it by, with a port if it is not 443. orgs: organisations of GitHub (``ORG`` or
    ``ORG:TEAM``) whose members may log in; users, admins: accounts that may, too. Nobody else may.
    letsencrypt: who Let's Encrypt writes to, where it gives the certificate; tls_secret: the Secret with one that is
    there. github_secret: the Secret with the application's ``client-id`` and ``client-secret``. github_url: of a GitHub
    Enterprise Server. image: NAME:TAG, of the users' servers. cpu, memory: what each of them is promised, and has at
    most. gpus: of those who choose one. storage: of each user's own volume; storage_class: None: the cluster's default.
    shared: the claim of the volume that all users have.
    """

    host: str
    image: str
    orgs: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    admins: tuple[str, ...] = ()
    letsencrypt: str | None = None
    tls_secret: str | None = None
    github_secret: str = "jupyterhub-github"  # noqa: S105 - its name
    github_url: str | None = None
    cpu: tuple[str, str] = ("500m", "2")
    memory: tuple[str, str] = ("1Gi", "4Gi")
    gpus: int = 0
    storage: str = "10Gi"
    storage_class: str | None = None
    shared: str = "tally-shared"

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise SpecError(problems)

    def _problems(self) -> Iterator[str]:
        host, colon, port = self.host.partition(":")
        if not SUBDOMAIN.fullmatch(host) or (colon and not (port.isdigit() and 0 < int(port) < 65536)):
            yield f"--host: {self.host!r} is no name of a host, such as hub.example.org"
        if not self.orgs and not self.users:
            yield "--org: say who may log in, with --org ORGANISATION, --org ORGANISATION:TEAM or --user ACCOUNT"
        yield from (
            f"--{name}: {each!r} is no {what} of GitHub"
            for name, what, form, given in (
                ("org", "organisation or ORGANISATION:TEAM", _TEAM, self.orgs),
                ("user", "account", _LOGIN, self.users),
                ("admin", "account", _LOGIN, self.admins),
            )
            for each in given
            if not form.fullmatch(each)
        )
        if (self.letsencrypt is None) == (self.tls_secret is None):
            yield (
                "--letsencrypt: GitHub sends users back over https, so say where the certificate is from: "
                "--letsencrypt MAIL or --tls-secret NAME, one of them"
            )
        if self.letsencrypt is not None and not _MAIL.fullmatch(self.letsencrypt):
            yield f"--letsencrypt: {self.letsencrypt!r} is no mail address"
        if self.github_url is not None and not _is_address(self.github_url):
            yield f"--github-url: {self.github_url!r} is no address of a server, such as https://github.example.org"
        if not _IMAGE.fullmatch(self.image):
            yield f"--image: {self.image!r} is not NAME:TAG; a tag is needed, so that all users have the same"
        names = (
            ("github-secret", self.github_secret, SUBDOMAIN),
            ("tls-secret", self.tls_secret, SUBDOMAIN),
            ("storage-class", self.storage_class, SUBDOMAIN),
            ("shared", self.shared, LABEL),
        )
        for what, name, form in names:
            if name is not None and not form.fullmatch(name):
                yield f"--{what}: {name!r} is no name of Kubernetes: small letters, digits and '-'"
        if self.gpus < 0:
            yield f"--gpus: 0 or more, not {self.gpus}"
        for what, quantities in (("cpu", [*self.cpu]), ("memory", [*self.memory]), ("storage", [self.storage])):
            try:
                amounts = [amount(each) for each in quantities]
            except ValueError as error:
                yield f"--{what}: {error}, such as {'2' if what == 'cpu' else '4Gi'}"
                continue
            if min(amounts) <= 0:
                yield f"--{what}: more than 0, not {'..'.join(quantities)}"
            elif amounts[0] > amounts[-1]:
                yield f"--{what}: {quantities[0]} are promised, which is more than the most, {quantities[1]}"


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.username is None and not url.query
    except ValueError:
        return False


def values(spec: HubSpec) -> dict[str, Any]:
    """The chart's values, as its ``values.yaml`` takes them: only what differs from the chart's own."""
    match = _IMAGE.fullmatch(spec.image)
    assert match is not None
    login: dict[str, Any] = {
        "oauth_callback_url": f"https://{spec.host}/hub/oauth_callback",
        "allow_all": False,
        # Otherwise who has logged in once may do so for ever, also when their account is not in the list any more.
        "allow_existing_users": False,
        "allowed_organizations": sorted(spec.orgs),
        "allowed_users": sorted({each.lower() for each in spec.users}),
        "admin_users": sorted({each.lower() for each in spec.admins}),
        # Without it, only those are known who show their membership to everybody.
        "scope": ["read:org"] if spec.orgs else [],
    }
    if spec.github_url is not None:
        login["github_url"] = spec.github_url.rstrip("/")
    return {
        "hub": {
            "config": {"JupyterHub": {"authenticator_class": "github"}, "GitHubOAuthenticator": login},
            "extraEnv": {
                variable: {"valueFrom": {"secretKeyRef": {"name": spec.github_secret, "key": key}}}
                for variable, key in (("OAUTH_CLIENT_ID", ID_KEY), ("OAUTH_CLIENT_SECRET", SECRET_KEY))
            },
        },
        "proxy": {"https": _https(spec)},
        "singleuser": {
            "image": {"name": match["name"], "tag": match["tag"]},
            "defaultUrl": "/lab",
            "cpu": {"guarantee": float(amount(spec.cpu[0])), "limit": float(amount(spec.cpu[1]))},
            "memory": {"guarantee": int(amount(spec.memory[0])), "limit": int(amount(spec.memory[1]))},
            "storage": {
                "capacity": spec.storage,
                "homeMountPath": HOME,
                **({} if spec.storage_class is None else {"dynamic": {"storageClass": spec.storage_class}}),
                "extraVolumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": spec.shared}}],
                "extraVolumeMounts": [{"name": "shared", "mountPath": SHARED}],
            },
            **({} if not spec.gpus else {"profileList": _profiles(spec.gpus)}),
        },
    }


def _https(spec: HubSpec) -> dict[str, Any]:
    host = spec.host.partition(":")[0]
    if spec.tls_secret is not None:
        return {"enabled": True, "hosts": [host], "type": "secret", "secret": {"name": spec.tls_secret}}
    return {
        "enabled": True, "hosts": [host], "type": "letsencrypt", "letsencrypt": {"contactEmail": spec.letsencrypt}
    }  # fmt: skip


def _profiles(gpus: int) -> list[dict[str, Any]]:
    number = {"nvidia.com/gpu": str(gpus)}
    with_gpu = {"extra_resource_limits": number, "extra_resource_guarantees": number}
    return [
        {"display_name": "CPU", "default": True},
        {"display_name": "GPU" if gpus == 1 else f"{gpus} GPUs", "kubespawner_override": with_gpu},
    ]
