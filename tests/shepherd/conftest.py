"""Yards: a shepherd each. After a test it is checked that no process and no descriptor is left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from yard import Yard, children, open_files, until


@pytest.fixture
def make_yard(short_tmp: Path) -> Iterator[Callable[..., Yard]]:
    """Makes yards whose shepherd is not started yet."""
    made: list[Yard] = []

    def make(**options: Any) -> Yard:
        state = short_tmp / f"s{len(made)}"
        state.mkdir()
        state.chmod(0o711)
        made.append(Yard(state, **options))
        return made[-1]

    yield make
    for yard in made:
        yard.shut_down()


@pytest.fixture(params=[pytest.param(True, marks=pytest.mark.root, id="uids"), pytest.param(False, id="shared")])
def yard(request: pytest.FixtureRequest, make_yard: Callable[..., Yard]) -> Iterator[Yard]:
    """A running shepherd, twice: with a uid for each job (root only), and with one uid for all."""
    yield from _checked(make_yard(with_uids=request.param))


@pytest.fixture
def shared_yard(make_yard: Callable[..., Yard]) -> Iterator[Yard]:
    """A running shepherd whose jobs have its own uid."""
    yield from _checked(make_yard(with_uids=False))


@pytest.fixture
def uid_yard(make_yard: Callable[..., Yard]) -> Iterator[Yard]:
    """A running shepherd with a uid for each job: for tests marked ``root``."""
    yield from _checked(make_yard(with_uids=True))


def _checked(yard: Yard) -> Iterator[Yard]:
    yard.launch()
    yard.link.ask(do="status")
    before = open_files(yard.pid)
    yield yard
    assert yard.link.ask(do="status")["live"] == []
    # The launcher reaps a moment after the shepherd has said that all is over.
    until(lambda: children(yard.pid) == [], "no process is left")
    until(lambda: open_files(yard.pid) == before, "no descriptor is left")
