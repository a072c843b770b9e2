"""The mailbox: two lanes, bounds, asks, cancellation and closing."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from supervisor.mailbox import ActorGone, Ask, Lane, Mailbox, Request, Told
from supervisor.model.errors import Busy
from tests.actors.virtual_loop import run

pytestmark = pytest.mark.anyio


class Double(Request[int], frozen=True):
    value: int


async def test_control_overtakes_data_always() -> None:
    """What lies in the control lane is received before anything in the data lane, however late it came."""
    box: Mailbox[str] = Mailbox("m")
    box.tell("data 1")
    box.tell("data 2")
    box.tell("stop", Lane.CONTROL)
    assert [await box.receive() for _ in range(3)] == ["stop", "data 1", "data 2"]


async def test_a_stop_gets_through_while_the_data_lane_is_full() -> None:
    """A full data lane refuses data, and nothing else."""
    box: Mailbox[str] = Mailbox("m", control=1, data=2)
    assert [box.tell("d") for _ in range(3)] == [Told.OK, Told.OK, Told.FULL]
    assert box.tell("stop", Lane.CONTROL) is Told.OK
    assert box.tell("stop", Lane.CONTROL) is Told.FULL
    assert await box.receive() == "stop"
    assert box.stats().dropped == 2


async def test_closing_while_full_drops_what_is_left_and_ends_the_receiver() -> None:
    """Full and closed are distinct answers; after the close the receiver's loop ends."""
    box: Mailbox[str] = Mailbox("m", data=1)
    box.tell("d")
    assert box.tell("d") is Told.FULL
    box.close()
    assert box.tell("d") is Told.CLOSED
    assert [item async for item in box] == []
    assert box.stats().dropped == 3
    with pytest.raises(ActorGone):
        await box.receive()


async def test_a_waiting_receiver_is_woken_by_the_close() -> None:
    box: Mailbox[str] = Mailbox("m")
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(_all_of(box))
        await asyncio.sleep(1)
        box.close()
    assert waiting.result() == []


async def test_an_ask_is_answered() -> None:
    box: Mailbox[str] = Mailbox("m")

    async def actor() -> None:
        ask = await box.receive()
        assert isinstance(ask, Ask) and isinstance(ask.request, Double)
        ask.answer(ask.request.value * 2)
        ask.answer(0)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(actor())
        assert await box.ask(Double(21), 1) == 42


async def test_the_end_of_an_actor_fails_every_unanswered_ask_at_once() -> None:
    """Those in the lane and those received already alike; no asker waits for its deadline."""
    box: Mailbox[str] = Mailbox("m")
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as tasks:
        asks = [tasks.create_task(_outcome(box, 1000)) for _ in range(3)]
        await asyncio.sleep(1)
        await box.receive()
        box.close()
    assert [ask.result() for ask in asks] == ["gone"] * 3
    assert loop.time() - began == pytest.approx(1)
    assert await _outcome(box, 1) == "gone"


async def test_an_ask_that_was_given_up_is_not_handed_out() -> None:
    """The deadline is the asker's; the actor does no work for an asker that has gone."""
    box: Mailbox[str] = Mailbox("m")
    assert await _outcome(box, 1) == "timeout"
    box.tell("d")
    assert await box.receive() == "d"


async def test_each_ask_has_a_deadline_of_its_own() -> None:
    """Those that share a mailbox share a timer: a later ask may be over first, and one that is answered delays none."""
    box: Mailbox[str] = Mailbox("m")
    loop = asyncio.get_running_loop()
    began = loop.time()
    ended: dict[float, tuple[str, float]] = {}

    async def ask(timeout: float) -> None:
        outcome = await _outcome(box, timeout)
        ended[timeout] = (outcome, loop.time() - began)

    async with asyncio.TaskGroup() as tasks:
        for timeout in (5.0, 1.0, 3.0, 2.0):
            tasks.create_task(ask(timeout))
        await asyncio.sleep(1.5)
        item = await box.receive()
        assert isinstance(item, Ask)
        item.answer(0)
    assert ended == {
        5.0: ("answered", pytest.approx(1.5)),
        1.0: ("timeout", pytest.approx(1)),
        3.0: ("timeout", pytest.approx(3)),
        2.0: ("timeout", pytest.approx(2)),
    }


async def test_an_ask_after_a_crash_has_its_deadline_too() -> None:
    """The actor crashed and another reads on: what is asked from then on is waited for as ever."""
    box: Mailbox[str] = Mailbox("m")
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(_outcome(box, 1000))
        await asyncio.sleep(1)
        box.fail_unanswered()
        second = tasks.create_task(_outcome(box, 2))
    assert (first.result(), second.result()) == ("gone", "timeout")


