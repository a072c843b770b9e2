"""A running attempt of a steps-like job, as ``(state, event) -> (state, effects)``. No I/O, no clock.

The rules:

- Order: prepare, open the log, steps one after the other, complete the log, tell the end, clean up. The end is told
  only when the log is complete; the clean-up follows only when the end is known to be recorded (or kept as superseded).
- After a step failed, the steps left are skipped but for ``always`` ones. The attempt's exit code is that of the first
  step that failed.
- After anything that ends the attempt from outside (``Cause``), no step is started any more, ``always`` or not: whoever
  asked for the end wants the host's resources back. If nothing was left to start and the step that ran had ended by
  itself, the attempt's natural outcome stands.
- Of several causes the greatest ``Cause`` decides, in whatever order they came. A cause only ever rises.
- An attempt is never called over while a step may still run: a stop that brings no end is repeated as a kill, for ever.

An event that the state does not foresee (a second end of a step, a late answer) changes nothing and has no effect:
events come from adapters and timers that race. May import the modules of this floor. Called by the job actor; ``ports``
re-exports the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeAlias

import msgspec

from supervisor.model.attempt_state import AttemptState, Cause, Stage
from supervisor.model.attempt_words import (
    AbandonPrepare,
    Adopted,
    ArmTimeout,
    CleanedUp,
    CleanUp,
    CompleteLog,
    Crashed,
    Effect,
    Event,
    Fenced,
    Inspect,
    JobTimedOut,
    LeaseGone,
    LogCompleted,
    LogStepEnded,
    LogStepStarted,
    Note,
    NothingToAdopt,
    Plan,
    Prepared,
    PrepareFailed,
    Recorded,
    Refused,
    Release,
    Report,
    Result,
    Stalled,
    StartFailed,
    StartStep,
    StepEnd,
    StepEnded,
    StepPlan,
    StepStarted,
    StepTaken,
    StopAsked,
    StopOverdue,
    StopRun,
    Tell,
    limit_of,
)
from supervisor.model.job import Outcome, StepRecord, StepState

# Read for every event of every job: a member of an enum takes several times as long to read as a global.
_PREPARING, _LAUNCHING, _STEPPING, _FLUSHING, _TELLING, _CLEANING, _OVER = Stage
_PENDING, _RUNNING, _SUCCEEDED = StepState.PENDING, StepState.RUNNING, StepState.SUCCEEDED
_CANCELED = StepState.CANCELED

_FENCED = "ended at the fence: the host could not renew its lease in time"
_SUPERSEDED = "superseded: the lease is gone"
_REBOOTED = "the machine was booted meanwhile"

Next: TypeAlias = tuple[AttemptState, list[Effect]]

_replace = msgspec.structs.replace


def advance(state: AttemptState, event: Event) -> Next:
    """The state after ``event``, and what to do now, in order."""
    return RULES[type(event)](state, event)


def result_of(state: AttemptState) -> Result:
    """The result as the state stands: the cause from outside, if one decided, else what the steps say."""
    outcome, reason = _OUTCOMES[state.cause]
    if not state.cause and state.failed:
        outcome, reason = Outcome.FAILED, state.reason
    is_success = outcome is _SUCCESS
    ended_at: datetime | None = None
    for step in state.steps:
        if step.ended_at is not None and (ended_at is None or step.ended_at > ended_at):
            ended_at = step.ended_at
    return Result(
        outcome=outcome,
        exit_code=state.exit_code if state.failed else (0 if is_success else None),
        signal=state.signal if state.failed else None,
        error=state.cause_text or state.error,
        reason=reason,
        may_retry=not is_success and outcome is Outcome.FAILED and state.retry,
        started_at=state.started_at,
        ended_at=ended_at,
        steps=() if _is_in_process(state) else state.steps,
    )


_SUCCESS = Outcome.SUCCEEDED
_OUTCOMES: tuple[tuple[Outcome, str | None], ...] = tuple(
    {
        Cause.NONE: (Outcome.SUCCEEDED, None),
        Cause.RELEASE: (Outcome.RELEASED, "drain"),
        Cause.STALL: (Outcome.RELEASED, "stall"),
        Cause.TIMEOUT: (Outcome.FAILED, "timeout"),
        Cause.CRASH: (Outcome.FAILED, "internal"),
        Cause.FENCE: (Outcome.RELEASED, "fence"),
        Cause.LOST: (Outcome.LOST, "gone"),
        Cause.STOP: (Outcome.CANCELED, "stop"),
        Cause.LEASE_GONE: (Outcome.SUPERSEDED, "lease"),
    }[cause]
    for cause in Cause
)


# --- the parts ----------------------------------------------------------------------------------------------------


def _on_prepared(state: AttemptState, event: Prepared) -> Next:
    plan = event.plan
    if state.stage is not _PREPARING:
        return state, []
    steps = tuple([StepRecord(index=s.index, name=s.name, state=_PENDING) for s in plan.steps])
    ready = _replace(state, plan=plan, steps=steps, stage=_LAUNCHING)
    effects: list[Effect] = []
    if state.cause:
        return _flush(ready)
    if plan.timeout is not None:
        effects.append(ArmTimeout(plan.timeout))
    return _onward(ready, effects)


def _on_prepare_failed(state: AttemptState, event: PrepareFailed) -> Next:
    error, invalid = event.error, event.invalid
    if state.stage is not _PREPARING:
        return state, []
    reason = "invalid" if invalid else "host"
    failed = _replace(state, failed=True, error=error, reason=reason, retry=not invalid)
    return _flush(failed)


def _on_adopted(state: AttemptState, event: Adopted) -> Next:
    """Replays what is on disk: ends in order, then the step that still runs, then goes on as if nothing had been."""
    if state.stage is not _PREPARING:
        return state, []
    plan = event.plan
    steps = tuple(StepRecord(index=s.index, name=s.name, state=_PENDING) for s in plan.steps)
    state = _replace(state, plan=plan, steps=steps, stage=_LAUNCHING)
    effects: list[Effect] = []
    if plan.timeout is not None and not state.cause:
        effects.append(ArmTimeout(max(0.0, plan.timeout - event.elapsed)))
    running: StepTaken | None = None
    early = {end.index: end for end in state.early}
    for taken in sorted(event.taken, key=lambda t: t.index):
        position = _position(plan, taken.index)
        if position is None:
            continue
        if state.started_at is None:
            state = _replace(state, started_at=taken.started_at)
        end = taken.end or early.get(taken.index)
        if end is None:
            running = taken
            continue
        state = _ended_step(_replace(state, current=position), end)
        if not plan.in_process:
            effects += [LogStepStarted(taken.index), LogStepEnded(taken.index), Report(state.steps[position])]
    if running is not None and event.rebooted:
        gone = StepEnd(running.index, None, None, running.started_at, None, "gone", _REBOOTED)
        state = _ended_step(_replace(state, current=_position(plan, running.index)), gone)
        if not plan.in_process:
            effects += [LogStepStarted(running.index), LogStepEnded(running.index)]
        running = None
    if running is None:
        if event.rebooted and _next_step(state) is not None:
            # Also where no step seems to have begun: what was written of it, and what it did, may not have been synced.
            state = _caused(state, Cause.LOST, _REBOOTED)
        return _onward(state, effects)
    position = _position(plan, running.index)
    assert position is not None
    record = _replace_step(state.steps[position], state=_RUNNING, started_at=running.started_at)
    state = _replace(state, stage=_STEPPING, current=position, steps=_with(state.steps, position, record))
    if not plan.in_process:
        effects += [LogStepStarted(running.index), Report(record)]
    if state.cause:
        effects.append(StopRun(state.grace, state.kill))
    return state, effects


def _on_started(state: AttemptState, event: StepStarted) -> Next:
    index, at = event.index, event.at
    position = state.current
    if position is None or state.stage is not _LAUNCHING or state.steps[position].index != index:
        return state, []
    record = _replace_step(state.steps[position], state=_RUNNING, started_at=at)
    running = _replace(
        state,
        stage=_STEPPING,
        steps=_with(state.steps, position, record),
        started_at=state.started_at or at,
    )
    effects: list[Effect] = [] if _is_in_process(state) else [Report(record)]
    if state.cause:
        # The stop came while the start was under way and may have found nothing to end.
        effects.append(StopRun(state.grace, state.kill))
    return running, effects


def _on_start_failed(state: AttemptState, event: StartFailed) -> Next:
    index, error = event.index, event.error
    position = state.current
    if position is None or state.stage is not _LAUNCHING or state.steps[position].index != index:
        return state, []
    # When an answer was lost, a process may be there: end what there may be, look on disk, and hold the attempt until
    # that says so. Of a step that never was, the actor then tells an end with cause ``exec``.
    record = _replace_step(state.steps[position], error=error)
    unsure = _replace(state, stage=_STEPPING, unsure=True, steps=_with(state.steps, position, record))
    return unsure, [StopRun(0.0, True), Inspect(index)]


def _on_ended(state: AttemptState, event: StepEnded) -> Next:
    end = event.end
    if state.stage is _PREPARING:
        return _replace(state, early=(*state.early, end)), []
    position = state.current
    if position is None or not state.is_alive or state.steps[position].index != end.index:
        return state, []
    ended = _ended_step(state, end)
    if _is_in_process(state):
        return _onward(ended, [])
    return _onward(ended, [LogStepEnded(end.index), Report(ended.steps[position])])


def _ended_step(state: AttemptState, end: StepEnd) -> AttemptState:
    """Books the end of the current step: its record, the first failure, and what its cause means for the attempt."""
    position = state.current
    assert position is not None and state.plan is not None
    if state.unsure and not state.cause and end.cause == "stop":
        # Nobody asked for this stop but ``_on_start_failed``: it ended a step that the host could not start well.
        end = _replace(end, cause="exec", error=None)
    before = state.steps[position]
    plan = state.plan.steps[position]
    step_state, error = _judge_step(plan, end, before.error)
    record = _replace_step(
        before,
        state=step_state,
        exit_code=end.exit_code,
        signal=end.signal,
        started_at=end.started_at or before.started_at,
        ended_at=end.ended_at,
        error=error,
    )
    state = _replace(
        state,
        stage=_LAUNCHING,
        current=None,
        unsure=False,
        steps=_with(state.steps, position, record),
        started_at=state.started_at or record.started_at,
    )
    if end.cause == "gone":
        return _caused(state, Cause.LOST, error or "")
    if end.cause == "fence":
        return _caused(state, Cause.FENCE, _FENCED)
    if step_state is StepState.FAILED and not state.failed:
        reason = end.cause if end.cause in ("timeout", "exec", "invalid") else "step"
        state = _replace(
            state,
            failed=True,
            retry=end.cause != "invalid",
            exit_code=end.exit_code,
            signal=end.signal,
            error=error,
            reason=reason,
        )
    return state


def _judge_step(plan: StepPlan, end: StepEnd, error_before: str | None) -> tuple[StepState, str | None]:
    """A step's state and, for all but a success, what happened in words."""
    name = f"step {plan.name!r}"
    match end.cause:
        case "gone":
            return StepState.UNKNOWN, end.error or f"the process of {name} is gone without an exit record"
        case "timeout":
            return StepState.FAILED, f"{name} timed out after {limit_of(plan)}"
        case "exec":
            return StepState.FAILED, f"{name} could not be started: {end.error or error_before or 'unknown error'}"
        case "stop" | "fence":
            return _CANCELED, error_before or end.error
        case _:
            pass
    if end.exit_code == 0 and end.signal is None:
        return _SUCCEEDED, None
    if end.signal is not None:
        return StepState.FAILED, f"{name} was killed by signal {end.signal}"
    return StepState.FAILED, end.error or f"{name} ended with exit code {end.exit_code}"


