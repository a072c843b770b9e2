"""Fakes of a host: its disk and shepherd (a runner), fence, session file, log sink and service manager.

Time is the (virtual) loop's. A ``FakeHost`` outlives its daemons, as a machine does. The store is in ``fake_store``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from random import Random

import msgspec

from supervisor.model.errors import RunnerError, StoreUnavailable
from supervisor.model.job import Lease, LeaseId, Me
from supervisor.ports import HandleInfo, Plan, SavedSession, StepEnd, StepPlan, StepTaken

GUARD_PATIENCE = 2.0
"""Seconds behind the fence in which a daemon with jobs of its own has to take its name out again."""

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)


def now() -> float:
    return asyncio.get_running_loop().time()


def wall() -> datetime:
    return EPOCH + timedelta(seconds=now())


class Run:
    """One step's process."""

    def __init__(self, lease: LeaseId, job: int, index: int) -> None:
        self.lease = lease
        self.job = job
        self.index = index
        self.began = now()
        self.started_at = wall()
        self.ended: float | None = None
        self.end: StepEnd | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.tells: list[Callable[[StepEnd], None]] = []


class Handle:
    def __init__(self, lease: Lease, plan: Plan) -> None:
        self.lease = lease
        self.plan = plan
        self.runs: dict[int, Run] = {}


class Script(msgspec.Struct):
    """What a job's steps do: ``steps`` is (seconds, exit code) each; ``deaf`` ones ignore SIGTERM."""

    steps: list[tuple[float, int]] = msgspec.field(default_factory=lambda: [(1.0, 0)])
    deaf: bool = False
    timeout: float | None = None
    always: frozenset[int] = frozenset()


class FakeHost:
    """A machine: its disk, its shepherd, its fence. A ``Runner``, a ``Fence`` and a ``SessionFile`` at once."""

    survives = True

    def __init__(self, history: list[Run] | None = None) -> None:
        self.disk: dict[LeaseId, Handle] = {}
        self.history = history if history is not None else []
        self.scripts: dict[int, Script] = {}
        self.script = Script()
        self.fence_at: float | None = None
        self.fences: list[float] = []
        self.saved: SavedSession | None = None
        self.clock_ahead = 0.0
        self.faults: Callable[[str], str | None] = lambda call: None
        self.hang: set[str] = set()
        self.late: list[tuple[LeaseId, int, Callable[[StepEnd], None]]] = []
        """Starts that were not answered in time, and are looked at before the next stop is (fault ``late``)."""
        self.stops: list[tuple[LeaseId, float, bool]] = []
        self.sweeps = 0
        self.guards: list[bool] = []
        self.daemon_kills = 0
        self._timer: asyncio.TimerHandle | None = None

    def running(self) -> list[Run]:
        return [run for handle in self.disk.values() for run in handle.runs.values() if run.end is None]

    def boot(self, *, synced: bool = True) -> None:
        """Not ``synced``: the power was cut, and nothing of what was written last is there."""
        if not synced:
            self.disk.clear()
        for run in self.running():
            run.end = StepEnd(run.index, None, None, run.started_at, None, "gone")
            run.ended = now()
            if run.timer is not None:
                run.timer.cancel()
        if self.saved is not None:
            self.saved = msgspec.structs.replace(self.saved, same_boot=False)

    # --- runner -----------------------------------------------------------------------------------------------

    async def _call(self, name: str) -> str | None:
        if name in self.hang:
            await asyncio.Event().wait()
        fault = self.faults(name)
        if fault == "before":
            raise RunnerError(f"{name}: the shepherd is away")
        return fault

    async def prepare(self, lease: Lease) -> Plan:
        fault = await self._call("prepare")
        script = self.scripts.get(lease.job, self.script)
        steps = tuple(StepPlan(i, f"step {i}", always=i in script.always) for i in range(len(script.steps)))
        handle = self.disk.setdefault(lease.id, Handle(lease, Plan(steps, script.timeout)))
        if fault:
            raise RunnerError("prepare: the answer was lost")
        return handle.plan

    async def start(self, lease: LeaseId, step: int, tell: Callable[[StepEnd], None]) -> datetime:
        fault = await self._call("start")
        if fault == "late":
            self.late.append((lease, step, tell))
            raise RunnerError("start: the shepherd did not answer in time")
        handle = self.disk[lease]
        assert step not in handle.runs, "a step was started twice"
        if self.fence_at is not None and self.now() > self.fence_at:
            raise RunnerError("the fence has passed")
        run = handle.runs[step] = Run(lease, handle.lease.job, step)
        run.tells.append(tell)
        self.history.append(run)
        seconds, code = self.scripts.get(run.job, self.script).steps[step]
        run.timer = asyncio.get_running_loop().call_later(seconds, self._end, run, code, None, None)
        if fault:
            raise RunnerError("start: the answer was lost")
        return run.started_at

    async def adopt(self, lease: LeaseId, tell: Callable[[StepEnd], None]) -> list[StepTaken] | None:
        await self._call("adopt")
        handle = self.disk.get(lease)
        if handle is None:
            return None
        for run in handle.runs.values():
            if run.end is None:
                run.tells = [tell]
        return [StepTaken(run.index, run.started_at, run.end) for run in handle.runs.values()]

    async def stop(self, lease: LeaseId, grace: float, kill: bool) -> None:
        await self._call("stop")
        while self.late:
            await self.start(*self.late.pop(0))
        self.stops.append((lease, grace, kill))
        handle = self.disk.get(lease)
        for run in handle.runs.values() if handle else ():
            if run.end is None:
                deaf = self.scripts.get(run.job, self.script).deaf
                wait = 0.001 if kill else grace if deaf else 0.1
                asyncio.get_running_loop().call_later(wait, self._end, run, None, 9, "stop")

    async def discard(self, lease: LeaseId) -> None:
        handle = self.disk.pop(lease, None)
        assert handle is None or all(run.end is not None for run in handle.runs.values()), "discarded while running"

    async def handles(self) -> list[LeaseId]:
        await self._call("handles")
        return list(self.disk)

    async def describe(self, lease: LeaseId) -> HandleInfo | None:
        handle = self.disk.get(lease)
        return None if handle is None else HandleInfo(handle.lease.job, handle.lease.attempt, handle.plan)

    async def sweep(self) -> list[str]:
        await self._call("sweep")
        self.sweeps += 1
        return []

    def isolation(self) -> dict[str, str]:
        return {}

    def _end(self, run: Run, code: int | None, signal: int | None, cause: str | None) -> None:
        if run.end is not None:
            return
        if run.timer is not None:
            run.timer.cancel()
        run.ended = now()
        run.end = StepEnd(run.index, code, signal, run.started_at, wall(), cause)
        for tell in run.tells:
            tell(run.end)

    # --- fence ------------------------------------------------------------------------------------------------

    @property
    def is_guarded(self) -> bool:
        return bool(self.guards) and self.guards[-1]

    async def guard(self, active: bool) -> None:
        """As a slow disk would have it: what is said is there after a moment."""
        fault = self.faults("guard")
        if fault == "before":
            raise RunnerError("the fence file can't be written")
        await asyncio.sleep(0.01)
        self.guards.append(active)

    def now(self) -> float:
        return now() + self.clock_ahead

    def fence_in(self) -> float:
        return math.inf if self.fence_at is None else self.fence_at - self.now()

    async def write(self, fence_at: float) -> None:
        self.fence_at = fence_at
        self.fences.append(fence_at)
        self._look_at_fence()

    def _look_at_fence(self) -> None:
        """The shepherd: it lives on when the daemon dies."""
        if self._timer is not None:
            self._timer.cancel()
        assert self.fence_at is not None
        if self.now() > self.fence_at:
            for run in self.running():
                self._end(run, None, 9, "fence")
            self._timer = asyncio.get_running_loop().call_later(GUARD_PATIENCE, self._look_at_guard)
            return
        self._timer = asyncio.get_running_loop().call_later(self.fence_at - self.now() + 0.01, self._look_at_fence)

    def _look_at_guard(self) -> None:
        """Where a real shepherd kills the daemon, this one only counts."""
        self.daemon_kills += self.is_guarded

    # --- session file -----------------------------------------------------------------------------------------

    async def load(self) -> SavedSession | None:
        return self.saved

    async def save(self, me: Me, next_incarnation: str | None = None, boot_epoch: int = 0) -> None:
        same = True if next_incarnation is None or self.saved is None else self.saved.same_boot
        self.saved = SavedSession(me.session, me.incarnation, next_incarnation, me.epoch, same, boot_epoch)


