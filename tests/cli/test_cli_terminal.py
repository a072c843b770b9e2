"""What somebody who looks sees: tables in the width, colours, headers, the live line, questions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_world import FakeDaemon, attempt, end, job, listing, on_terminal, piece, shown, status
from hypothesis import given
from hypothesis import strategies as st

from supervisor.cli.table import Cell, Column, render
from supervisor.cli.text import age, clip, duration, fold, safe, width_of
from supervisor.model.job import Outcome, State
from supervisor.protocol import JobReply, LogsReply, LogStream, ShowReply, StopReply, SubmitReply

COLOUR = re.compile(r"\x1b\[\d+m")


def plain(text: str, style: str | None) -> str:
    return text


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_ps_fits_the_terminal(daemon: FakeDaemon, columns: int) -> None:
    daemon.answers["List"] = listing(
        job(7, State.RUNNING, name="a-job-with-a-very-long-name-" * 4, host="build-host-17.example.org"),
        job(123456, State.WAITING, name="漢字の名前" * 5, parents_left=2),
        job(9, State.FAILED, name="evil\x1b[2Jname"),
    )
    code, text = on_terminal("ps", "--all", "--socket", str(daemon.path), columns=columns)
    assert code == 0
    assert "\x1b[2J" not in text
    lines = [COLOUR.sub("", line) for line in text.splitlines()]
    assert len(lines) == 4
    assert max(width_of(line) for line in lines) <= columns
    for line, words in zip(lines[1:], ("running", "waiting", "failed"), strict=True):
        assert words in line
    assert "\x1b[34mrunning" in text


def test_no_color_is_respected(daemon: FakeDaemon) -> None:
    daemon.answers["List"] = listing(job(7, State.RUNNING))
    _, text = on_terminal("ps", "--socket", str(daemon.path), environ={"NO_COLOR": "1"})
    assert "\x1b" not in text


def test_follow_shows_headers_notes_steps_and_the_end(daemon: FakeDaemon, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    steps = [{"name": "build", "run": "x"}, {"name": "test", "run": "x"}]
    file.write_text(json.dumps({"kind": "steps", "steps": steps, "repository": {"url": "/r", "commit": "main"}}))
    daemon.answers["Submit"] = lambda params: [SubmitReply(id=7)]
    daemon.answers["Logs"] = lambda params: [
        LogsReply(record=piece(b"compiling", 0, step=1)),
        LogsReply(record=piece(b" done\n", 9, step=1)),
        LogsReply(record=piece(b"no newline", 15, step=2)),
        LogsReply(record=piece(b"[bsup: a note]\n", 25, step=2, stream=LogStream.NOTE)),
        LogsReply(end=end(40, State.FAILED)),
    ]
    over = job(7, State.FAILED, error="step build: exit code 5")
    daemon.answers["Wait"] = lambda params: [JobReply(job=over)]
    daemon.answers["Show"] = lambda params: [shown(over, attempts=[attempt()])]
    code, text = on_terminal("submit", str(file), "--follow", "--socket", str(daemon.path), environ={"NO_COLOR": "1"})
    text = text.replace("\r\x1b[2K", "")
    assert code == 5
    assert text.splitlines()[:7] == [
        "7",
        "── step 2/3 build",
        "compiling done",
        "── step 3/3 test",
        "no newline",
        "[bsup: a note]",
        "",
    ]
    assert text.splitlines()[-1] == "job 7 job-7: failed after 2.0s: step build: exit code 5"
    assert re.search(r"2 +build +failed +1m02s +5", text)


def test_wait_shows_how_far_the_job_is(daemon: FakeDaemon) -> None:
    """The live line is drawn over itself and gone at the end; only the last word stays."""
    import threading

    asked = threading.Event()

    def show(params: Any) -> list[Any]:
        asked.set()
        return [shown(job(7, State.RUNNING))]

    def wait(params: Any) -> list[Any]:
        assert asked.wait(20)
        return [JobReply(job=job(7))]

    daemon.answers["Show"], daemon.answers["Wait"] = show, wait
    code, text = on_terminal("wait", "7", "--socket", str(daemon.path), environ={"NO_COLOR": "1"})
    assert code == 0
    assert "· job 7: running, step 2/5 test" in text
    assert text.rpartition("\x1b[2K")[2] == "7 job-7: succeeded after 3m12s\n"


def test_status_on_a_terminal(daemon: FakeDaemon) -> None:
    daemon.answers["Status"] = lambda params: [status("the database is away")]
    code, text = on_terminal("status", "--socket", str(daemon.path))
    assert code == 0
    assert "\x1b[31m1 thing is wrong\x1b[0m" in text


def test_help_fits_eighty_columns() -> None:
    for words in ([], ["help", "stop"], ["submit", "-h"]):
        _, text = on_terminal(*words, columns=80)
        assert max(width_of(line) for line in text.splitlines()) <= 80


@given(
    st.lists(st.lists(st.text(max_size=40), min_size=3, max_size=3), max_size=4),
    st.integers(min_value=40, max_value=120),
)
def test_a_table_never_leaves_its_width(rows: list[list[str]], width: int) -> None:
    """Whatever the cells hold: control characters, wide and combining ones."""
    columns = [Column("ID"), Column("NAME", least=4), Column("MORE", least=2, order=1)]
    cells: list[list[str | Cell]] = [["7", row[1], Cell(row[2], "red")] for row in rows]
    lines = render(columns, cells, width, plain)
    assert len(lines) == len(rows) + 1
    assert all(width_of(line) <= width and line.isprintable() for line in lines)


def test_a_table_shortens_the_widest_then_leaves_columns_out() -> None:
    columns = [Column("ID", right=True), Column("NAME", least=6), Column("KIND", order=2), Column("HOST", order=1)]
    rows = [["12", "a-long-name", "steps", "build1"]]
    assert render(columns, rows, 100, plain)[1] == "12  a-long-name  steps  build1"
    assert render(columns, rows, 26, plain)[1] == "12  a-long…  steps  build1"
    assert render(columns, rows, 24, plain)[1] == "12  a-long-name  build1"
    assert render(columns, rows, 10, plain)[1] == "12  a-lon…"


@given(st.text(), st.integers(min_value=1, max_value=30))
def test_clip_keeps_the_width(text: str, width: int) -> None:
    assert width_of(clip(text, width)) <= width


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (3600, "1h00m"),
        (3900, "1h05m"),
        (180_000, "2d02h"),
        (-3, "0.0s"),
    ],
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_ages_read_well() -> None:
    assert [age(s) for s in (None, 5, 119, 120, 7199, 7200, 172_800)] == ["-", "5s", "119s", "2m", "119m", "2h", "2d"]


def test_control_characters_are_written_out() -> None:
    assert safe("a\x1b[31mb\nc\u202ed") == "a\\x1b[31mb c\\u202ed"


def test_stop_asks_on_a_terminal(daemon: FakeDaemon) -> None:
    """Without an answer (end of input) it is a no."""
    import os
    import pty
    import subprocess
    import sys

    daemon.answers["List"] = listing(job(7, State.RUNNING))
    daemon.answers["Stop"] = lambda params: [StopReply(id=7, did="stopping")]
    for answer, code, stops in ((b"\n", 1, 0), (b"y\n", 0, 1)):
        primary, secondary = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "stop", "--all", "--socket", str(daemon.path)],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
        )
        os.close(secondary)
        seen = b""
        while b"[y/N]" not in seen:
            seen += os.read(primary, 4096)
        assert b"Stop this job?" in seen
        os.write(primary, answer)
        assert process.wait(30) == code
        os.close(primary)
        assert len(daemon.asked("Stop")) == stops


@pytest.mark.parametrize("columns", [60, 80])
def test_sentences_are_folded_below_themselves(daemon: FakeDaemon, columns: int) -> None:
    problem = "the database has been away since this morning, " * 3 + "and that is all"
    daemon.answers["Status"] = lambda params: [status(problem)]
    _, text = on_terminal("status", "--socket", str(daemon.path), columns=columns, environ={"NO_COLOR": "1"})
    lines = text.splitlines()
    assert max(width_of(line) for line in lines) <= columns
    at = next(i for i, line in enumerate(lines) if line.startswith("  ! "))
    assert lines[at + 1].startswith("    ")
    assert problem in " ".join(line.strip(" !") for line in lines[at:])


def test_an_error_is_folded_below_itself(tmp_path: Path) -> None:
    socket = tmp_path / "nobody.sock"
    code, text = on_terminal("status", "--socket", str(socket), columns=60, environ={"NO_COLOR": "1"})
    assert code == 6
    assert str(socket) in text
    assert any(line.startswith(" " * 12) for line in text.splitlines())


@given(st.text(), st.integers(1, 30))
def test_folding_loses_nothing(text: str, width: int) -> None:
    lines = fold(text, width)
    assert " ".join(lines) == text
    assert all(width_of(line) <= width or " " not in line.strip(" ") for line in lines)


def test_a_job_that_is_no_process_reads_well(daemon: FakeDaemon) -> None:
    """No steps, no exit code of a success, no log: nothing puzzling is printed."""
    view = job(7, kind="noop", name="nap")
    one = attempt(1, Outcome.SUCCEEDED, steps=[], exit_code=0, error=None)
    reply = ShowReply(job=view, spec={"kind": "noop", "args": {"sleep": 1.5}}, parents=[], children=[], attempts=[one])
    daemon.answers["Show"] = lambda params: [reply]
    daemon.answers["Logs"] = lambda params: [LogsReply(end=end(0))]
    where = ("--socket", str(daemon.path))
    code, text = on_terminal("show", "7", *where, environ={"NO_COLOR": "1"})
    assert code == 0 and "exit code" not in text and "STEP" not in text
    assert 'args        {"sleep":1.5}' in text
    assert on_terminal("logs", "7", *where, environ={"NO_COLOR": "1"}) == (0, "nothing was logged\n")
    code, text = on_terminal("logs", "7", "--step", "1", *where, environ={"NO_COLOR": "1"})
    assert code == 2 and "job 7 has none: it is of kind noop" in text
