"""Runs of ``true`` through the shepherd, from the step's file to the closed output, against bare ``posix_spawn``.

As root each run has a uid of its own, as jobs have; otherwise all have the caller's.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from pathlib import Path

from measured import Findings, measure, measure_async, state_directory

from supervisor.runners.shepherd_client import HintKind, ShepherdClient

RUNS = 400
AT_ONCE = 8
UID_BASE = 290_000


def spawn() -> None:
    """As many at once as the shepherd gets."""
    running = 0
    for _ in range(RUNS):
        if running == AT_ONCE:
            os.wait()
            running -= 1
        os.posix_spawn("/bin/true", ["true"], {})
        running += 1
    for _ in range(running):
        os.wait()


class Yard:
    """A shepherd with a state directory of its own. Each round writes new runs: a step starts once."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.rounds = 0
        at = time.clock_gettime(time.CLOCK_BOOTTIME) + 3600
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        (state / "fence").write_text(json.dumps({"fence_at": at, "boot_id": boot_id}))
        self.uids = list(range(UID_BASE, UID_BASE + AT_ONCE)) if os.geteuid() == 0 else []
        self.client = ShepherdClient(state, uid_base=UID_BASE, uid_count=len(self.uids), linger=2.0)
        self.closed: dict[Path, asyncio.Event] = {}
        self.client.on_hint(self._hint)

    def _hint(self, kind: HintKind, step: Path | None) -> None:
        if kind == "closed" and step is not None and step in self.closed:
            self.closed[step].set()

    async def round(self) -> None:
        self.rounds += 1
        room = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with room:
                uid = self.uids.pop() if self.uids else None
                await self._run(f"{self.rounds:032x}-{number}", uid)
                if uid is not None:
                    self.uids.append(uid)

        async with asyncio.TaskGroup() as group:
            for number in range(RUNS):
                group.create_task(one(number))

    async def _run(self, name: str, uid: int | None) -> None:
        workspace = self.state / "work" / name
        step = self.state / "runs" / name / "0"
        await self.client.make_workspace(workspace, uid)
        step.mkdir(parents=True, mode=0o700)
        spec: dict[str, object] = {
            "argv": ["true"],
            "cwd": "src",
            "env": {},
            "uid": uid,
            "gid": None,
            "workspace": str(workspace),
            "own": False,
            "timeout": None,
            "grace": 10.0,
            "max_output": 1 << 30,
            "token": name,
            "private_tmp": False,
            "as_service": False,
        }
        (step / "spec").write_text(json.dumps(spec))
        self.closed[step] = asyncio.Event()
        await self.client.start_step(step)
        await self.closed[step].wait()


async def run(quick: bool) -> Findings:
    state = state_directory()
    try:
        yard = Yard(state)
        await yard.client.connect()
        found = await measure_async(
            "shepherd: runs of `true`",
            "/s",
            RUNS,
            yard.round,
            f"{AT_ONCE} at once; workspace, files, claim, exit, output",
        )
        await yard.client.aclose()
        bare = measure("posix_spawn and wait of `true`", "/s", RUNS, spawn, f"{AT_ONCE} at once")
    finally:
        shutil.rmtree(state, ignore_errors=True)
    return Findings([found, bare])
