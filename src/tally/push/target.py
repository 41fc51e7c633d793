"""What ``push`` says in a job: where rows go, and in which form."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tally.alerts.webhook import checked as web_address
from tally.alerts.webhook import shown as shown_webhook
from tally.errors import SpecError
from tally.masking import has_secret
from tally.processes import withhold

DATABASES = {
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "sqlite": "sqlite",
    "mariadb": "mariadb+pymysql",
    "mysql": "mysql+pymysql",
}
"""Schemes of URLs of databases, and SQLAlchemy's name for what opens them."""

_VARIABLE = re.compile(r"env:([A-Za-z_]\w*)")
_PRIVATE = re.compile(r"(?i)auth|key|secret|token|cookie|password")
"""Headers whose values are secrets."""


class Push(BaseModel):
    """Where a job's rows go as they are committed.

    url: ``https://...``, or a table: ``postgresql://HOST/DATABASE#TABLE``, ``sqlite:///FILE#TABLE`` or
    ``mariadb://HOST/DATABASE#TABLE``; or ``env:NAME``, the variable that holds it (``env:NAME#TABLE``).
    Web addresses only: body: what is posted, a value as JSON knows it; ``{name}`` in its text stands for ``key``,
    ``rows`` (all of the item, without the key), a column of the first row, ``job``, ``model``, ``version`` or ``now``.
    items: in one request; with more than one, a list of bodies is posted.
    headers: sent along; ``env:NAME`` stands for a variable's value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: str = Field(min_length=1)
    body: Any = None
    items: Annotated[int, Field(ge=1, le=10_000)] = 1
    headers: dict[str, str] = {}

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, url: str) -> str:
        address, _, table = url.partition("#")
        if found := _VARIABLE.fullmatch(address):
            withhold(found[1])
            return url
        if is_database(url):
            if has_secret(address):
                raise ValueError(
                    "holds a password, which the job would keep: use PGPASSWORD or ~/.pgpass, or put the whole URL "
                    "into a variable: env:NAME#TABLE"
                )
            if not _leads_somewhere(address):
                raise ValueError("names no server and database, or no file: postgresql://HOST/DATABASE, sqlite:///FILE")
            if not table:
                raise ValueError("should end with the table's name, as in postgresql://HOST/DATABASE#TABLE")
            return url
        return web_address(url)

    @field_validator("headers")
    @classmethod
    def _from_variables(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if found := _VARIABLE.fullmatch(value):
                withhold(found[1])
            elif _PRIVATE.search(name):
                raise ValueError(f"the header {name} is a secret; put it into a variable, and env:NAME here")
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not value.isprintable():
                raise ValueError(f"{name!r} is no header")
        return headers

    @model_validator(mode="after")
    def _of_web_addresses(self) -> Self:
        if self.table is not None and (self.body is not None or self.items != 1 or self.headers):
            raise ValueError("body, items and headers are for web addresses, and this is a table")
        return self

    @property
    def table(self) -> str | None:
        """The table's name, if rows go into one."""
        return self.url.partition("#")[2] or None if is_database(self.url) or self.url.startswith("env:") else None

    @property
    def shown(self) -> str:
        """The URL as it may be shown: of a web address, the host."""
        return self.url if self.table else shown_webhook(self.url)

    def address(self) -> str:
        """The URL without the table, from the environment if it is there. Raises SpecError."""
        address = self.url.partition("#")[0] if self.table else self.url
        return _value(address, "push")

    def header_values(self) -> dict[str, str]:
        """The headers, from the environment where they are there. Raises SpecError."""
        return {name: _value(value, f"the header {name}") for name, value in self.headers.items()}


def is_database(url: str) -> bool:
    """Whether the URL is one of a database."""
    scheme, separator, _ = url.partition("://")
    return bool(separator) and scheme.lower() in DATABASES


def _leads_somewhere(address: str) -> bool:
    """Whether the URL of a database says where it is."""
    try:
        parts = urlsplit(address)
        there = parts.scheme.lower() == "sqlite" or (parts.hostname and parts.port != 0)
    except ValueError:
        return False
    return bool(there) and parts.path.strip("/") not in ("", ":memory:")


def _value(text: str, what: str) -> str:
    found = _VARIABLE.fullmatch(text)
    if found is None:
        return text
    if not (value := os.environ.get(found[1], "").strip()):
        raise SpecError(f"{what} is {text}, and {found[1]} is not set", hint=f"Set {found[1]}.")
    return value
