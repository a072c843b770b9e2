"""What any job needs of this host beyond what it asks for: room on the disk of the state directory, open files.

Keeps the promise of ``ports.HostRoom``. Standard library and ``model``. The marks lie well above nothing at all: the
jobs that run are still to be brought to their end, and what is left is for their output and their records.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Final

from supervisor.model.units import format_size

BACK: Final = 1.1
"""Times a mark: with so much there is room again. A host at its mark does not take and refuse by turns."""

MIN_INODES: Final = 2000
"""Free inodes, or a tenth of all where that is less. A job takes about twenty."""

MIN_FILES: Final = 64
"""Open files that the daemon may still have, or a quarter of its limit where that is less."""


class StateRoom:
    """``min_free``: bytes; may be set anew at any time."""

    def __init__(self, state: Path, min_free: int) -> None:
        self._state = state
        self.min_free = min_free
        self._factor = 1.0

    def lacking(self) -> str | None:
        found = self._disk() or self._files()
        self._factor = 1.0 if found is None else BACK
        return found

    def _disk(self) -> str | None:
        """On a local file system this asks the kernel's memory, not the disk."""
        try:
            found = os.statvfs(self._state)
        except OSError as error:
            return f"the state directory {self._state} can't be looked at: {error.strerror}"
        free = found.f_bavail * found.f_frsize
        if free < self._factor * self.min_free:
            return (
                f"{format_size(free)} are free on the disk of {self._state}, state.min_free is "
                f"{format_size(self.min_free)}"
            )
        # Some file systems make inodes as they are needed, and count none.
        if found.f_files and found.f_favail < self._factor * min(MIN_INODES, found.f_files // 10):
            return f"{found.f_favail} inodes are free on the disk of {self._state}"
        return None

    def _files(self) -> str | None:
        """The kernel gives the lowest number that is free: all below it are in use."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            lowest = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENFILE:
                return "this machine can open no more files (fs.file-max)"
            return f"the daemon can open no more files: {error.strerror}; its limit is {limit}"
        os.close(lowest)
        if limit - lowest < self._factor * min(MIN_FILES, limit // 4):
            return f"the daemon has {lowest} files open, its limit is {limit}"
        return None
