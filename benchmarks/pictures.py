"""Draws what the documentation shows of results.json as SVG: everybody's rates, rates against a backlog, times against
a load.

No library: three pictures of lines and bars need a scale, a grid and labels. Run by ``run.py`` after it wrote the
results; a picture whose series is not there is left as it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent.parent / "docs" / "explanation" / "pictures"
WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 72, 176, 56, 52
COLORS = {"bsup": "#0b62a8", "PgQueuer": "#c8510a", "Graphile": "#1a8a5f", "bare": "#8fb5d3"}
OTHER = "#8a8f98"
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 }
.title { font-size: 15px; font-weight: 600 }
.small { font-size: 12px; fill: #666 }
.grid { stroke: #e3e5e8 }
.line { fill: none; stroke-width: 2.5 }
.thin { fill: none; stroke-width: 1.5; stroke-dasharray: 5 4 }
"""
Points = Sequence[Mapping[str, Any]]


def draw(results: Mapping[str, Any]) -> list[Path]:
    """Writes the pictures for which there are series; returns their paths."""
    series = {
        name: entry["points"] for section in results["sections"].values() for name, entry in section["series"].items()
    }
    pictures = {"drain": drain, "backlog": backlog, "load": load}
    written = []
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        if series.get(name):
            path = TARGET / f"{name}.svg"
            path.write_text(picture(series[name]))
            written.append(path)
    return written


def drain(points: Points) -> str:
    """Bars, the fastest first."""
    ordered = sorted(points, key=lambda point: -point["jobs_per_s"])
    step, left = 30, 190
    scale = (WIDTH - left - 90) / ordered[0]["jobs_per_s"]
    parts = []
    for at, point in enumerate(ordered):
        y = TOP + at * step
        width = max(1.0, point["jobs_per_s"] * scale)
        parts += [
            text(left - 10, y + 16, point["who"], anchor="end"),
            f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{step - 9}" rx="2" fill="{color(point["who"])}"/>',
            text(left + width + 8, y + 16, f"{point['jobs_per_s']:,.0f}", "small"),
        ]
    return svg("No-op jobs a second, one process until all are recorded finished", parts, TOP + len(points) * step + 16)


def backlog(points: Points) -> str:
    top = max(point["high"] for point in points)
    plot = Plot(
        x=log_scale(min(point["backlog"] for point in points), max(point["backlog"] for point in points)),
        y=lambda value: value / (top * 1.08),
        x_ticks={point["backlog"]: f"{point['backlog']:,}" for point in points},
        y_ticks={tick: f"{tick:,.0f}" for tick in nice(top)},
    )
    parts = plot.frame("jobs ready in the queue", "jobs/s")
    ends = []
    for who, mine in by_who(points).items():
        line = [(point["backlog"], point["jobs_per_s"]) for point in mine]
        parts += [plot.line(line, color(who)), *plot.dots(line, color(who))]
        ends.append((plot.at(*line[-1])[1], who))
    return svg("10,000 jobs out of a backlog", [*parts, *labels(ends)])


def load(points: Points) -> str:
    values = [point[name] for point in points for name in ("p50_ms", "p99_ms")]
    low, high = min(values) / 1.3, max(values) * 1.3
    offered = [point["offered"] for point in points]
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
    plot = Plot(
        x=log_scale(min(offered), max(offered)),
        y=log_scale(low, high),
        x_ticks={value: f"{value:,}" for value in offered},
        y_ticks={tick: f"{tick:g}" for tick in ticks if low <= tick <= high},
    )
    parts = plot.frame("jobs/s offered, in bursts of 10 ms", "ms from commit to start")
    ends = []
    for who, mine in by_who(points).items():
        slow = [(point["offered"], point["p99_ms"]) for point in mine]
        usual = [(point["offered"], point["p50_ms"]) for point in mine]
        parts += [plot.line(slow, color(who)), *plot.dots(slow, color(who)), plot.line(usual, color(who), "thin")]
        ends.append((plot.at(*slow[-1])[1], who))
    return svg("How soon a job begins: 99 of 100 (lines), half of them (dashes)", [*parts, *labels(ends)])


# --- scales and marks ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plot:
    """``x`` and ``y`` take a value to its place between 0 and 1; ticks are value → label."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    x_ticks: Mapping[float, str]
    y_ticks: Mapping[float, str]

    def at(self, x: float, y: float) -> tuple[float, float]:
        return LEFT + self.x(x) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - self.y(y) * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_name: str, y_name: str) -> list[str]:
        parts = [
            text(LEFT - 8, TOP - 14, y_name, "small", "start"),
            text(WIDTH - RIGHT, HEIGHT - 10, x_name, "small", "end"),
        ]
        for value, label in self.y_ticks.items():
            y = HEIGHT - BOTTOM - self.y(value) * (HEIGHT - TOP - BOTTOM)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(text(LEFT - 8, y + 4, label, "small", "end"))
        for value, label in self.x_ticks.items():
            x = LEFT + self.x(value) * (WIDTH - LEFT - RIGHT)
            parts.append(text(x, HEIGHT - BOTTOM + 18, label, "small", "middle"))
        return parts

    def line(self, values: Sequence[tuple[float, float]], stroke: str, style: str = "line") -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*value) for value in values))
        return f'<polyline class="{style}" stroke="{stroke}" points="{path}"/>'

    def dots(self, values: Sequence[tuple[float, float]], fill: str) -> list[str]:
        places = [self.at(*value) for value in values]
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}"/>' for x, y in places]


def labels(ends: Sequence[tuple[float, str]]) -> list[str]:
    """Names at the ends of lines, pushed apart where they would touch."""
    parts, last = [], -math.inf
    for y, who in sorted(ends):
        last = max(y, last + 16)
        parts.append(
            f'<text x="{WIDTH - RIGHT + 10}" y="{last + 4:.1f}" style="fill:{color(who)}">{escape(who)}</text>'
        )
    return parts


def log_scale(low: float, high: float) -> Callable[[float], float]:
    return lambda value: math.log(value / low) / math.log(high / low)


def nice(top: float) -> list[float]:
    """Four or five round numbers from 0 up to at most ``top``."""
    unit = 10 ** math.floor(math.log10(top))
    step = next(step for step in (unit / 5, unit / 2, unit, 2 * unit) if top / step <= 5)
    return [step * number for number in range(int(top / step) + 1)]


def by_who(points: Points) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        found.setdefault(point["who"], []).append(point)
    return found


def color(who: str) -> str:
    return COLORS.get(who.split()[0], OTHER)


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'


def svg(title: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
        f' aria-label="{escape(title)}">'
        f"<style>{STYLE}</style>"
        f'<rect width="{WIDTH}" height="{height:.0f}" rx="6" fill="#fff"/>'
    )
    return "\n".join([head, text(16, 26, title, "title"), *parts, "</svg>", ""])
