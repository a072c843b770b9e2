"""Mailboxes that are served: order, bounded turns, closing in the middle, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.mailbox import TURN, ActorGone, Ask, Lane, Mailbox, Request, Told, Turns
from tests.actors.virtual_loop import run

pytestmark = pytest.mark.anyio


class Double(Request[int], frozen=True):
    value: int


def served(turns: Turns, **bounds: int) -> tuple[Mailbox[str], list[object]]:
    """A mailbox, and what was handed over of it so far."""
    box: Mailbox[str] = Mailbox("m", **bounds)
    got: list[object] = []
    box.serve(got.append, turns)
    return box, got


async def settle() -> None:
    """Until the loop has nothing to do: with the virtual clock, time passes only then."""
    await asyncio.sleep(1)


async def test_nothing_is_handed_over_before_the_teller_has_gone_on() -> None:
    box, got = served(Turns())
    assert box.tell("d") is Told.OK
    assert got == [] and box.stats().depth_data == 1
    await settle()
    assert got == ["d"]
    stats = box.stats()
    assert (stats.depth_data, stats.handled) == (0, 1)


async def test_control_overtakes_data_and_each_lane_keeps_its_order() -> None:
    box, got = served(Turns())
    box.tell("data 1")
    box.tell("data 2")
    box.tell("stop", Lane.CONTROL)
    box.tell("kill", Lane.CONTROL)
    await settle()
    assert got == ["stop", "kill", "data 1", "data 2"]


async def test_control_overtakes_in_the_middle_of_a_turn_too() -> None:
    box: Mailbox[str] = Mailbox("m")
    got: list[object] = []

    def handle(item: object) -> None:
        got.append(item)
        if item == "data 1":
            box.tell("stop", Lane.CONTROL)

    box.serve(handle, Turns())
    box.tell("data 1")
    box.tell("data 2")
    await settle()
    assert got == ["data 1", "stop", "data 2"]


async def test_what_lay_there_before_is_served_first() -> None:
    """Nothing that was told before the actor began is lost or overtaken, and nothing else has to be told for it."""
    box: Mailbox[str] = Mailbox("m")
    box.tell("early")
    got: list[object] = []
    box.serve(got.append, Turns())
    await settle()
    assert got == ["early"]
    again: Mailbox[str] = Mailbox("m")
    again.tell("early")
    again.serve(got.append, Turns())
    again.tell("late")
    await settle()
    assert got == ["early", "early", "late"]


async def test_mailboxes_are_served_in_the_order_in_which_they_got_something() -> None:
    turns = Turns()
    order: list[str] = []
    boxes: dict[str, Mailbox[str]] = {}
    for name in "abc":
        boxes[name] = Mailbox(name)
        boxes[name].serve(order.append, turns)  # type: ignore[arg-type]  # no asks here
    for name in "bcab":
        boxes[name].tell(name)
    await settle()
    assert order == ["b", "b", "c", "a"]


async def test_bounds_hold_for_a_served_mailbox_too() -> None:
    box, got = served(Turns(), control=1, data=2)
    assert [box.tell("d") for _ in range(3)] == [Told.OK, Told.OK, Told.FULL]
    assert [box.tell("c", Lane.CONTROL) for _ in range(2)] == [Told.OK, Told.FULL]
    await settle()
    assert got == ["c", "d", "d"] and box.stats().dropped == 2
    assert box.tell("d") is Told.OK


async def test_a_flood_of_one_mailbox_starves_neither_another_nor_the_loop() -> None:
    """It tells itself for ever; the others have their turn after a bounded number of its items, again and again."""
    turns = Turns()
    flood: Mailbox[int] = Mailbox("flood")
    other: Mailbox[int] = Mailbox("other")
    handled = 0
    of_other: list[int] = []
    of_loop: list[int] = []

    def on_flood(_: object) -> None:
        nonlocal handled
        handled += 1
        flood.tell(handled)

    def on_other(_: object) -> None:
        of_other.append(handled)

    def again() -> None:
        of_loop.append(handled)
        other.tell(0)
        if len(of_loop) < 10:
            loop.call_soon(again)
        else:
            flood.close()

    flood.serve(on_flood, turns)
    other.serve(on_other, turns)
    loop = asyncio.get_running_loop()
    flood.tell(0)
    loop.call_soon(again)
    await settle()
    assert len(of_other) == len(of_loop) == 10
    for seen in (of_other, of_loop):
        gaps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
        assert max(gaps) <= 2 * TURN, gaps


async def test_many_mailboxes_leave_the_loop_its_turns() -> None:
    turns = Turns()
    handled = 0

    def handle(_: object) -> None:
        nonlocal handled
        handled += 1

    boxes: list[Mailbox[int]] = [Mailbox("m") for _ in range(10 * TURN)]
    for box in boxes:
        box.serve(handle, turns)
        box.tell(0)
    seen: list[int] = []
    while handled < len(boxes):
        await asyncio.sleep(0)
        seen.append(handled)
    assert len(seen) >= 10 and seen[0] <= TURN


async def test_what_is_told_from_within_is_handed_over_once() -> None:
    """To itself and to another, while the turn is under way."""
    turns = Turns()
    other, of_other = served(turns)
    box: Mailbox[int] = Mailbox("m")
    got: list[object] = []

    def handle(item: object) -> None:
        got.append(item)
        if isinstance(item, int) and item < 3 * TURN:
            box.tell(item + 1)
            other.tell(str(item))

    box.serve(handle, turns)
    box.tell(0)
    await settle()
    assert got == list(range(3 * TURN + 1))
    assert of_other == [str(number) for number in range(3 * TURN)]


async def test_a_close_in_the_middle_of_a_turn_ends_it_at_once() -> None:
    """What still lay in it is dropped and counted; nothing is handed to an actor that is over."""
    box: Mailbox[str] = Mailbox("m")
    got: list[object] = []

    def handle(item: object) -> None:
        got.append(item)
        if item == "last":
            box.close()
            assert box.tell("after") is Told.CLOSED

    box.serve(handle, Turns())
    for word in ("first", "last", "never", "never"):
        box.tell(word)
    await settle()
    assert got == ["first", "last"]
    assert (box.stats().dropped, box.stats().handled, box.is_closed) == (3, 2, True)


async def test_a_close_before_its_turn_hands_over_nothing() -> None:
    turns = Turns()
    box, got = served(turns)
    after, of_after = served(turns)
    box.tell("d")
    after.tell("d")
    box.close()
    await settle()
    assert got == [] and of_after == ["d"]


async def test_an_ask_is_answered_and_one_that_was_given_up_is_not_handed_over() -> None:
    box: Mailbox[str] = Mailbox("m")
    seen: list[int] = []

    def handle(item: object) -> None:
        assert isinstance(item, Ask) and isinstance(item.request, Double)
        seen.append(item.request.value)
        item.answer(item.request.value * 2)

    async with asyncio.TaskGroup() as tasks:
        given_up = tasks.create_task(_asked(box, 1, 0.5))
        await asyncio.sleep(1)
        box.serve(handle, Turns())
        assert await box.ask(Double(21), 1) == 42
    assert given_up.result() is TimeoutError
    assert seen == [21]


async def test_a_close_fails_unanswered_asks_at_once() -> None:
    """The one that was handed over, and the one behind it."""
    box: Mailbox[str] = Mailbox("m")
    kept: list[object] = []

    def handle(item: object) -> None:
        kept.append(item)
        box.close()

    box.serve(handle, Turns())
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as tasks:
        asks = [tasks.create_task(_asked(box, n, 1000)) for n in range(2)]
    assert [ask.result() for ask in asks] == [ActorGone] * 2
    assert len(kept) == 1 and loop.time() == began


async def test_a_handler_that_raises_harms_no_other_mailbox() -> None:
    """It must not; but one actor's fault never silences the others, nor its own mailbox."""
    turns = Turns()
    loop = asyncio.get_running_loop()
    faults: list[object] = []
    loop.set_exception_handler(lambda _, context: faults.append(type(context["exception"])))
    bad: Mailbox[str] = Mailbox("bad")
    got: list[object] = []

    def handle(item: object) -> None:
        got.append(item)
        raise ZeroDivisionError

    before, of_before = served(turns)
    after, of_after = served(turns)
    bad.serve(handle, turns)
    for words in (("1", "2"), ("3", "4")):
        for word in words:
            before.tell(word)
            bad.tell(word)
            after.tell(word)
        await settle()
    assert of_before == of_after == got == ["1", "2", "3", "4"]
    assert faults == [ZeroDivisionError] * 4


