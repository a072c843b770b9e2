"""The process that makes the steps' processes for the shepherd, and tells it how they end. Standard library only;
``host`` has one.

To start a step is to take on its uid, its mounts and its directory for a moment (``spawn``), and to wait until exec is
over, which a dead network file system can draw out for ever. Neither is for the shepherd to do: in that moment the new
process could kill whoever has its uid, and nothing may hold up the fence. So it is done by a child of the shepherd's
that can be lost: it holds nothing. It is the parent of the steps' main processes and leaves them as the kernel keeps
them until the shepherd has written down how they ended; when it dies they are the shepherd's, which is a subreaper, and
the shepherd makes another one, which starts what this one had not begun to. The step that was being started just then
may be among the children that were left; if it isn't, it is a loss.

When the shepherd dies it starts nothing more, and waits for the guardian to end it. If that is dead too, nobody watches
the fence: it ends the steps at once, and becomes a new shepherd, which ends whatever else is left of them.
"""

from __future__ import annotations

import contextlib
import marshal
import mmap
import os
import resource
import select
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from supervisor.shepherd import kill, linux
from supervisor.shepherd.files import Refusal, StateDirectory, say
from supervisor.shepherd.loop import Loop, now
from supervisor.shepherd.output import FIFOS
from supervisor.shepherd.spawn import CantExecute, Order, Spawner, fork_quietly, reset_signals

LAUNCHER = "bsup-launcher"
_LENGTH = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")
_PIECE = 1 << 16
_PATIENCE = 10.0
_LOOK = 1.0


@dataclass(frozen=True)
class Spawned:
    pid: int


Outcome = Spawned | CantExecute | OSError | None
"""What became of an order; OSError: there can be no process now; None: nobody knows, it may run."""


@dataclass(frozen=True)
class Charter:
    """What a launcher is given. ``files``: the limit of open files the steps are to have; ``guardian``: its pid;
    ``command``: what begins a shepherd in the background, if this is one."""

    files: tuple[int, int]
    guardian: int
    command: tuple[str, ...] | None


class _Shared:
    """A page of memory that both sides see, and that outlives either: the order that is being done, and how many steps
    there are."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def order(self) -> int:
        return int(_NUMBER.unpack_from(self._page)[0])

    @order.setter
    def order(self, number: int) -> None:
        """The launcher's to write, while there is one."""
        _NUMBER.pack_into(self._page, 0, number)

    @property
    def steps(self) -> int:
        return int(_NUMBER.unpack_from(self._page, _NUMBER.size)[0])

    @steps.setter
    def steps(self, count: int) -> None:
        """The shepherd's to write."""
        _NUMBER.pack_into(self._page, _NUMBER.size, count)


@dataclass
class _Asked:
    order: Order
    at: float
    answer: Callable[[Outcome], None]


