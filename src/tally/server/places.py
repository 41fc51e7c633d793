"""Which places a request may name. Whoever has a key is not thereby let into this machine, or into its network.

Local paths must lie under a declared root, links resolved. Hosts must not be private ones, unless they are allowed.
What is named here is looked up again when it is used, and checked again: see :mod:`tally.network`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from tally.database import foreign
from tally.errors import RefusedError, SpecError
from tally.jobs.spec import JobSpec, outputs_folder
from tally.masking import mask
from tally.models import kinds
from tally.models.base import is_suffix
from tally.network import is_allowed, refusal
from tally.server.auth.roles import Principal
from tally.server.uploads import uploads_folder
from tally.sources.queues.factory import is_of_its_service
from tally.sources.sql.factory import parted
from tally.storage import is_url
from tally.text import expanded
from tally.triggers.works.base import Work

_PORTS = {
    "http": 80,
    "https": 443,
    "amqp": 5672,
    "amqps": 5671,
    "redis": 6379,
    "rediss": 6379,
    "kafka": 9092,
    "kafkas": 9093,
}
_PORTS |= {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mariadb": 3306, "mongodb": 27017, "mongodb+srv": 27017}
"""URLs that name a host. Others name what is reached with the credentials of the server's environment."""
_CLOUD_QUEUES = ("azure-queue", "servicebus")
"""They are reached with the credentials of the server's environment, at a host that their URL may name."""
_OF_DATABASES = ("charset", "connect_timeout", "sslmode", "replicaSet", "retryWrites", "ssl", "tls")
"""Options in URLs of databases: others name hosts, sockets and files of the server."""
_UPLOADED = ("source", "labels", "upload")
"""What may be an upload: data. What runs may not, or whoever uploads could run code."""

_MODELS = ("model", "upload")
"""What names a model: a file, or a class in it."""


def new_output() -> str:
    """A place of the server's own, for results that the request names none for."""
    return f"{outputs_folder() / secrets.token_hex(8)}/"


def check(spec: JobSpec, roots: Sequence[Path], who: Principal) -> None:
    """Raises SpecError with every place of the spec that a request may not name, RefusedError where ``who`` sends it
    would bring code along."""
    check_places(_places(spec), roots)
    check_code(who, spec.model, artifacts=spec.artifacts, trust=spec.trust)


def check_kind(kind: type[Work], who: Principal) -> None:
    """Raises RefusedError where only an admin may have this scheduled, and ``who`` is none."""
    if kind.only_admins is not None and not who.may("admin"):
        raise RefusedError(403, f"{kind.only_admins}, which only an admin may have done", hint="Ask an admin for it.")


def check_work(work: Work, roots: Sequence[Path], who: Principal) -> None:
    """As :func:`check`, of what a schedule is to do."""
    if (job := work.job) is not None:
        check(job, roots, who)
        return
    named = list(work.named())
    check_places(named, roots)
    for name, place in named:
        if name == "model":
            check_code(who, place, artifacts=None, trust=False)


def check_code(who: Principal, model: str, *, artifacts: str | None, trust: bool) -> None:
    """Raises RefusedError where a model from elsewhere may hold code, and ``who`` sends the request is no admin.

    What lies under a root, or is registered, somebody has put there whom the server's owner trusts. A bucket that the
    server may read, and a page of the web, may be anybody's.
    """
    if who.may("admin"):
        return
    if artifacts is not None and is_url(artifacts):
        raise RefusedError(403, f"artifacts: {artifacts!r} may hold code, which only an admin brings", hint=_OF_ADMINS)
    if is_url(model) and (trust or not _is_data(model)):
        raise RefusedError(403, f"model: {mask(model)!r} may hold code, which only an admin brings", hint=_OF_ADMINS)


_OF_ADMINS = "Ask an admin to register the model, or to put it under a root."
_CODE = (".py", ".pyc", ".so", ".dylib", ".pkl", ".pickle", ".joblib", ".pt2", ".pt", ".pth", ".th")


def is_code(name: str) -> bool:
    """Whether a file of this name is code, or is known to be opened by running what it carries."""
    marks = {mark for _, traits in kinds.table() if traits.runs_code for mark in traits.markers}
    return Path(name).suffix.lower() in _CODE or Path(name).name in marks


def _is_data(url: str) -> bool:
    """Whether the URL is that of a file which no code is in: a folder may be a package that holds some."""
    name = urlsplit(url).path.rpartition("/")[2].lower()
    claimed = any(name.endswith(each) for _, traits in kinds.table() for each in traits.claims if is_suffix(each))
    return claimed and not is_code(name)


