"""Where in the order of ready jobs a claim begins to look, in the midst of a long drain. No I/O; used by ``dispatch``.

While a transaction is held open somewhere (a backup), what was claimed stays in the index, dead: every claim from the
start walks over all that was claimed since. So after many leases in a row a claim begins where the last one ended, and
looks from there; jobs of a higher priority are found always. What came to lie behind that place (a job that was given
back, a submission that committed late) is found by the next claim from the start: after a second, after some claims,
and at once when fewer were found than asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

Key: TypeAlias = tuple[int, int]
"""Priority and job id: what lies after it has a lower priority, or the same and a higher id."""

START: Key = (256, 0)

LONG_DRAIN = 2000
"""Leases in a row, each claim filled, before it pays to begin anywhere but at the start."""
MOST_CLAIMS = 50
MOST_SECONDS = 1.0


class Place:
    """``scope``: what a place holds for (a session and its needs); with another one it is the start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._scope: object = None
        self._key = START
        self._leased = 0
        self._claims = 0
        self._since = 0.0

    def begin(self, scope: object) -> Key:
        """Where to begin now."""
        if scope != self._scope:
            self._scope, self._key, self._leased = scope, START, 0
        if self._leased < LONG_DRAIN or self._claims >= MOST_CLAIMS or self._clock() - self._since >= MOST_SECONDS:
            self._key, self._claims, self._since = START, 0, self._clock()
        return self._key

    def filled(self, count: int, last: Key) -> None:
        """A claim got the ``count`` that it asked for, the last one with this key."""
        self._leased += count
        self._claims += 1
        self._key = max(self._key, last, key=_order)

    def reset(self) -> None:
        """A claim got fewer than it asked for: all that is ready has been seen, or will be, from the start."""
        self._key, self._leased = START, 0


def _order(key: Key) -> Key:
    return -key[0], key[1]
