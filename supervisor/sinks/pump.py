"""Brings the logs of all attempts on: redacts in a thread what is new in their raw files.

May import ``model``. Called by the log book, which hears who got on.

One task and one thread at a time serve all attempts. Those with a live step are looked at some twenty times a second
(less often where there are thousands), and at once when told; what is told while the thread is busy waits for its next
turn together, so that a thousand short jobs cost a hop for many and not one each. A turn takes a slice of each, then
more of the busy ones, up to a bound, then says who got on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import anyio
import msgspec
from anyio import CapacityLimiter, to_thread

from supervisor.model.job import LeaseId
from supervisor.model.redaction import SecretSet
from supervisor.sinks.shipper import Shipment
from supervisor.sinks.transcript import SLICE, Transcript

INTERVAL = 0.05
_LOOK = 50e-6
"""Seconds between looks for each attempt there is: bounds what ten thousand silent ones cost."""
_TURN = 32 * SLICE
"""Raw bytes the pump takes before it says what is new, over all attempts."""

log = logging.getLogger(__name__)


class OpenLog(msgspec.Struct, eq=False):
    """An attempt that is open. ``problem``: why it does not get on; ``is_awaited``: somebody waits for its end."""

    lease: LeaseId
    path: str
    transcript: Transcript
    shipment: Shipment
    secrets: SecretSet
    problem: str | None = None
    is_awaited: bool = False
    _grown: anyio.Event | None = None

    @property
    def is_complete(self) -> bool:
        shipment, transcript = self.shipment, self.transcript
        is_stored = shipment.is_refused or (shipment.stored is not None and shipment.stored >= transcript.size)
        return transcript.is_settled and is_stored

    def grown(self) -> anyio.Event:
        """What is set at the next change."""
        if self._grown is None:
            self._grown = anyio.Event()
        return self._grown

    def tell(self) -> None:
        if self._grown is not None:
            self._grown.set()
            self._grown = None


class Pump:
    """``on_advanced`` is told of each attempt that was looked at."""

    def __init__(self, on_advanced: Callable[[OpenLog], None]) -> None:
        self._on_advanced = on_advanced
        self._watched: dict[LeaseId, OpenLog] = {}
        self._told: dict[LeaseId, OpenLog] = {}
        self._next_look = 0.0
        self._woken = anyio.Event()
        self._thread = CapacityLimiter(1)
        self.is_behind = False

    @property
    def is_idle(self) -> bool:
        return not self._watched

    def watch(self, entry: OpenLog) -> None:
        """It has a live step: to be looked at from time to time."""
        if not self._watched:
            self._next_look = anyio.current_time() + INTERVAL
            self._woken.set()
        self._watched[entry.lease] = entry

    def tell(self, entry: OpenLog) -> None:
        """There is something to do: to be looked at now."""
        self._watched[entry.lease] = self._told[entry.lease] = entry
        self._woken.set()

    def forget(self, entry: OpenLog) -> None:
        self._watched.pop(entry.lease, None)
        self._told.pop(entry.lease, None)

    async def run(self) -> None:
        while True:
            now = anyio.current_time()
            if self._watched and now >= self._next_look:
                await self.look()
                self._next_look = anyio.current_time() + max(INTERVAL, len(self._watched) * _LOOK)
            elif self._told:
                await self._look_at(list(self._told.values()))
            else:
                self._woken = anyio.Event()
                with anyio.move_on_after(self._next_look - now if self._watched else None):
                    await self._woken.wait()

    async def look(self) -> bool:
        """One look at every watched attempt; whether there is more to do at once."""
        return await self._look_at(list(self._watched.values()))

    async def _look_at(self, waiting: list[OpenLog]) -> bool:
        self.is_behind = False
        while waiting:
            for entry in waiting:
                self._told.pop(entry.lease, None)
            done = await to_thread.run_sync(_turn, waiting, limiter=self._thread)
            for entry, has_more in zip(waiting, done, strict=False):
                if has_more and entry.lease in self._watched:
                    self._told[entry.lease] = entry
                    self.is_behind = True
                if entry.transcript.is_settled:
                    self._watched.pop(entry.lease, None)
                self._on_advanced(entry)
            waiting = waiting[len(done) :]
        return self.is_behind


def _turn(entries: Sequence[OpenLog]) -> list[bool]:
    """Takes the attempts a slice further each, and the busy ones on, up to a turn's worth; whether each of those that
    had their turn has more. In the pump's thread.
    """
    done: list[bool] = []
    room = _TURN
    for entry in entries:
        done.append(_advance(entry))
        room -= SLICE if done[-1] else 0
        if room <= 0:
            return done
    busy = [number for number, has_more in enumerate(done) if has_more]
    while busy and room > 0:
        room -= SLICE * len(busy)
        for number in busy:
            done[number] = _advance(entries[number])
        busy = [number for number in busy if done[number]]
    return done


def _advance(entry: OpenLog) -> bool:
    """Whether there is more at once."""
    try:
        has_more = entry.transcript.advance()
    except Exception as error:
        # Whatever is wrong with one attempt's files must not stop the logs of the others. It is tried again.
        if entry.problem is None:
            log.exception("log of job %s does not get on", entry.shipment.job)
        entry.problem = str(error) or type(error).__name__
        return False
    entry.problem = None
    return has_more