def _onward(state: AttemptState, effects: list[Effect]) -> Next:
    """Between steps: the next one, or the end. Called with no step running."""
    following = _next_step(state)
    interrupted = _has(state.steps, _CANCELED)
    if not state.cause:
        if interrupted:
            # The shepherd stopped a step that nobody here asked to stop: by a daemon before this one, before it could
            # say why.
            state = _caused(state, Cause.RELEASE, "released: the step was stopped by a daemon before this one")
        elif following is not None:
            assert state.plan is not None
            index = state.plan.steps[following].index
            if not state.plan.in_process:
                effects.append(LogStepStarted(index))
            effects.append(StartStep(index))
            return _replace(state, current=following), effects
    elif (
        state.cause not in (Cause.LEASE_GONE, Cause.LOST)
        and not interrupted
        and following is None
        and any(step.state is not _PENDING for step in state.steps)
    ):
        state = _replace(state, cause=Cause.NONE, cause_text="")
    return _flush(state, effects)


def _flush(state: AttemptState, effects: Sequence[Effect] = ()) -> Next:
    """No process runs any more, nothing more will be started. What has no log is told at once."""
    if _is_in_process(state):
        told = _replace(state, stage=_TELLING, current=None)
        return told, [*effects, _tell(told)]
    new: list[Effect] = list(effects)
    steps = state.steps
    if _has(steps, _PENDING):
        steps = tuple(
            _replace_step(step, state=StepState.SKIPPED) if step.state is _PENDING else step for step in steps
        )
        new += [Report(after) for before, after in zip(state.steps, steps, strict=True) if before is not after]
    new.append(CompleteLog())
    return _replace(state, stage=_FLUSHING, current=None, steps=steps), new


