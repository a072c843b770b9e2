"""What runs on this host, as the dispatcher knows it: values and sums, no waiting, no I/O.

Part of the dispatcher, which alone changes it. May import the seams and model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from supervisor.mailbox import Mailbox, Turns
from supervisor.messages import JobMessage, JobMoved, JobStart, RunningJob
from supervisor.model.job import AttemptEnd, Lease, LeaseId, Phase
from supervisor.model.policies import Capacity, Free, Taken, room_left


class Owner(msgspec.Struct, frozen=True):
    """What a job's actor lives on: ``tasks`` own what takes time, ``turns`` serve its mailbox."""

    tasks: asyncio.TaskGroup
    turns: Turns


class JobRun(Protocol):
    """A job's actor, as far as the dispatcher knows one."""

    @property
    def mailbox(self) -> Mailbox[JobMessage]: ...

    def begin(self, owner: Owner, on_over: Callable[[Exception | None], None]) -> bool: ...

    def abandon(self) -> None: ...


MakeJob = Callable[[Lease, JobStart], JobRun]


class Held:
    """One lease and its actor. Two facts that end apart: ``alive`` (a process of it may run, it takes room here) and
    ``in_database`` (its lease is there, as far as this host knows)."""

    __slots__ = ("actor", "alive", "begun", "crashes", "end", "heard", "in_database", "lease", "moved", "suspect")

    def __init__(self, lease: Lease, actor: JobRun) -> None:
        self.lease = lease
        self.actor = actor
        self.begun = False
        """Whether it ran as soon as it was taken; what comes after that is told by its actor."""
        self.moved: JobMoved | None = None
        self.alive = True
        """Set through ``Ledger.set_alive`` only, which keeps the sums."""
        self.in_database = True
        self.end: AttemptEnd | None = None
        self.heard: float | None = None
        """When its actor gave its last sign of life; None: no beat has asked for one yet."""
        self.crashes = 0
        self.suspect = False
        """Missed by one reconciliation; a second one in a row makes it gone."""

    def view(self, *, waiting_for_store: bool) -> RunningJob:
        lease, moved = self.lease, self.moved
        begun = Phase.RUNNING if self.begun else Phase.STARTING
        return RunningJob(
            job=lease.job,
            name=lease.name,
            kind=lease.kind,
            lease=lease.id,
            attempt=lease.attempt,
            phase=begun if moved is None else moved.phase,
            step=None if moved is None else moved.current,
            step_name=None if moved is None else moved.current_name,
            steps_total=0 if moved is None else moved.steps_total,
            leased_at=lease.leased_at,
            started_at=moved.started_at if moved is not None else lease.leased_at if self.begun else None,
            stop_asked=moved is not None and moved.stop_asked,
            waiting_for_store=waiting_for_store and self.end is not None,
        )


class Ledger:
    """Every lease held, by id, and the sums of what the living take: no look at the host's room walks all jobs."""

    def __init__(self) -> None:
        self._held: dict[LeaseId, Held] = {}
        self._taken = Taken()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def __contains__(self, lease: LeaseId) -> bool:
        return lease in self._held

    def get(self, lease: LeaseId) -> Held | None:
        return self._held.get(lease)

    def add(self, held: Held) -> None:
        """In place of one with the same lease, if there is one."""
        self.remove(held.lease.id)
        self._held[held.lease.id] = held
        if held.alive:
            self._taken.add(held.lease)

    def remove(self, lease: LeaseId) -> None:
        held = self._held.pop(lease, None)
        if held is not None and held.alive:
            self._taken.remove(held.lease)

    def set_alive(self, held: Held, alive: bool) -> bool:
        """Whether that is a change."""
        if held.alive is alive:
            return False
        held.alive = alive
        if self._held.get(held.lease.id) is held:
            (self._taken.add if alive else self._taken.remove)(held.lease)
        return True

    def ids(self) -> set[LeaseId]:
        return set(self._held)

    def alive(self) -> int:
        return self._taken.jobs

    def free(self, capacity: Capacity) -> Free:
        """What may be claimed. A job whose processes ended gives its room back before its end is recorded, but not
        without bound: while the store is slow, at most as many ends again as there are slots (and a few) may be under
        way."""
        free = room_left(capacity, self._taken)
        bound = 2 * capacity.slots + 16 - len(self._held)
        return Free(max(0, min(free.slots, bound)), free.cpu, free.memory)

    def sum(self, session: str) -> tuple[int, int]:
        """Count, and XOR of the counters, of the leases of ``session`` that should be in the database."""
        count = checksum = 0
        for held in self._held.values():
            if held.in_database and held.lease.id.session == session:
                count += 1
                checksum ^= held.lease.id.counter
        return count, checksum
