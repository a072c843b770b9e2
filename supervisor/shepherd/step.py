"""The life of one step: starting, running, closing (its main process is reaped, what it left is killed), closed.

Standard library only; called by ``host``. The order on disk is what a crash at any point leaves readable: ``claim``
before the process; ``started`` before anyone is told of it; output drained and ``exit`` before the reap (until then
the kernel keeps the status); ``closed`` when nothing of the step lives and all of its output is in the files.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from supervisor.shepherd import kill
from supervisor.shepherd.bond import Bond, Names
from supervisor.shepherd.files import PromisedFile, Refusal, StateDirectory, say
from supervisor.shepherd.launcher import Launcher, Outcome, Spawned
from supervisor.shepherd.loop import Loop, now
from supervisor.shepherd.output import FIFOS, Output
from supervisor.shepherd.spawn import CantExecute, Order
from supervisor.shepherd.spec import StepSpec

_CLOSING_TIME = 0.7
_FIRST_RETRY = 0.002
_LAST_RETRY = 0.05
_DISK_RETRY = 1.0
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STARTED_SIZE = 512
_LONGEST_ERROR = 2000
STOPPING = "stopping"
"""Written when a step is asked to end: ``cause``, ``kill_at`` (CLOCK_BOOTTIME), and whether it is ``abandoned``."""
_TERM = (signal.SIGTERM, signal.SIGCONT)
_KILL = (signal.SIGKILL,)


class Ground(Protocol):
    """What a step needs of the host it runs on."""

    loop: Loop
    state: StateDirectory
    launcher: Launcher
    bond: Bond
    boot_id: str

    def orphans_of(self, step: Step) -> set[int]:
        """Live processes, children of the shepherd now, that came from the step."""
        ...

    def tell(self, event: str, step: Step) -> None: ...

    def begun(self, step: Step) -> None:
        """It has its process."""
        ...

    def closed(self, step: Step, remains: bool) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where a step is: the path as it was asked for, the names of run and step, and the open directory."""

    path: str
    run: str
    index: str
    directory: int


@dataclass(frozen=True)
class Taken:
    """What is on disk of a step that another shepherd started. ``end``: its exit record; ``stopping``: as written."""

    pid: int
    start_time: int
    at: float
    at_boot: float
    end: dict[str, Any] | None
    stopping: dict[str, Any]