def _tell(state: AttemptState) -> Tell:
    return Tell(result=result_of(state), superseded=state.cause is Cause.LEASE_GONE)


def _is_in_process(state: AttemptState) -> bool:
    return state.plan is not None and state.plan.in_process


def _has(steps: tuple[StepRecord, ...], wanted: StepState) -> bool:
    for step in steps:  # noqa: SIM110 - a generator costs more than all of it, and this is asked twice a job
        if step.state is wanted:
            return True
    return False


def _end_from_outside(state: AttemptState, cause: Cause, text: str, grace: float, kill: bool) -> Next:
    if state.stage in (_CLEANING, _OVER):
        return state, []
    if not state.is_alive:
        # Its steps are over: only a lease that is gone still changes what is to be told.
        if cause is not Cause.LEASE_GONE or state.cause is Cause.LEASE_GONE:
            return state, []
        gone = _caused(state, cause, text)
        if state.stage is _TELLING:
            return gone, [_tell(gone)]
        return gone, []
    was_stopping = state.cause
    harder = not was_stopping or (kill and not state.kill) or (not state.kill and grace < state.grace)
    caused = _caused(state, cause, text)
    if not harder:
        return caused, []
    grace = min(grace, state.grace) if was_stopping else grace
    caused = _replace(caused, grace=grace, kill=kill or state.kill)
    effects: list[Effect] = [StopRun(caused.grace, caused.kill)]
    if state.current is not None and not was_stopping:
        effects.insert(0, Note(state.steps[state.current].index, text))
    return caused, effects


