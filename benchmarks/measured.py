"""What a benchmark says, and how contestants are timed: interleaved repeats, the median, the spread, ratios, bars.

A module ``bench_X.py`` has ``run(quick)``, plain or async, which returns ``Findings``; ``quick`` asks for its core, in
seconds. All that is compared is measured in turn, a repeat of each after the other, so that a machine that slows down
slows down everybody.

Also where they work: a directory that other uids can pass, with a path short enough for sockets.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

REPEATS = 5
QUICK_REPEATS = 3
# What one repeat of one contestant says: a rate, a time, a size; None: nothing this time.
Sampler = Callable[[], "float | Awaitable[float | None] | None"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """``value`` in ``unit``: the median of the repeats, with the lowest and the highest."""

    what: str
    unit: str
    value: float
    low: float
    high: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A promise: what was measured, as shown; what it must be; whether it is so. None: it could not be measured."""

    what: str
    value: str
    must: str
    holds: bool | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Findings:
    """Rows for the table, bars for the first page, series (name → points) for pictures, notes on who is missing."""

    measured: Sequence[Measured] = ()
    bars: Sequence[Bar] = ()
    series: Mapping[str, Sequence[Mapping[str, float | str]]] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


def repeats(quick: bool) -> int:
    return QUICK_REPEATS if quick else REPEATS


async def interleave(contestants: Mapping[str, Sampler], rounds: int) -> dict[str, list[float]]:
    """Asks each contestant for a sample, ``rounds`` times over, in an order that turns with each round."""
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            sample = contestants[name]()
            value = await sample if inspect.isawaitable(sample) else sample
            if value is not None:
                samples[name].append(value)
    return samples


def rate(amount: float, work: Callable[[], object]) -> Sampler:
    """A sampler: how much a second, where ``work`` (plain or async) does ``amount`` each time."""

    async def sample() -> float:
        began = time.perf_counter()
        done = work()
        if inspect.isawaitable(done):
            await done
        return amount / (time.perf_counter() - began)

    return sample


def of_samples(what: str, unit: str, samples: Sequence[float], note: str = "") -> Measured:
    return Measured(what, unit, statistics.median(samples), min(samples), max(samples), note)


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """The median of mine over the median of the other's."""
    return statistics.median(mine) / statistics.median(other)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def at_least(what: str, value: float, bound: float, unit: str = "×", note: str = "") -> Bar:
    return Bar(what, shown(value, unit), f"≥ {shown(bound, unit)}", value >= bound, note)


def at_most(what: str, value: float, bound: float, unit: str, note: str = "") -> Bar:
    return Bar(what, shown(value, unit), f"≤ {shown(bound, unit)}", value <= bound, note)


def unmeasured(what: str, must: str, why: str) -> Bar:
    return Bar(what, "not measured", must, None, why)


def shown(value: float, unit: str) -> str:
    return f"{number(value)} {unit}".strip()


def number(value: float) -> str:
    """Three digits that count, no more; of small values two."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.2g}"


def state_directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="bsup-bench-", dir="/tmp"))
    path.chmod(0o711)
    return path


# --- one contestant alone ------------------------------------------------------------------------------------------


def measure(
    what: str, unit: str, amount: float, work: Callable[[], object], note: str = "", rounds: int = QUICK_REPEATS
) -> Measured:
    """``work`` does ``amount`` units each time it is called."""
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        rates.append(amount / (time.perf_counter() - began))
    return of_samples(what, unit, rates, note)


async def measure_async(
    what: str,
    unit: str,
    amount: float,
    work: Callable[[], Awaitable[object]],
    note: str = "",
    rounds: int = QUICK_REPEATS,
) -> Measured:
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        await work()
        rates.append(amount / (time.perf_counter() - began))
    return of_samples(what, unit, rates, note)
