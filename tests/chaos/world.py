"""A world of the chaos tests: one database, several daemons with short terms, and jobs that leave stamps.

Built on the end-to-end tests' harness: each daemon is a real process with a state directory of its own. Jobs are
submitted in SQL, so that they are accepted whatever state the daemons are in; what was accepted is in ``accepted``, and
``history.check(world)`` holds what has become of it.

    world = make_world()
    a, b = world.host("a"), world.host("b")
    world.submit(stamps.job(world.stamps, ticks=20))
    a.kill(); a.start()
    history.check(world)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import stamps
from harness import BSUP, Daemon, alive, until

from supervisor.client import Client
from supervisor.model.errors import BsupError

T = TypeVar("T")

HERE = Path(__file__).parent
TERMS = (0.5, 6.0, 1.5)
"""Renew, term, margin: seconds."""
PATIENT = (1.0, 60.0, 5.0)
"""With these a daemon that is restarted, on a busy machine, is back in time."""
AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a query raises while the database is away."""


def count_of(variable: str, *, ci: int) -> int:
    """How often a chaos test does what it does: as the variable says, else ``ci`` times."""
    return int(os.environ.get(variable) or ci)


class Loop:
    """An event loop in a thread of its own, for synchronous tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 60.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Database:
    """A connection that is made anew when it broke; what was asked meanwhile fails with one of ``AWAY``."""

    def __init__(self, loop: Loop, dsn: str) -> None:
        self._loop = loop
        self._dsn = dsn
        self._connection: asyncpg.Connection[Any] | None = None
        self._lock = asyncio.Lock()

    def query(self, statement: str, *args: Any) -> list[tuple[Any, ...]]:
        return self._loop.run(self._query(statement, args))

    async def _query(self, statement: str, args: Iterable[Any]) -> list[tuple[Any, ...]]:
        async with self._lock:
            if self._connection is None or self._connection.is_closed():
                self._connection = await asyncpg.connect(self._dsn, timeout=10)
            try:
                return [tuple(row) for row in await self._connection.fetch(statement, *args, timeout=30)]
            except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError):
                self._connection.terminate()
                self._connection = None
                raise

    def close(self) -> None:
        async def close() -> None:
            if self._connection is not None:
                self._connection.terminate()

        self._loop.run(close())


class Host(Daemon):
    """A daemon of a world. What it runs in front of (``prefix``: ``ip netns exec x``, ``faketime …``) and the points it
    dies at are the caller's."""

    def __init__(self, world: World, name: str, *, config: str, env: dict[str, str], prefix: tuple[str, ...]) -> None:
        super().__init__(world.root, world.dsn, name=name, config=config, env=env)
        self._world = world
        self._prefix = prefix

    def start(self, *args: str, ready: bool = True, failpoints: str = "") -> Host:
        """``failpoints``: those of this start alone."""
        words = ["--config", str(self.config), "--dsn", self.dsn]
        words += ["--state", str(self.state), "--socket", str(self.socket)]
        env = {**self.environment, **({"BSUP_FAILPOINTS": failpoints} if failpoints else {})}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._prefix, *BSUP, "daemon", *words, *args],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        if ready:
            self.until_ready()
        return self

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.env}

    def until_ready(self, deadline: float = 60.0) -> None:
        """It has its session and has compared what runs."""

        def is_ready() -> bool:
            if not self.is_up:
                assert self.process is not None
                raise AssertionError(f"daemon {self.name} ended {self.process.returncode}:\n{self.tail()}")
            status = self.status()
            actors = {} if status is None else status.actors
            return "session" in actors.get("keeper", {}) and bool(actors.get("dispatcher", {}).get("reconciled"))

        try:
            until(is_ready, f"daemon {self.name} is ready", deadline, every=0.02)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tail()}") from None

    def status(self) -> Any:
        """What ``bsup status`` asks for; None where nobody answers."""

        async def ask() -> Any:
            async with asyncio.timeout(5):
                async with Client(str(self.socket)) as client:
                    return await client.status()

        try:
            return self._world.loop.run(ask())
        except (BsupError, OSError, TimeoutError):
            return None

    @property
    def is_up(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def die(self, timeout: float = 60.0) -> int:
        """Waits for a death that is on its way (a failpoint's); its exit code."""
        assert self.process is not None
        return self.process.wait(timeout)

    @property
    def shepherd(self) -> int | None:
        """Its pid, if it lives."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.state / "shepherd.pid").read_text())
            return pid if alive(pid) else None
        return None

    @property
    def guardian(self) -> int | None:
        """The shepherd's parent, if both live."""
        return parent_of(self.shepherd)

    @property
    def launcher(self) -> int | None:
        """The parent of the jobs' processes, a child of the shepherd's."""
        with contextlib.suppress(OSError):
            for word in Path(f"/proc/{self.shepherd}/task/{self.shepherd}/children").read_text().split():
                if Path(f"/proc/{word}/comm").read_text() == "bsup-launcher\n":
                    return int(word)
        return None

    def kill_shepherd(self, *who: str) -> None:
        """Kills those of ``guardian``, ``shepherd`` and ``launcher`` that are named (none: all three) at the same
        moment: no other sees it first."""
        names = who or ("guardian", "shepherd", "launcher")
        pids = [pid for name in names if (pid := getattr(self, name)) is not None]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                _signal(pid, number)
        until(lambda: not any(map(alive, pids)), f"dead: {', '.join(names)}")

    def end(self) -> None:
        """Ends the daemon, the shepherd with its jobs, and the guardian."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        pids = [pid for pid in (self.guardian, self.shepherd) if pid is not None]
        for pid in reversed(pids):
            _signal(pid, signal.SIGCONT)
            _signal(pid, signal.SIGTERM)
        try:
            until(lambda: not any(map(alive, pids)), "the shepherd leaves", 15)
        except AssertionError:
            self.kill_shepherd()


class World:
    """``hosts`` by name. Used through the fixture ``make_world``, which closes it."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        # Not below /tmp: each job has one of its own, and the jobs share files. Short: it holds sockets.
        self.root = Path(tempfile.mkdtemp(prefix="bsup-ch-", dir="/var/tmp"))
        self.root.chmod(0o755)
        self.stamps = self.root / "stamps"
        self.stamps.mkdir()
        # No sticky bit: the runs of a job, of several users, append to one file.
        self.stamps.chmod(0o777)
        self.hosts: dict[str, Host] = {}
        self.accepted: list[int] = []
        self.may_be_killed: set[int] = set()
        """Jobs that end by a signal of their own, or of the kernel's."""
        self.loop = Loop()
        self._database = Database(self.loop, dsn)
        self._closed = False

    def host(
        self,
        name: str = "a",
        *,
        slots: int = 4,
        terms: tuple[float, float, float] = TERMS,
        jobs: str = "",
        config: str = "",
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        start: bool = True,
        args: tuple[str, ...] = (),
        failpoints: str = "",
    ) -> Host:
        """A daemon. ``jobs``: more lines of the section [jobs]; ``config``: more sections; ``env``: more variables."""
        renew, term, margin = terms
        base = uid_base(self.root, len(self.hosts))
        text = f"slots = {slots}\n[lease]\nrenew = {renew}\nterm = {term}\nmargin = {margin}\n"
        text += f'[jobs]\nuid_base = {base}\npass_env = ["{stamps.HOST}"]\n'
        text += f'kinds = {{ noop = "supervisor.kinds:noop", stamped = "stamps:stamped" }}\n{jobs}\n{config}'
        path = os.pathsep.join(filter(None, [str(HERE), (env or {}).get("PYTHONPATH"), os.environ.get("PYTHONPATH")]))
        own_env = {**(env or {}), "PYTHONPATH": path, stamps.HOST: name}
        host = self.hosts[name] = Host(self, name, config=text, env=own_env, prefix=prefix)
        if start:
            host.start(*args, failpoints=failpoints)
        return host

    # --- jobs -------------------------------------------------------------------------------------------------

    def submit(self, spec: dict[str, Any]) -> int:
        """Raises one of ``AWAY`` where the database does not take it: then it may be there, and is not counted."""
        [(job,)] = self.query("SELECT bsup.submit($1::jsonb)", json.dumps(spec))
        self.accepted.append(job)
        return int(job)

    def run(self, **work: Any) -> int:
        """Submits a process job that stamps; see ``stamps.job``."""
        return self.submit(stamps.job(self.stamps, **work))

    def run_in_process(self, **work: Any) -> int:
        return self.submit(stamps.in_process(self.stamps, **work))

    def stamps_of(self, job: int) -> list[stamps.Stamp]:
        file = self.stamps / str(job)
        return list(stamps.of_file(file)) if file.exists() else []

    def until_stamped(self, job: int, what: str = "start", attempt: int | None = None) -> stamps.Stamp:
        def found() -> stamps.Stamp | None:
            for stamp in self.stamps_of(job):
                if stamp.what == what and attempt in (None, stamp.attempt):
                    return stamp
            return None

        return until(found, f"job {job} stamps {what}", every=0.02)

    def states(self) -> dict[int, str]:
        return dict(self.query("SELECT id, state FROM bsup.jobs"))

    def state(self, job: int) -> str:
        return self.states()[job]

    def settle(self, jobs: Iterable[int] | None = None, *, deadline: float = 60.0) -> None:
        """Waits until these jobs (None: all that were accepted) have ended."""

        def unended() -> list[int]:
            wanted = list(self.accepted if jobs is None else jobs)
            try:
                rows = self.query("SELECT job_id FROM bsup.finished WHERE retried_at IS NULL")
            except AWAY:
                return wanted or [0]
            ended = {row[0] for row in rows}
            return [job for job in wanted if job not in ended]

        left = unended()

        def is_settled() -> bool:
            nonlocal left
            left = unended()
            return not left

        try:
            until(is_settled, "all jobs have ended", deadline, every=0.1)
        except AssertionError:
            raise AssertionError(f"not within {deadline} s: {len(left)} jobs have not ended: {left[:20]}") from None

    def query(self, statement: str, *args: Any) -> list[tuple[Any, ...]]:
        """Rows of the world's database. Raises one of ``AWAY`` where it does not answer."""
        return self._database.query(statement, *args)

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        for host in self.hosts.values():
            host.end()
        self._database.close()
        self.loop.close()
        shutil.rmtree(self.root, ignore_errors=True)


class Load:
    """Submits what ``make`` gives, at a steady pace, until it is left: ``with Load(world, make, every=0.1):``."""

    def __init__(self, world: World, make: Callable[[int], dict[str, Any]], *, every: float) -> None:
        self._world = world
        self._make = make
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._submit, name="load")
        self._problem: BaseException | None = None

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if kind is None and self._problem is not None:
            raise self._problem

    def _submit(self) -> None:
        number = 0
        try:
            while not self._over.wait(self._every):
                with contextlib.suppress(*AWAY):
                    self._world.submit(self._make(number))
                    number += 1
        except BaseException as error:  # told to the test, which is in another thread
            self._problem = error


def uid_base(root: Path, number: int) -> int:
    """Uids for one host's jobs that no parallel test is likely to use."""
    return 1_000_000 + (hash(root.name) % 100_000) * 20_000 + number * 1_000


def parent_of(pid: int | None) -> int | None:
    if pid is None:
        return None
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
