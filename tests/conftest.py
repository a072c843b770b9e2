"""What every test may use: the async backend, a PostgreSQL, and ``require`` for parts that a machine may lack.

The server is the embedded one, one per pytest worker, with ``fsync`` off; ``BSUP_TEST_DSN`` names another (its user
must be allowed to create databases and roles). Each test that asks for ``dsn`` gets a database of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from supervisor.store import embedded


def everything_required() -> bool:
    """In CI a part that is missing is a fault of CI, not a reason to pass over what it was to show."""
    return os.environ.get("CI") == "true" or os.environ.get("BSUP_REQUIRE_ALL") == "1"


def require(part: str, present: bool) -> None:
    """Skips the test if ``part`` ("docker", "root" …) is not ``present``; where everything is required, fails it."""
    if present:
        return
    if everything_required():
        pytest.fail(f"this machine lacks {part}, which this test needs")
    pytest.skip(f"needs {part}")


PARTS: dict[str, Callable[[], bool]] = {
    "docker": lambda: (
        shutil.which("docker") is not None and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    ),
    "root": lambda: os.geteuid() == 0,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves ``slow`` tests out, unless they were asked for (``-m``, ``BSUP_SLOW=1``) or everything is required."""
    if config.option.markexpr or os.environ.get("BSUP_SLOW") == "1" or everything_required():
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    # A file or test named on the command line is wanted, slow or not.
    if slow and not any(Path(str(arg).partition("::")[0]).is_file() for arg in config.args):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests tell by ``record_property("told", …)``: figures that a run is looked at for."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    told = [value for report in reports for name, value in report.user_properties if name == "told"]
    if told:
        terminalreporter.section("told")
        for line in sorted(told):
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def _marked_parts(request: pytest.FixtureRequest) -> None:
    for part, present in PARTS.items():
        if request.node.get_closest_marker(part):
            require(part, present())


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory whose path is short enough for sockets and that other uids can pass (``tmp_path`` is neither)."""
    path = Path(tempfile.mkdtemp(prefix="bsup-", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def pg_server() -> Iterator[str]:
    """The DSN of a database to make others from: ``BSUP_TEST_DSN``, or that of an embedded server of this worker."""
    given = os.environ.get("BSUP_TEST_DSN")
    if given:
        yield given
        return
    state = Path(tempfile.mkdtemp(prefix="bsup-pg-", dir="/tmp"))
    state.chmod(0o711)
    settings = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200"}
    try:
        yield embedded.ensure_running(state, settings=settings)
    finally:
        embedded.stop(state)
        shutil.rmtree(state, ignore_errors=True)


class MakeDatabase(Protocol):
    def __call__(self, template: str | None = None) -> str:
        """A new database, empty or a copy of ``template`` (a DSN from here with no connections); returns its DSN."""
        ...


@contextlib.contextmanager
def _databases(server: str) -> Iterator[MakeDatabase]:
    made: list[str] = []

    def make(template: str | None = None) -> str:
        name = f"t_{uuid.uuid4().hex[:16]}"
        source = database_name(template) if template else "template0"
        _execute(server, f'CREATE DATABASE "{name}" TEMPLATE "{source}"')
        made.append(name)
        return with_database(server, name)

    try:
        yield make
    finally:
        if made:
            _execute(server, *[f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)' for name in made])


@pytest.fixture
def make_database(pg_server: str) -> Iterator[MakeDatabase]:
    """Makes databases that are dropped after the test."""
    with _databases(pg_server) as make:
        yield make


@pytest.fixture(scope="session")
def make_session_database(pg_server: str) -> Iterator[MakeDatabase]:
    """Makes databases that live as long as the session: for templates."""
    with _databases(pg_server) as make:
        yield make


@pytest.fixture
def dsn(make_database: MakeDatabase) -> str:
    """The DSN of an empty database of this test's own."""
    return make_database()


def with_database(dsn: str, name: str) -> str:
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))


def database_name(dsn: str) -> str:
    return urlsplit(dsn).path.lstrip("/")


def _execute(dsn: str, *statements: str) -> None:
    async def execute() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    _in_own_loop(execute)


def _in_own_loop(work: Callable[[], Awaitable[Any]]) -> Any:
    """Fixtures here are synchronous, and a test's own loop may exist already: so a thread with a loop of its own."""

    async def run() -> Any:
        return await work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(run())).result()
