"""What an author of an in-process kind needs: the job that a handler is given, and ``noop``, which is one.

A kind of job other than ``steps`` is a coroutine function that takes an ``InProcessJob``. It runs in the daemon, on its
event loop: it must not block (``anyio.to_thread.run_sync`` for what does). It runs at least once: when the daemon dies
the job is lost and another host runs it, so what it does must bear being done twice. It returns (succeeded), raises
(failed, tried again within ``attempts``), or raises ``InvalidInput`` (failed for good: trying again would not help).

A host's ``bsup.toml`` names its kinds::

    [jobs.kinds]
    thumbnail = "gallery.jobs:thumbnail"

May import model. ``load`` is called by ``app``; the runner of these kinds is ``runners.in_process``.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import msgspec

from supervisor.model.errors import InvalidInput
from supervisor.model.job import Lease


class InProcessJob:
    """The attempt that a handler runs. ``args`` is the job's own object; ``secrets`` are name → value.

    ``stop_asked`` is set when somebody wants it to end; a handler has the grace to end by itself, then it is canceled.
    One that has looked at ``stop_asked`` may have given up in the middle: however it ends after that, it was stopped.
    """

    __slots__ = ("_is_asked", "_lease", "_stop", "args")

    def __init__(self, lease: Lease, args: dict[str, Any]) -> None:
        self._lease = lease
        self._is_asked = False
        self._stop: asyncio.Event | None = None
        self.args = args

    @property
    def id(self) -> int:
        return self._lease.job

    @property
    def name(self) -> str:
        return self._lease.name

    @property
    def kind(self) -> str:
        return self._lease.kind

    @property
    def attempt(self) -> int:
        """From 1; with ``id`` a key that no other run of any job has."""
        return self._lease.attempt

    @property
    def secrets(self) -> Mapping[str, str]:
        return self._lease.secrets

    @property
    def stop_asked(self) -> asyncio.Event:
        if self._stop is None:
            self._stop = asyncio.Event()
            if self._is_asked:
                self._stop.set()
        return self._stop

    @property
    def has_looked(self) -> bool:
        """Whether the handler looked at ``stop_asked``."""
        return self._stop is not None

    def ask_to_stop(self) -> None:
        """For the runner, and for tests of a handler."""
        self._is_asked = True
        if self._stop is not None:
            self._stop.set()


Handler: TypeAlias = Callable[[InProcessJob], Awaitable[None]]


class _NoopArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sleep: float = 0.0


async def noop(job: InProcessJob) -> None:
    """Does nothing, for ``args.sleep`` seconds: for trying a host out, and for measuring."""
    if not job.args:
        return
    try:
        args = msgspec.convert(job.args, _NoopArgs)
    except msgspec.ValidationError as error:
        raise InvalidInput("args", str(error), 'sleep: seconds, such as {"sleep": 1.5}') from None
    if not 0.0 <= args.sleep <= 366 * 86_400:
        raise InvalidInput("args.sleep", f"{args.sleep:g} is out of range", "0 to a year, in seconds")
    if args.sleep:
        await asyncio.sleep(args.sleep)


def load(kinds: Mapping[str, str]) -> dict[str, Handler]:
    """The handlers of ``[jobs.kinds]``: kind → ``module:function``. Raises InvalidInput naming the key."""
    return {kind: _handler(f"jobs.kinds.{kind}", path) for kind, path in kinds.items()}


def _handler(field: str, path: str) -> Handler:
    allowed = "module:function, a coroutine function that takes an InProcessJob"
    module_name, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a module may raise anything while it is imported
        raise InvalidInput(field, f"{path} can't be loaded: {type(error).__name__}: {error}", allowed) from None
    if not inspect.iscoroutinefunction(found):
        raise InvalidInput(field, f"{path} is not a coroutine function", allowed)
    handler: Handler = found
    return handler
