"""Runs jobs of kind ``steps`` as processes, through the shepherd. Implements ``ports.Runner``.

May import ``model``, ``ports``, anyio and its neighbours in ``runners``. Made by ``app``, called by the job actors.

Everything about a run is on disk (``run_files``, ``handles``); what this object holds in memory is only whom to tell.
What it remembers of its own runs only saves it from reading that again. A step's end is noticed by the shepherd's
hints, and by one timer that looks at the files of all live steps, so that a lost hint costs a quarter of a second and
nothing else. *Exited* and *output closed* are two facts: an end is told when
both are there, or when the output stayed open for ``CLOSE_WAIT`` after the exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeVar

import anyio.to_thread
import msgspec

from supervisor.model.errors import HandleLost, RunnerError
from supervisor.model.job import Lease, LeaseId
from supervisor.ports import HandleInfo, Plan, StepEnd, StepTaken
from supervisor.runners import handles, host_disk
from supervisor.runners.handles import Damaged, Exit, Started
from supervisor.runners.run_files import RunFile, RunPlanner, StepsSettings, read_run
from supervisor.runners.shepherd_client import Hint, HintKind, Refused
from supervisor.runners.uids import UidPool

POLL = 0.25
CLOSE_WAIT = 10.0
_CLAIMED_TRIES = 3

Tell = Callable[[StepEnd], None]
F = TypeVar("F", bound=msgspec.Struct)


class Shepherd(Protocol):
    """What the runner asks of ``ShepherdClient``."""

    def on_hint(self, tell: Hint) -> None: ...

    async def prepare(self, run_dir: Path, files: Mapping[str, str], workspace: str, uid: int | None) -> None: ...

    async def start_step(self, step_dir: Path) -> float | None: ...

    async def stop_run(self, run_dir: Path, grace: float, kill: bool) -> bool: ...

    async def make_workspace(self, path: Path, uid: int | None) -> None: ...

    async def own(self, path: Path, uid: int | None) -> None: ...

    async def give_back(self, path: Path) -> None: ...

    async def remove(self, *paths: Path) -> None: ...

    async def status(self) -> dict[str, object]: ...


class _Live:
    """A step that was started and whose end is not told yet. ``exited``: monotonic time its exit was first seen.

    ``started_at``: as the shepherd answered, where it did. ``is_dead``: its process is gone. ``question``: the
    shepherd is being asked what it knows of it. ``is_starting``: its start is not answered yet, and ``is_hinted``: its
    end was, meanwhile.
    """

    __slots__ = (
        "checkout",
        "exited",
        "index",
        "is_dead",
        "is_hinted",
        "is_starting",
        "lease",
        "question",
        "started_at",
        "step_dir",
        "tell",
    )

    def __init__(self, lease: LeaseId, index: int, step_dir: Path, checkout: bool, tell: Tell) -> None:
        self.lease = lease
        self.index = index
        self.step_dir = step_dir
        self.checkout = checkout
        self.tell = tell
        self.started_at: datetime | None = None
        self.is_starting = False
        self.is_hinted = False
        self.exited: float | None = None
        self.is_dead = False
        self.question: asyncio.Task[None] | None = None


class StepsRunner:
    """Runs attempts of kind ``steps``. ``settings`` may be replaced: attempts prepared later go by the new ones."""

    survives = True

    def __init__(
        self,
        state: Path,
        shepherd: Shepherd,
        settings: StepsSettings,
        *,
        uid_base: int = 200_000,
        uid_count: int = 0,
        close_wait: float = CLOSE_WAIT,
    ) -> None:
        """``uid_count`` 0: jobs share the shepherd's own user. Reads the runs on disk to know which uids are taken."""
        self._close_wait = close_wait
        self.settings = settings
        self._runs = state / "runs"
        self._work = state / "work"
        self._state = state
        self._shepherd = shepherd
        self._uids = UidPool(uid_base, uid_count)
        self._known: dict[LeaseId, RunFile] = {}
        self._uid_range = f"{uid_base} to {uid_base + uid_count - 1}"
        self._live: dict[Path, _Live] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._words: dict[str, str] = {}
        self._boot_id = handles.boot_id()
        for lease in self._leases_on_disk(self._runs):
            with contextlib.suppress(RunnerError):
                run = read_run(self._runs / str(lease))
                if run is not None and run.uid is not None:
                    self._uids.hold(lease, run.uid)
        shepherd.on_hint(self._hinted)

    async def open(self) -> None:
        """Asks the shepherd how jobs are held apart on this host, for ``isolation``."""
        words = (await self._shepherd.status()).get("isolation")
        if isinstance(words, dict):
            self._words = {str(name): str(text) for name, text in words.items()}

    def close(self) -> None:
        """Stops looking after steps; they go on, and are taken up again by ``adopt``."""
        for live in self._live.values():
            if live.question is not None:
                live.question.cancel()
        self._live.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- ports.Runner ---

    async def prepare(self, lease: Lease) -> Plan:
        # With a checkout the workspace is the daemon's until the first step: git runs as the daemon's user.
        run = await self._run(lease.id)
        if run is not None:
            await self._shepherd.make_workspace(Path(run.workspace), None if run.has_checkout else run.uid)
            return run.plan
        planner = RunPlanner(str(self._state), lease, self.settings)
        intent = planner.plan(self._uids.take(lease.id), time.time())
        run, run_dir = intent.run, self._run_dir(lease.id)
        try:
            await self._shepherd.prepare(run_dir, intent.files, run.workspace, None if run.has_checkout else run.uid)
        except RunnerError:
            if not handles.is_there(run_dir):
                self._uids.give_back(lease.id)
            raise
        self._known[lease.id] = run
        return run.plan

    async def start(self, lease: LeaseId, step: int, tell: Tell) -> datetime:
        run = await self._run(lease)
        if run is None:
            raise RunnerError(f"run {lease}: there is no such run on this host")
        step_dir = self._run_dir(lease) / str(step)
        if await anyio.to_thread.run_sync(self._is_first_own, run, step) if run.has_checkout else False:
            # The workspace was the checkout's until then.
            await self._shepherd.own(Path(run.workspace), run.uid)
        live = _Live(lease, step, step_dir, run.has_checkout and step == 0, tell)
        # Before it is answered: its end may be hinted at in the same breath.
        live.is_starting = True
        before, self._live[step_dir] = self._live.get(step_dir), live
        try:
            at = await self._start(step_dir)
        except BaseException as error:
            self._live.pop(step_dir, None)
            if before is not None:
                self._live[step_dir] = before
            if not isinstance(error, Refused) or error.code != "fence" or handles.is_claimed(step_dir):
                raise
            # The host's fault and not the job's: it ends as what runs does when the fence passes.
            now = datetime.now(UTC)
            asyncio.get_running_loop().call_soon(tell, StepEnd(step, None, None, None, now, "fence", str(error)))
            return now
        live.started_at = None if at is None else _moment(at)
        self._watch(live)
        return live.started_at or self._started_at(step_dir) or datetime.now(UTC)

    async def adopt(self, lease: LeaseId, tell: Tell) -> list[StepTaken] | None:
        run_dir = self._run_dir(lease)
        try:
            run = await anyio.to_thread.run_sync(read_run, run_dir)
        except Damaged as damage:
            # Nobody can go on with it: what runs of it is ended first.
            if await self._shepherd.stop_run(run_dir, 0.0, True):
                raise RunnerError(f"{damage}; what runs of it is being ended") from damage
            raise HandleLost(str(damage)) from damage
        if run is None:
            return None
        taken = []
        for step in run.plan.steps:
            step_dir = run_dir / str(step.index)
            if not handles.is_claimed(step_dir):
                continue
            live = _Live(lease, step.index, step_dir, run.has_checkout and step.index == 0, tell)
            end = self._end(live) or await self._end_of_unknown(live)
            taken.append(StepTaken(step.index, self._started_at(step_dir), end, handles.age(step_dir)))
            if end is None:
                self._watch(live)
        return taken

    async def stop(self, lease: LeaseId, grace: float, kill: bool) -> None:
        await self._shepherd.stop_run(self._run_dir(lease), grace, kill)

    async def discard(self, lease: LeaseId) -> None:
        run_dir, workspace = self._run_dir(lease), self._work / str(lease)
        for step_dir in [path for path, live in self._live.items() if live.lease == lease]:
            del self._live[step_dir]
        keep = self.settings.keep_workspace
        with contextlib.suppress(RunnerError):  # a damaged run is removed like any other
            run = await self._run(lease)
            keep = keep or (run is not None and run.keep_workspace)
        if keep and workspace.exists():
            await self._shepherd.give_back(workspace)
            await anyio.to_thread.run_sync(host_disk.mark_kept, workspace)
            await self._shepherd.remove(run_dir)
        else:
            # The workspace first: a handle that is left is found again, and with it whose the workspace is.
            await self._shepherd.remove(workspace, run_dir)
        self._known.pop(lease, None)
        self._uids.give_back(lease)

    async def handles(self) -> list[LeaseId]:
        """Runs, and workspaces whose run is gone (but not those that were kept on request)."""
        return await anyio.to_thread.run_sync(self._all_handles)

    async def describe(self, lease: LeaseId) -> HandleInfo | None:
        try:
            run = await anyio.to_thread.run_sync(read_run, self._run_dir(lease))
        except RunnerError:
            return None
        return None if run is None else HandleInfo(run.job, run.attempt, run.plan)

    async def sweep(self) -> list[str]:
        settings = self.settings
        said = []
        try:
            if settings.keep_workspace_for is not None:
                before = time.time() - settings.keep_workspace_for
                old = await anyio.to_thread.run_sync(host_disk.kept_since_before, self._work, self._runs, before)
                for workspace in old:
                    await self._shepherd.remove(workspace)
                    said.append(f"removed the workspace {workspace.name}, which was kept long enough")
                said += await anyio.to_thread.run_sync(host_disk.remove_foreign, self._state, before)
            mirrors = self._state / "mirrors"
            return said + await anyio.to_thread.run_sync(host_disk.trim_mirrors, mirrors, settings.mirrors_max)
        except OSError as error:
            raise RunnerError(f"the state directory could not be swept: {error}") from error

    def isolation(self) -> dict[str, str]:
        own = f"each job a user of its own ({self._uid_range})" if len(self._uids) else "absent: jobs share one user"
        return {"users": own, **self._words}

    # --- starting ---

    async def _start(self, step_dir: Path) -> float | None:
        """When it started, if the shepherd says. Once its claim is there the step may have run: from then on, only its
        files say what became of it."""
        for attempt in range(1, _CLAIMED_TRIES + 1):
            try:
                return await self._shepherd.start_step(step_dir)
            except Refused:
                raise
            except RunnerError:
                if not handles.is_claimed(step_dir) or attempt == _CLAIMED_TRIES:
                    if handles.is_claimed(step_dir):
                        return None
                    raise
        return None

    def _is_first_own(self, run: RunFile, step: int) -> bool:
        """Whether this is the first of the job's own steps behind a checkout.

        Only then its tree is walked as root: not once something of the job has run.
        """
        run_dir = self._run_dir(LeaseId.parse(run.lease))
        if step == 0 or run.uid is None:
            return False
        return not any(handles.is_claimed(run_dir / str(other.index)) for other in run.plan.steps if other.index != 0)

    # --- noticing ends ---

    def _watch(self, live: _Live) -> None:
        self._live[live.step_dir] = live
        live.is_starting = False
        if live.is_hinted or live.started_at is None:
            # Soon, never now: the caller must have the start before it is told of the end.
            asyncio.get_running_loop().call_soon(self._look, live)
        self._arm()

    def _arm(self) -> None:
        if self._timer is None and self._live:
            self._timer = asyncio.get_running_loop().call_later(POLL, self._look_at_all)

    def _look_at_all(self) -> None:
        self._timer = None
        for live in list(self._live.values()):
            self._look(live)
        self._arm()

    def _hinted(self, kind: HintKind, step_dir: Path | None) -> None:
        if step_dir is None:
            for live in list(self._live.values()):
                self._look(live)
        elif (found := self._live.get(step_dir)) is not None and (kind == "closed" or found.started_at is None):
            self._look(found)

    def _look(self, live: _Live) -> None:
        """Tells the step's end if its files have it, once."""
        if self._live.get(live.step_dir) is not live:
            return
        if live.is_starting:
            live.is_hinted = True
            return
        end = self._short_end(live) or self._end(live)
        if end is not None:
            self._tell_end(live, end)
        elif live.is_dead and live.question is None:
            live.question = asyncio.get_running_loop().create_task(self._ask_about(live))

    def _tell_end(self, live: _Live, end: StepEnd) -> None:
        if self._live.get(live.step_dir) is live:
            del self._live[live.step_dir]
            live.tell(end)

    async def _ask_about(self, live: _Live) -> None:
        """Its process is gone and its files don't say how: the shepherd may have that to write still (a full disk)."""
        try:
            with contextlib.suppress(RunnerError):  # it is asked again at the next look
                end = await self._end_of_unknown(live)
                if end is not None:
                    self._tell_end(live, end)
        finally:
            live.question = None

    def _end(self, live: _Live) -> StepEnd | None:
        """By its files alone; one that is damaged counts as not written, and ``closed`` by being there.

        That a file can't be read now (too many open files, say) says nothing, least of all that the step is over.
        """
        try:
            started, harm = _whole(handles.read_started, live.step_dir)
            # The order counts: the shepherd writes `exit` before `closed`, and reaps the process after `exit`. What is
            # looked at first here is what is written last, so that an exit can't slip through between two looks.
            is_closed = handles.is_closed(live.step_dir)
            closed, _ = _whole(handles.read_closed, live.step_dir)
            is_dead = started is not None and not self._lives(started)
            exit_, exit_harm = _whole(handles.read_exit, live.step_dir)
        except RunnerError:
            return None
        started_at = _moment(started.at) if started else None
        if exit_ is None:
            live.is_dead = is_dead
            if not is_closed:
                return None
            ended_at = _moment(closed.at) if closed else None
            why = exit_harm or harm or "its process is gone"
            return StepEnd(live.index, None, None, started_at, ended_at, cause="gone", error=why)
        if not is_closed:
            live.exited = live.exited if live.exited is not None else time.monotonic()
            rebooted = started is not None and started.boot_id != self._boot_id
            if not rebooted and time.monotonic() - live.exited < self._close_wait:
                return None
        return _end_of(live, started_at, exit_)

    def _short_end(self, live: _Live) -> StepEnd | None:
        """Of a step whose start was answered, and whose ``closed`` is there: how it ended, by its ``exit`` alone."""
        if live.started_at is None or not handles.is_closed(live.step_dir):
            return None
        try:
            exit_ = handles.read_exit(live.step_dir)
        except RunnerError:
            return None
        return None if exit_ is None else _end_of(live, live.started_at, exit_)

    async def _end_of_unknown(self, live: _Live) -> StepEnd | None:
        """Of a step that was claimed and has no ``exit``, and no process that is known to live: only the shepherd can
        know it."""
        started, harm = _whole(handles.read_started, live.step_dir)
        if handles.is_exited(live.step_dir) or (started is not None and self._lives(started)):
            return None
        known = (await self._shepherd.status()).get("live")
        if isinstance(known, list) and any(
            isinstance(entry, dict) and entry.get("dir") == str(live.step_dir) for entry in known
        ):
            return None
        # Between the two looks it may have started and ended.
        if (end := self._end(live)) is not None or handles.is_exited(live.step_dir):
            return end
        error = harm or ("its process is gone" if started else "it was claimed, but never started")
        started_at = _moment(started.at) if started else None
        return StepEnd(live.index, None, None, started_at, None, cause="gone", error=error)

    def _lives(self, started: Started) -> bool:
        """A pid is trusted only with its start time, in the same boot. A zombie counts: its exit is still to come."""
        if started.boot_id != self._boot_id:
            return False
        try:
            stat = Path(f"/proc/{started.pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
        except OSError:
            return True  # nobody knows, then
        start_time = int(stat[stat.rindex(b")") + 2 :].split()[19])
        return start_time == started.start_time

    def _started_at(self, step_dir: Path) -> datetime | None:
        """For people; a file that can't be read must not make a step that runs one that could not be started."""
        with contextlib.suppress(RunnerError):
            started, _ = _whole(handles.read_started, step_dir)
            if started is not None:
                return _moment(started.at)
            exit_, _ = _whole(handles.read_exit, step_dir)
            return _moment(exit_.at) if exit_ is not None else None
        return None

    # --- on disk ---

    async def _run(self, lease: LeaseId) -> RunFile | None:
        """What is being run under the lease; None if nothing was prepared. Raises RunnerError."""
        if (known := self._known.get(lease)) is not None:
            return known
        run_dir = self._run_dir(lease)
        if not handles.is_there(run_dir):
            return None
        run = await anyio.to_thread.run_sync(read_run, run_dir)
        if run is not None:
            self._known[lease] = run
        return run

    def _run_dir(self, lease: LeaseId) -> Path:
        return self._runs / str(lease)

    def _all_handles(self) -> list[LeaseId]:
        orphans = {
            lease
            for lease in self._leases_on_disk(self._work)
            if not os.path.lexists(self._work / str(lease) / host_disk.KEPT_MARK)
        }
        return sorted(orphans | set(self._leases_on_disk(self._runs)))

    @staticmethod
    def _leases_on_disk(directory: Path) -> list[LeaseId]:
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
        leases = []
        for name in names:
            with contextlib.suppress(ValueError):
                leases.append(LeaseId.parse(name))
        return leases


def _whole(read: Callable[[Path], F | None], step_dir: Path) -> tuple[F | None, str | None]:
    """What a file says, and what is wrong with it where it is damaged. Raises RunnerError when it can't be read now."""
    try:
        return read(step_dir), None
    except Damaged as damage:
        return None, str(damage)


def _end_of(live: _Live, started_at: datetime | None, exit_: Exit) -> StepEnd:
    error = exit_.error
    if live.checkout and exit_.exit_code and error is None:
        error = _checkout_error(live.step_dir)
    ended_at = _moment(exit_.at)
    return StepEnd(live.index, exit_.exit_code, exit_.signal, started_at, ended_at, cause=exit_.cause, error=error)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _checkout_error(step_dir: Path) -> str | None:
    with contextlib.suppress(OSError):
        return (step_dir / "error").read_text(encoding="utf-8", errors="replace")[:2000] or None
    return None