def _on_stop_overdue(state: AttemptState, event: StopOverdue) -> Next:
    if not state.is_alive:
        return state, []
    if state.stage is _PREPARING:
        return state, ([AbandonPrepare()] if state.cause else [])
    effects: list[Effect] = [StopRun(0.0, True)]
    if state.unsure and state.current is not None:
        effects.append(Inspect(state.steps[state.current].index))
    return _replace(state, kill=True), effects


def _caused(state: AttemptState, cause: Cause, text: str) -> AttemptState:
    return _replace(state, cause=cause, cause_text=text) if cause > state.cause else state


def _next_step(state: AttemptState) -> int | None:
    """Position of the step that is next by the rules of failure; causes from outside are not looked at."""
    if state.plan is None:
        return None
    for position, record in enumerate(state.steps):
        if record.state is _PENDING and (not state.failed or state.plan.steps[position].always):
            return position
    return None


def _position(plan: Plan, index: int) -> int | None:
    return next((at for at, step in enumerate(plan.steps) if step.index == index), None)


def _replace_step(step: StepRecord, **changes: object) -> StepRecord:
    return _replace(step, **changes)


def _with(steps: tuple[StepRecord, ...], position: int, step: StepRecord) -> tuple[StepRecord, ...]:
    return (*steps[:position], step, *steps[position + 1 :])


