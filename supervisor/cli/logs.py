"""``logs``: a job's log, once or as it is written."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from supervisor.cli.exits import Exit
from supervisor.cli.follow import LogView, Watch, follow_log
from supervisor.cli.terminal import Terminal
from supervisor.model.errors import InvalidInput, StoreUnavailable
from supervisor.protocol import LogsParams, LogStream, ShowParams, ShowReply


def logs(args: Namespace, terminal: Terminal) -> int:
    watch = Watch(args, terminal)
    params = LogsParams(
        id=args.id,
        attempt=args.attempt,
        step=None if args.step is None else _step(watch, args.id, args.step),
        stream=None if args.stream is None else LogStream(args.stream),
        offset=args.since_offset or 0,
        follow=args.follow,
    )
    steps = None
    if terminal.width is not None and not args.raw:
        steps = _steps_of(watch, args.id)
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
    if ended is None and terminal.width is not None and not terminal.json:
        terminal.note("no attempt yet: nothing was logged", "dim")
    return Exit.OK


def _step(watch: Watch, job: int, asked: str) -> str:
    """What the daemon calls the step: its name, or its index, which counts from 0 where people see 1/3, 2/3, 3/3."""
    if not (asked.isascii() and asked.isdigit()):
        return asked
    try:
        spec = watch.call("Show", ShowParams(id=job), ShowReply).spec
    except StoreUnavailable:
        spec = {}
    names = [step.get("name") for step in spec.get("steps", ())]
    if asked in names:
        return asked
    number, count = int(asked), count_steps(spec)
    if number < 1 or (count is not None and number > count):
        raise InvalidInput("step", f"job {job} has no step {asked}", "a step's name, or its number from 1")
    return str(number - 1)


def _steps_of(watch: Watch, job: int) -> int | None:
    """How many steps the job's attempts have; None while nobody can say."""
    try:
        return count_steps(watch.call("Show", ShowParams(id=job), ShowReply).spec)
    except StoreUnavailable:
        return None


def count_steps(spec: dict[str, Any]) -> int | None:
    """From a job's spec: its steps, and one of bsup's own where there is something to check out or to write."""
    steps = spec.get("steps")
    if not isinstance(steps, list):
        return None
    return len(steps) + (1 if spec.get("repository") or spec.get("files") else 0)
