"""Runs in-process kinds: a task of the daemon for each attempt (``ports.Runner``).

Nothing of them is on disk and nothing outlives the daemon: a lease of an earlier epoch (a daemon before this one) is
told as gone, which counts a loss; one of this epoch that was never begun here is not known. Most calls answer at once,
so that an attempt which needs no waiting costs no task: handlers that don't wait share one.

The shepherd can't end a coroutine. While one runs, the fence file names this daemon (``guard``): if the daemon has not
ended them all and taken its name out again shortly after the fence, the shepherd kills the daemon.

May import the standard library, model, ports and ``kinds``. Made by ``app``, called by job actors and the dispatcher.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from types import TracebackType

import msgspec

from supervisor.kinds import Handler, InProcessJob
from supervisor.model.attempt_words import Plan, StepEnd, StepPlan, StepTaken
from supervisor.model.errors import BsupError, InvalidInput, RunnerError
from supervisor.model.job import Lease, LeaseId
from supervisor.ports import HandleInfo
from supervisor.runners.workers import Workers

log = logging.getLogger("supervisor.runners")

UNGUARD_AFTER = 10.0
"""Seconds without a job after which the fence file is cleared of this daemon's name."""

CANCEL_AGAIN = 1.0
"""Seconds after which a handler that goes on at the daemon's end is canceled again."""

Guard = Callable[[bool], Awaitable[None]]


class _Asked(msgspec.Struct, frozen=True):
    """All that this runner needs of a spec."""

    args: dict[str, object] = {}
    timeout: float | None = None


_ASKED = msgspec.json.Decoder(_Asked)


class _Run:
    """One attempt here. ``task``: the one that its handler runs in, while it does."""

    __slots__ = ("began", "end", "handler", "job", "lease", "plan", "started_at", "stopped", "task", "tell")

    def __init__(self, lease: Lease, handler: Handler, job: InProcessJob, plan: Plan) -> None:
        self.lease = lease
        self.handler = handler
        self.job = job
        self.plan = plan
        self.tell: Callable[[StepEnd], None] | None = None
        self.task: asyncio.Task[None] | None = None
        self.started_at: datetime | None = None
        self.began = 0.0
        """Monotonic time."""
        self.stopped = False
        self.end: StepEnd | None = None


