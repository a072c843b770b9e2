"""Hears the database's wake-ups: one connection that LISTENs and does nothing else (asyncpg delays the notifications
of a connection that also prepares statements).

Used by ``pg``. A wake-up is a hint: whoever is woken looks, and looks anyway now and then. So after every connection
each listener is woken once, for what it may have missed.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable

import anyio

from supervisor.model.errors import BsupError
from supervisor.store.connection import Connection, Connector, Health, hang_up
from supervisor.store.faults import FAULTS

log = logging.getLogger(__name__)

CHANNEL = "bsup"
PAYLOADS = ("ready", "stop")
LONGEST_PAUSE = 5.0


class Ear:
    """``run`` listens until it is cancelled; ``on_wake`` callbacks are called on the event loop and must not block.

    ``is_meant``: the DSN was given for listening. Any other is not listened on through a pooler: in transaction mode
    another client's connection would hear, while the server's answers to this one may well say that it listens.
    """

    def __init__(
        self, connector: Connector, health: Health, check_every: float = 10.0, *, is_meant: bool = False
    ) -> None:
        self._connector = connector
        self._health = health
        self._check_every = check_every
        self._is_meant = is_meant
        self._tell: list[Callable[[str], None]] = []

    def on_wake(self, tell: Callable[[str], None]) -> Callable[[], None]:
        self._tell.append(tell)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._tell.remove(tell)

        return forget

    async def run(self) -> None:
        pause = 0.1
        while True:
            try:
                connection = await self._connector.connect()
            except BsupError as error:
                log.debug("can't listen for wake-ups: %s", error)
            else:
                try:
                    if self._connector.is_pooled and not self._is_meant:
                        log.info("no wake-ups come through a pooler: polling (database.listen_dsn would bring them)")
                        return
                    if await self._listen(connection):
                        pause = 0.1
                finally:
                    self._health.listening = False
                    await hang_up(connection)
            # Jitter, or a server that comes back is asked by every host at the same moment.
            await anyio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _listen(self, connection: Connection) -> bool:
        """Listens until the connection fails; whether it ever worked."""
        ended = anyio.Event()
        connection.add_termination_listener(lambda _: ended.set())
        timeout = self._connector.statement_timeout
        try:
            with anyio.fail_after(timeout):
                await connection.add_listener(CHANNEL, lambda *heard: self._wake(str(heard[3])))
        except FAULTS as error:
            log.debug("can't listen for wake-ups: %s", error)
            return False
        self._health.listening = True
        for payload in PAYLOADS:
            self._wake(payload)
        while not ended.is_set():
            with anyio.move_on_after(self._check_every):
                await ended.wait()
                break
            # Asks more than whether the server answers: what was meant for listening may be a pooler all the same.
            try:
                listens = await connection.fetchval(
                    "SELECT $1 = ANY (ARRAY(SELECT pg_listening_channels()))", CHANNEL, timeout=min(timeout, 5.0)
                )
            except FAULTS as error:
                log.debug("the connection that listens for wake-ups is dead: %s", error)
                return True
            if not listens:
                log.warning("the connection does not keep LISTEN (a pooler in transaction mode?): polling only")
                self._health.listening = False
                await anyio.sleep(60)
                return False
        return True

    def _wake(self, payload: str) -> None:
        for tell in list(self._tell):
            tell(payload)
