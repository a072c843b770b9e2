"""The database away, back, gone read-only, or waiting for a lock: what the store says, and that it finds back."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from urllib.parse import parse_qs, urlsplit

import anyio
import anyio.abc
import asyncpg
import pytest

from supervisor.model.errors import InvalidInput, StoreUnavailable
from supervisor.model.job import Me, Outcome
from supervisor.store.pg import PgStore
from tests.store.store_bench import TERM, Daemon, add, end_of, spec

pytestmark = pytest.mark.anyio


class Gate:
    """A TCP port in front of the server that can be shut, opened, and made to swallow everything."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self.port = 0
        self.shut = False
        self._swallowing = anyio.Event()
        self._open: set[anyio.abc.ByteStream] = set()

    @property
    def dsn(self) -> str:
        user = self._target.username or ""
        password = f":{self._target.password}" if self._target.password else ""
        return f"postgresql://{user}{password}@127.0.0.1:{self.port}{self._target.path}"

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        self.port = listener.extra(anyio.abc.SocketAttribute.local_port)
        task_status.started()
        await listener.serve(self._serve)

    async def close_all(self) -> None:
        """As if the server had been stopped."""
        self.shut = True
        for stream in list(self._open):
            await stream.aclose()

    def swallow(self) -> None:
        """As if a cable had been pulled."""
        self._swallowing.set()

    async def _serve(self, client: anyio.abc.ByteStream) -> None:
        async with client:
            if self.shut:
                return
            async with await self._connect() as server:
                self._open |= {client, server}
                try:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._copy, client, server, tasks.cancel_scope)
                        tasks.start_soon(self._copy, server, client, tasks.cancel_scope)
                finally:
                    self._open -= {client, server}

    async def _connect(self) -> anyio.abc.ByteStream:
        query = parse_qs(self._target.query)
        if "host" in query:
            return await anyio.connect_unix(f"{query['host'][0]}/.s.PGSQL.{query.get('port', ['5432'])[0]}")
        return await anyio.connect_tcp(self._target.hostname or "localhost", self._target.port or 5432)

    async def _copy(self, source: anyio.abc.ByteStream, sink: anyio.abc.ByteStream, both: anyio.CancelScope) -> None:
        try:
            async for data in source:
                if self._swallowing.is_set():
                    await anyio.sleep_forever()
                await sink.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            pass
        both.cancel()


@pytest.fixture
async def gate(migrated_dsn: str) -> AsyncIterator[Gate]:
    made = Gate(migrated_dsn)
    async with anyio.create_task_group() as tasks:
        await tasks.start(made.run)
        yield made
        tasks.cancel_scope.cancel()


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


async def until(condition: Callable[[], object]) -> None:
    """Lets others run until it holds: what a test can't be told of. The deadline is for a test that fails."""
    with anyio.fail_after(20):
        while not condition():
            await anyio.lowlevel.checkpoint()


