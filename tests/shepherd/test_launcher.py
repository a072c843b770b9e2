"""The launcher can be lost at any moment, as a job can kill it: no exit is lost with it, and nothing runs twice."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from yard import SHEPHERD, Yard, end, is_alive, launcher, until


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


def test_what_it_had_not_begun_the_next_one_starts(yard: Yard) -> None:
    killed = launcher(yard.pid)
    os.kill(killed, signal.SIGSTOP)
    steps = []
    for n in (3, 4):
        yard.workspace(f"r-{n}", n)
        steps.append(yard.write_step(f"exit {n}", run=f"r-{n}", number=n))
        yard.link.connect().sendall(b'{"id":7,"do":"start","dir":"%s"}\n' % str(steps[-1]).encode())
        until((steps[-1] / "claim").exists, "it is claimed")
    assert [live["state"] for live in yard.link.ask(do="status")["live"]] == ["starting"] * 2
    end(killed, signal.SIGKILL)
    assert [yard.ended(step).how for step in steps] == [(3, None, None), (4, None, None)]
    yard.link.close()
    assert yard.link.ask(do="start", dir=str(steps[0]))["again"] is True
    _another(yard, killed)


@pytest.mark.root
def test_a_job_that_kills_it_in_its_first_moment_runs_all_the_same(uid_yard: Yard) -> None:
    """In that moment the launcher has the job's uid still. Its neighbours are started too."""
    for n in range(10):
        steps = []
        for number, command in ((0, "kill -KILL -1; exit 6"), (1, "exit 5"), (2, "exit 4")):
            uid_yard.workspace(f"r-{n}-{number}", number)
            steps.append(uid_yard.write_step(command, run=f"r-{n}-{number}", number=number))
        requests = [b'{"id":7,"do":"start","dir":"%s"}\n' % str(step).encode() for step in steps]
        uid_yard.link.connect().sendall(b"".join(requests))
        assert [uid_yard.ended(step).how[0] for step in steps] == [6, 5, 4]


def test_a_step_whose_start_nobody_saw_is_a_loss_and_never_starts_again(
    make_yard: Callable[..., Yard], tmp_path: Path
) -> None:
    """Its launcher died in the middle: what is found of it is killed."""
    package = tmp_path / "supervisor"
    shutil.copytree(SHEPHERD, package / "shepherd", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    tmp_path.chmod(0o755)
    spawn = package / "shepherd" / "spawn.py"
    what = "        _, argv, cwd, environment, ids, workspace, private_tmp = order\n"
    assert what in spawn.read_text()
    spawn.write_text(spawn.read_text().replace(what, what + "        'first' in argv and os.kill(os.getpid(), 9)\n"))
    yard = make_yard(program=package / "shepherd")
    yard.launch()
    yard.workspace()
    step = yard.write_step(["sh", "-c", "exit 0", "first"])
    assert yard.link.ask(do="start", dir=str(step))["ok"]
    ended = yard.ended(step)
    assert (ended.exit, ended.closed["gone"]) == (None, True)
    assert yard.link.ask(do="start", dir=str(step))["again"] is True
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
    step = yard.write_step("exit 5")
    assert yard.link.ask(do="start", dir=str(step))["ok"]
    assert yard.ended(step).how == (5, None, None)
    assert not is_alive(killed)


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
