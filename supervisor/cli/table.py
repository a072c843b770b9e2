"""Tables that fit the width: what to shorten first, and what to leave out. No I/O; called by ``Terminal.table``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from supervisor.cli.text import clip, safe, width_of

GAP = 2


class Column(NamedTuple):
    """``least``: columns it may be shortened to (None: never shortened). ``order``: the highest is left out first
    where even that is too wide; 0 is never left out.
    """

    title: str
    least: int | None = None
    order: int = 0
    right: bool = False


class Cell(NamedTuple):
    """A cell with a style of its own."""

    text: str
    style: str | None = None


def render(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Cell]],
    width: int | None,
    paint: Callable[[str, str | None], str],
) -> list[str]:
    """Lines of a table: at most ``width`` columns wide; whole, however wide, where ``width`` is None."""
    cells = [[Cell(safe(c.text), c.style) if isinstance(c, Cell) else Cell(safe(c)) for c in row] for row in rows]
    widths = [
        max(width_of(column.title), *(width_of(row[i].text) for row in cells)) if cells else width_of(column.title)
        for i, column in enumerate(columns)
    ]
    shown = fit(columns, widths, width)
    lines = [_line([Cell(columns[i].title, "bold") for i in shown], columns, shown, paint)]
    lines += [_line([row[i] for i in shown], columns, shown, paint) for row in cells]
    return lines


def fit(columns: Sequence[Column], widths: list[int], width: int | None) -> dict[int, int]:
    """Which columns are shown, and how wide: the widest that may be is shortened until all fit, then the last in
    order goes.
    """
    shown = dict(enumerate(widths))
    while width is not None and _total(shown) > width:
        can_shrink = [i for i in shown if (least := columns[i].least) is not None and shown[i] > least]
        if can_shrink:
            widest = max(can_shrink, key=lambda i: shown[i])
            others = sorted((shown[i] for i in can_shrink if i != widest), reverse=True)
            floor = max(columns[widest].least or 1, min(others[0] if others else 0, shown[widest] - 1))
            shown[widest] = max(floor, shown[widest] - (_total(shown) - width))
            continue
        can_go = [i for i in shown if columns[i].order]
        if not can_go:
            break
        del shown[max(can_go, key=lambda i: columns[i].order)]
        # The room that it leaves is for the columns that were shortened for it.
        shown = {i: widths[i] for i in shown}
    return shown


def _total(shown: dict[int, int]) -> int:
    return sum(shown.values()) + GAP * (len(shown) - 1)


def _line(
    cells: Sequence[Cell], columns: Sequence[Column], shown: dict[int, int], paint: Callable[[str, str | None], str]
) -> str:
    parts = []
    for cell, (i, room) in zip(cells, shown.items(), strict=True):
        text = clip(cell.text, room)
        pad = " " * (room - width_of(text))
        painted = paint(text, cell.style)
        parts.append(pad + painted if columns[i].right else painted + pad)
    return (" " * GAP).join(parts).rstrip()
