"""The dispatcher's comparing of host and database: looks at both, has ``adoption`` decide, and carries out what
follows.

It also ends all work when the session is gone, and says when nothing runs any more. Part of the dispatcher, which alone
calls it; shares its ledger and outbox. May import the seams and model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from random import Random

from supervisor.actors.adoption import Burial, compare, loss_of, release_of
from supervisor.actors.ledger import Ledger
from supervisor.actors.outbox import Outbox
from supervisor.messages import JobMessage, JobStart
from supervisor.model.attempt_words import LeaseGone
from supervisor.model.job import Lease, LeaseId, Me
from supervisor.model.policies import patience
from supervisor.ports import Runner, SessionStore

log = logging.getLogger("supervisor.dispatcher")

SECOND_LOOK = 1.0
"""Seconds after which a lease that was missing is looked for again."""


class Reconciler:
    """``take`` starts an actor, ``tell`` tells one; ``again`` asks for another ``reconcile``; the others announce."""

    def __init__(
        self,
        store: SessionStore,
        runners: Mapping[str, Runner],
        *,
        ledger: Ledger,
        outbox: Outbox,
        take: Callable[[Lease, JobStart], object],
        tell: Callable[[LeaseId, JobMessage], None],
        again: Callable[[], None],
        on_reconciled: Callable[[], None],
        on_work_ended: Callable[[], None],
        on_buried: Callable[[], None],
        rng: Random,
    ) -> None:
        self._store = store
        self._runners = runners
        self._ledger = ledger
        self._outbox = outbox
        self._take = take
        self._tell = tell
        self._again = again
        self._on_reconciled = on_reconciled
        self._on_work_ended = on_work_ended
        self._on_buried = on_buried
        self._rng = rng
        self._tasks: asyncio.TaskGroup | None = None
        self._burials: dict[LeaseId, Burial] = {}
        self._kept: dict[LeaseId, asyncio.Event] = {}
        self._me: Me | None = None
        self._boot_epoch = 0
        self._ending = False
        self._listed = False
        self.is_reconciled = False

    @property
    def burials(self) -> int:
        return len(self._burials)

    @property
    def is_killing(self) -> bool:
        return any(burial.alive for burial in self._burials.values())

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """``tasks`` owns the burials."""
        self._tasks = tasks

    def set_session(self, me: Me, boot_epoch: int) -> None:
        self._me = me
        self._boot_epoch = boot_epoch
        self._ending = self._listed = False
        self.is_reconciled = False

    def on_verdict(self, lease: LeaseId) -> None:
        kept = self._kept.pop(lease, None)
        if kept is not None:
            kept.set()

    # --- comparing --------------------------------------------------------------------------------------------

    async def reconcile(self, me: Me) -> None:
        """Called by the claimer, so no claim is under way. Raises what the store raises."""
        before, ending = self._known(), self._outbox.unanswered()
        handles = await self._handles()
        rows = await self._store.leases(me)
        if self._me != me:
            return
        handles |= self._gone(rows, me)
        found = compare(
            rows=rows,
            handles=handles.keys(),
            before=before,
            after=self._known(),
            expected={
                held.lease.id
                for held in self._ledger
                if held.in_database and held.lease.id in before and held.lease.id.session == me.session
            },
            ending=ending | self._outbox.unanswered(),
        )
        for lease in found.adopt:
            self._take(lease, JobStart(adopt=True, rebooted=lease.id.epoch < self._boot_epoch))
        for lease in found.release:
            # What is not on disk any more after a power cut may have run.
            is_lost = lease.id.epoch < self._boot_epoch
            self._outbox.finish(loss_of(lease) if is_lost else release_of(lease))
        for orphan in found.orphans:
            self._bury(orphan, handles[orphan])
        self._mark_missing(found.missing)
        if not found.is_clean:
            log.info(
                "reconciled: %s taken up, %s released, %s missing, %s orphans",
                len(found.adopt),
                len(found.release),
                len(found.missing),
                len(found.orphans),
            )
        if not self.is_reconciled:
            self.is_reconciled = True
            self._on_reconciled()

    def _gone(self, rows: Sequence[Lease], me: Me) -> dict[LeaseId, Runner]:
        """Leases of a daemon before this one whose jobs ended with it: nothing is on disk, and they may have begun."""
        return {
            row.id: runner
            for row in rows
            if row.id.epoch < me.epoch and (runner := self._runners.get(row.kind)) is not None and not runner.survives
        }

    def _known(self) -> set[LeaseId]:
        return self._ledger.ids() | self._burials.keys() | self._outbox.unanswered()

    def _mark_missing(self, missing: frozenset[LeaseId]) -> None:
        for held in self._ledger:
            if held.lease.id not in missing:
                held.suspect = False
            elif held.suspect:
                log.error("the lease of job %s is gone: its work is ended", held.lease.job)
                held.in_database = False
                self._tell(held.lease.id, LeaseGone())
            else:
                held.suspect = True
                asyncio.get_running_loop().call_later(SECOND_LOOK, self._again)

    async def _handles(self) -> dict[LeaseId, Runner]:
        found: dict[LeaseId, Runner] = {}
        for runner in {id(runner): runner for runner in self._runners.values()}.values():
            for lease in await runner.handles():
                found[lease] = runner
        return found

    # --- ending -----------------------------------------------------------------------------------------------

    def end_all_work(self) -> None:
        """The session is gone. The actors were told; what has a handle and no actor is killed too."""
        self.is_reconciled = False
        self._me = None
        if not self._ending:
            self._ending = True
            self._listed = False
            self._owner().create_task(self._end_handles())

    def check_work_ended(self) -> None:
        """To be called whenever something may have ended."""
        if self._ending and self._listed and not self._ledger.alive() and not self.is_killing:
            self._ending = self._listed = False
            self._on_work_ended()

    async def _end_handles(self) -> None:
        tries = 0
        while self._ending:
            try:
                handles = await self._handles()
            except Exception as error:
                tries += 1
                log.warning("what is on disk can't be listed: %s", error)
                await asyncio.sleep(patience(tries, self._rng))
                continue
            for lease, runner in handles.items():
                self._bury(lease, runner)
            self._listed = True
            self.check_work_ended()
            return

    def _bury(self, lease: LeaseId, runner: Runner) -> None:
        if lease not in self._burials and lease not in self._ledger:
            burial = self._burials[lease] = Burial(lease, runner, self._rng)
            self._owner().create_task(self._carry_out(burial))

    async def _carry_out(self, burial: Burial) -> None:
        try:
            end = await burial.kill()
            self.check_work_ended()
            if end is not None:
                kept = self._kept[burial.lease] = asyncio.Event()
                self._outbox.supersede(end)
                await kept.wait()
            await burial.remove()
        except Exception:
            # What is left stays on disk, and is an orphan again at the next reconciliation.
            log.exception("the remains of lease %s could not be dealt with", burial.lease)
        finally:
            burial.alive = False
            del self._burials[burial.lease]
            self.check_work_ended()
            self._on_buried()

    def _owner(self) -> asyncio.TaskGroup:
        if self._tasks is None:
            raise RuntimeError("the reconciler does not run")
        return self._tasks
