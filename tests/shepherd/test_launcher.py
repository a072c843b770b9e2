"""The launcher can be lost at any moment, as a job can kill it: no exit is lost with it, and nothing runs twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from yard import Ended, Yard, end, is_alive, launcher, until


def _another(yard: Yard, killed: int) -> None:
    until(lambda: launcher(yard.pid) != killed, "there is another launcher")


def test_steps_outlive_it_and_their_ends_are_exact(yard: Yard) -> None:
    steps = [yard.start(f"echo $$ > $WORDS; read x < $GO; echo {n}; exit {n}", run=f"r-{n}", number=n) for n in (3, 4)]
    for _ in steps:
        yard.word()
    killed = launcher(yard.pid)
    end(killed, signal.SIGKILL)
    yard.go(2)
    for step, code in zip(steps, (3, 4), strict=True):
        ended = yard.ended(step)
        assert (ended.how, ended.out) == ((code, None, None), f"{code}\n".encode())
    _another(yard, killed)
    assert yard.run("exit 5", run="r-5", number=5).how == (5, None, None)


def test_an_exit_it_could_not_tell_any_more_is_kept_by_the_kernel(yard: Yard) -> None:
    step = yard.start("echo $$ > $WORDS; read x < $GO; exit 6")
    pid, killed = int(yard.word()), launcher(yard.pid)
    os.kill(killed, signal.SIGSTOP)
    yard.go()
    until(lambda: not is_alive(pid), "it is dead, and nobody was told")
    assert not (step / "exit").exists()
    end(killed, signal.SIGKILL)
    assert yard.ended(step).how == (6, None, None)


def test_a_step_that_was_being_started_is_a_loss_and_never_starts_again(yard: Yard) -> None:
    """Nobody knows whether it runs: what is found of it is killed."""
    killed = launcher(yard.pid)
    os.kill(killed, signal.SIGSTOP)
    yard.workspace()
    step = yard.write_step("echo ran > $WORDS; sleep 1000")
    yard.link.connect().sendall(b'{"id":7,"do":"start","dir":"%s"}\n' % str(step).encode())
    until((step / "claim").exists, "it is claimed")
    assert yard.link.ask(do="status")["live"][0]["state"] == "starting"
    end(killed, signal.SIGKILL)
    yard.link.wait_event("closed", step)
    ended = Ended(step)
    assert (ended.exit, ended.closed["gone"]) == (None, True)
    assert yard.link.ask(do="start", dir=str(step))["again"] is True
    _another(yard, killed)
    assert yard.run("exit 5", index=1).how == (5, None, None)


def test_what_is_stopped_before_it_began_ends_as_soon_as_it_has(yard: Yard) -> None:
    held = launcher(yard.pid)
    os.kill(held, signal.SIGSTOP)
    yard.workspace()
    step = yard.write_step("trap '' TERM; while :; do sleep 1000; done")
    yard.link.connect().sendall(b'{"id":7,"do":"start","dir":"%s"}\n' % str(step).encode())
    until((step / "claim").exists, "it is claimed")
    assert yard.link.ask(do="stop", dir=str(step.parent), grace=1000, kill=True)["live"] is True
    os.kill(held, signal.SIGCONT)
    assert yard.ended(step).how == (None, 9, "stop")


@pytest.mark.slow
def test_one_that_hangs_is_replaced(yard: Yard) -> None:
    """In an exec from a file system whose server is dead, say."""
    killed = launcher(yard.pid)
    yard.workspace()
    os.kill(killed, signal.SIGSTOP)
    step = yard.write_step("true")
    assert yard.link.ask(do="start", dir=str(step))["ok"]
    yard.link.wait_event("closed", step)
    assert Ended(step).closed["gone"] is True
    assert not is_alive(killed)
    assert yard.run("exit 5", index=1).how == (5, None, None)


def test_it_holds_nothing_of_the_shepherds(yard: Yard) -> None:
    held = [
        os.readlink(f"/proc/{launcher(yard.pid)}/fd/{name}") for name in os.listdir(f"/proc/{launcher(yard.pid)}/fd")
    ]
    assert not any("shepherd.lock" in name for name in held)
    assert sum(name.startswith("socket:") for name in held) == 1


def test_it_goes_with_the_shepherd(yard: Yard) -> None:
    pid, shepherd = launcher(yard.pid), yard.pid
    yard.link.close()
    end(shepherd, signal.SIGTERM)
    end(pid)
    assert yard.launch() != shepherd
    assert Path(f"/proc/{launcher(yard.pid)}/comm").read_text() == "bsup-launcher\n"
