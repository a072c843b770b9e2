"""How a job's state, progress and end are put in words. No I/O; called by the commands that print jobs."""

from __future__ import annotations

import signal
from typing import Any

from supervisor.cli.text import clip, local, plural
from supervisor.model.job import State
from supervisor.protocol import AttemptView, JobView, ShowReply

REASONS = {
    "upstream": "a job that it waited for did not succeed",
    "losses": "its host was lost too often",
    "timeout": "it took longer than its timeout",
    "stop": "it was stopped",
    "step": "a step of it failed",
    "exec": "a command of it could not be started",
    "host": "the host could not prepare it",
    "lease": "its host held the lease no more",
    "orphan": "it was claimed, and never begun",
    "invalid": "the host could not make sense of it",
}


def state_word(job: JobView) -> str:
    """The state, with the phase where that says more."""
    if job.phase is not None and job.phase != "running":
        return f"{job.state}/{job.phase}"
    return str(job.state)


def progress(job: JobView) -> str:
    """``2/5 test``, or why it is not running."""
    if job.progress is not None:
        name = f" {job.progress.name}" if job.progress.name else ""
        return f"{job.progress.step}/{job.progress.steps}{name}"
    if job.state in (State.WAITING, State.READY):
        return why_waiting(job) or "-"
    if State(job.state).is_final and job.state != State.SUCCEEDED:
        return job.reason or "-"
    return "-"


def why_waiting(job: JobView) -> str:
    """What a job that doesn't run waits for; empty if for nothing but a host with room."""
    if job.parents_left:
        return f"for {plural(job.parents_left, 'job')}"
    if job.state == State.WAITING and job.run_at is not None:
        return f"until {local(job.run_at)}"
    if job.state == State.READY:
        return "for room on a host" + (f" with {', '.join(job.labels)}" if job.labels else "")
    return ""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def end_of(exit_code: int | None, by_signal: int | None) -> str:
    """How a process ended, in words; empty if that is not known."""
    if by_signal:
        return f"ended by {signal_name(by_signal)}"
    return "" if exit_code is None else f"exit code {exit_code}"


def said_end_of(of: JobView | AttemptView, *, is_process: bool) -> str:
    """As ``end_of``; the success of what is no process has no exit code to speak of."""
    return end_of(of.exit_code, of.signal) if is_process or of.exit_code else ""


def exit_word(exit_code: int | None, by_signal: int | None) -> str:
    """The same for a column."""
    if by_signal:
        return signal_name(by_signal)
    return "-" if exit_code is None else str(exit_code)


def shown(reply: ShowReply) -> dict[str, Any]:
    """The line of ``show --json``: the job's own keys, and beside them what belongs to it.

    ``attempts`` is the job's budget, as in ``ps``; the attempts themselves are ``attempt_list``.
    """
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(reply)
    job = fields.pop("job")
    return {**job, "parents": fields["parents"], "children": fields["children"], "spec": fields["spec"]} | {
        "attempt_list": fields["attempts"]
    }


def count_steps(spec: dict[str, Any]) -> int | None:
    """From a job's spec (None from an empty one): its steps, and one of bsup's own where there is something to check
    out or to write.
    """
    steps = spec.get("steps")
    if not isinstance(steps, list):
        return None
    return len(steps) + (1 if spec.get("repository") or spec.get("files") else 0)


def compact(value: object, most: int = 200) -> str:
    """JSON on one line, cut where it is long."""
    import msgspec

    return clip(msgspec.json.encode(value).decode(), most)
