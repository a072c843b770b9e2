"""What a worker says while it works: a small file, mapped by the worker and by who measures it, so that telling costs
neither anything. Times are CLOCK_MONOTONIC in nanoseconds, which all processes of a Linux machine share.

Layout, little-endian 64-bit words: for each of ``WORKERS`` workers how many jobs it ran, when it was told to begin,
when its first job began, and 0; then, where jobs are timed one by one, when each began, by its number.

Standard library only: it is imported in the peers' environments too.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

WORKERS = 8
RECORD = 32
HEAD = RECORD * WORKERS


class Stamps:
    """``jobs``: how many are timed one by one (0: they are only counted)."""

    def __init__(self, path: str | Path, worker: int = 0) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._jobs = (len(self._map) - HEAD) // 8
        self._at = RECORD * worker
        self._runs = 0

    @staticmethod
    def make(path: str | Path, jobs: int = 0) -> Stamps:
        Path(path).write_bytes(bytes(HEAD + 8 * jobs))
        return Stamps(path)

    # --- the worker's side ---

    def begin(self) -> None:
        """Called when all is imported and connected, just before the worker is started."""
        struct.pack_into("<Q", self._map, self._at + 8, time.monotonic_ns())

    def hit(self, number: int) -> None:
        """A job began."""
        if self._runs == 0:
            struct.pack_into("<Q", self._map, self._at + 16, time.monotonic_ns())
        self._runs += 1
        struct.pack_into("<Q", self._map, self._at, self._runs)
        if number < self._jobs:
            struct.pack_into("<Q", self._map, HEAD + 8 * number, time.monotonic_ns())

    # --- the measurer's side ---

    def runs(self) -> int:
        return sum(struct.unpack_from("<Q", self._map, RECORD * worker)[0] for worker in range(WORKERS))

    def began(self) -> int:
        """When the first of the workers was told to begin; 0: none was yet."""
        return self._earliest(8)

    def first(self) -> int:
        """When the first job began; 0: none did yet."""
        return self._earliest(16)

    def _earliest(self, offset: int) -> int:
        times = [struct.unpack_from("<Q", self._map, RECORD * worker + offset)[0] for worker in range(WORKERS)]
        return min(filter(None, times), default=0)

    def job(self, number: int) -> int:
        found: int = struct.unpack_from("<Q", self._map, HEAD + 8 * number)[0]
        return found
