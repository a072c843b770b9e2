"""The socket is taken over from the dead, never from the living; nothing that is not a dead socket is removed."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from control_world import World

from supervisor.actors.control_socket import SocketTaken, inherit, listen
from supervisor.client import Client
from supervisor.framing import DaemonUnreachable
from supervisor.model.errors import InvalidInput


@pytest.fixture
def path(short_tmp: Path) -> Path:
    return short_tmp / "run" / "control.sock"


def test_it_makes_its_directory_and_anyone_may_connect_whatever_the_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        listener = listen(str(path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert not os.get_inheritable(listener.socket.fileno())
    listener.close()
    assert not path.exists()


def test_the_socket_of_a_dead_daemon_is_taken_over(path: Path) -> None:
    path.parent.mkdir()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.listen()
    dead.close()
    listen(str(path), 0o660).close()


def test_a_living_daemons_socket_is_left_alone(path: Path) -> None:
    first = listen(str(path))
    with pytest.raises(SocketTaken, match="another bsup daemon"):
        listen(str(path))
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
    first.close()
    listen(str(path)).close()


def test_another_programs_socket_is_left_alone_even_with_its_backlog_full(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(str(path))
        other.listen(0)
        waiting.connect(str(path))
        with pytest.raises(SocketTaken, match="another program"):
            listen(str(path))
    assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_not_a_socket_is_left_alone(path: Path, kind: str) -> None:
    path.parent.mkdir()
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to("/etc/passwd")
    with pytest.raises(SocketTaken, match="not a socket"):
        listen(str(path))
    assert os.path.lexists(path)


def test_closing_leaves_a_socket_that_another_made_meanwhile(path: Path) -> None:
    listener = listen(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        listener.close()
        assert path.exists()


def test_a_path_too_long_is_said_so(short_tmp: Path) -> None:
    with pytest.raises(InvalidInput, match="107 bytes"):
        listen(str(short_tmp / ("x" * 120)))


def test_a_socket_of_the_service_manager_is_used_and_its_path_kept(path: Path) -> None:
    path.parent.mkdir()
    given = socket.socket(socket.AF_UNIX)
    given.bind(str(path))
    given.listen()
    with given:
        for _ in range(2):
            listener = inherit(given.fileno())
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))
                listener.socket.accept()[0].close()
            assert listener.path == str(path)
            listener.close()
    assert path.exists()


def test_a_descriptor_that_does_not_listen_is_refused() -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        with pytest.raises(InvalidInput, match="not a listening"):
            inherit(here.fileno())
        here.send(b"still open")
    with pytest.raises(InvalidInput, match="not a socket"), Path("/dev/null").open() as null:
        inherit(null.fileno())


@pytest.mark.anyio
async def test_the_socket_goes_with_the_actor(world: World) -> None:
    async with world.serve(), Client(world.path) as client:
        await client.version()
    with pytest.raises(DaemonUnreachable, match="No such file"):
        await Client(world.path).__aenter__()
    async with world.serve(), Client(world.path) as client:
        await client.version()
