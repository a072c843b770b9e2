"""Ends a daemon whose event loop is blocked: a thread counts how long the loop has given no sign of life.

A blocked loop renews nothing, answers nobody and sees no job's end; its jobs would be ended at the fence. A daemon that
is gone is started again by the service manager, and the next one takes up the jobs, which live on with the shepherd;
those of in-process kinds are lost with it, one of them being what blocks.

The thread counts its own ticks and looks at no clock. A process that was stopped (SIGSTOP, a suspended machine) has a
thread that was stopped as well: whatever time went by, that was one tick, and the loop has its turn before the next.

A thread needs the interpreter's lock: a call into C that keeps it (a pattern that backtracks without end) stops the
counting too. For that a timer of the kernel's counts the processor time of the loop's thread, and what it sends needs
no lock. Such a timer stands still while the process is stopped.

Standard library only. ``app`` enters it around the daemon's run, in the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Final, NoReturn

log = logging.getLogger("supervisor.watchdog")

PERIOD: Final = 5.0
"""Seconds between two beats of the loop, and between two ticks of the thread; less where the patience is short."""

TICKS: Final = 12
"""Ticks without a beat, at least, before the loop counts as blocked."""

TELLING: Final = 5.0
"""Seconds to tell why: what blocks the loop may be the log itself."""

SLACK: Final = 1.5
"""Times the patience: the processor time after which the kernel ends what the thread could not."""

EXIT_CODE: Final = 70
"""``EX_SOFTWARE``: any but 0 has the service manager start the next daemon."""


class LoopBlocked(Exception):
    """Never raised: the name under which the stack of the loop's thread is logged."""


class Count:
    """Ticks since the last beat. ``beats`` only ever rises, and is the loop's; ``tick`` is the thread's."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen = 0
        self._ticks = 0
        self.beats = 0

    def tick(self) -> bool:
        """Whether the loop counts as blocked."""
        if self.beats != self._seen:
            self._seen = self.beats
            self._ticks = 0
        else:
            self._ticks += 1
        return self._ticks >= self._most


class Watchdog:
    """``patience``: seconds of silence after which the process ends; None: never. Entered in the loop's thread."""

    def __init__(self, patience: float | None) -> None:
        self._patience = patience
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._patience is not None:
            self._period = min(PERIOD, self._patience / TICKS)
            self._count = Count(math.ceil(self._patience / self._period))
            self._loop = asyncio.get_running_loop()
            self._watched = threading.get_ident()
            self._timer = _ProcessorTimer.made()
            self._beat()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._patience is not None:
            self._over.set()
            self._thread.join()
            self._next.cancel()
            if self._timer is not None:
                self._timer.close()

    def _beat(self) -> None:
        assert self._patience is not None
        self._count.beats += 1
        if self._timer is not None:
            self._timer.set(SLACK * self._patience)
        self._next = self._loop.call_later(self._period, self._beat)

    def _watch(self) -> None:
        while not self._over.wait(self._period):
            if self._count.tick():
                self._end()

    def _end(self) -> NoReturn:
        # In another thread: the blocked one may hold the log's lock, or stand before a full pipe. Both say enough.
        telling = threading.Thread(target=self._tell, daemon=True)
        with contextlib.suppress(RuntimeError):
            telling.start()
            telling.join(TELLING)
        os._exit(EXIT_CODE)

    def _tell(self) -> None:
        error = LoopBlocked(f"for {self._patience:g} s")
        stack = _stack(sys._current_frames().get(self._watched))
        log.critical(
            "the event loop was blocked for %g s: the daemon ends, its jobs stay for the next one; it stood here",
            self._patience,
            exc_info=(LoopBlocked, error, stack),
        )


def _stack(frame: FrameType | None) -> TracebackType | None:
    """What leads to ``frame``, outermost first, as where something was raised."""
    stack = None
    while frame is not None:
        stack = TracebackType(stack, frame, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return stack


_CLOCK_THREAD_CPUTIME_ID: Final = 3
_SIGEV_SIGNAL: Final = 0
_SIGNAL: Final = signal.SIGPROF


class _Sigevent(ctypes.Structure):
    """``struct sigevent``, sigevent(7): 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * (56 - ctypes.sizeof(ctypes.c_void_p))),
    )


class _Itimerspec(ctypes.Structure):
    """``struct itimerspec``: seconds and nanoseconds of the interval, and of the first time."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("every", "every_ns", "first", "first_ns"))


class _ProcessorTimer:
    """``timer_create(2)`` over the processor time of the thread that makes it. When it runs out, the stacks of all
    threads are written to standard error, by a handler that needs no lock, and the process ends by SIGPROF."""

    def __init__(self, libc: ctypes.CDLL, timer: ctypes.c_void_p) -> None:
        self._libc = libc
        self._timer = timer

    @classmethod
    def made(cls) -> _ProcessorTimer | None:
        """None where the machine has none, or no standard error to write to: the thread then watches alone."""
        timer = ctypes.c_void_p()
        event = _Sigevent(None, _SIGNAL, _SIGEV_SIGNAL)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            faulthandler.register(_SIGNAL, file=sys.stderr, all_threads=True, chain=True)
            if libc.timer_create(_CLOCK_THREAD_CPUTIME_ID, ctypes.byref(event), ctypes.byref(timer)) == 0:
                return cls(libc, timer)
        except (OSError, AttributeError, ValueError, RuntimeError):
            pass
        return None

    def set(self, seconds: float) -> None:
        """From now; 0: not at all."""
        part, whole = math.modf(seconds)
        spec = _Itimerspec(0, 0, int(whole), int(part * 1e9))
        self._libc.timer_settime(self._timer, 0, ctypes.byref(spec), None)

    def close(self) -> None:
        self._libc.timer_delete(self._timer)
        faulthandler.unregister(_SIGNAL)