class InProcessRunner:
    """``handlers`` by kind; ``guard`` puts this daemon's name into the fence file, or takes it out; ``fence_in``: the
    seconds until the fence; ``timeout`` is the host's, in seconds, where a job names none. An async context: leaving it
    cancels what runs."""

    survives = False

    def __init__(
        self, handlers: Mapping[str, Handler], *, guard: Guard, fence_in: Callable[[], float], timeout: float | None
    ) -> None:
        self._handlers = handlers
        self._guard = guard
        self._fence_in = fence_in
        self.timeout = timeout
        self._workers: Workers | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs: dict[LeaseId, _Run] = {}
        self._plans: dict[str, Plan] = {}
        """The last plan of each kind: those of most of its jobs are the same."""
        self._live = 0
        self._guarded = False
        self._guarding = asyncio.Lock()
        self._unguard_timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> InProcessRunner:
        self._workers = Workers()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Again and again: a handler may pass over one. For one that passes over all, there is the fence.
        if self._workers is not None:
            await self._workers.cancel(CANCEL_AGAIN)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._unguard_timer is not None:
            self._unguard_timer.cancel()
        # Whatever this object believes: taking the name out may have been canceled in the middle.
        try:
            await self._guard(False)
        except BsupError as error:
            log.warning("this daemon's name stays in the fence file: %s", error)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self._handlers)

    # --- Runner -----------------------------------------------------------------------------------------------

    def prepare(self, lease: Lease) -> Plan:
        known = self._runs.get(lease.id)
        if known is not None:
            return known.plan
        handler = self._handlers.get(lease.kind)
        if handler is None:
            raise RunnerError(f"this host has no handler for jobs of kind {lease.kind!r} any more")
        try:
            asked = _ASKED.decode(lease.spec)
        except msgspec.MsgspecError as error:
            raise InvalidInput("spec", f"can't be read: {error}") from None
        timeout = self.timeout if asked.timeout is None else asked.timeout
        plan = self._plans.get(lease.kind)
        if plan is None or plan.timeout != timeout:
            plan = self._plans[lease.kind] = Plan((StepPlan(0, lease.kind),), timeout, in_process=True)
        self._runs[lease.id] = _Run(lease, handler, InProcessJob(lease, asked.args), plan)
        return plan

    def start(self, lease: LeaseId, step: int, tell: Callable[[StepEnd], None]) -> datetime | Awaitable[datetime]:
        run = self._runs.get(lease)
        if run is None or run.started_at is not None:
            raise RunnerError("the attempt is not prepared here, or was started before")
        run.tell = tell
        if self._guarded:
            return self._begin(run)
        return self._begin_guarded(run)

    async def adopt(self, lease: LeaseId, tell: Callable[[StepEnd], None]) -> list[StepTaken] | None:
        run = self._runs.get(lease)
        if run is None:
            gone = StepEnd(0, None, None, None, None, "gone", "the daemon that ran it is gone")
            return [StepTaken(0, None, gone)]
        if run.started_at is None:
            return []
        run.tell = tell
        return [StepTaken(0, run.started_at, run.end, time.monotonic() - run.began)]

    async def stop(self, lease: LeaseId, grace: float, kill: bool) -> None:
        run = self._runs.get(lease)
        if run is None or run.started_at is None or run.end is not None:
            return
        run.stopped = True
        if run.task is None:  # it has not begun, and will not
            return
        run.job.ask_to_stop()
        if kill or grace <= 0:
            run.task.cancel()
        else:
            asyncio.get_running_loop().call_later(grace, run.task.cancel)

    def discard(self, lease: LeaseId) -> None:
        self._runs.pop(lease, None)

    async def handles(self) -> list[LeaseId]:
        return list(self._runs)

    async def describe(self, lease: LeaseId) -> HandleInfo | None:
        run = self._runs.get(lease)
        return None if run is None else HandleInfo(run.lease.job, run.lease.attempt, run.plan)

    async def sweep(self) -> list[str]:
        return []

    def isolation(self) -> dict[str, str]:
        return {}

    # --- the work ---------------------------------------------------------------------------------------------

    def _begin(self, run: _Run) -> datetime:
        assert self._workers is not None
        self._live += 1
        run.started_at, run.began = datetime.now(UTC), time.monotonic()
        self._workers.submit(partial(self._work, run))
        return run.started_at

    async def _begin_guarded(self, run: _Run) -> datetime:
        """The shepherd must know before the first of them begins."""
        async with self._guarding:
            if not self._guarded:
                await self._guard(True)
                self._guarded = True
        return self._begin(run)

    async def _work(self, run: _Run, task: asyncio.Task[None]) -> bool:
        """Whether the task may be used again: not where a cancel may still be on its way."""
        code: int | None = None
        cause = error = None
        run.task = task
        try:
            if run.stopped:
                cause = "stop"
            else:
                await run.handler(run.job)
                code = 0
        except GeneratorExit:
            raise
        except BaseException as raised:  # whatever it is (SystemExit, say) is this job's, not the daemon's
            if run.stopped and isinstance(raised, asyncio.CancelledError):
                cause = "stop"
            else:
                error = _in_words(raised)
                cause = "invalid" if isinstance(raised, InvalidInput) else None
        if run.stopped and run.job.has_looked:
            code, cause, error = None, "stop", None
        run.task = None
        run.end = StepEnd(0, code, None, run.started_at, datetime.now(UTC), cause, error)
        self._live -= 1
        if not self._live:
            self._was_last()
        if run.tell is not None:
            run.tell(run.end)
        return not run.stopped

    # --- the guard --------------------------------------------------------------------------------------------

    def _was_last(self) -> None:
        """Not later than the fence: from then on the shepherd waits for the answer."""
        if self._unguard_timer is not None:
            self._unguard_timer.cancel()
        wait = max(0.0, min(UNGUARD_AFTER, self._fence_in()))
        self._unguard_timer = asyncio.get_running_loop().call_later(wait, self._unguard_soon)

    def _unguard_soon(self) -> None:
        self._unguard_timer = None
        if not self._live and self._guarded:
            task = asyncio.get_running_loop().create_task(self._unguard())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _unguard(self) -> None:
        async with self._guarding:
            if self._live or not self._guarded:
                return
            # Before it is written: a start from here on waits for the lock, and writes the name again.
            self._guarded = False
            try:
                await self._guard(False)
            except BsupError as error:
                self._guarded = True
                log.warning("the fence file could not be written, trying again: %s", error)
                self._unguard_timer = asyncio.get_running_loop().call_later(1.0, self._unguard_soon)


def _in_words(raised: BaseException) -> str:
    try:
        return str(raised) if isinstance(raised, BsupError) else f"{type(raised).__name__}: {raised}"
    except Exception:
        return f"{type(raised).__name__}, which can't be put into words"
