"""A row of the store becomes what goes over the wire, field by field."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from supervisor.actors.control_views import job_view
from supervisor.model.job import JobRow, State

BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def full_row() -> JobRow:
    """Every field has a value that no other has."""
    values: dict[str, Any] = {}
    for number, field in enumerate(msgspec.structs.fields(JobRow)):
        if field.name == "labels":
            values[field.name] = ["a", "b"]
        elif field.name == "state":
            values[field.name] = State.FAILED
        elif field.name.endswith("_at"):
            values[field.name] = BEGAN + timedelta(seconds=number)
        elif field.name in ("name", "kind", "submitter", "host", "lease", "error", "reason", "step_name"):
            values[field.name] = field.name
        else:
            values[field.name] = 100 + number
    return JobRow(**values)


def test_each_field_of_a_view_is_that_of_its_row() -> None:
    """Views are made by position."""
    row = full_row()
    now = BEGAN + timedelta(hours=1)
    view = msgspec.structs.asdict(job_view(row, now))
    made = {name: view.pop(name) for name in ("phase", "progress", "age", "duration")}
    assert view == {name: getattr(row, name) for name in view}
    assert row.started_at is not None and row.ended_at is not None and row.step is not None
    assert made["phase"] is None and msgspec.structs.astuple(made["progress"]) == (
        row.step + 1,
        row.steps_total,
        row.step_name,
    )
    assert made["age"] == (now - row.submitted_at).total_seconds()
    assert made["duration"] == (row.ended_at - row.started_at).total_seconds()
