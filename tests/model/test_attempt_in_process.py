"""An attempt whose one step is a handler's run in the daemon: no records, no log, its end told at once."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from supervisor.model.attempt import advance, result_of
from supervisor.model.attempt_state import AttemptState, Cause, Stage, begun, succeeded
from supervisor.model.attempt_words import (
    Adopted,
    ArmTimeout,
    CleanUp,
    Crashed,
    Effect,
    Event,
    Fenced,
    Inspect,
    JobTimedOut,
    LeaseGone,
    NothingToAdopt,
    Plan,
    Prepared,
    PrepareFailed,
    Recorded,
    Refused,
    Release,
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
)
from supervisor.model.job import Outcome, Phase

AT = datetime(2024, 1, 1, tzinfo=UTC)
LATER = datetime(2024, 1, 2, tzinfo=UTC)
PLAN = Plan((StepPlan(0, "thumbnail"),), None, in_process=True)
STOP = StopAsked(10.0, False, "ann")
STARTED = StepStarted(0, AT)


def ended(code: int | None = 0, cause: str | None = None, error: str | None = None) -> StepEnded:
    return StepEnded(StepEnd(0, code, None, AT, LATER, cause, error))


def play(*events: Event, plan: Plan = PLAN) -> tuple[AttemptState, list[Effect]]:
    """The state after a prepared plan and ``events``, and the effects of the last one."""
    state, effects = advance(AttemptState(), Prepared(plan))
    for event in events:
        state, effects = advance(state, event)
    return state, effects


def told(effects: list[Effect]) -> Result:
    [tell] = effects
    assert isinstance(tell, Tell)
    return tell.result


def test_from_the_plan_to_the_end_nothing_is_waited_for_but_the_handler() -> None:
    state, effects = play()
    assert effects == [StartStep(0)] and (state.stage, state.phase) == (Stage.LAUNCHING, Phase.RUNNING)
    state, effects = play(STARTED)
    assert effects == [] and state.stage is Stage.STEPPING and state.started_at == AT
    state, effects = play(STARTED, ended())
    found = told(effects)
    assert (found.outcome, found.exit_code, found.error, found.steps) == (Outcome.SUCCEEDED, 0, None, ())
    assert (found.started_at, found.ended_at) == (AT, LATER)
    assert state.stage is Stage.TELLING and not state.is_alive


def test_the_record_of_its_end_is_its_end() -> None:
    """Nothing is left behind that would have to be waited for."""
    state, effects = play(STARTED, ended(), Recorded())
    assert state.stage is Stage.OVER and effects == [CleanUp()]
    assert advance(state, Recorded()) == (state, [])


def test_an_end_that_is_faster_than_the_word_of_its_start_counts() -> None:
    state, effects = play(ended())
    assert told(effects).outcome is Outcome.SUCCEEDED and told(effects).started_at == AT
    assert advance(state, STARTED) == (state, [])


def test_the_short_ways_are_the_rules() -> None:
    """What most attempts come to is worked out at once; it is what the rules would have said."""
    state, _ = play(STARTED)
    assert begun(PLAN, AT) == state
    after, effects = advance(state, ended())
    assert succeeded(state, ended().end) == after
    assert effects == [Tell(result_of(after), superseded=False)]


@pytest.mark.parametrize(
    ("events", "end"),
    [
        pytest.param([STARTED], ended(1), id="it failed"),
        pytest.param([STARTED], ended(None, error="ValueError: no"), id="it raised"),
        pytest.param([STARTED], ended(0, "stop"), id="it was stopped"),
        pytest.param([STARTED], ended(None, "invalid"), id="it was invalid"),
        pytest.param([STARTED, STOP], ended(), id="somebody stopped it"),
        pytest.param([STARTED, LeaseGone()], ended(), id="its lease is gone"),
        pytest.param([], ended(), id="its start was not told yet"),
        pytest.param([STARTED, ended()], ended(), id="it was told before"),
    ],
)
def test_whatever_is_not_a_plain_success_goes_by_the_rules(events: list[Event], end: StepEnded) -> None:
    state, _ = play(*events)
    assert succeeded(state, end.end) is None
    steps = Plan((StepPlan(0, "build"),), None)
    assert succeeded(play(STARTED, plan=steps)[0], ended().end) is None, "a process has a log to be completed"


def test_a_failure_tells_the_handlers_words() -> None:
    found = told(play(STARTED, ended(None, error="ValueError: no such picture"))[1])
    assert (found.outcome, found.error, found.exit_code) == (Outcome.FAILED, "ValueError: no such picture", None)
    assert found.may_retry


def test_what_is_invalid_is_not_tried_again() -> None:
    found = told(play(STARTED, ended(None, "invalid", "args: is missing"))[1])
    assert (found.outcome, found.reason, found.may_retry) == (Outcome.FAILED, "invalid", False)
    assert found.error == "args: is missing"
    state, _ = advance(AttemptState(), PrepareFailed("spec: can't be read", invalid=True))
    assert not state.retry and state.failed


def test_the_timeout_is_armed_and_ends_it() -> None:
    plan = Plan(PLAN.steps, 40.0, in_process=True)
    assert play(plan=plan)[1] == [ArmTimeout(40.0), StartStep(0)]
    _, effects = play(STARTED, JobTimedOut(10.0), plan=plan)
    assert StopRun(10.0, False) in effects
    found = told(play(STARTED, JobTimedOut(10.0), ended(None, "stop"), plan=plan)[1])
    assert (found.outcome, found.reason, found.error) == (Outcome.FAILED, "timeout", "the job timed out after 40 s")


@pytest.mark.parametrize(
    ("cause", "outcome", "reason"),
    [
        (STOP, Outcome.CANCELED, "stop"),
        (Release(10.0), Outcome.RELEASED, "drain"),
        (Fenced(), Outcome.RELEASED, "fence"),
        (Stalled(10.0), Outcome.RELEASED, "stall"),
        (Crashed("boom"), Outcome.FAILED, "internal"),
        (LeaseGone(), Outcome.SUPERSEDED, "lease"),
    ],
)
def test_whoever_ends_it_from_outside_decides_unless_it_had_ended_by_itself(
    cause: Event, outcome: Outcome, reason: str
) -> None:
    state, effects = play(STARTED, cause)
    assert state.is_alive and any(isinstance(effect, StopRun) for effect in effects)
    found = told(advance(state, ended(None, "stop"))[1])
    assert (found.outcome, found.reason) == (outcome, reason)
    natural = told(advance(state, ended())[1])
    assert natural.outcome is (outcome if outcome is Outcome.SUPERSEDED else Outcome.SUCCEEDED)


def test_a_stop_while_it_is_being_started_is_repeated_when_it_has() -> None:
    """The first one may have found nothing to end."""
    _, effects = play(STOP, STARTED)
    assert effects == [StopRun(10.0, False)]
    assert play(STARTED, STOP, StopOverdue())[1] == [StopRun(0.0, True)]


def test_a_start_that_failed_is_looked_into_and_then_told() -> None:
    state, effects = play(StartFailed(0, "the fence file can't be written"))
    assert effects == [StopRun(0.0, True), Inspect(0)] and state.is_alive
    found = told(advance(state, ended(None, "exec"))[1])
    assert (found.outcome, found.reason, found.may_retry) == (Outcome.FAILED, "exec", True)
    assert found.error is not None and "the fence file can't be written" in found.error


def test_a_lease_of_a_daemon_that_is_gone_is_a_loss() -> None:
    gone = StepTaken(0, None, StepEnd(0, None, None, None, None, "gone", "the daemon that ran it is gone"))
    state, effects = advance(AttemptState(), Adopted(PLAN, (gone,), 0.0, False))
    found = told(effects)
    assert (found.outcome, found.reason, found.error) == (Outcome.LOST, "gone", "the daemon that ran it is gone")
    assert advance(state, Recorded())[0].stage is Stage.OVER


def test_one_that_still_runs_is_taken_up_without_a_word() -> None:
    """Its dispatcher was restarted, the daemon was not: its end is told later, or was on hand already."""
    state, effects = advance(AttemptState(), Adopted(PLAN, (StepTaken(0, AT, None),), 5.0, False))
    assert effects == [] and (state.stage, state.current, state.started_at) == (Stage.STEPPING, 0, AT)
    assert told(advance(state, ended())[1]).outcome is Outcome.SUCCEEDED
    over = StepTaken(0, AT, ended(None, error="ValueError: no").end)
    assert told(advance(AttemptState(), Adopted(PLAN, (over,), 5.0, False))[1]).outcome is Outcome.FAILED
    doomed, _ = advance(AttemptState(), Crashed("boom"))
    assert StopRun(0.0, True) in advance(doomed, Adopted(PLAN, (StepTaken(0, AT, None),), 5.0, False))[1]


def test_one_that_never_began_is_begun_or_given_back() -> None:
    """Prepared, not started: the actor before this one crashed between the two."""
    assert advance(AttemptState(), Adopted(PLAN, (), 0.0, False))[1] == [StartStep(0)]
    state, _ = advance(AttemptState(), NothingToAdopt())
    assert state.cause is Cause.RELEASE


def test_a_refused_end_is_kept_as_superseded() -> None:
    state, effects = play(STARTED, ended(), Refused())
    assert told(effects).outcome is Outcome.SUPERSEDED
    state, effects = advance(state, Recorded())
    assert state.stage is Stage.OVER and effects == [CleanUp()]
