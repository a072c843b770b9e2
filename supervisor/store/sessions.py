"""Sessions, their renewal, the pulse, the reaper and the sweeper: ``ports.SessionStore``. Composed by ``pg``."""

from __future__ import annotations

import uuid

from supervisor import failpoints
from supervisor.model.errors import SessionRefused, StoreUnavailable
from supervisor.model.job import HostInfo, Lease, LeaseId, Me
from supervisor.ports import Reaped, Renewal, SessionGrant, StopOrder
from supervisor.store.connection import Link
from supervisor.store.rows import lease_of


def refused() -> SessionRefused:
    return SessionRefused("the session is gone or held by another daemon")


class Sessions:
    """``_renewal`` is for what keeps a session alive; ``_upkeep`` for what may take long."""

    _renewal: Link
    _upkeep: Link

    async def open_session(self, host: HostInfo, term: float) -> SessionGrant:
        session, incarnation = uuid.uuid4().hex, uuid.uuid4().hex
        epoch = await self._renewal.value("open_session", session, incarnation, *_facts(host), term, list(host.kinds))
        return SessionGrant(Me(session, incarnation, epoch), term)

    async def resume_session(
        self, session: str, incarnation: str, host: HostInfo, term: float, next_incarnation: str
    ) -> SessionGrant | None:
        asked = self._renewal.value(
            "resume_session", session, incarnation, next_incarnation, *_facts(host), term, list(host.kinds)
        )
        epoch = await (failpoints.sent("resume-sent", asked) if failpoints.ARMED else asked)
        return None if epoch is None else SessionGrant(Me(session, next_incarnation, epoch), term)

    async def renew(self, me: Me, term: float, draining: bool) -> Renewal:
        rows = await self._renewal.rows("renew", me.session, me.incarnation, term, draining)
        if not rows:
            raise refused()
        row = rows[0]
        columns = (row["stop_counters"], row["stop_jobs"], row["stop_graces"], row["stop_kills"], row["stop_by"])
        stops = [
            StopOrder(LeaseId(me.session, counter), job, grace, kill, by)
            for counter, job, grace, kill, by in zip(*(column or () for column in columns), strict=True)
        ]
        return Renewal(row["count"], row["checksum"], stops)

    async def stop_orders(self, me: Me) -> list[StopOrder]:
        rows = await self._renewal.rows("stop_orders", me.session, me.incarnation, reading=True)
        if not rows:
            raise refused()
        return [
            StopOrder(
                LeaseId(me.session, row["counter"]), row["job_id"], row["stop_grace"], row["stop_kill"], row["stop_by"]
            )
            for row in rows
            if row["counter"] is not None
        ]

    async def leases(self, me: Me) -> list[Lease]:
        rows = await self._renewal.rows("leases", me.session, me.incarnation, reading=True)
        if not rows:
            raise refused()
        return [lease_of(row, me.session) for row in rows if row["counter"] is not None]

    async def close_session(self, me: Me) -> None:
        left = await self._renewal.value("close_session", me.session, me.incarnation)
        if left:
            raise StoreUnavailable(f"close_session: {left} leases are locked by others")

    async def pulse(self, term: float) -> bool:
        (row,) = await self._upkeep.rows("pulse", term)
        return bool(row["is_due"])

    async def reap(self, limit: int = 500) -> Reaped:
        (row,) = await self._upkeep.rows("reap", limit)
        return Reaped(
            requeued=row["requeued"],
            failed=row["failed"],
            sessions=[session.hex for session in row["sessions"]],
            promoted=row["promoted"],
            reap_not_before=row["reap_not_before"],
        )

    async def sweep(self, retention: float, limit: int = 500) -> int:
        return int(await self._upkeep.value("sweep", retention, limit))


def _facts(host: HostInfo) -> tuple[object, ...]:
    return (
        host.name,
        list(host.labels),
        host.slots,
        host.cpu,
        host.memory,
        host.version,
        host.machine_id,
        host.boot_id,
        host.pid,
    )
