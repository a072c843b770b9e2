"""The calls of the control socket that answer at once. Those that stay (Wait, Logs, Events) are in ``control_follow``.

May import the seams, ``model``, ``protocol`` and the other ``control_`` modules. Each call is an async generator of its
replies, run by a connection, which ends it when the peer goes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final, TypeVar

import anyio
import msgspec

from supervisor import __version__
from supervisor.actors.control_connection import Handler, Replies
from supervisor.actors.control_follow import Following
from supervisor.actors.control_parts import Parts
from supervisor.actors.control_peers import Peer
from supervisor.actors.control_views import (
    attempt_view,
    job_view,
    line_view,
    local_line,
    local_view,
    selects,
    utc_fields,
)
from supervisor.mailbox import ActorGone
from supervisor.messages import AskActors, AskDrain, AskResume, AskStatus, AskStop, RunningJob, Status
from supervisor.model import spec as job_spec
from supervisor.model.errors import Busy, StoreUnavailable
from supervisor.model.job import Filter, State
from supervisor.ports import StopResult
from supervisor.protocol import (
    INTERFACE,
    SHOWN_ATTEMPTS,
    ActorsParams,
    ActorsReply,
    ActorView,
    AttemptsParams,
    AttemptsReply,
    BriefReply,
    DatabaseView,
    DeleteParams,
    DeleteReply,
    DrainParams,
    DrainReply,
    HostsParams,
    HostsReply,
    JobReply,
    ListParams,
    ListReply,
    ReloadParams,
    ReloadReply,
    ResumeParams,
    ResumeReply,
    RetryParams,
    ShowParams,
    ShowReply,
    SocketView,
    StatusParams,
    StatusReply,
    StatusView,
    StopParams,
    StopReply,
    SubmitManyParams,
    SubmitManyReply,
    SubmitParams,
    SubmitReply,
    VersionParams,
    VersionReply,
)

T = TypeVar("T")

_AT_ONCE: Final = 200
"""Jobs of a page that are made ready to go out at a time: others get the loop between."""

AWAY = "the database is away: only jobs that run on this host are shown"


class Calls:
    """``socket``: what the actor knows of its own socket, for Status."""

    def __init__(self, parts: Parts, socket: Callable[[], SocketView]) -> None:
        self._parts = parts
        self._store = parts.store
        self._socket = socket
        self._started_at = parts.clock()

    def handlers(self) -> Mapping[str, Handler]:
        """The call of each name in ``METHODS``."""
        following = Following(self._parts)
        return {
            "Submit": self.submit,
            "SubmitMany": self.submit_many,
            "List": self.list_jobs,
            "Show": self.show,
            "Attempts": self.attempts,
            "Logs": following.logs,
            "Wait": following.wait,
            "Stop": self.stop,
            "Retry": self.retry,
            "Delete": self.delete,
            "Status": self.status,
            "Hosts": self.hosts,
            "Drain": self.drain,
            "Resume": self.resume,
            "Reload": self.reload,
            "Events": following.events,
            "Actors": self.actors,
            "Version": self.version,
        }

    # --- jobs ---

    async def submit(self, asked: SubmitParams, peer: Peer) -> Replies:
        spec = job_spec.normalize(asked.spec)
        job = await self._parts.write(
            self._store.submit(spec, key=asked.key, after=_unique(asked.after), submitter=peer.user)
        )
        yield SubmitReply(id=job)

    async def submit_many(self, asked: SubmitManyParams, peer: Peer) -> Replies:
        # As they came: thousands are checked where they are stored, not on this loop.
        ids = await self._parts.write(self._store.submit_many(asked.jobs, key=asked.key, submitter=peer.user))
        yield SubmitManyReply(ids=ids)

    async def list_jobs(self, asked: ListParams, _peer: Peer) -> Replies:
        where = Filter(
            states=tuple(asked.states),
            kinds=tuple(asked.kinds),
            labels=tuple(asked.labels),
            all=asked.all,
            limit=asked.limit,
        )
        running = await self._parts.running_or_none()
        listed = self._lines(where, running) if asked.brief else self._jobs(where, running)
        told = False
        try:
            async with aclosing(listed):
                async for replies in listed:
                    yield replies
                    told = True
        except StoreUnavailable:
            if told:
                raise
            yield self._partial(where, running, brief=asked.brief)

    async def _jobs(self, where: Filter, running: Mapping[int, RunningJob]) -> AsyncGenerator[list[ListReply], None]:
        async with aclosing(self._pages(self._store.list_jobs(where))) as pages:
            async for page in pages:
                now = self._parts.clock()
                yield [ListReply(job_view(row, now, running.get(row.id))) for row in page]

    async def _lines(self, where: Filter, running: Mapping[int, RunningJob]) -> AsyncGenerator[list[BriefReply], None]:
        async with aclosing(self._pages(self._store.list_lines(where))) as pages:
            async for page in pages:
                yield [BriefReply(line_view(row, running.get(row.id))) for row in page]

    async def _pages(self, pages: AsyncIterator[list[T]]) -> AsyncGenerator[list[T], None]:
        """The store's pages, each in pieces that don't hold up the loop."""
        try:
            while (page := await self._parts.read(_next(pages))) is not None:
                for at in range(0, len(page), _AT_ONCE):
                    yield page[at : at + _AT_ONCE]
        finally:
            await _close(pages)

    def _partial(self, where: Filter, running: Mapping[int, RunningJob], *, brief: bool) -> Sequence[msgspec.Struct]:
        """What can be told without the database; the notice comes first, so an empty list is not taken for true."""
        notice = AWAY + ("; their labels are not known" if where.labels else "")
        local = [job for job in sorted(running.values(), key=lambda job: job.job) if selects(where, job)][: where.limit]
        host, now = self._parts.host, self._parts.clock()
        if brief:
            lines = [BriefReply(local_line(job, host, now), partial=True) for job in local]
            return [BriefReply(partial=True, notice=notice), *lines]
        views = [ListReply(local_view(job, host, now), partial=True) for job in local]
        return [ListReply(partial=True, notice=notice), *views]

    async def show(self, asked: ShowParams, _peer: Peer) -> Replies:
        running = await self._parts.running_or_none()
        row, spec, parents, children = await self._parts.read(self._store.show(asked.id))
        attempts = await self._parts.read(self._store.attempts(asked.id))
        now = self._parts.clock()
        yield ShowReply(
            job=job_view(row, now, running.get(row.id)),
            spec=spec,
            parents=parents,
            children=children,
            attempts=[attempt_view(one, now) for one in attempts[-SHOWN_ATTEMPTS:]],
        )

    async def attempts(self, asked: AttemptsParams, _peer: Peer) -> Replies:
        for row in await self._parts.read(self._store.attempts(asked.id)):
            yield AttemptsReply(attempt=attempt_view(row, self._parts.clock()))

    async def stop(self, asked: StopParams, peer: Peer) -> Replies:
        jobs = _unique(asked.ids)
        running = await self._parts.running_or_none()
        if elsewhere := [job for job in jobs if job not in running]:
            # Without the database an id that does not exist can't be told from one of another host.
            with suppress(StoreUnavailable):
                await self._parts.read(self._store.states(elsewhere))
        # A peer that goes now must not leave a job stopped here of which the database does not know why.
        with anyio.CancelScope(shield=True):
            found, results = await self._stop(jobs, asked, peer)
        yield [_stopped(job, job in found, results) for job in jobs]
        if results is None and (missed := [job for job in jobs if job not in found]):
            names = ", ".join(map(str, missed))
            raise StoreUnavailable(f"the database is away, and these jobs do not run on this host: {names}")

    async def _stop(
        self, jobs: Sequence[int], asked: StopParams, peer: Peer
    ) -> tuple[set[int], dict[int, StopResult] | None]:
        """Here first, as that works without the database; then everywhere. Without it the second is None."""
        order = AskStop(tuple(jobs), asked.grace, asked.kill, peer.user)
        try:
            found = set(await self._parts.ask("dispatcher", order))
        except (Busy, ActorGone):
            found = set()  # Its jobs are told through the database, at the next renewal.
        asking = self._store.stop(jobs, grace=asked.grace, kill=asked.kill, by=peer.user)
        # All of it was done already where all run here: a database that hangs gets less time to hear of it.
        wait_for = self._parts.read if found.issuperset(jobs) else self._parts.write
        try:
            results = await wait_for(asking)
        except StoreUnavailable:
            return found, None
        return found, {result.job: result for result in results}

    async def retry(self, asked: RetryParams, peer: Peer) -> Replies:
        # The store checks all before it touches one, in the same transaction: a check here could only be out of date.
        for row in await self._parts.write(self._store.retry(_unique(asked.ids), by=peer.user)):
            yield JobReply(job=job_view(row, self._parts.clock()))

    async def delete(self, asked: DeleteParams, peer: Peer) -> Replies:
        yield DeleteReply(deleted=await self._parts.write(self._store.delete(_unique(asked.ids), by=peer.user)))

    # --- the host ---

    async def status(self, _asked: StatusParams, _peer: Peer) -> Replies:
        answers: dict[str, Status | str] = {}
        running: dict[int, RunningJob] | None = None

        async def ask(name: str) -> None:
            try:
                answers[name] = await self._parts.ask(name, AskStatus())
            except (Busy, ActorGone) as error:
                answers[name] = str(error)

        async def count() -> None:
            nonlocal running
            try:
                running = await self._parts.running()
            except (Busy, ActorGone):
                running = None

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            for name in self._parts.mailboxes:
                tasks.start_soon(ask, name)
        yield StatusReply(status=self._status(answers, None if running is None else len(running)))

    def _status(self, answers: Mapping[str, Status | str], running: int | None) -> StatusView:
        health = self._store.health()
        now = self._parts.clock()
        problems = [] if health.available else [_away(health.error)]
        facts: dict[str, dict[str, Any]] = {}
        for name in self._parts.mailboxes:
            match answers[name]:
                case Status(facts=said, problems=found):
                    facts[name] = said
                    problems += found
                case str(silence):
                    problems.append(f"{silence}: see the daemon's log")
        return StatusView(
            ok=not problems,
            problems=list(dict.fromkeys(problems)),
            host=self._parts.host,
            version=__version__,
            pid=os.getpid(),
            started_at=self._started_at,
            uptime=round((now - self._started_at).total_seconds(), 3),
            running=running,
            database=DatabaseView(**{name: getattr(health, name) for name in DatabaseView.__struct_fields__}),
            isolation=self._parts.isolation(),
            socket=self._socket(),
            actors=facts,
        )

    async def hosts(self, _asked: HostsParams, _peer: Peer) -> Replies:
        for row in await self._parts.read(self._store.hosts()):
            yield HostsReply(host=utc_fields(row))

    async def drain(self, asked: DrainParams, _peer: Peer) -> Replies:
        await self._parts.ask("dispatcher", AskDrain(asked.deadline))
        running = len(await self._parts.running())
        while asked.wait and running and await self._is_draining():
            await anyio.sleep(self._parts.pace.quick)
            # Busy for once is no reason to tell the one who waits that the drain failed.
            with suppress(Busy):
                running = len(await self._parts.running())
        yield DrainReply(running=running)

    async def _is_draining(self) -> bool:
        """Whether nobody resumed meanwhile: the one who waits would wait for ever."""
        try:
            status: Status = await self._parts.ask("dispatcher", AskStatus())
        except Busy:
            return True
        return status.facts.get("draining") is not False

    async def resume(self, _asked: ResumeParams, _peer: Peer) -> Replies:
        await self._parts.ask("dispatcher", AskResume())
        yield ResumeReply()

    async def reload(self, _asked: ReloadParams, _peer: Peer) -> Replies:
        yield ReloadReply(changed=await self._parts.reload())

    async def actors(self, _asked: ActorsParams, _peer: Peer) -> Replies:
        infos = await self._parts.ask("root", AskActors())
        yield [ActorsReply(actor=ActorView(**msgspec.structs.asdict(info))) for info in infos]

    async def version(self, _asked: VersionParams, _peer: Peer) -> Replies:
        yield VersionReply(version=__version__, interface=INTERFACE, python=platform.python_version())


def _away(error: str | None) -> str:
    cause = f" ({error})" if error else ""
    return f"the database is away{cause}: running jobs go on, no new ones are taken, ends are recorded when it is back"


def _unique(ids: list[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def _stopped(job: int, is_here: bool, results: Mapping[int, StopResult] | None) -> StopReply:
    if results is None:
        return StopReply(id=job, did="stopping" if is_here else "unavailable", recorded=False)
    result = results.get(job) or StopResult(job, "stopping")
    # A job that was told here may have ended by that before the database heard of the stop.
    was_over = result.is_over and not (is_here and result.did == State.CANCELED)
    return StopReply(id=job, did=result.did, is_over=was_over)


async def _next(pages: AsyncIterator[list[T]]) -> list[T] | None:
    return await anext(pages, None)


async def _close(pages: AsyncIterator[list[T]]) -> None:
    """The port promises an iterator only; a generator holds a connection until it is closed."""
    close = getattr(pages, "aclose", None)
    if close is not None:
        await close()
