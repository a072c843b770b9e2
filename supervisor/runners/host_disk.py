"""Holds what outlives jobs on this host's disk within bounds: git mirrors, kept workspaces, state that was set aside.

Standard library, and its neighbours ``mirrors`` and ``session_file`` for their names. Synchronous: ``steps`` calls it
in a thread, about hourly.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from supervisor.runners.mirrors import lock_of
from supervisor.runners.session_file import FOREIGN

KEPT_MARK = ".bsup-kept"
"""A file in a workspace that outlives its job; its mtime is the job's end."""

_BELOW = 0.9
"""Trimmed is down to this part of the bound: a host at its bound doesn't make one mirror anew each hour."""


def remove_foreign(state: Path, moment: float) -> list[str]:
    """Removes what was set aside before ``moment`` of a state directory that this one was copied from.

    Raises OSError where another user's files are in it and this process may not remove them.
    """
    said = []
    for aside in sorted(state.glob(f"{FOREIGN}.*")):
        if aside.stat().st_ctime < moment:
            shutil.rmtree(aside)
            said.append(f"removed {aside.name}, what another host's session had left in this state directory")
    return said


class _Mirror(NamedTuple):
    used_at: float
    size: int
    path: Path


def mark_kept(workspace: Path) -> None:
    """Marks a workspace whose job has ended. The job may have put anything at the mark's place, a symlink to anywhere
    among it: that is mark enough, and gets the time of now, but is neither opened nor followed."""
    top = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            os.close(os.open(KEPT_MARK, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=top))
        except FileExistsError:
            os.utime(KEPT_MARK, dir_fd=top, follow_symlinks=False)
    finally:
        os.close(top)


def trim_mirrors(mirrors: Path, most: int) -> list[str]:
    """Removes the least recently used mirrors until all take at most ``most`` bytes on disk; a sentence for each.

    One that a checkout holds is passed over. So is one that can't be removed: the others still are.
    """
    for doomed in mirrors.glob("*.doomed"):  # a sweep that didn't come to its end
        shutil.rmtree(doomed, ignore_errors=True)
    found = sorted(_found(mirrors))
    total = sum(mirror.size for mirror in found)
    said = []
    if total > most:
        for mirror in found:
            if total <= most * _BELOW:
                break
            if _removed(mirror.path):
                total -= mirror.size
                said.append(f"removed the git mirror {mirror.path.name} ({mirror.size >> 20} MiB), the longest unused")
    for lock in mirrors.glob("*.lock"):
        mirror_path = lock.with_suffix(".git")
        if not mirror_path.exists():
            _removed(mirror_path)
    return said


def kept_since_before(work: Path, runs: Path, moment: float) -> list[Path]:
    """Workspaces that were kept, whose jobs ended before ``moment`` (Unix time).

    Never one whose run is still here: a job may have made the mark itself.
    """
    old = []
    for mark in work.glob(f"*/{KEPT_MARK}"):
        with contextlib.suppress(OSError):
            if mark.lstat().st_mtime < moment and not (runs / mark.parent.name).exists():
                old.append(mark.parent)
    return sorted(old)


def _found(mirrors: Path) -> list[_Mirror]:
    found = []
    for path in mirrors.glob("*.git"):
        used = lock_of(path)
        with contextlib.suppress(OSError):  # gone meanwhile
            used_at = (used if used.exists() else path).stat().st_mtime
            found.append(_Mirror(used_at, _disk_size(path), path))
    return found


def _disk_size(directory: Path) -> int:
    size = 0
    for where, _, names in os.walk(directory):
        for name in ("", *names):
            with contextlib.suppress(FileNotFoundError):
                size += os.lstat(os.path.join(where, name)).st_blocks * 512
    return size


def _removed(mirror: Path) -> bool:
    """Removes a mirror that nobody holds, and its lock file last: who waits for the lock sees that the file is gone."""
    path = lock_of(mirror)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Out of its name first: a mirror that is half removed must not be taken for a whole one.
        doomed = mirror.with_suffix(".doomed")
        with contextlib.suppress(FileNotFoundError):
            mirror.rename(doomed)
            shutil.rmtree(doomed)
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