class Owner:
    """As a job's actor: it holds its mailbox, which holds it."""

    def __init__(self, turns: Turns) -> None:
        self.mailbox: Mailbox[str] = Mailbox("m")
        self.got: list[object] = []
        self.mailbox.serve(self.handle, turns)

    def handle(self, item: object) -> None:
        self.got.append(item)
        if item == "last":
            self.mailbox.close()


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda owner: owner.mailbox.close(), id="closed from outside"),
        pytest.param(lambda owner: owner.mailbox.tell("last"), id="closed by itself"),
        pytest.param(lambda owner: (owner.mailbox.tell("d"), owner.mailbox.close()), id="closed before its turn"),
    ],
)
async def test_no_circle_is_left_after_the_close(end: Callable[[Owner], object]) -> None:
    """Ten thousand actors come and go: none may wait for the garbage collector."""
    turns = Turns()
    owner = Owner(turns)
    dead = weakref.ref(owner)
    owner.mailbox.tell("d")
    await settle()
    assert owner.got == ["d"]
    gc.disable()
    try:
        end(owner)
        await settle()
        assert owner.mailbox.is_closed
        del owner
        assert dead() is None
    finally:
        gc.enable()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["tell", "tell", "tell", "many", "yield", "close"]),
            st.integers(0, 2),
            st.sampled_from(list(Lane)),
        ),
        max_size=60,
    )
)
def test_each_item_is_handed_over_once_in_its_lanes_order(script: list[tuple[str, int, Lane]]) -> None:
    """Whatever is told to three mailboxes, whenever they are closed: what was taken (``OK``) and not dropped at the
    close is handed over once, in order."""

    async def play() -> None:
        turns = Turns()
        boxes: list[Mailbox[tuple[Lane, int]]] = [Mailbox("m", control=20, data=90) for _ in range(3)]
        got: list[list[tuple[Lane, int]]] = [[], [], []]
        taken: list[list[tuple[Lane, int]]] = [[], [], []]
        for box, items in zip(boxes, got, strict=True):
            box.serve(items.append, turns)  # type: ignore[arg-type]  # no asks here
        number = 0
        for action, which, lane in script:
            if action == "yield":
                await asyncio.sleep(0)
            elif action == "close":
                boxes[which].close()
            else:
                for _ in range(70 if action == "many" else 1):
                    number += 1
                    if boxes[which].tell((lane, number), lane) is Told.OK:
                        taken[which].append((lane, number))
        await settle()
        for box, items, sent in zip(boxes, got, taken, strict=True):
            for lane in Lane:
                of_lane = [item for item in items if item[0] is lane]
                expected = [item for item in sent if item[0] is lane]
                assert of_lane == expected[: len(of_lane)]
                assert box.is_closed or of_lane == expected
            assert box.stats().handled == len(items)

    run(play())


async def _asked(box: Mailbox[str], value: int, timeout: float) -> object:
    try:
        return await box.ask(Double(value), timeout)
    except (ActorGone, TimeoutError) as error:
        return type(error)
