"""Keepalive and user timeout: what a DSN asks for, on both ends. That they notice a black hole: ``tests/chaos``."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from supervisor.store.dsn import parse
from supervisor.store.liveness import Liveness, liveness


class Transport:
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def get_extra_info(self, name: str) -> socket.socket | None:
        return self._socket if name == "socket" else None


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        yield sock


def options(sock: socket.socket) -> list[int]:
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    return [sock.getsockopt(socket.IPPROTO_TCP, name) for name in names]


def test_a_silent_end_is_noticed_within_seconds_unless_the_dsn_says_otherwise(tcp: socket.socket) -> None:
    Liveness().set_on(Transport(tcp))
    assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert options(tcp) == [3, 1, 3, 5000]
    asked = parse("host=db keepalives_idle=60 keepalives_interval=5 keepalives_count=2 tcp_user_timeout=90000")
    liveness(asked.options).set_on(Transport(tcp))
    assert options(tcp) == [60, 5, 2, 90_000]
    assert "keepalives" not in asked.url() and "tcp_user_timeout" not in asked.url()


def test_it_can_be_left_to_the_machine(tcp: socket.socket) -> None:
    before = options(tcp)
    none = liveness(parse("host=db keepalives=0 keepalives_idle=0 tcp_user_timeout=0").options)
    none.set_on(Transport(tcp))
    assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    assert options(tcp)[0] == before[0] and options(tcp)[3] == before[3]
    assert none.settings() == {}


def test_the_server_is_told_to_be_twice_as_patient() -> None:
    assert Liveness().settings() == {
        "tcp_keepalives_idle": "6",
        "tcp_keepalives_interval": "2",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "10000",
    }


def test_no_number_is_more_than_the_kernel_takes(tcp: socket.socket) -> None:
    most = liveness(parse("host=db keepalives_idle=999999 keepalives_count=999999 tcp_user_timeout=999999999").options)
    most.set_on(Transport(tcp))
    assert options(tcp)[0] == 16_000


def test_a_unix_socket_is_left_alone() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        Liveness().set_on(Transport(sock))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
