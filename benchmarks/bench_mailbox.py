"""One actor and who writes to it, on one uvloop: the mailbox, ``asyncio.Queue``, anyio's memory stream, and Pykka.

Messages come in bursts, as an actor's do. Asks go one after the other: the time of a round trip is what counts. Only
the mailbox's asks have a deadline, and only its items an age; the others do less.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import environments
import uvloop
from measured import Bar, Findings, Sampler, at_least, interleave, of_samples, rate, ratio, repeats, unmeasured

from supervisor.mailbox import Ask, Lane, Mailbox, Request, Turns

MESSAGES = 100_000
ASKS = 10_000
PYKKA = (50_000, 5_000)
BURST = 64
ROOM = 1024
TELLS = {
    "data": "mailbox: messages, data lane",
    "control": "mailbox: messages, control lane",
    "served": "mailbox: messages, data lane, served without a task",
    "queue": "asyncio.Queue: messages",
    "anyio": "anyio memory stream: messages",
    "pykka": "Pykka: messages",
}
ASKED = {
    "mailbox": "mailbox: asks",
    "served": "mailbox: asks, served without a task",
    "queue": "asyncio.Queue and a future: asks",
    "anyio": "anyio memory stream and an Event: asks",
    "pykka": "Pykka: asks",
}


class Question(Request[int], frozen=True):
    """Answered with a number."""


def run(quick: bool) -> Findings:
    return uvloop.run(_run(repeats(quick)))


async def _run(rounds: int) -> Findings:
    notes: dict[str, str] = {}
    tells: dict[str, Sampler] = {
        "data": rate(MESSAGES, lambda: through_mailbox(Lane.DATA)),
        "control": rate(MESSAGES, lambda: through_mailbox(Lane.CONTROL)),
        "served": rate(MESSAGES, through_served),
        "queue": rate(MESSAGES, through_queue),
        "anyio": rate(MESSAGES, through_anyio),
    }
    asks: dict[str, Sampler] = {
        "mailbox": rate(ASKS, ask_mailbox),
        "served": rate(ASKS, ask_served),
        "queue": rate(ASKS, ask_queue),
        "anyio": rate(ASKS, ask_anyio),
    }
    try:
        python = await asyncio.to_thread(environments.python, "pykka")
        tells["pykka"] = lambda: pykka(python, 0)
        asks["pykka"] = lambda: pykka(python, 1)
    except environments.Missing as why:
        notes["Pykka"] = f"left out: {why}"
    told = await interleave(tells, rounds)
    asked = await interleave(asks, rounds)
    rows = [of_samples(TELLS[name], "/s", rates, f"bursts of {BURST}") for name, rates in told.items()]
    rows += [of_samples(ASKED[name], "/s", rates, "one after the other") for name, rates in asked.items()]
    bars = []
    compared = (("data", told, TELLS), ("control", told, TELLS), ("mailbox", asked, ASKED), ("served", asked, ASKED))
    for mine, samples, against in compared:
        for other, bound in (("queue", 0.7), ("anyio", 1.0), ("pykka", 1.0)):
            bars.append(_bar(f"{against[mine]}, to {against[other].partition(':')[0]}", samples, mine, other, bound))
    return Findings(rows, bars, notes=notes)


def _bar(what: str, samples: dict[str, list[float]], mine: str, other: str, bound: float) -> Bar:
    if other not in samples:
        return unmeasured(what, f"≥ {bound:g} ×", "it is not here")
    return at_least(what, ratio(samples[mine], samples[other]), bound)


# --- messages --------------------------------------------------------------------------------------------------------


async def tell_all(put: Callable[[int], object], receive: Callable[[], Awaitable[object]]) -> None:
    """The receiver is a task of its own, as an actor is; the teller lets it run after each burst."""

    async def actor() -> None:
        for _ in range(MESSAGES):
            await receive()

    receiving = asyncio.create_task(actor())
    for start in range(0, MESSAGES, BURST):
        for number in range(start, min(start + BURST, MESSAGES)):
            put(number)
        await asyncio.sleep(0)
    await receiving


async def through_mailbox(lane: Lane) -> None:
    mailbox: Mailbox[int] = Mailbox("bench", control=ROOM, data=ROOM)
    await tell_all(lambda number: mailbox.tell(number, lane), mailbox.receive)


async def through_served() -> None:
    mailbox: Mailbox[int] = Mailbox("bench", data=ROOM)
    seen = 0
    done = asyncio.Event()

    def handle(item: int | Ask[Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == MESSAGES:
            done.set()

    mailbox.serve(handle, Turns())
    for start in range(0, MESSAGES, BURST):
        for number in range(start, min(start + BURST, MESSAGES)):
            mailbox.tell(number)
        await asyncio.sleep(0)
    await done.wait()
    mailbox.close()


async def through_queue() -> None:
    queue: asyncio.Queue[int] = asyncio.Queue(ROOM)
    await tell_all(lambda number: queue.put_nowait(number), queue.get)


async def through_anyio() -> None:
    # It lets others run after each item that is received: with a bound the teller would find it full.
    send, receive = anyio.create_memory_object_stream[int](math.inf)
    with send, receive:
        await tell_all(lambda number: send.send_nowait(number), receive.receive)


# --- asks ------------------------------------------------------------------------------------------------------------


async def ask_mailbox() -> None:
    mailbox: Mailbox[Question] = Mailbox("bench")

    async def actor() -> None:
        async for item in mailbox:
            assert isinstance(item, Ask)
            item.answer(1)

    answering = asyncio.create_task(actor())
    for _ in range(ASKS):
        await mailbox.ask(Question(), timeout=10)
    mailbox.close()
    await answering


async def ask_served() -> None:
    mailbox: Mailbox[Question] = Mailbox("bench")

    def handle(item: Question | Ask[Any]) -> None:
        assert isinstance(item, Ask)
        item.answer(1)

    mailbox.serve(handle, Turns())
    for _ in range(ASKS):
        await mailbox.ask(Question(), timeout=10)
    mailbox.close()


async def ask_queue() -> None:
    queue: asyncio.Queue[tuple[Question, asyncio.Future[int]]] = asyncio.Queue(ROOM)
    loop = asyncio.get_running_loop()

    async def actor() -> None:
        for _ in range(ASKS):
            _, future = await queue.get()
            future.set_result(1)

    answering = asyncio.create_task(actor())
    for _ in range(ASKS):
        future = loop.create_future()
        queue.put_nowait((Question(), future))
        assert await future == 1
    await answering


async def ask_anyio() -> None:
    send, receive = anyio.create_memory_object_stream[tuple[Question, anyio.Event, list[int]]](ROOM)

    async def actor() -> None:
        for _ in range(ASKS):
            _, answered, box = await receive.receive()
            box.append(1)
            answered.set()

    with send, receive:
        answering = asyncio.create_task(actor())
        for _ in range(ASKS):
            answered, box = anyio.Event(), list[int]()
            send.send_nowait((Question(), answered, box))
            await answered.wait()
            assert box == [1]
        await answering


async def pykka(python: str, which: int) -> float:
    script = str(environments.PEERS / "mailbox_pykka.py")
    process = await asyncio.create_subprocess_exec(python, script, *map(str, PYKKA), stdout=subprocess.PIPE)
    said, _ = await process.communicate()
    return float(said.split()[which])
