"""The reaper: keeps the pulse, takes the jobs of dead sessions back, readies what is due, sweeps what is old: in the
database, and on this host's disk.

Every daemon runs one and none leads: the statements skip what another has locked. What is expired or due, the
database's clock says, never this host's. Failure is patience: the next pass does what this one did not.

May import the seams and model. The root starts it and restarts it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from random import Random
from typing import Any

from supervisor.mailbox import Ask, Mailbox
from supervisor.messages import AskStatus, DispatcherMessage, ReaperMessage, Status, Woken
from supervisor.model.errors import BsupError
from supervisor.model.policies import jittered, patience
from supervisor.ports import Runner, SessionStore

log = logging.getLogger("supervisor.reaper")

BATCH = 500


class Reaper:
    """``every``: seconds between passes (the pulse too); ``retention``: seconds a finished job is kept, None: for
    ever."""

    def __init__(
        self,
        mailbox: Mailbox[ReaperMessage],
        *,
        store: SessionStore,
        dispatcher: Mailbox[DispatcherMessage],
        runners: Collection[Runner],
        term: float,
        rng: Random,
        every: float = 1.0,
        sweep_every: float = 3600.0,
        retention: float | None = None,
    ) -> None:
        self.mailbox = mailbox
        self._store = store
        self._dispatcher = dispatcher
        self._runners = runners
        self._term = term
        self._rng = rng
        self._every = every
        self._sweep_every = sweep_every
        self._retention = retention
        self._facts: dict[str, Any] = {
            "passes": 0,
            "requeued": 0,
            "failed": 0,
            "sessions": 0,
            "swept": 0,
            "reap_not_before": None,
        }

    async def run(self) -> None:
        """Until canceled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repeat("a pass of the reaper", self._pass, self._every))
            if self._retention is not None:
                tasks.create_task(self._repeat("the sweep of the database", self._sweep, self._sweep_every))
            for runner in self._runners:
                tasks.create_task(self._repeat("the sweep of this host's disk", runner.sweep, self._sweep_every))
            async for item in self.mailbox:
                if not isinstance(item, Ask):
                    continue
                if isinstance(item.request, AskStatus):
                    item.answer(Status(facts=dict(self._facts), problems=[]))
                else:
                    item.fail(BsupError(f"the reaper does not answer {type(item.request).__name__}"))

    async def _repeat(self, what: str, work: Callable[[], Awaitable[list[str] | None]], every: float) -> None:
        tries = 0
        while True:
            try:
                for sentence in await work() or ():
                    log.info("%s", sentence)
            except BsupError as error:
                tries += 1
                if tries == 1:
                    log.warning("%s failed, trying again: %s", what, error)
                await asyncio.sleep(patience(tries, self._rng, base=1.0, cap=max(5.0, every)))
            else:
                tries = 0
                await asyncio.sleep(jittered(every, self._rng))

    async def _pass(self) -> None:
        """The pulse, and only where that finds something to do the rest: an idle database is asked once."""
        is_due = await self._store.pulse(self._term)
        self._facts["passes"] += 1
        while is_due:
            reaped = await self._store.reap(BATCH)
            self._facts["requeued"] += reaped.requeued
            self._facts["failed"] += reaped.failed
            self._facts["sessions"] += len(reaped.sessions)
            self._facts["reap_not_before"] = reaped.reap_not_before
            if reaped.sessions:
                log.warning(
                    "sessions that ran out: %s; %s jobs re-queued, %s failed",
                    ", ".join(reaped.sessions),
                    reaped.requeued,
                    reaped.failed,
                )
            if reaped.requeued or reaped.promoted:
                self._dispatcher.tell(Woken("ready"))
            if reaped.requeued + reaped.failed < BATCH and reaped.promoted < BATCH:
                return

    async def _sweep(self) -> None:
        assert self._retention is not None
        while True:
            swept = await self._store.sweep(self._retention, BATCH)
            self._facts["swept"] += swept
            if swept < BATCH:
                return
