"""What the dispatcher has to tell the store, in batches: ends of attempts, superseded ones, progress. Nothing is lost
by an outage.

- An end is sent until the store says what became of it: a repeat of one that was recorded answers so, which resolves an
  answer that was lost.
- One bad end can't hold up the others: a batch that the store can't digest is sent one by one, then without its
  details.
- Progress is coalesced (the latest of each step) and may be late; it is never sent twice while nothing changed.

Part of the dispatcher, which alone calls it. May import the seams and model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from random import Random
from typing import Any

import msgspec

from supervisor import failpoints
from supervisor.model.errors import BsupError, SessionRefused, StoreUnavailable
from supervisor.model.job import AttemptEnd, LeaseId, Me, StepRecord
from supervisor.model.policies import patience
from supervisor.ports import DispatchStore, Verdict

log = logging.getLogger("supervisor.dispatcher")

BATCH = 500
PROGRESS_EVERY = 0.25


class Outbox:
    """``on_verdict`` gets what became of each end (superseded ones: recorded), ``on_refused`` a session that was
    refused."""

    def __init__(
        self,
        store: DispatchStore,
        *,
        on_verdict: Callable[[Verdict], None],
        on_refused: Callable[[Me], None],
        rng: Random,
    ) -> None:
        self._store = store
        self._on_verdict = on_verdict
        self._on_refused = on_refused
        self._rng = rng
        self._me: Me | None = None
        self._ends: dict[LeaseId, AttemptEnd] = {}
        self._superseded: dict[LeaseId, AttemptEnd] = {}
        self._progress: dict[LeaseId, dict[int, StepRecord]] = {}
        self._work = {name: asyncio.Event() for name in ("ends", "superseded", "progress")}
        self._failing = False
        self.last_answer = 0.0
        """The loop's time when the last finish was answered."""

    @property
    def is_empty(self) -> bool:
        return not self._ends and not self._superseded

    @property
    def is_sending(self) -> bool:
        """Ends are on their way: what the database holds may change at any moment."""
        return bool(self._ends)

    def unanswered(self) -> set[LeaseId]:
        """Leases whose end was handed in and not answered: they may be in the database or not."""
        return set(self._ends)

    @property
    def is_waiting(self) -> bool:
        """Ends are held back because the store does not take them."""
        return bool(self._ends) and (self._failing or self._me is None)

    @property
    def depth(self) -> int:
        return len(self._ends) + len(self._superseded)

    def set_session(self, me: Me | None) -> None:
        """Ends of another session than ``me``'s can't be recorded any more: their holders hear of it and hand them in
        again."""
        self._me = me
        for lease in [lease for lease in self._ends if me is None or lease.session != me.session]:
            del self._ends[lease]
        for lease in [lease for lease in self._progress if me is None or lease.session != me.session]:
            del self._progress[lease]
        self._work["ends"].set()
        self._work["progress"].set()

    def finish(self, end: AttemptEnd) -> None:
        self._ends[end.lease] = end
        # The end tells every step: a late progress would only contradict it.
        self._progress.pop(end.lease, None)
        self._work["ends"].set()

    def supersede(self, end: AttemptEnd) -> None:
        self._ends.pop(end.lease, None)
        self._superseded[end.lease] = end
        self._progress.pop(end.lease, None)
        self._work["superseded"].set()

    def progress(self, lease: LeaseId, steps: Sequence[StepRecord]) -> None:
        if self._me is not None and lease.session == self._me.session and lease not in self._ends:
            self._progress.setdefault(lease, {}).update({step.index: step for step in steps})
            self._work["progress"].set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_ends())
            tasks.create_task(self._send_superseded())
            tasks.create_task(self._send_progress())

    # --- ends -------------------------------------------------------------------------------------------------

    async def _send_ends(self) -> None:
        tries = 0
        while True:
            await self._work["ends"].wait()
            self._work["ends"].clear()
            while self._ends and (me := self._me) is not None:
                batch = dict(islice(self._ends.items(), BATCH))
                try:
                    verdicts, stuck = await self._finish(me, batch)
                except StoreUnavailable as error:
                    tries += 1
                    if not self._failing:
                        log.warning("ends of jobs can't be recorded now, they are kept: %s", error)
                    self._failing = True
                    await asyncio.sleep(patience(tries, self._rng))
                    continue
                except SessionRefused:
                    if self._me == me:
                        self._on_refused(me)
                        break
                    continue
                if failpoints.ARMED:
                    failpoints.hit("recorded")
                self._failing = False
                self.last_answer = asyncio.get_running_loop().time()
                for verdict in verdicts:
                    # Unless it was handed in anew meanwhile: then that one's verdict counts.
                    if self._ends.get(verdict.lease) is batch.get(verdict.lease):
                        del self._ends[verdict.lease]
                        self._on_verdict(verdict)
                tries = tries + 1 if stuck else 0
                if stuck:
                    await asyncio.sleep(patience(tries, self._rng))

    async def _finish(self, me: Me, batch: Mapping[LeaseId, AttemptEnd]) -> tuple[list[Verdict], bool]:
        """The verdicts, and whether an end is left that the store does not take in any form."""
        try:
            return await self._store.finish(me, list(batch.values())), False
        except (StoreUnavailable, SessionRefused):
            raise
        except Exception:
            log.exception("a batch of %s ends was not digested, trying one by one", len(batch))
        verdicts: list[Verdict] = []
        for end in batch.values():
            verdicts += await self._finish_one(me, end)
        return verdicts, len(verdicts) < len(batch)

    async def _finish_one(self, me: Me, end: AttemptEnd) -> list[Verdict]:
        for attempt in (end, _bare(end)):
            try:
                return await self._store.finish(me, [attempt])
            except (StoreUnavailable, SessionRefused):
                raise
            except Exception:
                log.exception("the end of job %s was not digested", end.job)
        return []

    # --- superseded -------------------------------------------------------------------------------------------

    async def _send_superseded(self) -> None:
        tries = 0
        while True:
            await self._work["superseded"].wait()
            self._work["superseded"].clear()
            while self._superseded:
                batch = dict(islice(self._superseded.items(), BATCH))
                try:
                    await self._store.supersede(list(batch.values()))
                except StoreUnavailable:
                    tries += 1
                    await asyncio.sleep(patience(tries, self._rng))
                    continue
                except Exception:
                    # Kept for people, not for correctness: the holder after this one tells the job's end.
                    log.exception("%s superseded attempts could not be kept", len(batch))
                tries = 0
                for lease, end in batch.items():
                    if self._superseded.get(lease) is end:
                        del self._superseded[lease]
                        self._on_verdict(Verdict(lease=lease, recorded=True, state="superseded"))

    # --- progress ---------------------------------------------------------------------------------------------

    async def _send_progress(self) -> None:
        tries = 0
        while True:
            await self._work["progress"].wait()
            await asyncio.sleep(PROGRESS_EVERY if tries == 0 else patience(tries, self._rng))
            self._work["progress"].clear()
            if not self._progress or (me := self._me) is None:
                continue
            batch, self._progress = self._progress, {}
            try:
                await self._store.record_steps(
                    me, [(lease, step) for lease, steps in batch.items() for step in steps.values()]
                )
            except SessionRefused:
                if self._me == me:
                    self._on_refused(me)
            except BsupError:
                tries += 1
                for lease, steps in batch.items():
                    if lease not in self._ends:
                        self._progress[lease] = {**steps, **self._progress.get(lease, {})}
                self._work["progress"].set()
            except Exception:
                log.exception("the progress of %s steps was not digested", len(batch))
            else:
                tries = 0


def _bare(end: AttemptEnd) -> AttemptEnd:
    """An end without all that a user or a job wrote into it."""
    changes: dict[str, Any] = {"error": "the details of this end could not be recorded", "steps": []}
    return msgspec.structs.replace(end, **changes)
