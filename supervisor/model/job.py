"""What a job, a lease, an attempt and a step are: plain values, no I/O.

May import msgspec and the other modules of this floor. Everything above uses these.
Times are UTC ``datetime``s by the database's clock unless a name ends in ``_boot`` (seconds of CLOCK_BOOTTIME on this
host); durations are seconds (float).
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any

import msgspec


class State(enum.StrEnum):
    """Where a job stands. See ``lifecycle`` for who moves it."""

    WAITING = "waiting"
    READY = "ready"
    RUNNING = "running"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_final(self) -> bool:
        return self in FINAL_STATES


FINAL_STATES = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELED})


class Phase(enum.StrEnum):
    """How far a running job is. Lives on its host, not in the database."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


class Outcome(enum.StrEnum):
    """How one attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    RELEASED = "released"
    LOST = "lost"
    SUPERSEDED = "superseded"


class StepState(enum.StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    SKIPPED = "skipped"
    UNKNOWN = "unknown"


class Stream(enum.IntEnum):
    """What wrote a piece of a log. NOTE is bsup's own remark (a cut, say): never part of the job's raw bytes."""

    OUT = 1
    ERR = 2
    NOTE = 3


class LeaseId(msgspec.Struct, frozen=True, order=True):
    """The fencing token: the session's random id (32 hex digits) and the claimer's own counter (never used twice)."""

    session: str
    counter: int

    def __str__(self) -> str:
        return f"{self.session}-{self.counter}"

    @property
    def epoch(self) -> int:
        """Which take-up of the session made it; see ``Me``."""
        return self.counter >> 32

    @classmethod
    def parse(cls, text: str) -> LeaseId:
        session, _, counter = text.rpartition("-")
        return cls(session, int(counter))


class Me(msgspec.Struct, frozen=True):
    """Who writes: every statement of a holder names its session and the incarnation (random, 32 hex digits) of its
    daemon.

    ``epoch`` rises by one at each take-up of the session; lease counters are ``epoch << 32 | n`` with n from 1, so
    no daemon
    of this session ever makes an id that another one made.
    """

    session: str
    incarnation: str
    epoch: int


class HostInfo(msgspec.Struct, frozen=True):
    """What a host says of itself when it opens or resumes its session. ``kinds``: those its daemon runs; jobs of them
    can be submitted from then on."""

    name: str
    labels: tuple[str, ...]
    slots: int
    cpu: float | None
    memory: int | None
    version: str
    machine_id: str
    boot_id: str
    pid: int
    kinds: tuple[str, ...] = ("steps",)


class Lease(msgspec.Struct, frozen=True):
    """One claimed job, with all that is needed to run it.

    ``spec`` is the job's canonical spec as stored (decode with ``model.spec.decode_spec``): without values of secrets.
    ``secrets`` (name → value) and ``redact`` (value → replacement) come from the table with grants of its own.
    ``attempt`` counts from 1 over the whole life of the job and belongs to this lease alone.
    ``failures`` and ``losses`` are counts before this attempt, in the present generation.
    """

    id: LeaseId
    job: int
    attempt: int
    kind: str
    name: str
    spec: msgspec.Raw
    secrets: dict[str, str]
    redact: dict[str, str]
    attempts: int
    failures: int
    losses: int
    leased_at: datetime
    cpu: float = 0.0
    memory: int = 0
    alone: bool = False


class StepRecord(msgspec.Struct, kw_only=True):
    """One step of an attempt as it is recorded. ``exit_code`` is 0–255; a step ended by a signal has ``signal`` and
    no exit_code.
    """

    index: int
    name: str
    state: StepState
    exit_code: int | None = None
    signal: int | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    error: str | None = None


class AttemptEnd(msgspec.Struct, kw_only=True):
    """What a holder says when its attempt is over. Texts are redacted already.

    ``outcome`` SUCCEEDED, FAILED or CANCELED ends the attempt; with FAILED, ``retry_delay`` (seconds) not None sends
    the
    job back to wait that long, None makes it final. RELEASED gives it back uncounted. LOST counts a loss (the
    process is gone
    without an exit record). The store, not the holder, turns a retry or a release into CANCELED when a stop was
    asked for.
    """

    lease: LeaseId
    job: int
    attempt: int
    outcome: Outcome
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    reason: str | None = None
    retry_delay: float | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    steps: list[StepRecord] = msgspec.field(default_factory=list)


class LogChunk(msgspec.Struct, frozen=True):
    """A run of log records of one attempt as stored: contiguous, append-only.

    ``offset`` is the position of its first byte in the attempt's redacted log (all steps and streams in order, notes
    included), ``length`` the number of log bytes it holds, ``data`` the zlib-compressed encoding of its records
    (``model.logs.encode_records``).
    """

    lease: LeaseId
    job: int
    attempt: int
    offset: int
    length: int
    data: bytes


class LogRecord(msgspec.Struct, frozen=True):
    """A piece of an attempt's redacted log: ``data`` begins at ``offset``, written at ``at`` (unix seconds) by
    ``stream`` of ``step``.
    """

    offset: int
    step: int
    stream: Stream
    at: float
    data: bytes


class JobRow(msgspec.Struct):
    """A job as lists show it. The store makes it from a row of the database, column by column: a list may have ten
    thousand, and keywords take ten times as long."""

    id: int
    name: str
    kind: str
    state: State
    revision: int
    generation: int
    priority: int
    labels: list[str]
    attempt: int
    attempts: int
    failures: int
    losses: int
    releases: int
    submitted_at: datetime
    submitter: str
    ready_at: datetime | None = None
    run_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    host: str | None = None
    lease: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    reason: str | None = None
    stop_asked_at: datetime | None = None
    parents_left: int = 0
    step: int | None = None
    step_name: str | None = None
    steps_total: int = 0


class JobLine(msgspec.Struct):
    """What a line of a list of jobs needs; made as JobRow is. ``labels``: of a job that is ready. ``age`` and
    ``duration`` (of its present or last run) are seconds."""

    id: int
    name: str
    kind: str
    state: State
    attempt: int
    labels: list[str] | None
    parents_left: int
    run_at: datetime | None
    age: float
    duration: float | None
    host: str | None
    exit_code: int | None
    signal: int | None
    reason: str | None
    step: int | None
    step_name: str | None
    steps_total: int


class AttemptRow(msgspec.Struct, kw_only=True):
    """An attempt as ``attempts`` and ``show`` tell it; one that runs has no outcome yet."""

    job: int
    attempt: int
    generation: int
    host: str
    lease: str
    outcome: Outcome | None
    exit_code: int | None
    signal: int | None
    error: str | None
    reason: str | None
    started_at: datetime | None
    ended_at: datetime | None
    log_bytes: int
    steps: list[StepRecord]


class EventRow(msgspec.Struct, kw_only=True):
    """A rare event of a job (stop, loss, release, retry, refusal …)."""

    id: int
    at: datetime
    job: int | None
    type: str
    detail: dict[str, Any]


class HostRow(msgspec.Struct, kw_only=True):
    """A session as ``hosts`` shows it."""

    name: str
    session: str
    version: str
    labels: list[str]
    slots: int
    leases: int
    state: str
    started_at: datetime
    renewed_at: datetime
    expires_at: datetime


class Filter(msgspec.Struct, kw_only=True, frozen=True):
    """What ``ps`` and the bulk commands select by. Empty means: every job that is not final, unless ``all``."""

    states: tuple[State, ...] = ()
    kinds: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    all: bool = False
    limit: int | None = None
