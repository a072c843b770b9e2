"""Actor tests run on a loop whose clock is virtual: time passes when nothing else can happen. So they never sleep."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.actors.fake_store import FakeStore
from tests.actors.fakes import FakeHost
from tests.actors.harness import Daemon
from tests.actors.in_process_world import Work
from tests.actors.virtual_loop import VirtualLoop


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture
async def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
async def work() -> Work:
    return Work()


@pytest.fixture
async def daemon(store: FakeStore, host: FakeHost, work: Work) -> AsyncIterator[Daemon]:
    """Runs jobs of kind ``steps``, and of kind ``task`` as ``work`` says."""
    running = Daemon(store, host, handlers=work.handlers).start()
    yield running
    if running.task is not None and not running.task.done():
        await running.die()
