"""A running attempt: its rules one by one, then every event in every state, then random lives to their end."""

from __future__ import annotations

from datetime import UTC, datetime
from random import Random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.model.attempt import RULES, advance
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
)
from supervisor.model.job import Outcome, StepState

AT = datetime(2024, 1, 1, tzinfo=UTC)
PLAN = Plan(
    steps=(StepPlan(0, "checkout"), StepPlan(1, "build", timeout=30.0), StepPlan(2, "report", always=True)),
    timeout=600.0,
)
STOP = StopAsked(10.0, False, "ann")


def end(index: int, code: int | None = 0, *, signal: int | None = None, cause: str | None = None) -> StepEnded:
    return StepEnded(StepEnd(index, code, signal, AT, AT, cause))


def play(*events: Event, plan: Plan = PLAN) -> tuple[AttemptState, list[Effect]]:
    """The state after ``events``, beginning with a prepared plan, and the effects of the last one."""
    state, effects = advance(AttemptState(), Prepared(plan))
    for event in events:
        state, effects = advance(state, event)
    return state, effects


def result(*events: Event, plan: Plan = PLAN) -> Result:
    state, _ = play(*events, plan=plan)
    _, effects = advance(state, LogCompleted())
    [told] = [effect for effect in effects if isinstance(effect, Tell)]
    return told.result


def ran(*indices: int) -> list[Event]:
    return [event for index in indices for event in (StepStarted(index, AT), end(index))]


def test_steps_run_in_order_and_the_log_is_complete_before_the_end_is_told() -> None:
    state, effects = play()
    assert StartStep(0) in effects and ArmTimeout(600.0) in effects
    state, effects = play(*ran(0))
    assert StartStep(1) in effects
    state, effects = play(*ran(0, 1, 2))
    assert state.stage is Stage.FLUSHING and effects[-1] == CompleteLog()
    state, effects = advance(state, LogCompleted())
    [told] = effects
    assert isinstance(told, Tell) and told.result.outcome is Outcome.SUCCEEDED and told.result.exit_code == 0
    state, effects = advance(state, Recorded())
    assert effects == [CleanUp()]
    state, effects = advance(state, CleanedUp())
    assert state.stage is Stage.OVER


def test_a_failure_skips_what_is_not_always_and_its_exit_code_is_the_attempts() -> None:
    found = result(StepStarted(0, AT), end(0, 3), StepStarted(2, AT), end(2, 5))
    assert (found.outcome, found.exit_code, found.reason) == (Outcome.FAILED, 3, "step")
    assert [step.state for step in found.steps] == [StepState.FAILED, StepState.SKIPPED, StepState.FAILED]
    assert found.error == "step 'checkout' ended with exit code 3"


def test_a_step_killed_by_a_signal_has_no_exit_code() -> None:
    found = result(*ran(0), StepStarted(1, AT), end(1, None, signal=11), *ran(2))
    assert (found.exit_code, found.signal, found.error) == (None, 11, "step 'build' was killed by signal 11")


@pytest.mark.parametrize(
    ("cause", "reason", "words"),
    [
        ("timeout", "timeout", "step 'build' timed out after 30 s"),
        ("exec", "exec", "step 'build' could not be started: unknown error"),
    ],
)
def test_what_ended_a_step_is_told_in_words(cause: str, reason: str, words: str) -> None:
    found = result(*ran(0), StepStarted(1, AT), end(1, None, cause=cause), *ran(2))
    assert (found.outcome, found.reason, found.error) == (Outcome.FAILED, reason, words)


def test_after_a_stop_nothing_is_started_not_even_what_is_always() -> None:
    state, effects = play(StepStarted(0, AT), STOP)
    assert StopRun(10.0, False) in effects
    state, effects = advance(state, end(0, None, signal=15, cause="stop"))
    assert not any(isinstance(effect, StartStep) for effect in effects)
    found = result(StepStarted(0, AT), STOP, end(0, None, signal=15, cause="stop"))
    assert (found.outcome, found.reason, found.error) == (Outcome.CANCELED, "stop", "stopped by ann")
    assert [step.state for step in found.steps] == [StepState.CANCELED, StepState.SKIPPED, StepState.SKIPPED]


def test_a_stop_that_came_too_late_leaves_the_natural_outcome() -> None:
    """The last step ended by itself before the stop reached it: it succeeded."""
    assert result(*ran(0, 1), StepStarted(2, AT), STOP, end(2)).outcome is Outcome.SUCCEEDED
    assert result(*ran(0, 1, 2), STOP).outcome is Outcome.SUCCEEDED


