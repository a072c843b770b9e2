"""The seams between the actors and the outside: what each adapter promises. No I/O here.

May import ``model``. Actors see only these; ``app`` hands them the adapters that keep the promises.
Every method of ``Store`` raises ``StoreUnavailable`` when the database can't be reached or the outcome of a write is
unknown, and ``SessionRefused`` when it names a session or incarnation that no longer holds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, Protocol, TypeVar

import msgspec

from supervisor.model.attempt_words import Plan, StepEnd, StepPlan, StepTaken
from supervisor.model.job import (
    AttemptEnd,
    AttemptRow,
    EventRow,
    Filter,
    HostInfo,
    HostRow,
    JobLine,
    JobRow,
    Lease,
    LeaseId,
    LogChunk,
    LogRecord,
    Me,
    StepRecord,
    Stream,
)

T = TypeVar("T")

__all__ = [
    "DispatchStore",
    "Fence",
    "HandleInfo",
    "LogReader",
    "LogSink",
    "LogStore",
    "Need",
    "Notifier",
    "Plan",
    "Reaped",
    "Reload",
    "Renewal",
    "Room",
    "Runner",
    "SavedSession",
    "SessionFile",
    "SessionGrant",
    "SessionStore",
    "StepEnd",
    "StepPlan",
    "StepTaken",
    "StopOrder",
    "StopResult",
    "Store",
    "StoreHealth",
    "StoredLog",
    "UserStore",
    "Verdict",
    "answered",
]


class SessionGrant(msgspec.Struct, frozen=True):
    """A session opened or taken up. ``expires_in`` is the term in seconds, by the database's clock, from the
    statement."""

    me: Me
    expires_in: float


class StopOrder(msgspec.Struct, frozen=True):
    """A stop that a user asked for of a job this session runs."""

    lease: LeaseId
    job: int
    grace: float | None
    kill: bool
    by: str


class Renewal(msgspec.Struct, frozen=True):
    """What one renewal says: how many leases the session holds, the XOR of their counters, and the jobs to stop."""

    count: int
    checksum: int
    stops: list[StopOrder]


class Room(msgspec.Struct, frozen=True):
    """What a host can take now. ``slots`` free of ``slots_total``; ``cpu`` and ``memory`` free (None: not limited).

    ``needs`` are the ids of the interned (kind, label set) pairs this host can serve, the result of ``Store.needs``.
    """

    slots: int
    slots_total: int
    cpu: float | None
    memory: int | None
    needs: tuple[int, ...]


class Need(msgspec.Struct, frozen=True):
    """An interned pair of a kind and the labels it asks of a host."""

    id: int
    kind: str
    labels: tuple[str, ...]


class Verdict(msgspec.Struct, frozen=True):
    """What became of an ``AttemptEnd``: recorded (with the job's new state), or refused as the lease was gone."""

    lease: LeaseId
    recorded: bool
    state: str


class Reaped(msgspec.Struct, frozen=True):
    """What one pass of the reaper did."""

    requeued: int
    failed: int
    sessions: list[str]
    promoted: int
    reap_not_before: datetime | None


class StopResult(msgspec.Struct, frozen=True):
    """What a stop did: ``canceled`` at once (it was not running), ``stopping`` (its host was told); or the final state
    that the job had before, then ``is_over``."""

    job: int
    did: str
    is_over: bool = False


class StoredLog(msgspec.Struct, frozen=True):
    """A page of an attempt's stored log: decoded records from the asked offset on; ``complete``: nothing will
    follow."""

    records: list[LogRecord]
    complete: bool


class SessionStore(Protocol):
    """For the root actor, the keeper and the reaper."""

    async def open_session(self, host: HostInfo, term: float) -> SessionGrant: ...

    async def resume_session(
        self, session: str, incarnation: str, host: HostInfo, term: float, next_incarnation: str
    ) -> SessionGrant | None:
        """Compare-and-swap of the incarnation while the session's row exists and is not expired; None: begin a new one.

        ``next_incarnation`` is the caller's (32 hex digits, on its disk before the call): a swap whose answer was lost
        is found by naming it as ``incarnation``.
        """
        ...

    async def renew(self, me: Me, term: float, draining: bool) -> Renewal: ...

    async def stop_orders(self, me: Me) -> list[StopOrder]: ...

    async def leases(self, me: Me) -> list[Lease]:
        """Every lease the session holds, with all that is needed to take it up again."""
        ...

    async def close_session(self, me: Me) -> None:
        """Ends a session that holds no lease; leases left are released uncounted."""
        ...

    async def pulse(self, term: float) -> bool:
        """The database's sign of life → whether ``reap`` has anything to do."""
        ...

    async def reap(self, limit: int = 500) -> Reaped:
        """Takes expired sessions (re-checked under their lock), re-queues or fails their jobs; readies due waiting
        jobs."""
        ...

    async def sweep(self, retention: float, limit: int = 500) -> int:
        """Deletes jobs that ended more than ``retention`` seconds ago, and idle remains; returns how many jobs."""
        ...


class DispatchStore(Protocol):
    """For the dispatcher, on connections of its own."""

    async def needs(self, after: int) -> list[Need]: ...

    async def claim(self, me: Me, first_counter: int, room: Room) -> list[Lease]:
        """Leases ready jobs in order of priority and age into ``first_counter``, ``first_counter + 1`` …; [] if none
        fit."""
        ...

    async def set_idle(self, me: Me, idle: bool) -> None:
        """Says whether this host wants to be woken. After ``True`` claim once more before sleeping."""
        ...

    async def finish(self, me: Me, ends: Sequence[AttemptEnd]) -> list[Verdict]:
        """Ends attempts, one statement for all, fenced each by its lease. One that was recorded before answers
        recorded."""
        ...

    async def supersede(self, ends: Sequence[AttemptEnd]) -> None:
        """Keeps what the holder of a gone lease had, as a ``superseded`` attempt, where that attempt was written as
        lost."""
        ...

    async def record_steps(self, me: Me, steps: Sequence[tuple[LeaseId, StepRecord]]) -> None:
        """Progress of running attempts; rows whose lease is gone are passed over."""
        ...


class LogStore(Protocol):
    """For the log sink and for readers."""

    async def append_log(self, chunks: Sequence[LogChunk]) -> list[bool]:
        """Appends chunks in one statement. True: stored now or before; False: the lease is not, and was not, this
        attempt's."""
        ...

    async def log_size(self, job: int, attempt: int) -> int:
        """Log bytes stored so far (the offset at which the next chunk begins)."""
        ...

    async def read_log(self, job: int, attempt: int, offset: int, limit: int = 1 << 20) -> StoredLog: ...


class UserStore(Protocol):
    """For the control actor: what users ask."""

    async def submit(self, spec: dict[str, Any], *, key: str | None, after: Sequence[int], submitter: str) -> int: ...

    async def submit_many(
        self, specs: Sequence[dict[str, Any] | msgspec.Raw], *, key: str | None, submitter: str
    ) -> list[int]:
        """All or none; their ids, in order. An InvalidInput names the job: ``jobs[17].priority``."""
        ...

    def list_jobs(self, where: Filter) -> AsyncIterator[list[JobRow]]:
        """Newest first, in pages that a reader can hold."""
        ...

    def list_lines(self, where: Filter) -> AsyncIterator[list[JobLine]]:
        """As ``list_jobs``, with less of each."""
        ...

    async def show(self, job: int) -> tuple[JobRow, dict[str, Any], list[int], list[int]]:
        """The row, the spec (secrets masked), parents, children. Raises UnknownJob."""
        ...

    async def attempts(self, job: int) -> list[AttemptRow]: ...

    async def states(self, jobs: Sequence[int]) -> list[JobRow]:
        """The rows of these jobs, in the order of their ids; one unknown raises UnknownJob."""
        ...

    async def stop(self, jobs: Sequence[int], *, grace: float | None, kill: bool, by: str) -> list[StopResult]: ...

    async def retry(self, jobs: Sequence[int], *, by: str) -> list[JobRow]: ...

    async def delete(self, jobs: Sequence[int], *, by: str) -> int: ...

    async def hosts(self) -> list[HostRow]: ...

    async def events(self, after: int, limit: int = 500) -> list[EventRow]: ...

    async def last_event(self) -> int: ...


class StoreHealth(msgspec.Struct):
    """What the store knows of its own connection, without asking the database."""

    available: bool
    since: datetime
    error: str | None
    server: str | None
    listening: bool
    round_trips: int
    last_round_trip: float | None


class Store(SessionStore, DispatchStore, LogStore, UserStore, Protocol):
    """All of it, and the wake-ups: ``on_wake`` callbacks get the payload ('ready', 'stop', 'done', 'log')."""

    def health(self) -> StoreHealth: ...

    def on_wake(self, tell: Callable[[str], None]) -> Callable[[], None]: ...


class HandleInfo(msgspec.Struct, frozen=True):
    """Whose a handle on disk is, for one whose lease is gone: ``plan`` None where it was never prepared to the end."""

    job: int
    attempt: int
    plan: Plan | None


async def answered(answer: T | Awaitable[T]) -> T:
    """The answer of a call that may give it at once."""
    return await answer if isinstance(answer, Awaitable) else answer


class Runner(Protocol):
    """Runs attempts of one kind on this host. What ``survives`` the daemon is on disk under the lease's id.

    ``prepare``, ``start`` and ``discard`` may answer at once, without a coroutine: a short job then costs no task for
    them. ``tell`` callbacks are called on the event loop, once per step, with its end; they must not block.
    """

    @property
    def survives(self) -> bool:
        """Whether attempts outlive the daemon. Those that don't are released before a daemon leaves its jobs behind,
        and lost where one dies."""
        ...

    def prepare(self, lease: Lease) -> Plan | Awaitable[Plan]:
        """Makes the handle (intent on disk) and the workspace. Idempotent. Raises InvalidInput or RunnerError."""
        ...

    def start(self, lease: LeaseId, step: int, tell: Callable[[StepEnd], None]) -> datetime | Awaitable[datetime]:
        """Starts a step at most once; returns its start when ``started`` is on disk. Raises RunnerError."""
        ...

    async def adopt(self, lease: LeaseId, tell: Callable[[StepEnd], None]) -> list[StepTaken] | None:
        """After a restart: what became of the steps; the one that still runs tells its end later. None: no handle
        here. Raises HandleLost where there was one, and nothing of it runs."""
        ...

    async def stop(self, lease: LeaseId, grace: float, kill: bool) -> None:
        """Asks (SIGTERM), waits ``grace``, kills all that the job started; returns at once, the end comes by
        ``tell``."""
        ...

    def discard(self, lease: LeaseId) -> Awaitable[None] | None:
        """Removes workspace, handle and spool. Only after the attempt's end is known to be recorded."""
        ...

    async def handles(self) -> list[LeaseId]:
        """Every lease of which something is here."""
        ...

    async def describe(self, lease: LeaseId) -> HandleInfo | None:
        """Whose a handle is, from its own ``spec``; None where that can't be read."""
        ...

    async def sweep(self) -> list[str]:
        """Holds what outlives jobs on this host's disk within its bounds; a sentence for each thing removed. Raises
        RunnerError."""
        ...

    def isolation(self) -> dict[str, str]:
        """What holds jobs apart on this host, by name, in words ('own uid', 'absent: not root' …)."""
        ...


class LogSink(Protocol):
    """Takes the raw output of running attempts to disk (redacted), to PostgreSQL and to followers."""

    async def open(self, lease: Lease, plan: Plan) -> None:
        """Begins, or goes on with, an attempt's log."""
        ...

    def step_started(self, lease: LeaseId, step: int) -> None: ...

    def step_ended(self, lease: LeaseId, step: int) -> None:
        """All of the step's raw output is on disk now; the log flushes its tail."""
        ...

    async def note(self, lease: LeaseId, step: int, text: str) -> None:
        """Writes a line of bsup's own into the log (stream NOTE)."""
        ...

    async def complete(self, lease: LeaseId) -> int:
        """Waits until everything is redacted on disk and stored (or cut); returns the log's size in bytes. Retries for
        ever."""
        ...

    async def close(self, lease: LeaseId) -> None:
        """Stops following the attempt; the redacted copy stays within the host's budget, the raw spool may go."""
        ...

    def redact(self, lease: LeaseId, text: str) -> str:
        """A text with the host's own secrets replaced, and the attempt's where its log is open."""
        ...

    async def run(self) -> None:
        """What the sink does on its own (redact, store, wake followers), until canceled."""
        ...

    @property
    def backlog(self) -> int:
        """Log bytes on this host's disk that the database does not have yet."""
        ...

    def problems(self) -> list[str]:
        """Sentences for a user; empty when all is well."""
        ...


class LogReader(Protocol):
    """Reads an attempt's log wherever it is: this host's copy, else PostgreSQL."""

    def read(
        self,
        job: int,
        attempt: int,
        *,
        offset: int = 0,
        step: int | None = None,
        stream: Stream | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogRecord]:
        """Records in order from ``offset``; with ``follow`` until the attempt has ended and its log is complete."""
        ...


class HostRoom(Protocol):
    """Whether this host has what any job needs beyond what it asks for: room on its disk, open files."""

    def lacking(self) -> str | None:
        """What is short, in words; None: nothing is. Cheap, and without waiting: asked before each claim."""
        ...


class Fence(Protocol):
    """The fence file, outside the daemon."""

    def now(self) -> float:
        """Seconds of CLOCK_BOOTTIME."""
        ...

    async def write(self, fence_at: float) -> None:
        """Publishes ``fence_at`` (CLOCK_BOOTTIME) durably enough for the shepherd to read it."""
        ...


class SavedSession(msgspec.Struct, frozen=True):
    """The session this state directory held last. ``next_incarnation``: a swap was begun whose answer is not on disk.
    ``same_boot``: the machine has not booted since, so what ran then may still run. ``boot_epoch``: the first epoch of
    the boot that it was held in last; leases of an epoch before it are of another boot."""

    session: str
    incarnation: str
    next_incarnation: str | None
    epoch: int
    same_boot: bool
    boot_epoch: int = 0


class SessionFile(Protocol):
    """``session.json`` of the state directory, under the directory's lock."""

    async def load(self) -> SavedSession | None:
        """None: no session, or one of another machine or directory (a cloned image), which is set aside by this
        call."""
        ...

    async def save(self, me: Me, next_incarnation: str | None = None, boot_epoch: int = 0) -> None:
        """Written by rename and fsynced before it returns."""
        ...


class Notifier(Protocol):
    """Tells the service manager; inert where there is none."""

    def ready(self) -> None: ...

    def status(self, text: str) -> None: ...

    def stopping(self) -> None: ...

    def reloading(self) -> None: ...


Reload = Callable[[], Awaitable[dict[str, Any]]]
