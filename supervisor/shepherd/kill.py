"""Finding and ending what a step started. Standard library only; called by ``step``, ``host`` and ``sweep``.

The shepherd is a subreaper: whatever its jobs fork, setsid and orphan stays a descendant of it, so it reads its own
descendants and not the machine's processes. A uid of the job's own is the sure way: ``kill(-1)`` as that uid takes all
at once, forks in flight included. Without one it is the process group, the tree, and for orphans the marks they carry.
"""

from __future__ import annotations

import contextlib
import os
import signal

_UNUSED_UID = 0xFFFFFFFE
_PIECE = 1 << 16
_PF_EXITING = 0x4


def children(pid: int) -> set[int]:
    """The live and unreaped children. The kernel's list may miss one while a sibling exits: it is read until it
    stays."""
    before: set[int] | None = None
    for _ in range(5):
        found = _read_children(pid)
        if found == before:
            break
        before = found
    return before or set()


def tree(roots: set[int]) -> set[int]:
    """The processes and all below them."""
    found: set[int] = set()
    open_ends = list(roots)
    while open_ends:
        pid = open_ends.pop()
        if pid not in found:
            found.add(pid)
            open_ends.extend(_read_children(pid))
    return found


def uids(pid: int) -> set[int]:
    """Real, effective, saved and file-system uid; empty for a process that is gone."""
    return {int(word) for word in _status(pid, b"Uid:")}


def start_time(pid: int) -> int:
    """Field 22 of /proc/pid/stat: with the boot id it tells a process from a later one of the same pid. 0: it is
    gone."""
    fields = stat(pid)
    return int(fields[19]) if fields else 0


def stat(pid: int) -> list[bytes]:
    """The fields of /proc/pid/stat from the third on (state, ppid, pgrp, session …); empty for a process that is
    gone."""
    data = _read(f"/proc/{pid}/stat")
    return data[data.rindex(b")") + 2 :].split() if data else []


def parent(pid: int) -> int:
    """0: it is gone."""
    fields = stat(pid)
    return int(fields[1]) if fields else 0


def session(pid: int) -> int:
    """A zombie has one still. 0: it is gone."""
    fields = stat(pid)
    return int(fields[3]) if fields else 0


def name_of(pid: int) -> str:
    """Empty: it is gone."""
    return _read(f"/proc/{pid}/comm").decode(errors="replace").rstrip("\n")


def is_dead(pid: int) -> bool:
    """Gone, or a zombie that waits for its parent."""
    fields = stat(pid)
    return not fields or fields[0] in (b"Z", b"X")


def is_exiting(pid: int) -> bool:
    """On its way out, or gone: it gets no new children."""
    fields = stat(pid)
    return not fields or bool(int(fields[6]) & _PF_EXITING)


def carries(pid: int, token: str) -> bool:
    """Whether the process was started with this BSUP_RUN in its environment."""
    return f"BSUP_RUN={token}".encode() in _read(f"/proc/{pid}/environ").split(b"\0")


def token_of(pid: int) -> str | None:
    for variable in _read(f"/proc/{pid}/environ").split(b"\0"):
        if variable.startswith(b"BSUP_RUN="):
            return variable[9:].decode(errors="replace")
    return None


def works_in(pid: int, workspace: str) -> bool:
    try:
        place = os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return False
    return place == workspace or place.startswith(workspace + "/")


def holds(pid: int, files: set[tuple[int, int]]) -> bool:
    """Whether it has one of these (device, inode) open."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for name in names:
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{name}")
            if (found.st_dev, found.st_ino) in files:
                return True
    return False


def send(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def send_group(leader: int, number: signal.Signals) -> None:
    """Only while the leader is not reaped: after that its number may be another's."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def send_uid(uid: int, numbers: tuple[signal.Signals, ...]) -> None:
    """To every process that may be signalled as ``uid``. The kernel says nothing of how many there were."""
    if uid <= 0 or os.geteuid() != 0:
        raise ValueError(f"uid {uid} is not a job's")
    try:
        pid = os.fork()
    except OSError:
        # A job has taken every process there may be (a fork bomb within the service's TasksMax, say): it must be ended
        # all the more. One by one, and called again until none is left.
        for number in numbers:
            send({each for each in processes() if uid in uids(each)}, number)
        return
    if pid == 0:
        try:
            os.setgroups([])
            try:
                # Real and saved uid are nobody's: so the job can't signal, and stop, the one who is to kill it.
                # Were they left at 0, kill(-1) would take every process of root's.
                os.setresuid(_UNUSED_UID, uid, _UNUSED_UID)
            except OSError:
                os.setresuid(uid, uid, uid)
            if 0 not in os.getresuid():
                for number in numbers:
                    os.kill(-1, number)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def _read_children(pid: int) -> set[int]:
    found: set[int] = set()
    if pid == os.getpid():
        threads = [str(pid)]  # this program has one
    else:
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            return found
    for thread in threads:
        path = f"/proc/{pid}/task/{thread}/children"
        found.update(int(word) for word in _read(path).split())
    if not found and not HAS_CHILDREN_FILE:
        found = {each for each in processes() if (fields := stat(each)) and int(fields[1]) == pid}
    return found


def processes() -> list[int]:
    """Every process of the machine that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _status(pid: int, field: bytes) -> list[bytes]:
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(field):
            return line[len(field) :].split()
    return []


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        data = os.read(fd, _PIECE)
        while len(data) % _PIECE == 0 and (more := os.read(fd, _PIECE)):
            data += more
        return data
    except OSError:
        return b""
    finally:
        os.close(fd)


HAS_CHILDREN_FILE = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