def test_a_stop_may_come_again_harder_but_never_softer() -> None:
    state, _ = play(StepStarted(0, AT), STOP)
    assert advance(state, StopAsked(60.0, False, "bob"))[1] == []
    state, effects = advance(state, StopAsked(0.0, True, "bob"))
    assert effects == [StopRun(0.0, True)]
    assert advance(state, STOP)[1] == []


def test_a_stop_without_an_end_is_repeated_as_a_kill_for_ever() -> None:
    state, _ = play(StepStarted(0, AT), STOP)
    for _ in range(5):
        state, effects = advance(state, StopOverdue())
        assert effects == [StopRun(0.0, True)] and state.is_alive


def test_a_stop_during_a_start_is_repeated_once_it_started() -> None:
    """The first one may have found no process yet."""
    state, _ = play(STOP)
    _, effects = advance(state, StepStarted(0, AT))
    assert StopRun(10.0, False) in effects


def test_a_stop_during_the_preparation_starts_nothing_and_gives_up_on_a_hang() -> None:
    state, _ = advance(AttemptState(), STOP)
    assert advance(state, StopOverdue())[1] == [AbandonPrepare()]
    state, effects = advance(state, Prepared(PLAN))
    assert state.stage is Stage.FLUSHING and not any(isinstance(effect, StartStep) for effect in effects)


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ([Release(10.0), STOP], Outcome.CANCELED),
        ([STOP, Release(10.0)], Outcome.CANCELED),
        ([JobTimedOut(10.0), Release(10.0)], Outcome.FAILED),
        ([Fenced(), JobTimedOut(10.0)], Outcome.RELEASED),
        ([Stalled(10.0)], Outcome.RELEASED),
        ([Crashed("boom"), Stalled(1.0)], Outcome.FAILED),
        ([STOP, LeaseGone(), STOP], Outcome.SUPERSEDED),
    ],
)
def test_of_several_causes_the_greatest_decides(events: list[Event], outcome: Outcome) -> None:
    assert result(StepStarted(0, AT), *events, end(0, None, signal=9, cause="stop")).outcome is outcome


def test_a_process_gone_without_a_record_is_a_loss() -> None:
    found = result(StepStarted(0, AT), end(0, None, cause="gone"))
    assert (found.outcome, found.steps[0].state) == (Outcome.LOST, StepState.UNKNOWN)
    assert result(StepStarted(0, AT), STOP, end(0, None, cause="gone")).outcome is Outcome.CANCELED


def test_a_kill_at_the_fence_is_no_fault_of_the_job() -> None:
    found = result(StepStarted(0, AT), end(0, None, signal=9, cause="fence"))
    assert (found.outcome, found.reason) == (Outcome.RELEASED, "fence")


def test_a_refused_end_is_kept_as_superseded() -> None:
    state, _ = play(*ran(0, 1, 2), LogCompleted())
    state, effects = advance(state, Refused())
    [told] = effects
    assert isinstance(told, Tell) and told.superseded and told.result.outcome is Outcome.SUPERSEDED
    assert advance(state, Refused())[1] == []
    assert advance(state, Recorded())[1] == [CleanUp()]


def test_an_unclear_start_is_ended_and_looked_into_before_the_attempt_goes_on() -> None:
    state, effects = play(StartFailed(0, "no answer"))
    assert effects == [StopRun(0.0, True), Inspect(0)]
    assert advance(state, StopOverdue())[1] == [StopRun(0.0, True), Inspect(0)]
    state, effects = advance(state, end(0, None, cause="exec"))
    assert state.steps[0].error == "step 'checkout' could not be started: no answer"


def test_a_job_that_is_invalid_is_not_tried_again() -> None:
    state, _ = advance(AttemptState(), PrepareFailed("files: bad path", invalid=True))
    _, [told] = advance(state, LogCompleted())
    assert isinstance(told, Tell) and told.result.outcome is Outcome.FAILED and not told.result.may_retry


def test_a_step_whose_input_is_invalid_is_not_tried_again() -> None:
    """As a handler says it; whatever else failed before or after it."""
    found = result(StepStarted(0, AT), end(0, None, cause="invalid"), *ran(2))
    assert (found.outcome, found.reason, found.may_retry) == (Outcome.FAILED, "invalid", False)
    assert result(StepStarted(0, AT), end(0, 1), *ran(2)).may_retry
    first = result(StepStarted(0, AT), end(0, 1), StepStarted(2, AT), end(2, None, cause="invalid"))
    assert (first.reason, first.may_retry) == ("step", True), "the first failure decides"


