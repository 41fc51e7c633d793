"""PostgreSQL's NOTIFY, used as a hint to look at once. It may be lost, so receivers poll as well."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import sqlalchemy as sa


class Listener:
    """Receives PostgreSQL's NOTIFY on one channel, over a connection of its own. Used by one thread."""

    def __init__(self, connection: sa.Connection, channel: str) -> None:
        self._connection = connection
        driver: Any = connection.connection.driver_connection
        self._driver = driver
        self._fileno = int(driver.fileno())
        connection.exec_driver_sql(f"LISTEN {channel}")
        connection.detach()  # from the pool

    def fileno(self) -> int:
        """The connection's socket, readable when there is something to receive."""
        return self._fileno

    def received(self) -> list[str]:
        """The payloads received since the last call. Raises the driver's error when the connection is lost."""
        return [str(each.payload) for each in self._driver.notifies(timeout=0)]

    def close(self) -> None:
        """Close the connection."""
        with suppress(Exception):  # it may be broken
            self._connection.close()


def listen(engine: sa.Engine, channel: str) -> Listener | None:
    """Listen on the channel from now on; None for databases without NOTIFY."""
    if engine.driver != "psycopg":
        return None
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        return Listener(connection, channel)
    except BaseException:
        connection.close()
        raise


def notify(connection: sa.Connection, channel: str, payload: str) -> None:
    """Tell listeners, when the transaction commits; does nothing on databases without NOTIFY."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_notify(channel, payload)))
