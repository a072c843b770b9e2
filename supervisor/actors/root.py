"""The root: starts every other actor, supervises them, and ends the daemon as it was told to.

Order: control first (the socket answers whatever else is in trouble), then the logs, the dispatcher, the keeper
(which gains the session, writes the fence and has the dispatcher reconcile), the reaper. READY is said once host and
database agree; or, where the database is away for longer than a service manager would wait, with a status that says so.

How it ends: *drain* takes no new jobs, lets the running ones end within the deadline, releases the rest, closes the
session. *Detach* renews once more and goes; the jobs stay with the shepherd for the next daemon. Told again while it
drains, it stops the jobs (they are released); a third time it kills them.

May import the seams, model and the other actors: it alone. ``app`` calls ``run_root`` and turns signals into messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol, assert_never

import anyio
import msgspec

from supervisor.actors.dispatcher import Dispatcher
from supervisor.actors.job import JobActor
from supervisor.actors.keeper import Keeper, Terms
from supervisor.actors.reaper import Reaper
from supervisor.actors.supervision import Child, Escalated, Supervisor
from supervisor.mailbox import ActorGone, Ask, Lane, Mailbox
from supervisor.messages import (
    ActorInfo,
    AskActors,
    AskCloseSession,
    AskDetach,
    AskLastRenewal,
    AskStatus,
    DispatcherMessage,
    Drain,
    Drained,
    JobStart,
    KeeperMessage,
    ReaperMessage,
    Reconciled,
    Reconfigure,
    ReleaseAll,
    ReloadAsked,
    RootMessage,
    Status,
    Terminate,
)
from supervisor.model.errors import BsupError, Busy
from supervisor.model.job import HostInfo, Lease
from supervisor.ports import Fence, HostRoom, LogSink, Notifier, Reload, Runner, SessionFile, Store

log = logging.getLogger("supervisor.root")

READY_PATIENCE = 20.0
"""Seconds after which READY is said without the database."""

DETACH_PATIENCE = 5.0
"""Seconds beyond the grace that in-process jobs get to end, and their ends to be recorded, before a daemon leaves."""

UNRECORDED_PATIENCE = 30.0
"""Seconds beyond drain and grace that ends may wait for the database; then the daemon goes, and the next one records
them."""


class RootConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Durations in seconds. ``drain``: how long running jobs get; ``retention`` None: finished jobs are kept for
    ever."""

    host: HostInfo
    limits: Reconfigure
    terms: Terms
    drain: float | None
    retention: float | None = None
    reap_every: float = 1.0
    stall_after: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """The mailboxes of the core actors. ``app`` makes them, so that signals, control and the reload can reach them."""

    root: Mailbox[RootMessage] = field(default_factory=lambda: Mailbox("root"))
    # Every running job tells the dispatcher of each step and beat: room for thousands of them at once.
    dispatcher: Mailbox[DispatcherMessage] = field(
        default_factory=lambda: Mailbox("dispatcher", control=4096, data=65536)
    )
    keeper: Mailbox[KeeperMessage] = field(default_factory=lambda: Mailbox("keeper"))
    reaper: Mailbox[ReaperMessage] = field(default_factory=lambda: Mailbox("reaper"))

    def by_name(self) -> Mapping[str, Mailbox[Any]]:
        return {"root": self.root, "dispatcher": self.dispatcher, "keeper": self.keeper, "reaper": self.reaper}


