"""The daemon's side of the shepherd: starts it detached where none runs, connects, asks, and passes its hints on.

May import the standard library, ``model`` and its neighbour ``handles``; shares nothing with ``supervisor.shepherd``
but the file format and the socket's words. Called by the kind-``steps`` runner.

The shepherd may die or leave at any time, and so may a connection. Every request may be sent again: a start is at most
once by the claim file, the others say what shall be. So a request that got no answer is repeated on the next
connection.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from supervisor import failpoints
from supervisor.model.errors import RunnerError

HintKind = Literal["exited", "closed", "reconnected"]
Hint = Callable[[HintKind, Path | None], None]

_SHEPHERD = Path(__file__).resolve().parent.parent / "shepherd"
_PROTOCOL = 2
_LONGEST_LINE = 16 << 20
_LONGEST_PATH = 100
_FIRST_PAUSE = 0.02
_LAST_PAUSE = 2.0
_START_TIME = 30.0


class Refused(RunnerError):
    """The shepherd would not do it; nothing was started or changed.

    ``code``: ``fence`` (its time has passed), ``busy`` (uid or path in use), ``policy`` (a uid or path the host does
    not allow), ``spec`` (the spec file is wrong), ``failed`` (the machine refused).
    """

    def __init__(self, code: str, problem: str) -> None:
        self.code = code
        super().__init__(problem)


class _Said(msgspec.Struct):
    """What every line from the shepherd is read as: an answer (``id``, ``ok``, what was asked for) or an event
    (``event``, ``dir``)."""

    id: int | None = None
    ok: bool = False
    code: str = "failed"
    error: str = ""
    event: str | None = None
    dir: str | None = None
    at: float | None = None
    live: bool | list[dict[str, Any]] = False


_DECODER = msgspec.json.Decoder(_Said)
_ENCODER = msgspec.json.Encoder()
_FROM_SHEPHERD: dict[str, HintKind] = {"exited": "exited", "closed": "closed"}


class _Hello(msgspec.Struct):
    """The shepherd's first line."""

    protocol: int
    uid_base: int
    uid_count: int


