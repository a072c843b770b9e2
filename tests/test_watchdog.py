"""The watchdog: what counts as a blocked loop and what doesn't, by its own ticks; and that it ends the process, says
where it stood, and needs neither the interpreter's lock nor a log that can be written to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from supervisor.watchdog import EXIT_CODE, SLACK, TICKS, Count

PATIENCE = 0.6
BEGIN = """
import asyncio, logging, os, re, sys, time
from supervisor import watchdog
watchdog.TELLING = 0.3
logging.basicConfig()

async def main(work):
    with watchdog.Watchdog(%s):
        await asyncio.sleep(0)
        print("begins", flush=True)
        await work()
    print("ends", flush=True)

def block():
    time.sleep(600)

async def stall():
    block()

async def wait():
    await asyncio.to_thread(sys.stdin.readline)

async def keep_the_lock():
    re.match("(a+)+$", "a" * 60 + "b")

async def work_hard():
    end = time.thread_time() + %s
    while time.thread_time() < end:
        await asyncio.sleep(0)
"""


def started(work: str, patience: float | None = PATIENCE, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    program = BEGIN % (patience, 2 * SLACK * PATIENCE) + f"\nasyncio.run(main({work}))\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    return process


def test_only_ticks_without_a_beat_count() -> None:
    count = Count(3)
    for _ in range(10):
        count.beats += 1
        assert not any(count.tick() for _ in range(3))
    assert count.tick()


def test_time_in_which_the_thread_does_not_tick_does_not_count() -> None:
    """A machine that was suspended at the worst moment: on waking the thread may come first, once."""
    count = Count(3)
    count.beats += 1
    assert not count.tick()
    assert not count.tick()
    # It sleeps here, for days. The thread's wait is over, then the loop's.
    assert not count.tick()
    count.beats += 1
    assert not any(count.tick() for _ in range(3))


def test_a_blocked_loop_ends_the_process_which_says_where_it_stood() -> None:
    process = started("stall")
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE
    assert "the event loop was blocked for 0.6 s" in said
    assert "in stall" in said and "in block" in said


def test_a_log_that_takes_nothing_does_not_save_it() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    process = started("stall", stderr=write)
    assert process.wait(60) == EXIT_CODE
    process.communicate()
    os.close(read)
    os.close(write)


def test_a_call_that_keeps_the_interpreters_lock_is_ended_by_the_kernel() -> None:
    process = started("keep_the_lock")
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGPROF
    assert "in keep_the_lock" in said


def test_a_loop_that_works_hard_is_not_blocked() -> None:
    process = started("work_hard")
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said, errors) == (0, "ends\n", "")


@pytest.mark.parametrize("patience", [PATIENCE, None], ids=["watched", "unwatched"])
def test_a_process_that_was_stopped_for_long_is_not_taken_for_a_blocked_one(patience: float | None) -> None:
    process = started("wait", patience)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    time.sleep(2 * PATIENCE)  # not to synchronise: this is what it is to live through
    process.send_signal(signal.SIGCONT)
    time.sleep(2 * PATIENCE / TICKS)  # and a tick or two of its own after that
    said, errors = process.communicate("\n", timeout=60)
    assert (process.returncode, said, errors) == (0, "ends\n", "")
