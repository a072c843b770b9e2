"""Peers that misbehave harm nobody but themselves; those that behave oddly still get what the wire promises them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack

import anyio
import pytest
import uvloop
from anyio.lowlevel import checkpoint
from control_world import SPEC, RawPeer, World, job_row, parameters

from supervisor.actors.control_connection import Limits
from supervisor.client import Client
from supervisor.framing import DaemonUnreachable
from supervisor.model.errors import Busy, InvalidInput, PermissionDenied
from supervisor.model.job import JobRow, State
from supervisor.protocol import METHODS, Role

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    """The daemon runs on uvloop, which has its own way with sockets."""
    return "asyncio", {"loop_factory": uvloop.new_event_loop} if request.param == "uvloop" else {}


async def until(true: Callable[[], bool]) -> None:
    """Lets the loop run until something is so."""
    with anyio.fail_after(30):
        while not true():
            await checkpoint()


async def test_pipelined_calls_are_answered_in_order(world: World) -> None:
    world.store.add(job_row(1))
    async with world.serve(), RawPeer.connect(world.path) as peer:
        peer.call("Version")
        peer.call("List", more=True)
        peer.call("Show", {"id": 99})
        peer.call("Version")
        assert "version" in parameters(await peer.reply())
        assert [parameters(reply)["job"] is None for reply in await peer.replies()] == [False, True]
        unknown = await peer.reply()
        assert unknown is not None and unknown.error == "io.bsup.Supervisor.UnknownJob"
        assert parameters(unknown) == {"job": 99}
        assert "version" in parameters(await peer.reply())


async def test_a_flood_of_pipelined_calls_is_answered_in_full(world: World) -> None:
    """More than is kept at once: the rest waits in the socket, nothing is lost."""
    world.limits = Limits(max_frame=4096)
    world.store.add(*[job_row(n) for n in range(1, 301)])
    async with world.serve(), RawPeer.connect(world.path) as peer:
        for job in range(1, 301):
            peer.call("Show", {"id": job})
        assert [parameters(await peer.reply())["job"]["id"] for _ in range(300)] == list(range(1, 301))


@pytest.mark.parametrize("garbage", [b"hello\0", b"\0", b"[1]\0", b"\xff\xfe\0", b'{"method": 3}\0'])
async def test_garbage_is_answered_once_and_the_connection_closed(world: World, garbage: bytes) -> None:
    async with world.serve(), RawPeer.connect(world.path) as peer:
        peer.call("Version")
        peer.send(garbage)
        peer.call("Version")
        assert "version" in parameters(await peer.reply())
        refusal = await peer.reply()
        assert refusal is not None and refusal.error == "io.bsup.Supervisor.InvalidInput"
        assert parameters(refusal)["field"] == "frame"
        assert await peer.reply() is None
        async with Client(world.path) as client:
            assert (await client.status()).socket.refused == {"garbage": 1}


async def test_a_frame_too_large_is_refused_and_what_came_before_it_is_answered(world: World) -> None:
    async with world.serve(), RawPeer.connect(world.path) as peer:
        peer.call("Version")
        peer.send(b"x" * ((1 << 20) + 100_000))
        assert "version" in parameters(await peer.reply())
        refusal = await peer.reply()
        assert refusal is not None and "1048576 bytes" in parameters(refusal)["problem"]
        assert await peer.reply() is None
        async with Client(world.path) as client:
            with pytest.raises(InvalidInput, match="too large"):
                await client.submit({**SPEC, "files": {"a": "x" * (1 << 20)}})
            assert (await client.status()).socket.refused == {"frame too large": 1}


async def test_a_peer_that_reads_nothing_is_dropped_while_others_are_served_and_rows_stay_unread(world: World) -> None:
    """Rows are taken from the store only as fast as the peer reads: what it costs is one reply."""
    world.limits = Limits(slow_timeout=0.2)
    taken = 0
    over = anyio.Event()

    async def rows() -> AsyncGenerator[JobRow, None]:
        nonlocal taken
        try:
            while True:
                taken += 1
                yield job_row(taken)
        finally:
            over.set()

    world.store.rows = rows()
    async with world.serve(), RawPeer.connect(world.path) as deaf, Client(world.path) as client:
        deaf.call("List", more=True)
        await until(lambda: taken > 0)
        # As long as it is not dropped, others are answered.
        while not over.is_set():
            assert (await client.version()).version
        # What fits into the kernel's buffer and the test's own reader, not the endless list.
        assert taken < 3000
        assert (await client.status()).socket.refused == {"slow": 1}


async def test_an_idle_peer_is_dropped_but_not_one_whose_call_runs(world: World) -> None:
    world.limits = Limits(idle_timeout=0.05)
    world.store.add(job_row(1))
    async with world.serve(), RawPeer.connect(world.path) as idle, RawPeer.connect(world.path) as waiting:
        waiting.call("Wait", {"ids": [1]}, more=True)
        idle.send(b'{"method": "half a fr')
        assert await idle.reply() is None
        world.store.change(1, state=State.FAILED, exit_code=1)
        assert parameters(await waiting.reply())["job"]["exit_code"] == 1


async def test_the_client_notices_that_it_was_dropped_for_idling_and_connects_again(world: World) -> None:
    world.limits = Limits(idle_timeout=0.05)
    async with world.serve(), Client(world.path) as client:
        await client.version()
        assert world.control is not None
        control = world.control
        await until(lambda: control._view().connections == 0)
        assert (await client.version()).version


async def test_a_peer_that_goes_ends_its_running_call(world: World) -> None:
    world.store.add(job_row(1))
    async with world.serve():
        async with RawPeer.connect(world.path) as peer:
            peer.call("Wait", {"ids": [1]}, more=True)
            await world.store.asked_states.wait()
            assert len(world.store._tells) == 1
        await until(lambda: not world.store._tells)
        async with Client(world.path) as client:
            await until(lambda: world.control is not None and world.control._view().connections == 1)
            assert (await client.status()).socket.refused == {}


async def test_a_peer_that_only_stopped_writing_gets_its_answers(world: World) -> None:
    """As ``printf … | socat - UNIX:…`` does."""
    world.store.add(job_row(1))
    async with world.serve(), RawPeer.connect(world.path) as peer:
        peer.call("Wait", {"ids": [1]}, more=True)
        peer.call("Version")
        peer.shut_down()
        await world.store.asked_states.wait()
        world.store.change(1, state=State.SUCCEEDED)
        assert parameters(await peer.reply())["job"]["state"] == "succeeded"
        assert len(await peer.replies()) == 1
        assert "version" in parameters(await peer.reply())
        assert await peer.reply() is None


async def test_connections_of_one_user_and_of_all_are_limited(world: World) -> None:
    world.limits = Limits(max_connections_per_uid=3)
    async with world.serve(), AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(RawPeer.connect(world.path)) for _ in range(3)]
        for peer in peers:
            peer.call("Version")
            assert "version" in parameters(await peer.reply())
        async with Client(world.path) as client:
            with pytest.raises(Busy, match="3 connections"):
                await client.version()
        await stack.aclose()
        control = world.control
        assert control is not None
        await until(lambda: control._view().connections == 0)
        async with Client(world.path) as client:
            assert (await client.status()).socket.refused == {"too many connections": 1}


async def test_what_varlink_answers_for_itself(world: World) -> None:
    world.store.add(job_row(1))
    async with world.serve(), RawPeer.connect(world.path) as peer:
        for method, more, error, said in [
            ("List", False, "ExpectedMore", {}),
            ("Fly", False, "MethodNotFound", {"method": "io.bsup.Supervisor.Fly"}),
            ("org.example.Thing.Do", False, "InterfaceNotFound", {"interface": "org.example.Thing"}),
            ("nodots", False, "MethodNotFound", {"method": "io.bsup.Supervisor.nodots"}),
            ("org.varlink.service.Nothing", False, "MethodNotFound", {"method": "org.varlink.service.Nothing"}),
            ("org.varlink.service.GetInterfaceDescription", False, "InvalidParameter", {"parameter": "interface"}),
        ]:
            peer.call(method, more=more)
            reply = await peer.reply()
            assert reply is not None and (reply.error, parameters(reply)) == (f"org.varlink.service.{error}", said)
        peer.call("Version", more=True)
        assert len(await peer.replies()) == 1
        peer.call("Submit", {"spec": SPEC}, oneway=True)
        peer.call("Show", {"id": 77}, oneway=True)
        peer.call("Show", {"id": 2})
        assert parameters(await peer.reply())["job"]["id"] == 2


@pytest.mark.parametrize("role", [None, *Role])
async def test_each_role_may_call_what_its_methods_name(world: World, role: Role | None) -> None:
    """Denied before its parameters are looked at; nothing is changed. Introspection is for everybody."""
    world.as_role(role, "bob")
    denied = set()
    async with world.serve(), RawPeer.connect(world.path) as peer:
        peer.call("org.varlink.service.GetInfo")
        assert "io.bsup.Supervisor" in parameters(await peer.reply())["interfaces"]
        for name, method in METHODS.items():
            peer.call(name, {"no such": 1}, more=method.more)
            (reply,) = await peer.replies()
            assert reply.error in ("io.bsup.Supervisor.InvalidInput", "io.bsup.Supervisor.PermissionDenied")
            if reply.error.endswith("PermissionDenied"):
                assert "bob" in parameters(reply)["message"] and name in parameters(reply)["message"]
                denied.add(name)
    assert denied == {name for name, method in METHODS.items() if role is None or method.role > role}
    assert world.store.calls == []


async def test_a_viewer_that_stops_a_job_is_denied_and_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.as_role(Role.VIEWER, "bob")
    world.store.add(job_row(1))
    async with world.serve(), Client(world.path) as client:
        with pytest.raises(PermissionDenied, match="bob is viewer"):
            [one async for one in client.stop([1])]
        assert (await client.status()).socket.refused == {"denied": 1}
    assert world.store.calls == []
    assert any("bob" in line and "Stop" in line for line in (record.getMessage() for record in caplog.records))


async def test_a_stream_left_early_ends_in_the_daemon_and_the_client_goes_on(world: World) -> None:
    world.store.add(job_row(1))
    async with world.serve(), Client(world.path) as client:
        waiting = client.wait([1])
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                await anext(waiting)

            tasks.start_soon(wait)
            await world.store.asked_states.wait()
            assert len(await gather(client)) == 20
            tasks.cancel_scope.cancel()
        await waiting.aclose()
        await until(lambda: not world.store._tells)
        assert (await client.version()).version


async def gather(client: Client) -> list[str]:
    """Concurrent calls on one client."""
    return [reply.version for reply in await asyncio.gather(*(client.version() for _ in range(20)))]


async def test_no_daemon_is_said_as_such(world: World) -> None:
    with pytest.raises(DaemonUnreachable, match=r"control\.sock"):
        async with Client(world.path):
            pass
    async with world.serve():
        client = Client(world.path)
        await client.__aenter__()
    with pytest.raises(DaemonUnreachable):
        await client.version()
    await client.__aexit__(None, None, None)
