"""Tasks that run coroutines one after another: a short one costs no task of its own.

A worker takes one work after another for as long as none of them waits. One that comes to wait keeps its worker until
it has ended, and another worker goes on with the rest. A worker whose work was canceled, or left the task or its
context other than it was, is not used again: no work ever meets what the one before it left behind.

Standard library only. Called by ``in_process``.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

Work: TypeAlias = Callable[[asyncio.Task[None]], Coroutine[Any, Any, bool]]
"""Gets the task that it runs in; raises nothing; whether the task may be used again."""

TURN = 64
"""Works that a worker ends before the rest of the loop has its turn."""
MOST_IDLE = 8


class Workers:
    """Made on the loop that they run on. ``cancel`` ends them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Work] = deque()
        self._idle: list[asyncio.Future[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking = False
        self._closed = False

    def submit(self, work: Work) -> None:
        """Begins it in the next turn of the loop; drops it after ``cancel``."""
        if self._closed:
            return
        self._queue.append(work)
        if not self._looking:
            self._looking = True
            self._loop.call_soon(self._look)

    async def cancel(self, again: float) -> None:
        """Cancels what runs, every ``again`` seconds, until it has ended; what was not begun is dropped."""
        self._closed = True
        self._queue.clear()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=again)

    def _look(self) -> None:
        """Puts a worker on the queue, and looks again behind it: it may have come to wait in the middle."""
        if not self._queue:
            self._looking = False
            return
        while self._idle:
            waiter = self._idle.pop()
            if not waiter.done():
                waiter.set_result(None)
                break
        else:
            task = self._loop.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._loop.call_soon(self._look)

    async def _run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        queue = self._queue
        context = contextvars.copy_context()
        while not self._closed:
            for _ in range(TURN):
                if not queue:
                    break
                is_clean = await queue.popleft()(task)
                if not is_clean or task.cancelling() or contextvars.copy_context() != context:
                    return
            else:
                await asyncio.sleep(0)
                continue
            if len(self._idle) >= MOST_IDLE:
                return
            waiter = self._loop.create_future()
            self._idle.append(waiter)
            await waiter
