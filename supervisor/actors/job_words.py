"""What a job's actor tells the dispatcher, made of its state: how far it is, and how it ended. Redacted, bounded.

Part of the job's actor, which alone calls it. May import the seams and model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from random import Random

import msgspec

from supervisor.messages import JobMoved
from supervisor.model.attempt_state import AttemptState
from supervisor.model.attempt_words import Result, StepEnd
from supervisor.model.job import AttemptEnd, Lease, Outcome, StepRecord
from supervisor.model.policies import decide_retry
from supervisor.model.redaction import SecretSet, secret_values
from supervisor.ports import LogSink

TEXT_CAP = 4000
"""Characters of an error that leave the host."""

_SUCCEEDED = Outcome.SUCCEEDED

Words = Callable[[str], str]


class _RetrySpec(msgspec.Struct, frozen=True):
    """All that this needs of a spec, whatever its kind."""

    backoff: float = 10.0


def moved_of(lease: Lease, state: AttemptState, records: Sequence[StepRecord], *, words: Words) -> JobMoved:
    """``records``: the steps that changed. A job of an in-process kind has none to show."""
    in_process = state.plan is not None and state.plan.in_process
    current = None if state.current is None or in_process else state.steps[state.current]
    return JobMoved(
        lease=lease.id,
        phase=state.phase,
        alive=state.is_alive,
        stop_asked=state.cause != 0,
        current=None if current is None else current.index,
        current_name=None if current is None else current.name,
        steps_total=0 if in_process else len(state.steps),
        started_at=state.started_at,
        steps=tuple([_told(step, words) for step in records]),
    )


def end_of(lease: Lease, result: Result, superseded: bool, *, words: Words, rng: Random) -> AttemptEnd:
    retry: float | None = None
    if result.outcome is not _SUCCEEDED and result.outcome is Outcome.FAILED:
        retry = decide_retry(
            failures=lease.failures,
            attempts=lease.attempts,
            backoff=_backoff(lease),
            rng=rng,
            may_retry=result.may_retry,
        ).delay
    return AttemptEnd(
        lease=lease.id,
        job=lease.job,
        attempt=lease.attempt,
        outcome=Outcome.SUPERSEDED if superseded else result.outcome,
        exit_code=result.exit_code,
        signal=result.signal,
        error=None if result.error is None else words(result.error),
        reason=result.reason,
        retry_delay=retry,
        started_at=result.started_at,
        ended_at=result.ended_at or datetime.now(UTC),
        steps=[_told(step, words) for step in result.steps],
    )


def success_of(lease: Lease, state: AttemptState, end: StepEnd) -> AttemptEnd:
    """The end of an in-process attempt that succeeded; as ``end_of`` would have it."""
    return AttemptEnd(
        lease=lease.id,
        job=lease.job,
        attempt=lease.attempt,
        outcome=_SUCCEEDED,
        exit_code=0,
        started_at=state.started_at,
        ended_at=end.ended_at,
    )


def fit_to_leave(lease: Lease, text: str, sink: LogSink, *, log_open: bool) -> str:
    """A text fit to leave the actor: redacted, without NULs, of bounded length."""
    if not log_open:
        text = SecretSet(secret_values(lease.secrets, lease.redact, {})).text(text)
    text = sink.redact(lease.id, text).replace("\0", "\\0")
    return text if len(text) <= TEXT_CAP else text[: TEXT_CAP - 1] + "…"


def _told(step: StepRecord, words: Words) -> StepRecord:
    """A copy: the record told is the dispatcher's from now on."""
    return msgspec.structs.replace(step, error=None if step.error is None else words(step.error))


def _backoff(lease: Lease) -> float:
    try:
        return msgspec.json.decode(lease.spec, type=_RetrySpec).backoff
    except msgspec.MsgspecError:
        return _RetrySpec().backoff
