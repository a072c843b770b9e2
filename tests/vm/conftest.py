"""Fixtures of the tests in whole machines. Each test boots its own: they share nothing, and may run beside one another.

A machine's directory is on a real disk, and short: it holds sockets.
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))
sys.path.insert(0, str(Path(__file__).parent))

from image import missing
from machine import Machine
from world import World


@pytest.fixture
def make_machine() -> Iterator[Callable[..., Machine]]:
    """``make_machine(name)``: a machine, off, with a disk of its own. Its power is cut and its disk removed
    afterwards."""
    lacks = missing()
    require(", ".join(lacks) or "qemu", not lacks)
    made: list[Machine] = []

    def make(name: str = "vm", **kw: Any) -> Machine:
        made.append(Machine(Path(tempfile.mkdtemp(prefix="bsup-vm-", dir="/var/tmp")), name, **kw))
        return made[-1]

    yield make
    for machine in made:
        print(machine.story())  # shown by pytest where the test failed
        machine.cut()
        shutil.rmtree(machine.directory)


@pytest.fixture
def make_world() -> Iterator[Callable[[str], World]]:
    """``make_world(dsn)``: a world (see ``tests/chaos/world.py``) on a database that is there already."""
    made: list[World] = []

    def make(dsn: str) -> World:
        made.append(World(dsn))
        return made[-1]

    yield make
    for world in made:
        for host in world.hosts.values():
            print(f"--- daemon {host.name}\n{host.tail()}")  # shown by pytest where the test failed
        world.close()


@pytest.fixture
def free_port() -> int:
    """A port of this computer's loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
