"""Runs the benchmarks, all or those named, and writes RESULTS.md and results.json beside it.

``make bench`` runs everything (25 minutes on two cores), ``make bench-quick`` the core of it (3 minutes);
``python benchmarks/run.py --quick mailbox`` one module. Everything runs on this machine alone.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib
import importlib.util
import inspect
import os
import platform
import signal
import sys
import time
from importlib.metadata import version

import pictures
import postgres
import report
from measured import Findings

# Module → the heading of what it finds. In this order they run and are shown.
MODULES = {
    "queues": "Queues",
    "scale": "A queue that grows",
    "store": "Statements",
    "mailbox": "Mailboxes",
    "process": "Processes",
    "log": "Logs",
    "control": "Daemon and command line",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the core of it")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}; none: all there are")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped on the way out
    run = this_run(arguments.quick, arguments.modules)
    print(run.about, file=sys.stderr)
    results = report.load()
    failed = []
    try:
        for name in arguments.modules or [name for name in MODULES if is_there(name)]:
            began = time.monotonic()
            print(f"--- {MODULES[name]} …", file=sys.stderr, flush=True)
            try:
                findings = findings_of(name, arguments.quick)
            except Exception as error:
                print(f"{name} failed: {error!r}", file=sys.stderr)
                failed.append(name)
                continue
            show(findings)
            print(f"--- {MODULES[name]}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            report.merge(results, run, MODULES[name], findings, whole=not arguments.quick)
            pictures.draw(report.write(results, list(MODULES.values())))
    finally:
        postgres.stop()
    print(f"written to {report.PAGE}", file=sys.stderr)
    return 1 if failed else 0


def is_there(name: str) -> bool:
    return importlib.util.find_spec(f"bench_{name}") is not None


def findings_of(name: str, quick: bool) -> Findings:
    found = importlib.import_module(f"bench_{name}").run(quick)
    if inspect.iscoroutine(found):
        found = asyncio.run(found)
    assert isinstance(found, Findings), f"bench_{name}.run gave {type(found).__name__}"
    return found


def show(findings: Findings) -> None:
    for measured in findings.measured:
        print(report.row(measured))
    for bar in findings.bars:
        print(f"  {report.HOLDS[bar.holds]}: {bar.what}: {bar.value} (must be {bar.must}) {bar.note}", flush=True)


def this_run(quick: bool, modules: list[str]) -> report.Run:
    now = datetime.datetime.now(datetime.UTC)
    command = " ".join(["make bench-quick" if quick else "make bench", *(f"({name})" for name in modules)])
    parts = ", ".join(f"{name} {version(name)}" for name in ("asyncpg", "uvloop", "msgspec"))
    about = (
        f"{now:%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {parts}; {postgres.describe()}; "
        f"the machine's load was {os.getloadavg()[0]:.1f} before."
    )
    return report.Run(id=f"{'quick' if quick else 'full'} {now:%m-%d %H:%M}", command=command, about=about)


if __name__ == "__main__":
    sys.exit(main())
