"""Every state that a model can reach, and whether something is wrong with one. Plain breadth-first search.

A model gives its first state, what can follow a state, and what is wrong with one. So the first counterexample that is
found is a shortest one. ``stuck`` then looks for states from which no goal is reached any more, once nothing fails.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


class Step(NamedTuple, Generic[S]):
    """``said``: who does what. ``is_fault``: something fails or is late; nobody may count on it to get on."""

    said: str
    state: S
    is_fault: bool = False


class Model(Protocol[S]):
    def first(self) -> S: ...

    def steps(self, state: S) -> Iterable[Step[S]]: ...

    def wrong(self, state: S) -> str | None: ...

    def is_goal(self, state: S) -> bool: ...


@dataclass(frozen=True)
class Trace(Generic[S]):
    """How ``what`` comes about, from the first state on."""

    what: str
    steps: tuple[Step[S], ...]

    def text(self, show: Callable[[S], str] | None = None) -> str:
        lines = [self.what]
        for number, step in enumerate(self.steps, 1):
            lines.append(f"{number:4}  {step.said}" + (f"   [{show(step.state)}]" if show else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class Found(Generic[S]):
    """``states`` and ``edges`` that were looked at; ``trace`` None: nothing is wrong with any of them."""

    states: int
    edges: int
    trace: Trace[S] | None


def search(model: Model[S], *, progress: bool = True) -> Found[S]:
    """All reachable states, up to the first that is wrong. ``progress``: looks for stuck ones too."""
    # Nothing here refers to itself, and all of it stays: the collector would only walk it, again and again.
    gc.disable()
    try:
        return _search(model, progress)
    finally:
        gc.enable()


def _search(model: Model[S], progress: bool) -> Found[S]:
    first = model.first()
    numbers: dict[S, int] = {first: 0}
    states = [first]
    parents = array("L", [0])
    goals: list[int] = []
    # Edges that need no fault, for going back from the goals: the states they come from, and where each state's begin.
    targets, begins = array("L"), array("L")
    edges = 0
    at = 0
    while at < len(states):
        state = states[at]
        what = model.wrong(state)
        if what is not None:
            return Found(len(states), edges, _trace(model, states, parents, at, what))
        if model.is_goal(state):
            goals.append(at)
        begins.append(len(targets))
        for step in model.steps(state):
            edges += 1
            number = numbers.get(step.state)
            if number is None:
                number = numbers[step.state] = len(states)
                states.append(step.state)
                parents.append(at)
            if progress and not step.is_fault:
                targets.append(number)
        at += 1
    if progress:
        stuck = _stuck(len(states), goals, targets, begins)
        if stuck is not None:
            what = "the job never ends, though nothing fails any more"
            return Found(len(states), edges, _trace(model, states, parents, stuck, what))
    return Found(len(states), edges, None)


def _stuck(count: int, goals: list[int], targets: array[int], begins: array[int]) -> int | None:
    """The first state from which no goal can be reached."""
    begins.append(len(targets))
    into = array("L", bytes(8 * (count + 1)))
    for target in targets:
        into[target + 1] += 1
    for number in range(count):
        into[number + 1] += into[number]
    places = into[:]
    sources = array("L", bytes(8 * len(targets)))
    for source in range(count):
        for target in targets[begins[source] : begins[source + 1]]:
            sources[places[target]] = source
            places[target] += 1
    reaches = bytearray(count)
    for goal in goals:
        reaches[goal] = 1
    waiting = goals[:]
    while waiting:
        number = waiting.pop()
        for source in sources[into[number] : into[number + 1]]:
            if not reaches[source]:
                reaches[source] = 1
                waiting.append(source)
    found = reaches.find(0)
    return None if found < 0 else found


def _trace(model: Model[S], states: list[S], parents: array[int], at: int, what: str) -> Trace[S]:
    steps: list[Step[S]] = []
    while at:
        before = parents[at]
        steps.append(next(step for step in model.steps(states[before]) if step.state == states[at]))
        at = before
    return Trace(what, tuple(reversed(steps)))
