"""A job's life: which states there are, what moves it from one to the next. The table is data; the docs' diagram is
drawn from it.

The rules:

- A final state never changes within its generation. A retry by hand opens the next generation.
- Every change of state raises ``revision`` by one. An event that is illegal in a state raises and changes nothing.
- ``failures``, ``losses`` and ``releases`` are counted apart; ``attempt`` rises with each claim and never falls.

The store's SQL moves jobs by the same table (its model-based test compares the two). May import the modules of this
floor.
"""

from __future__ import annotations

import enum

import msgspec

from supervisor.model.errors import BsupError
from supervisor.model.job import FINAL_STATES, Outcome, State

LOSS_BUDGET = 5
"""Losses after which a job fails, unless its kind says otherwise."""

ALONE_AFTER = 2
"""Losses after which a job runs alone on a host."""


class JobEvent(enum.StrEnum):
    """What can happen to a job. The values are the words of the diagram."""

    DUE = "parents ended and time reached"
    CLAIMED = "claimed"
    SUCCEEDED = "attempt succeeded"
    FAILED = "attempt failed, budget used up"
    RETRIED = "attempt failed, within budget"
    RELEASED = "released (drain)"
    LOST = "host or process lost"
    LOST_TOO_OFTEN = "lost, loss budget used up"
    STOPPED = "stopped"
    CANCELED = "stop asked"
    UPSTREAM = "a parent did not succeed"
    SUSPENDED = "suspend"
    RESUMED = "resume"
    REOPENED = "retry by hand"


class Counter(enum.StrEnum):
    ATTEMPT = "attempt"
    FAILURES = "failures"
    LOSSES = "losses"
    RELEASES = "releases"


class Transition(msgspec.Struct, frozen=True):
    """Where an event leads, and which counter it raises."""

    target: State
    counts: Counter | None = None


TABLE: dict[State, dict[JobEvent, Transition]] = {
    State.WAITING: {
        JobEvent.DUE: Transition(State.READY),
        JobEvent.CANCELED: Transition(State.CANCELED),
        JobEvent.UPSTREAM: Transition(State.CANCELED),
        JobEvent.SUSPENDED: Transition(State.SUSPENDED),
    },
    State.READY: {
        JobEvent.CLAIMED: Transition(State.RUNNING, Counter.ATTEMPT),
        JobEvent.CANCELED: Transition(State.CANCELED),
        JobEvent.SUSPENDED: Transition(State.SUSPENDED),
    },
    State.RUNNING: {
        JobEvent.SUCCEEDED: Transition(State.SUCCEEDED),
        JobEvent.FAILED: Transition(State.FAILED, Counter.FAILURES),
        JobEvent.RETRIED: Transition(State.WAITING, Counter.FAILURES),
        JobEvent.RELEASED: Transition(State.READY, Counter.RELEASES),
        JobEvent.LOST: Transition(State.READY, Counter.LOSSES),
        JobEvent.LOST_TOO_OFTEN: Transition(State.FAILED, Counter.LOSSES),
        JobEvent.STOPPED: Transition(State.CANCELED),
    },
    State.SUSPENDED: {
        JobEvent.RESUMED: Transition(State.WAITING),
        JobEvent.CANCELED: Transition(State.CANCELED),
        JobEvent.UPSTREAM: Transition(State.CANCELED),
    },
    State.SUCCEEDED: {JobEvent.REOPENED: Transition(State.WAITING)},
    State.FAILED: {JobEvent.REOPENED: Transition(State.WAITING)},
    State.CANCELED: {JobEvent.REOPENED: Transition(State.WAITING)},
}
"""State → event → transition; what is not there is illegal. A waiting job with nothing to wait for is DUE at once."""


class IllegalEvent(BsupError):
    """The job's state does not know this event. Nothing was changed."""

    def __init__(self, state: State, event: JobEvent) -> None:
        self.state = state
        self.event = event
        super().__init__(f"a {state} job does not know {event.value!r}")


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """A job's state with the counters that travel with it. ``failures`` and ``losses`` belong to the generation."""

    state: State
    generation: int = 1
    revision: int = 1
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    releases: int = 0

    @property
    def is_alone(self) -> bool:
        return self.losses >= ALONE_AFTER


def apply(life: Life, event: JobEvent) -> Life:
    """The life after ``event``. Raises IllegalEvent, having changed nothing."""
    transition = TABLE[life.state].get(event)
    if transition is None:
        raise IllegalEvent(life.state, event)
    moved = msgspec.structs.replace(life, state=transition.target, revision=life.revision + 1)
    if event is JobEvent.REOPENED:
        return msgspec.structs.replace(moved, generation=life.generation + 1, failures=0, losses=0)
    match transition.counts:
        case Counter.ATTEMPT:
            return msgspec.structs.replace(moved, attempt=life.attempt + 1)
        case Counter.FAILURES:
            return msgspec.structs.replace(moved, failures=life.failures + 1)
        case Counter.LOSSES:
            return msgspec.structs.replace(moved, losses=life.losses + 1)
        case Counter.RELEASES:
            return msgspec.structs.replace(moved, releases=life.releases + 1)
        case None:
            return moved


def event_of_end(
    outcome: Outcome, *, retry: bool, stop_asked: bool, losses: int, loss_budget: int = LOSS_BUDGET
) -> JobEvent | None:
    """What the end of an attempt means for its job; ``losses`` before it. None: nothing (it was superseded).

    A stop that was asked for turns every way back to the queue into the end; it does not undo a success or a final
    failure.
    """
    match outcome:
        case Outcome.SUCCEEDED:
            return JobEvent.SUCCEEDED
        case Outcome.CANCELED:
            return JobEvent.STOPPED
        case Outcome.FAILED:
            if not retry:
                return JobEvent.FAILED
            return JobEvent.STOPPED if stop_asked else JobEvent.RETRIED
        case Outcome.RELEASED:
            return JobEvent.STOPPED if stop_asked else JobEvent.RELEASED
        case Outcome.LOST:
            if stop_asked:
                return JobEvent.STOPPED
            return JobEvent.LOST_TOO_OFTEN if losses + 1 >= loss_budget else JobEvent.LOST
        case Outcome.SUPERSEDED:
            return None


def render_mermaid() -> str:
    """The table as a Mermaid state diagram, in a fixed order; ends with a newline."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.WAITING}: submitted"]
    for state in State:
        by_target: dict[State, list[str]] = {}
        for event, transition in TABLE[state].items():
            by_target.setdefault(transition.target, []).append(event.value)
        for target, words in by_target.items():
            if state in FINAL_STATES:
                # Another generation of the job, not a change of this one: drawn as its end.
                continue
            lines.append(f"    {state} --> {target}: {'<br/>'.join(words)}")
        if state in FINAL_STATES:
            lines.append(f"    {state} --> [*]")
    return "\n".join(lines) + "\n"
