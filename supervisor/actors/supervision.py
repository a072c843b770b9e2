"""Supervision as a specification: what is started in which order, restarted how often in how long, and stopped in
reverse.

A child that raises is started anew, with the same mailbox: its messages wait, its unanswered asks fail at once. Beyond
its intensity the supervisor escalates: it raises, and with it the daemon ends (the jobs stay with the shepherd, the
service manager starts the next daemon). A child that returns has ended for good.

A child is stopped through its cancel scope, and awaited, before the one started before it is stopped.

May import the seams and model. Called by the root.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any

import anyio
import anyio.abc

from supervisor.mailbox import Mailbox
from supervisor.messages import ActorInfo
from supervisor.model.errors import BsupError
from supervisor.model.policies import Intensity, decide_restart

log = logging.getLogger("supervisor.root")


class Escalated(BsupError):
    """A child failed more often than its specification allows."""


class Child:
    """``make`` builds a fresh actor's ``run`` for each (re)start; ``mailbox`` outlives them (None: it has none)."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Callable[[], Awaitable[None]]],
        mailbox: Mailbox[Any] | None = None,
        intensity: Intensity | None = None,
    ) -> None:
        self.name = name
        self.make = make
        self.mailbox = mailbox
        self.intensity = intensity or Intensity()
        self.state = "not started"
        self.restarts = 0
        self.scope: anyio.CancelScope | None = None
        self.ended = anyio.Event()

    def info(self) -> ActorInfo:
        stats = None if self.mailbox is None else self.mailbox.stats()
        return ActorInfo(
            name=self.name,
            state=self.state,
            restarts=self.restarts,
            depth_control=0 if stats is None else stats.depth_control,
            depth_data=0 if stats is None else stats.depth_data,
            oldest=0.0 if stats is None else stats.oldest,
            handled=0 if stats is None else stats.handled,
            dropped=0 if stats is None else stats.dropped,
        )


class Supervisor:
    """Starts ``children`` in order; each is running (not: ready) before the next one is started."""

    def __init__(self, children: Sequence[Child], rng: Random) -> None:
        self._children = list(children)
        self._rng = rng

    def infos(self) -> list[ActorInfo]:
        return [child.info() for child in self._children]

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        for child in self._children:
            tasks.start_soon(self._keep, child, name=child.name)

    async def stop(self) -> None:
        """In reverse order, each awaited. Their mailboxes are closed: whoever asks hears it at once."""
        for child in reversed(self._children):
            if child.state == "not started":
                child.state = "stopped"
                continue
            child.state = "stopping" if child.scope is not None else child.state
            if child.scope is not None:
                child.scope.cancel()
            await child.ended.wait()

    async def _keep(self, child: Child) -> None:
        """One child's life, restarts and all."""
        if child.state == "stopped":
            return
        history: tuple[float, ...] = ()
        try:
            with anyio.CancelScope() as child.scope:
                while True:
                    child.state = "running"
                    try:
                        await child.make()()
                        return
                    except Exception as error:
                        log.exception("%s crashed", child.name)
                        decision = decide_restart(
                            history, asyncio.get_running_loop().time(), child.intensity, self._rng
                        )
                        history = decision.history
                        if child.mailbox is not None:
                            child.mailbox.fail_unanswered()
                        if decision.delay is None:
                            child.state = "failed"
                            raise Escalated(f"{child.name} failed for good: {decision.reason}: {error}") from error
                        child.state = "restarting"
                        child.restarts += 1
                        log.warning("%s is started again: %s", child.name, decision.reason)
                        await anyio.sleep(decision.delay)
        finally:
            if child.state != "failed":
                child.state = "stopped"
            if child.mailbox is not None:
                child.mailbox.close()
            child.ended.set()
