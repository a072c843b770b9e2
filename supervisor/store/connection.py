"""Connections to PostgreSQL: made when they are needed, dropped when they break, each kind of work with its own.

``Connector`` opens one; a ``Link`` is the few connections that one kind of work (renewal, dispatch …) has to itself, so
that none starves another. Used by ``pg`` and ``listen``. Nothing here retries a write: its outcome may be unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

import anyio
import asyncpg
import msgspec

from supervisor.model.errors import BsupError, StoreUnavailable
from supervisor.ports import StoreHealth
from supervisor.store import dsn as dsns
from supervisor.store.faults import FAULTS, breaks_connection, is_of_a_pooler, translate
from supervisor.store.liveness import liveness
from supervisor.store.statements import STATEMENTS

log = logging.getLogger("supervisor.store")

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

NO_SETTINGS: Mapping[str, str] = {}
# For statements that find rows by key, in batches of any size: a plan is made once, and not for the size that a table
# had at that moment, which may have been none.
BY_KEY: Mapping[str, str] = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
}

# What the client waits beyond the server's own statement_timeout, before it takes the server for gone.
SLACK = 2.0


class Health:
    """What was last seen of the database. Written by every Link, read by ``PgStore.health``."""

    def __init__(self) -> None:
        self.available = False
        self.was_available = False
        self.since = datetime.now(UTC)
        self.error: str | None = "not connected yet"
        self.server: str | None = None
        self.listening = False
        self.round_trips = 0
        self.last_round_trip: float | None = None

    def succeeded(self, seconds: float) -> None:
        self.round_trips += 1
        self.last_round_trip = seconds
        if not self.available:
            if self.was_available:
                away = (datetime.now(UTC) - self.since).total_seconds()
                log.info("the database is back after %.1f s", away)
            self.available, self.since, self.error, self.was_available = True, datetime.now(UTC), None, True

    def failed(self, error: StoreUnavailable) -> None:
        if self.available:
            log.warning("the database is away: %s", error)
            self.available, self.since = False, datetime.now(UTC)
        self.error = str(error)

    def snapshot(self) -> StoreHealth:
        return StoreHealth(
            available=self.available,
            since=self.since,
            error=self.error,
            server=self.server,
            listening=self.listening,
            round_trips=self.round_trips,
            last_round_trip=self.last_round_trip,
        )


class Connector:
    """Opens connections to the DSN's servers. Raises StoreUnavailable, or InvalidInput for a DSN that can't be read.

    Behind a pooler (PgBouncer in transaction mode) each statement may run in another session of the server: nothing is
    prepared there by name, and no setting is made, which the next client would inherit. ``is_pooled`` is known once a
    connection was made.
    """

    def __init__(self, dsn: str, *, application_name: str, connect_timeout: float, statement_timeout: float) -> None:
        self._dsn = dsns.parse(dsn)
        self._application_name = application_name
        self._connect_timeout = self._dsn.connect_timeout or connect_timeout
        self.statement_timeout = statement_timeout
        self._settings = {
            # The server gives up before the client does, so that a lock is not held for a client that is gone.
            "statement_timeout": str(int(statement_timeout * 1000)),
            # Plans here are short; an estimate that is off must not start a compiler.
            "jit": "off",
        }
        self._liveness = liveness(self._dsn.options)
        self._settings |= self._liveness.settings()
        self.is_pooled = False
        # The host that answered last is asked first.
        self._urls = self._one_by_one()

    def _one_by_one(self) -> list[str]:
        """A URL for each host: asyncpg has one deadline for all, which a host that swallows packets would use up."""
        if len(self._dsn.hosts) < 2 or self._dsn.session_attrs == "prefer-standby":
            return [self._dsn.url()]
        return [msgspec.structs.replace(self._dsn, hosts=(host,)).url() for host in self._dsn.hosts]

    async def connect(self, settings: Mapping[str, str] = NO_SETTINGS) -> Connection:
        """``settings``: of the server's session, beyond those that every connection gets."""
        problems: list[str] = []
        for url in list(self._urls):
            try:
                connection = await self._connect(url, settings)
            except FAULTS as error:
                problems.append(str(translate(error, "connect")))
                continue
            except asyncio.CancelledError:
                # Whoever can't wait for a host that swallows everything begins with another one the next time.
                self._ask(url, first=False)
                raise
            self._ask(url, first=True)
            return connection
        raise StoreUnavailable("; ".join(dict.fromkeys(problems)))

    def _ask(self, url: str, *, first: bool) -> None:
        self._urls.remove(url)
        self._urls.insert(0 if first else len(self._urls), url)

    async def _connect(self, url: str, settings: Mapping[str, str]) -> Connection:
        if not self.is_pooled:
            try:
                connection = await self._open(url, {**self._settings, **settings})
            except asyncpg.PostgresError as error:
                if not is_of_a_pooler(error):
                    raise
            else:
                if await self._is_direct(connection):
                    return connection
                await hang_up(connection)
            log.info("a pooler stands before the database: nothing is prepared, and only this end keeps time")
            self.is_pooled = True
        return await self._open(url, {}, statement_cache_size=0)

    async def _open(self, url: str, settings: dict[str, str], **options: Any) -> Connection:
        connection: Connection = await asyncpg.connect(
            url,
            timeout=self._connect_timeout,
            server_settings={"application_name": self._application_name, **settings},
            **options,
        )
        self._liveness.set_on(connection._transport)  # type: ignore[attr-defined]  # no public way leads to the socket
        return connection

    async def _is_direct(self, connection: Connection) -> bool:
        """Whether it is the server itself that was connected to: a pooler gives out process ids of its own making."""
        pid = connection.get_server_pid()
        try:
            # In the simple protocol, which leaves nothing behind.
            told = await connection.execute(f"SELECT WHERE pg_backend_pid() = {pid}", timeout=self._connect_timeout)
        except BaseException:
            connection.terminate()
            raise
        return told == "SELECT 1"


