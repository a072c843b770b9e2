"""The fence file: until when this host may work, told to the shepherd outside of the daemon (``ports.Fence``).

May import the standard library, ``model`` and its neighbour ``handles``. Called by the keeper after each renewal, and
by who runs jobs in the daemon itself: while there are any, the shepherd kills a daemon that lets the fence pass without
a word.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from pathlib import Path
from typing import Any

from supervisor.runners.handles import boot_id, own_start_time, write_json_in_room

GUARD_PATIENCE = 2.0


class FenceFile:
    """``fence`` in the state directory, by write and rename, with the boot its clock belongs to. In room of its
    own: a job that fills the disk must not end its neighbours, which a fence that can't be written would do.

    Not synced: the shepherd reads it from this boot's page cache, and after a power cut it means nothing.
    ``guard_patience``: seconds behind the fence after which a guarded daemon that neither renewed nor confirmed is
    killed; to be a third of the margin at most.
    """

    def __init__(self, state: Path, guard_patience: float = GUARD_PATIENCE) -> None:
        self._path = state / "fence"
        self._boot_id = boot_id()
        self._daemon = {"pid": os.getpid(), "start_time": own_start_time(), "patience": guard_patience}
        self._fence_at: float | None = None
        self._confirmed_at: float | None = None
        self._is_guarded = False
        self._writing = asyncio.Lock()

    @property
    def is_guarded(self) -> bool:
        return self._is_guarded

    def now(self) -> float:
        """Seconds of CLOCK_BOOTTIME, which goes on while the machine sleeps."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def left(self) -> float:
        """Seconds until the fence as last written; infinite where none was."""
        return math.inf if self._fence_at is None else self._fence_at - self.now()

    async def write(self, fence_at: float) -> None:
        """Publishes it; in a thread, as a slow disk must not hold up the next renewal. Raises RunnerError."""
        async with self._writing:
            self._fence_at = fence_at
            await self._publish(self._is_guarded)

    async def guard(self, active: bool) -> None:
        """Whether this daemon is to be killed if it lets the fence pass in silence: so while it runs jobs in itself.

        To be on before the first such job begins, and off when none is left. On disk when this returns, or with the
        first fence. Costs nothing where it is so already. Raises RunnerError.
        """
        if active == self._is_guarded and not self._writing.locked():
            return
        async with self._writing:
            if active != self._is_guarded:
                await self._publish(active)
                self._is_guarded = active

    async def confirm(self) -> None:
        """Says that the fence as last written was kept: no job runs in this daemon any more, and none will before the
        next fence. Raises RunnerError."""
        async with self._writing:
            self._confirmed_at = self._fence_at
            await self._publish(self._is_guarded)

    async def _publish(self, is_guarded: bool) -> None:
        if self._fence_at is None:
            return
        said: dict[str, Any] = {"fence_at": self._fence_at, "boot_id": self._boot_id}
        if is_guarded:
            said["daemon"] = self._daemon
        if self._confirmed_at is not None:
            said["confirmed_at"] = self._confirmed_at
        await asyncio.to_thread(write_json_in_room, self._path, said)