def _on_nothing_to_adopt(state: AttemptState, event: NothingToAdopt) -> Next:
    if state.stage is not _PREPARING:
        return state, []
    if event.rebooted or event.lost is not None:
        return _flush(_caused(state, Cause.LOST, event.lost or _REBOOTED))
    return _flush(_caused(state, Cause.RELEASE, "the attempt had not begun on this host"))


def _on_timed_out(state: AttemptState, event: JobTimedOut) -> Next:
    problem = f"the job timed out after {limit_of(state.plan)}"
    return _end_from_outside(state, Cause.TIMEOUT, problem, event.grace, False)


def _on_log_completed(state: AttemptState, event: LogCompleted) -> Next:
    if state.stage is not _FLUSHING:
        return state, []
    told = _replace(state, stage=_TELLING)
    return told, [_tell(told)]


def _on_recorded(state: AttemptState, event: Recorded) -> Next:
    if state.stage is not _TELLING:
        return state, []
    # What runs in the daemon leaves nothing behind that would have to be waited for.
    return _replace(state, stage=_OVER if _is_in_process(state) else _CLEANING), [CleanUp()]


def _on_refused(state: AttemptState, event: Refused) -> Next:
    if state.stage is not _TELLING or state.cause is Cause.LEASE_GONE:
        return state, []
    gone = _caused(state, Cause.LEASE_GONE, _SUPERSEDED)
    return gone, [_tell(gone)]


def _on_cleaned_up(state: AttemptState, event: CleanedUp) -> Next:
    if state.stage is not _CLEANING:
        return state, []
    return _replace(state, stage=_OVER), []


RULES: dict[type, Callable[[AttemptState, Any], Next]] = {
    Prepared: _on_prepared,
    PrepareFailed: _on_prepare_failed,
    Adopted: _on_adopted,
    NothingToAdopt: _on_nothing_to_adopt,
    StepStarted: _on_started,
    StartFailed: _on_start_failed,
    StepEnded: _on_ended,
    StopAsked: lambda state, event: _end_from_outside(
        state, Cause.STOP, f"stopped by {event.by}", event.grace, event.kill
    ),
    Release: lambda state, event: _end_from_outside(
        state, Cause.RELEASE, "released: the host drains", event.grace, event.kill
    ),
    JobTimedOut: _on_timed_out,
    Fenced: lambda state, event: _end_from_outside(state, Cause.FENCE, _FENCED, 0.0, True),
    LeaseGone: lambda state, event: _end_from_outside(state, Cause.LEASE_GONE, _SUPERSEDED, 0.0, True),
    Stalled: lambda state, event: _end_from_outside(
        state, Cause.STALL, "released: the job's actor stalled", event.grace, False
    ),
    Crashed: lambda state, event: _end_from_outside(state, Cause.CRASH, f"bsup's own fault: {event.error}", 0.0, True),
    StopOverdue: _on_stop_overdue,
    LogCompleted: _on_log_completed,
    Recorded: _on_recorded,
    Refused: _on_refused,
    CleanedUp: _on_cleaned_up,
}
"""What each event means; one entry for every member of ``Event``."""
