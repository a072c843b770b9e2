"""``wait``: until jobs are over."""

from __future__ import annotations

from argparse import Namespace

from supervisor.cli import views
from supervisor.cli.exits import CommandError, Exit, mirrored
from supervisor.cli.follow import Watch, wait_for
from supervisor.cli.terminal import Terminal
from supervisor.cli.text import duration, plural, safe
from supervisor.framing import CallTimeout
from supervisor.protocol import JobView


def wait(args: Namespace, terminal: Terminal) -> int:
    over: dict[int, JobView] = {}
    watch = Watch(args, terminal)
    try:
        for job in wait_for(watch, terminal, args.ids, first=args.any, timeout=args.timeout):
            over[job.id] = job
            if terminal.json:
                terminal.object(job)
            else:
                terminal.line(end_line(terminal, job))
            terminal.out.flush()
    except CallTimeout:
        left = [i for i in dict.fromkeys(args.ids) if i not in over]
        raise CommandError(
            f"not over after {duration(args.timeout)}: {plural(len(left), 'job')} ({', '.join(map(str, left[:20]))})",
            f"they go on; see `bsup show {left[0]}`" if left else "",
            Exit.TIMEOUT,
        ) from None
    except KeyboardInterrupt:
        terminal.note("bsup: no longer waiting; the jobs go on", "dim")
        return Exit.INTERRUPTED
    finally:
        watch.close()
    return next((code for i in args.ids if i in over and (code := mirrored(over[i]))), 0)


def end_line(terminal: Terminal, job: JobView) -> str:
    """``12 build: failed after 3m12s, exit code 2``."""
    text = f"{job.id} {safe(job.name)}: {terminal.state(job.state)}"
    if job.duration is not None:
        text += f" after {duration(job.duration)}"
    if job.state != "succeeded":
        end = views.end_of(job.exit_code, job.signal)
        if end and not (job.error or "").endswith(end):
            text += f", {end}"
        if job.error:
            text += f": {safe(job.error)}"
        elif job.reason:
            text += f": {views.REASONS.get(job.reason, job.reason)}"
    return text
