"""Supervision: order, reverse order, restarts within an intensity, escalation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import anyio
import pytest

from supervisor.actors.supervision import Child, Escalated, Supervisor
from supervisor.mailbox import ActorGone, Lane, Mailbox
from supervisor.messages import AskStatus
from supervisor.model.policies import Intensity
from tests.actors.harness import until

pytestmark = pytest.mark.anyio


def forever(name: str, said: list[str]) -> Callable[[], Callable[[], Awaitable[None]]]:
    async def run() -> None:
        said.append(f"{name} begins")
        try:
            await asyncio.Event().wait()
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(1)
            said.append(f"{name} ends")

    return lambda: run


async def test_children_start_in_order_and_stop_in_reverse_each_awaited() -> None:
    said: list[str] = []
    supervisor = Supervisor([Child(name, forever(name, said)) for name in "abc"], Random(0))
    async with anyio.create_task_group() as tasks:
        supervisor.start(tasks)
        await asyncio.sleep(1)
        await supervisor.stop()
    assert said == ["a begins", "b begins", "c begins", "c ends", "b ends", "a ends"]
    assert {info.state for info in supervisor.infos()} == {"stopped"}


async def test_stopping_what_has_not_begun_yet_begins_nothing() -> None:
    said: list[str] = []
    supervisor = Supervisor([Child("a", forever("a", said))], Random(0))
    async with anyio.create_task_group() as tasks:
        supervisor.start(tasks)
        await supervisor.stop()
    assert said == []


async def test_a_child_that_crashes_is_restarted_with_its_mailbox_and_its_asks_fail_at_once() -> None:
    mailbox: Mailbox[str] = Mailbox("a")
    got: list[object] = []

    async def run() -> None:
        item = await mailbox.receive()
        got.append(item)
        if len(got) < 3:
            raise ValueError("boom")
        await asyncio.Event().wait()

    supervisor = Supervisor([Child("a", lambda: run, mailbox)], Random(0))
    async with anyio.create_task_group() as tasks:
        supervisor.start(tasks)
        with pytest.raises(ActorGone):
            await mailbox.ask(AskStatus(), 1000)
        mailbox.tell("kept", Lane.CONTROL)
        mailbox.tell("kept too", Lane.CONTROL)
        await until(lambda: len(got) == 3)
        assert got[1:] == ["kept", "kept too"]
        [info] = supervisor.infos()
        assert (info.state, info.restarts) == ("running", 2)
        await supervisor.stop()
    assert mailbox.is_closed


async def test_beyond_its_intensity_it_escalates() -> None:
    crashes: list[float] = []

    async def run() -> None:
        crashes.append(asyncio.get_running_loop().time())
        raise ValueError("boom")

    supervisor = Supervisor([Child("a", lambda: run, intensity=Intensity(3, 60.0))], Random(0))
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            supervisor.start(tasks)
    assert caught.group_contains(Escalated, match="a failed for good: 3 restarts within 60 s: boom")
    assert len(crashes) == 4
