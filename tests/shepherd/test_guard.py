"""A daemon with jobs of its own that lets the fence pass in silence is killed; nothing else is, whatever the file says.

The daemon here is a real process that writes the file as the real one does, and then blocks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from yard import PATIENCE, Yard, until

from supervisor.shepherd import kill
from supervisor.shepherd.fence import Fence, Guarded, boot_id
from supervisor.shepherd.files import StateDirectory
from supervisor.shepherd.loop import now

_DAEMON = """
import asyncio, sys
from pathlib import Path
from supervisor.runners.fence import FenceFile

async def main():
    fence = FenceFile(Path(sys.argv[1]), guard_patience=0.1)
    await fence.guard(True)
    await fence.write(fence.now() + float(sys.argv[2]))
    print("guarded", flush=True)
    for line in sys.stdin:  # blocks the loop
        print(line.strip(), flush=True)

asyncio.run(main())
"""

Launch = Callable[[Path, float], "subprocess.Popen[str]"]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts a daemon that blocks once its fence, so many seconds ahead, is on disk."""
    processes: list[subprocess.Popen[str]] = []

    def start(state: Path, ahead: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _DAEMON, str(state), str(ahead)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "guarded\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def _answers(process: subprocess.Popen[str]) -> bool:
    """A process that was sent SIGKILL does not."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("here\n")
    process.stdin.flush()
    return process.stdout.readline() == "here\n"


def test_a_blocked_daemon_with_jobs_of_its_own_is_killed_when_the_fence_passes(yard: Yard, launch: Launch) -> None:
    daemon = launch(yard.state, 0.3)
    assert daemon.wait(PATIENCE) == -signal.SIGKILL
    assert yard.link.ask(do="status")["ok"]


def test_the_shepherd_stays_for_a_daemon_it_guards(short_tmp: Path, launch: Launch) -> None:
    """Nobody is connected, and it would leave at once: who else would kill the daemon?"""
    yard = Yard(short_tmp, linger=0.05)
    try:
        daemon = launch(yard.state, 1.0)
        yard.launch()
        yard.link.ask(do="status")
        yard.link.close()
        assert daemon.wait(PATIENCE) == -signal.SIGKILL
        until(lambda: not (yard.state / "shepherd.sock").exists(), "the shepherd leaves")
    finally:
        yard.shut_down()


def test_a_daemon_that_is_ahead_of_its_fence_or_unguarded_or_has_confirmed_is_left_alone(short_tmp: Path) -> None:
    fence = Fence(StateDirectory(str(short_tmp), None))
    daemon = {"pid": os.getpid(), "start_time": kill.start_time(os.getpid()), "patience": 2.0}

    def overdue_at(**said: object) -> float | None:
        (short_tmp / "new").write_text(json.dumps({"boot_id": boot_id(), **said}))
        (short_tmp / "new").rename(short_tmp / "fence")
        return fence.overdue_at()

    assert fence.overdue_at() is None
    assert overdue_at(fence_at=1.0) is None
    assert overdue_at(fence_at=1.0, daemon=daemon) == 3.0
    assert overdue_at(fence_at=1.0, daemon=daemon, confirmed_at=1.0) is None
    assert overdue_at(fence_at=5.0, daemon=daemon, confirmed_at=1.0) == 7.0
    (short_tmp / "fence").unlink()
    assert fence.overdue_at() == 7.0, "a file that is missing changes nothing"


@pytest.mark.parametrize("part", [{"pid": 1, "start_time": 0}, {"pid": "2", "start_time": 0}, {"pid": 2}, [], "x"])
def test_a_damaged_part_names_nobody(short_tmp: Path, part: object) -> None:
    fence = Fence(StateDirectory(str(short_tmp), None))
    (short_tmp / "fence").write_text(json.dumps({"boot_id": boot_id(), "fence_at": 1.0, "daemon": part}))
    assert fence.overdue_at() is None


def test_only_that_very_process_of_the_daemons_user_is_killed(short_tmp: Path, launch: Launch) -> None:
    """A pid that was given to another process since, or one of another user's, is left alone."""
    daemon = launch(short_tmp, 1000.0)
    start_time = kill.start_time(daemon.pid)
    Guarded(daemon.pid, start_time + 1, 0.0).kill(os.geteuid())
    assert _answers(daemon)
    Guarded(daemon.pid, start_time, 0.0).kill(os.geteuid() + 1)
    assert _answers(daemon)
    Guarded(daemon.pid, start_time, 0.0).kill(os.geteuid())
    assert daemon.wait(PATIENCE) == -signal.SIGKILL


def test_a_renewal_is_seen_however_soon_it_follows(short_tmp: Path) -> None:
    """Files that replace one another within a tick of the file system's clock may have the same stamp and inode."""
    fence = Fence(StateDirectory(str(short_tmp), None))
    for at in range(1, 200):
        (short_tmp / "new").write_text(json.dumps({"boot_id": boot_id(), "fence_at": now() + at}))
        (short_tmp / "new").rename(short_tmp / "fence")
        assert not fence.has_passed
        assert fence.at is not None and abs(fence.at - now() - at) < 0.9
