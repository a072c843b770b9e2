"""The event loop: file descriptors, timers by CLOCK_BOOTTIME, and signals. Standard library only; called by everything
here.

Boot time and not monotonic time, as the fence is written in it: it goes on while the machine sleeps. epoll's own
timeout doesn't, so a wait lasts a second at most while there is a timer.
"""

from __future__ import annotations

import heapq
import os
import select
import signal
import time
import traceback
from collections.abc import Callable

_LONGEST_WAIT = 1.0
_NAP = 0.001
_BUSY_PASSES = 100


def now() -> float:
    """Seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Loop:
    """One thread, callbacks, no nesting. A callback that raises is a bug: it is logged and not called again for its
    descriptor; the other jobs go on."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[], object]]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timers_made = 0
        self._soon: list[Callable[[], None]] = []
        self._passes = 0
        self._window = 0.0
        self._signals: dict[int, Callable[[], None]] = {}
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.running = True
        self.watch(self._wake_read, self._on_signal)

    def watch(self, fd: int, call: Callable[[], object], *, write: bool = False) -> None:
        """Calls when ``fd`` can be read (and, with ``write``, when it can be written). Watching again changes it."""
        events = select.EPOLLIN | (select.EPOLLOUT if write else 0)
        before = self._watched.get(fd)
        if before is None:
            self._epoll.register(fd, events)
        elif before[0] != events:
            self._epoll.modify(fd, events)
        self._watched[fd] = events, call

    def unwatch(self, fd: int) -> None:
        """Before it is closed: what another process holds too would be told of for ever."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Calls once at ``when``. There is no cancelling: callers look whether it still matters."""
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, call))

    def soon(self, call: Callable[[], None]) -> None:
        """Calls at the end of this pass, or of the next one."""
        self._soon.append(call)

    def on_signal(self, number: signal.Signals, call: Callable[[], None]) -> None:
        self._signals[number] = call
        signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def run(self) -> None:
        while self.running:
            self._pass()

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._epoll.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _pass(self) -> None:
        wait = -1.0
        if self._soon:
            wait = 0.0
        elif self._timers:
            wait = min(max(0.0, self._timers[0][0] - now()), _LONGEST_WAIT)
        ready = [(fd, self._watched[fd]) for fd, _ in self._epoll.poll(wait)]
        for fd, watched in ready:
            # One before it may have closed the descriptor, and another may have got its number since.
            if self._watched.get(fd) is watched and not _guarded(watched[1]):
                self.unwatch(fd)
        at = now()
        while self._timers and self._timers[0][0] <= at:
            _guarded(heapq.heappop(self._timers)[2])
        while self._soon:
            calls, self._soon = self._soon, []
            for call in calls:
                _guarded(call)
        self._breathe(at)

    def _breathe(self, at: float) -> None:
        """A job that writes byte by byte would cost a wake-up and an index record each: past 100 passes in 100 ms, each
        pass is preceded by a millisecond in which bytes gather."""
        if at - self._window > 0.1:
            self._window, self._passes = at, 0
        self._passes += 1
        if self._passes > _BUSY_PASSES:
            time.sleep(_NAP)

    def _on_signal(self) -> None:
        try:
            numbers = set(os.read(self._wake_read, 4096))
        except BlockingIOError:
            return
        for number in sorted(numbers):
            if call := self._signals.get(number):
                _guarded(call)


def _guarded(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception:
        traceback.print_exc()
        return False
    return True