class TestAway:
    async def test_it_opens_while_the_database_is_away_and_finds_it_later(self, gate: Gate) -> None:
        gate.shut = True
        async with PgStore(gate.dsn) as store:
            for _ in range(2):
                with pytest.raises(StoreUnavailable):
                    await store.needs(0)
            health = store.health()
            assert not health.available and health.error and health.server is None
            gate.shut = False
            assert await store.needs(0) == []
            health = store.health()
            assert health.available and health.error is None and health.server is not None
            assert health.server.startswith("PostgreSQL ") and health.round_trips == 1

    async def test_a_refused_connection_says_so(self) -> None:
        async with PgStore(f"postgresql://x@127.0.0.1:{closed_port()}/x") as store:
            with pytest.raises(StoreUnavailable, match="connect: "):
                await store.hosts()

    async def test_an_error_of_the_caller_leaves_it_as_it_is(self, migrated_dsn: str) -> None:
        with pytest.raises(KeyError, match="mine"):
            async with PgStore(migrated_dsn) as store:
                await store.hosts()
                raise KeyError("mine")

    async def test_a_dsn_that_can_not_be_read_is_the_callers_fault(self) -> None:
        with pytest.raises(InvalidInput):
            PgStore("postgresql://x/y?colour=red")

    async def test_it_goes_on_after_an_outage(self, gate: Gate) -> None:
        async with PgStore(gate.dsn) as store:
            daemon = await Daemon.begin(store)
            await add(store)
            lease = await daemon.claim_one()
            await gate.close_all()
            with pytest.raises(StoreUnavailable):
                await daemon.finish(lease)
            assert not store.health().available
            gate.shut = False
            assert await daemon.finish(lease) == (True, "succeeded")

    async def test_a_server_that_swallows_everything_is_noticed(self, gate: Gate) -> None:
        async with PgStore(gate.dsn, connect_timeout=1.0, statement_timeout=0.3) as store:
            await store.needs(0)
            gate.swallow()
            with pytest.raises(StoreUnavailable, match="in time"):
                await store.set_idle(Me("0" * 32, "0" * 32, 1), True)

    async def test_a_host_of_the_dsn_that_is_away_does_not_keep_the_others_from_being_asked(self, gate: Gate) -> None:
        dead = f"127.0.0.1:{closed_port()}"
        dsn = gate.dsn.replace("@", f"@{dead},") + "?target_session_attrs=read-write"
        async with PgStore(dsn) as store:
            assert await store.needs(0) == []

    async def test_a_host_that_swallows_everything_is_asked_last_by_who_could_not_wait(self, gate: Gate) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            dsn = gate.dsn.replace("@", f"@127.0.0.1:{silent.getsockname()[1]},")
            async with PgStore(dsn, connect_timeout=30.0) as store:
                with anyio.move_on_after(0.2) as scope:
                    await store.hosts()
                assert scope.cancelled_caught
                with anyio.fail_after(20):
                    assert await store.hosts() == []

    async def test_idle_connections_that_died_cost_a_reader_nothing(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        await store.hosts()
        await kill_others(sql)
        assert await store.hosts() == []


async def kill_others(sql: asyncpg.Connection) -> None:
    await sql.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


class TestReadOnly:
    async def test_a_server_gone_read_only_is_unavailable_and_left(
        self, migrated_dsn: str, sql: asyncpg.Connection
    ) -> None:
        """A former primary: the next call connects anew, and finds the new one through the DSN."""
        database = await sql.fetchval("SELECT current_database()")
        await sql.execute(f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
        try:
            async with PgStore(migrated_dsn) as store:
                with pytest.raises(StoreUnavailable, match="read-only"):
                    await store.submit(spec(), key=None, after=[], submitter="x")
                await sql.execute(f'ALTER DATABASE "{database}" RESET default_transaction_read_only')
                await store.submit(spec(), key=None, after=[], submitter="x")
        finally:
            await sql.execute(f'ALTER DATABASE "{database}" RESET default_transaction_read_only')

    async def test_read_write_is_asked_of_a_single_host_too(self, gate: Gate, sql: asyncpg.Connection) -> None:
        database = await sql.fetchval("SELECT current_database()")
        await sql.execute(f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
        try:
            async with PgStore(gate.dsn + "?target_session_attrs=read-write") as store:
                with pytest.raises(StoreUnavailable):
                    await store.hosts()
        finally:
            await sql.execute(f'ALTER DATABASE "{database}" RESET default_transaction_read_only')


class TestLocks:
    async def test_a_lock_that_is_not_given_in_time_is_unavailable_and_nothing_is_lost(
        self, migrated_dsn: str, sql: asyncpg.Connection
    ) -> None:
        async with PgStore(migrated_dsn, statement_timeout=0.5) as store:
            daemon = await Daemon.begin(store)
            locked, free = await add(store, 2)
            leases = await daemon.claim()
            async with sql.transaction():
                await sql.execute("SELECT FROM bsup.lease WHERE job_id = $1 FOR KEY SHARE", locked)
                with pytest.raises(StoreUnavailable):
                    await store.finish(daemon.me, [end_of(lease) for lease in leases])
                # The other one's end was recorded all the same; a busy dispatch starves no renewal.
                (row,) = await store.states([free])
                assert row.state == "succeeded"
                assert (await store.renew(daemon.me, TERM, False)).count == 1
            verdicts = await store.finish(daemon.me, [end_of(lease, Outcome.FAILED) for lease in leases])
            assert [verdict.state for verdict in verdicts] == ["failed", "succeeded"]

    async def test_a_call_that_is_cancelled_leaves_the_store_usable(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        await Daemon.begin(store)
        async with sql.transaction():
            await sql.execute("LOCK bsup.pulse")
            with anyio.move_on_after(0.1) as scope:
                await store.pulse(TERM)
            assert scope.cancelled_caught
        await store.pulse(TERM)


class TestWaking:
    async def test_ready_jobs_and_stops_wake_who_waits(self, store: PgStore, other: PgStore) -> None:
        heard: list[str] = []
        forget = other.on_wake(heard.append)
        await until(lambda: other.health().listening)
        heard.clear()
        daemon = await Daemon.begin(store)
        await add(store)
        # Nobody said that he waits; the next notification shows that none came before it.
        await store.set_idle(daemon.me, True)
        (second,) = await add(store)
        await until(lambda: heard)
        await daemon.claim(1)
        await daemon.claim(1)
        await store.stop([second], grace=None, kill=False, by="x")
        await until(lambda: "stop" in heard)
        assert heard == ["ready", "stop"]
        forget()
        await add(store)
        await store.stop([second], grace=None, kill=False, by="x")
        assert heard == ["ready", "stop"]

    async def test_one_notification_a_transaction(
        self, store: PgStore, other: PgStore, sql: asyncpg.Connection
    ) -> None:
        heard: list[str] = []
        other.on_wake(heard.append)
        await until(lambda: other.health().listening)
        heard.clear()
        daemon = await Daemon.begin(store)
        await store.set_idle(daemon.me, True)
        async with sql.transaction():
            for _ in range(5):
                await sql.execute("SELECT bsup.submit($1)", '{"kind": "steps", "steps": [{"name": "s", "run": "x"}]}')
        await sql.execute("NOTIFY bsup, 'end'")
        await until(lambda: "end" in heard)
        assert heard == ["ready", "end"]

    async def test_a_connection_that_listens_and_dies_is_made_again(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        heard: list[str] = []
        store.on_wake(heard.append)
        await until(lambda: store.health().listening)
        heard.clear()
        await kill_others(sql)
        # Made again, it wakes everyone for what was missed meanwhile.
        await until(lambda: heard == ["ready", "stop"])
        await sql.execute("NOTIFY bsup, 'ready'")
        await until(lambda: len(heard) == 3)

    async def test_a_connection_that_listens_and_falls_silent_is_noticed(self, gate: Gate) -> None:
        async with PgStore(gate.dsn, check_listen_every=0.1, statement_timeout=0.3, connect_timeout=1.0) as store:
            await until(lambda: store.health().listening)
            gate.swallow()
            await until(lambda: not store.health().listening)