class FakeSink:
    """Logs that are complete at once, unless ``faults`` says otherwise."""

    def __init__(self) -> None:
        self.opened: list[LeaseId] = []
        self.closed: list[LeaseId] = []
        self.notes: list[str] = []
        self.faults: Callable[[str], str | None] = lambda call: None
        self.backlog = 0

    async def run(self) -> None:
        await asyncio.Event().wait()

    def problems(self) -> list[str]:
        return []

    async def open(self, lease: Lease, plan: Plan) -> None:
        if self.faults("open"):
            raise StoreUnavailable("the database is away")
        self.opened.append(lease.id)

    def step_started(self, lease: LeaseId, step: int) -> None:
        pass

    def step_ended(self, lease: LeaseId, step: int) -> None:
        pass

    async def note(self, lease: LeaseId, step: int, text: str) -> None:
        self.notes.append(text)

    async def complete(self, lease: LeaseId) -> int:
        if self.faults("complete"):
            raise ValueError("the log is broken")
        return 0

    async def close(self, lease: LeaseId) -> None:
        self.closed.append(lease)

    def redact(self, lease: LeaseId, text: str) -> str:
        return text.replace("hunter2", "***")


class FakeNotifier:
    def __init__(self) -> None:
        self.said: list[str] = []

    def ready(self) -> None:
        self.said.append("ready")

    def status(self, text: str) -> None:
        self.said.append(f"status {text}")

    def stopping(self) -> None:
        self.said.append("stopping")

    def reloading(self) -> None:
        self.said.append("reloading")


def sometimes(rng: Random, chance: float, calls: Iterable[str]) -> Callable[[str], str | None]:
    """Faults before or after the commit, at random."""
    named = frozenset(calls)

    def fault(call: str) -> str | None:
        if call in named and rng.random() < chance:
            return rng.choice(["before", "after"])
        return None

    return fault


def overlaps(history: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pairs of processes of one job, of different leases, that ran at the same time."""
    found = []
    for position, run in enumerate(history):
        for other in history[position + 1 :]:
            same = run.job == other.job and run.lease != other.lease
            if same and other.began < (run.ended if run.ended is not None else float("inf")):
                found.append((run, other))
    return found
