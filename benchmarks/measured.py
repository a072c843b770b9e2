"""What a benchmark says, and the one way in which all are timed: several rounds, the median, the spread.

Also where they work: a directory that other uids can pass, with a path short enough for sockets.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Measured:
    """``per_second`` of ``unit``: the median of the rounds, with the slowest and the fastest."""

    what: str
    unit: str
    per_second: float
    slowest: float
    fastest: float
    note: str = ""

    def line(self) -> str:
        spread = f"{_number(self.slowest)} – {_number(self.fastest)}"
        return f"| {self.what} | {_number(self.per_second)} {self.unit} | {spread} | {self.note} |"


def measure(what: str, unit: str, amount: float, work: Callable[[], object], note: str = "") -> Measured:
    """``work`` does ``amount`` units each time it is called."""
    rates = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        rates.append(amount / (time.perf_counter() - began))
    return _of(what, unit, rates, note)


async def measure_async(
    what: str, unit: str, amount: float, work: Callable[[], Awaitable[object]], note: str = ""
) -> Measured:
    rates = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        await work()
        rates.append(amount / (time.perf_counter() - began))
    return _of(what, unit, rates, note)


def _of(what: str, unit: str, rates: list[float], note: str) -> Measured:
    return Measured(what, unit, statistics.median(rates), min(rates), max(rates), note)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def state_directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="bsup-bench-", dir="/tmp"))
    path.chmod(0o711)
    return path
