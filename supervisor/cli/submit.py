"""``submit``: reads, checks and sends a job; follows it or waits for it where asked to."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from supervisor.cli import jobfile
from supervisor.cli.configuration import connect, max_frame
from supervisor.cli.exits import CommandError, Exit, mirrored
from supervisor.cli.parser import UsageError, job_id
from supervisor.cli.terminal import Terminal
from supervisor.cli.views import count_steps
from supervisor.framing import encode_call
from supervisor.model.errors import BsupError, InvalidInput
from supervisor.protocol import JobView, LogsParams, ShowParams, ShowReply, SubmitParams, SubmitReply

if TYPE_CHECKING:
    from supervisor.cli.follow import Watch


def submit(args: Namespace, terminal: Terminal) -> int:
    if args.many is not None:
        from supervisor.cli.submit_many import submit_many

        return submit_many(args, terminal)
    file, settings, after = sort_out(args.file, args.set, args.after, kind=args.kind)
    if any(setting.startswith(("secrets.", "redact.")) for setting in settings):
        terminal.warn(
            "a secret on the command line can be read by every user of this machine: put it into the job file"
        )
    spec = load(file, settings, kind=args.kind)
    params = SubmitParams(spec=spec, key=args.key, after=after)
    limit = max_frame(args)
    size = len(encode_call("Submit", params)) - 1
    if size > limit:
        raise CommandError(
            f"{file or 'this job'}: {size:,} bytes as it is sent; the daemon takes at most {limit:,}",
            "put large files into the repository, or where the steps can fetch them",
            Exit.USAGE,
        )
    with connect(args) as daemon:
        job = daemon.call("Submit", params, SubmitReply).id
    if not args.json:
        terminal.line(str(job))
    else:
        terminal.object({"id": job})
    terminal.out.flush()
    if args.follow or args.wait:
        return _watch(args, terminal, job, count_steps(spec))
    return Exit.OK


def sort_out(
    file: str | None, settings: Sequence[str], after: Sequence[str], kind: str | None = None
) -> tuple[str | None, list[str], list[int]]:
    """The file, the ``--set`` pairs and the ids of ``--after``, where a flag that takes several has swallowed the
    file: ``submit --after 1 2 job.yaml`` means what it says. Raises UsageError.
    """
    pairs = [word for word in settings if "=" in word]
    ids = [part for word in after for part in word.split(",") if part]
    strays = [word for word in settings if "=" not in word] + [word for word in ids if not word.isdigit()]
    if file is None and len(strays) == 1:
        file, strays = strays[0], []
    if strays:
        flag = "--set takes key=value" if strays[0] in settings else "--after takes ids of jobs"
        raise UsageError(f"{flag}, not {strays[0]!r}", "`bsup submit --help` shows how it is used")
    if file is None and kind is None:
        raise UsageError("no job file is named", "name a YAML, TOML or JSON file, `-` for standard input, or a --kind")
    if file is not None and kind is not None:
        raise UsageError("a job file and --kind were both given", "the file says the kind; --set kind=… changes it")
    try:
        return file, pairs, [job_id(word) for word in ids if word.isdigit()]
    except Exception as error:
        raise UsageError(f"--after: {error}") from None


def load(file: str | None, settings: Sequence[str], kind: str | None = None) -> dict[str, Any]:
    """The job as it will be sent, checked here already: its errors name the file. Raises InvalidInput."""
    from supervisor.model.spec import normalize

    if file is None:
        source, spec = "the command line", jobfile.apply({"kind": kind}, settings)
    else:
        source, data = jobfile.read(file)
        spec = jobfile.apply(jobfile.decode(source, data), settings)
    try:
        # A copy: what is sent is what the user wrote, and the daemon has the last word on it.
        normalize(msgspec.json.decode(msgspec.json.encode(spec)))
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error.field}", error.problem, error.allowed) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(source, f"can't be sent: {error}") from None
    return spec


def _watch(args: Namespace, terminal: Terminal, job: int, steps: int | None) -> int:
    from supervisor.cli.follow import LogView, Watch, follow_log, wait_for  # here: only they need it who follow

    watch = Watch(args, terminal)
    view = LogView(terminal, job, raw=False, steps=steps)
    try:
        if args.follow:
            follow_log(watch, view, LogsParams(id=job, follow=True), live=terminal.is_live)
            view.end_line()
        (over,) = wait_for(watch, terminal, [job])
        if terminal.json:
            terminal.object(over)
        else:
            _say_end(watch, terminal, over)
        return mirrored(over)
    except KeyboardInterrupt:
        view.end_line()
        terminal.note(
            f"bsup: detached; job {job} goes on. See it again: bsup logs -f {job}; end it: bsup stop {job}", "yellow"
        )
        return Exit.INTERRUPTED
    finally:
        watch.close()


def _say_end(watch: Watch, terminal: Terminal, over: JobView) -> None:
    """How it ended: with the steps for somebody who looks, a line where it did not succeed in a pipe's log."""
    from supervisor.cli.jobs import steps_table
    from supervisor.cli.wait import end_line

    if terminal.width is not None:
        try:
            attempts = watch.call("Show", ShowParams(id=over.id), ShowReply).attempts
        except BsupError:
            attempts = []
        if attempts and attempts[-1].steps:
            terminal.line()
            steps_table(terminal, attempts[-1])
        terminal.line()
        terminal.line(f"job {end_line(terminal, over)}")
    elif over.state != "succeeded":
        terminal.note(f"bsup: job {end_line(terminal, over)}")
