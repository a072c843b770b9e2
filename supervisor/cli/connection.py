"""A client of the control socket without an event loop: one call after the other, as a command needs it.

Called by the commands; imports ``protocol``, ``framing`` and sockets. (``supervisor.client`` is the asynchronous
one for programs.)
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from supervisor.cli.exits import CommandError, Exit, Unreachable
from supervisor.framing import (
    BadFrame,
    FrameDecoder,
    FrameTooLarge,
    UnexpectedReply,
    decode_item,
    encode_call,
)
from supervisor.protocol import INTERFACE, MAX_REPLY, Parameters

S = TypeVar("S", bound=msgspec.Struct)

CONNECT_TIMEOUT = 5.0
ANSWER_TIMEOUT = 60.0
"""Seconds for the answer of a call that does not wait for anything; the daemon gives up on the database sooner."""

_START = "start one with `bsup daemon`, or name its socket with --socket or BSUP_SOCKET"


class Tick:
    """What a stream gives while nothing comes."""


TICK = Tick()


class Connection:
    """A connection to the daemon at ``path``. Raises Unreachable, or CommandError (denied), when made."""

    def __init__(self, path: str, *, max_frame: int | None = None) -> None:
        self.path = path
        self._max_frame = max_frame
        self._frames: deque[bytes] = deque()
        self._decoder = FrameDecoder(MAX_REPLY)
        self._socket = self._connect()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def call(self, method: str, params: Parameters, reply: type[S], *, timeout: float | None = ANSWER_TIMEOUT) -> S:
        """One call with one answer. Raises the daemon's error, or Unreachable."""
        self._send(method, params, more=False)
        frame = self._receive(None if timeout is None else time.monotonic() + timeout)
        if frame is None:
            raise Unreachable(
                f"the daemon at {self.path} did not answer within {timeout:g} s",
                "it may hang: its log says more; `bsup doctor` checks what it depends on",
            )
        return self._item(frame, reply)[0]

    def stream(self, method: str, params: Parameters, reply: type[S]) -> Iterator[S]:
        """One call with a stream of answers; the last reply ends it and holds no item."""
        for answer in self.ticking(method, params, reply, every=None):
            if not isinstance(answer, Tick):
                yield answer

    def ticking(self, method: str, params: Parameters, reply: type[S], *, every: float | None) -> Iterator[S | Tick]:
        """As ``stream``, with TICK each ``every`` seconds in which nothing came."""
        self._send(method, params, more=True)
        while True:
            frame = self._receive(None if every is None else time.monotonic() + every)
            if frame is None:
                yield TICK
                continue
            item, continues = self._item(frame, reply)
            if not continues:
                return
            yield item

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(CONNECT_TIMEOUT)
        try:
            sock.connect(self.path)
        except FileNotFoundError:
            raise _unreachable(f"no daemon at {self.path}: there is no such socket") from None
        except ConnectionRefusedError:
            raise _unreachable(f"no daemon at {self.path}: nobody listens there any more") from None
        except PermissionError:
            raise CommandError(
                f"may not open the socket {self.path}", "run it as a user who may, or through sudo", Exit.DENIED
            ) from None
        except TimeoutError:
            raise Unreachable(
                f"the daemon at {self.path} takes no connection", "it may hang: its log says more"
            ) from None
        except OSError as error:
            # AF_UNIX path too long comes without an errno.
            reason = error.strerror or str(error)
            raise _unreachable(f"can't connect to {self.path}: {reason}") from None
        return sock

    def _send(self, method: str, params: Parameters, *, more: bool) -> None:
        frame = encode_call(method, params, more=more)
        if self._max_frame is not None and len(frame) - 1 > self._max_frame:
            raise CommandError(
                f"this call is {len(frame):,} bytes; the daemon takes at most {self._max_frame:,}",
                "put large files into the repository, or where the steps can fetch them",
                Exit.USAGE,
            )
        try:
            self._socket.settimeout(ANSWER_TIMEOUT)
            self._socket.sendall(frame)
        except TimeoutError:
            raise Unreachable(f"the daemon at {self.path} does not read", "it may hang: its log says more") from None
        except OSError:
            # It may have said why before it hung up.
            return

    def _receive(self, deadline: float | None) -> bytes | None:
        """The next reply; None: nothing came in time."""
        while not self._frames:
            try:
                self._socket.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
                data = self._socket.recv(1 << 18)
            except TimeoutError:
                return None
            except OSError as error:
                raise Unreachable(f"lost the daemon at {self.path}: {error.strerror}", _LOST) from None
            if not data:
                raise Unreachable(f"the daemon at {self.path} closed the connection", _LOST)
            try:
                self._frames.extend(self._decoder.feed(data))
            except FrameTooLarge as error:
                raise CommandError(f"the daemon's answer is too large: {error}") from None
        return self._frames.popleft()

    def _item(self, frame: bytes, form: type[S]) -> tuple[S, bool]:
        try:
            return decode_item(frame, form)
        except UnexpectedReply as error:
            raise CommandError(
                f"the daemon at {self.path} answers in a form that this command does not know: {error}",
                "`bsup version` compares their versions",
            ) from None
        except BadFrame:
            raise _not_bsup(self.path) from None


_LOST = "jobs that run go on; it may be restarting: try again, or read its log"


def _unreachable(message: str) -> Unreachable:
    return Unreachable(message, _START)


def _not_bsup(path: str) -> CommandError:
    return Unreachable(f"what listens at {path} does not speak {INTERFACE}", "name the daemon's socket with --socket")
