"""``demo``: a real build from nothing to its end, on an embedded database, and everything removed afterwards.

It starts a daemon as a user would, submits a build of bsup's own repository (or of a sample one that it makes),
shows the log as it is written, and sums the steps up. It ends 0 only if the build succeeded and everything could be
stopped and removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from supervisor.cli import demo_build
from supervisor.cli.connection import Connection
from supervisor.cli.exits import CommandError, Exit
from supervisor.cli.follow import LogView, Watch, follow_log, wait_for
from supervisor.cli.jobs import steps_table
from supervisor.cli.terminal import Terminal
from supervisor.cli.text import duration, plural
from supervisor.cli.views import count_steps
from supervisor.cli.wait import end_line
from supervisor.model.errors import BsupError
from supervisor.protocol import (
    JobView,
    LogsParams,
    ShowParams,
    ShowReply,
    StatusParams,
    StatusReply,
    StopParams,
    StopReply,
    SubmitParams,
    SubmitReply,
)

START_TIMEOUT = 120.0
"""Seconds for the daemon to make and start its PostgreSQL on a slow machine."""
STOP_TIMEOUT = 60.0
SHEPHERD_TIMEOUT = 15.0
POLL = 0.1

_CONFIG = """[host]
name = "demo"
slots = 2

[shutdown]
on_term = "drain"
drain = "30s"

[jobs]
uids = "{uids}"
"""


def demo(args: Namespace, terminal: Terminal) -> int:
    began = time.monotonic()
    # Below /tmp whatever TMPDIR says: a Unix socket's path may have 107 bytes.
    state = Path(tempfile.mkdtemp(prefix="bsup-demo-", dir="/tmp"))
    state.chmod(0o711)
    code = int(Exit.ERROR)
    try:
        with _daemon(state, terminal) as watch:
            code = _build(watch, state, terminal)
    except KeyboardInterrupt:
        terminal.note("bsup: interrupted: everything is stopped and removed now", "yellow")
        code = Exit.INTERRUPTED
    finally:
        problems = _clean_up(state, keep=args.keep)
    for problem in problems:
        terminal.warn(problem)
    if args.keep:
        terminal.note(f"demo: everything is kept in {state}: the daemon's log is daemon.log there")
    terminal.note(f"demo: {'done' if code == 0 else 'ended'} after {duration(time.monotonic() - began)}", "bold")
    return code if not problems or code else int(Exit.ERROR)


def _build(watch: Watch, state: Path, terminal: Terminal) -> int:
    build = demo_build.choose(state, own_uids=_own_uids(state))
    for remark in build.remarks:
        terminal.note(f"demo: {remark}")
    job = watch.call("Submit", SubmitParams(spec=build.spec, key="demo"), SubmitReply).id
    terminal.note(f"demo: job {job} builds {build.title}", "bold")
    terminal.note("")
    view = LogView(terminal, job, raw=False, steps=count_steps(build.spec), headers=True)
    try:
        follow_log(watch, view, LogsParams(id=job, follow=True), live=terminal.is_live)
        view.end_line()
        (over,) = wait_for(watch, terminal, [job])
    except KeyboardInterrupt:
        view.end_line()
        _stop(watch, job)
        raise
    _summary(watch, over, terminal)
    return int(Exit.OK if over.state == "succeeded" else Exit.ERROR)


def _stop(watch: Watch, job: int) -> None:
    """At once, as nobody waits for this build any more: a drain would."""
    with contextlib.suppress(BsupError), contextlib.ExitStack() as stack:
        connection = watch.another()
        if connection is not None:
            stack.enter_context(connection)
            for _ in connection.stream("Stop", StopParams(ids=[job], kill=True), StopReply):
                pass


def _summary(watch: Watch, over: JobView, terminal: Terminal) -> None:
    attempts = watch.call("Show", ShowParams(id=over.id), ShowReply).attempts
    if terminal.json:
        terminal.object(over)
        return
    terminal.line()
    terminal.line(terminal.paint("summary", "bold"))
    if attempts:
        steps_table(terminal, attempts[-1])
    terminal.line()
    terminal.line(f"job {end_line(terminal, over)}")


@contextlib.contextmanager
def _daemon(state: Path, terminal: Terminal) -> Iterator[Watch]:
    """A daemon of its own with an embedded database; drained and ended afterwards."""
    uids, remark = demo_build.uids_policy()
    if remark:
        terminal.note(f"demo: {remark}")
    config = state / "bsup.toml"
    config.write_text(_CONFIG.format(uids=uids))
    socket = state / "control.sock"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BSUP_")}
    command = [sys.executable, "-m", "supervisor", "daemon", "--config", str(config), "--dsn", "embedded"]
    terminal.note("demo: starting a daemon and a PostgreSQL of its own")
    with (state / "daemon.log").open("wb") as log:
        # A session of its own: Ctrl-C ends the demo, which then ends the daemon in order.
        process = subprocess.Popen(
            [*command, "--state", str(state), "--socket", str(socket)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            start_new_session=True,
        )
    try:
        _until_ready(process, socket, terminal)
        watch = Watch(Namespace(socket=str(socket)), terminal)
        try:
            yield watch
        finally:
            watch.close()
    except BsupError:
        terminal.note(_tail(state / "daemon.log"), "dim")
        raise
    finally:
        _end(process)


def _until_ready(process: subprocess.Popen[bytes], socket: Path, terminal: Terminal) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    began = time.monotonic()
    last = "it does not listen yet"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CommandError(f"the daemon ended with code {process.returncode} while it started")
        try:
            with Connection(str(socket)) as daemon:
                status = daemon.call("Status", StatusParams(), StatusReply, timeout=10.0).status
            if status.database.available:
                terminal.clear_live()
                return
            last = "; ".join(status.problems) or "the database is not there yet"
        except BsupError as error:
            last = str(error)
        terminal.live(f"· starting · {duration(time.monotonic() - began)}")
        time.sleep(POLL)
    raise CommandError(f"the daemon was not ready within {START_TIMEOUT:g} s: {last}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Drains the daemon; a second SIGTERM stops the jobs of one that takes too long."""
    for attempt in range(2):
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT / (attempt + 1))
    if process.poll() is None:
        process.kill()
        process.wait()
        raise CommandError("the daemon did not end when it was asked to, and was killed")
    if process.returncode != 0:
        raise CommandError(f"the daemon ended with code {process.returncode}")


