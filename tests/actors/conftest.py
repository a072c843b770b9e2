"""Actor tests run on a loop whose clock is virtual: time passes when nothing else can happen. So they never sleep."""

from __future__ import annotations

from typing import Any

import pytest

from tests.actors.virtual_loop import VirtualLoop


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}
