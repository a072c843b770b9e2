"""Named points at which a daemon can be made to die or stop, for the tests of what happens then.

``BSUP_FAILPOINTS="claim-sent=kill:3,record-sent=kill"`` in the daemon's environment: at the third claim that was sent,
and at the first completion, the daemon kills itself (SIGKILL) or, with ``stop``, stops (SIGSTOP). Without it a point
costs the look at an empty set::

    if failpoints.ARMED:
        failpoints.hit("exited")

The lowest floor: the standard library only. ``arm`` is called by ``app`` alone, so only a daemon can be armed; ``hit``
and ``sent`` by whatever passes a point.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

VARIABLE: Final = "BSUP_FAILPOINTS"

POINTS: Final = {
    "resume-sent": "the session's take-up was sent, its commit is not known",
    "claim-sent": "a claim was sent, its commit is not known",
    "leased": "a lease is held, nothing of it is on disk",
    "prepared": "what is to be run is on disk, its start was not asked for",
    "spawned": "the start was asked for, its answer was not seen",
    "exited": "a step's end was seen, nobody was told",
    "record-sent": "a completion was sent, its commit is not known",
    "recorded": "the completion's commit is known, nothing is cleaned up",
}

_SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}

ON_THE_WAY: Final = 0.003
"""Seconds at most between sending something and the point: it is then anywhere on its way there or back."""

ARMED: frozenset[str] = frozenset()
"""The points at which something will happen."""

_left: dict[str, tuple[signal.Signals, int]] = {}


def arm(text: str) -> None:
    """Arms the points named in ``text``, as the variable holds it. Raises ValueError, and then changes nothing."""
    global ARMED
    left = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, action = word.partition("=")
        kind, _, count = action.partition(":")
        if name not in POINTS or kind not in _SIGNALS or (count and not (count.isdecimal() and int(count) > 0)):
            raise ValueError(f"{word!r} is not one of {', '.join(POINTS)} with =kill, =stop, =kill:N or =stop:N")
        left[name] = (_SIGNALS[kind], int(count or 1))
    _left.clear()
    _left.update(left)
    ARMED = frozenset(left)


def hit(name: str) -> None:
    """Passes a point: at the hit that was asked for the process gets its signal, and the point is armed no more."""
    global ARMED
    if name not in _left:
        return
    number, count = _left[name]
    if count > 1:
        _left[name] = number, count - 1
        return
    del _left[name]
    ARMED = frozenset(_left)
    os.kill(os.getpid(), number)


async def sent(name: str, request: Coroutine[Any, Any, T]) -> T:
    """``request``, which is sent when it is begun; the point is passed while it is on its way, at the latest when its
    answer is there."""
    task = asyncio.ensure_future(request)
    try:
        await asyncio.wait({task}, timeout=random.uniform(0.0, ON_THE_WAY))
        hit(name)
        return await task
    finally:
        task.cancel()
