"""The log book: every attempt's log on this host, from the raw spool to disk, to the database and to readers.

May import ``model`` and the ports. Made by ``app``, which runs ``run`` as a service; job actors use it as ``LogSink``,
the control actor as ``LogReader``.

Two loops serve all attempts, so one costs no task: the *pump* brings their logs on, the *shipper* sends what is new in
batches. All work on bytes is done in threads, in bounded pieces; the disk is the only queue. A log in which nothing is
written has no file, no row and no thread's time: an attempt that says nothing costs a few looks at the disk.

On disk, under the state directory: ``runs/<lease>/redaction`` (0600; what was pinned at ``open``: secrets and caps, so
that a daemon that comes back redacts alike; it goes with the handle), ``runs/<lease>/notes``, and
``logs/<job>/<attempt>.log`` with its ``.idx``.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import anyio
from anyio import CapacityLimiter, to_thread

from supervisor.model.errors import RunnerError
from supervisor.model.job import Lease, LeaseId, LogRecord, Stream
from supervisor.model.logs import format_size
from supervisor.model.redaction import SecretSet, secret_values
from supervisor.ports import LogStore, Plan
from supervisor.sinks import pinned
from supervisor.sinks.budget import disk_size, keep_within
from supervisor.sinks.local import LocalCopy, LocalWriter
from supervisor.sinks.pinned import Pinned
from supervisor.sinks.pump import OpenLog, Pump
from supervisor.sinks.reader import LogFiles, Where, read_log
from supervisor.sinks.shipper import Shipment, Shipper
from supervisor.sinks.transcript import Limits, Transcript, names_in

FOLLOW_INTERVAL = 0.15

log = logging.getLogger(__name__)


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
        self._runs, self._logs = str(state / "runs"), str(state / "logs")
        self._store = store
        self._host_secrets = dict(host_secrets or {})
        self._host_set = SecretSet(secret_values({}, {}, self._host_secrets))
        self._limits = Limits(max_disk, max_database)
        self._host_pin = Pinned(list(self._host_set.values.items()), max_disk, max_database)
        self._keep_local = keep_local
        self._clock = clock
        self._pause = pause
        self._host_pinned: str | None = None
        self._open: dict[LeaseId, OpenLog] = {}
        self._by_attempt: dict[tuple[int, int], OpenLog] = {}
        self._pump = Pump(self._on_advanced)
        self._shipper = Shipper(
            store, self._on_moved, lambda: self._pump.is_behind, pause, rng if rng is not None else random.Random()
        )
        self._files = LogFiles(self._path_of)
        self._file_threads = CapacityLimiter(4)
        self._keeping = anyio.Lock()
        self._kept: int | None = None

    async def run(self) -> None:
        """Serves until it is canceled. What is open stays as it is on disk, to be opened again."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._pump.run, name="log pump")
            tasks.start_soon(self._shipper.run, name="log shipper")

    # --- LogSink ---------------------------------------------------------------------------------------------------

    async def open(self, lease: Lease, plan: Plan) -> None:
        """Raises RunnerError when the disk does not let it. ``plan`` is not needed: steps are found on disk."""
        if lease.id in self._open:
            return
        try:
            found = names_in(f"{self._runs}/{lease.id}")
            if self._is_plain(lease, found):
                entry, is_new = self._open_files(lease, found, self._host_pin if self._host_set else None)
            else:
                entry, is_new = await to_thread.run_sync(self._open_pinned, lease, found, limiter=self._file_threads)
        except OSError as error:
            raise RunnerError(f"the log can't be opened: {error.strerror or error}") from error
        if lease.id in self._open:
            return
        shipment = entry.shipment
        shipment.stored, shipment.cursor.entry = (0, 0) if is_new else (None, -1)
        self._open[lease.id] = self._by_attempt[lease.job, lease.attempt] = entry
        self._shipper.tell(shipment, entry.transcript.entries)
        if not entry.transcript.is_settled:
            self._pump.tell(entry)

    def step_started(self, lease: LeaseId, step: int) -> None:
        if entry := self._open.get(lease):
            entry.transcript.begin(step)
            self._pump.watch(entry)

    def step_ended(self, lease: LeaseId, step: int) -> None:
        if entry := self._open.get(lease):
            entry.transcript.end(step)
            self._bring_on(entry)

    async def note(self, lease: LeaseId, step: int, text: str) -> None:
        """On disk when this returns. Raises RunnerError when the disk does not let it."""
        if entry := self._open.get(lease):
            try:
                await to_thread.run_sync(entry.transcript.note, step, text, self._clock(), limiter=self._file_threads)
            except OSError as error:
                raise RunnerError(f"the note can't be written: {error.strerror or error}") from error
            self._pump.tell(entry)

    async def complete(self, lease: LeaseId) -> int:
        """Called when no step runs any more: one whose end was not told is taken as ended."""
        entry = self._open.get(lease)
        if entry is None:
            return 0
        entry.is_awaited = True
        if not entry.transcript.is_settled:
            entry.transcript.end_all()
            self._bring_on(entry)
        while not entry.is_complete and lease in self._open:
            self._shipper.hurry()
            await entry.grown().wait()
        return entry.transcript.size

    async def close(self, lease: LeaseId) -> None:
        entry = self._open.pop(lease, None)
        if entry is None:
            return
        self._pump.forget(entry)
        self._shipper.forget(entry.shipment)
        try:
            if not entry.transcript.close_silent():
                size = await to_thread.run_sync(self._close_files, entry, limiter=self._file_threads)
                await self._keep_within(size)
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
        return entry.grown() if entry else None

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
        if self._shipper.failures and self.backlog:
            found.append(f"{format_size(self.backlog)} of logs wait on disk for the database")
        return found

    # --- the pump and the shipper ----------------------------------------------------------------------------------

    def _bring_on(self, entry: OpenLog) -> None:
        """At once if nothing was written, which costs less than to ask the pump."""
        if entry.transcript.settle_silent():
            self._pump.forget(entry)
            self._on_advanced(entry)
        else:
            self._pump.tell(entry)

    def _on_advanced(self, entry: OpenLog) -> None:
        is_settled = entry.transcript.is_settled
        if is_settled or entry.shipment.entries < entry.transcript.entries:
            self._shipper.tell(entry.shipment, entry.transcript.entries)
            if entry.is_awaited and is_settled:
                self._shipper.hurry()
            entry.tell()

    def _on_moved(self, shipment: Shipment) -> None:
        if entry := self._open.get(shipment.lease):
            entry.tell()

    async def pump_once(self) -> bool:
        """One look at every attempt with something to do; whether there is more to do at once."""
        return await self._pump.look()

    async def ship_once(self) -> bool:
        """Ships a batch; whether there was one. Raises StoreUnavailable."""
        return await self._shipper.ship_once()

    # --- files -----------------------------------------------------------------------------------------------------

    def _path_of(self, job: int, attempt: int) -> str:
        return f"{self._logs}/{job}/{attempt}"

    def _is_plain(self, lease: Lease, found: list[str]) -> bool:
        """Whether opening it is only a few looks at the disk: there is nothing to pin but what is pinned for another
        attempt (now it is for this one too). ``found``: the names in its run's directory."""
        if lease.secrets or lease.redact or "redaction" in found:
            return False
        if not self._host_set:
            return True
        run = f"{self._runs}/{lease.id}"
        if self._host_pinned is None or not pinned.share(run, self._host_pinned):
            return False
        self._host_pinned = run
        return True

    def _open_pinned(self, lease: Lease, found: list[str]) -> tuple[OpenLog, bool]:
        return self._open_files(lease, found, pinned.load(f"{self._runs}/{lease.id}"))

    def _open_files(self, lease: Lease, names: list[str], found: Pinned | None) -> tuple[OpenLog, bool]:
        """The log as it stands on disk, and whether it is new. ``found``: what is pinned for it."""
        path, run = self._path_of(lease.job, lease.attempt), f"{self._runs}/{lease.id}"
        if found is not None:
            secrets = self._host_set if found == self._host_pin else SecretSet(dict(found.values))
        elif lease.secrets or lease.redact:
            secrets = SecretSet(secret_values(lease.secrets, lease.redact, self._host_secrets))
        else:
            secrets = self._host_set
        is_pinned = found is not None
        if found is None:
            found = Pinned(list(secrets.values.items()), self._limits.disk, self._limits.database)
            if secrets:  # at once: what is in the raw files already is redacted so, whoever does it
                pinned.save(run, found)
                is_pinned = True
                if secrets is self._host_set:
                    self._host_pinned = run
        pin = partial(pinned.save, run, found) if not is_pinned else _nothing
        limits = Limits(found.disk, found.database)
        transcript = Transcript(run, LocalWriter(path, lease.id), secrets, limits, pin)
        is_new = transcript.open(names)
        if not is_new:
            pin()
        shipment = Shipment(lease=lease.id, job=lease.job, attempt=lease.attempt, copy=LocalCopy(path))
        return OpenLog(lease.id, path, transcript, shipment, secrets), is_new

    def _close_files(self, entry: OpenLog) -> int:
        entry.transcript.close(self._clock())
        return disk_size(entry.path)

    async def _keep_within(self, size: int) -> None:
        """``size``: what the copy of an attempt that was closed takes on disk."""
        async with self._keeping:  # one walk through the directory at a time
            if self._kept is not None:
                self._kept += size
            if self._kept is None or self._kept > self._keep_local:
                open_paths = {Path(other.path) for other in self._open.values()}
                self._kept = await to_thread.run_sync(
                    keep_within,
                    Path(self._logs),
                    Path(self._runs),
                    self._keep_local,
                    open_paths,
                    limiter=self._file_threads,
                )


def _nothing() -> None: ...
