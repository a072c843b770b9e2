"""``logs``: a job's log, once or as it is written."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from supervisor.cli.exits import Exit
from supervisor.cli.follow import LogView, Watch, follow_log
from supervisor.cli.terminal import Terminal
from supervisor.cli.views import count_steps
from supervisor.model.errors import InvalidInput, StoreUnavailable
from supervisor.protocol import LogsParams, LogStream, ShowParams, ShowReply


def logs(args: Namespace, terminal: Terminal) -> int:
    watch = Watch(args, terminal)
    has_headers = terminal.width is not None and not args.raw
    is_number = args.step is not None and args.step.isascii() and args.step.isdigit()
    spec = _spec_of(watch, args.id) if has_headers or is_number else {}
    params = LogsParams(
        id=args.id,
        attempt=args.attempt,
        step=_step(spec, args.id, args.step) if is_number else args.step,
        stream=None if args.stream is None else LogStream(args.stream),
        offset=args.since_offset or 0,
        follow=args.follow,
    )
    steps = count_steps(spec) if has_headers else None
    view = LogView(terminal, args.id, raw=args.raw, steps=steps, flush=args.follow)
    try:
        ended = follow_log(watch, view, params, live=terminal.is_live)
    except KeyboardInterrupt:
        view.end_line()
        terminal.note(f"bsup: the view ended; job {args.id} is not touched by that", "dim")
        return Exit.INTERRUPTED
    finally:
        watch.close()
    view.end_line()
    if terminal.width is not None and not terminal.json:
        if ended is None:
            terminal.note("no attempt yet: nothing was logged", "dim")
        elif not view.has_said:
            terminal.note("nothing was logged" + (" so far" if ended.outcome is None else ""), "dim")
    return Exit.OK


def _step(spec: dict[str, Any], job: int, asked: str) -> str:
    """What the daemon calls a step of this number: its name, if it is called so, or its index, which counts from 0
    where people see 1/3, 2/3, 3/3.
    """
    if spec and "steps" not in spec:
        raise InvalidInput("step", f"job {job} has none: it is of kind {spec.get('kind')}")
    names = [step.get("name") for step in spec.get("steps", ())]
    if asked in names:
        return asked
    number, count = int(asked), count_steps(spec)
    if number < 1 or (count is not None and number > count):
        raise InvalidInput("step", f"job {job} has no step {asked}", "a step's name, or its number from 1")
    return str(number - 1)


def _spec_of(watch: Watch, job: int) -> dict[str, Any]:
    """The job's spec; an empty one while nobody can say."""
    try:
        return watch.call("Show", ShowParams(id=job), ShowReply).spec
    except StoreUnavailable:
        return {}
