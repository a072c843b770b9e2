"""The life of a job: every state × every event, counters, and the diagram."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.model.job import FINAL_STATES, Outcome, State
from supervisor.model.lifecycle import (
    LOSS_BUDGET,
    TABLE,
    IllegalEvent,
    JobEvent,
    Life,
    apply,
    event_of_end,
    render_mermaid,
)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, JobEvent)))
def test_every_event_in_every_state(state: State, event: JobEvent) -> None:
    """Legal: the target of the table, one revision more. Illegal: it raises, and the life is what it was."""
    life = Life(state=state, revision=7)
    transition = TABLE[state].get(event)
    if transition is None:
        with pytest.raises(IllegalEvent) as caught:
            apply(life, event)
        assert (caught.value.state, caught.value.event) == (state, event)
        assert life == Life(state=state, revision=7)
    else:
        after = apply(life, event)
        assert (after.state, after.revision) == (transition.target, 8)


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_a_final_state_only_knows_the_next_generation(state: State) -> None:
    assert list(TABLE[state]) == [JobEvent.REOPENED]
    again = apply(Life(state=state, attempt=3, failures=2, losses=4, releases=1), JobEvent.REOPENED)
    assert (again.generation, again.attempt, again.failures, again.losses, again.releases) == (2, 3, 0, 0, 1)


@given(st.lists(st.sampled_from(list(JobEvent)), max_size=60))
def test_counters_never_fall_within_a_generation(events: list[JobEvent]) -> None:
    life = Life(state=State.WAITING)
    for event in events:
        try:
            after = apply(life, event)
        except IllegalEvent:
            continue
        assert after.revision == life.revision + 1
        assert after.attempt - life.attempt == (event is JobEvent.CLAIMED)
        if after.generation == life.generation:
            assert not life.state.is_final
            counted = after.failures + after.losses + after.releases - life.failures - life.losses - life.releases
            assert counted in (0, 1)
            assert (after.losses > life.losses) == (event in (JobEvent.LOST, JobEvent.LOST_TOO_OFTEN))
        life = after


def test_every_state_but_a_final_one_can_still_reach_a_final_one() -> None:
    for state in State:
        reached = {state}
        for _ in State:
            reached |= {transition.target for found in reached for transition in TABLE[found].values()}
        assert reached & FINAL_STATES


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("retry", [True, False])
@pytest.mark.parametrize("stop_asked", [True, False])
@pytest.mark.parametrize("losses", [0, LOSS_BUDGET - 1])
def test_an_end_is_legal_for_a_running_job(outcome: Outcome, retry: bool, stop_asked: bool, losses: int) -> None:
    """Whatever a holder tells, a running job knows it; after a stop was asked for, nothing leads back to the queue."""
    event = event_of_end(outcome, retry=retry, stop_asked=stop_asked, losses=losses)
    assert (event is None) == (outcome is Outcome.SUPERSEDED)
    if event is not None:
        after = apply(Life(state=State.RUNNING, losses=losses), event)
        assert not stop_asked or after.state.is_final
        assert after.losses <= LOSS_BUDGET


def test_the_diagram_draws_the_table() -> None:
    drawn = render_mermaid()
    assert drawn.startswith("stateDiagram-v2\n")
    for state, events in TABLE.items():
        assert (f"    {state} --> [*]" in drawn) == state.is_final
        for event, transition in events.items():
            if not state.is_final:
                arrow = f"    {state} --> {transition.target}:"
                [line] = [line for line in drawn.splitlines() if line.startswith(arrow)]
                assert event.value in line
