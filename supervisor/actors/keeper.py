"""The keeper: holds this host's session. It gains one, renews it, publishes the fence, and beats the heart.

Order of a take-up: the intent on disk, the swap in the database, the result on disk, the fence, and only then is the
dispatcher told to reconcile and claim. Of a new session: first every process of the one before has ended (the
dispatcher says so), because the fence is one for the whole host, and a new one would keep alive what the old one was to
end.

The fence is counted from *before* a renewal was sent, on this host's boot-time clock; only a renewal that succeeded
moves it. "The query failed" never means "the lease is gone": only ``SessionRefused`` does, or a fence that passed ends
the work.

May import the seams and model. The root starts it and restarts it; a new one takes the session up again from disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from random import Random
from typing import Any, assert_never

import msgspec

from supervisor.mailbox import Ask, Lane, Mailbox
from supervisor.messages import (
    AskCloseSession,
    AskLastRenewal,
    AskStatus,
    Beat,
    DispatcherMessage,
    DispatcherUp,
    Draining,
    FencePassed,
    KeeperMessage,
    Refused,
    Renewed,
    SessionGone,
    SessionOpened,
    Status,
    StopOrders,
    Woken,
    WorkEnded,
)
from supervisor.model.errors import BsupError, SessionRefused, StoreUnavailable
from supervisor.model.job import HostInfo, Me
from supervisor.model.policies import fence_time, jittered, patience
from supervisor.ports import Fence, Renewal, SavedSession, SessionFile, SessionGrant, Store

log = logging.getLogger("supervisor.keeper")


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds: how often is renewed, how long a lease lives by the database's clock, and what is left for the
    killing."""

    renew: float
    term: float
    margin: float


