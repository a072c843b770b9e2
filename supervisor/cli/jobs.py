"""``ps``, ``show`` and ``attempts``: what jobs there are, and all of one."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from supervisor.cli import views
from supervisor.cli.configuration import connect
from supervisor.cli.exits import Exit
from supervisor.cli.parser import UsageError
from supervisor.cli.table import Cell, Column
from supervisor.cli.terminal import STATE_STYLE, Terminal
from supervisor.cli.text import age, duration, local, plural, safe
from supervisor.model.job import State
from supervisor.protocol import (
    AttemptsParams,
    AttemptsReply,
    AttemptView,
    JobView,
    ListParams,
    ListReply,
    ShowParams,
    ShowReply,
)

_PS = (
    Column("ID", right=True),
    Column("NAME", least=8),
    Column("KIND", order=4),
    Column("STATE"),
    Column("AGE", order=1, right=True),
    Column("RUN", order=2, right=True),
    Column("PROGRESS", least=6, order=3),
    Column("HOST", least=6, order=5),
    Column("EXIT", order=6, right=True),
)


def filters(args: Namespace) -> ListParams:
    """The filters of the command line. Raises UsageError."""
    states = []
    for word in (part.strip() for given in args.state for part in given.split(",")):
        try:
            states.append(State(word))
        except ValueError:
            raise UsageError(f"--state: no state {word!r}", f"states are {', '.join(State)}") from None
    if args.limit is not None and args.limit < 1:
        raise UsageError("--limit: must be 1 or more")
    return ListParams(states=states, kinds=args.kind, labels=args.label, all=args.all, limit=args.limit)


def ps(args: Namespace, terminal: Terminal) -> int:
    params = filters(args)
    # What is printed as a table needs less than half of what there is.
    params.brief = not terminal.json
    jobs: list[JobView] = []
    notice: str | None = None
    with connect(args) as daemon:
        for reply in daemon.stream("List", params, ListReply):
            notice = reply.notice or notice
            if reply.job is None:
                continue
            if terminal.json:
                terminal.object(reply.job)
            else:
                jobs.append(reply.job)
    if notice:
        terminal.warn(notice)
    if terminal.json:
        return Exit.OK
    if not jobs:
        if terminal.width is not None and not notice:
            wide = params.all or params.states
            terminal.note(
                "no jobs" if wide else "no jobs that are not over (`bsup ps --all` lists those that are)", "dim"
            )
        return Exit.OK
    terminal.table(_PS, [job_row(job) for job in jobs])
    return Exit.OK


def job_row(job: JobView) -> list[str | Cell]:
    """A line of ``ps``."""
    return [
        str(job.id),
        job.name or "-",
        job.kind,
        Cell(views.state_word(job), STATE_STYLE.get(job.state)),
        age(job.age),
        duration(job.duration),
        views.progress(job),
        job.host or "-",
        "-" if job.exit_code is None else str(job.exit_code),
    ]


def show(args: Namespace, terminal: Terminal) -> int:
    with connect(args) as daemon:
        reply = daemon.call("Show", ShowParams(id=args.id), ShowReply)
    if terminal.json:
        terminal.object(views.shown(reply))
        return Exit.OK
    job = reply.job
    terminal.line(f"{terminal.paint(f'job {job.id}', 'bold')} {safe(job.name)} · {_state_line(terminal, job)}")
    for label, text in _facts(reply):
        terminal.item(f"  {terminal.paint(f'{label:<11}', 'dim')} ", text, 14)
    if reply.attempts:
        _attempt(terminal, reply.attempts[-1])
        for earlier in reversed(reply.attempts[:-1]):
            terminal.line()
            terminal.line(_attempt_line(terminal, earlier))
    if not State(job.state).is_final:
        terminal.note(
            f"\nfollow it with `bsup logs -f {job.id}`" if job.attempt else "\nit has not been started yet", "dim"
        )
    return Exit.OK


def _state_line(terminal: Terminal, job: JobView) -> str:
    words = terminal.state(job.state)
    if job.phase and job.phase != "running":
        words += f" ({job.phase})"
    if job.state == State.RUNNING:
        words += f" for {duration(job.duration)}" if job.duration is not None else ""
        return words + (f", step {views.progress(job)}" if job.progress else "")
    if State(job.state).is_final:
        words += f" after {duration(job.duration)}" if job.duration is not None else ""
        if end := views.said_end_of(job, is_process=job.kind == "steps"):
            words += f", {end}"
        return words
    return words + (f": {why}" if (why := views.why_waiting(job)) else "")


def _facts(reply: ShowReply) -> list[tuple[str, str]]:
    job, spec = reply.job, reply.spec
    facts: list[tuple[str, str]] = []
    if job.error:
        facts.append(("error", job.error))
    if job.reason and not (job.error and job.reason == "step"):
        facts.append(("reason", views.REASONS.get(job.reason, job.reason)))
    if job.stop_asked_at and not State(job.state).is_final:
        facts.append(("stop", f"asked for at {local(job.stop_asked_at)}"))
    facts.append(("kind", job.kind))
    facts.append(
        (
            "submitted",
            f"{local(job.submitted_at)} ({age(job.age)} ago)" + (f" by {job.submitter}" if job.submitter else ""),
        )
    )
    if job.started_at:
        facts.append(("started", local(job.started_at) + (f" on {job.host}" if job.host else "")))
    if job.ended_at:
        facts.append(("ended", local(job.ended_at)))
    facts.append(("priority", str(job.priority)))
    facts.append(("labels", ", ".join(job.labels)))
    facts.append(("tried", _tries(job)))
    if isinstance(repository := spec.get("repository"), dict):
        facts.append(("repository", f"{repository.get('url')} at {repository.get('commit')}"))
    if isinstance(files := spec.get("files"), dict):
        facts.append(("files", ", ".join(files)))
    if args := spec.get("args"):
        facts.append(("args", views.compact(args)))
    if isinstance(secrets := spec.get("secrets"), dict | list):
        facts.append(("secrets", ", ".join(f"{name}=•••" for name in secrets)))
    if spec.get("timeout"):
        facts.append(
            ("timeout", duration(spec["timeout"]) if isinstance(spec["timeout"], int | float) else spec["timeout"])
        )
    facts.append(("after", ", ".join(map(str, reply.parents))))
    facts.append(("before", ", ".join(map(str, reply.children))))
    return [(label, text) for label, text in facts if text and text != "None"]


def _tries(job: JobView) -> str:
    """How often it was tried and why again; empty for a job of one attempt."""
    if job.attempt < 2 and not job.losses and not job.releases:
        return ""
    words = [plural(job.attempt, "time")]
    if job.failures:
        words.append(f"{job.failures} of {plural(job.attempts or 0, 'failure')} allowed")
    if job.losses:
        words.append(f"{plural(job.losses, 'lost host', 'lost hosts')}")
    if job.releases:
        words.append(f"given back {plural(job.releases, 'time')}")
    return ", ".join(words)


def _attempt_line(terminal: Terminal, attempt: AttemptView) -> str:
    outcome = attempt.outcome or "running"
    words = [f"attempt {attempt.attempt}", terminal.state(outcome), f"on {safe(attempt.host)}"]
    if attempt.started_at:
        words.append(f"at {local(attempt.started_at)}")
    if attempt.duration is not None:
        words.append(f"for {duration(attempt.duration)}")
    if end := views.said_end_of(attempt, is_process=bool(attempt.steps)):
        words.append(f"({end})")
    line = " ".join(words)
    return line + (f"\n  {safe(attempt.error)}" if attempt.error else "")


_STEPS = (
    Column("#", right=True),
    Column("STEP", least=8),
    Column("STATE"),
    Column("TIME", right=True),
    Column("EXIT", right=True),
    Column("ERROR", least=8, order=1),
)


def _attempt(terminal: Terminal, attempt: AttemptView) -> None:
    terminal.line()
    terminal.line(_attempt_line(terminal, attempt))
    if attempt.steps:
        steps_table(terminal, attempt)


def steps_table(terminal: Terminal, attempt: AttemptView) -> None:
    """The steps of an attempt: what ran how long and how it ended."""
    has_errors = any(step.error for step in attempt.steps)
    rows: list[list[str | Cell]] = []
    for step in attempt.steps:
        row: list[str | Cell] = [
            str(step.index + 1),
            step.name,
            Cell(step.state, STATE_STYLE.get(step.state)),
            duration(step.duration),
            views.exit_word(step.exit_code, step.signal),
        ]
        rows.append([*row, step.error or ""] if has_errors else row)
    terminal.table(_STEPS if has_errors else _STEPS[:-1], rows)


def attempts(args: Namespace, terminal: Terminal) -> int:
    found = 0
    with connect(args) as daemon:
        for reply in daemon.stream("Attempts", AttemptsParams(id=args.id), AttemptsReply):
            attempt = reply.attempt
            if attempt is None:
                continue
            if terminal.json:
                terminal.object(_attempt_json(attempt))
                continue
            if found:
                terminal.line()
            found += 1
            terminal.line(_attempt_line(terminal, attempt))
            if attempt.steps:
                steps_table(terminal, attempt)
    if not found and terminal.width is not None:
        terminal.note("no attempt yet", "dim")
    return Exit.OK


def _attempt_json(attempt: AttemptView) -> dict[str, Any]:
    import msgspec

    return {"id": attempt.job, **msgspec.to_builtins(attempt)}
