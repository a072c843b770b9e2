"""The lease protocol, searched whole: nothing goes wrong with all its rules, and something does without any one.

What goes wrong: the job runs twice at once; a write with a lease that is gone changes something; an end is recorded
twice, or one that is not true; two leases have one id; a run is ended though its lease stands; the job never ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.model import lease_daemon, lease_database, lease_model, lease_shepherd
from tests.model.lease_rules import RULES, SETTINGS, look
from tests.model.lease_search import Step, search

SOURCE = Path(__file__).parents[2] / "supervisor"


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_with_all_rules_nothing_goes_wrong(setting: str, record_property: pytest.RecordProperty) -> None:
    found = look(setting)
    record_property("told", f"model of the lease, {setting}: {found.states} states, {found.edges} steps")
    assert found.trace is None, found.trace.text()


@pytest.mark.parametrize("rule", RULES)
def test_without_a_rule_something_goes_wrong(rule: str, record_property: pytest.RecordProperty) -> None:
    found = look(RULES[rule].setting, rule)
    assert found.trace is not None, f"nothing goes wrong without it, in {found.states} states"
    record_property(
        "told",
        f"model of the lease without {rule}: {found.trace.what}, in {len(found.trace.steps)} steps "
        f"({found.states} states)",
    )
    assert found.trace.what == RULES[rule].then, found.trace.text()
    assert len(found.trace.steps) <= 25, found.trace.text()


@pytest.mark.parametrize("rule", RULES)
def test_the_code_has_each_rule_where_it_is_said_to(rule: str) -> None:
    file, piece = RULES[rule].where
    assert piece in (SOURCE / file).read_text(), f"{file} has changed: where is it that {RULES[rule].says}?"


def test_the_model_has_no_other_rule() -> None:
    text = "".join(
        Path(module.__file__ or "").read_text()
        for module in (lease_model, lease_daemon, lease_shepherd, lease_database)
    )
    assert set(re.findall(r'has\(\s*"(\w+)"', text)) == RULES.keys()
    assert {rule.setting for rule in RULES.values()} <= SETTINGS.keys()


# --- the search itself ------------------------------------------------------------------------------------------------


class Counter:
    """Counts up to 6, in ones and in threes; 5 is a dead end; a fault leads from 5 to 6, which is the goal."""

    def __init__(self, wrong: int | None = None) -> None:
        self._wrong = wrong

    def first(self) -> int:
        return 0

    def steps(self, state: int) -> Iterator[Step[int]]:
        if state < 5:
            yield Step("one", state + 1)
        if state <= 3:
            yield Step("three", state + 3)
        if state == 5:
            yield Step("luck", 6, True)

    def wrong(self, state: int) -> str | None:
        return "bad" if state == self._wrong else None

    def is_goal(self, state: int) -> bool:
        return state == 6


def test_the_first_trace_that_is_found_is_a_shortest_one() -> None:
    found = search(Counter(wrong=4))
    assert found.trace is not None
    assert found.trace.text() == "bad\n   1  one\n   2  three"


def test_a_state_that_reaches_the_goal_by_a_fault_only_is_stuck() -> None:
    found = search(Counter())
    assert (found.states, found.edges) == (7, 10)
    assert found.trace is not None and found.trace.steps[-1].state in (4, 5)
    assert search(Counter(), progress=False).trace is None
