"""A real shepherd in a state directory of its own, and a plain client of its socket, for the tests in this directory.

Nothing here sleeps: it waits on the shepherd's hints, on a FIFO that jobs write words to, and on pidfds.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervisor.shepherd.__main__ import main as shepherd_main
from supervisor.shepherd.fence import boot_id

PATIENCE = 30.0
UID_BASE = 251_000
UID_COUNT = 8
RECORD = struct.Struct("<dqB")
SHEPHERD = Path(__file__).resolve().parents[2] / "supervisor" / "shepherd"
IS_ROOT = os.geteuid() == 0


class Yard:
    """``with_uids``: jobs have uids of their own (root only). ``as_uid``: whom the shepherd runs as. ``program``: where
    it is."""

    def __init__(
        self,
        state: Path,
        *,
        with_uids: bool = IS_ROOT,
        linger: float = 20.0,
        as_uid: int | None = None,
        program: Path = SHEPHERD,
    ) -> None:
        self.state = state
        self.program = program
        self.as_uid = as_uid
        self.with_uids = with_uids
        self.linger = linger
        # Of this worker alone: while a test's shepherd is down no other one takes its place.
        self.uid_base = UID_BASE + 10_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        # Random as in life: a shepherd ends all that carries its steps' tokens, also what another test has started.
        self.token = f"token-{secrets.token_hex(8)}"
        self.fence(3600)
        self._words = self._make_fifo("words")
        self._go = self._make_fifo("go")
        self._said = b""
        self.link = Link(state, as_uid)

    def launch(self) -> int:
        """Starts the shepherd; returns its pid when it listens."""
        options = ["--detach", f"--state={self.state}", f"--linger={self.linger}"]
        options += [f"--uid-base={self.uid_base}", f"--uid-count={UID_COUNT if self.with_uids else 0}"]
        if self.as_uid is None:
            subprocess.run([sys.executable, "-I", "-S", str(self.program), *options], check=True, timeout=PATIENCE)
        else:
            self._launch_as(self.as_uid, options)
        return self.pid

    def _launch_as(self, uid: int, options: list[str]) -> None:
        """In a fork of the test: the other uid may not be able to read this interpreter's files."""
        os.chown(self.state, uid, uid)
        pid = os.fork()
        if pid == 0:
            try:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                os._exit(shepherd_main(options))
            finally:
                os._exit(70)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    @property
    def pid(self) -> int:
        return int((self.state / "shepherd.pid").read_text())

    @property
    def guardian(self) -> int:
        return parent(self.pid)

    def kill(self, *who: str) -> list[int]:
        """Kills those of ``guardian``, ``shepherd`` and ``launcher`` that are named, at the same moment: none of them
        sees another's death. Returns their pids."""
        found = {"shepherd": self.pid, "guardian": self.guardian, "launcher": launcher(self.pid)}
        pids = [found[each] for each in who]
        self.link.close()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            until(lambda pid=pid: state_of(pid) == "T", "it stands still")  # type: ignore[misc]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # the guardian may have been faster
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            until(lambda pid=pid: not is_alive(pid), "it is dead")  # type: ignore[misc]
        return pids

    def until_served(self, but: int) -> int:
        """Until a shepherd listens that is not this one: its pid."""

        def serves() -> bool:
            link = Link(self.state, self.as_uid)
            try:
                return self.pid != but and bool(link.ask(do="status")["pid"] == self.pid)
            except (OSError, ValueError):
                return False
            finally:
                link.close()

        until(serves, "another shepherd serves")
        return self.pid

    def _make_fifo(self, name: str) -> int:
        path = self.state / name
        os.mkfifo(path)
        path.chmod(0o666)
        return os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def fence(self, seconds_ahead: float, boot: str | None = None) -> None:
        at = time.clock_gettime(time.CLOCK_BOOTTIME) + seconds_ahead
        (self.state / "fence.new").write_text(json.dumps({"fence_at": at, "boot_id": boot or boot_id()}))
        (self.state / "fence.new").rename(self.state / "fence")

    def uid(self, number: int = 0) -> int | None:
        return self.uid_base + number if self.with_uids else None

    def real_uid(self, number: int = 0) -> int:
        """What the system calls it: another shepherd may have the range that was asked for."""
        return int(self.link.ask(do="status")["uids_from"]) + number if self.with_uids else os.geteuid()

    def workspace(self, run: str = "r-1", number: int = 0) -> Path:
        path = self.state / "work" / run
        self.link.ask(do="workspace", path=str(path), uid=self.uid(number))
        return path

    def write_step(
        self, command: str | list[str], *, run: str = "r-1", index: int = 0, number: int = 0, **spec: Any
    ) -> Path:
        """Writes the spec of a step; a text is run by ``sh``. ``number``: which of the jobs' uids."""
        step = self.state / "runs" / run / str(index)
        step.mkdir(parents=True, exist_ok=True)
        (step / "spec").write_text(json.dumps(self.step_spec(command, run=run, index=index, number=number, **spec)))
        if self.as_uid is not None:
            for path in (step.parent, step, step / "spec"):
                os.chown(path, self.as_uid, self.as_uid)
        return step

    def step_spec(
        self, command: str | list[str], *, run: str = "r-1", index: int = 0, number: int = 0, **spec: Any
    ) -> dict[str, Any]:
        argv = ["sh", "-c", command] if isinstance(command, str) else command
        base = {
            "argv": argv,
            "workspace": str(self.state / "work" / run),
            "cwd": "src",
            "env": {"WORDS": str(self.state / "words"), "GO": str(self.state / "go")},
            "uid": self.uid(number),
            "gid": None,
            "timeout": None,
            "grace": 10.0,
            "max_output": 1 << 30,
            "token": f"{self.token}-{run}-{index}",
            "private_tmp": False,
        }
        return base | spec

    def start(self, command: str | list[str], *, run: str = "r-1", number: int = 0, **spec: Any) -> Path:
        if not (self.state / "work" / run).exists():
            self.workspace(run, number)
        step = self.write_step(command, run=run, number=number, **spec)
        answer = self.link.ask(do="start", dir=str(step))
        assert answer["ok"], answer
        return step

    def run(self, command: str | list[str], **spec: Any) -> Ended:
        """Runs a step to its end."""
        return self.ended(self.start(command, **spec))

    def ended(self, step: Path) -> Ended:
        self.link.wait_event("closed", step)
        return Ended(step)

    def word(self) -> str:
        """The next line that a job wrote to ``$WORDS``."""
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._said:
            ready, _, _ = select.select([self._words], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "no word from the job"
            self._said += os.read(self._words, 4096)
        line, self._said = self._said.split(b"\n", 1)
        return line.decode()

    def go(self, times: int = 1) -> None:
        """Lets jobs that wait in ``read x < $GO`` go on."""
        os.write(self._go, b"x\n" * times)

    def shut_down(self) -> None:
        self.link.close()
        os.close(self._words)
        os.close(self._go)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            end(self.pid, signal.SIGTERM)
        subprocess.run(["chmod", "-R", "u+rwX", str(self.state)], check=False)
        shutil.rmtree(self.state)


class Link:
    """A client: asks, and keeps the events that came meanwhile."""

    def __init__(self, state: Path, as_uid: int | None = None) -> None:
        self._state = state
        self._as_uid = as_uid
        self._socket: socket.socket | None = None
        self._data = b""
        self._events: list[dict[str, Any]] = []

    def connect(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(PATIENCE)
            if self._as_uid is not None:
                os.seteuid(self._as_uid)
            try:
                self._socket.connect(str(self._state / "shepherd.sock"))
            finally:
                if self._as_uid is not None:
                    os.seteuid(0)
            assert self.read()["event"] == "hello"
        return self._socket

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._data = b""

    def ask(self, **request: Any) -> dict[str, Any]:
        self.connect().sendall(json.dumps({"id": 1, **request}).encode() + b"\n")
        while "ok" not in (line := self.read()):
            self._events.append(line)
        return line

    def wait_event(self, event: str, step: Path) -> None:
        """Returns when it has happened: the file is the truth, the hint only wakes."""
        name = {"exited": "exit", "closed": "closed"}[event]
        self.connect()
        while not (step / name).exists():
            self.read()

    def read(self) -> dict[str, Any]:
        link = self.connect()
        while b"\n" not in self._data:
            data = link.recv(1 << 16)
            if not data:
                raise ConnectionError("the shepherd closed the connection")
            self._data += data
        line, self._data = self._data.split(b"\n", 1)
        said: dict[str, Any] = json.loads(line)
        return said


class Ended:
    """What a step left on disk."""

    def __init__(self, step: Path) -> None:
        self.step = step
        self.out = (step / "out").read_bytes() if (step / "out").exists() else b""
        self.err = (step / "err").read_bytes() if (step / "err").exists() else b""
        self.exit: dict[str, Any] | None = None
        if (step / "exit").exists():
            self.exit = json.loads((step / "exit").read_text())
        self.closed: dict[str, Any] = json.loads((step / "closed").read_text())
        index = step / "idx"
        self.index = list(RECORD.iter_unpack(index.read_bytes() if index.exists() else b""))
        self._check_index()

    @property
    def how(self) -> tuple[int | None, int | None, str | None]:
        """Exit code, signal, cause."""
        assert self.exit is not None
        return self.exit["exit_code"], self.exit["signal"], self.exit["cause"]

    def _check_index(self) -> None:
        """What holds of every index: times and offsets rise, and the last offset is the file's size."""
        for stream, data in ((1, self.out), (2, self.err)):
            offsets = [offset for _, offset, what in self.index if what == stream]
            assert offsets == sorted(offsets)
            assert (
                (offsets[-1] if offsets else 0) == len(data) == self.closed["out_bytes" if stream == 1 else "err_bytes"]
            )
            cuts = [offset for _, offset, what in self.index if what == stream + 3]
            assert cuts == ([len(data)] if self.closed["out_dropped" if stream == 1 else "err_dropped"] else [])


def end(pid: int, number: signal.Signals | None = None) -> None:
    """Waits until the process is gone, after sending it a signal if one is given."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if number is not None:
            signal.pidfd_send_signal(handle, number)
        ready, _, _ = select.select([handle], [], [], PATIENCE)
        assert ready, f"process {pid} lives on"
    finally:
        os.close(handle)


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for something outside, bounded by the tests' patience."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)  # a poll of a file that another process writes


def is_alive(pid: int) -> bool:
    """False for a zombie too."""
    return state_of(pid) not in ("Z", "X", "")


def state_of(pid: int) -> str:
    """As /proc says; empty: it is gone."""
    return _stat(pid)[0]


def parent(pid: int) -> int:
    return int(_stat(pid)[1] or 0)


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["", ""]


def children(pid: int) -> list[int]:
    """The processes below it that are not its own: steps' main processes are its launcher's children."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    own = [each for each in found if Path(f"/proc/{each}/comm").read_text() == "bsup-launcher\n"]
    return [each for each in found if each not in own] + [below for each in own for below in children(each)]


def launcher(shepherd: int) -> int:
    named: list[int] = []

    def is_there() -> bool:
        """It has its name a moment after it is made."""
        found = [int(word) for word in Path(f"/proc/{shepherd}/task/{shepherd}/children").read_text().split()]
        named[:] = [each for each in found if Path(f"/proc/{each}/comm").read_text() == "bsup-launcher\n"]
        return bool(named)

    until(is_there, "it has a launcher")
    return named[0]


def open_files(pid: int) -> list[str]:
    """But for mount namespaces, of which it keeps some."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}").partition("[")[0])
    return sorted(name for name in found if name != "mnt:")
