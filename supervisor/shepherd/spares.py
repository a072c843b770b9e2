"""Run directories that are over, emptied and kept for the next ones. Standard library only; ``host`` calls it.

A file that is made costs an inode that must be found: on ext4 without a journal that takes the longer the more files
were deleted in the last minutes, up to half a millisecond, and ten of them make a run. So a run's directory with what
every run has (its files under the names they are written by before they are renamed, empty FIFOs) is moved to
``spare/`` instead of being removed, and back again under another lease.

Jobs never see these directories, only the two FIFOs: those are kept only if nobody holds them any more, as a process
to whom a job handed one would read what the next job writes. A run leaves ``runs/`` in one move, before anything of it
is undone, and only one that was undone wholly is ever taken.
"""

from __future__ import annotations

import contextlib
import os
import stat

from supervisor.shepherd.files import Refusal, StateDirectory, TooLarge, remove_tree, say
from supervisor.shepherd.output import FIFOS

SPARE = "spare"
_MOST = 64
_ENTRIES = 64
_STEP = "0"
_KEPT = ("claim", "started", "exit", "closed")
_SECRET = "spec"


class Spares:
    def __init__(self, state: StateDirectory) -> None:
        """Removes what a shepherd before left half undone."""
        self._state = state
        state.make(SPARE, 0o700)
        self._directory = state.open(SPARE)
        self._made = 0
        self._names: list[str] = []
        for name in os.listdir(self._directory):
            if name.startswith("."):
                remove_tree(self._directory, name)
            else:
                self._names.append(name)

    def keep(self, run: str) -> bool:
        """Undoes the run and keeps its directory; False: it is to be removed, as it is large, or there are enough."""
        if len(self._names) >= _MOST:
            return False
        self._made += 1
        name = f"{os.getpid()}-{self._made}"
        undone = f".{name}"
        runs = self._state.open("runs")
        try:
            os.rename(run, undone, src_dir_fd=runs, dst_dir_fd=self._directory)
            try:
                self._undo(undone)
                os.rename(undone, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except (OSError, Refusal, TooLarge):
                os.rename(undone, run, src_dir_fd=self._directory, dst_dir_fd=runs)
                return False
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                say(f"runs/{run}: {error}")
            return False
        finally:
            os.close(runs)
        self._names.append(name)
        return True

    def take(self, runs: int, run: str) -> bool:
        """Whether the run's directory, which must not be there, is now, with an empty one for its first step."""
        while self._names:
            with contextlib.suppress(OSError):
                os.rename(self._names.pop(), run, src_dir_fd=self._directory, dst_dir_fd=runs)
                return True
        return False

    def _undo(self, name: str) -> None:
        run = self._state.open(SPARE, name)
        try:
            for entry in os.listdir(run):
                if entry == _SECRET:
                    _empty(run, entry)
                elif entry != _STEP and entry != _temporary(_SECRET):
                    remove_tree(run, entry, _ENTRIES)
            step = self._state.open(SPARE, name, _STEP)
            try:
                self._undo_step(step)
            finally:
                os.close(step)
        finally:
            os.close(run)

    def _undo_step(self, step: int) -> None:
        for entry in os.listdir(step):
            if entry in _KEPT:
                os.rename(entry, _temporary(entry), src_dir_fd=step, dst_dir_fd=step)
            elif entry == _SECRET:
                _empty(step, entry)
            elif entry in FIFOS:
                if not _is_free(step, entry):
                    os.unlink(entry, dir_fd=step)
            elif entry not in _TEMPORARIES:
                remove_tree(step, entry, _ENTRIES)


def _temporary(name: str) -> str:
    return f".{name}.tmp"


_TEMPORARIES = {_temporary(name) for name in (*_KEPT, _SECRET)}


def _empty(directory: int, name: str) -> None:
    """It held secrets. The file is the daemon's to replace: a link, or another's file, is taken away instead."""
    fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        found = os.fstat(fd)
        is_own = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if is_own:
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)
    if is_own:
        os.rename(name, _temporary(name), src_dir_fd=directory, dst_dir_fd=directory)
    else:
        os.unlink(name, dir_fd=directory)


def _is_free(directory: int, name: str) -> bool:
    """Whether nobody has the FIFO open, for reading or for writing."""
    flags = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        os.close(os.open(name, os.O_WRONLY | flags, dir_fd=directory))
        return False  # somebody reads
    fd = os.open(name, os.O_RDONLY | flags, dir_fd=directory)
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False  # somebody writes
    finally:
        os.close(fd)