def file_of(model: str) -> str:
    """The file or folder that the text of a model names here: ``FILE.py:Class`` names a file."""
    file, separator, name = model.rpartition(".py:")
    return f"{file}.py" if separator and name.isidentifier() else model


def check_places(places: Iterable[tuple[str, str]], roots: Sequence[Path]) -> None:
    """As :func:`check`, of places with what they are for: ``source``, ``model``, ``queue`` and so on."""
    problems = [problem for name, place in places if (problem := _refusal(name, place, roots))]
    if problems:
        raise SpecError(problems, hint="\n  ".join(_hints(problems, roots)) or None)


def _hints(problems: Sequence[str], roots: Sequence[Path]) -> Iterable[str]:
    """What would let these places be named."""
    if any("folder that requests may name" in problem for problem in problems):
        allowed = ", ".join(map(str, roots)) or "none is declared (tally up --root FOLDER)"
        yield f"Folders that requests may name: {allowed}"
    if any(": the host " in problem and "cannot be found" not in problem for problem in problems):
        yield "Whoever starts the server lets requests name a host of its own network with: tally up --allow-host HOST"


def _places(spec: JobSpec) -> Iterable[tuple[str, str]]:
    yield from (("source", each) for each in spec.source)  # a list of items is one
    for name in ("base", "model", "out", "labels", "artifacts", "webhook", "address"):
        place = getattr(spec, name)
        if place:
            yield name, str(place)
    if spec.queue.get("base"):
        yield "queue", str(spec.queue["base"])
    if spec.push is not None:
        yield "push", spec.push.url
        yield from (("push", value) for value in spec.push.headers.values() if value.startswith("env:"))


def _refusal(name: str, place: str, roots: Sequence[Path]) -> str | None:
    if name == "model" and place.startswith(("models:/", "tally:", "hf:")):
        return None
    if name in ("webhook", "push", "source") and place.startswith("env:"):  # it would be sent to whom the request names
        return f"{name}: {place!r} names a variable of the server's own environment"
    try:
        scheme = urlsplit(place).scheme.lower()
    except ValueError as error:
        return f"{name}: {place!r} is no URL: {error}"
    if scheme in foreign.FILES:
        place = foreign.file_of(place)
    elif scheme in _PORTS:
        return _host_refusal(name, place)
    elif scheme in _CLOUD_QUEUES:
        host = urlsplit(place).hostname or ""
        if not is_of_its_service(place) and not is_allowed(host):
            return f"{name}: the host {host!r} is not the service's own, and would be sent the server's credentials"
        return None
    elif is_url(place):
        return f"{name}: file URLs are not taken: {place}" if scheme == "file" else None
    file = file_of(place) if name in _MODELS else place
    if name in _MODELS and ":" in file:
        return (
            f"{name}: {place!r} names code of the server's own environment; name its file (FILE.py:Class) under a "
            "folder that requests may name, or register it (tally models add NAME FILE.py:Class) and name models:/NAME"
        )
    try:
        resolved = expanded(file).resolve()
    except (OSError, ValueError, RuntimeError):
        return f"{name}: {place!r} is no path"
    if any(resolved.is_relative_to(root.resolve()) for root in roots):
        return None
    uploads = uploads_folder().resolve()
    if name in _UPLOADED and resolved.is_relative_to(uploads) and resolved != uploads:
        return None
    if name == "out" and resolved.parent == outputs_folder().resolve():
        return None
    return f"{name}: {place!r} is not under a folder that requests may name"


def _host_refusal(name: str, url: str) -> str | None:
    scheme, netloc, _, query, _ = urlsplit(parted(url)[0])
    if foreign.is_database(url) and (
        others := sorted({each for each, _ in parse_qsl(query, True)} - set(_OF_DATABASES))
    ):
        return f"{name}: {url!r} has the option {others[0]!r}, and requests may give {', '.join(_OF_DATABASES)}"
    for server in netloc.rpartition("@")[2].split(","):  # Kafka's URLs name several
        parts = urlsplit(f"//{server}")
        try:
            host, port = parts.hostname, parts.port or _PORTS[scheme.lower()]
        except ValueError:
            return f"{name}: {url!r} has no valid port"
        if not host:
            return f"{name}: {url!r} names no host"
        if scheme.lower().startswith(("kafka", "mongodb")) and not is_allowed(host):
            return f"{name}: the host {host!r} would say where else to connect, so it has to be one that is allowed"
        if (why := refusal(host, port)) is not None:
            return f"{name}: the host {why}"
        if scheme.lower().startswith("postgres") and "PGPASSWORD" in os.environ and not is_allowed(host):
            return (
                f"{name}: the host {host!r} would be sent the server's PGPASSWORD, so it has to be one that is allowed"
            )
    return None
