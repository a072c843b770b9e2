"""The dispatcher: owns every lease of this host and the actors of their jobs. It claims, records ends, drains,
reconciles.

Its parts, which nobody else calls: ``ledger`` (what is held), ``claiming`` (taking leases), ``outbox`` (telling the
store) and ``reconciler`` (comparing with the database). They share the one loop and the dispatcher's own task group;
the mailbox alone is how anybody else reaches it.

Order at a job's end: its log is complete → the actor tells ``JobOver`` → the outbox has it recorded → the verdict goes
to the actor → it cleans up and ends. A job's actor is never restarted: one that crashed or fell silent is followed by
another that takes the attempt up from disk only to end it.

May import the seams, model and its own parts. The root starts it and restarts it; a new one knows nothing and adopts
all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from random import Random
from typing import Any, assert_never

import msgspec

from supervisor import failpoints
from supervisor.actors.claiming import Claimer
from supervisor.actors.ledger import Held, Ledger, MakeJob, Owner
from supervisor.actors.outbox import Outbox
from supervisor.actors.reconciler import Reconciler
from supervisor.mailbox import Ask, Lane, Mailbox, MailboxStats, Turns
from supervisor.messages import (
    ActorInfo,
    AskActors,
    AskDetach,
    AskDrain,
    AskResume,
    AskRunning,
    AskStatus,
    AskStop,
    Beat,
    DispatcherMessage,
    DispatcherUp,
    Drain,
    Drained,
    Draining,
    FencePassed,
    JobAlive,
    JobMessage,
    JobMoved,
    JobOver,
    JobStart,
    KeeperMessage,
    Reconciled,
    Reconfigure,
    Refused,
    ReleaseAll,
    Renewed,
    RootMessage,
    SessionGone,
    SessionOpened,
    Status,
    StopOrders,
    Woken,
    WorkEnded,
)
from supervisor.model.attempt_words import Crashed, Fenced, LeaseGone, Recorded, Release, Stalled, StopAsked
from supervisor.model.attempt_words import Refused as EndRefused
from supervisor.model.errors import BsupError, Busy
from supervisor.model.job import Lease, LeaseId, Me
from supervisor.ports import HostRoom, Runner, Store, Verdict

log = logging.getLogger("supervisor.dispatcher")

UNCHECKED_RENEWALS = 6
"""Renewals in a row that could not be compared (claims or ends were always under way) before a full reconciliation."""

_CONTROL = Lane.CONTROL

CRASHES = 3
"""Actors of one lease that crash before it is left to the next reconciliation."""


class Dispatcher:
    """``runners`` by kind; ``stall_after``: seconds of silence after which a job's actor counts as stalled; ``paused``:
    drains from the start (a daemon that was told to end, and whose dispatcher had to be started again)."""

    def __init__(
        self,
        mailbox: Mailbox[DispatcherMessage],
        *,
        store: Store,
        runners: Mapping[str, Runner],
        make_job: MakeJob,
        keeper: Mailbox[KeeperMessage],
        root: Mailbox[RootMessage],
        host: Reconfigure,
        stall_after: float,
        rng: Random,
        room: HostRoom | None = None,
        paused: bool = False,
    ) -> None:
        self.mailbox = mailbox
        self._store = store
        self._runners = runners
        self._make_job = make_job
        self._keeper = keeper
        self._root = root
        self._host = host
        self._stall_after = stall_after
        self._rng = rng
        self._owner: Owner | None = None
        self._ledger = Ledger()
        self._me: Me | None = None
        self._unchecked = 0
        self._leaving = paused
        self._release_timer: asyncio.TimerHandle | None = None
        self._detaching: Ask[Any] | None = None
        self._outbox = Outbox(store, on_verdict=self._on_verdict, on_refused=self._on_refused, rng=rng)
        self._reconciler = Reconciler(
            store,
            runners,
            ledger=self._ledger,
            outbox=self._outbox,
            take=self._take,
            tell=self._tell,
            again=lambda: self._claimer.want_reconciliation(),
            on_reconciled=self._on_reconciled,
            on_work_ended=self._on_work_ended,
            on_buried=self._check_drained,
            rng=rng,
        )
        self._claimer = Claimer(
            store,
            kinds=frozenset(runners),
            labels=frozenset(host.labels),
            slots=host.capacity.slots,
            poll=host.poll,
            free=lambda: self._ledger.free(self._host.capacity),
            take=self._on_claimed,
            reconcile=self._reconciler.reconcile,
            on_refused=self._on_refused,
            on_paused=self._check_empty,
            hears=lambda: store.health().listening,
            lacking=lambda: None if room is None else room.lacking(),
            rng=rng,
        )
        self._claimer.paused = paused

    async def run(self) -> None:
        """Until canceled. Jobs are left as they are: on disk, with the shepherd."""
        forget = self._store.on_wake(lambda payload: self._on_wake(payload))
        try:
            async with asyncio.TaskGroup() as tasks:
                self._owner = Owner(tasks, Turns())
                self._reconciler.begin(tasks)
                tasks.create_task(self._outbox.run())
                tasks.create_task(self._claimer.run())
                self._keeper.tell(DispatcherUp(), Lane.CONTROL)
                while True:
                    item = self.mailbox.receive_nowait()
                    if item is None:
                        item = await self.mailbox.receive()
                    if isinstance(item, Ask):
                        self._answer(item)
                    else:
                        self._handle(item)
        finally:
            forget()
            for held in self._ledger:
                held.actor.abandon()
            if self._release_timer is not None:
                self._release_timer.cancel()

    def _on_wake(self, payload: str) -> None:
        if payload == "ready":
            # Full: a wake-up is waiting there already.
            self.mailbox.tell(Woken(payload))

    # --- the mailbox ------------------------------------------------------------------------------------------

    def _handle(self, message: DispatcherMessage) -> None:
        match message:
            # The first two are nearly all there is.
            case JobOver():
                self._on_over(message)
            case JobMoved():
                self._on_moved(message)
            case Woken():
                self._claimer.wake(ready=True)
            case SessionOpened(me, boot_epoch):
                self._on_session(me, boot_epoch)
            case SessionGone():
                self._on_session_gone()
            case Renewed():
                self._on_renewed(message)
            case StopOrders(orders):
                for order in orders:
                    self._tell(order.lease, self._stop_message(order.grace, order.kill, order.by))
            case FencePassed():
                self._claimer.fenced = True
                for held in self._ledger:
                    self._tell(held.lease.id, Fenced())
            case ReleaseAll(kill):
                self._release_all(kill)
            case Drain(deadline):
                self._leaving = True
                self._drain(deadline)
            case Reconfigure():
                self._host = message
                self._claimer.reconfigure(
                    labels=frozenset(message.labels), slots=message.capacity.slots, poll=message.poll
                )
            case Beat():
                self._beat()
            case JobAlive(lease):
                self._on_alive(lease)
            case _:
                assert_never(message)

    def _answer(self, ask: Ask[Any]) -> None:
        match ask.request:
            case AskRunning():
                waiting = self._outbox.is_waiting
                ask.answer([held.view(waiting_for_store=waiting) for held in self._ledger])
            case AskStop(jobs, grace, kill, by):
                wanted = set(jobs)
                found = [held for held in self._ledger if held.lease.job in wanted]
                for held in found:
                    self._tell(held.lease.id, self._stop_message(grace, kill, by))
                ask.answer([held.lease.job for held in found])
            case AskDrain(deadline):
                self._drain(deadline)
                ask.answer(None)
            case AskDetach():
                self._leaving = True
                self._claimer.paused = True
                self._detaching = ask
                for held in self._mortal():
                    self._tell(held.lease.id, Release(self._host.grace))
                self._claimer.wake()
                self._check_empty()
            case AskResume():
                if self._leaving:
                    ask.fail(Busy("the daemon is about to end: it takes no jobs any more"))
                    return
                self._stop_release_timer()
                self._claimer.paused = False
                self._claimer.wake()
                self._keeper.tell(Draining(False))
                ask.answer(None)
            case AskStatus():
                ask.answer(self._status())
            case AskActors():
                ask.answer([_info(held, held.actor.mailbox.stats()) for held in self._ledger])
            case _:
                ask.fail(BsupError(f"the dispatcher does not answer {type(ask.request).__name__}"))

    def _status(self) -> Status:
        capacity = self._host.capacity
        free = self._ledger.free(capacity)
        facts: dict[str, Any] = {
            "slots": capacity.slots,
            "free_slots": free.slots,
            "running": self._ledger.alive(),
            "ending": len(self._ledger) - self._ledger.alive(),
            "ends_waiting": self._outbox.depth,
            "draining": self._claimer.paused,
            "lacking": self._claimer.lacking,
            "reconciled": self._reconciler.is_reconciled,
            "needs_served": self._claimer.needs,
            "being_removed": self._reconciler.burials,
        }
        problems = []
        if self._outbox.is_waiting:
            problems.append(f"{self._outbox.depth} ends of jobs wait to be recorded: the database does not take them")
        if self._leaving:
            problems.append("this host is draining, then its daemon ends: it takes no new jobs")
        elif self._claimer.paused:
            problems.append("this host is draining: it takes no new jobs; `bsup resume` ends that")
        if self._claimer.lacking is not None:
            problems.append(f"this host takes no new jobs: {self._claimer.lacking}")
        if self._reconciler.is_killing:
            problems.append("processes of jobs whose lease is gone are being killed")
        return Status(facts=facts, problems=problems)

    # --- jobs -------------------------------------------------------------------------------------------------

    def _on_claimed(self, lease: Lease) -> None:
        if failpoints.ARMED:
            failpoints.hit("leased")
        self._take(lease, JobStart())
        if self._claimer.fenced:  # it passed while the claim was under way
            self._tell(lease.id, Fenced())
        elif self._detaching is not None and not self._runners[lease.kind].survives:
            self._tell(lease.id, Release(self._host.grace))

    def _take(self, lease: Lease, start: JobStart) -> Held:
        assert self._owner is not None
        held = Held(lease, self._make_job(lease, start))
        self._ledger.add(held)
        held.begun = held.actor.begin(self._owner, partial(self._on_actor_over, held))
        return held

    def _on_actor_over(self, held: Held, error: Exception | None) -> None:
        if error is None:
            self._on_job_done(held)
            return
        log.error("the actor of job %s crashed", held.lease.job, exc_info=error)
        self._follow(held, Crashed(f"{type(error).__name__}: {error}"))

    def _on_job_done(self, held: Held) -> None:
        if self._ledger.get(held.lease.id) is not held:
            return
        self._ledger.remove(held.lease.id)
        if held.in_database:
            self._claimer.want_reconciliation()
        self._claimer.wake()
        self._reconciler.check_work_ended()
        self._check_empty()

    def _follow(self, held: Held, doom: Crashed | Stalled) -> None:
        """Another actor takes the attempt up, to end it."""
        if self._ledger.get(held.lease.id) is not held:
            return
        if held.crashes >= CRASHES:
            self._on_job_done(held)
            return
        after = self._take(held.lease, JobStart(adopt=True, doom=doom))
        after.crashes = held.crashes + 1
        after.in_database = held.in_database
        if not held.in_database:
            self._tell(held.lease.id, LeaseGone())

    def _on_alive(self, lease: LeaseId) -> None:
        held = self._ledger.get(lease)
        if held is not None:
            held.heard = _now()

    def _on_moved(self, moved: JobMoved) -> None:
        held = self._ledger.get(moved.lease)
        if held is None:
            return
        held.heard = _now()
        held.moved = moved
        if moved.steps:
            self._outbox.progress(moved.lease, moved.steps)
        self._set_alive(held, moved.alive)

    def _set_alive(self, held: Held, alive: bool) -> None:
        if self._ledger.set_alive(held, alive):
            self._claimer.wake()
            self._reconciler.check_work_ended()

    def _on_over(self, over: JobOver) -> None:
        end = over.end
        held = self._ledger.get(end.lease)
        if held is None:
            return
        held.end = end
        self._set_alive(held, False)
        if over.superseded:
            held.in_database = False
            self._outbox.supersede(end)
        elif self._me is None or self._me.session != end.lease.session:
            self._tell(end.lease, LeaseGone())
        else:
            self._outbox.finish(end)

    def _on_verdict(self, verdict: Verdict) -> None:
        self._reconciler.on_verdict(verdict.lease)
        held = self._ledger.get(verdict.lease)
        if held is None:
            self._check_drained()
            return
        held.in_database = False
        held.end = None if verdict.recorded else held.end
        self._tell(verdict.lease, Recorded() if verdict.recorded else EndRefused())

    def _tell(self, lease: LeaseId, message: JobMessage) -> None:
        held = self._ledger.get(lease)
        if held is not None:
            held.actor.mailbox.tell(message, _CONTROL)

    def _stop_message(self, grace: float | None, kill: bool, by: str) -> StopAsked:
        return StopAsked(0.0 if kill else self._host.grace if grace is None else grace, kill, by)

    def _beat(self) -> None:
        now = _now()
        for held in self._ledger:
            if held.heard is None:
                held.heard = now
            silence = now - held.heard
            if silence > self._stall_after:
                log.error("the actor of job %s was silent for %.0f s: its job is ended", held.lease.job, silence)
                held.actor.abandon()
                self._follow(held, Stalled(self._host.grace))
            else:
                self._tell(held.lease.id, Beat())

    # --- draining ---------------------------------------------------------------------------------------------

    def _drain(self, deadline: float | None) -> None:
        self._claimer.paused = True
        self._claimer.wake()
        self._keeper.tell(Draining(True))
        self._stop_release_timer()
        if deadline is not None:
            loop = asyncio.get_running_loop()
            self._release_timer = loop.call_later(deadline, self.mailbox.tell, ReleaseAll(False), Lane.CONTROL)
        self._check_drained()

    def _stop_release_timer(self) -> None:
        if self._release_timer is not None:
            self._release_timer.cancel()
            self._release_timer = None

    def _release_all(self, kill: bool) -> None:
        for held in self._ledger:
            self._tell(held.lease.id, Release(0.0 if kill else self._host.grace, kill))

    def _mortal(self) -> list[Held]:
        """The jobs that end with the daemon."""
        return [held for held in self._ledger if not self._runners[held.lease.kind].survives]

    def _check_empty(self) -> None:
        if not self._claimer.paused:
            return
        if self._detaching is not None and not self._claimer.in_flight and not self._mortal():
            self._detaching.answer(None)
        self._check_drained()

    def _check_drained(self) -> None:
        if not self._claimer.paused:
            return
        busy = self._claimer.in_flight or len(self._ledger) or self._reconciler.burials or not self._outbox.is_empty
        if not busy and (self._me is None or self._reconciler.is_reconciled):
            self._root.tell(Drained(clean=self._me is not None), Lane.CONTROL)

    # --- the session ------------------------------------------------------------------------------------------

    def _on_session(self, me: Me, boot_epoch: int) -> None:
        self._me = me
        self._unchecked = 0
        self._claimer.fenced = False
        self._outbox.set_session(me)
        self._reconciler.set_session(me, boot_epoch)
        self._claimer.set_session(me)

    def _on_session_gone(self) -> None:
        self._me = None
        self._outbox.set_session(None)
        self._claimer.set_session(None)
        for held in self._ledger:
            held.in_database = False
            self._tell(held.lease.id, LeaseGone())
        self._reconciler.end_all_work()

    def _on_refused(self, me: Me) -> None:
        self._keeper.tell(Refused(me), Lane.CONTROL)

    def _on_work_ended(self) -> None:
        self._keeper.tell(WorkEnded(), Lane.CONTROL)

    def _on_reconciled(self) -> None:
        self._root.tell(Reconciled(), Lane.CONTROL)
        self._check_drained()

    def _on_renewed(self, renewed: Renewed) -> None:
        if renewed.me != self._me:
            return
        if self._claimer.fenced:
            self._claimer.fenced = False
            self._claimer.wake()
        busy = self._claimer.in_flight or self._outbox.is_sending
        if busy or max(self._claimer.last_answer, self._outbox.last_answer) >= renewed.sent:
            self._unchecked += 1
            if self._unchecked >= UNCHECKED_RENEWALS:
                self._unchecked = 0
                self._claimer.want_reconciliation()
            return
        self._unchecked = 0
        if self._ledger.sum(renewed.me.session) != (renewed.count, renewed.checksum):
            log.warning("the database counts %s leases of this host, not what is held: reconciling", renewed.count)
            self._claimer.want_reconciliation()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _info(held: Held, stats: MailboxStats) -> ActorInfo:
    return ActorInfo(
        name=f"job {held.lease.job}",
        state=held.view(waiting_for_store=False).phase.value,
        restarts=held.crashes,
        **msgspec.structs.asdict(stats),
    )
