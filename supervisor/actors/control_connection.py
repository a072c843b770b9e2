"""One connection of the control socket: frames in, calls answered one after the other, replies out.

May import ``framing``, ``protocol``, ``varlink_idl`` and anyio. The control actor makes one for each peer.

Rules that hold:

- Calls are answered in the order in which they came; while one runs, ``max_frame`` bytes or so of others is kept.
- A reply (of a long stream: ``_AT_ONCE`` of them) is made only once what came before is in the kernel, so a peer that
  reads nothing costs that much memory, and is dropped after ``slow_timeout``; nobody else waits for it.
- A peer that is gone ends its running call. One that merely shut down its writing end still gets its answers.
- What can't be read as a call is answered once, then the connection is closed: after it no frame border can be trusted.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import select
import socket
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from supervisor import __version__
from supervisor.actors.control_peers import Peer
from supervisor.framing import (
    BadFrame,
    Call,
    FrameDecoder,
    FrameTooLarge,
    InternalError,
    Reply,
    decode_call,
    decode_params,
    encode_frame,
    encode_stream,
    error_reply,
    pack,
    service_error,
)
from supervisor.model.errors import BsupError, InvalidInput, PermissionDenied
from supervisor.protocol import INTERFACE, MAX_FRAME, MAX_REPLY, METHODS, SERVICE, Method, Parameters
from supervisor.varlink_idl import SERVICE_DESCRIPTION, description

log = logging.getLogger("supervisor.control")

Replies = AsyncGenerator[msgspec.Struct | Sequence[msgspec.Struct], None]
"""A sequence: replies of a stream that are there at once, as a page of a list."""

Handler = Callable[[Any, Peer], Replies]
"""Answers one call: gives its replies. The parameters are of the method's own struct in ``METHODS``."""

_READ: Final = 64 << 10
_AT_ONCE: Final = 200
"""Replies of a stream in one write, where so many are there."""
_HANGUP_CHECK: Final = 1.0
_FAIRNESS: Final = 16
"""Replies sent in a row before others get the loop: a send that fits into the kernel's buffer does not wait."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer may use. Times are seconds; ``idle_timeout`` counts only while no call runs."""

    max_frame: int = MAX_FRAME
    idle_timeout: float = 300.0
    slow_timeout: float = 30.0
    max_connections: int = 1024
    max_connections_per_uid: int = 64


