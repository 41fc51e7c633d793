"""Puts documents into a collection of MongoDB, or of what speaks its protocol, such as Azure Cosmos DB: one for each
item, known by its key, with all its rows.

A document that is there already is replaced. So each item is there once, however often a parcel is delivered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock
from decimal import Decimal
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from tally import network
from tally.database import foreign
from tally.errors import SpecError, StorageAwayError, StorageError
from tally.masking import mask
from tally.optional import needed
from tally.push.base import Parcel, Receiver, Refusal
from tally.push.bodies import by_key, filled
from tally.push.target import Push

AT_ONCE = 1000
"""Documents that are written at once."""
_TRIES = 3
_BUSY = (16500, 429)
"""Codes by which Cosmos DB says that it is asked too much."""
_SHUT_OUT = (8000, 18, 13)
"""Codes of a user who is not let in, or not allowed to write."""
_TWICE = 11000
"""The code of a document that another one has put there at the same moment: the next try replaces it."""
_SECONDS = 10


def open_receiver(push: Push, facts: Mapping[str, Any]) -> Receiver:
    """See :mod:`tally.push.factory`."""
    return DocumentReceiver(push, facts)


class DocumentReceiver(Receiver):
    """facts: ``job``, ``model`` and ``version``, for documents. Raises SpecError."""

    def __init__(self, push: Push, facts: Mapping[str, Any]) -> None:
        assert push.table is not None
        with needed("push: mongodb:// needs", "mongodb"):
            import pymongo
        address = push.address()
        self._shown = f"{foreign.shown(address)}#{push.table}"
        parts = urlsplit(address)
        for server in parts.netloc.rpartition("@")[2].split(","):
            host = urlsplit(f"//{server}").hostname or ""
            if not network.is_allowed(host):  # it would say where else to connect
                raise StorageError(f"{self._shown} may not be connected to: {host!r} is not among the hosts allowed")
        self._body, self._facts = push.body, facts
        try:
            self._client: Any = pymongo.MongoClient(
                address, serverSelectionTimeoutMS=_SECONDS * 1000, appname="tally", tz_aware=True
            )
        except (ValueError, pymongo.errors.PyMongoError) as error:
            raise SpecError(f"push: {self._shown}: {_reason(error)}") from None
        self._collection = self._client[parts.path.strip("/")][push.table]

    def check(self, schema: Any, *, begun: bool) -> None:
        """See :meth:`Receiver.check`."""
        self._tried(lambda: self._client.admin.command("ping"))

    def deliver(self, parcel: Parcel, *, confirm: Callable[[], None] = lambda: None) -> list[Refusal]:
        """See :meth:`Receiver.deliver`."""
        refusals: list[Refusal] = []
        documents: dict[str, dict[str, Any]] = {}
        for key, rows in by_key(parcel).items():
            try:
                documents[key] = self._document(key, rows, parcel.info.get(key, {}))
            except (SpecError, ValueError) as error:
                refusals.append(Refusal(key, str(error)))
        for some in _parts(list(documents), AT_ONCE):
            confirm()
            refusals += self._replaced({key: documents[key] for key in some})
        return refusals

    def close(self) -> None:
        """See :meth:`Receiver.close`."""
        self._client.close()

    def _document(self, key: str, rows: Any, info: Mapping[str, Any]) -> dict[str, Any]:
        made = filled(self._body, self._facts, key, rows, info)
        if self._body is None:
            del made["key"]
        return {"_id": key, **{name: _stored(value) for name, value in made.items() if name != "_id"}}

    def _replaced(self, documents: Mapping[str, dict[str, Any]]) -> list[Refusal]:
        """Put the documents in the place of those that are there. Returns those that are refused."""
        import pymongo
        from bson.errors import InvalidDocument

        left = dict(documents)
        refusals: list[Refusal] = []
        for _ in range(_TRIES):
            keys = list(left)
            changes = [pymongo.ReplaceOne({"_id": key}, left[key], upsert=True) for key in keys]
            try:
                self._tried(partial(self._collection.bulk_write, changes, ordered=False))
                return refusals
            except pymongo.errors.BulkWriteError as error:
                faults = {keys[each["index"]]: each for each in error.details.get("writeErrors", ())}
                if busy := next((each for each in faults.values() if each["code"] in _BUSY), None):
                    time.sleep(min(busy.get("RetryAfterMs", 0) / 1000, _SECONDS))
                    raise StorageAwayError(f"{self._shown}: {_reason(busy['errmsg'])}") from None
                if not faults:
                    raise StorageAwayError(f"{self._shown}: {_reason(error)}") from None
                left = {key: left[key] for key, each in faults.items() if each["code"] == _TWICE}
                refusals += [Refusal(key, _reason(each["errmsg"])) for key, each in faults.items() if key not in left]
                if not left:
                    return refusals
            except (pymongo.errors.DocumentTooLarge, InvalidDocument, OverflowError) as error:
                if len(left) == 1:
                    return [*refusals, Refusal(keys[0], _reason(error))]
                return [*refusals, *(each for key in keys for each in self._replaced({key: left[key]}))]
        raise StorageAwayError(f"{self._shown}: others write the same documents at the same time")

    def _tried(self, ask: Callable[[], Any]) -> None:
        import pymongo

        try:
            ask()
        except pymongo.errors.BulkWriteError:
            raise
        except (pymongo.errors.ConfigurationError, pymongo.errors.OperationFailure) as error:
            code = getattr(error, "code", None)
            if code in _BUSY:
                raise StorageAwayError(f"{self._shown}: {_reason(error)}") from None
            what = "does not let us in" if code in _SHUT_OUT else "takes no documents"
            raise StorageError(
                f"{self._shown} {what}: {_reason(error)}",
                hint="Check the database's name, the user and the password, then resume the job.",
            ) from None
        except (pymongo.errors.ConnectionFailure, pymongo.errors.WTimeoutError) as error:
            raise StorageAwayError(f"{self._shown} does not answer: {_reason(error)}") from None


def _stored(value: Any) -> Any:
    """The value as BSON knows it. Raises ValueError for one that would be cut."""
    from bson.decimal128 import Decimal128

    match value:
        case Mapping():
            return {str(name): _stored(each) for name, each in value.items()}
        case list() | tuple():
            return [_stored(each) for each in value]
        case Decimal():
            try:
                return Decimal128(value)
            except ArithmeticError:
                raise ValueError(f"{value} has more digits than the 34 that MongoDB keeps") from None
        case datetime():
            if value.microsecond % 1000:
                raise ValueError(f"{value} has microseconds, and MongoDB keeps milliseconds")
            return value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        case date() | clock():
            return value.isoformat()
        case timedelta():
            return value // timedelta(microseconds=1)
    return value


def _parts(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for begin in range(0, len(keys), size):
        yield keys[begin : begin + size]


def _reason(error: Any) -> str:
    return mask(" ".join(str(error).split(", Timeout: ")[0].split()))[:500]
