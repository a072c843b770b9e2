"""A daemon of fakes: the real root and actors on a ``FakeHost`` and a ``FakeStore``; starts, dies and ends as told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from supervisor.actors.keeper import Terms
from supervisor.actors.root import Addresses, Parts, RootConfig, run_root
from supervisor.kinds import Handler
from supervisor.mailbox import Lane
from supervisor.messages import Reconfigure, Terminate
from supervisor.model.job import HostInfo
from supervisor.model.policies import Capacity
from supervisor.runners.in_process import InProcessRunner
from tests.actors.fake_store import FakeStore
from tests.actors.fakes import FakeHost, FakeNotifier, FakeSink

TERMS = Terms(renew=10.0, term=180.0, margin=15.0)


class Quiet:
    """A control actor that nobody calls."""

    async def run(self) -> None:
        await asyncio.Event().wait()


class Daemon:
    """``handlers``: the in-process kinds of this daemon, which run in the real runner of such kinds."""

    def __init__(
        self,
        store: FakeStore,
        host: FakeHost,
        *,
        slots: int = 4,
        cpu: float | None = None,
        drain: float | None = 600.0,
        seed: int = 0,
        control: Callable[[], Any] = Quiet,
        handlers: Mapping[str, Handler] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.store = store
        self.host = host
        self.in_process = InProcessRunner(handlers or {}, guard=host.guard, fence_in=host.fence_in, timeout=timeout)
        self.sink = FakeSink()
        self.notifier = FakeNotifier()
        self.reloads = 0
        self.at = Addresses()
        self._config = RootConfig(
            host=HostInfo("h", (), slots, cpu, None, "1", "m", "b", 1, ("steps", *self.in_process.kinds)),
            limits=Reconfigure(Capacity(slots, cpu), (), 1.0, 10.0),
            terms=TERMS,
            drain=drain,
        )
        self._parts = Parts(
            store=store,  # type: ignore[arg-type]  # the calls of users and readers are not faked: no actor here makes them
            session_file=host,
            fence=host,
            runners={"steps": host, **dict.fromkeys(self.in_process.kinds, self.in_process)},
            sink=self.sink,
            notifier=self.notifier,
            control=control,
            reload=self._reload,
            rng=Random(seed),
        )
        self.task: asyncio.Task[int] | None = None

    async def _reload(self) -> dict[str, Any]:
        self.reloads += 1
        return {"host.slots": 2}

    def start(self) -> Daemon:
        self.task = asyncio.create_task(self._run())
        return self

    async def _run(self) -> int:
        async with self.in_process:
            return await run_root(self._config, self._parts, self.at)

    async def die(self) -> None:
        """kill -9: no last words. What the host runs goes on; what the daemon ran in itself ends."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task])

    def terminate(self, detach: bool = False) -> None:
        self.at.root.tell(Terminate(detach), Lane.CONTROL)

    async def end(self) -> int:
        assert self.task is not None
        return await self.task


async def until(condition: Callable[[], bool], within: float = 3600.0) -> float:
    """Virtual seconds until it holds. Looks every 50 ms of virtual time."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not condition():
        assert loop.time() - began < within, "it did not come to hold"
        await asyncio.sleep(0.05)
    return loop.time() - began
