"""The log book: every attempt's log on this host, from the raw spool to disk, to the database and to readers.

May import ``model`` and the ports. Made by ``app``, which runs ``run`` as a service; job actors use it as ``LogSink``,
the control actor as ``LogReader``.

Two loops serve all attempts, so one costs no task. The *pump* looks at the attempts with a live step (the others cost
nothing) some twenty times a second and at once when told, and takes at most a slice of each in turn. The *shipper*
sends what is new in batches. All work on files is done in threads, in bounded pieces; the disk is the only queue.

On disk, under the state directory: ``runs/<lease>/redaction`` (0600; what was pinned at ``open``: secrets and caps, so
that a daemon that comes back redacts alike; it goes with the handle), ``runs/<lease>/notes``, and
``logs/<job>/<attempt>.log`` with its ``.idx``.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import anyio
import msgspec
from anyio import CapacityLimiter, to_thread

from supervisor.model.errors import RunnerError, StoreUnavailable
from supervisor.model.job import Lease, LeaseId, LogRecord, Stream
from supervisor.model.logs import format_size
from supervisor.model.redaction import SecretSet, secret_values
from supervisor.ports import LogStore, Plan
from supervisor.sinks.budget import disk_size, keep_within
from supervisor.sinks.local import LocalCopy, LocalWriter
from supervisor.sinks.reader import LogFiles, Where, read_log
from supervisor.sinks.shipper import Shipment, Shipper
from supervisor.sinks.transcript import SLICE, Limits, Transcript

PUMP_INTERVAL = 0.05
SHIP_INTERVAL = 0.1
FOLLOW_INTERVAL = 0.15
_LONGEST_PAUSE = 5.0
_TURN = 4 * SLICE
"""Raw bytes the pump takes before it says what is new, over all attempts."""

log = logging.getLogger(__name__)


class _Pinned(msgspec.Struct, frozen=True):
    values: list[tuple[bytes, bytes]]
    disk: int
    database: int


class _OpenLog(msgspec.Struct, eq=False):
    """An attempt that is open. ``grown`` is set, and replaced, at each change; ``problem``: why it does not get on."""

    lease: LeaseId
    path: Path
    transcript: Transcript
    shipment: Shipment
    secrets: SecretSet
    grown: anyio.Event
    problem: str | None = None

    @property
    def is_complete(self) -> bool:
        shipment, transcript = self.shipment, self.transcript
        is_stored = shipment.is_refused or (shipment.stored is not None and shipment.stored >= transcript.size)
        return transcript.is_settled and is_stored

    def tell(self) -> None:
        self.grown.set()
        self.grown = anyio.Event()


class LogBook:
    """``LogSink`` and ``LogReader``. Sizes in bytes; ``host_secrets`` is name → value. Tests bring their time."""

    def __init__(
        self,
        state: Path,
        store: LogStore,
        *,
        host_secrets: Mapping[str, str] | None = None,
        max_disk: int = 1 << 30,
        max_database: int = 64 << 20,
        keep_local: int = 10 << 30,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], Awaitable[None]] = anyio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._runs = state / "runs"
        self._logs = state / "logs"
        self._store = store
        self._host_secrets = dict(host_secrets or {})
        self._host_set = SecretSet(secret_values({}, {}, self._host_secrets))
        self._limits = Limits(max_disk, max_database)
        self._keep_local = keep_local
        self._clock = clock
        self._pause = pause
        self._rng = rng or random.Random()
        self._open: dict[LeaseId, _OpenLog] = {}
        self._by_attempt: dict[tuple[int, int], _OpenLog] = {}
        self._watched: dict[LeaseId, _OpenLog] = {}
        self._told = anyio.Event()
        self._shipper = Shipper(store, self._on_moved)
        self._files = LogFiles(self._path_of)
        self._pump_thread = CapacityLimiter(1)
        self._file_threads = CapacityLimiter(4)
        self._keeping = anyio.Lock()
        self._kept: int | None = None
        self._store_failures = 0

    async def run(self) -> None:
        """Serves until it is canceled. What is open stays as it is on disk, to be opened again."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._pump, name="log pump")
            tasks.start_soon(self._ship, name="log shipper")

    # --- LogSink ---------------------------------------------------------------------------------------------------

    async def open(self, lease: Lease, plan: Plan) -> None:
        """Raises RunnerError when the disk does not let it. ``plan`` is not needed: steps are found on disk."""
        if lease.id in self._open:
            return
        path = self._path_of(lease.job, lease.attempt)
        try:
            secrets, transcript, is_new = await to_thread.run_sync(
                self._open_files, lease, path, limiter=self._file_threads
            )
        except OSError as error:
            raise RunnerError(f"the log can't be opened: {error.strerror or error}") from error
        if lease.id in self._open:
            return
        shipment = Shipment(
            lease=lease.id, job=lease.job, attempt=lease.attempt, copy=LocalCopy(path), stored=0 if is_new else None
        )
        shipment.cursor.entry = 0 if is_new else -1
        entry = _OpenLog(lease.id, path, transcript, shipment, secrets, anyio.Event())
        self._open[lease.id] = self._by_attempt[lease.job, lease.attempt] = entry
        self._shipper.tell(shipment, transcript.entries)
        self._watch(entry)

    def step_started(self, lease: LeaseId, step: int) -> None:
        if entry := self._open.get(lease):
            entry.transcript.begin(step)
            self._watch(entry)

    def step_ended(self, lease: LeaseId, step: int) -> None:
        if entry := self._open.get(lease):
            entry.transcript.end(step)
            self._watch(entry)

    async def note(self, lease: LeaseId, step: int, text: str) -> None:
        """On disk when this returns. Raises RunnerError when the disk does not let it."""
        if entry := self._open.get(lease):
            try:
                await to_thread.run_sync(entry.transcript.note, step, text, self._clock(), limiter=self._file_threads)
            except OSError as error:
                raise RunnerError(f"the note can't be written: {error.strerror or error}") from error
            self._watch(entry)

    async def complete(self, lease: LeaseId) -> int:
        """Called when no step runs any more: one whose end was not told is taken as ended."""
        entry = self._open.get(lease)
        if entry is None:
            return 0
        entry.transcript.end_all()
        self._watch(entry)
        while not entry.is_complete and lease in self._open:
            await entry.grown.wait()
        return entry.transcript.size

    async def close(self, lease: LeaseId) -> None:
        entry = self._open.pop(lease, None)
        if entry is None:
            return
        self._watched.pop(lease, None)
        self._shipper.forget(entry.shipment)
        try:
            await to_thread.run_sync(entry.transcript.close, self._clock(), limiter=self._file_threads)
            await self._keep_within(entry)
        except OSError as error:
            log.warning("log of job %s could not be closed: %s", entry.shipment.job, error)
        finally:
            # Only now: a reader that finds it neither open nor whole would turn to the database.
            self._by_attempt.pop((entry.shipment.job, entry.shipment.attempt), None)
            entry.tell()

    def redact(self, lease: LeaseId, text: str) -> str:
        entry = self._open.get(lease)
        # The host's own come again: those pinned with the attempt may be of a daemon before.
        return self._host_set.text(entry.secrets.text(text) if entry else text)

    # --- LogReader -------------------------------------------------------------------------------------------------

    def read(
        self,
        job: int,
        attempt: int,
        *,
        offset: int = 0,
        step: int | None = None,
        stream: Stream | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[LogRecord, None]:
        return read_log(
            Where(job, attempt, step, stream),
            offset,
            follow,
            files=self._files,
            store=self._store,
            growth=self._growth,
            pause=self._pause,
            interval=FOLLOW_INTERVAL,
        )

    def _growth(self, job: int, attempt: int) -> anyio.Event | None:
        entry = self._by_attempt.get((job, attempt))
        return entry.grown if entry else None

    # --- for ``status`` --------------------------------------------------------------------------------------------

    @property
    def backlog(self) -> int:
        """Log bytes on this host's disk that the database does not have yet."""
        return sum(
            max(0, entry.transcript.size - (entry.shipment.stored or 0))
            for entry in self._open.values()
            if not entry.shipment.is_refused
        )

    def problems(self) -> list[str]:
        """Sentences for a user; empty when all is well."""
        found = [
            f"the log of job {entry.shipment.job} does not get on: {entry.problem}"
            for entry in self._open.values()
            if entry.problem
        ]
        if self._store_failures and self.backlog:
            found.append(f"{format_size(self.backlog)} of logs wait on disk for the database")
        return found

    # --- the pump --------------------------------------------------------------------------------------------------

    def _watch(self, entry: _OpenLog) -> None:
        self._watched[entry.lease] = entry
        self._told.set()

    async def _pump(self) -> None:
        while True:
            self._told = told = anyio.Event()
            if await self.pump_once():
                continue
            with anyio.move_on_after(PUMP_INTERVAL if self._watched else None):
                await told.wait()

    async def pump_once(self) -> bool:
        """One look at every watched attempt; whether there is more to do at once."""
        waiting = list(self._watched.values())
        more = False
        while waiting:
            done = await to_thread.run_sync(_advance, waiting, limiter=self._pump_thread)
            for entry, has_more in zip(waiting, done, strict=False):
                more |= has_more
                if entry.shipment.entries < entry.transcript.entries or entry.transcript.is_settled:
                    self._shipper.tell(entry.shipment, entry.transcript.entries)
                    entry.tell()
                if entry.transcript.is_settled:
                    self._watched.pop(entry.lease, None)
            waiting = waiting[len(done) :]
        return more

    # --- the shipper -----------------------------------------------------------------------------------------------

    async def _ship(self) -> None:
        while True:
            await self._shipper.wait()
            try:
                moved = await self.ship_once()
            except StoreUnavailable as error:
                if self._store_failures == 0:
                    log.warning("logs wait on disk for the database: %s", error)
                self._store_failures += 1
                longest = min(_LONGEST_PAUSE, SHIP_INTERVAL * 2 ** min(self._store_failures, 10))
                await self._pause(longest * self._rng.uniform(0.5, 1.0))
                continue
            self._store_failures = 0
            if not (moved and self._shipper.has_more):
                await self._pause(SHIP_INTERVAL)

    async def ship_once(self) -> bool:
        """Ships a batch; whether there was one. Raises StoreUnavailable."""
        return await self._shipper.ship_once()

    def _on_moved(self, shipment: Shipment) -> None:
        if entry := self._open.get(shipment.lease):
            entry.tell()

    # --- files -----------------------------------------------------------------------------------------------------

    def _path_of(self, job: int, attempt: int) -> Path:
        return self._logs / str(job) / str(attempt)

    def _open_files(self, lease: Lease, path: Path) -> tuple[SecretSet, Transcript, bool]:
        run = self._runs / str(lease.id)
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._logs.mkdir(mode=0o700, exist_ok=True)
        pinned = self._pin(run / "redaction", lease)
        secrets = SecretSet(dict(pinned.values))
        transcript = Transcript(run, LocalWriter(path, lease.id), secrets, Limits(pinned.disk, pinned.database))
        return secrets, transcript, transcript.open()

    def _pin(self, path: Path, lease: Lease) -> _Pinned:
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Pinned)
        except FileNotFoundError:
            pass
        except msgspec.DecodeError:
            log.error("%s is damaged and made anew", path)  # after a power failure at worst: it is renamed into place
        values = secret_values(lease.secrets, lease.redact, self._host_secrets)
        pinned = _Pinned(list(values.items()), self._limits.disk, self._limits.database)
        new = path.with_suffix(".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(pinned))
        new.rename(path)
        return pinned

    async def _keep_within(self, entry: _OpenLog) -> None:
        async with self._keeping:  # one walk through the directory at a time
            if self._kept is not None:
                self._kept += await to_thread.run_sync(disk_size, entry.path, limiter=self._file_threads)
            if self._kept is None or self._kept > self._keep_local:
                open_paths = {other.path for other in self._open.values()}
                self._kept = await to_thread.run_sync(
                    keep_within, self._logs, self._runs, self._keep_local, open_paths, limiter=self._file_threads
                )


def _advance(entries: Iterable[_OpenLog]) -> list[bool]:
    """Takes each attempt a slice further, up to a turn's worth; whether each has more. In the pump's thread."""
    done: list[bool] = []
    room = _TURN
    for entry in entries:
        before = entry.transcript.size
        try:
            done.append(entry.transcript.advance())
            entry.problem = None
        except Exception as error:
            # Whatever is wrong with one attempt's files must not stop the logs of the others. It is tried again.
            if entry.problem is None:
                log.exception("log of job %s does not get on", entry.shipment.job)
            entry.problem = str(error) or type(error).__name__
            done.append(False)
        room -= max(0, entry.transcript.size - before)
        if room <= 0:
            break
    return done