class Keeper:
    """``host`` is asked anew at each take-up, as a reload may change labels and slots."""

    def __init__(
        self,
        mailbox: Mailbox[KeeperMessage],
        *,
        store: Store,
        file: SessionFile,
        fence: Fence,
        dispatcher: Mailbox[DispatcherMessage],
        host: Callable[[], HostInfo],
        terms: Terms,
        rng: Random,
    ) -> None:
        self.mailbox = mailbox
        self._store = store
        self._file = file
        self._fence = fence
        self._dispatcher = dispatcher
        self._host = host
        self._terms = terms
        self._rng = rng
        self._me: Me | None = None
        self._fence_at: float | None = None
        self._fence_timer: asyncio.TimerHandle | None = None
        self._fence_told = False
        self._renewed_at: float | None = None
        self._trouble: str | None = None
        self._draining = False
        self._closed = False
        self._work_ended = asyncio.Event()
        self._again = asyncio.Event()
        """The session must be taken up anew: it was refused, or a dispatcher began that knows nothing."""
        self._lost = False

    async def run(self) -> None:
        """Until canceled; the session stays as it is in the database."""
        forget = self._store.on_wake(self._on_wake)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._hold_sessions())
                tasks.create_task(self._beat())
                async for item in self.mailbox:
                    if isinstance(item, Ask):
                        tasks.create_task(self._answer(item))
                    else:
                        self._handle(item, tasks)
        finally:
            forget()
            if self._fence_timer is not None:
                self._fence_timer.cancel()

    def _on_wake(self, payload: str) -> None:
        if payload == "stop":
            self.mailbox.tell(Woken(payload))

    def _handle(self, message: KeeperMessage, tasks: asyncio.TaskGroup) -> None:
        match message:
            case Woken():
                tasks.create_task(self._fetch_stops())
            case DispatcherUp():
                if self._me is not None:
                    self._again.set()
            case WorkEnded():
                self._work_ended.set()
            case Refused(me):
                if me == self._me:
                    self._lost = True
                    self._again.set()
            case Draining(on):
                self._draining = on
                # Other hosts' users see it now, not at the next turn.
                tasks.create_task(self._renew_once())
            case _:
                assert_never(message)

    async def _answer(self, ask: Ask[Any]) -> None:
        match ask.request:
            case AskStatus():
                ask.answer(self._status())
            case AskLastRenewal():
                self._closed = True
                ask.answer(await self._renew_once())
            case AskCloseSession():
                self._closed = True
                ask.answer(await self._close_session())
            case _:
                ask.fail(BsupError(f"the keeper does not answer {type(ask.request).__name__}"))

    # --- gaining a session ------------------------------------------------------------------------------------

    async def _hold_sessions(self) -> None:
        while True:
            self._again.clear()
            await self._until_store_answers(self._gain)
            await self._hold()

    async def _until_store_answers(self, work: Callable[[], Any]) -> None:
        tries = 0
        while True:
            try:
                await work()
                self._trouble = None
                return
            except (BsupError, OSError) as error:
                tries += 1
                self._trouble = str(error)
                if tries == 1:
                    log.warning("no session yet, trying again: %s", error)
                await asyncio.sleep(patience(tries, self._rng))

    async def _gain(self) -> None:
        """Takes the session on disk up again, or begins a new one, publishes the fence, tells the dispatcher."""
        self._me = None
        saved = None if self._lost else await self._file.load()
        sent = self._fence.now()
        boot_epoch = 0
        grant = None if saved is None else await self._resume(saved)
        if grant is None:
            await self._end_work()
            sent = self._fence.now()
            grant = await self._store.open_session(self._host(), self._terms.term)
            log.info("session %s begun", grant.me.session)
        else:
            log.info("session %s taken up again", grant.me.session)
            if saved is not None:
                # On disk, as a daemon may die before it has ended what the boot before left.
                boot_epoch = saved.boot_epoch if saved.same_boot else grant.me.epoch
        await self._file.save(grant.me, boot_epoch=boot_epoch)
        self._lost = False
        await self._publish_fence(sent, grant.expires_in)
        self._me = grant.me
        self._dispatcher.tell(SessionOpened(grant.me, boot_epoch), Lane.CONTROL)

    async def _resume(self, saved: SavedSession) -> SessionGrant | None:
        """The swap. Its new incarnation is on disk before the call, so one whose answer was lost is told from one that
        failed: it is tried again as it was, and if the database knows the old incarnation no more, from the new one
        on."""
        following = saved.next_incarnation or secrets.token_hex(16)
        grant = await self._swap(saved, saved.incarnation, following)
        if grant is None and saved.next_incarnation is not None:
            grant = await self._swap(saved, saved.next_incarnation, secrets.token_hex(16))
        return grant

    async def _swap(self, saved: SavedSession, current: str, following: str) -> SessionGrant | None:
        me = Me(session=saved.session, incarnation=current, epoch=saved.epoch)
        await self._file.save(me, next_incarnation=following, boot_epoch=saved.boot_epoch)
        return await self._store.resume_session(saved.session, current, self._host(), self._terms.term, following)

    async def _end_work(self) -> None:
        """Nothing of a session before may run when a new one's fence is written."""
        self._work_ended.clear()
        self._dispatcher.tell(SessionGone(), Lane.CONTROL)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._terms.renew):
                    await self._work_ended.wait()
                    return
            # The dispatcher may have been restarted meanwhile, and then does not know that it was asked.
            self._dispatcher.tell(SessionGone(), Lane.CONTROL)

    # --- holding it -------------------------------------------------------------------------------------------

    async def _hold(self) -> None:
        """Renews until the session must be gained anew."""
        tries = 0
        wait = jittered(self._terms.renew, self._rng, spread=0.1)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._again.wait()
                    if not self._closed:
                        return
                    # The daemon is about to end: a session that is begun now would be left behind.
                    self._again.clear()
            if self._closed:
                wait = self._terms.renew
                continue
            if await self._renew_once():
                tries = 0
                wait = jittered(self._terms.renew, self._rng, spread=0.1)
            else:
                tries += 1
                wait = patience(tries, self._rng, cap=max(0.5, self._terms.renew / 2))

    async def _renew_once(self) -> bool:
        me = self._me
        if me is None:
            return False
        sent, sent_loop = self._fence.now(), asyncio.get_running_loop().time()
        try:
            # A call that hangs must not outlast the terms; one given up on may have succeeded, which harms nobody.
            async with asyncio.timeout(max(self._terms.renew, 1.0)):
                renewal = await self._store.renew(me, self._terms.term, self._draining)
        except (StoreUnavailable, TimeoutError) as error:
            if self._trouble is None:
                log.warning("the lease could not be renewed, trying again: %s", str(error) or "no answer")
            self._trouble = str(error) or "no answer"
            return False
        except SessionRefused:
            if self._closed:
                return False
            log.error("session %s is gone: all its work is ended", me.session)
            if self._me == me:
                self._lost = True
                self._again.set()
            return False
        if self._me != me:
            return False
        try:
            await self._publish_fence(sent, self._terms.term)
        except BsupError as error:
            # A full disk, say. Jobs end at the fence that is there, unless a later renewal can be published.
            if self._trouble is None:
                log.warning("the fence could not be written, trying again: %s", error)
            self._trouble = str(error)
            return False
        self._trouble = None
        self._tell_renewal(me, renewal, sent_loop)
        return True

    def _tell_renewal(self, me: Me, renewal: Renewal, sent: float) -> None:
        self._dispatcher.tell(Renewed(me, renewal.count, renewal.checksum, sent), Lane.CONTROL)
        if renewal.stops:
            self._dispatcher.tell(StopOrders(tuple(renewal.stops)), Lane.CONTROL)

    async def _fetch_stops(self) -> None:
        """A wake-up said that somebody asked for a stop; the next renewal brings it in any case."""
        me = self._me
        if me is None:
            return
        try:
            orders = await self._store.stop_orders(me)
        except BsupError as error:
            log.info("stop orders could not be fetched, the next renewal brings them: %s", error)
            return
        if orders:
            self._dispatcher.tell(StopOrders(tuple(orders)), Lane.CONTROL)

    async def _close_session(self) -> bool:
        me = self._me
        if me is None:
            return False
        try:
            async with asyncio.timeout(max(self._terms.renew, 1.0)):
                await self._store.close_session(me)
        except (BsupError, TimeoutError) as error:
            log.warning("the session could not be closed, it expires: %s", error)
            return False
        return True

    # --- fence and heartbeat ----------------------------------------------------------------------------------

    async def _publish_fence(self, sent: float, term: float) -> None:
        fence_at = fence_time(sent, term, self._terms.margin)
        if self._fence_at is not None and fence_at < self._fence_at:
            # Answers of two renewals crossed: the later fence was earned by the later one.
            return
        await self._fence.write(fence_at)
        self._fence_at = fence_at
        self._fence_told = False
        self._renewed_at = sent
        self._watch_fence()

    def _watch_fence(self) -> None:
        """Looks again when the fence may have passed: the loop's clock stands still in a suspend, the boot-time clock
        doesn't."""
        if self._fence_timer is not None:
            self._fence_timer.cancel()
        if self._fence_at is None or self._fence_told:
            return
        left = self._fence_at - self._fence.now()
        if left <= 0:
            self._fence_told = True
            log.error("the fence has passed: the lease could not be renewed in time, running jobs are ended")
            self._dispatcher.tell(FencePassed(), Lane.CONTROL)
            return
        loop = asyncio.get_running_loop()
        self._fence_timer = loop.call_later(min(left, self._terms.renew), self._watch_fence)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._terms.renew)
            self._dispatcher.tell(Beat(), Lane.CONTROL)

    def _status(self) -> Status:
        now = self._fence.now()
        left = None if self._fence_at is None else self._fence_at - now
        facts: dict[str, Any] = {
            "session": None if self._me is None else self._me.session,
            "epoch": None if self._me is None else self._me.epoch,
            "renewed_ago": None if self._renewed_at is None else round(now - self._renewed_at, 3),
            "fence_in": None if left is None else round(left, 3),
            "draining": self._draining,
        }
        problems = []
        if self._me is None:
            cause = f": {self._trouble}" if self._trouble else ""
            problems.append(f"this host has no session in the database, it takes no jobs{cause}")
        elif self._trouble is not None and left is not None:
            when = f"running jobs go on for {left:.0f} s more" if left > 0 else "running jobs were ended at the fence"
            problems.append(f"the lease could not be renewed ({self._trouble}): {when}")
        return Status(facts=facts, problems=problems)
