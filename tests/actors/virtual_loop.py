"""An asyncio loop with a virtual clock: where it would wait for a timer, the clock jumps to it (as trio's autojump
clock)."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

PATIENCE = 10.0
"""Real seconds for which a loop without timers may wait for I/O (a thread's answer) before the test is declared
stuck."""


class _Jumping(selectors.SelectSelector):
    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            ready = super().select(PATIENCE)
            if not ready:
                raise RuntimeError("nothing is left that could ever happen: the test is stuck")
            return ready
        self._jump(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` begins at 1000 and moves only by jumps."""

    def __init__(self) -> None:
        self._virtual = 1000.0
        super().__init__(_Jumping(self._jump))
        # A timer is due when its time is reached; rounding must not make the loop spin just before it.
        self._clock_resolution: float = 1e-6

    def _jump(self, seconds: float) -> None:
        self._virtual += max(seconds, 1e-9)

    def time(self) -> float:
        return self._virtual


def run(main: Any) -> Any:
    """Runs a coroutine on a virtual loop of its own: for Hypothesis, which calls a test many times."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
