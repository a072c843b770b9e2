"""A runner with a real shepherd, driven as a job actor would drive it. Used by this folder's tests only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import msgspec

from supervisor.model.job import Lease, LeaseId
from supervisor.model.spec import normalize, split_secrets
from supervisor.ports import Plan, StepEnd
from supervisor.runners.handles import boot_id
from supervisor.runners.run_files import StepsSettings
from supervisor.runners.shepherd_client import ShepherdClient
from supervisor.runners.steps import StepsRunner

SESSION = "5e55" * 8
DEADLINE = 60.0


def lease_of(job: dict[str, Any], number: int = 1) -> Lease:
    """A lease of a job as the store would hand it out: spec and secrets apart."""
    shown, secrets, redact = split_secrets(normalize(job))
    return Lease(
        id=LeaseId(SESSION, number),
        job=40 + number,
        attempt=2,
        kind="steps",
        name=shown["name"],
        spec=msgspec.Raw(json.dumps(shown).encode()),
        secrets=secrets,
        redact=redact,
        attempts=1,
        failures=0,
        losses=0,
        leased_at=datetime.now(UTC),
    )


class Ends:
    """Collects what a runner tells, and waits for it."""

    def __init__(self) -> None:
        self.told: list[StepEnd] = []
        self._news = anyio.Event()

    def tell(self, end: StepEnd) -> None:
        self.told.append(end)
        self._news.set()
        self._news = anyio.Event()

    async def of(self, index: int) -> StepEnd:
        with anyio.fail_after(DEADLINE):
            while True:
                for end in self.told:
                    if end.index == index:
                        return end
                await self._news.wait()


@dataclass
class Run:
    """One attempt that ran to its end, step by step."""

    plan: Plan
    ends: dict[str, StepEnd]
    out: dict[str, str]
    err: dict[str, str]

    @property
    def codes(self) -> dict[str, int | None]:
        return {name: end.exit_code for name, end in self.ends.items()}


class Bench:
    """``runner`` on ``state``; ``restart`` replaces it and its connection, as a new daemon would."""

    def __init__(self, state: Path, *, uids: int, settings: StepsSettings | None = None) -> None:
        self.state = state
        self.uids = uids
        self.settings = settings or StepsSettings(grace=0.2)
        # As the keeper of a session that holds would have it: without a fence the shepherd starts nothing.
        fence = {"fence_at": time.clock_gettime(time.CLOCK_BOOTTIME) + 3600, "boot_id": boot_id()}
        (state / "fence").write_text(json.dumps(fence))
        self.client = ShepherdClient(state, uid_count=uids, linger=0.2)
        self.runner = self._runner()

    def _runner(self) -> StepsRunner:
        return StepsRunner(self.state, self.client, self.settings, uid_count=self.uids)

    async def open(self) -> None:
        await self.client.connect()
        await self.runner.open()

    async def restart(self) -> None:
        await self.close()
        self.client = ShepherdClient(self.state, uid_count=self.uids, linger=0.2)
        self.runner = self._runner()
        await self.open()

    async def close(self) -> None:
        self.runner.close()
        await self.client.aclose()

    def step_dir(self, lease: Lease, index: int) -> Path:
        return self.state / "runs" / str(lease.id) / str(index)

    def workspace(self, lease: Lease) -> Path:
        return self.state / "work" / str(lease.id)

    async def attempt(self, lease: Lease, before: Callable[[int], object] = lambda _: None) -> Run:
        """Runs the steps in order; after a failure only those with ``always``."""
        plan = await self.runner.prepare(lease)
        run = Run(plan, {}, {}, {})
        failed = False
        for step in plan.steps:
            if failed and not step.always:
                continue
            before(step.index)
            ends = Ends()
            await self.runner.start(lease.id, step.index, ends.tell)
            end = await ends.of(step.index)
            directory = self.step_dir(lease, step.index)
            run.ends[step.name] = end
            run.out[step.name] = (directory / "out").read_text() if (directory / "out").exists() else ""
            run.err[step.name] = (directory / "err").read_text() if (directory / "err").exists() else ""
            failed = failed or end.exit_code != 0
        return run
