"""Fakes behind a real control socket. ``World`` holds them and serves; tests change them and look at them after."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import msgspec

from supervisor.actors.control import ControlActor
from supervisor.actors.control_connection import Limits
from supervisor.actors.control_parts import Pace, Parts
from supervisor.actors.control_peers import Credentials, Peer, Roles
from supervisor.framing import NONE, Call, FrameDecoder, Reply, decode_reply, encode_frame, pack
from supervisor.mailbox import Ask, Mailbox
from supervisor.messages import (
    ActorInfo,
    AskActors,
    AskDrain,
    AskResume,
    AskRunning,
    AskStatus,
    AskStop,
    RunningJob,
    Status,
)
from supervisor.model.errors import StoreUnavailable, UnknownJob, WrongState
from supervisor.model.job import (
    AttemptRow,
    EventRow,
    Filter,
    HostRow,
    JobLine,
    JobRow,
    LeaseId,
    LogRecord,
    Outcome,
    Phase,
    State,
    StepRecord,
    StepState,
    Stream,
)
from supervisor.ports import StopResult, StoreHealth
from supervisor.protocol import Role

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
SPEC: dict[str, Any] = {"kind": "steps", "steps": [{"name": "hi", "run": ["echo", "hi"]}]}
QUICK = Pace(quick=0.005, calm=0.01, gap=0.001, read=2.0, read_away=0.05, write=2.0, actor=0.5)


def job_row(job: int, state: State = State.READY, **more: Any) -> JobRow:
    fields: dict[str, Any] = {
        "id": job,
        "name": f"job-{job}",
        "kind": "steps",
        "state": state,
        "revision": 1,
        "generation": 1,
        "priority": 127,
        "labels": ["docker"],
        "attempt": 0,
        "attempts": 1,
        "failures": 0,
        "losses": 0,
        "releases": 0,
        "submitted_at": NOW - timedelta(seconds=90),
        "submitter": "alice",
    }
    return JobRow(**{**fields, **more})


def running_job(job: int, attempt: int = 1) -> RunningJob:
    return RunningJob(
        job=job,
        name=f"job-{job}",
        kind="steps",
        lease=LeaseId("a" * 32, job),
        attempt=attempt,
        phase=Phase.RUNNING,
        step=1,
        step_name="test",
        steps_total=5,
        leased_at=NOW - timedelta(seconds=30),
        started_at=NOW - timedelta(seconds=20),
        stop_asked=False,
        waiting_for_store=False,
    )


def attempt_row(job: int, attempt: int, outcome: Outcome | None, **more: Any) -> AttemptRow:
    fields: dict[str, Any] = {
        "job": job,
        "attempt": attempt,
        "generation": 1,
        "host": "build1",
        "lease": f"{'a' * 32}-{attempt}",
        "outcome": outcome,
        "exit_code": None,
        "signal": None,
        "error": None,
        "reason": None,
        "started_at": NOW - timedelta(seconds=20),
        "ended_at": NOW,
        "log_bytes": 0,
        "steps": [StepRecord(index=0, name="hi", state=StepState.SUCCEEDED, exit_code=0)],
    }
    return AttemptRow(**{**fields, **more})


def _line(row: JobRow) -> JobLine:
    fields = {name: getattr(row, name) for name in JobLine.__struct_fields__ if name in row.__struct_fields__}
    run = (row.ended_at or NOW) - row.started_at if row.started_at else None
    return JobLine(
        **fields,
        age=(NOW - row.submitted_at).total_seconds(),
        duration=None if run is None else run.total_seconds(),
    )


class FakeStore:
    """Jobs in memory. ``away``: every call raises StoreUnavailable. ``calls`` says what was asked to change what."""

    def __init__(self) -> None:
        self.jobs: dict[int, JobRow] = {}
        self.specs: dict[int, dict[str, Any]] = {}
        self.tries: dict[int, list[AttemptRow]] = {}
        self.happened: list[EventRow] = []
        self.calls: list[tuple[Any, ...]] = []
        self.away = False
        self.rows: AsyncGenerator[JobRow, None] | None = None
        self._tells: list[Callable[[str], None]] = []
        self.asked_states = anyio.Event()

    def add(self, *rows: JobRow) -> None:
        for row in rows:
            self.jobs[row.id] = row
            self.specs.setdefault(row.id, SPEC)

    def change(self, job: int, **fields: Any) -> None:
        self.jobs[job] = msgspec.structs.replace(self.jobs[job], **fields)
        for tell in self._tells:
            tell("done")

    def _reach(self) -> None:
        if self.away:
            raise StoreUnavailable("connection refused")

    async def submit(self, spec: dict[str, Any], *, key: str | None, after: Sequence[int], submitter: str) -> int:
        self._reach()
        job = max(self.jobs, default=0) + 1
        self.calls.append(("submit", spec, key, list(after), submitter))
        self.add(job_row(job, submitter=submitter))
        return job

    async def submit_many(self, specs: Sequence[Any], *, key: str | None, submitter: str) -> list[int]:
        self._reach()
        first = max(self.jobs, default=0) + 1
        self.calls.append(("submit_many", [msgspec.json.decode(spec) for spec in specs], key, submitter))
        self.add(*(job_row(first + at, submitter=submitter) for at in range(len(specs))))
        return list(range(first, first + len(specs)))

    async def list_jobs(self, where: Filter) -> AsyncGenerator[list[JobRow], None]:
        self._reach()
        if self.rows is not None:
            async with aclosing(self.rows) as rows:
                async for row in rows:
                    yield [row]
            return
        wanted = [
            row
            for row in self.jobs.values()
            if (row.state in where.states if where.states else (where.all or not row.state.is_final))
        ]
        for at in range(0, len(wanted), 2):
            yield wanted[at : at + 2]

    async def list_lines(self, where: Filter) -> AsyncGenerator[list[JobLine], None]:
        async with aclosing(self.list_jobs(where)) as pages:
            async for page in pages:
                yield [_line(row) for row in page]

    async def show(self, job: int) -> tuple[JobRow, dict[str, Any], list[int], list[int]]:
        (row,) = await self.states([job])
        return row, self.specs[job], [1], [2, 3]

    async def attempts(self, job: int) -> list[AttemptRow]:
        await self.states([job])
        return self.tries.get(job, [])

    async def states(self, jobs: Sequence[int]) -> list[JobRow]:
        self.asked_states.set()
        self._reach()
        for job in jobs:
            if job not in self.jobs:
                raise UnknownJob(job)
        return [self.jobs[job] for job in sorted(jobs)]

    async def stop(self, jobs: Sequence[int], *, grace: float | None, kill: bool, by: str) -> list[StopResult]:
        self._reach()
        self.calls.append(("stop", list(jobs), grace, kill, by))
        did = {State.RUNNING: "stopping", State.READY: "canceled", State.WAITING: "canceled"}
        states = [(job, self.jobs[job].state) for job in jobs]
        return [StopResult(job, did.get(state, state.value), state.is_final) for job, state in states]

    async def retry(self, jobs: Sequence[int], *, by: str) -> list[JobRow]:
        await self._ended(jobs)
        self.calls.append(("retry", list(jobs), by))
        for job in jobs:
            self.change(job, state=State.READY, generation=2)
        return await self.states(jobs)

    async def delete(self, jobs: Sequence[int], *, by: str) -> int:
        await self._ended(jobs)
        self.calls.append(("delete", list(jobs), by))
        return len(jobs)

    async def _ended(self, jobs: Sequence[int]) -> None:
        for row in await self.states(jobs):
            if not row.state.is_final:
                raise WrongState(row.id, row.state.value, "it has not ended")

    async def hosts(self) -> list[HostRow]:
        self._reach()
        return [
            HostRow(
                name="build1",
                session="a" * 32,
                version="1",
                labels=["docker"],
                slots=4,
                leases=1,
                state="active",
                started_at=NOW,
                renewed_at=NOW,
                expires_at=NOW,
            )
        ]

    async def events(self, after: int, limit: int = 500) -> list[EventRow]:
        self._reach()
        return [event for event in self.happened if event.id > after][:limit]

    async def last_event(self) -> int:
        self._reach()
        return max((event.id for event in self.happened), default=0)

    def health(self) -> StoreHealth:
        return StoreHealth(
            available=not self.away,
            since=NOW,
            error="connection refused" if self.away else None,
            server="18.0",
            listening=not self.away,
            round_trips=7,
            last_round_trip=0.001,
        )

    def on_wake(self, tell: Callable[[str], None]) -> Callable[[], None]:
        self._tells.append(tell)
        return lambda: self._tells.remove(tell)


class FakeLogs:
    """Logs of attempts; one not ``complete`` makes a follower wait. ``fail_once`` is raised by the next read."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], list[LogRecord]] = {}
        self.complete: set[tuple[int, int]] = set()
        self.changed = anyio.Event()
        self.reads: list[tuple[int, int, int]] = []
        self.fail_once: Exception | None = None

    def write(self, job: int, attempt: int, data: bytes, step: int = 0, stream: Stream = Stream.OUT) -> None:
        records = self.kept.setdefault((job, attempt), [])
        offset = records[-1].offset + len(records[-1].data) if records else 0
        records.append(LogRecord(offset, step, stream, 1772366400.5, data))
        self._change()

    def finish(self, job: int, attempt: int) -> None:
        self.complete.add((job, attempt))
        self._change()

    def _change(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def read(
        self,
        job: int,
        attempt: int,
        *,
        offset: int = 0,
        step: int | None = None,
        stream: Stream | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[LogRecord, None]:
        self.reads.append((job, attempt, offset))
        given = 0
        while True:
            for record in self.kept.get((job, attempt), [])[given:]:
                given += 1
                if step not in (None, record.step) or stream not in (None, record.stream):
                    continue
                if record.offset + len(record.data) > offset:
                    cut = max(0, offset - record.offset)
                    yield msgspec.structs.replace(record, offset=record.offset + cut, data=record.data[cut:])
                    if self.fail_once is not None:
                        error, self.fail_once = self.fail_once, None
                        raise error
            if not follow or (job, attempt) in self.complete:
                return
            await self.changed.wait()


class FakeActor:
    """A mailbox and somebody who answers. ``silent``: takes requests and says nothing."""

    def __init__(self, name: str) -> None:
        self.mailbox: Mailbox[Any] = Mailbox(name)
        self.name = name
        self.running: list[RunningJob] = []
        self.asked: list[Any] = []
        self.problems: list[str] = []
        self.silent = False
        self.draining = False
        self.on_stop: Callable[[], object] = lambda: None

    async def run(self) -> None:
        async for item in self.mailbox:
            if isinstance(item, Ask) and not self.silent:
                item.answer(self._answer(item.request))

    def _answer(self, request: Any) -> Any:
        match request:
            case AskRunning():
                return self.running
            case AskStop(jobs=jobs):
                self.asked.append(request)
                self.on_stop()
                return [job.job for job in self.running if job.job in jobs]
            case AskDrain() | AskResume():
                self.draining = isinstance(request, AskDrain)
                self.asked.append(request)
                return None
            case AskStatus():
                return Status(facts={"draining": self.draining}, problems=self.problems)
            case AskActors():
                return [
                    ActorInfo(
                        name=self.name,
                        state="running",
                        restarts=0,
                        depth_control=0,
                        depth_data=0,
                        oldest=0.0,
                        handled=1,
                        dropped=0,
                    )
                ]
            case _:
                raise AssertionError(request)


class World:
    """``serve`` runs the socket; ``as_role`` makes all who connect from then on somebody with that role."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.store = FakeStore()
        self.logs = FakeLogs()
        self.actors = {name: FakeActor(name) for name in ("root", "dispatcher", "keeper")}
        self.limits = Limits()
        self.identify: Callable[[Credentials, Roles], Peer] | None = self.as_role(Role.ADMIN)
        self.roles = Roles()
        self.pace = QUICK
        self.control: ControlActor | None = None
        self.reload_error: Exception | None = None

    def as_role(self, role: Role | None, user: str = "alice") -> Callable[[Credentials, Roles], Peer]:
        self.identify = lambda who, _roles: Peer(pid=who.pid, uid=who.uid, gid=who.gid, user=user, role=role)
        return self.identify

    @property
    def dispatcher(self) -> FakeActor:
        return self.actors["dispatcher"]

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[World]:
        async def reload() -> dict[str, Any]:
            if self.reload_error is not None:
                raise self.reload_error
            return {"roles.viewer": ["bob"]}

        parts = Parts(
            host="build1",
            store=self.store,
            logs=self.logs,
            mailboxes={name: actor.mailbox for name, actor in self.actors.items()},
            isolation=lambda: {"uid": "own uid"},
            reload=reload,
            pace=self.pace,
            clock=lambda: NOW,
        )
        injected: dict[str, Any] = {"identify": self.identify} if self.identify else {}
        self.control = ControlActor(parts, roles=lambda: self.roles, limits=self.limits, **injected)
        self.control.listen(self.path)
        async with anyio.create_task_group() as tasks:
            for actor in self.actors.values():
                tasks.start_soon(actor.run)
            tasks.start_soon(self.control.run)
            try:
                yield self
            finally:
                tasks.cancel_scope.cancel()


class RawPeer:
    """A client that can misbehave: sends any bytes, reads when told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = FrameDecoder(16 << 20)
        self._frames: list[bytes] = []

    @classmethod
    @asynccontextmanager
    async def connect(cls, path: str) -> AsyncIterator[RawPeer]:
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def call(self, method: str, parameters: Any = None, *, more: bool = False, oneway: bool = False) -> None:
        name = method if "." in method else f"io.bsup.Supervisor.{method}"
        raw = NONE if parameters is None else pack(parameters)
        self.send(encode_frame(Call(method=name, parameters=raw, more=more, oneway=oneway)))

    def shut_down(self) -> None:
        self._writer.write_eof()

    async def reply(self) -> Reply | None:
        """None at the end of the connection."""
        while not self._frames:
            try:
                data = await self._reader.read(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self._frames = self._decoder.feed(data)
        return decode_reply(self._frames.pop(0))

    async def replies(self) -> list[Reply]:
        """The replies of one call."""
        found: list[Reply] = []
        while (reply := await self.reply()) is not None:
            found.append(reply)
            if not reply.continues:
                break
        return found


def parameters(reply: Reply | None) -> Any:
    assert reply is not None
    return msgspec.json.decode(reply.parameters)


logging.getLogger("supervisor.control").setLevel(logging.INFO)
