"""Directories of runs that are over, emptied and kept for the next ones. Standard library only; ``trees`` has it.

What is made costs an inode that must be found: on ext4 without a journal that takes the longer the more files were
deleted in the last minutes, up to half a millisecond, and a dozen of them make a run. So a run's directory with what
every run has (its files under the names they are written by before they are renamed, its FIFOs), and a workspace that
is empty again, are moved to ``spare/`` instead of being removed, and back again under another lease. Each leaves its
place in one move, before anything of it is undone, and only one that this process undid wholly is ever taken.

Nothing of one job reaches the next. FIFOs are kept only if nobody holds them any more: a process to whom a job handed
one would read what the next job writes. A workspace is kept only if it is as it was made: no entry, mode, attribute or
flag more. Who holds a descriptor of it still can't enter it, as it is another uid's by then; the names of what lies
directly in it is all that could be learnt, and less than /proc tells of any process.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time

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
_SETTLED = 20_000_000
"""Nanoseconds after which a change has another stamp: the tick of a file system's clock is 10 ms at most."""


class _Spares:
    """``top``: where they come from and go to. ``prefix`` begins the names of these in ``spare/``."""

    top: str
    prefix: str

    def __init__(self, state: StateDirectory) -> None:
        """Removes what a shepherd before left: nobody knows whether it was undone wholly."""
        self._state = state
        state.make(SPARE, 0o700)
        self._directory = state.open(SPARE)
        self._made = 0
        self._names: list[str] = []
        for name in os.listdir(self._directory):
            if name.startswith((self.prefix, ".")):
                remove_tree(self._directory, name)

    def close(self) -> None:
        os.close(self._directory)

    def keep(self, name: str) -> bool:
        """Undoes what has this name, and keeps it; False: it is to be removed, as there is more to it."""
        if len(self._names) >= _MOST:
            return False
        self._made += 1
        spare = f"{self.prefix}{self._made}"
        place = self._state.open(self.top)
        try:
            os.rename(name, spare, src_dir_fd=place, dst_dir_fd=self._directory)
            try:
                self._undo(spare)
            except (OSError, Refusal, TooLarge):
                os.rename(spare, name, src_dir_fd=self._directory, dst_dir_fd=place)
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

    def __init__(self, state: StateDirectory) -> None:
        super().__init__(state)
        self._given: dict[str, list[int]] = {}
        self._is_as_given = False

    def note(self, name: str, workspace: int) -> None:
        """It is as it is to be kept."""
        self._given[name] = _changed(workspace)

    def begin(self, name: str) -> None:
        """Something of its job is about to start. What it changes has a later stamp, if a tick of the clock is past."""
        given = self._given.get(name)
        if given is not None and time.time_ns() - max(given) < _SETTLED:
            del self._given[name]

    def keep(self, name: str) -> bool:
        given = self._given.pop(name, None)
        self._is_as_given = False
        if given is not None:
            with contextlib.suppress(Refusal, OSError):
                workspace = self._state.open(self.top, name)
                try:
                    self._is_as_given = _changed(workspace) == given
                finally:
                    os.close(workspace)
        return super().keep(name)

    def _undo(self, name: str) -> None:
        if self._is_as_given:
            return
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


def _changed(workspace: int) -> list[int]:
    """When its entries, mode, attributes or flags were changed last, and those of its parts. Nobody can set these."""
    return [os.stat(part, dir_fd=workspace, follow_symlinks=False).st_ctime_ns for part in PARTS] + [
        os.fstat(workspace).st_ctime_ns
    ]


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
