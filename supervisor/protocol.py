"""What is said on the control socket: every call's parameters and replies, and who may call it. No I/O.

May import ``model`` and msgspec. The control actor serves it, ``client`` and the command line speak it,
in the frames of ``framing``; ``varlink_idl`` draws the interface's text from ``METHODS``. Importing it must stay cheap
(the command line's start).

A method with ``more`` answers in a stream: one item a reply, each with ``continues``, then one last reply without
``continues`` that holds no item (or an error): so an empty list and one cut short can't be mistaken for one another.
Keys are kept for ever. Times are RFC 3339 in UTC, durations are seconds, an end by signal n has exit_code 128 + n.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final

import msgspec

from supervisor.model.job import EventRow, HostRow, State
from supervisor.protocol_views import ActorView as ActorView
from supervisor.protocol_views import AttemptView as AttemptView
from supervisor.protocol_views import DatabaseView as DatabaseView
from supervisor.protocol_views import JobView as JobView
from supervisor.protocol_views import LineView as LineView
from supervisor.protocol_views import LogEnd as LogEnd
from supervisor.protocol_views import LogPiece as LogPiece
from supervisor.protocol_views import LogStream as LogStream
from supervisor.protocol_views import Progress as Progress
from supervisor.protocol_views import SocketView as SocketView
from supervisor.protocol_views import StatusView as StatusView
from supervisor.protocol_views import StepView as StepView

INTERFACE: Final = "io.bsup.Supervisor"
SERVICE: Final = "org.varlink.service"
MAX_FRAME: Final = 1 << 20
"""Bytes of a call at most, its NUL not counted."""
MAX_REPLY: Final = 8 << 20
"""Bytes of a reply at most: a job's spec and its last attempts; everything longer is streamed."""
LOG_PIECE: Final = 64 << 10
"""Log bytes in one reply of ``Logs`` at most."""
SHOWN_ATTEMPTS: Final = 20
"""Attempts in the reply of ``Show`` at most, the last ones; ``Attempts`` streams all."""

Id = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Ids = Annotated[list[Id], msgspec.Meta(min_length=1, max_length=10_000)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=10 * 366 * 86400)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Role(enum.IntEnum):
    """What a peer may call; each holds what the one before it holds."""

    VIEWER = 1
    OPERATOR = 2
    ADMIN = 3


class Parameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of every call's parameters: a key that is not known is refused. Ours leave out what is as it is by default,
    so that a daemon of before takes what it knows."""


# --- the calls -----------------------------------------------------------------------------------------------------


class SubmitParams(Parameters):
    """Submits a job. spec is a job file's content.

    A key names the submission, so that repeating it changes nothing; the job waits until those of after succeeded.
    """

    spec: dict[str, Any]
    key: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    after: Annotated[list[Id], msgspec.Meta(max_length=10_000)] = msgspec.field(default_factory=list)


class SubmitReply(msgspec.Struct, kw_only=True):
    """id: the job's; with a key that was used before, that of the job submitted then."""

    id: int


class SubmitManyParams(Parameters):
    """Submits jobs, all or none. jobs are specs, each as in Submit.

    A key names the submission, so that repeating it with the same jobs changes nothing.
    """

    jobs: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=10_000)]
    key: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None


class SubmitManyReply(msgspec.Struct, kw_only=True):
    """ids: the jobs', in order; with a key that was used before, those of the jobs submitted then."""

    ids: list[int]


class ListParams(Parameters):
    """Jobs that have one of states, one of kinds and all of labels; without states and all, those not yet final.

    brief: each with what a line of a list shows, which takes half the time: id, name, kind, state, exit_code, signal,
    phase, progress, host, age, duration, attempt, parents_left, run_at, reason, and where it is ready labels. All other
    keys are left out, and of these, of partial and of notice those that are null, false, 0 or empty.
    """

    states: list[State] = msgspec.field(default_factory=list)
    kinds: list[str] = msgspec.field(default_factory=list)
    labels: list[str] = msgspec.field(default_factory=list)
    all: bool = False
    limit: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] | None = None
    brief: bool = False


class ListReply(msgspec.Struct):
    """partial: the database is away, only jobs that run on this host are told; notice says so in words."""

    job: JobView | None = None
    partial: bool = False
    notice: str | None = None


class BriefReply(msgspec.Struct, omit_defaults=True):
    """ListReply, of a brief list; as what a caller knows it by."""

    job: LineView | None = None
    partial: bool = False
    notice: str | None = None


class IdParams(Parameters):
    id: Id


class ShowParams(IdParams):
    """One job: its row, its spec (values of secrets masked), the jobs before and after it, its last attempts."""


class ShowReply(msgspec.Struct, kw_only=True):
    job: JobView
    spec: dict[str, Any]
    parents: list[int]
    children: list[int]
    attempts: list[AttemptView]


class AttemptsParams(IdParams):
    """Every attempt of a job, oldest first, with its steps."""


class AttemptsReply(msgspec.Struct, kw_only=True):
    attempt: AttemptView | None = None


class LogsParams(IdParams):
    """The log of an attempt (default: the last) from a byte offset on, of one step (name or index) or stream if named.

    follow waits for what comes until the attempt is over; with no attempt named, for the first one to begin, and goes
    on with later ones until the job is final. Each attempt ends with an item that has end instead of record.
    """

    attempt: Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)] | None = None
    step: str | None = None
    stream: LogStream | None = None
    offset: Count = 0
    follow: bool = False


