"""Claims and completions: ``ports.DispatchStore``. Composed by ``pg``; on connections of its own."""

from __future__ import annotations

from collections.abc import Sequence

from supervisor.model.errors import StoreUnavailable
from supervisor.model.job import AttemptEnd, Lease, LeaseId, Me, StepRecord
from supervisor.ports import Need, Room, Verdict
from supervisor.store.connection import Link
from supervisor.store.rows import lease_of, steps_json, steps_of_ends, storable
from supervisor.store.sessions import refused


class Dispatch:
    _dispatch: Link

    async def needs(self, after: int) -> list[Need]:
        rows = await self._dispatch.rows("needs", after, reading=True)
        return [Need(row["id"], row["kind"], tuple(row["labels"])) for row in rows]

    async def claim(self, me: Me, first_counter: int, room: Room) -> list[Lease]:
        if room.slots <= 0 or not room.needs:
            return []
        rows = await self._dispatch.rows(
            "claim",
            me.session,
            me.incarnation,
            first_counter,
            room.slots,
            room.slots_total,
            room.cpu,
            room.memory,
            list(room.needs),
        )
        if not rows:
            raise refused()
        return [lease_of(row) for row in rows if row["counter"] is not None]

    async def set_idle(self, me: Me, idle: bool) -> None:
        if not await self._dispatch.rows("set_idle", me.session, me.incarnation, idle):
            raise refused()

    async def finish(self, me: Me, ends: Sequence[AttemptEnd]) -> list[Verdict]:
        """In the order of ``ends``. Of two ends of a lease the first counts. A lease of another session is refused."""
        mine = {end.lease: end for end in reversed(ends) if end.lease.session == me.session}
        verdicts = await self._finish(me, list(mine.values()), wait=False) if mine else {}
        # Those that someone else has locked. The others are recorded by now, whatever becomes of the wait.
        blocked = [end for lease, end in mine.items() if lease not in verdicts]
        if blocked:
            verdicts |= await self._finish(me, blocked, wait=True)
        if len(verdicts) < len(mine):
            raise StoreUnavailable("finish: the database did not answer for every lease")
        return [verdicts.get(end.lease) or Verdict(end.lease, False, "unknown") for end in ends]

    async def _finish(self, me: Me, ends: list[AttemptEnd], *, wait: bool) -> dict[LeaseId, Verdict]:
        rows = await self._dispatch.rows(
            "finish",
            me.session,
            me.incarnation,
            [end.lease.counter for end in ends],
            [end.job for end in ends],
            [end.attempt for end in ends],
            [end.outcome.value for end in ends],
            [end.exit_code for end in ends],
            [end.signal for end in ends],
            [storable(end.error) for end in ends],
            [storable(end.reason) for end in ends],
            [end.retry_delay for end in ends],
            [end.started_at for end in ends],
            [end.ended_at for end in ends],
            steps_of_ends(ends),
            wait,
        )
        return {
            lease: Verdict(lease, row["recorded"], row["state"])
            for row in rows
            if row["recorded"] is not None
            for lease in (LeaseId(me.session, row["counter"]),)
        }

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