class Step:
    """``pid``: the main process, None once it is reaped. ``cause``: why the step was ended from outside."""

    def __init__(self, ground: Ground, place: Place, spec: StepSpec) -> None:
        self.place = place
        self.spec = spec
        self.pid: int | None = None
        self.leader = 0
        self._start_time: int | None = None
        self.started_at = time.time()
        self.cause: str | None = None
        self.abandoned = False
        self._ground = ground
        self._workspace = "/".join((ground.state.path, "work", *spec.workspace))
        self._output: Output
        self._promise = PromisedFile(ground.state, place.directory, "started", _STARTED_SIZE)
        self._on_begun: Callable[[str | None], None] | None = None
        self._exit: dict[str, Any] | None = None
        self._exit_written = False
        self._kill_at: float | None = None
        self._killing = False
        self._closing_since: float | None = None
        self._retry = _FIRST_RETRY
        self._retry_set = False

    @property
    def own_uid(self) -> int | None:
        """The uid that is this step's run's alone; None: it shares one."""
        return self.spec.ids[0] if self.spec.ids and self.spec.own_uid else None

    @property
    def _names(self) -> Names:
        return self.place.run, self.place.index

    @property
    def state(self) -> str:
        if self._on_begun is not None:
            return "starting"
        if self.pid is None:
            return "closing"
        return "running" if self.cause is None else "stopping"

    # --- the beginning ---

    def start(self, begun: Callable[[str | None], None]) -> None:
        """Has it started; ``begun`` is called when ``started`` is on disk, or nobody knows whether it runs, or its
        command can't be executed (its ``exit`` will say so); or with why there can be no process, and then nothing of
        it is left. Raises Refusal where that is so at once."""
        try:
            reader = self.spec.ids[0] if self.spec.ids else None
            self._output = Output.make(self._ground.state, self.place.directory, self.spec.max_output, reader)
            self._promise.reserve()
        except OSError as error:
            self._undo()
            raise Refusal("failed", f"the step could not be started: {error.strerror}: {error.filename}") from error
        self._on_begun = begun
        out, err = self._output.channels
        assert out.fifo is not None and err.fifo is not None
        self._ground.bond.hold(self._names, (out.fifo, err.fifo))
        self._ground.launcher.spawn(self._order(), self._on_outcome)

    def _order(self) -> Order:
        spec = self.spec
        defaults = {
            "PATH": _DEFAULT_PATH,
            "HOME": f"{self._workspace}/home",
            "TMPDIR": "/tmp" if spec.private_tmp else f"{self._workspace}/tmp",
        }
        environment = {**defaults, **spec.env, "BSUP_RUN": spec.token}
        return self._names, spec.argv, spec.cwd, environment, spec.ids, self._workspace, spec.private_tmp

    def _on_outcome(self, outcome: Outcome) -> None:
        assert self._on_begun is not None
        begun, self._on_begun = self._on_begun, None
        problem = None
        match outcome:
            case Spawned():
                self._on_spawned(outcome)
            case CantExecute():
                self._promise.drop()
                self._end_unstarted(outcome)
            case OSError():
                self._undo()
                problem = f"the step could not be started: {outcome.strerror}"
            case None:
                # It may run, or be in the middle of its set-up: what is found of it is killed.
                self._promise.drop()
                self.abandoned = True
                self._closing_since = now()
                self._ground.loop.at(now(), self.close)
        begun(problem)

    def _on_spawned(self, spawned: Spawned) -> None:
        self.pid = self.leader = spawned.pid
        self._ground.begun(self)
        self._watch()
        at = now()
        if self.spec.timeout is not None:
            self._ground.loop.at(at + self.spec.timeout, self._on_timeout)
        started = {
            "pid": spawned.pid,
            "start_time": kill.start_time(spawned.pid),
            "boot_id": self._ground.boot_id,
            "at": self.started_at,
            "at_boot": at,
            "private_tmp": self.spec.private_tmp,
        }
        try:
            self._promise.write(started)
        except OSError as error:
            # Its room was there before: a disk that is broken, then. It runs, so it can't be refused any more.
            say(f"{self.place.path}: started can't be written: {error}")
            self.abandon()
        if self._kill_at is not None:
            # It was stopped before it began.
            if now() < self._kill_at:
                self._signal(_TERM)
            else:
                self._on_kill_time()

    def _end_unstarted(self, fault: CantExecute) -> None:
        """Its end is told once its start was."""
        error = str(fault).encode(errors="replace").decode()[:_LONGEST_ERROR]
        self._exit = {"exit_code": fault.code, "signal": None, "at": time.time(), "cause": "exec", "error": error}
        self._exit.update(self._output.counts(), output_closed=True)
        self._closing_since = now()
        self._ground.loop.at(now(), self._on_unstarted)

    def _on_unstarted(self) -> None:
        self._write_exit()
        self.close()

    def take_up(self, taken: Taken, fifos: tuple[int, int]) -> None:
        """Goes on with what another shepherd started. Raises OSError; then ``fifos`` are the caller's still."""
        self._output = Output.resume(self._ground.state, self.place.directory, fifos, self.spec.max_output)
        self.pid = self.leader = taken.pid
        self._start_time = taken.start_time
        self.started_at = taken.at
        self._exit, self._exit_written = taken.end, taken.end is not None
        self._watch()
        self.abandoned = taken.stopping.get("abandoned") is True
        cause, kill_at = taken.stopping.get("cause"), taken.stopping.get("kill_at")
        if isinstance(cause, str) and isinstance(kill_at, int | float):
            self.cause, self._kill_at = cause, float(kill_at)
            self._ground.loop.at(self._kill_at, self._on_kill_time)
        if self.spec.timeout is not None:
            self._ground.loop.at(taken.at_boot + self.spec.timeout, self._on_timeout)

    def hand_over(self) -> tuple[int, int]:
        """For a next shepherd to take up: its FIFOs. It is not to be used any more."""
        self._promise.drop()
        fifos = self._output.hand_over()
        os.close(self.place.directory)
        return fifos

    def _undo(self) -> None:
        self._promise.drop()
        self._ground.bond.drop(self._names)
        if hasattr(self, "_output"):
            self._output.close()
        for name in FIFOS:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self.place.directory)

    def _watch(self) -> None:
        for channel in self._output.channels:
            if channel.fifo is not None:
                self._ground.loop.watch(channel.fifo, functools.partial(self._output.pump, channel))
                channel.before_close = self._ground.loop.unwatch

    # --- being ended ---

    def stop(self, cause: str, grace: float, *, at_once: bool = False) -> None:
        """Asks it to end, and kills it after ``grace`` seconds. A later call can only bring the end nearer."""
        if self.state == "closing":
            return
        if self.cause is None or cause == "fence":
            self.cause = cause
        when = now() + (0.0 if at_once else grace)
        is_first = self._kill_at is None
        if self._kill_at is None or when < self._kill_at:
            self._kill_at = when
            self._ground.loop.at(when, self._on_kill_time)
        with contextlib.suppress(OSError):  # the next shepherd would not know of it, then
            record = {"cause": self.cause, "kill_at": self._kill_at, "abandoned": self.abandoned}
            self._ground.state.write_json(self.place.directory, STOPPING, record)
        if is_first and when > now() and self.pid is not None:
            self._signal(_TERM)

    def abandon(self) -> None:
        """Kills it and writes no exit: the shepherd was told to end, and that is no fault of the job's (a loss)."""
        self.abandoned = True
        self.stop("stop", 0.0, at_once=True)

    def _on_timeout(self) -> None:
        if self.cause is None:
            self.stop("timeout", self.spec.grace)

    def _on_kill_time(self) -> None:
        if self.pid is None or self._killing or self._kill_at is None or now() < self._kill_at:
            return
        self._killing = True
        self._kill_main()

    def _kill_main(self) -> None:
        """Again and again until it is dead: a process that forks as it is read, or one in the middle of its set-up."""
        if self.pid is None:
            return
        # First of all: whatever goes wrong below, it is tried again.
        self._ground.loop.at(now() + _LAST_RETRY, self._kill_main)
        self._signal(_KILL)

    def _signal(self, numbers: tuple[signal.Signals, ...]) -> None:
        if self.own_uid is not None:
            kill.send_uid(self.own_uid, numbers)
            return
        found = kill.tree(({self.pid or 0} if self._has_main else set()) | self._ground.orphans_of(self))
        for number in numbers:
            kill.send(found, number)

    @property
    def _has_main(self) -> bool:
        """A pid that the guardian may have reaped since is another process's soon."""
        return self.pid is not None and self._start_time in (None, kill.start_time(self.pid))

    def marks(self, pid: int) -> bool:
        """Whether an orphan without a uid of its own is this step's, by what it inherited."""
        fields = kill.stat(pid)
        if len(fields) > 3 and self.leader in (int(fields[2]), int(fields[3])):
            return True
        if kill.carries(pid, self.spec.token) or kill.works_in(pid, self._workspace):
            return True
        return kill.holds(pid, {_identity(each.fifo) for each in self._output.channels if each.fifo is not None})

    # --- the end ---

    def exited(self, code: int, status: int, *, at: float | None = None, cause: str | None = None) -> None:
        """The main process is dead, as ``waitid`` says it, and not yet reaped: takes what it wrote, and writes down how
        it ended. ``at``, ``cause``: where the guardian noted it."""
        self._output.drain()
        ended_itself = code == os.CLD_EXITED
        self._exit = {
            "exit_code": status if ended_itself else None,
            "signal": None if ended_itself else status,
            "at": time.time() if at is None else at,
            "cause": cause or self.cause,
            "error": None,
        }
        self._exit.update(self._output.counts(), output_closed=not self._output.is_open)
        self._write_exit()

    def lost(self) -> None:
        """The main process is gone, and nobody knows how it ended."""
        self.abandoned = True
        self.reaped()

    def reaped(self) -> None:
        self.pid = None
        self._closing_since = now()
        self.close()

    def close(self) -> None:
        """Kills what is left, and writes ``closed`` when nothing is; tries again until then, but not for ever."""
        if self._closing_since is None:
            return
        remains = self._ground.orphans_of(self)
        if remains:
            self._signal(_KILL)
        self._output.drain()
        late = now() >= self._closing_since + _CLOSING_TIME
        if (remains or self._output.is_open) and not late:
            self._try_again(self._retry)
            self._retry = min(self._retry * 2, _LAST_RETRY)
            return
        if not self._write_exit() or not self._write_closed():
            self._try_again(_DISK_RETRY)
            return
        self._closing_since = None
        self._output.close()
        self._ground.bond.drop(self._names)
        os.close(self.place.directory)
        self._ground.tell("closed", self)
        self._ground.closed(self, bool(remains))

    def _try_again(self, delay: float) -> None:
        if not self._retry_set:
            self._retry_set = True
            self._ground.loop.at(now() + delay, self._on_retry)

    def _on_retry(self) -> None:
        self._retry_set = False
        self.close()

    def _write_exit(self) -> bool:
        """True when it is on disk (or never to be). A disk that refuses is asked again before ``closed`` is written."""
        if self.abandoned or self._exit_written:
            return True
        assert self._exit is not None
        try:
            self._ground.state.write_json(self.place.directory, "exit", self._exit)
        except OSError as error:
            say(f"{self.place.path}: exit can't be written: {error}")
            return False
        self._exit_written = True
        self._ground.tell("exited", self)
        return True

    def _write_closed(self) -> bool:
        record: dict[str, Any] = {"at": time.time(), "gone": self.abandoned and not self._exit_written}
        record |= {**self._output.counts(), "output_closed": not self._output.is_open}
        try:
            self._ground.state.write_json(self.place.directory, "closed", record)
        except OSError as error:
            say(f"{self.place.path}: closed can't be written: {error}")
            return False
        return True


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