def test_adoption_goes_on_where_the_last_daemon_stopped() -> None:
    ended = StepTaken(0, AT, StepEnd(0, 0, None, AT, AT))
    state, effects = advance(AttemptState(), Adopted(PLAN, (ended,), 100.0, False))
    assert StartStep(1) in effects and ArmTimeout(500.0) in effects
    state, effects = advance(AttemptState(), Adopted(PLAN, (ended, StepTaken(1, AT, None)), 100.0, False))
    assert state.stage is Stage.STEPPING and state.current == 1
    assert not any(isinstance(effect, StartStep) for effect in effects)


def test_adoption_after_a_boot_is_a_loss_unless_all_had_ended() -> None:
    running = (StepTaken(0, AT, None),)
    state, _ = advance(AttemptState(), Adopted(PLAN, running, 0.0, True))
    assert state.cause is Cause.LOST and state.stage is Stage.FLUSHING
    between = (StepTaken(0, AT, StepEnd(0, 0, None, AT, AT)),)
    state, _ = advance(AttemptState(), Adopted(PLAN, between, 0.0, True))
    assert state.cause is Cause.LOST
    # It may have been started, and the claim not synced: then a second start would be under one lease.
    state, effects = advance(AttemptState(), Adopted(PLAN, (), 0.0, True))
    assert state.cause is Cause.LOST and not any(isinstance(effect, StartStep) for effect in effects)
    done = tuple(StepTaken(i, AT, StepEnd(i, 0, None, AT, AT)) for i in range(3))
    state, _ = advance(AttemptState(), Adopted(PLAN, done, 0.0, True))
    assert state.cause is Cause.NONE and state.stage is Stage.FLUSHING


def test_an_end_that_comes_while_the_attempt_is_taken_up_counts() -> None:
    """Its step was read as running, then it ended, and then all else that a take-up needs was there."""
    state, effects = advance(AttemptState(), end(0, 7))
    assert effects == []
    state, effects = advance(state, Adopted(PLAN, (StepTaken(0, AT, None),), 0.0, False))
    assert (state.steps[0].state, state.exit_code) == (StepState.FAILED, 7)
    assert StartStep(2) in effects  # a step that always runs follows
    state, _ = advance(AttemptState(), end(0, 7))
    state, effects = advance(state, Adopted(PLAN, (StepTaken(0, AT, end(0, 0).end),), 0.0, False))
    assert state.exit_code is None and StartStep(1) in effects, "what is on disk comes first"


def test_an_adopted_attempt_that_is_doomed_is_stopped() -> None:
    state, _ = advance(AttemptState(), Stalled(10.0))
    _, effects = advance(state, Adopted(PLAN, (StepTaken(0, AT, None),), 0.0, False))
    assert StopRun(10.0, False) in effects


def test_a_lease_without_a_handle_is_released() -> None:
    state, _ = advance(AttemptState(), NothingToAdopt())
    _, [told] = advance(state, LogCompleted())
    assert isinstance(told, Tell) and told.result.outcome is Outcome.RELEASED
    for event in (NothingToAdopt(rebooted=True), NothingToAdopt(lost="the disk is bad")):
        state, _ = advance(AttemptState(), event)
        _, [told] = advance(state, LogCompleted())
        assert isinstance(told, Tell) and told.result.outcome is Outcome.LOST
    assert told.result.error == "the disk is bad"


# --- all of it ----------------------------------------------------------------------------------------------------

OUTSIDE: list[Event] = [
    STOP,
    StopAsked(0.0, True, "bob"),
    Release(10.0),
    Release(0.0, True),
    JobTimedOut(10.0),
    Fenced(),
    LeaseGone(),
    Stalled(10.0),
    Crashed("boom"),
    StopOverdue(),
]
EVERY: list[Event] = [
    *OUTSIDE,
    Prepared(PLAN),
    PrepareFailed("no"),
    NothingToAdopt(),
    NothingToAdopt(rebooted=True),
    NothingToAdopt(lost="the disk is bad"),
    Adopted(PLAN, (StepTaken(0, AT, None),), 0.0, False),
    Adopted(PLAN, (StepTaken(0, AT, None),), 0.0, True),
    *[StepStarted(i, AT) for i in range(4)],
    *[StartFailed(i, "no") for i in range(4)],
    *[end(i, code, cause=cause) for i in range(4) for code, cause in [(0, None), (1, None), (None, "stop")]],
    *[end(i, None, cause=cause) for i in range(3) for cause in ["timeout", "gone", "fence", "exec"]],
    LogCompleted(),
    Recorded(),
    Refused(),
    CleanedUp(),
]
ORDER = list(Stage)
OF_LOGS_AND_RECORDS = (CompleteLog, LogStepStarted, LogStepEnded, Report)


