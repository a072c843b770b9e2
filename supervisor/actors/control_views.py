"""Rows of the store and what this host's own jobs say, made into what goes over the wire. Pure.

May import ``model``, ``messages`` and ``protocol``. Called by the control actor's calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from supervisor.messages import RunningJob
from supervisor.model.job import (
    AttemptRow,
    Filter,
    JobLine,
    JobRow,
    LogRecord,
    Outcome,
    State,
    StepRecord,
    StepState,
    Stream,
)
from supervisor.protocol import LOG_PIECE, AttemptView, JobView, LineView, LogPiece, LogStream, Progress, StepView

STREAMS = {Stream.OUT: LogStream.OUT, Stream.ERR: LogStream.ERR, Stream.NOTE: LogStream.NOTE}


def job_view(row: JobRow, now: datetime, live: RunningJob | None = None) -> JobView:
    """A job as the database has it; ``live`` adds what only its host knows, if it tells of the same attempt. The times
    of both are in UTC."""
    state = row.state
    is_running = state is State.RUNNING
    here = live if live is not None and is_running and live.attempt == row.attempt else None
    started_at = row.started_at or (here.started_at if here else None)
    # In the order of the fields: a list may have ten thousand, and keywords take ten times as long.
    return JobView(
        row.id,
        row.name,
        row.kind,
        state,
        None if is_running else exit_code(row.exit_code, row.signal, ok=state is State.SUCCEEDED),
        row.signal,
        None if here is None else here.phase,
        _progress(here or row),
        row.host,
        _seconds(row.submitted_at, now),
        _seconds(started_at, row.ended_at or (now if is_running else None)),
        row.revision,
        row.generation,
        row.attempt,
        row.attempts,
        row.failures,
        row.losses,
        row.releases,
        row.labels,
        row.priority,
        row.parents_left,
        row.submitter,
        row.submitted_at,
        row.ready_at,
        row.run_at,
        started_at,
        row.ended_at,
        row.stop_asked_at,
        row.lease,
        row.error,
        row.reason,
    )


def line_view(row: JobLine, live: RunningJob | None = None) -> LineView:
    """As ``job_view``, of a brief list."""
    state = row.state
    is_running = state is State.RUNNING
    here = live if live is not None and is_running and live.attempt == row.attempt else None
    return LineView(
        row.id,
        row.name,
        row.kind,
        state,
        None if is_running else exit_code(row.exit_code, row.signal, ok=state is State.SUCCEEDED),
        row.signal,
        None if here is None else here.phase,
        _progress(here or row),
        row.host,
        row.age,
        row.duration,
        row.attempt,
        row.labels,
        row.parents_left,
        row.run_at,
        row.reason,
    )


def local_view(live: RunningJob, host: str, now: datetime) -> JobView:
    """A job of this host, told without the database."""
    return JobView(
        id=live.job,
        name=live.name,
        kind=live.kind,
        state=State.RUNNING,
        phase=live.phase,
        progress=_progress(live),
        host=host,
        duration=_seconds(live.started_at, now),
        attempt=live.attempt,
        started_at=_utc(live.started_at),
        lease=str(live.lease),
    )


def local_line(live: RunningJob, host: str, now: datetime) -> LineView:
    """As ``local_view``, of a brief list."""
    return LineView(
        id=live.job,
        name=live.name,
        kind=live.kind,
        state=State.RUNNING,
        phase=live.phase,
        progress=_progress(live),
        host=host,
        duration=_seconds(live.started_at, now),
        attempt=live.attempt,
    )


def selects(where: Filter, live: RunningJob) -> bool:
    """Whether a filter takes a job of this host, as far as the host can say: it does not know a job's labels."""
    return (not where.states or State.RUNNING in where.states) and (not where.kinds or live.kind in where.kinds)


def attempt_view(row: AttemptRow, now: datetime) -> AttemptView:
    return AttemptView(
        job=row.job,
        attempt=row.attempt,
        generation=row.generation,
        host=row.host,
        lease=row.lease,
        outcome=row.outcome,
        exit_code=exit_code(row.exit_code, row.signal, ok=row.outcome is Outcome.SUCCEEDED),
        signal=row.signal,
        error=row.error,
        reason=row.reason,
        started_at=_utc(row.started_at),
        ended_at=_utc(row.ended_at),
        duration=_seconds(row.started_at, row.ended_at or (now if row.outcome is None else None)),
        log_bytes=row.log_bytes,
        steps=[_step_view(step, now) for step in row.steps],
    )


def _step_view(step: StepRecord, now: datetime) -> StepView:
    return StepView(
        index=step.index,
        name=step.name,
        state=step.state,
        exit_code=exit_code(step.exit_code, step.signal, ok=step.state is StepState.SUCCEEDED),
        signal=step.signal,
        started_at=_utc(step.started_at),
        ended_at=_utc(step.ended_at),
        duration=_seconds(step.started_at, step.ended_at or (now if step.state is StepState.RUNNING else None)),
        error=step.error,
    )


def log_pieces(record: LogRecord, attempt: int, step_name: str | None) -> Iterator[LogPiece]:
    """A record, cut so that each piece fits into a frame."""
    at = datetime.fromtimestamp(record.at, UTC)
    for begin in range(0, len(record.data), LOG_PIECE):
        yield LogPiece(
            attempt=attempt,
            offset=record.offset + begin,
            step=record.step,
            step_name=step_name,
            stream=STREAMS[record.stream],
            at=at,
            data=record.data[begin : begin + LOG_PIECE],
        )


def exit_code(code: int | None, signal: int | None, *, ok: bool) -> int | None:
    """As a shell would have it: 128 + n for an end by signal n; what succeeded without saying so has 0."""
    if code is not None:
        return code
    if signal is not None:
        return 128 + signal
    return 0 if ok else None


R = TypeVar("R", bound=msgspec.Struct)


def utc_fields(row: R) -> R:
    """The row with its times in UTC, for rows that go out as they are."""
    times = {name: getattr(row, name) for name in row.__struct_fields__ if isinstance(getattr(row, name), datetime)}
    return msgspec.structs.replace(row, **{name: _utc(at) for name, at in times.items()})


def _progress(of: JobRow | JobLine | RunningJob) -> Progress | None:
    if of.step is None or of.steps_total == 0:
        return None
    return Progress(step=of.step + 1, steps=of.steps_total, name=of.step_name)


def _utc(at: datetime | None) -> datetime | None:
    return None if at is None else at.astimezone(UTC)


def _seconds(begin: datetime | None, end: datetime | None) -> float | None:
    """Rounded to a millisecond; never below 0, as the two may come from two clocks."""
    if begin is None or end is None:
        return None
    seconds = (end - begin).total_seconds()
    return int(seconds * 1000) / 1000 if seconds > 0 else 0.0
