"""Claims and completions: ``ports.DispatchStore``. Composed by ``pg``; on connections of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from supervisor import failpoints
from supervisor.model.errors import StoreUnavailable
from supervisor.model.job import AttemptEnd, Lease, LeaseId, Me, Outcome, StepRecord
from supervisor.ports import Need, Room, Verdict
from supervisor.store.connection import Link
from supervisor.store.place import START, Key, Place
from supervisor.store.rows import claimed, steps_json, steps_of_ends, storable, unix
from supervisor.store.sessions import refused

T = TypeVar("T")


class Dispatch:
    _dispatch: Link
    _place: Place
    _kinds: dict[int, str]

    async def needs(self, after: int) -> list[Need]:
        rows = await self._dispatch.rows("needs", after, reading=True)
        needs = [Need(row["id"], row["kind"], tuple(row["labels"])) for row in rows]
        self._kinds.update((need.id, need.kind) for need in needs)
        return needs

    async def claim(self, me: Me, first_counter: int, room: Room) -> list[Lease]:
        if room.slots <= 0 or not room.needs:
            return []
        key = self._place.begin((me.session, room.needs))
        leases, last = await self._claim(me, first_counter, room, key)
        if len(leases) == room.slots:
            self._place.filled(len(leases), last)
            return leases
        self._place.reset()
        if key != START:
            left = _left(room, leases)
            if left.slots > 0:
                more, _ = await self._claim(me, first_counter + len(leases), left, START)
                leases += more
        return leases

    async def _claim(self, me: Me, first_counter: int, room: Room, begin: Key) -> tuple[list[Lease], Key]:
        """The leases, and the key of the last one."""
        asked = self._dispatch.rows(
            "claim",
            me.session,
            me.incarnation,
            first_counter,
            room.slots,
            room.slots_total,
            room.cpu,
            room.memory,
            list(room.needs),
            *begin,
        )
        rows = await (failpoints.sent("claim-sent", asked) if failpoints.ARMED else asked)
        if not rows:
            raise refused()
        if rows[0]["counter"] is None:
            return [], START
        if not self._kinds.keys() >= {row["need_id"] for row in rows}:
            await self.needs(0)
        session, leased_at, kinds = me.session, rows[0]["leased_at"], self._kinds
        last = rows[-1]
        return [claimed(row, session, leased_at, kinds) for row in rows], (last["priority"], last["job_id"])

    async def set_idle(self, me: Me, idle: bool) -> None:
        if not await self._dispatch.rows("set_idle", me.session, me.incarnation, idle):
            raise refused()

    async def finish(self, me: Me, ends: Sequence[AttemptEnd]) -> list[Verdict]:
        """In the order of ``ends``. Of two ends of a lease the first counts. A lease of another session is refused."""
        mine = {end.lease: end for end in reversed(ends) if end.lease.session == me.session}
        verdicts, blocked = await self._finish(me, list(mine.values()), wait=False) if mine else ({}, [])
        # Those that someone else has locked. The others are recorded by now, whatever becomes of the wait.
        if blocked:
            more, blocked = await self._finish(me, blocked, wait=True)
            verdicts |= more
        if blocked:
            raise StoreUnavailable("finish: the database did not answer for every lease")
        if not verdicts and len(mine) == len(ends):
            return [Verdict(end.lease, True, end.outcome) for end in ends]
        return [verdicts.get(end.lease) or _as_told(end, end.lease in mine) for end in ends]

    async def _finish(
        self, me: Me, ends: list[AttemptEnd], *, wait: bool
    ) -> tuple[dict[LeaseId, Verdict], list[AttemptEnd]]:
        """Verdicts that differ from what was told, and the ends that are passed over."""
        asked = self._dispatch.rows(
            "finish",
            me.session,
            me.incarnation,
            [end.lease.counter for end in ends],
            [end.job for end in ends],
            [end.attempt for end in ends],
            _outcomes(ends),
            _sparse([end.exit_code for end in ends]),
            _sparse([end.signal for end in ends]),
            _texts([end.error for end in ends]),
            _texts([end.reason for end in ends]),
            _sparse([end.retry_delay for end in ends]),
            _sparse([unix(end.started_at) for end in ends]),
            _sparse([unix(end.ended_at) for end in ends]),
            steps_of_ends(ends) if any(end.steps for end in ends) else None,
            wait,
        )
        rows = await (failpoints.sent("record-sent", asked) if failpoints.ARMED else asked)
        if not rows:
            return {}, []
        by_counter = {end.lease.counter: end for end in ends}
        verdicts, blocked = {}, []
        for counter, recorded, state in rows:
            end = by_counter[counter]
            if recorded is None:
                blocked.append(end)
            else:
                verdicts[end.lease] = Verdict(end.lease, recorded, state)
        return verdicts, blocked

    async def supersede(self, ends: Sequence[AttemptEnd]) -> None:
        if not ends:
            return
        await self._dispatch.rows(
            "supersede",
            [end.lease.session for end in ends],
            [end.lease.counter for end in ends],
            [end.job for end in ends],
            [end.attempt for end in ends],
            [end.exit_code for end in ends],
            [end.signal for end in ends],
            [storable(end.error) for end in ends],
            [storable(end.reason) for end in ends],
            [end.started_at for end in ends],
            [end.ended_at for end in ends],
            steps_of_ends(ends),
        )

    async def record_steps(self, me: Me, steps: Sequence[tuple[LeaseId, StepRecord]]) -> None:
        mine = [(lease, step) for lease, step in steps if lease.session == me.session]
        if mine and not await self._dispatch.rows("record_steps", me.session, me.incarnation, steps_json(mine)):
            raise refused()


def _left(room: Room, leases: Sequence[Lease]) -> Room:
    """The room that these leave. One that runs alone leaves no slot."""
    slots = sum(max(room.slots_total, 1) if lease.alone else 1 for lease in leases)
    return msgspec.structs.replace(
        room,
        slots=room.slots - slots,
        cpu=None if room.cpu is None else room.cpu - sum(lease.cpu for lease in leases),
        memory=None if room.memory is None else room.memory - sum(lease.memory for lease in leases),
    )


def _as_told(end: AttemptEnd, mine: bool) -> Verdict:
    return Verdict(end.lease, True, end.outcome) if mine else Verdict(end.lease, False, "unknown")


def _outcomes(ends: Sequence[AttemptEnd]) -> list[Outcome] | None:
    """None: all succeeded."""
    outcomes = [end.outcome for end in ends]
    return None if outcomes.count(Outcome.SUCCEEDED) == len(outcomes) else outcomes


def _texts(texts: list[str | None]) -> list[str | None] | None:
    return None if texts.count(None) == len(texts) else [storable(text) for text in texts]


def _sparse(values: list[T | None]) -> list[T | None] | None:
    """None where there is no value at all: nothing to send, nothing to read."""
    return None if values.count(None) == len(values) else values
