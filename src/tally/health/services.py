"""What ``tally doctor`` finds out about everything that is not this process: database, buckets, cluster.

Nothing here changes what is there, but for :func:`place` where writing is asked for. Every request has a time limit of
seconds. See :mod:`tally.health.checks` for what a check returns and raises.
"""

from __future__ import annotations

import http.client
import logging
import os
import secrets
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from tally.config import make_private
from tally.errors import OutputExistsError, SourceNotFoundError, StorageError, TallyError
from tally.health.checks import Skip, Warn, version_of
from tally.masking import mask
from tally.optional import install
from tally.storage import Store, is_url, is_web, key_of, open_store
from tally.storage.buckets import s3_environment

if TYPE_CHECKING:
    import sqlalchemy as sa

ANSWER_SECONDS = 4.0
"""How long a server may take to answer a first, small request."""
CLOCK_SECONDS = 5.0
"""A difference between two clocks that is worth a warning."""

_NETWORKED = ("nfs", "nfs4", "cifs", "smbfs", "smb3", "9p", "afs", "lustre", "ceph", "glusterfs", "beegfs", "gpfs")
_PORTS = {"http": 80, "https": 443}

# -- database ----------------------------------------------------------------------------------------------------------


def database() -> str:
    """Whether the database answers, lets Tally write, and which schema it holds. It is not migrated."""
    import sqlalchemy as sa

    from tally.config import settings

    try:
        url = sa.make_url(settings().database)
    except sa.exc.ArgumentError:
        raise StorageError("TALLY_DATABASE cannot be understood as a URL", hint=_DATABASE) from None
    shown = mask(url.render_as_string(hide_password=False))
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite and not _is_there(url.database):
        return f"{shown}, which is not there yet: it is made at first use"
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    limits = {"timeout": ANSWER_SECONDS} if sqlite else {"connect_timeout": max(2, round(ANSWER_SECONDS))}
    try:
        engine = sa.create_engine(url, connect_args=limits, poolclass=sa.NullPool)
    except (ModuleNotFoundError, sa.exc.NoSuchModuleError) as error:
        raise StorageError(f"{shown}: its driver is not installed ({error})", hint=install("postgres")) from None
    try:
        with engine.connect() as connection:
            return (_sqlite if sqlite else _postgresql)(connection, shown)
    except sa.exc.DBAPIError as error:
        reason = str(error.orig).strip().partition("\n")[0]
        raise StorageError(f"{shown}: {reason}", hint=_DATABASE) from None


_DATABASE = "See TALLY_DATABASE: postgresql://USER:PASSWORD@HOST/DATABASE, or nothing for a file in TALLY_HOME."


def _is_there(file: str | None) -> bool:
    """Whether SQLite's file is there; makes its folder, as a job would."""
    if not file or file == ":memory:":
        return True
    try:
        make_private(Path(file).parent)
        return Path(file).exists()
    except OSError as error:
        raise StorageError(
            f"cannot make the folder of {file}: {error.strerror}",
            hint="Set TALLY_HOME to a folder that can be written to.",
        ) from None


def _sqlite(connection: sa.Connection, shown: str) -> str:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # fails where the file cannot be written to, or is locked
    version = connection.exec_driver_sql("SELECT sqlite_version()").scalar_one()
    text = f"{shown}, SQLite {version}, {_schema(connection)}"
    file = connection.engine.url.database
    if file and (kind := _network(Path(file))):
        raise Warn(f"{text}; it is on a network file system ({kind}), whose locks SQLite cannot rely on: {_SHARED}")
    return text


_SHARED = "for several machines, set TALLY_DATABASE=postgresql://..."


def _network(path: Path) -> str | None:
    """The kind of network file system that a file is on, or None."""
    import psutil

    inside = [(each.mountpoint, each.fstype) for each in psutil.disk_partitions(all=True)]
    above = [(point, kind) for point, kind in inside if path.resolve().is_relative_to(point)]
    kind = max(above, key=lambda each: len(each[0]), default=("", ""))[1].lower()
    return kind if kind in _NETWORKED or kind.startswith("fuse.") else None


