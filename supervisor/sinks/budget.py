"""Keeps the local copies of ended attempts within this host's budget. Synchronous: runs in a thread.

May import ``model``. Called by the log book. A copy that goes is still in the database, up to the cap there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from supervisor.sinks.local import LocalCopy

_BELOW = 0.9
"""Deleted is down to this part of the budget, so that not every attempt's end walks the directory."""


class _Copy(NamedTuple):
    written_at: float
    size: int
    log: Path


def disk_size(path: str | Path) -> int:
    """Bytes on disk of a copy, its index included: many logs are short, and blocks are what fills a disk."""
    size = 0
    for suffix in (".log", ".idx"):
        with contextlib.suppress(FileNotFoundError):
            size += os.stat(f"{path}{suffix}").st_blocks * 512
    return size


def keep_within(logs: Path, runs: Path, budget: int, open_here: Collection[Path]) -> int:
    """Deletes the oldest ended copies until all take at most the budget; returns what they take then.

    Passed over: copies that are open, and those of a run that is still on disk and may be taken up again.
    """
    copies = []
    for log in logs.glob("*/*.log"):
        with contextlib.suppress(FileNotFoundError):
            copies.append(_Copy(log.stat().st_mtime, disk_size(log.with_suffix("")), log))
    total = sum(copy.size for copy in copies)
    if total <= budget:
        return total
    for copy in sorted(copies):
        if total <= budget * _BELOW:
            break
        path = copy.log.with_suffix("")
        if path in open_here or not _has_ended(path, runs):
            continue
        copy.log.with_suffix(".idx").unlink(missing_ok=True)
        copy.log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: other attempts of the job are kept
            copy.log.parent.rmdir()
        total -= copy.size
    return total


def _has_ended(path: Path, runs: Path) -> bool:
    copy = LocalCopy(path)
    if copy.is_closed():
        return True
    try:
        lease = copy.lease()
    except FileNotFoundError:
        return True
    return not lease or not (runs / lease).exists()
