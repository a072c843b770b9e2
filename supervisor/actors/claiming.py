"""How the dispatcher takes leases: what this host can serve, the idle protocol, and claims whose answer was lost.

- Claims run one at a time, and never while the host reconciles.
- Before it sleeps, a host says it is idle (so that a commit wakes it) and claims once more: a job that was made ready
  between the empty claim and that word would be seen by nobody else. A jittered poll makes sure when no wake-up comes
  at all. A transaction that was under way at that word wakes nobody either: a host that hears wake-ups polls for
  those at first, and ever more seldom, as they have been open that long.
- Counters are used up by every claim that was sent, whatever came back, so no lease id is ever made twice. A claim
  whose outcome is unknown makes the host reconcile before the next one: a lease it got is found there.

Part of the dispatcher, which alone calls it. May import the seams and model.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from supervisor.model.errors import BsupError, SessionRefused, StoreUnavailable
from supervisor.model.job import Lease, Me
from supervisor.model.policies import Free, jittered, less, patience, serves
from supervisor.ports import DispatchStore, Room

log = logging.getLogger("supervisor.dispatcher")

MOST_AT_ONCE = 500
"""Leases of one claim."""

GATHERED_ABOVE = 128
"""Slots of a host that gathers room: with more jobs ready than fit, many small claims cost far more than a few large
ones. A quarter of the slots is waited for, but not longer than ``GATHER`` seconds."""
GATHER = 0.005
GATHER_LOOKS = 5

OVERDUE = 2
"""Polls without a rest after which new needs are looked for in any case. An idle host does so at each poll."""

CALM = 5.0
"""Polls between two looks of a host that is idle for long and hears wake-ups."""
HASTE = 0.25
"""The share of the time since it is idle after which such a host looks again."""

HOPS = 2
"""Turns of the loop from a lease to the first line of a handler."""

TURN = 64
"""Jobs that are begun before the rest of the loop has its turn."""


class Claimer:
    """``free``: the room now; ``take``: a new lease; ``reconcile``: raises what the store raises; ``on_refused``: a
    session is gone; ``on_paused``: no claim is under way, and none will be while it is paused; ``hears``: wake-ups
    come; ``lacking``: why the host can't take any job now, whatever room ``free`` says there is."""

    def __init__(
        self,
        store: DispatchStore,
        *,
        kinds: frozenset[str],
        labels: frozenset[str],
        slots: int,
        poll: float,
        free: Callable[[], Free],
        take: Callable[[Lease], None],
        reconcile: Callable[[Me], Awaitable[None]],
        on_refused: Callable[[Me], None],
        on_paused: Callable[[], None],
        rng: Random,
        hears: Callable[[], bool] = lambda: False,
        lacking: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._store = store
        self._on_paused = on_paused
        self._kinds = kinds
        self._labels = labels
        self._slots = slots
        self._poll = poll
        self._free = free
        self._take = take
        self._reconcile = reconcile
        self._on_refused = on_refused
        self._rng = rng
        self._me: Me | None = None
        self._next = 1
        self._needs: tuple[int, ...] = ()
        self._last_need = 0
        self._needs_stale = True
        self._needs_read = -math.inf
        self._idle = False
        self._hears = hears
        self._look = lacking
        self.lacking: str | None = None
        """What the host is short of, as of the last turn: it takes nothing, and looks again at each poll."""
        self._idle_since = 0.0
        self._rested = -math.inf
        """When it last waited with nothing to do."""
        self._must_reconcile = False
        self._has_more = False
        """The last claim was filled: there is more than this host had room for."""
        self._changed = asyncio.Event()
        self.paused = False
        self.fenced = False
        """The fence has passed and no renewal came since: what is claimed could not be started."""
        self.in_flight = False
        self.last_answer = 0.0
        """The loop's time when the last claim was answered."""

    @property
    def needs(self) -> int:
        return len(self._needs)

    def set_session(self, me: Me | None) -> None:
        """``me.epoch`` is new, so counters begin again; a new session claims only after it was reconciled."""
        self._me = me
        self._next = 1
        self._idle = False
        self._must_reconcile = me is not None
        self.wake()

    def reconfigure(self, *, labels: frozenset[str], slots: int, poll: float) -> None:
        self._labels = labels
        self._slots = slots
        self._poll = poll
        self._needs = ()
        self._last_need = 0
        self.wake(ready=True)

    def want_reconciliation(self) -> None:
        self._must_reconcile = True
        self._changed.set()

    def wake(self, *, ready: bool = False) -> None:
        """Something changed: room was freed, a pause is over; ``ready``: a job was made ready, perhaps with a new
        need."""
        self._needs_stale |= ready
        self._changed.set()

    async def run(self) -> None:
        tries = 0
        while True:
            self._changed.clear()
            me = self._me
            try:
                again = False if me is None else await self._round(me)
                tries = 0
            except StoreUnavailable as error:
                tries += 1
                if tries == 1:
                    log.warning("no leases are taken: %s", error)
                await asyncio.sleep(patience(tries, self._rng))
                continue
            except SessionRefused:
                if me is not None and self._me == me:
                    self._me = None
                    self._on_refused(me)
                continue
            except BsupError as error:
                tries += 1
                log.error("no leases are taken: %s", error)
                await asyncio.sleep(patience(tries, self._rng, cap=30.0))
                continue
            if not again:
                await self._rest()

    async def _rest(self) -> None:
        try:
            async with asyncio.timeout(jittered(self._pause(), self._rng)):
                await self._changed.wait()
        except TimeoutError:
            self._needs_stale = True
        if self._idle:
            self._rested = asyncio.get_running_loop().time()

    def _pause(self) -> float:
        if not (self._idle and self._hears()):
            return self._poll
        idle_for = asyncio.get_running_loop().time() - self._idle_since
        return min(CALM * self._poll, max(self._poll, HASTE * idle_for))

    async def _round(self, me: Me) -> bool:
        """One turn; True: take another at once."""
        if self._must_reconcile:
            self._must_reconcile = False
            try:
                await self._reconcile(me)
            except BaseException:
                self._must_reconcile = True
                raise
            return True
        if self.fenced:
            return False
        free = self._free()
        if self.paused:
            self._on_paused()
        self._look_for_room()
        if self.paused or self.lacking is not None or free.slots == 0:
            await self._say_idle(me, False)
            return False
        if self._has_more and self._slots > GATHERED_ABOVE and free.slots < self._slots // 4:
            self._has_more = False
            for _ in range(GATHER_LOOKS):
                await asyncio.sleep(GATHER / GATHER_LOOKS)
                if self._free().slots >= self._slots // 4:
                    break
            return True
        # First what is known: between a wake-up and the claim there is no other statement. But a backlog of that must
        # not keep a job with a new need, whatever its priority, from being seen.
        if self._are_needs_overdue:
            await self._refresh_needs()
        if self._needs and await self._claim(me, free):
            # What was begun comes first, before the next statement is made.
            for _ in range(HOPS):
                await asyncio.sleep(0)
            if self._has_more or not self._idle:
                return True
            # It got all there was, and who commits a job after that wakes this host.
        if self._needs_stale and await self._refresh_needs():
            return True
        if self._idle:
            return False
        await self._say_idle(me, True)
        self._needs_stale = True
        return True

    def _look_for_room(self) -> None:
        before, self.lacking = self.lacking, self._look()
        if before is None and self.lacking is not None:
            log.warning("no leases are taken: %s", self.lacking)
        elif before is not None and self.lacking is None:
            log.info("leases are taken again")

    async def _claim(self, me: Me, free: Free) -> int:
        """Claims what fits; while a claim is answered in full, there is room, and nothing else is to be done, the next
        one is under way already when its jobs are begun. Returns how many."""
        self.in_flight = True
        self._has_more = False
        claimed = 0
        asking: asyncio.Task[list[Lease]] | None = None
        try:
            room = self._room(free)
            leases = await self._store.claim(me, self._counters(me, room), room)
            while True:
                claimed += len(leases)
                self._has_more = len(leases) == room.slots
                free = less(self._free(), leases)
                if not self._has_more or free.slots <= self._slots // 4 or self._is_wanted_elsewhere(me):
                    break
                room = self._room(free)
                asking = asyncio.create_task(self._store.claim(me, self._counters(me, room), room))
                await self._take_all(me, leases)
                leases = await asking
                asking = None
            await self._take_all(me, leases)
        except BaseException:
            # Refused, unavailable or interrupted: what it did is seen only by looking.
            self._must_reconcile = True
            raise
        finally:
            if asking is not None:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            self.in_flight = False
            self.last_answer = asyncio.get_running_loop().time()
        if self._has_more and self._idle:
            # It works now; commits that make jobs ready need not wake it.
            await self._say_idle(me, False)
        return claimed

    def _is_wanted_elsewhere(self, me: Me) -> bool:
        return (
            self.paused
            or self.fenced
            or self._must_reconcile
            or self._idle
            or self._are_needs_overdue
            or self._me != me
            or self._look() is not None
        )

    @property
    def _are_needs_overdue(self) -> bool:
        since = max(self._needs_read, self._rested)
        return asyncio.get_running_loop().time() - since > OVERDUE * self._poll

    def _room(self, free: Free) -> Room:
        return Room(
            slots=min(free.slots, MOST_AT_ONCE),
            slots_total=self._slots,
            cpu=free.cpu,
            memory=free.memory,
            needs=self._needs,
        )

    def _counters(self, me: Me, room: Room) -> int:
        """The first of as many as there may be leases."""
        first = me.epoch << 32 | self._next
        self._next += room.slots
        return first

    async def _take_all(self, me: Me, leases: Sequence[Lease]) -> None:
        """Those of a session that is gone meanwhile are left to its reaper."""
        for number, lease in enumerate(leases):
            if number % TURN == 0:
                if number:
                    await asyncio.sleep(0)
                if self._me is None or self._me.session != me.session:
                    return
            self._take(lease)

    async def _say_idle(self, me: Me, idle: bool) -> None:
        if self._idle is not idle:
            await self._store.set_idle(me, idle)
            self._idle = idle
            self._idle_since = asyncio.get_running_loop().time()

    async def _refresh_needs(self) -> bool:
        """Whether there is one more that this host serves."""
        self._needs_stale = False
        known = len(self._needs)
        try:
            new = await self._store.needs(self._last_need)
        except BaseException:
            self._needs_stale = True
            raise
        self._needs_read = asyncio.get_running_loop().time()
        for need in new:
            self._last_need = max(self._last_need, need.id)
            if serves(self._labels, self._kinds, kind=need.kind, needed=need.labels):
                self._needs = (*self._needs, need.id)
        return len(self._needs) > known
