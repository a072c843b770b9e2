"""The listening end of the control socket: made safely, taken over from a dead daemon, never from one that lives.

Standard library and ``model`` only. Called by the control actor. A lock file beside the socket (held as long as the
socket is) keeps two daemons from both finding it stale; the connect test finds any other program that listens there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Final

from supervisor.model.errors import BsupError, InvalidInput

BACKLOG: Final = 128
MAX_PATH: Final = 107
"""Bytes of a socket's path at most: what ``sockaddr_un`` holds, less its NUL."""


class SocketTaken(BsupError):
    """Another program listens on the path, or something that is not a socket lies there."""


class Listener:
    """A listening socket and the path it answers on. ``close`` removes the path if it is still this socket's."""

    def __init__(self, listening: socket.socket, path: str, lock: int | None) -> None:
        self.socket = listening
        self.path = path
        self._lock = lock
        self._made = None if lock is None else _identity(path)

    def close(self) -> None:
        self.socket.close()
        if self._lock is not None:
            if self._made is not None and _identity(self.path) == self._made:
                Path(self.path).unlink()
            os.close(self._lock)
            self._lock = None


def listen(path: str, mode: int = 0o666) -> Listener:
    """Listens on ``path``. Every user may connect by default: who may call what is decided by who the peer is.

    Raises SocketTaken, InvalidInput (the path is too long) or OSError (the directory can't be written).
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise InvalidInput("control.socket", f"{path!r} is too long for a socket", f"at most {MAX_PATH} bytes")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        _clear(path)
        # bind gives the path the mode of the socket's own inode: nobody gets in before the chmod.
        os.fchmod(listening.fileno(), 0)
        listening.bind(path)
        listening.listen(BACKLOG)
        Path(path).chmod(mode)
        return Listener(listening, path, lock)
    except BaseException:
        listening.close()
        os.close(lock)
        raise


def inherit(fd: int) -> Listener:
    """A socket that listens already, from the service manager, which keeps its path. ``fd`` stays open: an actor
    that is started again inherits it again."""
    os.set_inheritable(fd, False)
    try:
        listening = socket.socket(fileno=os.dup(fd))
    except OSError as error:
        raise InvalidInput("control.socket", f"file descriptor {fd} is not a socket: {error}") from None
    if listening.family != socket.AF_UNIX or not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listening.close()
        raise InvalidInput("control.socket", f"file descriptor {fd} is not a listening Unix socket")
    listening.setblocking(False)
    return Listener(listening, str(listening.getsockname()), None)


def _lock(path: str) -> int:
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise SocketTaken(f"another bsup daemon listens on {path}") from None
    return lock


def _clear(path: str) -> None:
    """Removes a socket that nobody listens on."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise SocketTaken(f"{path} exists and is not a socket: remove it, or set another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        answer = probe.connect_ex(path)
    if answer == errno.ECONNREFUSED:
        Path(path).unlink()
    elif answer != errno.ENOENT:
        # EAGAIN too: its backlog is full, so it lives.
        raise SocketTaken(f"another program listens on {path}")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
