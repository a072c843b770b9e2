"""Rows of the database as the values that ``ports`` promises, and values as what a statement takes.

Used by the modules of this package that run statements. Column names are those of ``sql/*.sql``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TypeAlias
from uuid import UUID

import asyncpg
import msgspec

from supervisor.model.job import (
    AttemptEnd,
    AttemptRow,
    JobLine,
    JobRow,
    Lease,
    LeaseId,
    Outcome,
    State,
    StepRecord,
    StepState,
)

Row: TypeAlias = asyncpg.Record

LONGEST_TEXT = 16 * 1024


def lease_id(session: UUID, counter: int) -> LeaseId:
    return LeaseId(session.hex, counter)


def storable(text: str | None) -> str | None:
    """A text as PostgreSQL takes it: no NUL, valid Unicode; an error of a job may be anything, and of any length."""
    if text is None:
        return None
    return text[:LONGEST_TEXT].replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def unix(at: datetime | None) -> float | None:
    """Seconds, as exact as PostgreSQL's microseconds, and cheaper than a timestamp by ten."""
    return None if at is None else at.timestamp()


def claimed(row: Row, session: str, leased_at: datetime, kinds: Mapping[int, str]) -> Lease:
    """A row of ``claim``; what all of them share beside it."""
    counter, job, attempt, need, name, spec, attempts, failures, losses, _, cpu, memory, alone, secrets, _ = row
    values, redactions = ({}, {}) if secrets is None else _secrets(secrets)
    return Lease(
        LeaseId(session, counter),
        job,
        attempt,
        kinds[need],
        name,
        msgspec.Raw(spec.encode()),
        values,
        redactions,
        attempts,
        failures,
        losses,
        leased_at,
        cpu,
        memory,
        alone,
    )


def lease_of(row: Row, session: str) -> Lease:
    """A row of ``leases``."""
    values, redactions = _secrets(row["secrets"] or ())
    return Lease(
        id=LeaseId(session, row["counter"]),
        job=row["job_id"],
        attempt=row["attempt"],
        kind=row["kind"],
        name=row["name"],
        spec=msgspec.Raw(row["spec"].encode()),
        secrets=values,
        redact=redactions,
        attempts=row["attempts"],
        failures=row["failures"],
        losses=row["losses"],
        leased_at=row["leased_at"],
        cpu=row["cpu"],
        memory=row["memory"],
        alone=row["alone"],
    )


def _secrets(rows: Sequence[Sequence[str | None]]) -> tuple[dict[str, str], dict[str, str]]:
    """Of (name or null, value, replacement or null): secrets by name, replacements by value."""
    secrets: dict[str, str] = {}
    redact: dict[str, str] = {}
    for name, value, replacement in rows:
        if value is not None and name is not None:
            secrets[name] = value
        elif value is not None and replacement is not None:
            redact[value] = replacement
    return secrets, redact


_STATES = {state.value: state for state in State}


def job_of(row: Row) -> JobRow:
    """From a row whose columns are the fields of JobRow, in their order."""
    job = JobRow(*row)
    job.state = _STATES[job.state]
    return job


def line_of(row: Row) -> JobLine:
    """From a row whose columns are the fields of JobLine, in their order."""
    line = JobLine(*row)
    line.state = _STATES[line.state]
    return line


def step_of(row: Row) -> StepRecord:
    return StepRecord(
        index=row["idx"],
        name=row["name"],
        state=StepState(row["state"]),
        exit_code=row["exit_code"],
        signal=row["signal"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        error=row["error"],
    )


def attempt_of(row: Row, steps: list[StepRecord]) -> AttemptRow:
    return AttemptRow(
        job=row["job_id"],
        attempt=row["attempt"],
        generation=row["generation"],
        host=row["host"],
        lease=str(lease_id(row["session"], row["counter"])),
        outcome=Outcome(row["outcome"]) if row["outcome"] is not None else None,
        exit_code=row["exit_code"],
        signal=row["signal"],
        error=row["error"],
        reason=row["reason"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        log_bytes=row["log_bytes"],
        steps=steps,
    )


def steps_json(steps: Iterable[tuple[LeaseId, StepRecord]]) -> str:
    """Steps for ``jsonb_to_recordset``; of several records of one step the last."""
    last = {
        (lease, step.index): {
            "session": lease.session,
            "counter": lease.counter,
            "index": step.index,
            "name": storable(step.name),
            "state": step.state.value,
            "exit_code": step.exit_code,
            "signal": step.signal,
            "started_at": step.started_at,
            "ended_at": step.ended_at,
            "error": storable(step.error),
        }
        for lease, step in steps
    }
    return msgspec.json.encode(list(last.values())).decode()


def steps_of_ends(ends: Sequence[AttemptEnd]) -> str:
    return steps_json((end.lease, step) for end in ends for step in end.steps)
