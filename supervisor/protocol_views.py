"""What the replies of the control socket are made of: jobs, attempts, pieces of logs, the daemon. No I/O.

May import ``model`` and msgspec. Known to all others as names of ``protocol``, which says in which reply each stands.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any

import msgspec

from supervisor.model.job import Outcome, Phase, State, StepState


class LogStream(enum.StrEnum):
    """What wrote a piece of a log; ``note`` is a remark of bsup itself, never part of the job's bytes."""

    OUT = "out"
    ERR = "err"
    NOTE = "note"


class Progress(msgspec.Struct, kw_only=True):
    """The step a job is at, counted from 1, of how many, and its name."""

    step: int
    steps: int
    name: str | None


class JobView(msgspec.Struct):
    """A job. Null: not known, or not (yet) so.

    phase is told by the host that runs the job, for its own jobs only. age is the time since it was submitted,
    duration that of its present or last run. attempt is the number of the last attempt (0: none yet), attempts how many
    there may be. failures, losses and releases count why it came back; run_at is when a waiting job becomes ready,
    parents_left how many jobs it waits for. reason says in a word why it ended (timeout, upstream, losses …), error in
    a sentence.
    """

    id: int
    name: str
    kind: str
    state: State
    exit_code: int | None = None
    signal: int | None = None
    phase: Phase | None = None
    progress: Progress | None = None
    host: str | None = None
    age: float | None = None
    duration: float | None = None
    revision: int | None = None
    generation: int | None = None
    attempt: int = 0
    attempts: int | None = None
    failures: int | None = None
    losses: int | None = None
    releases: int | None = None
    labels: list[str] = msgspec.field(default_factory=list)
    priority: int | None = None
    parents_left: int | None = None
    submitter: str | None = None
    submitted_at: datetime | None = None
    ready_at: datetime | None = None
    run_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    stop_asked_at: datetime | None = None
    lease: str | None = None
    error: str | None = None
    reason: str | None = None


class LineView(msgspec.Struct, omit_defaults=True):
    """A JobView as a brief list has it: what a line shows. Keys that are null, 0 or empty are left out."""

    id: int
    name: str
    kind: str
    state: State
    exit_code: int | None = None
    signal: int | None = None
    phase: Phase | None = None
    progress: Progress | None = None
    host: str | None = None
    age: float | None = None
    duration: float | None = None
    attempt: int = 0
    labels: list[str] | None = None
    parents_left: int = 0
    run_at: datetime | None = None
    reason: str | None = None


class StepView(msgspec.Struct, kw_only=True):
    """A step of an attempt. index counts from 0; bsup's own checkout step, if there is one, is the first."""

    index: int
    name: str
    state: StepState
    exit_code: int | None = None
    signal: int | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    duration: float | None = None
    error: str | None = None


class AttemptView(msgspec.Struct, kw_only=True):
    """One run of a job under one lease; outcome is null while it runs. log_bytes is the size of its stored log."""

    job: int
    attempt: int
    generation: int
    host: str
    lease: str
    outcome: Outcome | None
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    reason: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    duration: float | None = None
    log_bytes: int = 0
    steps: list[StepView] = msgspec.field(default_factory=list)


class LogPiece(msgspec.Struct, kw_only=True):
    """A piece of an attempt's log: base64 data that begins at offset. step is an index, step_name null if not known."""

    attempt: int
    offset: int
    step: int
    step_name: str | None
    stream: LogStream
    at: datetime
    data: bytes


class LogEnd(msgspec.Struct, kw_only=True):
    """All of an attempt's log that is asked for was sent.

    next_offset is where to go on reading. outcome, exit_code and signal are the attempt's (outcome null: it still runs,
    or that is not known yet); state is the job's, and null while the database is away.
    """

    attempt: int
    next_offset: int
    outcome: Outcome | None
    exit_code: int | None
    signal: int | None
    state: State | None


class DatabaseView(msgspec.Struct, kw_only=True):
    """What the daemon knows of its connection to the database, without asking it; since says when that became so."""

    available: bool
    since: datetime
    error: str | None
    server: str | None
    listening: bool
    round_trips: int
    last_round_trip: float | None


class SocketView(msgspec.Struct, kw_only=True):
    """The control socket itself: connections now, and what was refused or dropped since the start, by reason."""

    path: str
    connections: int
    calls: int
    refused: dict[str, int]


class StatusView(msgspec.Struct, kw_only=True):
    """This host's daemon. problems are sentences; none: all is well. actors holds each core actor's own facts."""

    ok: bool
    problems: list[str]
    host: str
    version: str
    pid: int
    started_at: datetime
    uptime: float
    running: int | None
    database: DatabaseView
    isolation: dict[str, str]
    socket: SocketView
    actors: dict[str, dict[str, Any]]


class ActorView(msgspec.Struct, kw_only=True):
    """An actor of the daemon; oldest is the age of the longest-waiting message, dropped counts those not taken."""

    name: str
    state: str
    restarts: int
    depth_control: int
    depth_data: int
    oldest: float
    handled: int
    dropped: int
