"""What the calls of the control socket stand on: the store, the log reader, the other actors' mailboxes, and patience.

May import ``ports``, ``messages``, ``mailbox``, ``model`` and anyio. ``app`` fills a ``Parts``; the calls use it. All
that waits here waits for a bounded time: a database that hangs must not hang the socket.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import anyio
import msgspec

from supervisor.mailbox import ActorGone
from supervisor.messages import AskRunning, RunningJob
from supervisor.model.errors import Busy, StoreUnavailable
from supervisor.ports import LogReader, Reload, StoreHealth, UserStore

T = TypeVar("T")


class Asked(Protocol):
    """What control needs of a mailbox."""

    async def ask(self, request: Any, timeout: float) -> Any: ...


class ControlStore(UserStore, Protocol):
    """What control needs of the store."""

    def health(self) -> StoreHealth: ...

    def on_wake(self, tell: Callable[[str], None]) -> Callable[[], None]: ...


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How often is looked, and how long is waited, in seconds.

    ``quick`` to ``calm``: between two looks at jobs that are waited for, longer while nothing changes; ``gap``: at
    least, after a wake-up. ``read``, ``read_away`` and ``write``: what the database is given for an answer
    (``read_away`` while it is known to be away); ``actor``: what an actor is given.
    """

    quick: float = 0.15
    calm: float = 0.5
    gap: float = 0.03
    read: float = 5.0
    read_away: float = 2.0
    write: float = 45.0
    actor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything control reaches.

    ``mailboxes``: core actors by name, ``dispatcher`` and ``root`` among them; looked up at each use, as an actor
    that was restarted may have a new one. ``reload``: reads the configuration again.
    """

    host: str
    store: ControlStore
    logs: LogReader
    mailboxes: Mapping[str, Asked]
    isolation: Callable[[], dict[str, str]]
    reload: Reload
    pace: Pace = field(default_factory=Pace)
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    async def ask(self, actor: str, request: Any) -> Any:
        """Raises Busy or ActorGone."""
        mailbox = self.mailboxes.get(actor)
        if mailbox is None:
            raise ActorGone(f"{actor} does not run")
        try:
            return await mailbox.ask(request, self.pace.actor)
        except TimeoutError:
            raise Busy(f"{actor} did not answer within {self.pace.actor:g} s") from None

    async def running(self) -> dict[int, RunningJob]:
        """The jobs of this host, from the dispatcher. Raises Busy or ActorGone."""
        jobs: list[RunningJob] = await self.ask("dispatcher", AskRunning())
        return {job.job: job for job in jobs}

    async def running_or_none(self) -> dict[int, RunningJob]:
        """As ``running``, where its answer only adds to what the database says."""
        try:
            return await self.running()
        except (Busy, ActorGone):
            return {}

    async def read(self, asked: Awaitable[T]) -> T:
        """Waits for the store, but not for ever. Raises StoreUnavailable."""
        return await self._within(self.pace.read if self.store.health().available else self.pace.read_away, asked)

    async def write(self, asked: Awaitable[T]) -> T:
        """As ``read``, with more patience. After StoreUnavailable the write may have been done all the same."""
        return await self._within(self.pace.write if self.store.health().available else self.pace.read, asked)

    async def _within(self, seconds: float, asked: Awaitable[T]) -> T:
        try:
            with anyio.fail_after(seconds):
                return await asked
        except TimeoutError:
            raise StoreUnavailable(f"the database did not answer within {seconds:g} s") from None


class Rhythm:
    """The pauses of one who waits for jobs to change: longer while nothing happens, cut short by a hint."""

    def __init__(self, pace: Pace, store: ControlStore) -> None:
        self._pace = pace
        self._store = store
        self._delay = pace.quick
        self._hint = anyio.Event()

    def __enter__(self) -> Rhythm:
        self._forget = self._store.on_wake(self._wake)
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()

    def _wake(self, payload: str) -> None:
        # Jobs that become ready are no news to one who waits for ends, and under load come all the time.
        if payload == "done":
            self._hint.set()

    def changed(self) -> None:
        self._delay = self._pace.quick

    async def pause(self, at_most: float | None = None) -> None:
        delay = self._delay if at_most is None else min(self._delay, max(0.0, at_most))
        with anyio.move_on_after(delay) as waited:
            await self._hint.wait()
        if not waited.cancelled_caught:
            self._hint = anyio.Event()
            await anyio.sleep(self._pace.gap if at_most is None else min(self._pace.gap, max(0.0, at_most)))
        self._delay = min(self._pace.calm, self._delay * 1.3)
