"""Puts the daemon together: settings in, adapters made, actors given them, signals turned into messages.

Composition: imports everything, holds no rule of its own. Called by ``bsup daemon``. In order: the lock of the state
directory,
the control socket's path, PostgreSQL (embedded, if so configured), the adapters, the root actor until it ends.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import msgspec
import uvloop

from supervisor import __version__, failpoints, journal, kinds
from supervisor.actors import control_parts
from supervisor.actors.control import ControlActor
from supervisor.actors.control_connection import Limits
from supervisor.actors.control_peers import Roles
from supervisor.actors.control_socket import Listener, listen
from supervisor.actors.keeper import Terms
from supervisor.actors.root import Addresses, Parts, RootConfig, run_root
from supervisor.mailbox import Lane
from supervisor.messages import Reconfigure, ReloadAsked, Terminate
from supervisor.model.errors import BsupError, InvalidInput
from supervisor.model.job import HostInfo
from supervisor.model.policies import Capacity
from supervisor.model.redaction import SecretSet, secret_values
from supervisor.model.settings import Settings
from supervisor.notify import SystemdNotifier
from supervisor.ports import SessionGrant
from supervisor.runners.fence import FenceFile
from supervisor.runners.handles import boot_id
from supervisor.runners.host_room import StateRoom
from supervisor.runners.in_process import InProcessRunner
from supervisor.runners.run_files import HostCredential, StepsSettings
from supervisor.runners.session_file import StateSessionFile, lock_state
from supervisor.runners.shepherd_client import ShepherdClient
from supervisor.runners.steps import StepsRunner
from supervisor.sinks.log import LogBook
from supervisor.store import embedded
from supervisor.store.dsn import parse, safe_dsn
from supervisor.store.migrate import ensure_schema
from supervisor.store.pg import PgStore
from supervisor.watchdog import Watchdog

log = logging.getLogger("supervisor.app")

GUARD_PATIENCE: Final = 2.0
"""Seconds behind the fence after which the shepherd kills a daemon whose in-process jobs have not ended."""

EMBEDDED_CHECK: Final = 5.0
"""Seconds between two looks at an embedded server that does not answer."""


class PreparedStore(PgStore):
    """A store whose schema is brought up to date before a session is begun on it: whenever the database first
    answers.
    """

    def __init__(self, dsn: str, *, listen_dsn: str | None, migrate: bool, connect_timeout: float) -> None:
        super().__init__(dsn, listen_dsn=listen_dsn, application_name="bsup", connect_timeout=connect_timeout)
        self._dsn = dsn
        self._migrate = migrate
        self._connect_timeout = connect_timeout
        self._preparing = anyio.Lock()
        self._is_prepared = False

    async def _prepare(self) -> None:
        async with self._preparing:
            if not self._is_prepared:
                for name in await ensure_schema(self._dsn, self._migrate, connect_timeout=self._connect_timeout):
                    log.info("applied migration %s", name)
                self._is_prepared = True

    async def open_session(self, host: HostInfo, term: float) -> SessionGrant:
        await self._prepare()
        return await super().open_session(host, term)

    async def resume_session(
        self, session: str, incarnation: str, host: HostInfo, term: float, next_incarnation: str
    ) -> SessionGrant | None:
        await self._prepare()
        return await super().resume_session(session, incarnation, host, term, next_incarnation)

    async def pulse(self, term: float) -> bool:
        await self._prepare()
        return await super().pulse(term)

    async def sweep(self, retention: float, limit: int = 500) -> int:
        await self._prepare()
        return await super().sweep(retention, limit)


def run_daemon(settings: Settings, *, reload: Callable[[], Settings]) -> int:
    """Runs until told to end; the process's exit code. ``settings`` are resolved; ``reload`` reads them anew."""
    secrets = host_secrets(settings, os.environ)
    journal.set_up(settings.log.level, settings.log.format, SecretSet(secret_values({}, {}, secrets)).text)
    _arm_failpoints(os.environ)
    state = Path(settings.state.dir)
    _make_directories(state, Path(settings.control.socket))
    lock = lock_state(state)
    try:
        return uvloop.run(_Daemon(settings, state, secrets, reload).run())
    finally:
        lock.release()