def _postgresql(connection: sa.Connection, shown: str) -> str:
    before = time.time()
    version, clock, standby, locked, may_create = connection.exec_driver_sql(
        "SELECT current_setting('server_version'), CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION), "
        "pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', "
        "has_schema_privilege(current_user, current_schema(), 'CREATE')"
    ).one()
    apart = clock - (before + time.time()) / 2
    if standby or locked:
        raise StorageError(
            f"{shown} answers (PostgreSQL {version.split()[0]}), but cannot be written to: it is "
            + ("a standby" if standby else "read-only"),
            hint="Name the primary server in TALLY_DATABASE.",
        )
    schema = _schema(connection)
    text = f"{shown}, PostgreSQL {version.split()[0]}, {schema}"
    if not may_create and schema != _CURRENT:
        raise StorageError(f"{text}; but this role may not make tables there", hint="GRANT CREATE ON SCHEMA to it.")
    if schema == _CURRENT and not connection.exec_driver_sql("SELECT has_table_privilege('jobs', 'UPDATE')").scalar():
        raise StorageError(f"{text}; but this role may not change its tables", hint="Use the role that made them.")
    if abs(apart) > CLOCK_SECONDS:
        raise Warn(f"{text}; its clock is {abs(apart):,.0f} s {'ahead of' if apart > 0 else 'behind'} this machine's")
    return text


_CURRENT = "schema current"


def _schema(connection: sa.Connection) -> str:
    """The schema's revision, and whether this version of Tally knows it."""
    import sqlalchemy as sa

    from tally.database.migrate import HEAD

    if not sa.inspect(connection).has_table("alembic_version"):
        return "no schema yet: it is made at first use"
    revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if revision == HEAD:
        return _CURRENT
    import tally.database.migrations.versions as folder

    known = {path.name.partition("_")[0] for path in Path(folder.__path__[0]).glob("*.py")}
    if revision in known:
        return f"schema {revision}, will be migrated to {HEAD} by the next command that uses it"
    raise StorageError(
        f"the database has the schema {revision!r}, and this Tally knows those up to {HEAD}",
        hint="It was made by a newer version: upgrade Tally here.",
    )


# -- storage -----------------------------------------------------------------------------------------------------------

