"""The words of an attempt: its plan, the events that happen to it, the effects its actor performs. Values only.

May import the modules of this floor. ``attempt`` decides with them, the job actor feeds the events and performs the
effects, runners and sinks get the plan (through ``ports``, which re-exports it).
"""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias

import msgspec

from supervisor.model.job import Outcome, StepRecord

# --- what a runner is told and tells ------------------------------------------------------------------------------


class StepPlan(msgspec.Struct, frozen=True):
    """One step of an attempt as the runner will run it. ``always``: runs even after a failure (not after a stop)."""

    index: int
    name: str
    always: bool = False
    timeout: float | None = None


class Plan(msgspec.Struct, frozen=True):
    """What an attempt consists of; index 0 may be bsup's own ``checkout`` step. ``timeout`` is the job's, in
    seconds. ``in_process``: its one step is a handler's run in the daemon, which has no record and no log of its
    own."""

    steps: tuple[StepPlan, ...]
    timeout: float | None
    in_process: bool = False


def limit_of(plan: Plan | StepPlan | None) -> str:
    """Its timeout, in words."""
    return "its limit" if plan is None or plan.timeout is None else f"{plan.timeout:g} s"


class StepEnd(msgspec.Struct, frozen=True):
    """How a step ended. ``cause``: why it was ended from outside: stop, timeout, fence; exec: it could not be started;
    gone: its process is gone without an exit record (a loss); invalid: trying it again would not help."""

    index: int
    exit_code: int | None
    signal: int | None
    started_at: datetime | None
    ended_at: datetime | None
    cause: str | None = None
    error: str | None = None


class StepTaken(msgspec.Struct, frozen=True):
    """What a restarted daemon finds on disk of a step: ended (``end``), or started and still with the shepherd.

    ``started_at`` is for people. ``age``: seconds since it was started, by a clock that nobody sets; None: not known.
    """

    index: int
    started_at: datetime | None
    end: StepEnd | None
    age: float | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How the attempt ended, before the policy of retries has its say (``may_retry``: it may)."""

    outcome: Outcome
    exit_code: int | None
    signal: int | None
    error: str | None
    reason: str | None
    may_retry: bool
    started_at: datetime | None
    ended_at: datetime | None
    steps: tuple[StepRecord, ...]


# --- events -------------------------------------------------------------------------------------------------------


class Prepared(msgspec.Struct, frozen=True):
    """The handle and the workspace are made and the log is open."""

    plan: Plan


class PrepareFailed(msgspec.Struct, frozen=True):
    """``invalid``: the job asks for what can't be (no use in trying again); else the host could not."""

    error: str
    invalid: bool = False


class Adopted(msgspec.Struct, frozen=True):
    """A new daemon took the attempt up: ``elapsed`` seconds since its first step began; ``rebooted``: nothing runs any
    more."""

    plan: Plan
    taken: tuple[StepTaken, ...]
    elapsed: float
    rebooted: bool


class NothingToAdopt(msgspec.Struct, frozen=True):
    """There is a lease but no handle: the attempt never began on this host; or, ``rebooted``, that is not known; or it
    was there and is ``lost``: why."""

    rebooted: bool = False
    lost: str | None = None


class StepStarted(msgspec.Struct, frozen=True):
    index: int
    at: datetime


class StartFailed(msgspec.Struct, frozen=True):
    """The host could not start a step (the shepherd is away, the disk is full)."""

    index: int
    error: str


class StepEnded(msgspec.Struct, frozen=True):
    end: StepEnd


class StopAsked(msgspec.Struct, frozen=True):
    """A user's stop. May come again, harder (``kill``, or a shorter ``grace``)."""

    grace: float
    kill: bool
    by: str


class Release(msgspec.Struct, frozen=True):
    """The host drains and its time is up."""

    grace: float
    kill: bool = False


class JobTimedOut(msgspec.Struct, frozen=True):
    grace: float


class Fenced(msgspec.Struct, frozen=True):
    """The fence has passed by this host's clock; the shepherd kills on its own."""


class LeaseGone(msgspec.Struct, frozen=True):
    """The database holds this lease no more."""


class Stalled(msgspec.Struct, frozen=True):
    """The actor before this one fell silent."""

    grace: float


class Crashed(msgspec.Struct, frozen=True):
    """The actor before this one, or one of its effects, raised what nobody foresaw."""

    error: str


class StopOverdue(msgspec.Struct, frozen=True):
    """A stop was asked for, and its time is over, and no end came."""


class LogCompleted(msgspec.Struct, frozen=True):
    """Everything the attempt wrote is redacted on disk and stored, or marked as cut."""


class Recorded(msgspec.Struct, frozen=True):
    """The store recorded the end, or keeps the attempt as superseded."""


class Refused(msgspec.Struct, frozen=True):
    """The store refused the end: the lease was gone."""


class CleanedUp(msgspec.Struct, frozen=True):
    pass


Event: TypeAlias = (
    Prepared
    | PrepareFailed
    | Adopted
    | NothingToAdopt
    | StepStarted
    | StartFailed
    | StepEnded
    | StopAsked
    | Release
    | JobTimedOut
    | Fenced
    | LeaseGone
    | Stalled
    | Crashed
    | StopOverdue
    | LogCompleted
    | Recorded
    | Refused
    | CleanedUp
)


# --- effects ------------------------------------------------------------------------------------------------------


class StartStep(msgspec.Struct, frozen=True):
    index: int


class StopRun(msgspec.Struct, frozen=True):
    """End all that the attempt runs, and look again after the grace."""

    grace: float
    kill: bool


class Inspect(msgspec.Struct, frozen=True):
    """Look on disk for what became of a step whose start gave no clear answer."""

    index: int


class AbandonPrepare(msgspec.Struct, frozen=True):
    """Give up on a preparation that hangs; it answers by ``PrepareFailed``."""


class Report(msgspec.Struct, frozen=True):
    """A step's progress, for the database and for whoever asks this host."""

    step: StepRecord


class ArmTimeout(msgspec.Struct, frozen=True):
    """The job's own timeout, from now."""

    seconds: float


class LogStepStarted(msgspec.Struct, frozen=True):
    index: int


class LogStepEnded(msgspec.Struct, frozen=True):
    index: int


class Note(msgspec.Struct, frozen=True):
    """A line of bsup's own in the log of a step."""

    index: int
    text: str


class CompleteLog(msgspec.Struct, frozen=True):
    pass


class Tell(msgspec.Struct, frozen=True):
    """Tell the dispatcher how it ended; ``superseded``: it is kept beside what somebody else recorded."""

    result: Result
    superseded: bool


class CleanUp(msgspec.Struct, frozen=True):
    pass


Effect: TypeAlias = (
    StartStep
    | StopRun
    | Inspect
    | AbandonPrepare
    | Report
    | ArmTimeout
    | LogStepStarted
    | LogStepEnded
    | Note
    | CompleteLog
    | Tell
    | CleanUp
)
