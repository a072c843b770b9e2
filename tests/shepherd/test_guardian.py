"""The guardian begins a killed shepherd anew, which ends what was left; and ends one that can't keep the fence."""

from __future__ import annotations

import os
import signal

from yard import Ended, Yard, end, is_alive, until


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def test_a_killed_shepherd_is_followed_by_one_that_ends_what_it_left(yard: Yard) -> None:
    """No daemon is needed for that."""
    step = yard.start("trap '' TERM; echo $$ > $WORDS; setsid sh -c 'echo $$ > $WORDS; sleep 1000' & sleep 1000")
    pids = [int(yard.word()), int(yard.word())]
    killed = yard.pid
    yard.link.close()
    end(killed, signal.SIGKILL)
    for pid in pids:
        end(pid)
    until((step / "closed").exists, "what was left is closed")
    assert Ended(step).closed["gone"] is True
    until(lambda: yard.pid != killed, "there is another shepherd")
    assert yard.launch() != killed
    assert yard.run("echo on", index=1).out == b"on\n"


def test_a_shepherd_that_hangs_when_the_fence_passes_is_killed_and_its_jobs_end(yard: Yard) -> None:
    yard.fence(1.0)
    step = yard.start("echo $$ > $WORDS; sleep 1000")
    pid, shepherd = int(yard.word()), yard.pid
    os.kill(shepherd, signal.SIGSTOP)
    yard.link.close()
    end(shepherd)
    end(pid)
    until((step / "closed").exists, "what was left is closed")
    yard.fence(3600)
    yard.launch()
    assert yard.link.ask(do="status")["live"] == []


def test_the_guardian_leaves_with_its_shepherd(yard: Yard) -> None:
    guardian = _parent(yard.pid)
    shepherd = yard.pid
    yard.link.close()
    end(shepherd, signal.SIGTERM)
    end(guardian)
    assert yard.launch() != shepherd


def test_a_guardian_that_is_told_to_end_ends_its_shepherd_in_order(yard: Yard) -> None:
    """A service manager knows the guardian only."""
    step = yard.start("echo $$ > $WORDS; sleep 1000")
    pid, guardian, shepherd = int(yard.word()), _parent(yard.pid), yard.pid
    yard.link.close()
    end(guardian, signal.SIGTERM)
    assert not is_alive(pid) and not is_alive(shepherd)
    assert '"gone":true' in (step / "closed").read_text()
    yard.launch()


def test_jobs_go_on_when_the_guardian_is_killed(yard: Yard) -> None:
    """It only waits: the shepherd does all there is to do."""
    step = yard.start("echo up > $WORDS; read x < $GO; exit 6")
    yard.word()
    end(_parent(yard.pid), signal.SIGKILL)
    yard.go()
    assert yard.ended(step).how == (6, None, None)
