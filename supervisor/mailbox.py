"""An actor's mailbox: two bounded lanes, told from anywhere on the loop, received by the one actor that owns it.

Rules that hold:

- The control lane overtakes the data lane, always; within a lane order is kept.
- ``tell`` never blocks and never raises: ``OK``, ``FULL`` and ``CLOSED`` are three answers, and the teller decides.
- A receiver that is canceled loses nothing: an item leaves its lane only in the step that returns it.
- ``close`` fails every unanswered ask at once, whether it still lies in a lane or was received already.

An actor receives in one of two ways: a task of its own awaits ``receive``; or ``serve`` has each item handed to a
function, in a later turn of the loop. The latter needs no task, which is what makes ten thousand actors cheap.

It stands on a deque and one future instead of anyio's memory stream or ``asyncio.Queue``: a stream hands an item to a
waiting receiver before that runs (a bare cancel then loses it), and knows no lanes. One loop, one receiver, no locks.

May import model only. Used by every actor, and by ``app`` where adapters' callbacks tell an actor.
"""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from supervisor.model.errors import BsupError, Busy

TURN = 64
"""Items that a served mailbox hands over, and mailboxes that are served, before the others have their turn."""

M = TypeVar("M")
R = TypeVar("R")


class Request(msgspec.Struct, Generic[R], frozen=True):
    """Base of messages that are asked: ``R`` is the type of the answer."""


class ActorGone(BsupError):
    """The actor ended, or was over already, before it answered."""


class Lane(enum.IntEnum):
    """CONTROL: stop, status, heartbeat, kill and every ask. DATA: all that can wait its turn."""

    CONTROL = 0
    DATA = 1


class Told(enum.Enum):
    """What became of a message. FULL and CLOSED: it was not taken, and is counted as dropped."""

    OK = "ok"
    FULL = "full"
    CLOSED = "closed"


_OK = Told.OK
_DATA = Lane.DATA


class Ask(Generic[R]):
    """A request with the way back. Whoever receives it answers or fails it, once; a late answer goes nowhere."""

    __slots__ = ("_future", "request")

    def __init__(self, request: Request[R], future: asyncio.Future[R]) -> None:
        self.request = request
        self._future = future

    @property
    def is_over(self) -> bool:
        """Answered, failed, or given up on by its asker."""
        return self._future.done()

    def answer(self, value: R) -> None:
        if not self._future.done():
            self._future.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self._future.done():
            self._future.set_exception(error)


class MailboxStats(msgspec.Struct, frozen=True):
    """``oldest``: seconds the longest-waiting item waits; ``dropped``: refused when full or closed, or left at the
    close."""

    depth_control: int
    depth_data: int
    oldest: float
    handled: int
    dropped: int


