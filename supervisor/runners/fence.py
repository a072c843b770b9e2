"""The fence file: until when this host may work, told to the shepherd outside of the daemon (``ports.Fence``).

May import the standard library, ``model`` and its neighbour ``handles``. Called by the keeper after each renewal.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from supervisor.runners.handles import boot_id, write_json_atomic


class FenceFile:
    """``fence`` in the state directory, by write and rename, with the boot its clock belongs to.

    Not synced: the shepherd reads it from this boot's page cache, and after a power cut it means nothing.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / "fence"
        self._boot_id = boot_id()

    def now(self) -> float:
        """Seconds of CLOCK_BOOTTIME, which goes on while the machine sleeps."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def write(self, fence_at: float) -> None:
        """Publishes it; in a thread, as a slow disk must not hold up the next renewal. Raises RunnerError."""
        await asyncio.to_thread(write_json_atomic, self._path, {"fence_at": fence_at, "boot_id": self._boot_id})