_SETTINGS = {
    "s3": (
        *("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "S3_ENDPOINT"),
        "AWS_SKIP_SIGNATURE",
        *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY"),
}
"""Environment variables that say that a kind of store is used."""
_KINDS = {"s3a": "s3", "abfs": "az", "abfss": "az"}
_REFUSED = (
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed"),
    *("AuthorizationFailure", "AuthenticationFailed", "InvalidAuthenticationInfo"),
    *("invalid_grant", "UnauthenticatedError"),
)
_LIMITED = ("AccessDenied", "AuthorizationPermissionMismatch", "PermissionDeniedError")


def object_stores() -> list[tuple[str, Callable[[], str]]]:
    """The checks of those stores that the environment has settings of."""
    found = [kind for kind, names in _SETTINGS.items() if any(os.environ.get(name) for name in names)]
    return [(f"{kind}://", partial(_service, kind)) for kind in found] or [("object stores", _no_service)]


def _no_service() -> str:
    raise Skip("no settings in the environment: AWS_ACCESS_KEY_ID, AZURE_STORAGE_ACCOUNT_NAME or similar name them")


def _service(kind: str) -> str:
    """Whether a service answers, and accepts the credentials: asks it for a bucket that does not exist."""
    if kind == "gs" and (file := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")) and not os.access(file, os.R_OK):
        raise StorageError(f"GOOGLE_APPLICATION_CREDENTIALS names {file!r}, which cannot be read")
    endpoint = _endpoint(kind)
    _answers(endpoint)
    text = f"{mask(endpoint)} answers"
    if kind == "s3" and _is_set("AWS_SKIP_SIGNATURE"):
        return f"{text}; no credentials are used (AWS_SKIP_SIGNATURE): public buckets only"
    try:
        # Reading, unlike listing, always says whether it is the bucket or the object that is missing.
        open_store(f"{kind}://tally-doctor-{secrets.token_hex(8)}").read("nothing")
    except SourceNotFoundError:
        pass
    except StorageError as error:
        # The client's own error says more than the message that is made of it for people.
        reason = f"{error} {error.__context__!r}"
        if word := next((word for word in _REFUSED if word in reason), None):
            raise StorageError(f"{text}, and refuses the credentials ({word})", hint=error.hint) from None
        if any(word in reason for word in _LIMITED):
            raise Warn(f"{text}; the credentials may be right, but not for every bucket: name one as PLACE") from None
        raise StorageError(f"{text}, but: {_short(error)}", hint=error.hint) from None
    return f"{text} and accepts the credentials"


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _endpoint(kind: str) -> str:
    """The URL that a kind of store is reached at."""
    get = os.environ.get
    if kind == "s3":
        named = get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL") or get("AWS_ENDPOINT")
        region = get("AWS_REGION") or get("AWS_DEFAULT_REGION") or "us-east-1"
        return named or s3_environment()[0].get("endpoint") or f"https://s3.{region}.amazonaws.com"
    if kind == "az":
        if _is_set("AZURE_STORAGE_USE_EMULATOR"):
            return "http://127.0.0.1:10000"
        if named := get("AZURE_STORAGE_ENDPOINT") or get("AZURE_ENDPOINT"):
            return named
        if account := get("AZURE_STORAGE_ACCOUNT_NAME"):
            return f"https://{account}.blob.core.windows.net"
        raise StorageError("AZURE_STORAGE_ACCOUNT_NAME is not set", hint="It says which account az:// is of.")
    return "https://storage.googleapis.com"


def place(url: str, *, write: bool = False) -> str:
    """Whether a folder or bucket can be listed and read and, where that is asked for, written to."""
    store = open_store(url)
    shown = key_of(mask(url))
    if is_web(url):
        folder, _, name = url.rpartition("/")
        open_store(folder).read_range(name, 0, 1)
        return f"{shown} is a file of the web, and can be read"
    kind = url.partition("://")[0].lower() if is_url(url) else ""
    if (kind := _KINDS.get(kind, kind)) in _SETTINGS:
        _answers(_endpoint(kind))
    elif kind in ("", "file"):
        path = Path(store.url)
        if path.is_file():
            open_store(path.parent).read_range(path.name, 0, 1)
            return f"{shown} is a file, and can be read"
        if not path.exists() and not write:
            raise Warn(f"{shown} is not there; as an output it would be made")
    outcomes = _rights(store, url, write=write)
    failed = [right for right, (well, _) in outcomes.items() if not well]
    if failed:
        every = "".join(f"\n  {right:<6} {text}" for right, (_, text) in outcomes.items())
        raise StorageError(f"{shown}: no right to {', '.join(failed)}, or it is not there{every}")
    return f"{shown}: " + ", ".join(f"{right}: {text}" for right, (_, text) in outcomes.items())


_LOOKED_AT = 100
"""Names of a folder or bucket, of which one is read."""


def _rights(store: Store, url: str, *, write: bool) -> dict[str, tuple[bool, str]]:
    """For each right: False if it is missing, and a text about it."""
    outcomes: dict[str, tuple[bool, str]] = {}
    name = None
    try:
        found_names = [entry.name for entry in islice(store.list(), _LOOKED_AT)]
        if found_names:
            name = next(filter(_is_usable, found_names), found_names[0])
        elif is_url(url) and (found := _object(url)) is not None:
            store, name = found
        outcomes["list"] = True, "ok"
    except StorageError as error:
        outcomes["list"] = False, _short(error)
    if name is None:
        outcomes["read"] = True, "not tried, nothing is there" if outcomes["list"][0] else "not tried"
    else:
        try:
            store.read_range(name, 0, 1)
            outcomes["read"] = True, f"ok ({key_of(name)})"
        except StorageError as error:
            outcomes["read"] = False, _short(error)
    outcomes["write"] = _write(open_store(url)) if write else (True, "not tried without --write")
    return outcomes


def _is_usable(name: str) -> bool:
    """Whether a name is no odd one that costs its item, as ``a//b`` in a bucket."""
    return not {"", ".", ".."}.intersection(name.split("/"))


def _object(url: str) -> tuple[Store, str] | None:
    """The store and name of the one object that a URL names, or None."""
    above, _, name = url.rstrip("/").rpartition("/")
    if above.endswith("/"):  # the URL is a bucket's
        return None
    store = open_store(above)
    return (store, name) if store.exists(name) else None


_TWICE = "an object can be created twice: the service has no conditional writes, which keep jobs apart"


def _write(store: Store) -> tuple[bool, str]:
    """Write an object under a new name, read it back, see that it cannot be created twice, and delete it."""
    name, content = f"_tally-doctor-{secrets.token_hex(8)}", b"tally doctor"
    try:
        store.write(name, content, exclusive=True)
        try:
            if store.read(name) != content:
                return False, f"what was written as {name} reads differently"
            with suppress(OutputExistsError):
                store.write(name, content + b", again", exclusive=True)
                return False, _TWICE
        finally:
            store.delete([name])
        if store.exists(name):
            return False, f"{name} was written, but deleting it has no effect"
    except StorageError as error:
        return False, _short(error)
    return True, "ok (written, read, deleted)"


def registry(*, write: bool) -> str:
    """Where the content of registered models is kept."""
    from tally.config import settings

    where = settings().registry
    if not is_url(where):
        folder = Path(where)
        if not os.path.exists(folder):  # noqa: PTH110 - False where it may not be looked at
            return f"{where}, which is not there yet: the first model that is added makes it"
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise StorageError(f"{where} cannot be read and written", hint="See TALLY_REGISTRY.")
        text = f"{where} can be read and written"
        if _is_shared(settings().database) and folder == settings().home / "models":
            raise Warn(f"{text}, but is only this machine's, while the database is shared: see TALLY_REGISTRY")
        return text
    return place(where, write=write)


# -- cluster -----------------------------------------------------------------------------------------------------------


def ray(address: str | None, *, needed: bool) -> str:
    """Ray's version, and the cluster that is found, if any: whether it answers, its version, what it has.

    needed: no Ray, or a cluster that was begun here and does not answer, is a failure.
    """
    ours = version_of("ray")
    if ours is None:
        if needed:
            raise TallyError("Ray is not installed", hint=install("ray"))
        raise Skip(f"not installed; for --engine ray: {install('ray')}")
    named = address or _named()
    if named and is_url(named) and not named.lower().startswith(("http://", "https://")):
        raise TallyError(
            f"{mask(named)}: Ray Client is not used", hint="Give the dashboard's address: http://HEAD:8265"
        )
    try:
        # Ray itself would wait long for a head that is not there.
        if named and is_url(named):
            _answers(named)
        elif (head := _left_by_ray_start() if named in (None, "auto") else named) not in (None, "local"):
            _listens(str(head))
        return _cluster(address, ours)
    except TallyError as error:
        if needed or named:
            raise
        # It was started here once, and nobody asks for it now.
        raise Warn(f"{ours}; a cluster was started on this machine, but: {error}") from None


def _left_by_ray_start() -> str | None:
    """The address of the cluster that ``ray start`` began on this machine, and did not stop."""
    folder = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform == "linux" else None) or "/tmp"  # noqa: S108
    with suppress(OSError):
        return Path(folder, "ray", "ray_current_cluster").read_text("utf-8").strip() or None
    return None


def _named() -> str | None:
    return os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or None


def _cluster(address: str | None, ours: str) -> str:
    from tally.config import settings

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # the C++ library's: our messages say what matters
    from tally.engines.ray.cluster import find

    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster = find(address)
    if cluster is None:
        return f"{ours}; no cluster is found: one of this machine's own is started for each job"
    cluster.check()
    nodes = cluster.nodes()
    text = f"{ours}; {mask(cluster.address)} answers and runs the same; {_resources(nodes)}"
    text += ". Whether its nodes have Tally, and which, is seen when a job begins"
    host = urlsplit(cluster.address).hostname or ""
    if host not in ("localhost", "127.0.0.1", "::1") and not _is_shared(settings().database):
        raise Warn(f"{text}.\n  The database is a file of this machine, which the cluster's do not see: {_SHARED}")
    return text


def _is_shared(database: str) -> bool:
    return not database.startswith("sqlite")


def _resources(nodes: Sequence[Mapping[str, float]]) -> str:
    def sum_of(name: str) -> float:
        return sum(each.get(name, 0) for each in nodes)

    count = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    return f"{count}, {sum_of('CPU'):g} CPUs, {sum_of('GPU'):g} GPUs, {sum_of('memory') / 2**30:,.1f} GiB memory"


# -- reaching a server -------------------------------------------------------------------------------------------------


def _answers(url: str) -> None:
    """Raises StorageError unless the server at a URL answers a request, whatever the answer. No secrets are sent."""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.hostname or ""
    port = parts.port or _PORTS.get(scheme, 80)
    proxy = None if proxy_bypass(host) else getproxies().get(scheme)
    if proxy:  # the proxy has to reach the server, not this machine
        through = urlsplit(proxy if "://" in proxy else f"//{proxy}")
        _listens(f"{through.hostname}:{through.port or 80}", through="the proxy of the environment, ")
        return
    # Only whether somebody is there: certificates are checked when something is asked for.
    connection = (
        http.client.HTTPSConnection(host, port, timeout=ANSWER_SECONDS, context=_unverified())
        if scheme == "https"
        else http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    )
    try:
        connection.request("GET", "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(mask(url), error) from None
    finally:
        connection.close()
    if status >= 500:
        raise StorageError(
            f"{mask(url)} answers with HTTP status {status}", hint="The service, or what is before it, fails."
        )


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _listens(address: str, through: str = "") -> None:
    """Raises StorageError unless somebody takes connections at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _unreachable(f"{through}{address}", error) from None


def _unreachable(shown: str, error: Exception) -> StorageError:
    hint = "Is the address right, is it running, and may this machine reach it?"
    if isinstance(error, TimeoutError):
        return StorageError(f"{shown} does not answer within {ANSWER_SECONDS:g} s", hint=hint)
    if isinstance(error, socket.gaierror):
        return StorageError(f"{shown}: no such host is known ({error.strerror})", hint=hint)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return StorageError(f"{shown} cannot be reached: {reason.lower()}", hint=hint)


def _short(error: TallyError) -> str:
    text = " ".join(error.message.split())
    return text if len(text) <= 300 else f"{text[:300]}…"