class Runs(Protocol):
    """An actor that the root does not know by class (control)."""

    async def run(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The adapters. ``control`` builds a control actor that is ready to run, anew for each restart."""

    store: Store
    session_file: SessionFile
    fence: Fence
    runners: Mapping[str, Runner]
    sink: LogSink
    notifier: Notifier
    control: Callable[[], Runs]
    reload: Reload
    room: HostRoom | None = None
    rng: Random = field(default_factory=Random)


async def run_root(config: RootConfig, parts: Parts, addresses: Addresses) -> int:
    """Runs the daemon until it is told to end; the exit code: 0, or 1 where an actor failed for good."""
    return await Root(config, parts, addresses).run()


class Root:
    """See ``run_root``."""

    def __init__(self, config: RootConfig, parts: Parts, addresses: Addresses) -> None:
        self._config = config
        self._limits = config.limits
        self._parts = parts
        self._at = addresses
        self._terminations = 0
        self._ready = False
        self._draining = False
        self._tasks: anyio.abc.TaskGroup | None = None
        self._leaving = False
        self._over = anyio.Event()
        self._supervisor = Supervisor(self._children(), parts.rng)

    def _children(self) -> list[Child]:
        return [
            Child("control", lambda: self._parts.control().run),
            Child("logs", lambda: self._parts.sink.run),
            Child("dispatcher", lambda: self._dispatcher().run, self._at.dispatcher),
            Child("keeper", lambda: self._keeper().run, self._at.keeper),
            Child("reaper", lambda: self._reaper().run, self._at.reaper),
        ]

    async def run(self) -> int:
        code = 0
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                self._supervisor.start(tasks)
                tasks.start_soon(self._read_mailbox)
                tasks.start_soon(self._ready_in_any_case)
                await self._over.wait()
                self._parts.notifier.stopping()
                await self._supervisor.stop()
                tasks.cancel_scope.cancel()
        except* Escalated as group:
            for error in group.exceptions:
                log.critical("the daemon ends: %s; its jobs go on", error)
            code = 1
        finally:
            self._at.root.close()
        return code

    # --- the actors -------------------------------------------------------------------------------------------

    def _dispatcher(self) -> Dispatcher:
        return Dispatcher(
            self._at.dispatcher,
            store=self._parts.store,
            runners=self._parts.runners,
            make_job=self._make_job,
            keeper=self._at.keeper,
            root=self._at.root,
            host=self._limits,
            room=self._parts.room,
            paused=self._draining,
            stall_after=self._config.stall_after,
            rng=self._parts.rng,
        )

    def _make_job(self, lease: Lease, start: JobStart) -> JobActor:
        return JobActor(
            lease,
            start,
            runner=self._parts.runners[lease.kind],
            sink=self._parts.sink,
            dispatcher=self._at.dispatcher,
            grace=self._limits.grace,
            rng=self._parts.rng,
        )

    def _keeper(self) -> Keeper:
        return Keeper(
            self._at.keeper,
            store=self._parts.store,
            file=self._parts.session_file,
            fence=self._parts.fence,
            dispatcher=self._at.dispatcher,
            host=self._host,
            terms=self._config.terms,
            rng=self._parts.rng,
        )

    def _reaper(self) -> Reaper:
        return Reaper(
            self._at.reaper,
            store=self._parts.store,
            dispatcher=self._at.dispatcher,
            runners=list(self._parts.runners.values()),
            term=self._config.terms.term,
            every=self._config.reap_every,
            retention=self._config.retention,
            rng=self._parts.rng,
        )

    def _host(self) -> HostInfo:
        capacity = self._limits.capacity
        return msgspec.structs.replace(
            self._config.host,
            labels=self._limits.labels,
            slots=capacity.slots,
            cpu=capacity.cpu,
            memory=capacity.memory,
        )

    # --- the mailbox ------------------------------------------------------------------------------------------

    async def _read_mailbox(self) -> None:
        async for item in self._at.root:
            if isinstance(item, Ask):
                self._spawn(self._answer, item)
            else:
                self._handle(item)

    def _handle(self, message: RootMessage) -> None:
        match message:
            case Terminate(detach):
                self._terminate(detach)
            case ReloadAsked():
                self._spawn(self._reload)
            case Reconciled():
                log.info("host and database agree: jobs are claimed")
                self._say_ready("")
            case Drained(clean):
                if self._draining and not self._leaving:
                    self._leaving = True
                    self._spawn(self._leave_empty, clean)
            case Reconfigure():
                self._limits = message
                self._at.dispatcher.tell(message, Lane.CONTROL)
            case _:
                assert_never(message)

    async def _answer(self, ask: Ask[Any]) -> None:
        match ask.request:
            case AskActors():
                ask.answer([self._info(), *self._supervisor.infos(), *await self._job_infos()])
            case AskStatus():
                ending = "draining, then it ends" if self._draining else "running"
                crashed = [info for info in self._supervisor.infos() if info.restarts]
                ask.answer(
                    Status(
                        facts={
                            "state": ending,
                            "restarts": sum(info.restarts for info in crashed),
                            "log_backlog": self._parts.sink.backlog,
                        },
                        problems=[
                            *self._parts.sink.problems(),
                            *(
                                f"{info.name} crashed and was restarted ({info.restarts} times): see the daemon's log"
                                for info in crashed
                            ),
                        ],
                    )
                )
            case _:
                ask.fail(BsupError(f"the root does not answer {type(ask.request).__name__}"))

    async def _job_infos(self) -> list[ActorInfo]:
        try:
            return await self._at.dispatcher.ask(AskActors(), 0.5)
        except (Busy, ActorGone, TimeoutError):
            return []

    def _info(self) -> ActorInfo:
        stats = self._at.root.stats()
        state = "draining" if self._draining else "running"
        return ActorInfo(name="root", state=state, restarts=0, **msgspec.structs.asdict(stats))

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        assert self._tasks is not None
        self._tasks.start_soon(work, *args)

    # --- ready and reload -------------------------------------------------------------------------------------

    async def _ready_in_any_case(self) -> None:
        await anyio.sleep(READY_PATIENCE)
        if not self._ready:
            log.warning("the database has not answered yet; the socket does")
            self._say_ready("waiting for the database")

    def _say_ready(self, status: str) -> None:
        if not self._ready:
            self._ready = True
            self._parts.notifier.ready()
        self._parts.notifier.status(status or f"running as {self._config.host.name}")

    async def _reload(self) -> None:
        self._parts.notifier.reloading()
        try:
            changed = await self._parts.reload()
        except BsupError as error:
            log.error("the configuration was not reloaded, the one before stays: %s", error)
        else:
            log.info("configuration reloaded, changed: %s", ", ".join(changed) or "nothing")
        self._parts.notifier.ready()

    # --- the end ----------------------------------------------------------------------------------------------

    def _terminate(self, detach: bool) -> None:
        self._terminations += 1
        if self._terminations > 1:
            kill = self._terminations > 2
            log.warning("told to end once more: running jobs are %s", "killed" if kill else "stopped")
            self._at.dispatcher.tell(ReleaseAll(kill), Lane.CONTROL)
        elif detach:
            self._spawn(self._detach)
        else:
            log.info("draining: no new jobs; running ones get %s", _limit(self._config.drain))
            self._parts.notifier.status("draining")
            self._draining = True
            self._at.dispatcher.tell(Drain(self._config.drain), Lane.CONTROL)
            self._spawn(self._give_up_draining)

    async def _detach(self) -> None:
        log.info("detaching: running jobs stay for the next daemon")
        self._parts.notifier.status("detaching")
        try:
            await self._at.dispatcher.ask(AskDetach(), self._limits.grace + DETACH_PATIENCE)
        except (Busy, ActorGone, TimeoutError):
            log.warning("in-process jobs did not end in time: they are lost with this daemon, and run again")
        try:
            renewed = await self._at.keeper.ask(AskLastRenewal(), 5.0)
        except (Busy, ActorGone, TimeoutError):
            renewed = False
        if not renewed:
            log.warning("the last renewal failed: the jobs go on until the fence of the one before")
        self._over.set()

    async def _leave_empty(self, clean: bool) -> None:
        """The session is closed only where host and database agreed that nothing runs: closing releases what it still
        holds."""
        if clean:
            try:
                await self._at.keeper.ask(AskCloseSession(), 5.0)
            except (Busy, ActorGone, TimeoutError):
                log.warning("the session could not be closed, it expires")
        self._over.set()

    async def _give_up_draining(self) -> None:
        """When the jobs have ended and the database does not take their ends: they are on disk, the next daemon tells
        them."""
        if self._config.drain is None:
            return
        await asyncio.sleep(self._config.drain + self._limits.grace + UNRECORDED_PATIENCE)
        log.warning("draining did not come to an end: what is left stays for the next daemon")
        await self._detach()


def _limit(seconds: float | None) -> str:
    return "all the time they need" if seconds is None else f"{seconds:g} s"