class Link:
    """At most ``size`` connections for one kind of work. Concurrent calls are fine; a cancelled one drops its own."""

    def __init__(
        self, connector: Connector, health: Health, size: int = 1, settings: Mapping[str, str] = NO_SETTINGS
    ) -> None:
        self._connector = connector
        self._settings = settings
        self._health = health
        self._turns = anyio.Semaphore(size)
        self._idle: list[Connection] = []
        self._closed = False

    async def rows(self, name: str, *args: Any, reading: bool = False) -> Sequence[asyncpg.Record]:
        """Runs a statement by its name. ``reading``: it changes nothing, so it is tried again on a new connection.

        Raises StoreUnavailable or what ``faults`` makes of the error.
        """
        async with self._turns:
            used = bool(self._idle)
            try:
                return await self._once(name, args)
            except StoreUnavailable:
                # A connection that was idle may have died unnoticed; a new one tells whether the server is there.
                if not (reading and used) or self._closed:
                    raise
            self._drop_idle()
            return await self._once(name, args)

    async def value(self, name: str, *args: Any, reading: bool = False) -> Any:
        rows = await self.rows(name, *args, reading=reading)
        return rows[0][0] if rows else None

    async def _once(self, name: str, args: Sequence[Any]) -> Sequence[asyncpg.Record]:
        began = time.monotonic()
        connection: Connection | None = None
        keep = False
        try:
            connection = await self._take()
            rows = await connection.fetch(
                STATEMENTS[name].sql, *args, timeout=self._connector.statement_timeout + SLACK
            )
            keep = True
        except FAULTS as error:
            keep = not breaks_connection(error)
            raise self._noted(translate(error, name)) from error
        except StoreUnavailable as error:
            raise self._noted(error) from error.__cause__
        finally:
            if connection is not None:
                self._put_back(connection, keep)
        self._health.succeeded(time.monotonic() - began)
        return rows

    def _noted(self, error: BsupError) -> BsupError:
        if isinstance(error, StoreUnavailable):
            self._health.failed(error)
        return error

    async def _take(self) -> Connection:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        connection = await self._connector.connect(self._settings)
        self._health.server = f"PostgreSQL {connection.get_settings().server_version.split()[0]}"
        return connection

    def _put_back(self, connection: Connection, keep: bool) -> None:
        if keep and not self._closed and not connection.is_closed():
            self._idle.append(connection)
        else:
            connection.terminate()

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().terminate()

    async def close(self) -> None:
        """Closes idle connections now, and those in use as they come back."""
        self._closed = True
        while self._idle:
            await hang_up(self._idle.pop())


async def hang_up(connection: Connection) -> None:
    """Takes leave of the server, or breaks off if it does not answer."""
    with anyio.CancelScope(shield=True), contextlib.suppress(*FAULTS):
        await connection.close(timeout=2)
    if not connection.is_closed():
        connection.terminate()
