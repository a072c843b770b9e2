"""Mailbox against ``asyncio.Queue``: one teller, one receiver, on one loop."""

from __future__ import annotations

import asyncio

from measured import Findings, measure_async

from supervisor.mailbox import Lane, Mailbox, Request

MESSAGES = 200_000
ASKS = 20_000
BURST = 64


class Question(Request[int], frozen=True):
    """Answered with a number."""


async def through_queue() -> None:
    queue: asyncio.Queue[int] = asyncio.Queue(1024)

    async def receive() -> None:
        for _ in range(MESSAGES):
            await queue.get()

    async with asyncio.TaskGroup() as group:
        group.create_task(receive())
        for start in range(0, MESSAGES, BURST):
            for number in range(start, min(start + BURST, MESSAGES)):
                queue.put_nowait(number)
            await asyncio.sleep(0)


async def through_mailbox() -> None:
    mailbox: Mailbox[int] = Mailbox("bench", data=1024)

    async def receive() -> None:
        for _ in range(MESSAGES):
            await mailbox.receive()

    async with asyncio.TaskGroup() as group:
        group.create_task(receive())
        for start in range(0, MESSAGES, BURST):
            for number in range(start, min(start + BURST, MESSAGES)):
                mailbox.tell(number, Lane.DATA)
            await asyncio.sleep(0)


async def ask() -> None:
    mailbox: Mailbox[Question] = Mailbox("bench")

    async def answer() -> None:
        async for item in mailbox:
            item.answer(1)  # type: ignore[union-attr] # only asks are put in

    async with asyncio.TaskGroup() as group:
        group.create_task(answer())
        for _ in range(ASKS):
            await mailbox.ask(Question(), timeout=10)
        mailbox.close()


async def run(quick: bool) -> Findings:
    note = f"bursts of {BURST}"
    return Findings(
        [
            await measure_async("mailbox: tell and receive", "/s", MESSAGES, through_mailbox, note),
            await measure_async("asyncio.Queue: put and get", "/s", MESSAGES, through_queue, note),
            await measure_async("mailbox: ask and answer", "/s", ASKS, ask, "one after the other, with a deadline"),
        ]
    )
