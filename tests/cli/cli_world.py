"""A daemon for the tests of the command line: a real socket and real framing, with answers that the test lays down."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from supervisor.framing import Call, FrameDecoder, Reply, decode_call, decode_params, encode_frame, error_reply, pack
from supervisor.model.errors import BsupError
from supervisor.model.job import Outcome, State, StepState
from supervisor.protocol import (
    METHODS,
    AttemptView,
    DatabaseView,
    JobView,
    ListReply,
    LogEnd,
    LogPiece,
    LogStream,
    Progress,
    ShowReply,
    SocketView,
    StatusReply,
    StatusView,
    StepView,
)

AT = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

Answer = Callable[[Any], Iterable[msgspec.Struct]]


class HangUp(Exception):
    """An answer raises it to close the connection, as a daemon that ends does."""


class Done(NamedTuple):
    """What a command left: its exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


class FakeDaemon:
    """Answers each method as ``answers`` says: a function from its parameters to its replies (a stream's items).

    ``calls`` keeps what was asked, in order. A method without an answer gets an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.calls: list[tuple[str, Any]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        # A blocked accept is not woken by close alone.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def asked(self, method: str) -> list[Any]:
        return [params for name, params in self.calls if name == method]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        decoder = FrameDecoder()
        with connection:
            while data := connection.recv(65536):
                for frame in decoder.feed(data):
                    try:
                        self._answer(connection, decode_call(frame))
                    except (HangUp, OSError):
                        return

    def _answer(self, connection: socket.socket, call: Call) -> None:
        name = call.method.rpartition(".")[2]
        method = METHODS[name]
        try:
            params = decode_params(call.parameters, method.params)
            self.calls.append((name, params))
            if name not in self.answers:
                raise BsupError(f"the test has no answer for {name}")
            assert call.more == method.more, f"{name} called with more={call.more}"
            for item in self.answers[name](params):
                connection.sendall(encode_frame(Reply(parameters=pack(item), continues=method.more)))
            if method.more:
                connection.sendall(encode_frame(Reply(parameters=msgspec.Raw(b"{}"))))
        except BsupError as error:
            connection.sendall(encode_frame(error_reply(error)))


def job(number: int, state: State = State.SUCCEEDED, **more: Any) -> JobView:
    fields: dict[str, Any] = {
        "name": f"job-{number}",
        "kind": "steps",
        "age": 90.0,
        "priority": 127,
        "submitted_at": AT,
        "submitter": "alice",
        "attempts": 1,
    }
    if state is State.SUCCEEDED:
        fields |= {"exit_code": 0, "duration": 192.4, "host": "build1", "attempt": 1}
    if state is State.FAILED:
        fields |= {"exit_code": 5, "duration": 2.0, "host": "build1", "attempt": 1}
    if state is State.RUNNING:
        fields |= {"progress": Progress(step=2, steps=5, name="test"), "host": "build1", "duration": 61.0, "attempt": 1}
    return JobView(id=number, state=state, **{**fields, **more})


def steps() -> list[StepView]:
    return [
        StepView(index=0, name="checkout", state=StepState.SUCCEEDED, exit_code=0, duration=0.8),
        StepView(index=1, name="build", state=StepState.FAILED, exit_code=5, duration=62.0, error="exit code 5"),
        StepView(index=2, name="test", state=StepState.SKIPPED),
    ]


def attempt(number: int = 1, outcome: Outcome | None = Outcome.FAILED, **more: Any) -> AttemptView:
    fields: dict[str, Any] = {"exit_code": 5, "started_at": AT, "duration": 63.0, "log_bytes": 120, "steps": steps()}
    base: dict[str, Any] = {
        "job": 7,
        "attempt": number,
        "generation": 1,
        "host": "build1",
        "lease": f"{'a' * 32}-{number}",
    }
    return AttemptView(**base, outcome=outcome, **{**fields, **more})


def shown(view: JobView, **more: Any) -> ShowReply:
    spec = {
        "kind": "steps",
        "steps": [{"name": "build"}, {"name": "test"}],
        "repository": {"url": "/r", "commit": "c0"},
    }
    fields: dict[str, Any] = {"spec": spec, "parents": [], "children": [], "attempts": []}
    return ShowReply(job=view, **{**fields, **more})


def piece(data: bytes, offset: int, step: int = 0, stream: LogStream = LogStream.OUT, attempt: int = 1) -> LogPiece:
    return LogPiece(
        attempt=attempt,
        offset=offset,
        step=step,
        step_name=["checkout", "build", "test"][step],
        stream=stream,
        at=AT,
        data=data,
    )


def end(next_offset: int, state: State | None = State.SUCCEEDED, attempt: int = 1, **more: Any) -> LogEnd:
    fields: dict[str, Any] = {"outcome": Outcome.SUCCEEDED, "exit_code": 0, "signal": None}
    return LogEnd(attempt=attempt, next_offset=next_offset, state=state, **{**fields, **more})


def status(*problems: str, available: bool = True) -> StatusReply:
    return StatusReply(
        status=StatusView(
            ok=not problems,
            problems=list(problems),
            host="build1",
            version="0.1.0",
            pid=42,
            started_at=AT,
            uptime=3700.0,
            running=2,
            database=DatabaseView(
                available=available,
                since=AT,
                error=None if available else "connection refused",
                server="PostgreSQL 18.4",
                listening=True,
                round_trips=9,
                last_round_trip=0.0004,
            ),
            isolation={"users": "own uid"},
            socket=SocketView(path="/run/s", connections=1, calls=3, refused={}),
            actors={"dispatcher": {"slots": 4}},
        )
    )


def listing(*jobs: JobView) -> Answer:
    """An answer of ``List`` that heeds the states that were asked for."""

    def answer(params: Any) -> Iterable[msgspec.Struct]:
        found = [one for one in jobs if not params.states or one.state in params.states]
        return [ListReply(job=one) for one in found[: params.limit]]

    return answer


def on_terminal(*words: str, columns: int = 100, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and what a terminal of this width shows, both streams together, of a ``bsup`` of its own."""
    import fcntl
    import pty
    import struct
    import termios

    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "supervisor", *words],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env={**env, "TERM": "xterm", **(environ or {})},
    )
    os.close(secondary)
    shown = b""
    while True:
        try:
            data = os.read(primary, 65536)
        except OSError:  # EIO: the last writer is gone
            break
        if not data:
            break
        shown += data
    os.close(primary)
    return process.wait(60), shown.decode().replace("\r\n", "\n")
