"""Fixtures of the chaos tests: worlds (see ``world``), each on a database of its own whose schema is made already."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
sys.path.insert(0, str(Path(__file__).parent))

from world import World

from supervisor.store.migrate import ensure_schema

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They need root: jobs have users of their own, so that what is shown holds for a host as it is meant to be."""
    for item in items:
        if HERE in item.path.parents and "world" in "".join(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def migrated(make_session_database: Any) -> str:
    """A database with the schema, to make others from."""
    dsn: str = make_session_database()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(ensure_schema(dsn, True, connect_timeout=10))).result()
    return dsn


@pytest.fixture
def make_world(make_database: Any, migrated: str) -> Iterator[Callable[..., World]]:
    """``make_world()``: a world on a database of its own; ``make_world(dsn)``: on that one, whose schema is there."""
    made: list[World] = []

    def make(dsn: str | None = None) -> World:
        made.append(World(dsn or make_database(migrated)))
        return made[-1]

    yield make
    for world in made:
        for host in world.hosts.values():
            print(f"--- daemon {host.name}\n{host.tail()}")  # shown by pytest where the test failed
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
