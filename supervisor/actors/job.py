"""The actor of one running job: one a lease, from the claim to the clean-up. It decides nothing itself.

``model.attempt.advance`` decides; this actor performs its effects through the ports and feeds what happened back as
events. What may take time runs as a task of its own, so that the mailbox is always read: a stop, a beat or a status
never waits for a runner that hangs. Adapters' callbacks and timers only ever ``tell`` the mailbox.

It is kept cheap (a host may have ten thousand): a mailbox that is served, no task, and what a short attempt never needs
is never made. What a runner answers at once is fed in the same turn. One that is abandoned in the middle, as the
dispatcher does with a stalled one, harms nothing: the attempt lives on disk, and in the runner.

May import the seams and model. Made by the root's factory, owned by the dispatcher.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from random import Random
from typing import Any, TypeVarTuple, Unpack, assert_never

from supervisor import failpoints
from supervisor.actors.job_words import end_of, fit_to_leave, moved_of, success_of
from supervisor.actors.ledger import Owner
from supervisor.mailbox import Ask, Mailbox, Told
from supervisor.messages import Beat, DispatcherMessage, JobAlive, JobMessage, JobMoved, JobOver, JobStart
from supervisor.model.attempt import advance
from supervisor.model.attempt_state import AttemptState, Stage, begun, succeeded
from supervisor.model.attempt_words import (
    AbandonPrepare,
    Adopted,
    ArmTimeout,
    CleanedUp,
    CleanUp,
    CompleteLog,
    Crashed,
    Effect,
    Event,
    Inspect,
    JobTimedOut,
    LogCompleted,
    LogStepEnded,
    LogStepStarted,
    Note,
    NothingToAdopt,
    Plan,
    Prepared,
    PrepareFailed,
    Report,
    StartFailed,
    StartStep,
    StepEnd,
    StepEnded,
    StepStarted,
    StopOverdue,
    StopRun,
    Tell,
)
from supervisor.model.errors import BsupError, HandleLost, InvalidInput, StoreUnavailable
from supervisor.model.job import Lease, Phase, StepRecord
from supervisor.model.policies import patience
from supervisor.ports import LogSink, Runner, answered

log = logging.getLogger("supervisor.job")
Ts = TypeVarTuple("Ts")

STOP_PATIENCE = 5.0
"""Seconds beyond the grace after which a stop that brought no end is repeated as a kill."""

_UNBEGUN = AttemptState()
# A member of an enum takes several times as long to read as a global.
_OVER = Stage.OVER
_FULL = Told.FULL
_RUNNING = Phase.RUNNING

LOG_TRIES = 3
"""How often completing a log is tried when it raises what nobody foresaw; then the end is told without the rest of
it."""


class JobActor:
    """See the module. ``grace``: the host's default seconds between SIGTERM and SIGKILL."""

    __slots__ = (
        "_adopting",
        "_beginning",
        "_dispatcher",
        "_effects",
        "_end_told",
        "_events",
        "_feeding",
        "_grace",
        "_log_open",
        "_moved",
        "_notes",
        "_on_over",
        "_preparing",
        "_rng",
        "_runner",
        "_sink",
        "_start_mode",
        "_state",
        "_tasks",
        "_timers",
        "_told",
        "lease",
        "mailbox",
    )

    def __init__(
        self,
        lease: Lease,
        start: JobStart,
        *,
        runner: Runner,
        sink: LogSink,
        dispatcher: Mailbox[DispatcherMessage],
        grace: float,
        rng: Random,
    ) -> None:
        self.lease = lease
        self.mailbox: Mailbox[JobMessage] = Mailbox("a job's actor", control=64, data=64)
        self._start_mode = start
        self._runner = runner
        self._sink = sink
        self._dispatcher = dispatcher
        self._grace = grace
        self._rng = rng
        self._state = _UNBEGUN
        self._adopting = start.adopt
        self._log_open = False
        self._tasks: asyncio.TaskGroup | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._on_over: Callable[[Exception | None], None] | None = None
        self._beginning = True
        self._feeding = False
        self._end_told = False
        # Made when they are needed: most attempts of a short job never need them.
        self._events: deque[Event] | None = None
        self._effects: set[asyncio.Task[None]] | None = None
        self._notes: list[asyncio.Task[None]] | None = None
        self._timers: dict[str, asyncio.TimerHandle] | None = None
        self._moved: list[StepRecord] | None = None
        """Records to report at the end of this turn."""
        self._told: tuple[Phase, bool, int | None] | None = None
        """What the dispatcher knows: the phase, whether it is alive, the current step."""

    def begin(self, owner: Owner, on_over: Callable[[Exception | None], None]) -> bool:
        """Sets to work; whether the job runs already, which is then not told. ``on_over`` is called, once, when the
        attempt is over and cleaned up, or with the error of an actor that crashed."""
        self._tasks = owner.tasks
        self._on_over = on_over
        self.mailbox.serve(self._receive, owner.turns)
        try:
            if self._adopting:
                self._preparing = self._spawn(self._adopt)
                if self._start_mode.doom is not None:
                    self._feed(self._start_mode.doom)
            else:
                self._prepare()
        except Exception as error:
            self._leave(error)
        self._beginning = False
        return self._told is not None

    def abandon(self) -> None:
        """Ends the actor where it stands; what the attempt has on disk is left for the actor after it."""
        self.mailbox.close()
        # At the end of an attempt: only stops of what has ended meanwhile, or looks at it, can be under way still.
        if self._effects:
            for task in self._effects:
                task.cancel()
        if self._timers:
            for timer in self._timers.values():
                timer.cancel()
        self._tasks = self._on_over = None

    # --- events in, effects out -------------------------------------------------------------------------------

    def _receive(self, item: JobMessage | Ask[Any]) -> None:
        try:
            if isinstance(item, StepEnded) and (told := succeeded(self._state, item.end)) is not None:
                self._state = told
                self._end_told = True
                self._tell(JobOver(success_of(self.lease, told, item.end), False))
            elif isinstance(item, Ask):
                item.fail(BsupError("a job's actor is not asked, it is told"))
            elif isinstance(item, Beat):
                self._dispatcher.tell(JobAlive(self.lease.id))
            else:
                self._feed(item)
        except Exception as error:
            self._leave(error)
            return
        if self._state.stage is _OVER:
            self._leave(None)

    def _leave(self, error: Exception | None) -> None:
        on_over = self._on_over
        self.abandon()
        if on_over is not None:
            on_over(error)

    def _feed(self, event: Event) -> None:
        """One turn: the event, and those that its effects gave at once, in order; then the dispatcher is told."""
        if self._feeding:
            if self._events is None:
                self._events = deque()
            self._events.append(event)
            return
        self._feeding = True
        try:
            while True:
                self._state, effects = advance(self._state, event)
                for effect in effects:
                    self._perform(effect)
                if not self._events:
                    break
                event = self._events.popleft()
        finally:
            self._feeding = False
        # An end tells all that a report would.
        if self._end_told:
            return
        standing = (self._state.phase, self._state.is_alive, self._state.current)
        if self._beginning and not self._moved and standing[0] is _RUNNING:
            self._told = standing
        elif self._moved or self._told != standing:
            self._told = standing
            self._report()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case StartStep(index):
                self._on_start_answer(index, self._asked_to_start(index))
            case Tell(result, superseded):
                self._end_told = True
                end = end_of(self.lease, result, superseded, words=self._words, rng=self._rng)
                self._tell(JobOver(end, superseded))
            case CleanUp():
                self._clean_up()
            case Report(step):
                self._moved = [*(self._moved or ()), step]
            case LogStepStarted(index):
                self._sink.step_started(self.lease.id, index)
            case LogStepEnded(index):
                self._sink.step_ended(self.lease.id, index)
            case CompleteLog():
                self._spawn(self._complete_log)
            case ArmTimeout(seconds):
                self._arm("timeout", seconds, JobTimedOut(self._grace))
            case StopRun(grace, kill):
                self._spawn(self._stop_run, grace, kill)
                self._arm("overdue", (0.0 if kill else grace) + STOP_PATIENCE, StopOverdue())
            case Inspect(index):
                self._spawn(self._inspect, index)
            case AbandonPrepare():
                self._abandon_prepare()
            case Note(index, text):
                if self._log_open:
                    self._notes = [*(self._notes or ()), self._spawn(self._note, index, text)]
            case _:
                assert_never(effect)

    def _tell_self(self, event: Event) -> None:
        """For adapters' callbacks and effects: never lost, unless the actor is over."""
        if self.mailbox.tell(event) is _FULL:
            asyncio.get_running_loop().call_later(0.1, self._tell_self, event)

    def _tell(self, message: JobOver | JobMoved) -> None:
        """To the dispatcher, which is one for all jobs: its data lane may be full for a moment."""
        if self._dispatcher.tell(message) is _FULL:
            asyncio.get_running_loop().call_later(0.1, self._tell, message)

    def _arm(self, name: str, seconds: float, event: Event) -> None:
        if self._timers is None:
            self._timers = {}
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, self._tell_self, event)

    def _report(self) -> None:
        moved, self._moved = self._moved, None
        self._tell(moved_of(self.lease, self._state, moved or (), words=self._words))

    def _words(self, text: str) -> str:
        return fit_to_leave(self.lease, text, self._sink, log_open=self._log_open)

    # --- effects that take time -------------------------------------------------------------------------------

    def _spawn(self, work: Callable[[Unpack[Ts]], Coroutine[Any, Any, None]], *args: *Ts) -> asyncio.Task[None]:
        assert self._tasks is not None
        if self._effects is None:
            self._effects = set()
        task = self._tasks.create_task(self._guarded(work, *args))
        self._effects.add(task)
        task.add_done_callback(self._effects.discard)
        return task

    async def _guarded(self, work: Callable[[Unpack[Ts]], Coroutine[Any, Any, None]], *args: *Ts) -> None:
        """An effect that raises what nobody foresaw ends this attempt, not the daemon."""
        try:
            await work(*args)
        except Exception as error:
            log.exception("job %s: an effect crashed", self.lease.job)
            self._tell_self(Crashed(f"{type(error).__name__}: {error}"))

    def _prepare(self) -> None:
        try:
            plan = self._runner.prepare(self.lease)
        except Exception as error:
            self._feed(self._not_prepared(error))
            return
        if not isinstance(plan, Plan) or not plan.in_process:
            self._preparing = self._spawn(self._finish_preparing, plan)
        elif plan.timeout is not None:
            self._feed(Prepared(plan))
        else:
            at = self._asked_to_start(plan.steps[0].index)
            if isinstance(at, datetime):
                self._state = begun(plan, at)
                self._told = (_RUNNING, True, self._state.current)
            else:
                self._state, _ = advance(self._state, Prepared(plan))  # whose effect was the start
                self._on_start_answer(plan.steps[0].index, at)

    async def _finish_preparing(self, asked: Plan | Awaitable[Plan]) -> None:
        try:
            plan = await answered(asked)
            await self._open_log(plan)
        except asyncio.CancelledError:
            # Canceled by ``_abandon_prepare``, or with the whole actor: then nobody reads this.
            self._tell_self(PrepareFailed("the preparation did not end in time and was given up"))
            raise
        except Exception as error:
            self._tell_self(self._not_prepared(error))
        else:
            self._tell_self(Prepared(plan))

    def _not_prepared(self, error: Exception) -> PrepareFailed:
        if isinstance(error, InvalidInput):
            return PrepareFailed(str(error), invalid=True)
        if not isinstance(error, BsupError):
            log.exception("job %s: the preparation crashed", self.lease.job, exc_info=error)
        return PrepareFailed(str(error) or type(error).__name__)

    async def _open_log(self, plan: Plan) -> None:
        """A database that is away is no reason to fail a job: nothing runs yet, so it waits."""
        tries = 0
        while not self._log_open and not plan.in_process:
            try:
                await self._sink.open(self.lease, plan)
                self._log_open = True
            except StoreUnavailable as error:
                tries += 1
                log.warning("job %s: its log can't be opened, trying again: %s", self.lease.job, error)
                await asyncio.sleep(patience(tries, self._rng))

    async def _adopt(self) -> None:
        """Nothing may be given up here: a step may be running. So it is tried until it works."""
        tries = 0
        while True:
            try:
                taken = await self._runner.adopt(self.lease.id, self._on_step_end)
                if taken is None:
                    self._tell_self(NothingToAdopt(self._start_mode.rebooted))
                    return
                plan = await answered(self._runner.prepare(self.lease))
                await self._open_log(plan)
            except HandleLost as error:
                self._tell_self(NothingToAdopt(lost=str(error)))
                return
            except Exception as error:
                tries += 1
                log.warning("job %s: could not be taken up, trying again: %s", self.lease.job, error)
                await asyncio.sleep(patience(tries, self._rng))
            else:
                elapsed = max((step.age for step in taken if step.age is not None), default=0.0)
                self._tell_self(Adopted(plan, tuple(taken), elapsed, self._start_mode.rebooted))
                return

    def _on_step_end(self, end: StepEnd) -> None:
        if failpoints.ARMED:
            failpoints.hit("exited")
        self._tell_self(StepEnded(end))

    def _asked_to_start(self, index: int) -> datetime | Awaitable[datetime] | Exception:
        if failpoints.ARMED:
            failpoints.hit("prepared")
        try:
            return self._runner.start(self.lease.id, index, self._on_step_end)
        except Exception as error:
            return error

    def _on_start_answer(self, index: int, at: datetime | Awaitable[datetime] | Exception) -> None:
        if isinstance(at, datetime):
            self._feed(StepStarted(index, at))
        elif isinstance(at, Exception):
            self._feed(self._not_started(index, at))
        else:
            self._spawn(self._finish_starting, index, at)

    async def _finish_starting(self, index: int, asked: Awaitable[datetime]) -> None:
        try:
            at = await asked
        except Exception as error:
            self._tell_self(self._not_started(index, error))
        else:
            self._tell_self(StepStarted(index, at))

    def _not_started(self, index: int, error: Exception) -> StartFailed:
        if not isinstance(error, BsupError):
            log.exception("job %s: starting a step crashed", self.lease.job, exc_info=error)
        return StartFailed(index, str(error) or type(error).__name__)

    async def _stop_run(self, grace: float, kill: bool) -> None:
        try:
            await self._runner.stop(self.lease.id, grace, kill)
        except BsupError as error:
            # The timer armed beside this repeats it.
            log.warning("job %s: the stop did not reach its processes: %s", self.lease.job, error)

    async def _inspect(self, index: int) -> None:
        try:
            # It is answered behind the start, however late that was: what is not there then will never be.
            await self._runner.stop(self.lease.id, 0.0, True)
            taken = await self._runner.adopt(self.lease.id, self._on_step_end)
        except HandleLost as error:
            self._on_step_end(StepEnd(index, None, None, None, datetime.now(UTC), "gone", str(error)))
            return
        except BsupError as error:
            log.warning("job %s: step %s can't be looked at: %s", self.lease.job, index, error)
            return
        for step in taken or ():
            if step.index == index:
                if step.end is not None:
                    self._on_step_end(step.end)
                return
        self._on_step_end(StepEnd(index, None, None, None, datetime.now(UTC), "exec"))

    def _abandon_prepare(self) -> None:
        if self._adopting:
            self._perform(StopRun(0.0, True))
        elif self._preparing is not None:
            self._preparing.cancel()

    async def _note(self, index: int, text: str) -> None:
        try:
            await self._sink.note(self.lease.id, index, text)
        except BsupError as error:
            log.warning("job %s: a note was not written: %s", self.lease.job, error)

    async def _complete_log(self) -> None:
        if self._notes:
            await asyncio.wait(self._notes)
        tries = 0
        while self._log_open:
            try:
                await self._sink.complete(self.lease.id)
                break
            except Exception:
                tries += 1
                log.exception("job %s: its log could not be completed (try %s)", self.lease.job, tries)
                if tries >= LOG_TRIES:
                    break
                await asyncio.sleep(patience(tries, self._rng))
        self._tell_self(LogCompleted())

    def _clean_up(self) -> None:
        """What is left behind here is found again as a handle without a lease, by the next reconciliation."""
        if self._log_open:
            self._spawn(self._finish_cleaning, None)
            return
        try:
            removing = self._runner.discard(self.lease.id)
        except Exception:
            log.exception("job %s: its remains could not be removed", self.lease.job)
            removing = None
        if removing is not None:
            self._spawn(self._finish_cleaning, removing)
        elif self._state.stage is not _OVER:
            self._feed(CleanedUp())

    async def _finish_cleaning(self, removing: Awaitable[None] | None) -> None:
        try:
            if self._log_open:
                await self._sink.close(self.lease.id)
            if removing is None:
                removing = self._runner.discard(self.lease.id)
            if removing is not None:
                await removing
        except Exception:
            log.exception("job %s: its remains could not be removed", self.lease.job)
        self._tell_self(CleanedUp())