class _Dropped(Exception):
    """The connection is over; the reason is counted, unless the peer simply went."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason
        super().__init__(reason)


class Connection:
    """See the module. ``refused`` counts what was refused or dropped, by reason; ``called`` is told of each call."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        handlers: Mapping[str, Handler],
        limits: Limits,
        refused: Counter[str],
        called: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._peer = peer
        self._handlers = handlers
        self._limits = limits
        self._refused = refused
        self._called = called
        self._frames: deque[bytes] = deque()
        self._queued = 0
        self._changed = anyio.Event()
        self._eof = False
        self._bad: BsupError | None = None

    async def serve(self) -> None:
        """Until the peer is gone or is dropped. The caller closes the socket."""
        reason: str | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read, tasks.cancel_scope)
            try:
                await self._answer_all()
            except _Dropped as dropped:
                reason = dropped.reason
            tasks.cancel_scope.cancel()
        if reason is not None:
            self._refused[reason] += 1
            log.log(logging.DEBUG if reason == "idle" else logging.WARNING, "dropped %s: %s", self._peer, reason)

    # --- frames in ---

    async def _read(self, all_of_it: anyio.CancelScope) -> None:
        loop = asyncio.get_running_loop()
        decoder = FrameDecoder(self._limits.max_frame)
        try:
            while True:
                data = await loop.sock_recv(self._sock, _READ)
                if not data:
                    break
                for frame in decoder.feed(data):
                    self._frames.append(frame)
                    self._queued += len(frame)
                self._change()
                decoder.check()
                while self._queued >= self._limits.max_frame:
                    await self._until_changed_or_gone(all_of_it)
        except FrameTooLarge as error:
            self._bad = error
        except OSError:
            all_of_it.cancel()
            return
        self._eof = True
        self._change()
        while True:
            await self._until_changed_or_gone(all_of_it)

    async def _until_changed_or_gone(self, all_of_it: anyio.CancelScope) -> None:
        """While nothing is read, a peer that goes shows only by the kernel's hang-up flag."""
        if _has_hung_up(self._sock):
            all_of_it.cancel()
        with anyio.move_on_after(_HANGUP_CHECK):
            await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _next_frame(self) -> bytes | None:
        """None: there will be no other."""
        with anyio.move_on_after(self._limits.idle_timeout):
            while True:
                if self._frames:
                    frame = self._frames.popleft()
                    self._queued -= len(frame)
                    self._change()
                    return frame
                if self._eof:
                    return None
                await self._changed.wait()
        raise _Dropped("idle")

    # --- calls ---

    async def _answer_all(self) -> None:
        while (frame := await self._next_frame()) is not None:
            try:
                call = decode_call(frame)
            except BadFrame as error:
                await self._refuse(error, "garbage")
            self._called()
            await self._answer(call)
            await checkpoint()
        if self._bad is not None:
            await self._refuse(self._bad, "frame too large")

    async def _refuse(self, error: BsupError, reason: str) -> None:
        await self._send(error_reply(InvalidInput("frame", str(error), f"at most {self._limits.max_frame} bytes")))
        raise _Dropped(reason)

    async def _answer(self, call: Call) -> None:
        """Every outcome but the peer's own end becomes a reply."""
        try:
            await self._dispatch(call)
        except _Dropped:
            raise
        except BsupError as error:
            if not call.oneway:
                await self._send(error_reply(error))
        except Exception:
            # The daemon's edge: a fault in one call must not end the actor, nor leave its caller without an answer.
            reference = secrets.token_hex(4)
            log.exception("call %s by %s failed [%s]", call.method, self._peer, reference)
            if not call.oneway:
                await self._send(
                    error_reply(
                        InternalError(f"the call failed inside the daemon; its log says more under {reference}")
                    )
                )

    async def _dispatch(self, call: Call) -> None:
        interface, _, name = call.method.rpartition(".")
        if interface == SERVICE:
            await self._reply(call, self._service(call, name))
        elif interface != INTERFACE:
            await self._reply(call, service_error("InterfaceNotFound", interface))
        elif name not in METHODS:
            await self._reply(call, service_error("MethodNotFound", call.method))
        else:
            await self._run(call, name, METHODS[name])

    async def _run(self, call: Call, name: str, method: Method) -> None:
        self._allow(name, method)
        if method.more and not call.more:
            await self._reply(call, service_error("ExpectedMore"))
            return
        params = decode_params(call.parameters, method.params)
        if method.mutates:
            log.info("%s calls %s %s", self._peer, name, _gist(params))
        sent = 0
        async with aclosing(self._handlers[name](params, self._peer)) as replies:
            async for reply in replies:
                if not isinstance(reply, msgspec.Struct):
                    await self._reply_many(call, reply)
                    continue
                await self._reply(call, Reply(parameters=pack(reply), continues=method.more))
                sent += 1
                if sent % _FAIRNESS == 0:
                    await checkpoint()
                if name == "Submit":
                    log.info("%s submitted job %s", self._peer, getattr(reply, "id", "?"))
                if name == "SubmitMany":
                    ids = getattr(reply, "ids", ())
                    log.info("%s submitted %s jobs from %s on", self._peer, len(ids), min(ids, default="?"))
        if method.more:
            await self._reply(call, Reply(parameters=pack(method.reply())))

    def _allow(self, name: str, method: Method) -> None:
        role = self._peer.role
        if role is not None and role >= method.role:
            return
        self._refused["denied"] += 1
        log.warning("%s may not call %s (role: %s)", self._peer, name, role.name.lower() if role else "none")
        has = f"is {role.name.lower()}" if role else "has no role"
        raise PermissionDenied(f"{self._peer.user} {has} on this host: {name} takes {method.role.name.lower()}")

    def _service(self, call: Call, name: str) -> Reply:
        match name:
            case "GetInfo":
                info = {
                    "vendor": "bsup",
                    "product": "bsup",
                    "version": __version__,
                    "url": "",
                    "interfaces": [SERVICE, INTERFACE],
                }
                return Reply(parameters=pack(info))
            case "GetInterfaceDescription":
                try:
                    wanted = decode_params(call.parameters, _Wanted).interface
                except InvalidInput:
                    return service_error("InvalidParameter", "interface")
                if wanted not in (SERVICE, INTERFACE):
                    return service_error("InterfaceNotFound", wanted)
                text = SERVICE_DESCRIPTION if wanted == SERVICE else description()
                return Reply(parameters=pack({"description": text}))
            case _:
                return service_error("MethodNotFound", call.method)

    # --- replies out ---

    async def _reply(self, call: Call, reply: Reply) -> None:
        if not call.oneway:
            await self._send(reply)

    async def _reply_many(self, call: Call, replies: Sequence[msgspec.Struct]) -> None:
        if call.oneway:
            return
        for at in range(0, len(replies), _AT_ONCE):
            await self._write(encode_stream(replies[at : at + _AT_ONCE]))
            await checkpoint()

    async def _send(self, reply: Reply) -> None:
        data = encode_frame(reply)
        if len(data) > MAX_REPLY:
            data = encode_frame(error_reply(InternalError(f"the reply is larger than {MAX_REPLY} bytes")))
        await self._write(data)

    async def _write(self, data: bytes) -> None:
        try:
            with anyio.fail_after(self._limits.slow_timeout):
                await asyncio.get_running_loop().sock_sendall(self._sock, data)
        except TimeoutError:
            raise _Dropped("slow") from None
        except OSError:
            raise _Dropped(None) from None


class _Wanted(msgspec.Struct):
    interface: str


def _gist(params: Parameters) -> str:
    """What a call is about, for the log: never a spec, which may hold secrets."""
    fields = {f: getattr(params, f) for f in params.__struct_fields__ if f not in ("spec", "jobs")}
    if len(ids := fields.get("ids", ())) > 20:
        fields["ids"] = f"{ids[:20]} and {len(ids) - 20} more"
    return " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)


def _has_hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))
