"""Decisions with a reason: when to try again, when to restart, how long to wait, what still fits. No I/O, no clock.

Each takes what it needs (now, a random source, the history) and returns a value. May import the modules of this floor.
Called by the actors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from random import Random

import msgspec

from supervisor.model.job import Lease

BACKOFF_CAP = 600.0
"""Seconds: the longest wait between two attempts of a job."""


def jittered(seconds: float, rng: Random, spread: float = 0.2) -> float:
    """``seconds``, up to ``spread`` of it more or less, so that hosts started together do not ask together."""
    return seconds * (1.0 + spread * (2.0 * rng.random() - 1.0))


def patience(tries: int, rng: Random, *, base: float = 0.25, cap: float = 5.0) -> float:
    """Seconds to wait before try ``tries + 1`` of something that must succeed some day (``tries`` from 1).

    "Equal jitter": half of the doubled base is fixed, half random (AWS Architecture Blog, Exponential Backoff and
    Jitter), so it never spins and hosts spread out after an outage.
    """
    top = min(cap, base * 2.0 ** min(tries - 1, 30))
    return top / 2.0 + rng.random() * top / 2.0


class Retry(msgspec.Struct, frozen=True):
    """Whether a failed job is tried again: after ``delay`` seconds, or (None) not."""

    delay: float | None
    reason: str


def decide_retry(
    *, failures: int, attempts: int, backoff: float, rng: Random, may_retry: bool = True, cap: float = BACKOFF_CAP
) -> Retry:
    """``failures`` before this one, out of a budget of ``attempts``; ``backoff`` doubles with each failure, up to
    ``cap``.

    Jitter only ever shortens, by at most a quarter: the configured wait stays the longest a user sees.
    """
    if not may_retry:
        return Retry(None, "trying again would not help")
    used = failures + 1
    if used >= attempts:
        return Retry(None, f"attempt {used} of {attempts}")
    delay = min(cap, backoff * 2.0 ** min(failures, 30))
    return Retry(delay * (1.0 - 0.25 * rng.random()), f"attempt {used} of {attempts}")


class Intensity(msgspec.Struct, frozen=True):
    """At most ``restarts`` restarts within ``period`` seconds (Erlang's supervisor)."""

    restarts: int = 5
    period: float = 60.0


class Restart(msgspec.Struct, frozen=True):
    """Restart after ``delay`` seconds, or (None) escalate; ``history`` is what to pass the next time."""

    delay: float | None
    reason: str
    history: tuple[float, ...]


def decide_restart(history: Sequence[float], now: float, intensity: Intensity, rng: Random) -> Restart:
    """``history`` holds the times of restarts before. Fast at first, slower while they repeat."""
    recent = tuple(at for at in history if now - at < intensity.period)
    if len(recent) >= intensity.restarts:
        return Restart(None, f"{len(recent)} restarts within {intensity.period:g} s", recent)
    delay = 0.0 if not recent else patience(len(recent), rng, base=0.1, cap=2.0)
    reason = f"restart {len(recent) + 1} of {intensity.restarts} within {intensity.period:g} s"
    return Restart(delay, reason, (*recent, now))


def fence_time(sent: float, term: float, margin: float) -> float:
    """When the work of a session must have ended, counted from before the renewal was *sent* (boot-time clock).

    The database adds ``term`` to its own clock when the renewal arrives, which is later: so its expiry is never earlier
    than ``sent + term``, whatever the two clocks say, and ``margin`` is left for clocks that run apart and for the
    killing.
    """
    return sent + term - margin


class Capacity(msgspec.Struct, frozen=True):
    """What a host gives to jobs; None: not limited."""

    slots: int
    cpu: float | None = None
    memory: int | None = None


class Free(msgspec.Struct, frozen=True):
    """What is left of a ``Capacity``."""

    slots: int
    cpu: float | None
    memory: int | None


class Taken:
    """What the jobs that work now take together. ``cpu`` is summed exactly: no error adds up over a daemon's life."""

    __slots__ = ("_cpu", "alone", "jobs", "memory")

    def __init__(self, working: Iterable[Lease] = ()) -> None:
        self.jobs = 0
        self.alone = 0
        self.memory = 0
        self._cpu = Fraction()
        for lease in working:
            self.add(lease)

    @property
    def cpu(self) -> float:
        return float(self._cpu)

    def add(self, lease: Lease) -> None:
        self.jobs += 1
        self.alone += lease.alone
        self.memory += lease.memory
        if lease.cpu:
            self._cpu += Fraction(lease.cpu)

    def remove(self, lease: Lease) -> None:
        self.jobs -= 1
        self.alone -= lease.alone
        self.memory -= lease.memory
        if lease.cpu:
            self._cpu -= Fraction(lease.cpu)


def less(free: Free, leases: Iterable[Lease]) -> Free:
    """The room that is left once these are begun too; none where one of them runs alone."""
    slots, cpu, memory = free.slots, free.cpu, free.memory
    for lease in leases:
        slots = 0 if lease.alone else slots - 1
        cpu = None if cpu is None else cpu - lease.cpu
        memory = None if memory is None else memory - lease.memory
    return Free(max(0, slots), None if cpu is None else max(0.0, cpu), None if memory is None else max(0, memory))


def room_left(capacity: Capacity, taken: Taken) -> Free:
    """What ``taken`` leaves. A job that runs ``alone`` weighs all slots; nothing is ever below zero."""
    slots = capacity.slots - (taken.jobs - taken.alone) - taken.alone * capacity.slots
    cpu = None if capacity.cpu is None else max(0.0, capacity.cpu - taken.cpu)
    memory = None if capacity.memory is None else max(0, capacity.memory - taken.memory)
    return Free(max(0, slots), cpu, memory)


def serves(labels: frozenset[str], kinds: frozenset[str], *, kind: str, needed: Iterable[str]) -> bool:
    """Whether a host with these labels and kinds can run a job of ``kind`` that asks for ``needed`` labels."""
    return kind in kinds and labels.issuperset(needed)
