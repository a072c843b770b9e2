"""A range of uids that no other shepherd of the machine uses. Standard library only; ``__main__`` and ``host`` call it.

A job is killed by its uid, so two daemons on one machine, both with the default range, would kill each other's jobs,
and read their files. A daemon counts in the range of its config; the shepherd moves that range to the first place that
is free and takes it with locks, a byte a uid, on one file of the machine. They belong to the open file, which the
guardian has too: they last until both are gone.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import struct

from supervisor.shepherd.files import Refusal, StateDirectory, read_json, say

_LOCKS = "/run/bsup-uids.lock"
_PLACES = 1000
_LAST_UID = 0xFFFFFFF0
_MEMORY = "uids"
_LOCK = struct.Struct("hhqqi4x")  # flock(2)'s on 64-bit Linux


class UidRanges:
    """``shift`` is what is to be added to a uid of the config. Made before any fork; ``open`` opens the file of locks,
    which all that are forked share."""

    def __init__(self, state: StateDirectory, locks: str = _LOCKS) -> None:
        self._state = state
        self._path = locks
        self._locks = -1

    def open(self) -> None:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._locks = os.open(self._path, flags, 0o600)
        except OSError as error:
            say(f"{self._path}: {error.strerror}: another daemon on this machine must have another uid_base")

    @property
    def are_locked(self) -> bool:
        return self._locks >= 0

    def take(self, base: int, count: int, service: int) -> int:
        """Returns the shift; the one of before, where that is free. Raises Refusal if no place is."""
        if self._locks < 0:
            return 0
        before = self.remembered(base, count)
        for shift in itertools.chain([] if before is None else [before], range(0, _PLACES * count, count)):
            first = base + shift
            if first + count < _LAST_UID and not first <= service < first + count and self._lock(first, count):
                self._state.write_json(self._state.fd, _MEMORY, {"base": base, "count": count, "shift": shift})
                return shift
        raise Refusal("failed", f"no {count} uids from {base} on are free of other daemons")

    def _lock(self, first: int, count: int) -> bool:
        try:
            fcntl.fcntl(self._locks, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, count, 0))
        except OSError:
            return False
        return True

    def remembered(self, base: int, count: int) -> int | None:
        """The shift under which this directory's last shepherd ran with the same range."""
        try:
            found = read_json(self._state.fd, _MEMORY) or {}
        except (OSError, ValueError):
            return None
        shift = found.get("shift")
        same = (found.get("base"), found.get("count")) == (base, count)
        return shift if same and isinstance(shift, int) and shift >= 0 and shift % count == 0 else None
