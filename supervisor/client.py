"""The typed async client of the control socket: ``async with Client(path) as bsup: job = await bsup.submit(spec)``.

May import ``protocol``, ``framing``, ``model`` and anyio. For Python programs and the tests; the command line has a
small synchronous one of its own, as it must start fast. Errors that the daemon tells are raised as their ``BsupError``;
``DaemonUnreachable`` where there is no daemon or the connection ended.
"""

from __future__ import annotations

import builtins
import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import anyio
import msgspec
from anyio.abc import SocketAttribute, SocketStream

from supervisor.framing import (
    BadFrame,
    DaemonUnreachable,
    FrameDecoder,
    FrameTooLarge,
    decode_item,
    encode_call,
    pack,
)
from supervisor.model.errors import BsupError, InvalidInput
from supervisor.model.job import EventRow, HostRow, State
from supervisor.protocol import (
    MAX_FRAME,
    MAX_REPLY,
    ActorsParams,
    ActorsReply,
    ActorView,
    AttemptsParams,
    AttemptsReply,
    AttemptView,
    DeleteParams,
    DeleteReply,
    DrainParams,
    DrainReply,
    EventsParams,
    EventsReply,
    HostsParams,
    HostsReply,
    JobReply,
    JobView,
    ListParams,
    ListReply,
    LogEnd,
    LogPiece,
    LogsParams,
    LogsReply,
    LogStream,
    Parameters,
    ReloadParams,
    ReloadReply,
    ResumeParams,
    ResumeReply,
    RetryParams,
    ShowParams,
    ShowReply,
    StatusParams,
    StatusReply,
    StatusView,
    StopParams,
    StopReply,
    SubmitManyParams,
    SubmitManyReply,
    SubmitParams,
    SubmitReply,
    VersionParams,
    VersionReply,
    WaitParams,
)

R = TypeVar("R", bound=msgspec.Struct)
T = TypeVar("T")

_READ = 256 << 10