class _Link(asyncio.Protocol):
    """A connection: whole lines to ``on_line``, and ``lost`` when it is. A line that can't be read loses it."""

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_line = on_line
        self._transport: asyncio.WriteTransport | None = None
        self._begun = b""
        self._unsent: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's derive from nothing

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        *lines, self._begun = (self._begun + data).split(b"\n")
        try:
            for line in lines:
                self._on_line(line)
        except msgspec.MsgspecError:
            self.close()
        if len(self._begun) > _LONGEST_LINE:
            self.close()

    def write(self, line: bytes) -> None:
        """With all that is asked in this turn of the loop: the shepherd wakes up once for it."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send)
        self._unsent.append(line)

    def _send(self) -> None:
        lines, self._unsent = self._unsent, []
        if self._transport is not None:
            self._transport.write(b"".join(lines))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class ShepherdClient:
    """One connection to the host's shepherd, kept by a task that ``connect`` starts and ``aclose`` ends.

    ``uid_count`` uids from ``uid_base`` are the jobs' (as root; 0: they run as the daemon's uid). ``linger``: seconds
    the shepherd stays with nothing to do. ``patience``: how long a request waits for an answer, and for a shepherd to
    ask. Requests raise ``Refused``, or RunnerError when no shepherd answers in time.
    """

    def __init__(
        self,
        state: Path,
        *,
        uid_base: int = 200_000,
        uid_count: int = 0,
        linger: float = 10.0,
        patience: float = 30.0,
    ) -> None:
        self._state = state.absolute()
        self._uids = {"uid_base": uid_base, "uid_count": uid_count}
        self._options = [f"--uid-base={uid_base}", f"--uid-count={uid_count}", f"--linger={linger}"]
        self._patience = patience
        self._tell: list[Hint] = []
        self._waiting: dict[int, asyncio.Future[tuple[_Said, bytes]]] = {}
        self._deadlines: dict[int, tuple[float, asyncio.Future[tuple[_Said, bytes]]]] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._last_id = 0
        self._link: _Link | None = None
        self._hello: asyncio.Future[bytes] | None = None
        self._connected = asyncio.Event()
        self._problem = "it was never asked"
        self._start_problem: str | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Connects, starting a shepherd if none runs; from then on reconnects by itself (hint ``reconnected``).

        Raises RunnerError when there is none to connect to within ``patience``.
        """
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep_connected(), name="shepherd connection")
        await self._wait_connected()

    async def aclose(self) -> None:
        """Ends the connection. The shepherd and its jobs go on."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def on_hint(self, tell: Hint) -> None:
        """``tell(kind, step_dir)`` on the event loop; ``reconnected`` (None): hints may have been missed, read the
        files."""
        self._tell.append(tell)

    async def prepare(self, run_dir: Path, files: Mapping[str, str], workspace: str, uid: int | None) -> None:
        """Writes a run's ``files`` (names below its directory), the last one last, and makes its workspace. Where the
        run's ``spec`` is there already, its files are left as they are."""
        request = {"do": "prepare", "dir": str(run_dir), "files": files, "workspace": workspace, "uid": uid}
        await self._ask(request)

    async def start_step(self, step_dir: Path) -> float | None:
        """Starts the step whose ``spec`` is there; returns when ``started`` is on disk: at which time it did, unix
        seconds (None: it was claimed before).

        A command that can't be executed is no error here: the step's ``exit`` says so (cause ``exec``).
        """
        asked = self._ask({"do": "start", "dir": str(step_dir)})
        said, _ = await (failpoints.sent("spawned", asked) if failpoints.ARMED else asked)
        return said.at

    async def stop_run(self, run_dir: Path, grace: float, kill: bool) -> bool:
        """Stops what runs of it now (True), if anything does; returns at once. The end comes as files and hints."""
        said, _ = await self._ask({"do": "stop", "dir": str(run_dir), "grace": grace, "kill": kill})
        return said.live is True

    async def make_workspace(self, path: Path, uid: int | None) -> None:
        """Makes ``work/<name>`` with src, tmp and home (0700), owned by ``uid`` (None: the daemon's own).
        Idempotent."""
        await self._ask({"do": "workspace", "path": str(path), "uid": uid})

    async def give_back(self, path: Path) -> None:
        """Gives a workspace to the daemon's own uid, for keeping: the job's uid will be another job's soon."""
        await self._ask({"do": "give_back", "path": str(path)}, slow=True)

    async def own(self, path: Path, uid: int | None) -> None:
        """Gives a workspace with all that is in it to ``uid`` (None: the shepherd's own)."""
        await self._ask({"do": "own", "path": str(path), "uid": uid}, slow=True)

    async def remove(self, *paths: Path) -> None:
        """Removes ``work/<name>`` and ``runs/<lease>``, whoever owns what is in them. Idempotent. Not while one is in
        use."""
        await self._ask({"do": "remove", "path": [str(path) for path in paths]}, slow=True)

    async def status(self) -> dict[str, Any]:
        """pid, protocol, live (a list of {dir, pid, uid, state, cause, since}), fence_at, isolation (words by name)
        …"""
        _, line = await self._ask({"do": "status"})
        answer: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
        return answer

    # --- requests ---

    async def _ask(self, request: dict[str, Any], *, slow: bool = False) -> tuple[_Said, bytes]:
        """The answer; the request is sent again on each new connection until there is one. ``slow``: as long as it
        takes."""
        while True:
            if self._link is None or not self._connected.is_set():
                await self._wait_connected()
                continue
            self._last_id += 1
            number = self._last_id
            future = self._waiting[number] = asyncio.get_running_loop().create_future()
            if not slow:
                self._expire_after_patience(number, future)
            try:
                self._link.write(_ENCODER.encode({"id": number, **request}) + b"\n")
                said, line = await future
            except TimeoutError as error:
                raise RunnerError(f"the shepherd did not answer {request['do']} in {self._patience:g} s") from error
            except ConnectionError:
                continue
            finally:
                del self._waiting[number]
                self._deadlines.pop(number, None)
            if said.ok:
                return said, line
            raise Refused(said.code, said.error)

    def _expire_after_patience(self, number: int, future: asyncio.Future[tuple[_Said, bytes]]) -> None:
        """One timer for all: they are answered long before, and all wait equally long."""
        loop = asyncio.get_running_loop()
        self._deadlines[number] = loop.time() + self._patience, future
        if self._expiry is None:
            self._expiry = loop.call_later(self._patience, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        loop = asyncio.get_running_loop()
        for deadline, future in self._deadlines.values():
            if deadline > loop.time():
                self._expiry = loop.call_at(deadline, self._expire)
                return
            if not future.done():
                future.set_exception(TimeoutError())

    async def _wait_connected(self) -> None:
        if self._keeper is None or self._keeper.done():
            raise RunnerError("the shepherd's client is closed")
        try:
            async with asyncio.timeout(self._patience):
                await self._connected.wait()
        except TimeoutError as error:
            raise RunnerError(f"no shepherd answers in {self._state}: {self._problem}") from error

    # --- the connection ---

    async def _keep_connected(self) -> None:
        """Connects, reads until the connection is lost, and again. A new start is tried with growing pauses."""
        pause = _FIRST_PAUSE
        first = True
        while True:
            try:
                link = await self._reach()
            except OSError as error:
                self._problem = self._start_problem or str(error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE)
                continue
            try:
                if await self._greet(link):
                    self._link = link
                    self._connected.set()
                    if not first:
                        self._pass_on("reconnected", None)
                    first = False
                    pause = _FIRST_PAUSE
                    await link.lost
            finally:
                link.close()
                self._lose()
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LAST_PAUSE)

    async def _reach(self) -> _Link:
        """Raises OSError when there is none, and none could be started."""
        try:
            return await self._open()
        except OSError:
            self._start_problem = await self._start_shepherd()
        return await self._open()

    async def _open(self) -> _Link:
        loop = asyncio.get_running_loop()
        self._hello = loop.create_future()
        path = str(self._state / "shepherd.sock")
        if len(os.fsencode(path)) < _LONGEST_PATH:
            _, link = await loop.create_unix_connection(lambda: _Link(self._on_line), path)
            return link
        # A socket's name holds 107 bytes: a longer one is reached through its directory's descriptor.
        directory = os.open(self._state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            path = f"/proc/self/fd/{directory}/shepherd.sock"
            _, link = await loop.create_unix_connection(lambda: _Link(self._on_line), path)
            return link
        finally:
            os.close(directory)

    async def _greet(self, link: _Link) -> bool:
        """Waits for the shepherd's first line: after it no hint is missed. A shepherd that was started under another
        config is told the uids of this one."""
        assert self._hello is not None
        either: set[asyncio.Future[Any]] = {self._hello, link.lost}
        try:
            async with asyncio.timeout(self._patience):
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            hello = msgspec.json.decode(self._hello.result(), type=_Hello)
        except (asyncio.InvalidStateError, msgspec.MsgspecError, TimeoutError):
            self._problem = "the one that listens is not a shepherd that this daemon understands"
            return False
        if hello.protocol != _PROTOCOL:
            self._problem = f"the one that runs speaks protocol {hello.protocol}, this daemon {_PROTOCOL}"
            return False
        if self._uids != {"uid_base": hello.uid_base, "uid_count": hello.uid_count}:
            # No answer is awaited: where it is refused, the first start says so.
            link.write(_ENCODER.encode({"do": "uids", **self._uids}) + b"\n")
        return True

    def _on_line(self, line: bytes) -> None:
        if self._hello is not None and not self._hello.done():
            self._hello.set_result(line)
            return
        said = _DECODER.decode(line)
        if said.event is not None:
            kind = _FROM_SHEPHERD.get(said.event)
            if kind is not None and said.dir:
                self._pass_on(kind, Path(said.dir))
        elif said.id is not None and (future := self._waiting.get(said.id)) and not future.done():
            future.set_result((said, line))

    def _pass_on(self, kind: HintKind, step_dir: Path | None) -> None:
        for tell in self._tell:
            tell(kind, step_dir)

    def _lose(self) -> None:
        self._connected.clear()
        self._link = None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the shepherd's connection was lost"))

    async def _start_shepherd(self) -> str | None:
        """Returns when one listens, None, or why none does. It is no child of the daemon's: it has a session of its own
        and outlives it."""
        # Run as a directory with -I -S: it imports itself and the standard library, nothing that is installed or set.
        command = [sys.executable, "-I", "-S", str(_SHEPHERD), "--detach", f"--state={self._state}", *self._options]
        try:
            done = await asyncio.to_thread(
                subprocess.run,
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
                cwd="/",
                timeout=_START_TIME,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"it can't be started: {error}"
        if done.returncode == 0:
            return None
        words = done.stderr.decode(errors="replace").strip().splitlines()
        return words[-1] if words else f"it ended at its start; see {self._state / 'shepherd.log'}"
