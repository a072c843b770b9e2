"""One process in which a daemon is started, does a job and is stopped, again and again; ``test_cycles`` runs it.

What a daemon leaves open goes with its process, so a leak of it shows only where the process lives on. Each line that
is printed says what is there after a cycle: descriptors by what they are, threads, tasks, objects of a kind that a
daemon makes once. Run as ``python cycler.py <config> <dsn> <state> <socket> <cycles>``.

Of three cycles two drain and one detaches, from a job that the next one takes up.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections import Counter
from typing import Any

from supervisor.app import run_daemon
from supervisor.cli.configuration import load
from supervisor.client import Client
from supervisor.model.errors import BsupError

PATIENCE = 60.0
FAILED = 70
QUICK = {"kind": "steps", "steps": [{"name": "s", "run": "echo words"}]}
LONGER = {"kind": "steps", "steps": [{"name": "s", "run": "echo words; sleep 0.3"}]}
IN_PROCESS = {"kind": "noop"}

COUNTED = ("PgStore", "LogBook", "StepsRunner", "ShepherdClient", "Dispatcher", "Keeper", "Mailbox", "Connection")


class Driver:
    """Uses the daemon from a thread of its own, then has it end."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._left: list[int] = []

    def run(self, detach: bool) -> threading.Thread:
        thread = threading.Thread(target=self._drive, args=(detach,))
        thread.start()
        return thread

    def _drive(self, detach: bool) -> None:
        try:
            asyncio.run(self._use(detach))
        except BaseException:
            traceback.print_exc()
            os._exit(FAILED)
        os.kill(os.getpid(), signal.SIGTERM)

    async def _use(self, detach: bool) -> None:
        async with asyncio.timeout(PATIENCE):
            await self._until_ready()
            async with Client(self._socket) as client:
                jobs = await client.submit_many([QUICK, IN_PROCESS])
                await self._until(client, jobs + self._left, "succeeded")
                self._left = [await client.submit(LONGER)] if detach else []
                await self._until(client, self._left, "running")

    async def _until_ready(self) -> None:
        while True:
            with contextlib.suppress(BsupError, OSError):
                async with Client(self._socket) as client:
                    if (await client.status()).actors.get("dispatcher", {}).get("reconciled"):
                        return
            await asyncio.sleep(0.01)

    async def _until(self, client: Client, jobs: list[int], wanted: str) -> None:
        for job in jobs:
            while (state := (await client.show(job)).job.state) != wanted:
                assert state in ("ready", "running"), state
                await asyncio.sleep(0.005)


def left() -> dict[str, Any]:
    """What is there between two daemons."""
    gc.unfreeze()
    gc.collect()
    objects = Counter(type(one).__name__ for one in gc.get_objects())
    tasks = sum(isinstance(one, asyncio.Task) and not one.done() for one in gc.get_objects())
    return {
        "descriptors": dict(Counter(_what(fd) for fd in os.listdir("/proc/self/fd"))),
        "threads": len(os.listdir("/proc/self/task")),
        "tasks": tasks,
        "objects": {name: objects[name] for name in COUNTED},
        "children": _children(),
    }


def _what(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").partition(":[")[0]
    except OSError:  # that of the listing itself
        return "listing"


def _children() -> int:
    return sum(len(open(f"/proc/self/task/{task}/children").read().split()) for task in os.listdir("/proc/self/task"))


def main() -> int:
    config, dsn, state, socket, cycles = sys.argv[1:]
    driver = Driver(socket)
    for cycle in range(int(cycles)):
        detach = cycle % 3 == 1
        args = Namespace(config=config, dsn=dsn, state=state, socket=socket, on_term="detach" if detach else "drain")
        thread = driver.run(detach)
        code = run_daemon(load(args), reload=lambda args=args: load(args))
        thread.join()
        print(json.dumps({"cycle": cycle, "code": code, **left()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
