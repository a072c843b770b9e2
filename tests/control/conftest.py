"""The control socket for real, on fakes: a store in memory, and a dispatcher and a root that only answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from control_world import World


@pytest.fixture
def world(short_tmp: Path) -> Iterator[World]:
    yield World(str(short_tmp / "control.sock"))