def host_secrets(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """The host's own secret values by a name for each. Raises InvalidInput where a file of them can't be read."""
    found = {name: environ[name] for name in settings.redact.values_env if environ.get(name)}
    if settings.redact.values_file is not None:
        for number, line in enumerate(_read("redact.values_file", settings.redact.values_file).splitlines(), 1):
            if line:
                found[f"values_file:{number}"] = line
    for number, one in enumerate(settings.git.credentials):
        found[f"git:{one.url}"] = _read(f"git.credentials[{number}].password_file", one.password_file).strip()
    for field in ("dsn", "listen_dsn"):
        dsn = getattr(settings.database, field)
        if dsn not in ("embedded", "") and (password := parse(dsn, f"database.{field}").password):
            found[f"database.{field}"] = password
    return found


def _arm_failpoints(environ: Mapping[str, str]) -> None:
    if not (armed := environ.get(failpoints.VARIABLE)):
        return
    try:
        failpoints.arm(armed)
    except ValueError as error:
        raise InvalidInput(failpoints.VARIABLE, str(error), "nothing, but in tests") from None
    log.warning("%s is set: this daemon will die or stop at %s", failpoints.VARIABLE, ", ".join(failpoints.ARMED))


def _read(field: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(field, f"{path} can't be read: {error}", "a text file that the daemon may read") from None


def _make_directories(state: Path, socket: Path) -> None:
    """As root the jobs' users pass through the state directory to their workspaces; they see nothing else of it."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        state.chmod(0o711 if os.getuid() == 0 else 0o700)
        socket.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    except OSError as error:
        raise InvalidInput(
            "state.dir", f"{error.filename} can't be made: {error.strerror}", "a directory to write to"
        ) from None


def _spare_the_collector() -> None:
    """What a job is made of is freed by reference counts; the collector is left with the circles that errors make. At
    its own settings it took 40 % of the daemon's time with a thousand short jobs at once."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _uid_count(settings: Settings) -> int:
    return settings.jobs.uid_count if settings.jobs.uids == "auto" and os.getuid() == 0 else 0


class _Daemon:
    """One run of the daemon: what is made once, and what a reload replaces."""

    def __init__(
        self, settings: Settings, state: Path, secrets: Mapping[str, str], reload: Callable[[], Settings]
    ) -> None:
        self._settings = settings
        self._state = state
        self._secrets = secrets
        self._read_settings = reload
        self._addresses = Addresses()
        self._listener: Listener | None = None

    async def run(self) -> int:
        settings = self._settings
        # Before anything else is begun: where another daemon listens, this one must not take a session and jobs first.
        self._listener = listen(settings.control.socket)
        try:
            with Watchdog(settings.supervision.blocked_after):
                return await self._run(settings)
        finally:
            if self._listener is not None:
                self._listener.close()

    async def _run(self, settings: Settings) -> int:
        handlers = kinds.load(settings.jobs.kinds)
        is_embedded = settings.database.dsn == "embedded"
        dsn = settings.database.dsn
        if is_embedded:
            dsn = await anyio.to_thread.run_sync(embedded.ensure_running, self._state)
        log.info(
            "bsup %s begins: host %s, state %s, database %s",
            __version__,
            settings.host.name,
            self._state,
            safe_dsn(dsn),
        )
        session_file = StateSessionFile(self._state, _machine_id(), boot_id())
        if (aside := session_file.set_aside_foreign()) is not None:
            log.warning("this state directory is a copy of another's: that one's session and runs are in %s", aside)
        uids = _uid_count(settings)
        client = ShepherdClient(self._state, uid_base=settings.jobs.uid_base, uid_count=uids)
        self._room = StateRoom(self._state, settings.state.min_free)
        fence = FenceFile(self._state, guard_patience=min(GUARD_PATIENCE, settings.lease.margin / 3))
        self._in_process = InProcessRunner(
            handlers, guard=fence.guard, fence_in=fence.left, timeout=settings.jobs.timeout
        )
        self._runner = StepsRunner(
            self._state, client, steps_settings(settings), uid_base=settings.jobs.uid_base, uid_count=uids
        )
        store = PreparedStore(
            dsn,
            listen_dsn=settings.database.listen_dsn or None,
            migrate=settings.database.migrate,
            connect_timeout=settings.database.connect_timeout,
        )
        book = LogBook(
            self._state,
            store,
            host_secrets=self._secrets,
            max_disk=settings.logs.max_disk,
            max_database=settings.logs.max_database,
            keep_local=settings.logs.keep_local,
        )
        await client.connect()
        try:
            await self._runner.open()
            async with store, self._in_process, anyio.create_task_group() as tasks:
                if is_embedded:
                    tasks.start_soon(self._mind_embedded, store)
                self._listen_to_signals()
                _spare_the_collector()
                code = await run_root(
                    self._root_config(), self._parts(store, book, session_file, fence), self._addresses
                )
                tasks.cancel_scope.cancel()
        finally:
            self._runner.close()
            await client.aclose()
        if is_embedded and not self._is_detaching:
            await anyio.to_thread.run_sync(embedded.stop, self._state)
        log.info("bsup ends")
        return code

    # --- what the actors get ----------------------------------------------------------------------------------

    def _root_config(self) -> RootConfig:
        settings = self._settings
        lease = settings.lease
        return RootConfig(
            host=HostInfo(
                name=settings.host.name,
                labels=settings.host.labels,
                slots=settings.host.slots,
                cpu=settings.host.cpu,
                memory=settings.host.memory,
                version=__version__,
                machine_id=_machine_id(),
                boot_id=boot_id(),
                pid=os.getpid(),
                kinds=("steps", *self._in_process.kinds),
            ),
            limits=limits_of(settings),
            terms=Terms(renew=lease.renew, term=lease.term, margin=lease.margin),
            drain=settings.shutdown.drain,
            retention=settings.retention.finished,
        )

    def _parts(self, store: PgStore, book: LogBook, session_file: StateSessionFile, fence: FenceFile) -> Parts:
        return Parts(
            store=store,
            session_file=session_file,
            fence=fence,
            runners={"steps": self._runner, **dict.fromkeys(self._in_process.kinds, self._in_process)},
            sink=book,
            notifier=SystemdNotifier(),
            control=lambda: self._control(store, book),
            reload=self._reload,
            room=self._room,
        )

    def _control(self, store: PgStore, book: LogBook) -> ControlActor:
        settings = self._settings.control
        actor = ControlActor(
            control_parts.Parts(
                host=self._settings.host.name,
                store=store,
                logs=book,
                mailboxes=self._addresses.by_name(),
                isolation=self._runner.isolation,
                reload=self._reload,
            ),
            roles=self._roles,
            limits=Limits(
                max_frame=settings.max_frame,
                idle_timeout=settings.idle_timeout,
                slow_timeout=settings.slow_timeout,
                max_connections_per_uid=settings.max_connections_per_uid,
            ),
        )
        if self._listener is not None:
            actor.serve(self._listener)
            self._listener = None
        else:
            actor.listen(settings.socket)
        return actor

    def _roles(self) -> Roles:
        roles = self._settings.roles
        return Roles(admin=roles.admin, operator=roles.operator, viewer=roles.viewer)

    # --- what comes from outside ------------------------------------------------------------------------------

    @property
    def _is_detaching(self) -> bool:
        return self._settings.shutdown.on_term == "detach"

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        root = self._addresses.root

        def end() -> None:
            root.tell(Terminate(detach=self._is_detaching), Lane.CONTROL)

        def reload() -> None:
            root.tell(ReloadAsked(), Lane.CONTROL)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        loop.add_signal_handler(signal.SIGHUP, reload)

    async def _reload(self) -> dict[str, Any]:
        """Takes over what can change while jobs run; the rest is told to need a restart."""
        before = self._settings
        after = await anyio.to_thread.run_sync(self._read_settings)
        changed: dict[str, Any] = {}
        kept = before
        for section in before.__struct_fields__:
            old, new = getattr(before, section), getattr(after, section)
            for key in old.__struct_fields__:
                value = getattr(new, key)
                if value == getattr(old, key):
                    continue
                name = f"{section}.{key}"
                if name in RELOADABLE or section in RELOADABLE:
                    changed[name] = msgspec.to_builtins(value)
                    kept = msgspec.structs.replace(
                        kept, **{section: msgspec.structs.replace(getattr(kept, section), **{key: value})}
                    )
                else:
                    changed[name] = "needs a restart"
        fresh = steps_settings(kept)
        self._settings = kept
        self._runner.settings = fresh
        self._in_process.timeout = kept.jobs.timeout
        self._room.min_free = kept.state.min_free
        journal.set_up(kept.log.level, kept.log.format, SecretSet(secret_values({}, {}, self._secrets)).text)
        if limits_of(kept) != limits_of(before):
            self._addresses.root.tell(limits_of(kept), Lane.CONTROL)
        return changed

    async def _mind_embedded(self, store: PgStore) -> None:
        """An embedded server is ours: when it does not answer, it is looked at, and started again if it is gone."""
        while True:
            await anyio.sleep(EMBEDDED_CHECK)
            if store.health().available:
                continue
            try:
                await anyio.to_thread.run_sync(embedded.ensure_running, self._state)
            except (BsupError, OSError) as error:
                log.warning("the embedded PostgreSQL could not be started: %s", error)


RELOADABLE: Final = frozenset(
    {
        "roles",
        "log",
        "host.labels",
        "host.slots",
        "host.cpu",
        "host.memory",
        "database.poll",
        "shutdown.on_term",
        "state.min_free",
        "jobs.grace",
        "jobs.timeout",
        "jobs.keep_workspace",
        "jobs.keep_workspace_for",
        "jobs.pass_env",
        "git.allow",
        "git.mirrors",
        "git.mirrors_max",
        "logs.max_disk",
    }
)
"""Sections and keys that a reload takes over. A limit on a log holds for attempts that begin later."""


def limits_of(settings: Settings) -> Reconfigure:
    host = settings.host
    return Reconfigure(
        Capacity(host.slots, host.cpu, host.memory), host.labels, settings.database.poll, settings.jobs.grace
    )


def steps_settings(settings: Settings) -> StepsSettings:
    return StepsSettings(
        grace=settings.jobs.grace,
        timeout=settings.jobs.timeout,
        max_output=settings.logs.max_disk,
        keep_workspace=settings.jobs.keep_workspace,
        keep_workspace_for=settings.jobs.keep_workspace_for,
        allow=settings.git.allow,
        mirrors=settings.git.mirrors,
        mirrors_max=settings.git.mirrors_max,
        credentials=tuple(HostCredential(one.url, one.username, one.password_file) for one in settings.git.credentials),
        pass_env=settings.jobs.pass_env,
    )


def _machine_id() -> str:
    """Which machine this is; a container without one is known by its host's name and its own boot."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            if found := Path(path).read_text().strip():
                return found
        except OSError:
            continue
    return os.uname().nodename
