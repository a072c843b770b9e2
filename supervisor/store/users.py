"""What users ask: ``ports.UserStore``. Composed by ``pg``; on connections of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from supervisor.model.errors import InvalidInput, UnknownJob
from supervisor.model.job import FINAL_STATES, AttemptRow, EventRow, Filter, HostRow, JobLine, JobRow, State, StepRecord
from supervisor.ports import StopResult
from supervisor.store.connection import Link
from supervisor.store.rows import Row, attempt_of, job_of, line_of, step_of

T = TypeVar("T")

FIRST_PAGE = 200
AFTER_ALL_IDS = MOST_JOBS = 2**63 - 1


class Users:
    _users: Link

    async def submit(self, spec: dict[str, Any], *, key: str | None, after: Sequence[int], submitter: str) -> int:
        """The job's id. Raises InvalidInput (the spec, the key, an unknown parent)."""
        text = msgspec.json.encode(spec).decode()
        return int(await self._users.value("submit", text, key, list(after), submitter))

    async def submit_many(
        self, specs: Sequence[dict[str, Any] | msgspec.Raw], *, key: str | None, submitter: str
    ) -> list[int]:
        """Their ids, in order; at most 100,000. Raises InvalidInput, which names the job (``jobs[17].priority``)."""
        try:
            text = msgspec.json.encode(specs).decode()
        except UnicodeDecodeError as error:
            raise InvalidInput("jobs", f"is not UTF-8 text: {error.reason}") from None
        return list(await self._users.value("submit_many", text, key, submitter))

    def list_jobs(self, where: Filter) -> AsyncIterator[list[JobRow]]:
        return self._pages("list_jobs", job_of, where, 1000)

    def list_lines(self, where: Filter) -> AsyncIterator[list[JobLine]]:
        return self._pages("list_lines", line_of, where, 2000)

    async def _pages(
        self, statement: str, made_of: Callable[[Row], T], where: Filter, most: int
    ) -> AsyncGenerator[list[T], None]:
        """Newest first, ``most`` to a page: no connection is held while the caller works on one."""
        needs: list[int] | None = None
        if where.kinds or where.labels:
            needs = await self._users.value("matching_needs", list(where.kinds), list(where.labels), reading=True)
            if not needs:
                return
        states = set(where.states) or ({*State} if where.all else {*State} - FINAL_STATES)
        otherwise = [state.value for state in states & {State.FAILED, State.CANCELED}]
        which = (
            needs,
            State.WAITING in states,
            State.READY in states,
            State.RUNNING in states,
            State.SUCCEEDED in states,
            bool(otherwise),
            otherwise,
        )

        def ask(before: int, size: int) -> asyncio.Task[Sequence[Row]]:
            return asyncio.create_task(self._users.rows(statement, before, size, *which, reading=True))

        left = MOST_JOBS if where.limit is None else where.limit
        size = min(FIRST_PAGE, left)
        ahead = ask(AFTER_ALL_IDS, size) if left > 0 else None
        try:
            while ahead is not None:
                rows = await ahead
                left -= len(rows)
                # A page is full or the last; jobs that moved meanwhile can't make it shorter, as it is one statement.
                # The server makes the next one while the caller works on this one.
                is_last = len(rows) < size or left <= 0
                size = min(most, left)
                ahead = None if is_last else ask(rows[-1]["id"], size)
                if rows:
                    yield [made_of(row) for row in rows]
        finally:
            if ahead is not None:
                ahead.cancel()

    async def show(self, job: int) -> tuple[JobRow, dict[str, Any], list[int], list[int]]:
        (row,) = await self.states([job])
        found = await self._users.rows("show", job, reading=True)
        if not found:
            raise UnknownJob(job)
        spec: dict[str, Any] = msgspec.json.decode(found[0]["spec"])
        return row, spec, list(found[0]["parents"]), list(found[0]["children"])

    async def attempts(self, job: int) -> list[AttemptRow]:
        """In order, the running one last. Raises UnknownJob."""
        rows = await self._users.rows("attempts", job, reading=True)
        if not rows:
            raise UnknownJob(job)
        steps: dict[int, list[StepRecord]] = {}
        for row in await self._users.rows("steps", job, reading=True):
            steps.setdefault(row["attempt"], []).append(step_of(row))
        return [attempt_of(row, steps.get(row["attempt"], [])) for row in rows if row["attempt"] is not None]

    async def states(self, jobs: Sequence[int]) -> list[JobRow]:
        """In the order of ``jobs``."""
        rows = await self._users.rows("job_rows", list(jobs), reading=True) if jobs else []
        found = {row["id"]: job_of(row) for row in rows}
        for job in jobs:
            if job not in found:
                raise UnknownJob(job)
        return [found[job] for job in jobs]

    async def stop(self, jobs: Sequence[int], *, grace: float | None, kill: bool, by: str) -> list[StopResult]:
        """In the order of the ids. All or, if one is unknown, none."""
        rows = await self._users.rows("stop", list(jobs), grace, kill, by)
        return [StopResult(row["job_id"], row["did"], row["is_over"]) for row in rows]

    async def retry(self, jobs: Sequence[int], *, by: str) -> list[JobRow]:
        """All or none. Raises UnknownJob, WrongState."""
        await self._users.rows("retry", list(jobs), by)
        return await self.states(list(dict.fromkeys(jobs)))

    async def delete(self, jobs: Sequence[int], *, by: str) -> int:
        """All or none; how many. Raises UnknownJob, WrongState."""
        return int(await self._users.value("delete", list(jobs), by))

    async def hosts(self) -> list[HostRow]:
        return [
            HostRow(
                name=row["host"],
                session=row["id"].hex,
                version=row["version"],
                labels=list(row["labels"]),
                slots=row["slots"],
                leases=row["leases"],
                state=row["state"],
                started_at=row["started_at"],
                renewed_at=row["renewed_at"],
                expires_at=row["expires_at"],
            )
            for row in await self._users.rows("hosts", reading=True)
        ]

    async def events(self, after: int, limit: int = 500) -> list[EventRow]:
        return [
            EventRow(
                id=row["id"],
                at=row["at"],
                job=row["job_id"],
                type=row["type"],
                detail=msgspec.json.decode(row["detail"]),
            )
            for row in await self._users.rows("events", after, limit, reading=True)
        ]

    async def last_event(self) -> int:
        return int(await self._users.value("last_event", reading=True))