class Mailbox(Generic[M]):
    """See the module. ``control`` and ``data`` bound the lanes; ``clock`` is seconds, for ages only."""

    __slots__ = (
        "_asks",
        "_clock",
        "_closed",
        "_control",
        "_control_bound",
        "_data",
        "_data_bound",
        "_dropped",
        "_handled",
        "_is_queued",
        "_serve",
        "_turns",
        "_waiter",
        "name",
    )

    def __init__(
        self, name: str, *, control: int = 256, data: int = 1024, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._control: deque[tuple[float, M | Ask[Any]]] = deque()
        self._data: deque[tuple[float, M | Ask[Any]]] = deque()
        self._control_bound = control
        self._data_bound = data
        self._clock = clock
        self._waiter: asyncio.Future[None] | None = None
        self._serve: Callable[[M | Ask[Any]], None] | None = None
        self._turns: Turns | None = None
        self._is_queued = False
        # Made by the first ask: most mailboxes (one a job) are never asked anything.
        self._asks: _Unanswered | None = None
        self._closed = False
        self._handled = 0
        self._dropped = 0

    @property
    def is_closed(self) -> bool:
        return self._closed

    def tell(self, message: M | Ask[Any], lane: Lane = Lane.DATA) -> Told:
        """Puts a message into a lane, at once or not at all. On the loop's thread only."""
        if self._closed:
            self._dropped += 1
            return Told.CLOSED
        # Not by its truth: an enum's is slow.
        if lane is _DATA:
            queue, bound = self._data, self._data_bound
        else:
            queue, bound = self._control, self._control_bound
        if len(queue) >= bound:
            self._dropped += 1
            return Told.FULL
        queue.append((self._clock(), message))
        if self._turns is not None:
            if not self._is_queued:
                self._is_queued = True
                self._turns.queue(self)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return _OK

    async def ask(self, request: Request[R], timeout: float) -> R:
        """Asks through the control lane and waits ``timeout`` seconds for the answer.

        Raises Busy (lane full), ActorGone (closed, now or meanwhile), TimeoutError, or what the actor failed it with.
        """
        asks = self._asks
        if asks is None:
            asks = self._asks = _Unanswered(asyncio.get_running_loop())
        future: asyncio.Future[R] = asks.loop.create_future()
        ask = Ask(request, future)
        told = self.tell(ask, Lane.CONTROL)
        if told is Told.FULL:
            raise Busy(f"{self.name} has too many requests waiting")
        if told is Told.CLOSED:
            raise ActorGone(f"{self.name} has ended")
        asks.deadlines[ask] = deadline = asks.loop.time() + timeout
        if deadline < asks.alarm_at:
            asks.wake_at(deadline)
        try:
            return await future
        finally:
            del asks.deadlines[ask]

    async def receive(self) -> M | Ask[Any]:
        """The next item, control first. Raises ActorGone once the mailbox is closed. One receiver at a time."""
        while True:
            lane = self._control or self._data
            if lane:
                item = lane.popleft()[1]
                if isinstance(item, Ask) and item._future.done():
                    continue
                self._handled += 1
                return item
            if self._closed:
                raise ActorGone(f"{self.name} has ended")
            if self._waiter is not None:
                raise RuntimeError(f"{self.name}: a mailbox has one receiver")
            waiter = asyncio.get_running_loop().create_future()
            self._waiter = waiter
            try:
                await waiter
            finally:
                self._waiter = None

    def receive_nowait(self) -> M | Ask[Any] | None:
        """The next item, or None where nothing waits (or it is closed): for taking a batch after the first."""
        while lane := self._control or self._data:
            item = lane.popleft()[1]
            if isinstance(item, Ask) and item._future.done():
                continue
            self._handled += 1
            return item
        return None

    def serve(self, handle: Callable[[M | Ask[Any]], None], turns: Turns) -> None:
        """From now on ``handle`` gets each item, control first, until the close. It must not raise."""
        self._serve = handle
        self._turns = turns
        if self._control or self._data:
            self._is_queued = True
            turns.queue(self)

    def take_turn(self) -> None:
        """Hands over what lies here, up to ``TURN`` items. Called by ``Turns``."""
        self._is_queued = False
        for _ in range(TURN):
            lane = self._control or self._data
            if not lane or self._serve is None:
                return
            item = lane.popleft()[1]
            if isinstance(item, Ask) and item._future.done():
                continue
            self._handled += 1
            self._serve(item)
        if (self._control or self._data) and not self._is_queued and self._turns is not None:
            self._is_queued = True
            self._turns.queue(self)

    def __aiter__(self) -> Mailbox[M]:
        return self

    async def __anext__(self) -> M | Ask[Any]:
        try:
            return await self.receive()
        except ActorGone:
            raise StopAsyncIteration from None

    def close(self) -> None:
        """Ends it: nothing is taken any more, what still lies in it is dropped, unanswered asks fail. May be
        repeated."""
        if self._closed:
            return
        self._closed = True
        self._dropped += len(self._control) + len(self._data)
        self._control.clear()
        self._data.clear()
        if self._asks:
            self.fail_unanswered()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        # Let go of the actor, which holds this mailbox: a circle would wait for the garbage collector.
        self._serve = self._turns = None

    def fail_unanswered(self) -> None:
        """The actor crashed and another will read on: nobody who asked it needs to wait. Messages stay."""
        if self._asks is not None:
            self._asks.fail(lambda: ActorGone(f"{self.name} has ended"))

    def stats(self) -> MailboxStats:
        first = min((lane[0][0] for lane in (self._control, self._data) if lane), default=None)
        return MailboxStats(
            depth_control=len(self._control),
            depth_data=len(self._data),
            oldest=0.0 if first is None else max(0.0, self._clock() - first),
            handled=self._handled,
            dropped=self._dropped,
        )


class _Unanswered:
    """The asks of a mailbox that wait, with one timer for all: most are answered long before their deadline, and a
    timer of its own costs an ask more than all the rest. ``alarm_at``: when it rings; infinity where it is not set."""

    __slots__ = ("_alarm", "alarm_at", "deadlines", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.deadlines: dict[Ask[Any], float] = {}
        self.alarm_at = math.inf
        self._alarm: asyncio.TimerHandle | None = None
        self.loop = loop

    def wake_at(self, deadline: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self.loop.call_at(deadline, self._expire)
        self.alarm_at = deadline

    def fail(self, error: Callable[[], BsupError]) -> None:
        """Fails them all, each with an error of its own. What is asked after that sets the timer again."""
        self._silence()
        for ask in self.deadlines:
            ask.fail(error())

    def _silence(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self.alarm_at = math.inf

    def _expire(self) -> None:
        self._silence()
        now = self.loop.time()
        for ask, deadline in self.deadlines.items():
            if deadline <= now:
                ask.fail(TimeoutError())
        if left := [deadline for deadline in self.deadlines.values() if deadline > now]:
            self.wake_at(min(left))


class Turns:
    """Serves mailboxes that have something, in the order in which they got it: one callback of the loop for many of
    them. On one loop's thread only."""

    __slots__ = ("_loop", "_waiting")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Mailbox[Any]] = deque()

    def queue(self, mailbox: Mailbox[Any]) -> None:
        if not self._waiting:
            self._loop.call_soon(self._serve)
        self._waiting.append(mailbox)

    def _serve(self) -> None:
        waiting = self._waiting
        try:
            for _ in range(min(len(waiting), TURN)):
                waiting[0].take_turn()
                # Only now: what is told meanwhile finds the queue not empty, and does not have it served twice.
                waiting.popleft()
        finally:
            # No handler may raise; one that does must not silence all the others.
            if waiting:
                self._loop.call_soon(self._serve)