async def test_asks_are_bounded_too() -> None:
    box: Mailbox[str] = Mailbox("m", control=1)
    box.tell("c", Lane.CONTROL)
    assert await _outcome(box, 1) == "busy"


async def test_the_age_of_the_oldest_item_is_told() -> None:
    loop = asyncio.get_running_loop()
    box: Mailbox[str] = Mailbox("m", clock=loop.time)
    box.tell("d")
    await asyncio.sleep(5)
    box.tell("c", Lane.CONTROL)
    stats = box.stats()
    assert (stats.depth_control, stats.depth_data) == (1, 1)
    assert stats.oldest == pytest.approx(5)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["tell", "cancel", "yield"]), st.sampled_from(list(Lane))), max_size=60),
)
def test_a_canceled_receiver_loses_nothing(script: list[tuple[str, Lane]]) -> None:
    """Whatever the order of tells, bare cancels and turns of the loop: each item is received once, in its lane's
    order."""

    async def play() -> None:
        box: Mailbox[tuple[Lane, int]] = Mailbox("m")
        got: list[tuple[Lane, int]] = []

        async def reader() -> None:
            async for item in box:
                assert not isinstance(item, Ask)
                got.append(item)

        task = asyncio.create_task(reader())
        for number, (action, lane) in enumerate(script):
            if action == "tell":
                box.tell((lane, number), lane)
            elif action == "yield":
                await asyncio.sleep(0)
            else:
                task.cancel()
                await asyncio.wait([task])
                task = asyncio.create_task(reader())
        await asyncio.sleep(1)
        box.close()
        await task
        for lane in Lane:
            sent = [number for number, (action, where) in enumerate(script) if action == "tell" and where is lane]
            assert [number for where, number in got if where is lane] == sent

    run(play())


class MailboxModel(RuleBasedStateMachine):
    """Against a model of two plain queues: bounds, order, counting, closing."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.box: Mailbox[int] = Mailbox("m", control=2, data=3)
        self.lanes: dict[Lane, deque[int]] = {Lane.CONTROL: deque(), Lane.DATA: deque()}
        self.bounds = {Lane.CONTROL: 2, Lane.DATA: 3}
        self.closed = False
        self.dropped = 0
        self.handled = 0
        self.sent = 0

    def teardown(self) -> None:
        self.loop.close()

    @rule(lane=st.sampled_from(list(Lane)))
    def tell(self, lane: Lane) -> None:
        self.sent += 1
        told = self.box.tell(self.sent, lane)
        if self.closed:
            assert told is Told.CLOSED
            self.dropped += 1
        elif len(self.lanes[lane]) == self.bounds[lane]:
            assert told is Told.FULL
            self.dropped += 1
        else:
            assert told is Told.OK
            self.lanes[lane].append(self.sent)

    @precondition(lambda self: any(self.lanes.values()))
    @rule()
    def receive(self) -> None:
        expected = (self.lanes[Lane.CONTROL] or self.lanes[Lane.DATA]).popleft()
        assert self.loop.run_until_complete(self.box.receive()) == expected
        self.handled += 1

    @rule()
    def receive_nowait(self) -> None:
        lane = self.lanes[Lane.CONTROL] or self.lanes[Lane.DATA]
        expected = lane.popleft() if lane else None
        assert self.box.receive_nowait() == expected
        self.handled += expected is not None

    @rule()
    def close(self) -> None:
        self.box.close()
        if not self.closed:
            self.closed = True
            self.dropped += sum(map(len, self.lanes.values()))
            for lane in self.lanes.values():
                lane.clear()

    @invariant()
    def counts_agree(self) -> None:
        stats = self.box.stats()
        assert stats.depth_control == len(self.lanes[Lane.CONTROL])
        assert stats.depth_data == len(self.lanes[Lane.DATA])
        assert (stats.handled, stats.dropped) == (self.handled, self.dropped)


TestMailboxModel = MailboxModel.TestCase
TestMailboxModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


async def _all_of(box: Mailbox[str]) -> list[object]:
    return [item async for item in box]


async def _outcome(box: Mailbox[str], timeout: float) -> str:
    try:
        await box.ask(Double(1), timeout)
    except ActorGone:
        return "gone"
    except TimeoutError:
        return "timeout"
    except Busy:
        return "busy"
    return "answered"
