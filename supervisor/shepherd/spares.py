"""Directories of runs that are over, emptied and kept for the next ones. Standard library only; ``trees`` has it.

What is made costs an inode that must be found: on ext4 without a journal that takes the longer the more files were
deleted in the last minutes, up to half a millisecond, and a dozen of them make a run. So a run's directory with what
every run has (its files under the names they are written by before they are renamed, its FIFOs), and a workspace that
is empty again, are moved to ``spare/`` instead of being removed, and back again under another lease. Each leaves its
place in one move, before anything of it is undone, and only one that was undone wholly is ever taken.

Nothing of one job reaches the next. FIFOs are kept only if nobody holds them any more: a process to whom a job handed
one would read what the next job writes. A workspace is kept only if it is as it was made: no entry, mode, attribute or
flag more. Who holds a descriptor of it still can't enter it, as it is another uid's by then; the names of what lies
directly in it is all that could be learnt, and less than /proc tells of any process.
"""

from __future__ import annotations

import contextlib
import os
import stat

from supervisor.shepherd import linux
from supervisor.shepherd.files import Refusal, StateDirectory, TooLarge, remove_tree, say
from supervisor.shepherd.output import FIFOS

SPARE = "spare"
PARTS = ("src", "tmp", "home")
"""What a workspace has in it."""
_MOST = 64
_ENTRIES = 64
_LARGEST_SPEC = 16 << 10
_STEP = "0"
_KEPT = ("claim", "started", "exit", "closed")
_SECRET = "spec"


class _Spares:
    """``top``: where they come from and go to. ``prefix`` begins the names of these in ``spare/``."""

    top: str
    prefix: str

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
            elif name.startswith(self.prefix):
                self._names.append(name)

    def keep(self, name: str) -> bool:
        """Undoes what has this name, and keeps it; False: it is to be removed, as there is more to it."""
        if len(self._names) >= _MOST:
            return False
        self._made += 1
        spare = f"{self.prefix}{os.getpid()}-{self._made}"
        undone = f".{spare}"
        place = self._state.open(self.top)
        try:
            os.rename(name, undone, src_dir_fd=place, dst_dir_fd=self._directory)
            try:
                self._undo(undone)
                os.rename(undone, spare, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except (OSError, Refusal, TooLarge):
                os.rename(undone, name, src_dir_fd=self._directory, dst_dir_fd=place)
                return False
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                say(f"{self.top}/{name}: {error}")
            return False
        finally:
            os.close(place)
        self._names.append(spare)
        return True

    def take(self, parent: int, name: str) -> bool:
        """Whether one is there now under this name, which must not have been."""
        while self._names:
            with contextlib.suppress(OSError):
                os.rename(self._names.pop(), name, src_dir_fd=self._directory, dst_dir_fd=parent)
                return True
        return False

    def _undo(self, name: str) -> None:
        """Raises OSError, Refusal or TooLarge where it is not as it should be."""
        raise NotImplementedError


class SpareWorkspaces(_Spares):
    top = "work"
    prefix = "w"

    def _undo(self, name: str) -> None:
        plain = linux.inode_flags(self._directory)
        top = self._state.open(SPARE, name)
        try:
            self._check(top, plain, set(PARTS))
            for part in PARTS:
                directory = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
                try:
                    self._check(directory, plain, set())
                finally:
                    os.close(directory)
        finally:
            os.close(top)

    @staticmethod
    def _check(directory: int, plain: int, names: set[str]) -> None:
        if (
            set(os.listdir(directory)) != names
            or stat.S_IMODE(os.fstat(directory).st_mode) != 0o700
            or os.listxattr(directory)
            or linux.inode_flags(directory) != plain
        ):
            raise TooLarge


class SpareRuns(_Spares):
    """Each with a directory for its first step."""

    top = "runs"
    prefix = "r"

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
        is_own = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_size <= _LARGEST_SPEC
        if is_own:
            os.pwrite(fd, b" " * found.st_size, 0)
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
