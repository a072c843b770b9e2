"""A /tmp of its own for each workspace, by mount namespaces. Standard library only; called by ``spawn``.

To make a namespace and to take it down costs a third of a millisecond, so those of the last workspaces are kept: a
workspace that is used again, or has a next step, has one already. A namespace is a copy of the host's mounts, so when
those change, none is good any more; and as it holds its workspace's ``tmp``, no other directory can have its inode.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
from collections import OrderedDict

from supervisor.shepherd import linux

_MOST = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PrivateTmp:
    def __init__(self) -> None:
        self._host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._known: OrderedDict[tuple[int, int], int] = OrderedDict()
        table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._changes = select.poll()
        self._changes.register(table, select.POLLPRI)

    def enter(self, workspace: str) -> None:
        """From here on /tmp is the workspace's ``tmp``. The working directory is the root. Raises OSError."""
        if self._changes.poll(0):
            while self._known:
                self._forget()
        found = os.stat(f"{workspace}/tmp", follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(20, "is not a directory", f"{workspace}/tmp")
        key = found.st_dev, found.st_ino
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            linux.enter_mounts(known)
            return
        linux.own_mounts()
        _bind(workspace, key)
        self._known[key] = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        if len(self._known) > _MOST:
            self._forget()

    def leave(self) -> None:
        linux.enter_mounts(self._host)

    def _forget(self) -> None:
        _, namespace = self._known.popitem(last=False)
        os.close(namespace)


def problem() -> str | None:
    """Why this host can't give a step a /tmp of its own; None if it can. Tried in a child, at start."""
    if os.geteuid() != 0:
        return "not root"
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            linux.own_mounts()
            linux.bind(os.open("/tmp", os.O_PATH | os.O_CLOEXEC), "/tmp")
        except OSError as error:
            said = error.strerror or "mount failed"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read, "rb") as file:
        return file.read().decode() or None


def _bind(workspace: str, key: tuple[int, int]) -> None:
    """Binds the workspace's tmp to /tmp. A workspace that is itself below /tmp is shown again at its place."""
    opened = [os.open(workspace, _DIRECTORY)]
    try:
        opened.append(os.open("tmp", _DIRECTORY, dir_fd=opened[0]))
        top, tmp = opened
        found = os.fstat(tmp)
        if (found.st_dev, found.st_ino) != key:
            raise OSError(116, "was replaced", f"{workspace}/tmp")
        if workspace.startswith("/tmp/"):
            for name in workspace.split("/")[2:]:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o711, dir_fd=opened[-1])
                opened.append(os.open(name, _DIRECTORY, dir_fd=opened[-1]))
            linux.bind(top, f"/proc/self/fd/{opened[-1]}")
        linux.bind(tmp, "/tmp", recursive=True)
    finally:
        for fd in opened:
            os.close(fd)