class LogsReply(msgspec.Struct, kw_only=True):
    record: LogPiece | None = None
    end: LogEnd | None = None


class WaitParams(Parameters):
    """Tells each of these jobs when it is final; with any, ends after the first. Goes on while the database is away.

    The error Timeout comes after timeout seconds; null: waits for ever.
    """

    ids: Ids
    any: bool = False
    timeout: Seconds | None = None


class JobReply(msgspec.Struct, kw_only=True):
    job: JobView | None = None


class StopParams(Parameters):
    """Stops jobs: asks (SIGTERM), waits grace seconds (null: the host's default), kills all they started. kill: now.

    Works for jobs of this host while the database is away.
    """

    ids: Ids
    grace: Seconds | None = None
    kill: bool = False


class StopReply(msgspec.Struct, kw_only=True):
    """did: canceled (nothing of it runs), stopping (its host was told), unavailable; with is_over: the final state it
    had.

    unavailable: the database is away and it does not run here; nothing was done, and the call ends with
    StoreUnavailable. recorded: the database knows of the stop.
    """

    id: int | None = None
    did: str | None = None
    is_over: bool = False
    recorded: bool = True


class RetryParams(Parameters):
    """Opens a new generation of each of these jobs, which have ended; none is touched if one can't be."""

    ids: Ids


class DeleteParams(Parameters):
    """Deletes final jobs with their logs; none is touched if one can't be."""

    ids: Ids


class DeleteReply(msgspec.Struct, kw_only=True):
    deleted: int


class StatusParams(Parameters):
    """This host's daemon: what it does and what is wrong. Needs no database."""


class StatusReply(msgspec.Struct, kw_only=True):
    status: StatusView


class HostsParams(Parameters):
    """Every host that has a session in the database."""


class HostsReply(msgspec.Struct, kw_only=True):
    host: HostRow | None = None


class DrainParams(Parameters):
    """Takes no new job from now on. After deadline seconds what still runs is released uncounted (null: never).

    wait: answers when nothing runs here any more, or somebody resumed meanwhile.
    """

    wait: bool = False
    deadline: Seconds | None = None


class DrainReply(msgspec.Struct, kw_only=True):
    """running: the jobs that run here still."""

    running: int


class ResumeParams(Parameters):
    """Takes jobs again after a drain."""


class ResumeReply(msgspec.Struct, kw_only=True):
    pass


class ReloadParams(Parameters):
    """Reads the configuration again; changed tells what took effect."""


class ReloadReply(msgspec.Struct, kw_only=True):
    changed: dict[str, Any]


class EventsParams(Parameters):
    """Rare events (stops, losses, releases …) after the one of this id; null: with follow from now on, else all."""

    after: Count | None = None
    follow: bool = False


class EventsReply(msgspec.Struct, kw_only=True):
    event: EventRow | None = None


class ActorsParams(Parameters):
    """The daemon's actors: state, restarts, mailbox."""


class ActorsReply(msgspec.Struct, kw_only=True):
    actor: ActorView | None = None


class VersionParams(Parameters):
    """The daemon's version."""


class VersionReply(msgspec.Struct, kw_only=True):
    version: str
    interface: str
    python: str


class Method(msgspec.Struct, frozen=True):
    """A row of ``METHODS``. ``more``: it answers in a stream and must be called with ``more``."""

    params: type[Parameters]
    reply: type[msgspec.Struct]
    role: Role
    more: bool = False
    mutates: bool = False


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "Submit": Method(SubmitParams, SubmitReply, Role.OPERATOR, mutates=True),
        "SubmitMany": Method(SubmitManyParams, SubmitManyReply, Role.OPERATOR, mutates=True),
        "List": Method(ListParams, ListReply, Role.VIEWER, more=True),
        "Show": Method(ShowParams, ShowReply, Role.VIEWER),
        "Attempts": Method(AttemptsParams, AttemptsReply, Role.VIEWER, more=True),
        "Logs": Method(LogsParams, LogsReply, Role.VIEWER, more=True),
        "Wait": Method(WaitParams, JobReply, Role.VIEWER, more=True),
        "Stop": Method(StopParams, StopReply, Role.OPERATOR, more=True, mutates=True),
        "Retry": Method(RetryParams, JobReply, Role.OPERATOR, more=True, mutates=True),
        "Delete": Method(DeleteParams, DeleteReply, Role.ADMIN, mutates=True),
        "Status": Method(StatusParams, StatusReply, Role.VIEWER),
        "Hosts": Method(HostsParams, HostsReply, Role.VIEWER, more=True),
        "Drain": Method(DrainParams, DrainReply, Role.ADMIN, mutates=True),
        "Resume": Method(ResumeParams, ResumeReply, Role.ADMIN, mutates=True),
        "Reload": Method(ReloadParams, ReloadReply, Role.ADMIN, mutates=True),
        "Events": Method(EventsParams, EventsReply, Role.VIEWER, more=True),
        "Actors": Method(ActorsParams, ActorsReply, Role.VIEWER, more=True),
        "Version": Method(VersionParams, VersionReply, Role.VIEWER),
    }
)
