"""Until when this host may work: the fence file, which the daemon writes after each renewal. Standard library only.

Called by ``host``: before each start, and when the fence as last known has passed.
"""

from __future__ import annotations

import math

from supervisor.shepherd.files import Refusal, StateDirectory, read_json, say
from supervisor.shepherd.loop import now


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


class Fence:
    """``at``: CLOCK_BOOTTIME as last known to be good; None: no fence of this boot was ever seen."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._boot_id = boot_id()
        self.at: float | None = None

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

    def _read(self) -> bool:
        try:
            found = read_json(self._state.fd, "fence")
        except (OSError, ValueError) as error:
            say(f"fence: can't be read: {error}")
            return False
        if found is None or found.get("boot_id") != self._boot_id:
            return False
        at = found.get("fence_at")
        if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
            say("fence: fence_at is not a number")
            return False
        self.at = float(at)
        return True