def test_there_is_a_rule_for_every_event_and_no_other() -> None:
    """An event without one would end its job's actor."""
    assert set(RULES) == set(get_args(Event))
    assert {type(event) for event in EVERY} == set(RULES), "the tests below try them all"


def test_every_event_in_every_state_is_taken_and_goes_only_forward() -> None:
    """All states reachable within six events: no event raises, a cause only rises, what ran is never forgotten."""
    seen = {repr(AttemptState()): AttemptState()}
    frontier = [AttemptState()]
    for _ in range(6):
        following = []
        for state in frontier:
            for event in EVERY:
                after, effects = advance(state, event)
                assert after.cause >= state.cause or not after.is_alive
                if not state.is_alive:
                    assert ORDER.index(after.stage) >= ORDER.index(state.stage)
                    assert not any(isinstance(effect, (StartStep, StopRun)) for effect in effects)
                if state.stage is Stage.OVER:
                    assert after == state and not effects
                key = repr((after.stage, after.cause, after.kill, after.failed, after.unsure, after.current,
                            [step.state for step in after.steps]))  # fmt: skip
                if key not in seen:
                    seen[key] = after
                    following.append(after)
        frontier = following
    assert len(seen) > 300


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    steps=st.integers(-1, 4),
    outside=st.lists(st.sampled_from(OUTSIDE), max_size=6),
)
def test_every_life_ends_recorded_once(seed: int, steps: int, outside: list[Event]) -> None:
    """An adversary picks the order of answers and of events from outside. Each step is started at most once, the
    attempt's end is told once as the holder's and at most once as superseded, never while a step runs, and the attempt
    is cleaned up. -1 steps: a handler's run in the daemon, of which there are no records and no log."""
    rng = Random(seed)
    in_process = steps == -1
    plan = Plan(
        tuple(StepPlan(i, f"s{i}", always=rng.random() < 0.3) for i in range(abs(steps))), 100.0, in_process=in_process
    )
    state = AttemptState()
    pending: list[Event] = [PrepareFailed("no") if rng.random() < 0.3 else Prepared(plan)]
    outside = list(outside)
    running: set[int] = set()
    started: list[int] = []
    told: list[Tell] = []
    cleaned = 0
    for _ in range(500):
        if state.stage is Stage.OVER:
            break
        if outside and rng.random() < 0.3:
            event = outside.pop()
        elif pending:
            event = pending.pop(rng.randrange(len(pending)))
        elif running or state.stage is Stage.PREPARING:
            event = StopOverdue() if state.cause is not Cause.NONE or state.unsure else STOP
        else:
            raise AssertionError(f"stuck in {state}")
        if isinstance(event, StepEnded):
            running.discard(event.end.index)
        state, effects = advance(state, event)
        for effect in effects:
            if in_process and state.plan is not None:
                assert not isinstance(effect, OF_LOGS_AND_RECORDS)
            match effect:
                case StartStep(index):
                    assert not running
                    started.append(index)
                    running.add(index)
                    if rng.random() < 0.2:
                        pending.append(StartFailed(index, "no answer"))
                    else:
                        state, more = advance(state, StepStarted(index, AT))
                        effects.extend(more)
                        if rng.random() < 0.8:
                            cause = rng.choice([None, None, None, "timeout", "gone", "fence", "exec", "invalid"])
                            pending.append(end(index, rng.choice([0, 0, 1]) if cause is None else None, cause=cause))
                case StopRun(_, kill):
                    reached = [index for index in running if kill or rng.random() < 0.5]
                    pending += [end(index, None, signal=9, cause="stop") for index in reached]
                case Inspect(index):
                    if rng.random() < 0.5:
                        pending.append(end(index, None, cause="exec"))
                case AbandonPrepare():
                    pending.append(PrepareFailed("given up"))
                case CompleteLog():
                    assert not running
                    pending.append(LogCompleted())
                case Tell():
                    assert not running
                    told.append(effect)
                    pending.append(Recorded() if effect.superseded or rng.random() < 0.5 else Refused())
                case CleanUp():
                    cleaned += 1
                    pending.append(CleanedUp())
                case _:
                    pass
    assert state.stage is Stage.OVER and cleaned == 1
    assert len(started) == len(set(started)) and started == sorted(started)
    assert 1 <= len(told) <= 2
    assert [tell.superseded for tell in told] in ([False], [True], [False, True])
    final = told[-1].result
    if in_process:
        assert final.steps == ()
    first_failed = next((step for step in final.steps if step.state is StepState.FAILED), None)
    if first_failed is not None:
        assert (final.exit_code, final.signal) == (first_failed.exit_code, first_failed.signal)
    assert all(step.state not in (StepState.PENDING, StepState.RUNNING) for step in final.steps)
