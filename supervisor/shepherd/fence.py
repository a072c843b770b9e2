"""Until when this host may work: the fence file, which the daemon writes after each renewal. Standard library only.

Called by ``host``: before each start, when the fence as last known has passed, and twice a second for the daemon's own
jobs. Those the daemon ends itself, and then writes ``confirmed_at``: one that has such jobs (the file's ``daemon``
part) and neither confirms nor renews in time is killed, as its host's jobs are about to be passed on.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from supervisor.shepherd import kill
from supervisor.shepherd.files import Refusal, StateDirectory, read_json, say
from supervisor.shepherd.loop import now

_NAME = "fence"
_SETTLED = 100_000_000
"""Nanoseconds after which a file's stamp tells it from the one that replaces it: a clock's tick is 10 ms at most."""


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@dataclass(frozen=True)
class Guarded:
    """A daemon that runs jobs in itself. ``patience``: seconds behind the fence in which it is to confirm."""

    pid: int
    start_time: int
    patience: float

    @property
    def lives(self) -> bool:
        return not kill.is_dead(self.pid) and kill.start_time(self.pid) == self.start_time

    def kill(self, service: int) -> None:
        """Only that very process, and only if it is the daemon's user's: the file is no way to kill anything else."""
        try:
            handle = os.pidfd_open(self.pid)
        except OSError:
            return
        try:
            # What is looked at now is what the handle holds: its number goes to no other process meanwhile.
            if self.lives and kill.uids(self.pid) == {service}:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        except OSError as error:
            say(f"fence: the daemon {self.pid} can't be killed: {error.strerror}")
        finally:
            os.close(handle)


class Fence:
    """``at``: CLOCK_BOOTTIME as last known to be good; None: no fence of this boot was ever seen.

    ``guarded``: the daemon that is to confirm that the fence was kept; None: it has no jobs of its own.
    """

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._boot_id = boot_id()
        self._seen: tuple[int, int] | None = None
        self.at: float | None = None
        self.guarded: Guarded | None = None
        self._confirmed_at = -math.inf

    @property
    def has_passed(self) -> bool:
        """By the file as it is now. One that is missing or unreadable changes nothing: the fence known before holds."""
        self._read()
        return self.at is not None and now() > self.at

    def check_start(self) -> None:
        """Raises Refusal unless the file is there, of this boot, and ahead: without it nothing would end the work."""
        if not self._read():
            raise Refusal("fence", "no fence of this boot is written: nothing may be started")
        if self.at is None or now() > self.at:
            raise Refusal("fence", "the fence has passed: this host's session is over until it is renewed")

    def overdue_at(self) -> float | None:
        """When a daemon with jobs of its own is to be killed, unless it renews or confirms; None: there is none."""
        self._read()
        if self.guarded is None or self.at is None or self._confirmed_at >= self.at:
            return None
        return self.at + self.guarded.patience

    def _read(self) -> bool:
        """Whether the file is there and good. Read anew only where it was replaced."""
        try:
            status = os.stat(_NAME, dir_fd=self._state.fd, follow_symlinks=False)
            seen = (status.st_ino, status.st_mtime_ns)
            if seen == self._seen:
                return True
            found = read_json(self._state.fd, _NAME)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            say(f"fence: can't be read: {error}")
            return False
        if found is None or found.get("boot_id") != self._boot_id:
            return False
        at = _number(found.get("fence_at"))
        if at is None:
            say("fence: fence_at is not a number")
            return False
        self.at = at
        self.guarded = _guarded(found.get("daemon"))
        self._confirmed_at = _number(found.get("confirmed_at")) or -math.inf
        self._seen = seen if time.time_ns() - status.st_mtime_ns > _SETTLED else None
        return True


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _guarded(found: Any) -> Guarded | None:
    if not isinstance(found, dict):
        return None
    pid, start_time, patience = found.get("pid"), found.get("start_time"), _number(found.get("patience"))
    if not isinstance(pid, int) or not isinstance(start_time, int) or pid <= 1 or patience is None:
        say("fence: the daemon's part is damaged")
        return None
    return Guarded(pid, start_time, patience)
