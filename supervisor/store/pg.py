"""``PgStore``: the store that ``ports.Store`` promises, on PostgreSQL. Made by ``app``, seen by the actors as the port.

It opens while the database is away, connects when it is first asked, and connects again at any call after it lost the
server; what can't be answered now raises StoreUnavailable. Connections by kind of work, so that none starves another:

    renewal   1   sessions: what keeps this host's leases
    dispatch  2   claims and completions, side by side
    upkeep    1   the pulse, the reaper and the sweeper, which may wait for locks
    logs      1   chunks and pages of logs
    users     3   what people ask
    (listen)  1   wake-ups
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import anyio

from supervisor.ports import Store, StoreHealth
from supervisor.store.connection import BY_KEY, Connector, Health, Link
from supervisor.store.dispatch import Dispatch
from supervisor.store.listen import Ear
from supervisor.store.logs import Logs
from supervisor.store.place import Place
from supervisor.store.sessions import Sessions
from supervisor.store.users import Users


class PgStore(Sessions, Dispatch, Logs, Users):
    """Use as ``async with``. ``dsn``: any that libpq takes; ``listen_dsn``: the one for wake-ups, where ``dsn`` leads
    to a pooler. Timeouts in seconds, ``statement_timeout`` for each call.

    Raises InvalidInput for a DSN that can't be read.
    """

    def __init__(
        self,
        dsn: str,
        *,
        listen_dsn: str | None = None,
        application_name: str = "bsup",
        connect_timeout: float = 5.0,
        statement_timeout: float = 10.0,
        check_listen_every: float = 10.0,
    ) -> None:
        self._health = Health()
        connector, listener = (
            Connector(
                one,
                application_name=application_name,
                connect_timeout=connect_timeout,
                statement_timeout=statement_timeout,
            )
            for one in (dsn, listen_dsn or dsn)
        )
        self._renewal = Link(connector, self._health, 1, BY_KEY)
        self._dispatch = Link(connector, self._health, 2, BY_KEY)
        self._place, self._kinds = Place(), {}
        self._upkeep = Link(connector, self._health, 1, BY_KEY)
        self._logs = Link(connector, self._health, 1, BY_KEY)
        self._users = Link(connector, self._health, 3)
        self._ear = Ear(listener, self._health, check_listen_every, is_meant=listen_dsn is not None)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for link in (self._renewal, self._dispatch, self._upkeep, self._logs, self._users):
            self._stack.push_async_callback(link.close)
        tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.callback(tasks.cancel_scope.cancel)
        tasks.start_soon(self._ear.run, name="listen")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        # Not with the error: the task group would wrap it in a group, and it has nothing to do with the store.
        await self._stack.aclose()
        return None

    def health(self) -> StoreHealth:
        return self._health.snapshot()

    def on_wake(self, tell: Callable[[str], None]) -> Callable[[], None]:
        """``tell`` is called with 'ready' or 'stop' on the event loop; returns what ends it."""
        return self._ear.on_wake(tell)


def _is_a_store(store: PgStore) -> Store:
    """For the type checker: PgStore keeps every promise of the port."""
    return store
