"""Files below the state directory, named so that no symlink can lead out of it. Standard library only.

A job owns its workspace and may have put anything there; the daemon's uid owns the rest. Every path that comes in a
request is split into names, and walked with directory descriptors and O_NOFOLLOW.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LARGEST_FILE = 8 << 20
_LARGEST_LOG = 1 << 20
_PIECE = 1 << 16
_AT_ONCE_BYTES = 4 << 20


to_json = json.JSONEncoder(separators=(",", ":")).encode
"""Short; and not made anew for each, as ``json.dumps`` would."""


class Refusal(Exception):
    """A request that is not done; nothing was changed. ``code``: fence, busy, policy, spec or failed."""

    def __init__(self, code: str, problem: str) -> None:
        self.code = code
        super().__init__(problem)


class StateDirectory:
    """The root of all that the shepherd touches. ``owner``: whose the files in it are to be (None: who made them)."""

    def __init__(self, path: str, owner: tuple[int, int] | None) -> None:
        self.given = os.path.abspath(path)
        self.path = os.path.realpath(path)
        self.owner = owner
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._tops: dict[str, int] = {}

    @property
    def fds(self) -> set[int]:
        """What ``open`` needs."""
        return {self.fd, *self._tops.values()}

    def names(self, path: object, top: str, depth: int) -> tuple[str, ...]:
        """The ``depth`` names below ``top`` of an absolute path. Raises Refusal if it is any other path."""
        if not isinstance(path, str):
            raise Refusal("spec", f"a path below {self.path}/{top} is needed")
        for root in (self.given, self.path):
            if path.startswith(f"{root}/{top}/"):
                names = tuple(path[len(root) + len(top) + 2 :].split("/"))
                if len(names) == depth and all(_NAME.fullmatch(name) for name in names):
                    return names
        raise Refusal("policy", f"{path!r} is not {self.path}/{top}/{'/'.join(['<name>'] * depth)}")

    def open(self, *names: str) -> int:
        """A descriptor of the directory, reached through no symlink. Raises Refusal."""
        at = kept = self._tops.get(names[0], -1)
        left = names[1:]
        if kept < 0:
            at, left = self.fd, names
        try:
            for name in left:
                below = os.open(name, _DIRECTORY, dir_fd=at)
                if at not in (self.fd, kept):
                    os.close(at)
                at = below
        except OSError as error:
            if at not in (self.fd, kept):
                os.close(at)
            raise Refusal("policy", f"{'/'.join(names)}: {name}: {error.strerror}") from error
        return os.dup(at) if at == kept else at

    def make(self, name: str, mode: int) -> None:
        """Makes a directory directly below, if it isn't there, and sets its mode. From then on it is kept open."""
        if name in self._tops:
            os.close(self._tops.pop(name))
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=self.fd)
        directory = self.open(name)
        try:
            os.fchmod(directory, mode)
            if self.owner:
                os.fchown(directory, *self.owner)
        except OSError:
            os.close(directory)
            raise
        self._tops[name] = directory

    def create(self, directory: int, name: str, flags: int = os.O_WRONLY) -> int:
        """A new file, the daemon's to read. Raises FileExistsError."""
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory)
        if self.owner:
            os.fchown(fd, *self.owner)
        return fd

    def claim(self, directory: int) -> None:
        """Makes ``claim``, which must not be there. Raises FileExistsError."""
        if exists(directory, "claim"):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "claim")
        try:
            # That of a run before. This process alone claims, so nobody comes between.
            os.rename(".claim.tmp", "claim", src_dir_fd=directory, dst_dir_fd=directory)
        except FileNotFoundError:
            os.close(self.create(directory, "claim"))

    def create_or_reuse(self, directory: int, name: str) -> tuple[int, int]:
        """A file of a name that no reader looks at: one that is there is written over. With the size that it has."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        found = os.fstat(fd)
        if found.st_nlink != 1 or not stat.S_ISREG(found.st_mode):
            os.close(fd)
            os.unlink(name, dir_fd=directory)
            return self.create(directory, name), 0
        if self.owner and found.st_uid != self.owner[0]:
            os.fchown(fd, *self.owner)
        return fd, found.st_size

    def create_or_empty(self, name: str) -> int:
        """A file directly below."""
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self.fd)
        if self.owner:
            os.fchown(fd, *self.owner)
        return fd

    def write_json(self, directory: int, name: str, value: Mapping[str, Any]) -> None:
        """By write and rename: a reader sees all of it or nothing."""
        promised = PromisedFile(self, directory, name)
        promised.reserve()
        promised.write(value)


class PromisedFile:
    """A file of JSON that comes to be by write and rename. ``size``: bytes it is given room for beforehand, so that a
    disk that fills up meanwhile can't refuse it. What is shorter than that, or than what was in the file before, is
    followed by blanks: to cut a file off costs ten times as much."""

    def __init__(self, state: StateDirectory, directory: int, name: str, size: int = 0) -> None:
        self._state = state
        self._directory = directory
        self._name = name
        self._size = size
        self._fd = -1
        self._before = 0

    def reserve(self) -> None:
        self._fd, self._before = self._state.create_or_reuse(self._directory, f".{self._name}.tmp")
        if self._before < self._size and os.write(self._fd, b" " * self._size) < self._size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._name)

    def write(self, value: Mapping[str, Any]) -> None:
        self.write_bytes(to_json(value).encode())

    def write_bytes(self, text: bytes) -> None:
        data = text.ljust(max(self._size, self._before))
        try:
            if os.pwrite(self._fd, data, 0) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._name)
        finally:
            os.close(self._fd)
            self._fd = -1
        os.rename(f".{self._name}.tmp", self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def drop(self) -> None:
        """There is nothing to say."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):
                os.unlink(f".{self._name}.tmp", dir_fd=self._directory)


