"""Ctrl-C ends the view and never the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_world import FakeDaemon, job, piece

from supervisor.model.job import State
from supervisor.protocol import DrainReply, JobReply, LogsReply, SubmitReply


@pytest.fixture
def gate() -> threading.Event:
    """Opened by the test's end, so that a daemon's answer that waits for ever does not."""
    return threading.Event()


def interrupted(process: subprocess.Popen[bytes], seen: bytes) -> tuple[int, bytes, bytes]:
    """SIGINT as soon as ``seen`` was printed; the exit code and what was printed on both streams."""
    assert process.stdout is not None
    shown = b""
    while seen not in shown:
        data = os.read(process.stdout.fileno(), 4096)
        assert data, shown
        shown += data
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return process.returncode, shown + out, err


def start(daemon: FakeDaemon, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "supervisor", *words, "--socket", str(daemon.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_follow_detaches(daemon: FakeDaemon, gate: threading.Event, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps({"kind": "steps", "steps": [{"name": "a", "run": "x"}]}))

    def log(params: Any) -> Any:
        yield LogsReply(record=piece(b"line\n", 0))
        gate.wait(60)

    daemon.answers["Submit"] = lambda params: [SubmitReply(id=7)]
    daemon.answers["Logs"] = log
    code, out, err = interrupted(start(daemon, "submit", str(file), "--follow"), b"line\n")
    gate.set()
    assert (code, out) == (130, b"7\nline\n")
    assert b"detached; job 7 goes on" in err
    assert b"Traceback" not in err
    assert daemon.asked("Stop") == []


def test_wait_and_logs_end_quietly(daemon: FakeDaemon, gate: threading.Event) -> None:
    def wait(params: Any) -> Any:
        yield JobReply(job=job(8, State.FAILED))
        gate.wait(60)

    def log(params: Any) -> Any:
        yield LogsReply(record=piece(b"line\n", 0))
        gate.wait(60)

    daemon.answers["Wait"], daemon.answers["Logs"] = wait, log
    for words, seen in ((["wait", "8", "9"], b"8 job-8"), (["logs", "-f", "7"], b"line\n")):
        code, _, err = interrupted(start(daemon, *words), seen)
        assert code == 130
        assert b"Traceback" not in err
    gate.set()


def test_an_interrupted_wait_for_a_drain_says_that_it_goes_on(daemon: FakeDaemon, gate: threading.Event) -> None:
    waiting = threading.Event()

    def drain(params: Any) -> Any:
        if params.wait:
            waiting.set()
            gate.wait(60)
        return [DrainReply(running=2)]

    daemon.answers["Drain"] = drain
    process = start(daemon, "drain", "--wait")
    assert waiting.wait(30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    gate.set()
    assert process.returncode == 130
    assert b"the drain goes on" in err