def _clean_up(state: Path, *, keep: bool) -> list[str]:
    """Ends what outlives a daemon on purpose, and removes the rest; what could not be, in sentences."""
    from supervisor.store import embedded

    problems = []
    try:
        embedded.stop(state)
    except (BsupError, OSError) as error:
        problems.append(f"the embedded PostgreSQL was not stopped: {error}")
    if not _end_shepherd(state):
        problems.append(f"the shepherd of {state} did not end")
    if not keep:
        shutil.rmtree(state, ignore_errors=True)
        if state.exists():
            problems.append(f"{state} could not be removed whole")
    return problems


def _end_shepherd(state: Path) -> bool:
    """It would end by itself a while after its daemon; asked to, it does so at once."""
    try:
        pid = int((state / "shepherd.pid").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return True
    deadline = time.monotonic() + SHEPHERD_TIMEOUT
    while _is_shepherd_of(pid, state):
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        time.sleep(POLL)
    return True


def _is_shepherd_of(pid: int, state: Path) -> bool:
    # Its arguments name the state directory: a pid that was given to another process since is left alone.
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"--state={state}".encode() in words


def _own_uids(state: Path) -> bool:
    return os.geteuid() == 0 and 'uids = "auto"' in (state / "bsup.toml").read_text()


def _tail(log: Path, lines: int = 30) -> str:
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    shown = text.splitlines()[-lines:]
    return "\n".join([f"the last {plural(len(shown), 'line')} of the daemon's log:", *(f"  {line}" for line in shown)])
