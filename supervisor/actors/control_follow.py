"""The calls of the control socket that stay: Wait, Logs and Events. They outlast an outage of the database.

May import the seams, ``model``, ``protocol`` and the other ``control_`` modules. ``control_calls`` names them. They
look at the database at a rhythm (``Rhythm``); wake-ups only shorten it, so a lost one costs half a second.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import anyio

from supervisor.actors.control_connection import Replies
from supervisor.actors.control_parts import Parts, Rhythm
from supervisor.actors.control_peers import Peer
from supervisor.actors.control_views import STREAMS, exit_code, job_view, log_pieces, utc_fields
from supervisor.framing import CallTimeout
from supervisor.model.errors import InvalidInput, StoreUnavailable
from supervisor.model.job import AttemptRow, EventRow, JobRow, LogRecord, Outcome, State
from supervisor.model.spec import CHECKOUT
from supervisor.protocol import (
    EventsParams,
    EventsReply,
    JobReply,
    LogEnd,
    LogsParams,
    LogsReply,
    LogStream,
    WaitParams,
)

_PAGE = 500
_BY_NAME = {name: stream for stream, name in STREAMS.items()}


class Following:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._store = parts.store

    # --- Wait ---

    async def wait(self, asked: WaitParams, _peer: Peer) -> Replies:
        pending = list(dict.fromkeys(asked.ids))
        deadline = None if asked.timeout is None else anyio.current_time() + asked.timeout
        with Rhythm(self._parts.pace, self._store) as rhythm:
            while True:
                over = [row for row in await self._states(pending) if row.state.is_final]
                if over:
                    rhythm.changed()
                    now = self._parts.clock()
                    yield [JobReply(job=job_view(row, now)) for row in (over[:1] if asked.any else over)]
                    if asked.any:
                        return
                    ended = {row.id for row in over}
                    pending = [job for job in pending if job not in ended]
                if not pending:
                    return
                left = None if deadline is None else deadline - anyio.current_time()
                if left is not None and left <= 0:
                    names = ", ".join(map(str, pending[:20])) + (" …" if len(pending) > 20 else "")
                    raise CallTimeout(f"not over after {asked.timeout:g} s: {names}")
                await rhythm.pause(left)

    async def _states(self, jobs: list[int]) -> list[JobRow]:
        """[] while the database is away."""
        try:
            return await self._parts.read(self._store.states(jobs))
        except StoreUnavailable:
            return []

    async def _state(self, job: int) -> JobRow | None:
        """None while the database is away."""
        return next(iter(await self._states([job])), None)

    # --- Logs ---

    async def logs(self, asked: LogsParams, _peer: Peer) -> Replies:
        with Rhythm(self._parts.pace, self._store) as rhythm:
            attempt = await self._first_attempt(asked, rhythm)
            names = await self._step_names(asked.id)
            step = self._step_index(asked, names) if asked.step is not None else None
            offset = asked.offset
            while attempt is not None:
                reached = offset
                async with aclosing(self._records(asked, attempt, offset, step, rhythm)) as records:
                    async for record in records:
                        if record.step >= len(names) and not names:
                            names = await self._step_names(asked.id)
                        name = names[record.step] if record.step < len(names) else None
                        for piece in log_pieces(record, attempt, name):
                            yield LogsReply(record=piece)
                        reached = record.offset + len(record.data)
                row, ended = await self._attempt_end(asked, attempt, rhythm)
                yield LogsReply(end=_log_end(attempt, reached, row, ended))
                attempt = await self._next_attempt(asked, attempt, row, rhythm)
                offset = 0

    async def _first_attempt(self, asked: LogsParams, rhythm: Rhythm) -> int | None:
        """The attempt to begin with, with ``follow`` once it has begun; None: there is none, and none to wait for."""
        while True:
            row = await self._state(asked.id)
            if row is None:
                if asked.attempt is not None:
                    return asked.attempt  # Its log may be on this host; the reader says so if not.
                here = (await self._parts.running_or_none()).get(asked.id)
                if here is not None:
                    return here.attempt
                if not asked.follow:
                    raise StoreUnavailable(f"the database is away, and job {asked.id} does not run on this host")
            elif row.attempt >= (asked.attempt or 1):
                return asked.attempt or row.attempt
            elif not asked.follow or row.state.is_final:
                if asked.attempt is None:
                    return None
                raise InvalidInput(
                    "attempt",
                    f"job {asked.id} has had {row.attempt or 'none'} so far",
                    f"1 to {row.attempt}" if row.attempt else "",
                )
            await rhythm.pause()

    async def _step_names(self, job: int) -> list[str]:
        """By index, bsup's own checkout step included; [] while the database is away."""
        try:
            _, spec, _, _ = await self._parts.read(self._store.show(job))
        except StoreUnavailable:
            return []
        checkout = [CHECKOUT] if spec.get("repository") or spec.get("files") else []
        return checkout + [str(step["name"]) for step in spec.get("steps", ())]

    def _step_index(self, asked: LogsParams, names: list[str]) -> int:
        """A name goes before a number: steps may be called ``1``."""
        wanted = asked.step or ""
        if wanted in names:
            return names.index(wanted)
        if wanted.isascii() and wanted.isdigit() and (not names or int(wanted) < len(names)):
            return int(wanted)
        if not names:
            raise StoreUnavailable("the database is away: name the step by its number")
        raise InvalidInput("step", f"job {asked.id} has no step {wanted!r}", ", ".join(names))

    async def _records(
        self, asked: LogsParams, attempt: int, offset: int, step: int | None, rhythm: Rhythm
    ) -> AsyncGenerator[LogRecord, None]:
        """Goes on where it was after an outage, if it follows."""
        stream = None if asked.stream is None else _BY_NAME[LogStream(asked.stream)]
        while True:
            reading = self._parts.logs.read(
                asked.id, attempt, offset=offset, step=step, stream=stream, follow=asked.follow
            )
            try:
                async for record in reading:
                    offset = record.offset + len(record.data)
                    yield record
                return
            except StoreUnavailable:
                if not asked.follow:
                    raise
            finally:
                await _close(reading)
            await rhythm.pause()

    async def _attempt_end(
        self, asked: LogsParams, attempt: int, rhythm: Rhythm
    ) -> tuple[JobRow | None, AttemptRow | None]:
        """The job and the attempt once its log was read; with ``follow`` once the attempt's end is recorded."""
        while True:
            row = await self._state(asked.id)
            over = row is not None and (row.attempt > attempt or row.state is not State.RUNNING)
            if row is None and not asked.follow:
                return None, None
            if not asked.follow or over:
                try:
                    rows = await self._parts.read(self._store.attempts(asked.id))
                    return row, next((one for one in rows if one.attempt == attempt), None)
                except StoreUnavailable:
                    if not asked.follow:
                        return row, None
            await rhythm.pause()

    async def _next_attempt(self, asked: LogsParams, attempt: int, row: JobRow | None, rhythm: Rhythm) -> int | None:
        """The attempt after this one; None once the job is final, or if one attempt was asked for by its number."""
        if not asked.follow or asked.attempt is not None:
            return None
        while row is None or row.attempt <= attempt:
            if row is not None and row.state.is_final:
                return None
            await rhythm.pause()
            row = await self._state(asked.id)
        return attempt + 1

    # --- Events ---

    async def events(self, asked: EventsParams, _peer: Peer) -> Replies:
        after = asked.after
        if after is None:
            after = await self._parts.read(self._store.last_event()) if asked.follow else 0
        with Rhythm(self._parts.pace, self._store) as rhythm:
            while True:
                page = await self._events(after, asked.follow)
                if page:
                    after = page[-1].id
                    yield [EventsReply(event=utc_fields(row)) for row in page]
                if len(page) == _PAGE:
                    continue
                if not asked.follow:
                    return
                if page:
                    rhythm.changed()
                await rhythm.pause()

    async def _events(self, after: int, follow: bool) -> list[EventRow]:
        try:
            return await self._parts.read(self._store.events(after, _PAGE))
        except StoreUnavailable:
            if not follow:
                raise
            return []


def _log_end(attempt: int, reached: int, row: JobRow | None, ended: AttemptRow | None) -> LogEnd:
    outcome = ended.outcome if ended else None
    return LogEnd(
        attempt=attempt,
        next_offset=reached,
        outcome=outcome,
        exit_code=exit_code(ended.exit_code, ended.signal, ok=outcome is Outcome.SUCCEEDED) if ended else None,
        signal=ended.signal if ended else None,
        state=row.state if row else None,
    )


async def _close(reading: AsyncIterator[LogRecord]) -> None:
    """The port promises an iterator only; a generator holds a file or a connection until it is closed."""
    close = getattr(reading, "aclose", None)
    if close is not None:
        await close()
