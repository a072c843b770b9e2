"""Where a running attempt stands: what it waits for, why it is ended from outside, its steps so far. Values only.

May import the modules of this floor. ``attempt`` moves it, the job actor holds it.
"""

from __future__ import annotations

import enum
from datetime import datetime

import msgspec

from supervisor.model.attempt_words import Plan, StepEnd
from supervisor.model.job import Phase, StepRecord, StepState


class Stage(enum.IntEnum):
    """What the attempt waits for, in order."""

    PREPARING = 0
    LAUNCHING = 1
    STEPPING = 2
    FLUSHING = 3
    TELLING = 4
    CLEANING = 5
    OVER = 6


# Read for every event of every job: a member of an enum takes several times as long to read as a global.
_STEPPING, _FLUSHING, _TELLING = Stage.STEPPING, Stage.FLUSHING, Stage.TELLING
_STEP_RUNNING, _STEP_SUCCEEDED = StepState.RUNNING, StepState.SUCCEEDED
_RUNNING = Phase.RUNNING


class Cause(enum.IntEnum):
    """Why an attempt is ended from outside; the greater one decides. NONE: it is not."""

    NONE = 0
    RELEASE = 1
    """The host drains: given back, uncounted."""
    STALL = 2
    """Its actor fell silent: given back, uncounted."""
    TIMEOUT = 3
    """The job's own timeout: a failure."""
    CRASH = 4
    """bsup's own fault: a failure, so that the budget of attempts bounds it."""
    FENCE = 5
    """The host could not renew in time: given back, uncounted, if the lease still lives."""
    LOST = 6
    """A process is gone without an exit record: a loss."""
    STOP = 7
    """A user asked: canceled."""
    LEASE_GONE = 8
    """Somebody else may run the job: nothing is recorded, what there is is kept as superseded."""


class AttemptState(msgspec.Struct, frozen=True, kw_only=True):
    """``current``: index in ``plan.steps`` of the step that was started, or is being started, and has not ended."""

    stage: Stage = Stage.PREPARING
    plan: Plan | None = None
    steps: tuple[StepRecord, ...] = ()
    current: int | None = None
    started_at: datetime | None = None
    cause: Cause = Cause.NONE
    cause_text: str = ""
    grace: float = 0.0
    kill: bool = False
    early: tuple[StepEnd, ...] = ()
    """Ends that came while the attempt was being taken up: it was read before as still running."""
    unsure: bool = False
    """Whether the current step was started at all is not known: the start gave no clear answer."""
    failed: bool = False
    retry: bool = True
    """Whether a failure may be tried again: not where the job itself is invalid."""
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    reason: str | None = None

    @property
    def is_alive(self) -> bool:
        """A process of it may run."""
        return self.stage < _FLUSHING

    @property
    def phase(self) -> Phase:
        if self.cause:
            return Phase.STOPPING
        return _RUNNING if self.stage else Phase.STARTING


def begun(plan: Plan, at: datetime) -> AttemptState:
    """What ``Prepared`` and ``StepStarted`` come to for a new attempt of one step without a timeout of the job's own:
    the rules in short, as most jobs of in-process kinds begin so, by thousands a second."""
    step = plan.steps[0]
    record = StepRecord(index=step.index, name=step.name, state=_STEP_RUNNING, started_at=at)
    return AttemptState(stage=_STEPPING, plan=plan, steps=(record,), current=0, started_at=at)


def succeeded(state: AttemptState, end: StepEnd) -> AttemptState | None:
    """What ``StepEnded`` comes to for an in-process attempt that nobody stopped and that succeeded; None for any
    other: then the rules are to be asked. Its end is to be told."""
    if end.exit_code != 0 or end.cause or state.cause or state.stage is not _STEPPING:
        return None
    if state.plan is None or not state.plan.in_process:
        return None
    record = msgspec.structs.replace(state.steps[0], state=_STEP_SUCCEEDED, exit_code=0, ended_at=end.ended_at)
    return msgspec.structs.replace(state, stage=_TELLING, current=None, steps=(record,))