def read_json(directory: int, name: str) -> dict[str, Any] | None:
    """The object in a file; None if the file isn't there. Raises ValueError if it holds anything else."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        data = b""
        while len(data) <= _LARGEST_FILE and (more := os.read(fd, _PIECE)):
            data = data + more if data else more
            if len(more) < _PIECE:
                break
    finally:
        os.close(fd)
    if len(data) > _LARGEST_FILE:
        raise ValueError(f"{name} is larger than {_LARGEST_FILE} bytes")
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return value


def exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def chown_tree(directory: int, uid: int, gid: int) -> None:
    """Gives the directory and all below it to ``uid``: no symlink is followed, no mount entered.

    A file with several names is left as it is: it may be the object of a mirror that a clone hard-linked, and then a
    job would get to own what other jobs read.
    """
    device = os.fstat(directory).st_dev
    at = os.dup(directory)
    try:
        left = _chown_entries(at, device, uid, gid)
        above: list[tuple[list[str], tuple[int, int]]] = []
        while left or above:
            if left:
                try:
                    below = os.open(left.pop(), _DIRECTORY, dir_fd=at)
                except PermissionError:  # not root, and shut by its owner
                    continue
                above.append((left, _identity(at)))
                os.close(at)
                at = below
                left = _chown_entries(at, device, uid, gid)
            else:
                # By "..", as a tree may be deeper than there are descriptors, or than Python calls itself.
                up = os.open("..", _DIRECTORY, dir_fd=at)
                os.close(at)
                at = up
                left, here = above.pop()
                if _identity(at) != here:
                    raise OSError(errno.ESTALE, "the tree was moved while it was walked")
    finally:
        os.close(at)
    os.fchown(directory, uid, gid)


def _chown_entries(at: int, device: int, uid: int, gid: int) -> list[str]:
    """Changes the owner of what is in a directory; returns the directories to go on with."""
    below = []
    for name in os.listdir(at):
        entry = os.stat(name, dir_fd=at, follow_symlinks=False)
        is_directory = stat.S_ISDIR(entry.st_mode)
        if entry.st_dev != device:
            continue
        if entry.st_uid != uid and (is_directory or entry.st_nlink == 1):
            os.chown(name, uid, gid, dir_fd=at, follow_symlinks=False)
        if is_directory:
            below.append(name)
    return below


class TooLarge(Exception):
    """A tree whose removal would take longer than was allowed; some of it is gone."""


class _Room:
    """How much may be removed: entries, none of them larger than ``_AT_ONCE_BYTES``. None: as much as there is."""

    def __init__(self, entries: int | None) -> None:
        self._left = entries

    def take(self, size: int) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0 or size > _AT_ONCE_BYTES:
                raise TooLarge


def remove_tree(parent: int, name: str, most: int | None = None) -> None:
    """Removes whatever has this name; nothing is followed. Idempotent. Raises TooLarge past ``most`` entries, or at a
    large file, where ``most`` is given.

    Directories are moved up to the top one by one and emptied there: so a tree may be as deep as a job can make it,
    with neither recursion nor a descriptor for each level.
    """
    room = _Room(most)
    try:
        top = _open_own(parent, name)
    except FileNotFoundError:
        return
    if top is None:
        room.take(os.stat(name, dir_fd=parent, follow_symlinks=False).st_size)
        os.unlink(name, dir_fd=parent)
        return
    prefix = f".{secrets.token_hex(8)}-"
    moved = 0
    try:
        while below := _unlink_entries(top, room):
            for each in below:
                directory = _open_own(top, each)
                assert directory is not None
                try:
                    for inner in _unlink_entries(directory, room):
                        moved += 1
                        os.rename(inner, f"{prefix}{moved}", src_dir_fd=directory, dst_dir_fd=top)
                finally:
                    os.close(directory)
                os.rmdir(each, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)


def _unlink_entries(directory: int, room: _Room) -> list[str]:
    """Removes what is no directory, and directories that are empty; returns the others, open for their owner."""
    below = []
    for name in os.listdir(directory):
        entry = os.stat(name, dir_fd=directory, follow_symlinks=False)
        room.take(entry.st_size)
        if not stat.S_ISDIR(entry.st_mode):
            os.unlink(name, dir_fd=directory)
            continue
        try:
            os.rmdir(name, dir_fd=directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _open_up(directory, name, entry)
            below.append(name)
    return below


def _open_own(parent: int, name: str) -> int | None:
    """A descriptor of a directory, opened for its owner before; None if it is something else."""
    entry = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISDIR(entry.st_mode):
        return None
    _open_up(parent, name, entry)
    return os.open(name, _DIRECTORY, dir_fd=parent)


def _open_up(parent: int, name: str, entry: os.stat_result) -> None:
    """Root needs no permissions; anyone else needs rwx on each directory of the tree to empty it."""
    if os.geteuid() != 0 and entry.st_uid == os.geteuid() and entry.st_mode & 0o700 != 0o700:
        # Between the look and the change nothing of the job's lives that could put a symlink here.
        os.chmod(name, 0o700, dir_fd=parent)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def say(text: str) -> None:
    """A line in the shepherd's own log."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with contextlib.suppress(OSError):
        os.write(2, f"{stamp} {text}\n".encode(errors="backslashreplace"))


def log_to(state: StateDirectory) -> None:
    """Sends stdout and stderr to ``shepherd.log``; one older log is kept when it has grown past 1 MiB."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(FileNotFoundError):
        if os.stat("shepherd.log", dir_fd=state.fd, follow_symlinks=False).st_size > _LARGEST_LOG:
            os.rename("shepherd.log", "shepherd.log.1", src_dir_fd=state.fd, dst_dir_fd=state.fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open("shepherd.log", flags, 0o600, dir_fd=state.fd)
    if state.owner:
        os.fchown(fd, *state.owner)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def log_is_full() -> bool:
    return os.fstat(2).st_size > _LARGEST_LOG
