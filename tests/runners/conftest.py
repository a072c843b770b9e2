"""Fixtures of the runners' tests: a world of repositories, and a runner with a real shepherd."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from checkout_world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(params=["mirrors", "no mirrors"])
def either(request: pytest.FixtureRequest, world: World) -> World:
    """With the host's mirrors and without: what comes out is the same."""
    world.mirrors = request.param == "mirrors"
    return world
