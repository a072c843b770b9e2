"""What actors say to one another. No I/O; may import ``model``, ``mailbox`` and ``ports``. One closed set per receiver.

``Ask…`` messages are requests, with the type of their answer (``Mailbox.ask``); they come from the edge. All others are
told.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, TypeAlias

import msgspec

from supervisor.mailbox import Request
from supervisor.model.attempt_words import Crashed, Event, Release, Stalled
from supervisor.model.job import AttemptEnd, LeaseId, Me, Phase, StepRecord
from supervisor.model.policies import Capacity
from supervisor.ports import StopOrder


class RunningJob(msgspec.Struct, kw_only=True):
    """A job that this host runs, as its own actor tells it: known without the database."""

    job: int
    name: str
    kind: str
    lease: LeaseId
    attempt: int
    phase: Phase
    step: int | None
    step_name: str | None
    steps_total: int
    leased_at: datetime
    started_at: datetime | None
    stop_asked: bool
    waiting_for_store: bool


# --- to the dispatcher, asked by control -------------------------------------------------------------------------


class AskRunning(Request[list[RunningJob]], frozen=True):
    """→ list[RunningJob]"""


class AskStop(Request[list[int]], frozen=True):
    """Stop these jobs where they run here → list[int], the jobs found. grace None: the host's default."""

    jobs: tuple[int, ...]
    grace: float | None
    kill: bool
    by: str


class AskDrain(Request[None], frozen=True):
    """Take no new lease from now on; after ``deadline`` seconds (None: never) release what still runs → None."""

    deadline: float | None


class AskResume(Request[None], frozen=True):
    """Take leases again → None"""


class AskDetach(Request[None], frozen=True):
    """Take no new lease, for good: the daemon is about to go, its jobs stay. Those that can't outlive it are stopped
    and given back → None, once none is left."""


class Status(msgspec.Struct, kw_only=True):
    """An actor's answer to AskStatus. ``problems`` are sentences for a user, empty when all is well."""

    facts: dict[str, Any]
    problems: list[str]


class AskStatus(Request[Status], frozen=True):
    """→ Status: what an actor says of itself; asked of every core actor."""


class ActorInfo(msgspec.Struct, kw_only=True):
    """A line of ``bsup actors``."""

    name: str
    state: str
    restarts: int
    depth_control: int
    depth_data: int
    oldest: float
    handled: int
    dropped: int


# --- to the root, asked by control -------------------------------------------------------------------------------


class AskActors(Request[list[ActorInfo]], frozen=True):
    """→ list[ActorInfo]"""


# --- told to a job's actor ----------------------------------------------------------------------------------------


class Beat(msgspec.Struct, frozen=True):
    """The keeper's heartbeat; a job's actor answers ``JobAlive``."""


class JobStart(msgspec.Struct, frozen=True):
    """How an actor begins. ``adopt``: a handle is on disk (a daemon or an actor before this one made it); ``rebooted``:
    the machine was booted since. ``doom``: why the attempt is to be ended at once."""

    adopt: bool = False
    rebooted: bool = False
    doom: Stalled | Crashed | Release | None = None


JobMessage: TypeAlias = Event | Beat


# --- told to the dispatcher ---------------------------------------------------------------------------------------


class Woken(msgspec.Struct, frozen=True):
    """The store was told that something changed: ``ready`` (the dispatcher), ``stop`` (the keeper)."""

    payload: str


class SessionOpened(msgspec.Struct, frozen=True):
    """The keeper holds a session and wrote its fence: reconcile, then claim. ``boot_epoch``: the machine was booted
    since leases of an epoch before it were taken, so no process of theirs is left. ``me.epoch`` was never told
    before."""

    me: Me
    boot_epoch: int


class SessionGone(msgspec.Struct, frozen=True):
    """There is no session: end all work at once, then tell the keeper ``WorkEnded``."""


class Renewed(msgspec.Struct, frozen=True):
    """The session's leases as a renewal that was sent at ``sent`` (the loop's clock) counted them."""

    me: Me
    count: int
    checksum: int
    sent: float


class StopOrders(msgspec.Struct, frozen=True):
    orders: tuple[StopOrder, ...]


class FencePassed(msgspec.Struct, frozen=True):
    """By this host's boot-time clock the fence is over: whatever runs is being killed."""


class ReleaseAll(msgspec.Struct, frozen=True):
    """Stop every job and give it back; ``kill``: without grace."""

    kill: bool


class Drain(msgspec.Struct, frozen=True):
    """As ``AskDrain``, from the root; when nothing is left the root is told ``Drained``."""

    deadline: float | None


class Reconfigure(msgspec.Struct, frozen=True):
    """What the host gives and serves from now on."""

    capacity: Capacity
    labels: tuple[str, ...]
    poll: float
    grace: float


class JobMoved(msgspec.Struct, frozen=True):
    """How far a job is. ``alive``: a process of it may run; ``steps``: the records that changed, for the database."""

    lease: LeaseId
    phase: Phase
    alive: bool
    stop_asked: bool
    current: int | None
    current_name: str | None
    steps_total: int
    started_at: datetime | None
    steps: tuple[StepRecord, ...] = ()


class JobOver(msgspec.Struct, frozen=True):
    """An attempt's end, to be recorded; ``superseded``: its lease is gone, it is only kept."""

    end: AttemptEnd
    superseded: bool


class JobAlive(msgspec.Struct, frozen=True):
    lease: LeaseId


DispatcherMessage: TypeAlias = (
    Woken
    | SessionOpened
    | SessionGone
    | Renewed
    | StopOrders
    | FencePassed
    | ReleaseAll
    | Drain
    | Reconfigure
    | Beat
    | JobMoved
    | JobOver
    | JobAlive
)


# --- told to the keeper -------------------------------------------------------------------------------------------


class DispatcherUp(msgspec.Struct, frozen=True):
    """A dispatcher begins and knows nothing: it needs a session, of an epoch never told before."""


class WorkEnded(msgspec.Struct, frozen=True):
    """No process of any job runs on this host any more (the answer to ``SessionGone``)."""


class Refused(msgspec.Struct, frozen=True):
    """The store refused this session and incarnation."""

    me: Me


class Draining(msgspec.Struct, frozen=True):
    """Whether the host takes new leases, for ``hosts``."""

    on: bool


class AskLastRenewal(Request[bool], frozen=True):
    """Renew once more, now; then no more → whether it succeeded. For a daemon that leaves its jobs running."""


class AskCloseSession(Request[bool], frozen=True):
    """End the session → whether the store did. For a daemon that leaves no job behind."""


KeeperMessage: TypeAlias = Woken | DispatcherUp | WorkEnded | Refused | Draining


# --- told to the reaper -------------------------------------------------------------------------------------------


ReaperMessage: TypeAlias = Woken


# --- told to the root ---------------------------------------------------------------------------------------------


class Terminate(msgspec.Struct, frozen=True):
    """A service manager or a user wants the daemon to go; told again, jobs are stopped, and again, killed.
    ``detach``: leave the jobs running for the daemon after this one; else drain."""

    detach: bool


class ReloadAsked(msgspec.Struct, frozen=True):
    """SIGHUP."""


class Reconciled(msgspec.Struct, frozen=True):
    """Host and database agree about what runs here; jobs are being claimed."""


class Drained(msgspec.Struct, frozen=True):
    """Draining, and nothing runs, and every end is recorded. ``clean``: the host holds a session and was reconciled, so
    this is true of the database too."""

    clean: bool


RootMessage: TypeAlias = Terminate | ReloadAsked | Reconciled | Drained | Reconfigure
