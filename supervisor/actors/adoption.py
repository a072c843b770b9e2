"""Reconciliation: on the host and in the database the same jobs run. Compared both ways, at start and after.

``compare`` is the decision, a pure function over what was seen; ``Burial`` ends the work of a handle whose lease is
gone.

What is found, and what follows:

| in the database | on disk | an actor | then |
|---|---|---|---|
| yes | yes | no | the attempt is taken up |
| yes | no | no | claimed, never begun (the claim's answer was lost): released, uncounted; after a boot, a loss |
| no | – | yes | the lease is gone: its work is ended, what it had is kept as superseded |
| no | yes | no | the same, with no actor to ask: buried |

The database is read between two looks at the ledger, and no claim runs meanwhile; ends may. So a lease counts as known
if either look saw it, and as gone only if both did and its end was not under way; and only at the second time in a row.
"The query failed" is an exception, and never says anything about a lease.

Part of the dispatcher, which alone calls it. May import the seams and model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from random import Random

import msgspec

from supervisor.model.errors import BsupError, HandleLost
from supervisor.model.job import AttemptEnd, Lease, LeaseId, Outcome, StepRecord, StepState
from supervisor.model.policies import patience
from supervisor.ports import HandleInfo, Runner, StepEnd, StepTaken, answered

log = logging.getLogger("supervisor.dispatcher")

BURIAL_PATIENCE = 5.0
"""Seconds after which the kill of an orphan is repeated."""


class Findings(msgspec.Struct, frozen=True):
    """What a reconciliation found. ``missing``: held here, not in the database (gone at the second time in a row)."""

    adopt: tuple[Lease, ...]
    release: tuple[Lease, ...]
    missing: frozenset[LeaseId]
    orphans: tuple[LeaseId, ...]

    @property
    def is_clean(self) -> bool:
        return not (self.adopt or self.release or self.missing or self.orphans)


def compare(
    *,
    rows: Sequence[Lease],
    handles: Collection[LeaseId],
    before: Collection[LeaseId],
    after: Collection[LeaseId],
    expected: Collection[LeaseId],
    ending: Collection[LeaseId],
) -> Findings:
    """``rows``: the database's leases of this session; ``handles``: what is on disk; ``before`` and ``after``: leases
    with an actor (or being buried) at the two looks; ``expected``: those at both looks that should be in the database;
    ``ending``: those whose end was under way at either."""
    known = {*before, *after}
    in_database = {row.id for row in rows}
    unknown = [row for row in rows if row.id not in known]
    return Findings(
        adopt=tuple(row for row in unknown if row.id in handles),
        release=tuple(row for row in unknown if row.id not in handles),
        missing=frozenset(lease for lease in expected if lease not in in_database and lease not in ending),
        orphans=tuple(sorted(lease for lease in handles if lease not in known and lease not in in_database)),
    )


def release_of(lease: Lease) -> AttemptEnd:
    """The end of a lease that never began."""
    return AttemptEnd(
        lease=lease.id,
        job=lease.job,
        attempt=lease.attempt,
        outcome=Outcome.RELEASED,
        reason="orphan",
        error="released: it was claimed, and never begun",
        ended_at=datetime.now(UTC),
    )


def loss_of(lease: Lease) -> AttemptEnd:
    """The end of a lease of another boot of which nothing is on disk: its files were written, and not synced."""
    return AttemptEnd(
        lease=lease.id,
        job=lease.job,
        attempt=lease.attempt,
        outcome=Outcome.LOST,
        reason="gone",
        error="the machine was booted meanwhile",
        ended_at=datetime.now(UTC),
    )


class Burial:
    """The work of a handle without a lease: killed, its end told as superseded (where it says whose it is), removed.

    Its log is kept as far as it was stored: without the lease there are no secrets to redact the rest with.
    """

    def __init__(self, lease: LeaseId, runner: Runner, rng: Random) -> None:
        self.lease = lease
        self.alive = True
        self._runner = runner
        self._rng = rng
        self._ends: dict[int, StepEnd] = {}
        self._ended = asyncio.Event()

    async def kill(self) -> AttemptEnd | None:
        """Returns once nothing of it runs; the end to keep, None where the handle does not say whose it is."""
        taken = await self._stopped()
        self.alive = False
        info = await self._described()
        return None if info is None else _superseded(self.lease, info, taken, self._ends)

    async def remove(self) -> None:
        try:
            await answered(self._runner.discard(self.lease))
        except BsupError as error:
            log.warning("the remains of lease %s could not be removed: %s", self.lease, error)

    async def _stopped(self) -> list[StepTaken]:
        """At least one kill, whatever the disk says: a start may have been on its way when the daemon before this one
        died."""
        tries = 0
        while True:
            try:
                taken = await self._runner.adopt(self.lease, self._on_end)
                await self._runner.stop(self.lease, 0.0, True)
                running = {step.index for step in taken or () if step.end is None}
                async with asyncio.timeout(BURIAL_PATIENCE):
                    while not running <= self._ends.keys():
                        self._ended.clear()
                        await self._ended.wait()
                return taken or []
            except HandleLost:
                return []
            except TimeoutError:
                log.warning("lease %s is gone and its processes do not end; killing them again", self.lease)
            except Exception as error:
                # Whatever it is: as long as something may run, nobody may be told that it does not.
                tries += 1
                log.warning("lease %s is gone and its processes could not be killed yet: %s", self.lease, error)
                await asyncio.sleep(patience(tries, self._rng))

    async def _described(self) -> HandleInfo | None:
        try:
            return await self._runner.describe(self.lease)
        except BsupError as error:
            log.warning("the handle of lease %s can't be read: %s", self.lease, error)
            return None

    def _on_end(self, end: StepEnd) -> None:
        self._ends[end.index] = end
        self._ended.set()


def _superseded(lease: LeaseId, info: HandleInfo, taken: Sequence[StepTaken], ends: dict[int, StepEnd]) -> AttemptEnd:
    by_index = {step.index: step for step in taken}
    steps = []
    for plan in info.plan.steps if info.plan else ():
        step = by_index.get(plan.index)
        end = ends.get(plan.index) or (step.end if step else None)
        record = StepRecord(index=plan.index, name=plan.name, state=StepState.SKIPPED)
        if step is not None:
            record.started_at = step.started_at
            record.state = StepState.UNKNOWN
        if end is not None:
            record.exit_code, record.signal, record.ended_at = end.exit_code, end.signal, end.ended_at
            natural = StepState.SUCCEEDED if end.exit_code == 0 else StepState.FAILED
            record.state = natural if end.cause is None else StepState.CANCELED
        steps.append(record)
    return AttemptEnd(
        lease=lease,
        job=info.job,
        attempt=info.attempt,
        outcome=Outcome.SUPERSEDED,
        error="superseded: the lease is gone",
        reason="lease",
        started_at=min((step.started_at for step in steps if step.started_at), default=None),
        ended_at=datetime.now(UTC),
        steps=steps,
    )