class Launcher:
    """The shepherd's side. ``on_exit(pid, code, status)`` is told of each end, as ``waitid`` says it; ``reap`` is to be
    called once that is on disk. ``find``: a process that was begun by an order, among the shepherd's children.
    ``before``: called before orders are sent."""

    def __init__(
        self,
        loop: Loop,
        state: StateDirectory,
        charter: Charter,
        on_exit: Callable[[int, int, int], None],
        find: Callable[[Order], int | None],
        before: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._state = state
        self._charter = charter
        self._on_exit = on_exit
        self._find = find
        self._before = before
        self._orders: dict[int, _Asked] = {}
        self._last = 0
        self._shared = _Shared()
        self._out = bytearray()
        self._in = _Messages()
        self._link: socket.socket
        self.pid = 0
        self._begin()
        self._look()

    def spawn(self, order: Order, answer: Callable[[Outcome], None]) -> None:
        self._last += 1
        self._orders[self._last] = _Asked(order, now(), answer)
        self._send("spawn", self._last, order)

    def reap(self, pid: int) -> None:
        self._send("reap", pid)

    @property
    def has_died(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def ended(self) -> None:
        """Reaps it. What it has said still counts, and another one takes its place."""
        say(f"launcher {self.pid} is gone: making another one")
        os.waitpid(self.pid, 0)
        self._read()
        self._loop.unwatch(self._link.fileno())
        self._link.close()
        unanswered, self._orders = self._orders, {}
        begun = self._shared.order
        self._out.clear()
        self._in = _Messages()
        self._begin()
        for number, asked in unanswered.items():
            if number > begun:
                self.spawn(asked.order, asked.answer)
            else:
                pid = self._find(asked.order)
                asked.answer(None if pid is None else Spawned(pid))

    def note_steps(self, count: int) -> None:
        """So that it knows, when there is no shepherd any more, whether there is anything to end."""
        self._shared.steps = count

    def close(self) -> None:
        """For good. What it was the parent of is the shepherd's."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._loop.unwatch(self._link.fileno())
        self._link.close()

    def _begin(self) -> None:
        self._link, theirs = socket.socketpair()
        self._shared.order = self._last
        shepherd = os.getpid()
        pid = fork_quietly()
        if pid == 0:
            self._link.close()
            _run(theirs, self._state, self._charter, self._shared, shepherd)
        theirs.close()
        self.pid = pid
        self._link.setblocking(False)
        self._loop.watch(self._link.fileno(), self._on_ready)

    def _look(self) -> None:
        """One that hangs is of no use, and may never go on."""
        oldest = min((asked.at for asked in self._orders.values()), default=now())
        if now() - oldest > _PATIENCE:
            say(f"launcher {self.pid} does not get on: killing it")
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._loop.at(now() + _LOOK, self._look)

    def _send(self, *message: Any) -> None:
        if not self._out:
            self._loop.soon(self._flush)
        self._out += _packed(message)

    def _flush(self) -> None:
        self._before()
        try:
            while self._out:
                del self._out[: self._link.send(self._out)]
        except BlockingIOError:
            self._loop.watch(self._link.fileno(), self._on_ready, write=True)
            return
        except OSError:
            return  # it is dead: SIGCHLD says so
        self._loop.watch(self._link.fileno(), self._on_ready)

    def _on_ready(self) -> None:
        if self._out:
            self._flush()
        if not self._read():
            # Its end is told by SIGCHLD; until then there is nothing to wait for here.
            self._loop.unwatch(self._link.fileno())

    def _read(self) -> bool:
        """False at its end."""
        try:
            while data := self._link.recv(_PIECE):
                for kind, *what in self._in.take(data):
                    self._on_message(kind, what)
                if len(data) < _PIECE:
                    return True
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _on_message(self, kind: str, what: list[Any]) -> None:
        if kind == "exited":
            self._on_exit(*what)
            return
        number, *rest = what
        asked = self._orders.pop(number)
        match kind:
            case "spawned":
                asked.answer(Spawned(*rest))
            case "cant":
                asked.answer(CantExecute(*rest))
            case _:
                asked.answer(OSError(*rest))


class _Messages:
    """Whole ones out of what has come in."""

    def __init__(self) -> None:
        self._data = bytearray()

    def take(self, data: bytes) -> Iterator[Any]:
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            end = _LENGTH.size + length
            if len(self._data) < end:
                return
            message = marshal.loads(bytes(self._data[_LENGTH.size : end]))
            del self._data[:end]
            yield message


def _packed(message: tuple[Any, ...]) -> bytes:
    data = marshal.dumps(message)
    return _LENGTH.pack(len(data)) + data


# --- the launcher's own side ---


def _run(link: socket.socket, state: StateDirectory, charter: Charter, shared: _Shared, shepherd: int) -> NoReturn:
    try:
        reset_signals()
        # A terminal's signals are for the shepherd to take.
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        linux.name_process(LAUNCHER)
        _close_all_but({0, 1, 2, link.fileno(), *state.fds})
        above = [handle for pid in (shepherd, charter.guardian) if (handle := _handle_of(pid)) is not None]
        _Side(link, state, charter.files, shared, shepherd).run()
        for handle in above:
            select.select([handle], [], [])
        if shared.steps:
            _end_all(charter)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _handle_of(pid: int) -> int | None:
    """Readable when it is dead; None: it is gone."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _end_all(charter: Charter) -> None:
    """The shepherd and its guardian are dead: at once, as nobody watches the fence. What isn't below this process, the
    next shepherd finds."""
    say("the shepherd and its guardian are gone: ending all steps")
    for _ in range(2):
        kill.send(kill.tree({os.getpid()}) - {os.getpid()}, signal.SIGKILL)
    if charter.command is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, charter.files)
        os.execv(charter.command[0], charter.command)


class _Side:
    def __init__(
        self, link: socket.socket, state: StateDirectory, files: tuple[int, int], shared: _Shared, shepherd: int
    ) -> None:
        self._link = link
        self._state = state
        self._shared = shared
        self._shepherd = shepherd
        self._spawner = Spawner(state.fd, files)
        self._children: dict[int, int] = {}
        self._ready = select.epoll()
        self._ready.register(link.fileno(), select.EPOLLIN)

    def run(self) -> None:
        """Until the shepherd is gone."""
        messages = _Messages()
        while True:
            for fd, _ in self._ready.poll():
                if fd != self._link.fileno():
                    self._tell_end(fd)
                    continue
                try:
                    data = self._link.recv(_PIECE)
                except ConnectionError:
                    return
                if not data:
                    return
                for kind, *what in messages.take(data):
                    if os.getppid() != self._shepherd:
                        return
                    if kind == "spawn":
                        self._spawn(*what)
                    else:
                        self._reap(*what)

    def _spawn(self, number: int, order: Order) -> None:
        made: list[int] = []
        self._shared.order = number
        try:
            run, index = order[0]
            directory = self._state.open("runs", run, index)
            try:
                for name in FIFOS:
                    made.append(os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory))
            finally:
                os.close(directory)
            pid = self._spawner.spawn(order, made[0], made[1])
        except CantExecute as fault:
            self._send("cant", number, fault.code, str(fault))
        except OSError as error:
            self._send("failed", number, error.errno, error.strerror, error.filename)
        except Refusal as refusal:
            self._send("failed", number, 2, str(refusal), None)
        else:
            handle = os.pidfd_open(pid)
            self._children[handle] = pid
            self._ready.register(handle, select.EPOLLIN)
            self._send("spawned", number, pid)
        finally:
            for fd in made:
                os.close(fd)

    def _tell_end(self, handle: int) -> None:
        """It stays a zombie until the shepherd has it on disk."""
        self._ready.unregister(handle)
        os.close(handle)
        pid = self._children.pop(handle)
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert info is not None
        self._send("exited", pid, info.si_code, info.si_status)

    @staticmethod
    def _reap(pid: int) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    def _send(self, *message: Any) -> None:
        with contextlib.suppress(ConnectionError):  # the shepherd is gone: ``run`` sees it
            self._link.sendall(_packed(message))


def _close_all_but(kept: set[int]) -> None:
    """What it shares with the shepherd by the fork: its lock, its clients."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))
