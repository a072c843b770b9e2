"""results.json and RESULTS.md: what was found, by whom and when. The page is drawn from the JSON and says no more.

Findings are merged by name: a quick run replaces the rows and bars that it measured again and leaves the others, each
with the run that made it. So the page stays true of the last measurement of everything on it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from measured import Findings, Measured, number

HERE = Path(__file__).parent
JSON = HERE / "results.json"
PAGE = HERE / "RESULTS.md"
HOLDS = {True: "yes", False: "**no**", None: "–"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of the benchmarks: ``id`` names it in the tables, ``about`` is a sentence on machine and versions."""

    id: str
    command: str
    about: str


def load() -> dict[str, Any]:
    if JSON.exists():
        found: dict[str, Any] = json.loads(JSON.read_text())
        return found
    return {"runs": {}, "sections": {}}


def merge(results: dict[str, Any], run: Run, title: str, findings: Findings, whole: bool) -> None:
    """Puts the findings of one module under its title; ``whole``: in place of all that was there."""
    if whole:
        results["sections"].pop(title, None)
    results["runs"][run.id] = {"command": run.command, "about": run.about}
    section = results["sections"].setdefault(title, {"measured": {}, "bars": {}, "series": {}, "notes": {}})
    section["notes"].update(findings.notes)
    for row in findings.measured:
        section["measured"][row.what] = {**dataclasses.asdict(row), "run": run.id}
    for bar in findings.bars:
        section["bars"][bar.what] = {**dataclasses.asdict(bar), "run": run.id}
    for name, points in findings.series.items():
        section["series"][name] = {"points": [dict(point) for point in points], "run": run.id}


def write(results: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """Both files; returns what they hold. Sections of modules that are gone, and runs that nothing stands for any more,
    are dropped."""
    sections = {title: results["sections"][title] for title in order if title in results["sections"]}
    used = {
        entry["run"]
        for section in sections.values()
        for kind in ("measured", "bars", "series")
        for entry in section[kind].values()
    }
    runs = {name: run for name, run in results["runs"].items() if name in used}
    kept = {"runs": runs, "sections": sections}
    JSON.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(kept))
    return kept


def page(results: dict[str, Any]) -> str:
    lines = [
        "# What bsup does in a second",
        "",
        "Written by `make bench` and `make bench-quick`; the column *run* says by which. Numbers compare versions and",
        "peers on one machine; between machines they say little, and differences under 20 % mean nothing.",
        "Contestants take turns within a run; a value is the median of the repeats, with the lowest and the highest.",
        "",
        *[f"- **{name}**: `{run['command']}`. {run['about']}" for name, run in results["runs"].items()],
        "",
        "## Bars",
        "",
        "| what | measured | must be | holds | run |",
        "|---|---|---|---|---|",
    ]
    for section in results["sections"].values():
        for bar in section["bars"].values():
            note = f" ({bar['note']})" if bar["note"] else ""
            lines.append(
                f"| {bar['what']}{note} | {bar['value']} | {bar['must']} | {HOLDS[bar['holds']]} | {bar['run']} |"
            )
    for title, section in results["sections"].items():
        lines += ["", f"## {title}", "", "| what | median | range | how | run |", "|---|---|---|---|---|"]
        for entry in section["measured"].values():
            lines.append(f"{row(Measured(**{k: v for k, v in entry.items() if k != 'run'}))} {entry['run']} |")
        if section["notes"]:
            lines += ["", *[f"- {who}: {note}" for who, note in section["notes"].items()]]
    return "\n".join(lines) + "\n"


def row(measured: Measured) -> str:
    spread = f"{number(measured.low)} – {number(measured.high)}"
    return f"| {measured.what} | {number(measured.value)} {measured.unit} | {spread} | {measured.note} |"
