"""What ``push`` says in a job: where rows go, and in which form."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tally.alerts.webhook import checked as web_address
from tally.alerts.webhook import shown as shown_webhook
from tally.database import foreign
from tally.database.foreign import is_database

_PRIVATE = re.compile(r"(?i)auth|key|secret|token|cookie|password")
"""Headers whose values are secrets."""


class Push(BaseModel):
    """Where a job's rows go as they are committed.

    url: ``https://...``, or a table: ``postgresql://HOST/DATABASE#TABLE``, ``mariadb://HOST/DATABASE#TABLE``,
    ``sqlite:///FILE#TABLE`` or ``duckdb:///FILE#TABLE``, or a collection: ``mongodb://HOST/DATABASE#COLLECTION``; or
    ``env:NAME``, the variable that holds it (``env:NAME#TABLE``).
    when: tables only: whether rows are there as they are ``committed``, or all at once when the job is ``finished``.
    Web addresses and collections: body: what is posted, or the document, a value as JSON knows it; ``{name}`` in its
    text stands for ``key``, ``rows`` (all of the item, without the key), a column of the first row, ``job``, ``model``,
    ``version`` or ``now``.
    Web addresses only: items: in one request; with more than one, a list of bodies is posted.
    headers: sent along; ``env:NAME`` stands for a variable's value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: str = Field(min_length=1)
    when: Literal["committed", "finished"] = "committed"
    body: Any = None
    items: Annotated[int, Field(ge=1, le=10_000)] = 1
    headers: dict[str, str] = {}

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, url: str) -> str:
        address, _, table = url.partition("#")
        if foreign.variable(address) is not None:
            return url
        if is_database(url):
            foreign.check(address)
            if not table:
                raise ValueError("should end with the table's name, as in postgresql://HOST/DATABASE#TABLE")
            return url
        return web_address(url)

    @field_validator("headers")
    @classmethod
    def _from_variables(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if foreign.variable(value) is None and _PRIVATE.search(name):
                raise ValueError(f"the header {name} is a secret; put it into a variable, and env:NAME here")
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not value.isprintable():
                raise ValueError(f"{name!r} is no header")
        return headers

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if self.table is None and self.when != "committed":
            raise ValueError("when: finished is for tables: what was posted cannot be seen all at once")
        if self.table is not None and (self.items != 1 or self.headers):
            raise ValueError("items and headers are for web addresses, and this is a table")
        if (problem := self.misfit(foreign.scheme_of(self.url))) is not None:
            raise ValueError(problem)
        return self

    def misfit(self, scheme: str | None) -> str | None:
        """What cannot be asked of a database of this scheme; None if nothing is wrong, or it is none."""
        if scheme in foreign.DOCUMENTS:
            if self.when != "committed":
                return f"when: finished is for tables: {scheme}:// shows each document as it is written"
            if self.body is not None and not (isinstance(self.body, dict) and "_id" not in self.body):
                return "body: should be a document, a mapping without _id, which is the item's key"
        elif scheme is not None and self.body is not None:
            return "body is for web addresses and documents, and this is a table"
        return None

    @property
    def table(self) -> str | None:
        """The table's or collection's name, if rows go into one."""
        return self.url.partition("#")[2] or None if is_database(self.url) or self.url.startswith("env:") else None

    @property
    def shown(self) -> str:
        """The URL as it may be shown: of a web address, the host."""
        return self.url if self.table else shown_webhook(self.url)

    def address(self) -> str:
        """The URL without the table, from the environment if it is there. Raises SpecError."""
        address = self.url.partition("#")[0] if self.table else self.url
        return foreign.value(address, "push")

    def header_values(self) -> dict[str, str]:
        """The headers, from the environment where they are there. Raises SpecError."""
        return {name: foreign.value(value, f"the header {name}") for name, value in self.headers.items()}
