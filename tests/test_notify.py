"""The service manager is told what it can use, and can't harm the daemon."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.notify import SystemdNotifier
from supervisor.ports import Notifier


@pytest.fixture
def manager(short_tmp: Path) -> Iterator[socket.socket]:
    """A service manager's end of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(short_tmp / "notify"))
        sock.setblocking(False)
        yield sock


def test_without_a_service_manager_it_does_nothing() -> None:
    notifier: Notifier = SystemdNotifier({})
    notifier.ready()
    notifier.status("idle")
    assert not SystemdNotifier({}).enabled
    assert not SystemdNotifier({"NOTIFY_SOCKET": "vsock:2:1"}).enabled


def test_each_word_arrives(manager: socket.socket) -> None:
    notifier = SystemdNotifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready()
    assert manager.recv(4096) == b"READY=1"
    notifier.status("2 jobs\nrunning")
    assert manager.recv(4096) == b"STATUS=2 jobs running"
    notifier.reloading()
    first, second = manager.recv(4096).split(b"\n")
    assert first == b"RELOADING=1"
    assert second.startswith(b"MONOTONIC_USEC=")
    notifier.alive()
    assert manager.recv(4096) == b"WATCHDOG=1"
    notifier.stopping()
    assert manager.recv(4096) == b"STOPPING=1"


def test_an_abstract_socket_is_reached() -> None:
    name = f"bsup-notify-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        SystemdNotifier({"NOTIFY_SOCKET": "@" + name}).ready()
        assert sock.recv(4096) == b"READY=1"


def test_a_manager_that_is_gone_or_does_not_read_harms_nobody(manager: socket.socket, short_tmp: Path) -> None:
    """More than its queue holds is dropped, and nothing blocks."""
    notifier = SystemdNotifier({"NOTIFY_SOCKET": manager.getsockname()})
    for _ in range(1000):
        notifier.status("x" * 1000)
    SystemdNotifier({"NOTIFY_SOCKET": str(short_tmp / "nobody")}).ready()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_the_watchdog_is_mine_or_none(environ: dict[str, str], seconds: float | None) -> None:
    assert SystemdNotifier(environ).watchdog == seconds