class Client:
    """Calls may be made concurrently: each has a connection while it runs, and idle ones are used again.

    An iterator that is left early (``aclose``) closes its connection, which ends the call in the daemon.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._idle: list[_Connection] = []
        self._open = False

    async def __aenter__(self) -> Client:
        """Raises DaemonUnreachable."""
        self._idle.append(await _Connection.to(self._path))
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        while self._idle:
            await self._idle.pop().aclose()

    # --- jobs ---

    async def submit(self, spec: Mapping[str, Any], *, key: str | None = None, after: Iterable[int] = ()) -> int:
        """The id of the job. A ``key`` makes it safe to repeat."""
        asked = SubmitParams(spec=dict(spec), key=key, after=list(after))
        return (await self._call("Submit", asked, SubmitReply)).id

    async def submit_many(self, specs: Iterable[Mapping[str, Any]], *, key: str | None = None) -> builtins.list[int]:
        """The ids of the jobs, in order: all are submitted or none. At most 10,000, and as many as a frame holds. A
        ``key`` makes it safe to repeat."""
        jobs = [pack(spec) for spec in specs]
        return (await self._call("SubmitMany", SubmitManyParams(jobs=jobs, key=key), SubmitManyReply)).ids

    def list(
        self,
        *,
        states: Iterable[State] = (),
        kinds: Iterable[str] = (),
        labels: Iterable[str] = (),
        all: bool = False,
        limit: int | None = None,
        brief: bool = False,
        on_notice: Callable[[str], None] | None = None,
    ) -> AsyncGenerator[JobView, None]:
        """``on_notice`` is told first if the list is not the whole (the database is away). ``brief``: of each what
        a line of a list shows, in half the time."""
        asked = ListParams(
            states=list(states), kinds=list(kinds), labels=list(labels), all=all, limit=limit, brief=brief
        )

        def pick(reply: ListReply) -> JobView | None:
            if reply.notice is not None and on_notice is not None:
                on_notice(reply.notice)
            return reply.job

        return self._stream("List", asked, ListReply, pick)

    async def show(self, job: int) -> ShowReply:
        return await self._call("Show", ShowParams(id=job), ShowReply)

    def attempts(self, job: int) -> AsyncGenerator[AttemptView, None]:
        return self._stream("Attempts", AttemptsParams(id=job), AttemptsReply, lambda reply: reply.attempt)

    def logs(
        self,
        job: int,
        *,
        attempt: int | None = None,
        step: str | None = None,
        stream: LogStream | None = None,
        offset: int = 0,
        follow: bool = False,
    ) -> AsyncGenerator[LogPiece | LogEnd, None]:
        asked = LogsParams(id=job, attempt=attempt, step=step, stream=stream, offset=offset, follow=follow)

        def pick(reply: LogsReply) -> LogPiece | LogEnd | None:
            return reply.record if reply.record is not None else reply.end

        return self._stream("Logs", asked, LogsReply, pick)

    def wait(
        self, jobs: Iterable[int], *, any: bool = False, timeout: float | None = None
    ) -> AsyncGenerator[JobView, None]:
        """Each job when it is final. Raises CallTimeout."""
        return self._stream(
            "Wait", WaitParams(ids=list(jobs), any=any, timeout=timeout), JobReply, lambda reply: reply.job
        )

    def stop(
        self, jobs: Iterable[int], *, grace: float | None = None, kill: bool = False
    ) -> AsyncGenerator[StopReply, None]:
        asked = StopParams(ids=list(jobs), grace=grace, kill=kill)
        return self._stream("Stop", asked, StopReply, lambda reply: None if reply.id is None else reply)

    def retry(self, jobs: Iterable[int]) -> AsyncGenerator[JobView, None]:
        return self._stream("Retry", RetryParams(ids=list(jobs)), JobReply, lambda reply: reply.job)

    async def delete(self, jobs: Iterable[int]) -> int:
        return (await self._call("Delete", DeleteParams(ids=list(jobs)), DeleteReply)).deleted

    # --- the host ---

    async def status(self) -> StatusView:
        return (await self._call("Status", StatusParams(), StatusReply)).status

    def hosts(self) -> AsyncGenerator[HostRow, None]:
        return self._stream("Hosts", HostsParams(), HostsReply, lambda reply: reply.host)

    async def drain(self, *, wait: bool = False, deadline: float | None = None) -> int:
        """How many jobs run on the host still."""
        return (await self._call("Drain", DrainParams(wait=wait, deadline=deadline), DrainReply)).running

    async def resume(self) -> None:
        await self._call("Resume", ResumeParams(), ResumeReply)

    async def reload(self) -> dict[str, Any]:
        return (await self._call("Reload", ReloadParams(), ReloadReply)).changed

    def events(self, *, after: int | None = None, follow: bool = False) -> AsyncGenerator[EventRow, None]:
        return self._stream("Events", EventsParams(after=after, follow=follow), EventsReply, lambda reply: reply.event)

    def actors(self) -> AsyncGenerator[ActorView, None]:
        return self._stream("Actors", ActorsParams(), ActorsReply, lambda reply: reply.actor)

    async def version(self) -> VersionReply:
        return await self._call("Version", VersionParams(), VersionReply)

    # --- the wire ---

    async def _call(self, method: str, asked: Parameters, form: type[R]) -> R:
        connection = await self._take()
        try:
            await connection.send(_frame(method, asked, more=False))
            reply, _ = await connection.receive(form)
        except BsupError:
            await self._give_back(connection)
            raise
        except BaseException:
            await connection.aclose()
            raise
        await self._give_back(connection)
        return reply

    async def _stream(
        self, method: str, asked: Parameters, form: type[R], pick: Callable[[R], T | None]
    ) -> AsyncGenerator[T, None]:
        frame = _frame(method, asked, more=True)
        connection = await self._take()
        over = False
        try:
            await connection.send(frame)
            while not over:
                reply, continues = await connection.receive(form)
                over = not continues
                item = pick(reply)
                if item is not None:
                    yield item
        except BsupError:
            # The daemon's: it ends the stream, and the connection is good for another call.
            over = True
            raise
        finally:
            if over:
                await self._give_back(connection)
            else:
                await connection.aclose()

    async def _take(self) -> _Connection:
        if not self._open:
            raise DaemonUnreachable("the client is closed")
        while self._idle:
            connection = self._idle.pop()
            if not connection.has_ended():
                return connection
            await connection.aclose()
        return await _Connection.to(self._path)

    async def _give_back(self, connection: _Connection) -> None:
        if self._open and connection.is_usable:
            self._idle.append(connection)
        else:
            await connection.aclose()


class _Connection:
    def __init__(self, stream: SocketStream, path: str) -> None:
        self._stream = stream
        self._path = path
        self._decoder = FrameDecoder(MAX_REPLY)
        self._frames: deque[bytes] = deque()
        self.is_usable = True

    @classmethod
    async def to(cls, path: str) -> _Connection:
        try:
            return cls(await anyio.connect_unix(path), path)
        except OSError as error:
            raise DaemonUnreachable(f"no daemon answers on {path}: {error}") from error

    def has_ended(self) -> bool:
        """The daemon closes connections that idle; between calls it sends nothing, so whatever is there is an end."""
        raw = self._stream.extra(SocketAttribute.raw_socket)
        try:
            raw.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    async def send(self, frame: bytes) -> None:
        try:
            await self._stream.send(frame)
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
            # The daemon closed it, and may have said why before: whoever receives next learns that, or that it is gone.
            self.is_usable = False

    async def receive(self, form: type[R]) -> tuple[R, bool]:
        """The next reply, and whether others follow. Raises the error that it tells."""
        while not self._frames:
            try:
                self._frames.extend(self._decoder.feed(await self._stream.receive(_READ)))
            except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                self.is_usable = False
                raise DaemonUnreachable(f"the daemon on {self._path} closed the connection") from None
            except FrameTooLarge as error:
                self.is_usable = False
                raise BadFrame(f"unexpected reply: {error}") from None
        try:
            return decode_item(self._frames.popleft(), form)
        except BadFrame:
            self.is_usable = False
            raise

    async def aclose(self) -> None:
        self.is_usable = False
        await anyio.aclose_forcefully(self._stream)


def _frame(method: str, asked: Parameters, *, more: bool) -> bytes:
    frame = encode_call(method, asked, more=more)
    if len(frame) > MAX_FRAME + 1:
        field = {"Submit": "spec", "SubmitMany": "jobs"}.get(method, "parameters")
        raise InvalidInput(field, "is too large", f"at most {MAX_FRAME} bytes")
    return frame
