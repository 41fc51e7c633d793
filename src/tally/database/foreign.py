"""Databases of users, which rows are read from or go into: their URLs, and connections to them. Tally keeps nothing
there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tally import config, network
from tally.errors import SpecError, StorageAwayError, StorageError
from tally.masking import has_secret, mask
from tally.optional import needed
from tally.processes import withhold

if TYPE_CHECKING:
    import sqlalchemy as sa

DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "sqlite": "sqlite",
    "mariadb": "mariadb+pymysql",
    "mysql": "mysql+pymysql",
}
"""Schemes of URLs of databases, and SQLAlchemy's name for what opens them."""

FILES = ("sqlite", "duckdb")
"""Schemes of databases that are a file: ``sqlite:///FILE``."""

DOCUMENTS = ("mongodb", "mongodb+srv")
"""Schemes of databases that hold documents, and no tables."""

SCHEMES = frozenset({*DRIVERS, *FILES, *DOCUMENTS})

_EXTRAS = {"postgresql": "postgres", "postgres": "postgres", "mysql": "mariadb", "mariadb": "mariadb"}
_VARIABLE = re.compile(r"env:([A-Za-z_]\w*)")
_SHUT_OUT = re.compile(
    r'(database|role) ".*" does not exist|authentication failed|no pg_hba\.conf entry|no password supplied', re.DOTALL
)
"""How PostgreSQL refuses a connection for good. Its driver has no code for that, only the server's own words."""
_SHUT_OUT_CODES = (1044, 1045, 1049, 1698)
"""How MariaDB and MySQL do: access denied, no such database."""


def scheme_of(url: str) -> str | None:
    """The scheme of a database's URL, in lower case; None if it is none."""
    scheme, separator, _ = url.partition("://")
    return scheme.lower() if separator and scheme.lower() in SCHEMES else None


def is_database(url: str) -> bool:
    """Whether the URL is one of a database."""
    return scheme_of(url) is not None


def variable(text: str) -> str | None:
    """The environment variable that ``env:NAME`` stands for. Workers are not told it from now on."""
    found = _VARIABLE.fullmatch(text)
    if found is None:
        return None
    withhold(found[1])
    return found[1]


def value(text: str, what: str) -> str:
    """The text, or what the environment holds for ``env:NAME``. Raises SpecError."""
    if (name := variable(text)) is None:
        return text
    if not (held := (config.variable(name) or "").strip()):
        raise SpecError(f"{what} is {text}, and {name} is not set", hint=f"Set {name}.")
    return held


def check(address: str) -> None:
    """Raises ValueError for the URL of a database, without a table, that carries a password or leads nowhere."""
    if variable(address) is not None:
        return
    if has_secret(address):
        raise ValueError(
            "holds a password, which the job would keep: use PGPASSWORD or ~/.pgpass, or put the whole URL "
            "into a variable: env:NAME#TABLE"
        )
    if not _leads_somewhere(address):
        raise ValueError(
            "names no server and database, or no file: postgresql://HOST/DATABASE, sqlite:///FILE, duckdb:///FILE"
        )


def _leads_somewhere(address: str) -> bool:
    """Whether the URL of a database says where it is."""
    try:
        parts = urlsplit(address)
        there = parts.scheme.lower() in FILES or (parts.hostname and parts.port != 0)
    except ValueError:
        return False
    return bool(there) and parts.path.strip("/") not in ("", ":memory:")


def file_of(address: str) -> str:
    """The path in the URL of a database that is a file."""
    return re.split(r"[?#]", address.partition("://")[2].removeprefix("/"), maxsplit=1)[0]


def engine(address: str, what: str) -> sa.Engine:
    """An engine for the database of a URL, which may hold a password. Nothing is contacted yet.

    what: the job's field that names it. Raises SpecError if it cannot be understood, or its driver is not installed.
    """
    import sqlalchemy as sa

    try:
        url = sa.make_url(address)
    except (sa.exc.ArgumentError, ValueError):
        raise SpecError(f"{what}: the database's URL cannot be understood") from None
    if url.drivername not in DRIVERS:
        raise SpecError(f"{what}: {url.drivername}:// is no database that has tables")
    with needed(f"{what}: {url.drivername}:// needs", _EXTRAS.get(url.drivername, "postgres")):
        made = sa.create_engine(url.set(drivername=DRIVERS[url.drivername]), pool_pre_ping=True)
    sa.event.listen(made, "do_connect", _connected)
    if (exactly := _SESSIONS.get(made.dialect.name)) is not None:
        sa.event.listen(made, "connect", exactly)
    return made


def shown(address: str) -> str:
    """A database's URL for people: without a password."""
    scheme, separator, rest = address.partition("://")
    user, at, host = rest.rpartition("@")
    return mask(f"{scheme}{separator}{user.partition(':')[0]}{at}{host}")


def _connected(dialect: sa.Dialect, record: Any, args: Any, options: dict[str, Any]) -> Any:
    """A connection to an address that was checked, where not all may be connected to; None leaves it to SQLAlchemy.

    Raises StorageError, StorageAwayError.
    """
    host = options.get("host")
    if host is None or network.is_allowed(host):
        return None
    try:
        if dialect.name == "postgresql":
            options["hostaddr"] = network.addresses(host, int(options.get("port", 5432)))[0]
            return None
        made = dialect.loaded_dbapi.connect(**options, defer_connect=True)
        made.connect(network.create_connection((made.host, made.port), made.connect_timeout))
    except network.PrivateAddressError as error:
        raise StorageError(f"the database may not be connected to: {error.strerror}") from None
    except OSError as error:
        raise StorageAwayError(f"the database at {host} does not answer: {error}") from None
    return made


def is_shut_out(error: BaseException) -> bool:
    """Whether a driver's error says that the server answers, and refuses to connect us: waiting would not help."""
    told = getattr(error, "args", ())
    return told[:1] in [(code,) for code in _SHUT_OUT_CODES] or _SHUT_OUT.search(str(error)) is not None


def _in_utc(connection: Any, record: Any) -> None:
    """Have PostgreSQL keep times as they are, whatever the zone of the session would be."""
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
    connection.commit()


def _strictly(connection: Any, record: Any) -> None:
    """Have MariaDB refuse what it would otherwise cut."""
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION sql_mode = 'TRADITIONAL', time_zone = '+00:00'")


_SESSIONS = {"postgresql": _in_utc, "mysql": _strictly, "mariadb": _strictly}
"""What a new connection is told first."""
