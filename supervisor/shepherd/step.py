"""The life of one step: running, then closing (its main process is reaped, what it left is killed), then closed.

Standard library only; called by ``host``. The order on disk is what a crash at any point leaves readable: ``started``
before exec; output drained and ``exit`` before the reap (until then the kernel keeps the status); ``closed`` when
nothing of the step lives and all of its output is in the files.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any, Protocol

from supervisor.shepherd import kill
from supervisor.shepherd.fence import boot_id
from supervisor.shepherd.files import Refusal, StateDirectory, say
from supervisor.shepherd.loop import Loop, now
from supervisor.shepherd.output import Channel, Output
from supervisor.shepherd.spawn import read_report, spawn
from supervisor.shepherd.spec import StepSpec

_CLOSING_TIME = 0.7
_FIRST_RETRY = 0.002
_LAST_RETRY = 0.05
_DISK_RETRY = 1.0
_TERM = (signal.SIGTERM, signal.SIGCONT)
_KILL = (signal.SIGKILL,)


class Ground(Protocol):
    """What a step needs of the host it runs on."""

    loop: Loop
    state: StateDirectory
    file_limit: tuple[int, int]

    def orphans_of(self, step: Step) -> set[int]:
        """Live processes, children of the shepherd now, that came from the step."""
        ...

    def tell(self, event: str, step: Step) -> None: ...

    def closed(self, step: Step, remains: bool) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where a step is: the path as it was asked for, the names of run and step, and the open directory."""

    path: str
    run: str
    index: str
    directory: int


class Step:
    """``pid``: the main process, None once it is reaped. ``cause``: why the step was ended from outside."""

    def __init__(self, ground: Ground, place: Place, spec: StepSpec) -> None:
        self.place = place
        self.spec = spec
        self.pid: int | None = None
        self.leader = 0
        self.started_at = time.time()
        self.cause: str | None = None
        self.abandoned = False
        self._ground = ground
        self._workspace = "/".join((ground.state.path, "work", *spec.workspace))
        self._output: Output
        self._line: socket.socket
        self._report: tuple[int, str] | None = None
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
    def state(self) -> str:
        if self.pid is None:
            return "closing"
        return "running" if self.cause is None else "stopping"

    # --- the beginning ---

    def start(self) -> None:
        """Forks it and writes ``started``. Raises Refusal when nothing was run; what was made is taken away again."""
        made: list[int] = []
        try:
            reader = self.spec.ids[0] if self.spec.ids else None
            directory = self.place.directory
            self._output, *made = Output.make(self._ground.state, directory, self.spec.max_output, reader)
            self.pid, self._line = spawn(self.spec, self._workspace, made[0], made[1], self._ground.file_limit)
            self.leader = self.pid
            self._write_started()
        except OSError as error:
            self._undo()
            problem = f"the step could not be started: {error.strerror}: {error.filename or 'fork'}"
            raise Refusal("failed", problem) from error
        finally:
            for fd in made:
                os.close(fd)
        with contextlib.suppress(OSError):
            self._line.send(b"!")
        self._watch()

    def _write_started(self) -> None:
        assert self.pid is not None
        at = now()
        self._ground.state.write_json(
            self.place.directory,
            "started",
            {
                "pid": self.pid,
                "start_time": kill.start_time(self.pid),
                "boot_id": boot_id(),
                "at": self.started_at,
                "at_boot": at,
                "private_tmp": self.spec.private_tmp,
            },
        )
        if self.spec.timeout is not None:
            self._ground.loop.at(at + self.spec.timeout, self._on_timeout)

    def _undo(self) -> None:
        if self.pid is not None:
            self._line.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = None
        if hasattr(self, "_output"):
            self._output.close()
        for name in ("fifo.out", "fifo.err", "out", "err", "idx", "started"):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self.place.directory)

    def _watch(self) -> None:
        self._ground.loop.watch(self._line.fileno(), self._on_report)
        for channel in self._output.channels:
            if channel.fifo is not None:
                self._ground.loop.watch(channel.fifo, functools.partial(self._on_output, channel))

    def _on_output(self, channel: Channel) -> None:
        fifo = channel.fifo
        self._output.pump(channel)
        if channel.fifo is None and fifo is not None:
            self._ground.loop.unwatch(fifo)

    def _on_report(self) -> None:
        if self._line.fileno() >= 0:
            self._ground.loop.unwatch(self._line.fileno())
            self._report = read_report(self._line)
            self._line.close()

    # --- being ended ---

    def stop(self, cause: str, grace: float, *, at_once: bool = False) -> None:
        """Asks it to end, and kills it after ``grace`` seconds. A later call can only bring the end nearer."""
        if self.pid is None:
            return
        if self.cause is None or cause == "fence":
            self.cause = cause
        when = now() + (0.0 if at_once else grace)
        if self._kill_at is None and when > now():
            self._signal(_TERM)
        if self._kill_at is None or when < self._kill_at:
            self._kill_at = when
            self._ground.loop.at(when, self._on_kill_time)

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
            # Before the change of uid, and only then, the main process is not of the job's uid.
            if self.pid is not None and self.own_uid not in kill.uids(self.pid):
                kill.send({self.pid}, signal.SIGKILL)
            kill.send_uid(self.own_uid, numbers)
            return
        found = kill.tree(({self.pid} if self.pid else set()) | self._ground.orphans_of(self))
        for number in numbers:
            kill.send(found, number)

    def marks(self, pid: int) -> bool:
        """Whether an orphan without a uid of its own is this step's, by what it inherited."""
        fields = kill.stat(pid)
        if len(fields) > 3 and self.leader in (int(fields[2]), int(fields[3])):
            return True
        if kill.carries(pid, self.spec.token) or kill.works_in(pid, self._workspace):
            return True
        return kill.holds(pid, {_identity(each.fifo) for each in self._output.channels if each.fifo is not None})

    # --- the end ---

    def exited(self, info: os.waitid_result) -> None:
        """The main process is dead and not yet reaped: takes what it wrote, and writes down how it ended."""
        self._on_report()
        self._drain()
        ended_itself = info.si_code == os.CLD_EXITED
        self._exit = {
            "exit_code": info.si_status if ended_itself else None,
            "signal": None if ended_itself else info.si_status,
            "at": time.time(),
            "cause": self.cause,
            "error": None,
        }
        if self._report is not None and ended_itself:
            code, problem = self._report
            self._exit.update(exit_code=code, error=problem, cause=self.cause or "exec")
        self._exit.update(self._output.counts(), output_closed=not self._output.is_open)
        self._write_exit()

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
        self._drain()
        late = now() >= self._closing_since + _CLOSING_TIME
        if (remains or self._output.is_open) and not late:
            self._try_again(self._retry)
            self._retry = min(self._retry * 2, _LAST_RETRY)
            return
        if not self._write_exit() or not self._write_closed():
            self._try_again(_DISK_RETRY)
            return
        self._closing_since = None
        for channel in self._output.channels:
            if channel.fifo is not None:
                self._ground.loop.unwatch(channel.fifo)
        self._output.close()
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

    def _drain(self) -> None:
        fifos = [channel.fifo for channel in self._output.channels]
        self._output.drain()
        for fifo, channel in zip(fifos, self._output.channels, strict=True):
            if fifo is not None and channel.fifo is None:
                self._ground.loop.unwatch(fifo)

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
            for name in ("fifo.out", "fifo.err"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.place.directory)
        except OSError as error:
            say(f"{self.place.path}: closed can't be written: {error}")
            return False
        return True


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
