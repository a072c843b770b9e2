"""The actor of one running job: one a lease, from the claim to the clean-up. It decides nothing itself.

``model.attempt.advance`` decides; this actor performs its effects through the ports and feeds what happened back as
events. What may take time runs as a task of its own, so that the mailbox is always read: a stop, a beat or a status
never waits for a runner that hangs. Adapters' callbacks and timers only ever ``tell`` the mailbox.

It is kept cheap (a host may have ten thousand): one task, one mailbox, asyncio's own TaskGroup (anyio's costs several
times as much to start a task in). A bare cancel, which is how the dispatcher replaces a stalled one, is safe here: the
mailbox loses nothing by it, and the attempt lives on disk.

May import the seams and model. Made by the root's factory, owned by the dispatcher.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from random import Random
from typing import Any, TypeVarTuple, Unpack, assert_never

import msgspec

from supervisor.mailbox import Ask, Mailbox, Told
from supervisor.messages import Beat, DispatcherMessage, JobAlive, JobMessage, JobMoved, JobOver, JobStart
from supervisor.model.attempt import AttemptState, Stage, advance
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
    Result,
    StartFailed,
    StartStep,
    StepEnd,
    StepEnded,
    StepStarted,
    StopOverdue,
    StopRun,
    Tell,
)
from supervisor.model.errors import BsupError, InvalidInput, StoreUnavailable
from supervisor.model.job import AttemptEnd, Lease, Outcome, StepRecord
from supervisor.model.policies import decide_retry, patience
from supervisor.model.redaction import SecretSet, secret_values
from supervisor.ports import LogSink, Runner

log = logging.getLogger("supervisor.job")
Ts = TypeVarTuple("Ts")

STOP_PATIENCE = 5.0
"""Seconds beyond the grace after which a stop that brought no end is repeated as a kill."""

LOG_TRIES = 3
"""How often completing a log is tried when it raises what nobody foresaw; then the end is told without the rest of
it."""

_TEXT_CAP = 4000


class _RetrySpec(msgspec.Struct, frozen=True):
    """All that this actor needs of a spec, whatever its kind."""

    backoff: float = 10.0


class JobActor:
    """See the module. ``grace``: the host's default seconds between SIGTERM and SIGKILL."""

    __slots__ = (
        "_adopting",
        "_dispatcher",
        "_effects",
        "_grace",
        "_log_open",
        "_notes",
        "_preparing",
        "_rng",
        "_runner",
        "_sink",
        "_start_mode",
        "_state",
        "_tasks",
        "_timers",
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
        self.mailbox: Mailbox[JobMessage] = Mailbox(f"job {lease.job}", control=64, data=64)
        self._start_mode = start
        self._runner = runner
        self._sink = sink
        self._dispatcher = dispatcher
        self._grace = grace
        self._rng = rng
        self._state = AttemptState()
        self._adopting = False
        self._log_open = False
        self._tasks: asyncio.TaskGroup | None = None
        self._effects: set[asyncio.Task[None]] = set()
        self._notes: list[asyncio.Task[None]] = []
        self._preparing: asyncio.Task[None] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}

    async def run(self) -> None:
        """Until the attempt is over and cleaned up. Canceled, it leaves what it has on disk for the actor after it."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._begin()
                async for item in self.mailbox:
                    if isinstance(item, Ask):
                        item.fail(BsupError("a job's actor is not asked, it is told"))
                    elif isinstance(item, Beat):
                        self._dispatcher.tell(JobAlive(self.lease.id))
                    else:
                        self._feed(item)
                    if self._state.stage is Stage.OVER:
                        break
                # Only stops of what has ended meanwhile, or looks at it, can be under way still.
                for task in self._effects:
                    task.cancel()
        finally:
            self.mailbox.close()
            for timer in self._timers.values():
                timer.cancel()
            self._tasks = None

    # --- events in, effects out -------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._adopting = self._start_mode.adopt
        self._preparing = self._spawn(self._adopt if self._adopting else self._prepare)
        if self._start_mode.doom is not None:
            self._feed(self._start_mode.doom)
        else:
            self._report(None)

    def _feed(self, event: Event) -> None:
        before = self._state
        self._state, effects = advance(before, event)
        reported = False
        for effect in effects:
            reported |= isinstance(effect, Report)
            self._perform(effect)
        after = self._state
        if not reported and (
            before.phase is not after.phase or before.current != after.current or before.is_alive is not after.is_alive
        ):
            self._report(None)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case StartStep(index):
                self._spawn(self._start_step, index)
            case StopRun(grace, kill):
                self._spawn(self._stop_run, grace, kill)
                self._arm("overdue", (0.0 if kill else grace) + STOP_PATIENCE, StopOverdue())
            case Inspect(index):
                self._spawn(self._inspect, index)
            case AbandonPrepare():
                self._abandon_prepare()
            case Report(step):
                self._report(step)
            case ArmTimeout(seconds):
                self._arm("timeout", seconds, JobTimedOut(self._grace))
            case LogStepStarted(index):
                self._sink.step_started(self.lease.id, index)
            case LogStepEnded(index):
                self._sink.step_ended(self.lease.id, index)
            case Note(index, text):
                if self._log_open:
                    self._notes.append(self._spawn(self._note, index, text))
            case CompleteLog():
                self._spawn(self._complete_log)
            case Tell(result, superseded):
                self._tell(JobOver(self._end_of(result, superseded), superseded))
            case CleanUp():
                self._spawn(self._clean_up)
            case _:
                assert_never(effect)

    def _tell_self(self, event: Event) -> None:
        """For adapters' callbacks and effects: never lost, unless the actor is over."""
        if self.mailbox.tell(event) is Told.FULL:
            asyncio.get_running_loop().call_later(0.1, self._tell_self, event)

    def _tell(self, message: JobOver | JobMoved) -> None:
        """To the dispatcher, which is one for all jobs: its data lane may be full for a moment."""
        if self._dispatcher.tell(message) is Told.FULL:
            asyncio.get_running_loop().call_later(0.1, self._tell, message)

    def _arm(self, name: str, seconds: float, event: Event) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, self._tell_self, event)

    def _report(self, step: StepRecord | None) -> None:
        state = self._state
        current = state.current
        # A copy: the record told is the dispatcher's from now on.
        told = None if step is None else msgspec.structs.replace(step, error=self._words(step.error))
        self._tell(
            JobMoved(
                lease=self.lease.id,
                phase=state.phase,
                alive=state.is_alive,
                stop_asked=state.cause != 0,
                current=None if current is None else state.steps[current].index,
                current_name=None if current is None else state.steps[current].name,
                steps_total=len(state.steps),
                started_at=state.started_at,
                step=told,
            )
        )

    def _end_of(self, result: Result, superseded: bool) -> AttemptEnd:
        retry: float | None = None
        if result.outcome is Outcome.FAILED:
            retry = decide_retry(
                failures=self.lease.failures,
                attempts=self.lease.attempts,
                backoff=self._backoff(),
                rng=self._rng,
                may_retry=result.may_retry,
            ).delay
        return AttemptEnd(
            lease=self.lease.id,
            job=self.lease.job,
            attempt=self.lease.attempt,
            outcome=Outcome.SUPERSEDED if superseded else result.outcome,
            exit_code=result.exit_code,
            signal=result.signal,
            error=self._words(result.error),
            reason=result.reason,
            retry_delay=retry,
            started_at=result.started_at,
            ended_at=result.ended_at or datetime.now(UTC),
            steps=[msgspec.structs.replace(step, error=self._words(step.error)) for step in result.steps],
        )

    def _backoff(self) -> float:
        try:
            return msgspec.json.decode(self.lease.spec, type=_RetrySpec).backoff
        except msgspec.MsgspecError:
            return _RetrySpec().backoff

    def _words(self, text: str | None) -> str | None:
        """A text fit to leave this actor: redacted, without NULs, of bounded length."""
        if text is None:
            return None
        if self._log_open:
            text = self._sink.redact(self.lease.id, text)
        else:
            text = SecretSet(secret_values(self.lease.secrets, self.lease.redact, {})).text(text)
        text = text.replace("\0", "\\0")
        return text if len(text) <= _TEXT_CAP else text[: _TEXT_CAP - 1] + "…"

    # --- effects that take time -------------------------------------------------------------------------------

    def _spawn(self, work: Callable[[Unpack[Ts]], Coroutine[Any, Any, None]], *args: *Ts) -> asyncio.Task[None]:
        assert self._tasks is not None
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

    async def _prepare(self) -> None:
        try:
            plan = await self._runner.prepare(self.lease)
            await self._open_log(plan)
        except InvalidInput as error:
            self._tell_self(PrepareFailed(str(error), invalid=True))
        except asyncio.CancelledError:
            # Canceled by ``_abandon_prepare``, or with the whole actor: then nobody reads this.
            self._tell_self(PrepareFailed("the preparation did not end in time and was given up"))
            raise
        except Exception as error:
            if not isinstance(error, BsupError):
                log.exception("job %s: the preparation crashed", self.lease.job)
            self._tell_self(PrepareFailed(str(error) or type(error).__name__))
        else:
            self._tell_self(Prepared(plan))

    async def _open_log(self, plan: Plan) -> None:
        """A database that is away is no reason to fail a job: nothing runs yet, so it waits."""
        tries = 0
        while not self._log_open:
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
                    self._tell_self(NothingToAdopt())
                    return
                plan = await self._runner.prepare(self.lease)
                await self._open_log(plan)
            except Exception as error:
                tries += 1
                log.warning("job %s: could not be taken up, trying again: %s", self.lease.job, error)
                await asyncio.sleep(patience(tries, self._rng))
            else:
                begun = min((step.started_at for step in taken if step.started_at is not None), default=None)
                elapsed = 0.0 if begun is None else max(0.0, (datetime.now(UTC) - begun).total_seconds())
                self._tell_self(Adopted(plan, tuple(taken), elapsed, self._start_mode.rebooted))
                return

    def _on_step_end(self, end: StepEnd) -> None:
        self._tell_self(StepEnded(end))

    async def _start_step(self, index: int) -> None:
        try:
            at = await self._runner.start(self.lease.id, index, self._on_step_end)
        except Exception as error:
            if not isinstance(error, BsupError):
                log.exception("job %s: starting a step crashed", self.lease.job)
            self._tell_self(StartFailed(index, str(error) or type(error).__name__))
        else:
            self._tell_self(StepStarted(index, at))

    async def _stop_run(self, grace: float, kill: bool) -> None:
        try:
            await self._runner.stop(self.lease.id, grace, kill)
        except BsupError as error:
            # The timer armed beside this repeats it.
            log.warning("job %s: the stop did not reach its processes: %s", self.lease.job, error)

    async def _inspect(self, index: int) -> None:
        try:
            taken = await self._runner.adopt(self.lease.id, self._on_step_end)
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

    async def _clean_up(self) -> None:
        """What is left behind here is found again as a handle without a lease, by the next reconciliation."""
        try:
            if self._log_open:
                await self._sink.close(self.lease.id)
            await self._runner.discard(self.lease.id)
        except Exception:
            log.exception("job %s: its remains could not be removed", self.lease.job)
        self._tell_self(CleanedUp())
