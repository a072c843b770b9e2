"""A killed shepherd's steps go on under the next one; a killed guardian's place is taken; where both are killed
at once, nothing runs unguarded."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from yard import Ended, Yard, end, is_alive, launcher, until


def test_steps_of_a_killed_shepherd_go_on_and_end_as_they_do(yard: Yard) -> None:
    """No daemon is needed for that."""
    step = yard.start("echo 1; echo $$ > $WORDS; setsid sleep 1000 & echo $! > $WORDS; read x < $GO; echo 2; exit 7")
    main, background = int(yard.word()), int(yard.word())
    (killed,) = yard.kill("shepherd")
    yard.until_served(killed)
    (live,) = yard.link.ask(do="status")["live"]
    assert (live["dir"], live["pid"], live["state"]) == (str(step), main, "running")
    assert yard.link.ask(do="start", dir=str(step))["again"] is True
    yard.go()
    ended = yard.ended(step)
    assert (ended.how, ended.out) == ((7, None, None), b"1\n2\n")
    assert not is_alive(background)
    assert yard.run("echo on", index=1).out == b"on\n"


def test_what_ends_while_there_is_no_shepherd_ends_as_it_did(yard: Yard) -> None:
    step = yard.start("echo $$ > $WORDS; read x < $GO; echo last; kill -TERM $$")
    pid, shepherd, guardian = int(yard.word()), yard.pid, yard.guardian
    os.kill(guardian, signal.SIGSTOP)
    yard.kill("shepherd")
    yard.go()
    until(lambda: not is_alive(pid), "it has ended, and nobody was there")
    os.kill(guardian, signal.SIGCONT)
    yard.until_served(shepherd)
    ended = yard.ended(step)
    assert (ended.how, ended.out) == ((None, 15, None), b"last\n")


def test_bytes_that_nobody_had_read_are_kept(yard: Yard) -> None:
    """Nobody but the guardian has the FIFO open any more."""
    step = yard.start("echo $$ > $WORDS; read x < $GO; head -c 60000 /dev/zero; echo end >&2; exit 3")
    pid, shepherd = int(yard.word()), yard.pid
    os.kill(shepherd, signal.SIGSTOP)
    yard.go()
    until(lambda: not is_alive(pid), "it has written all")
    yard.kill("shepherd", "launcher")
    yard.until_served(shepherd)
    ended = yard.ended(step)
    assert (ended.how, ended.out, ended.err) == ((3, None, None), bytes(60000), b"end\n")


@pytest.mark.slow
def test_no_byte_is_lost_however_often_it_is_killed(yard: Yard) -> None:
    command = "echo up > $WORDS; i=0; while [ $i -lt 30000 ]; do echo line $i; i=$((i+1)); done; exit {n}"
    steps = [yard.start(command.replace("{n}", str(n)), run=f"r-{n}", number=n) for n in range(4)]
    for _ in steps:
        yard.word()
    for _ in range(5):
        (killed,) = yard.kill("shepherd")
        yard.until_served(killed)
    wanted = hashlib.sha256(b"".join(b"line %d\n" % i for i in range(30000))).hexdigest()
    for n, step in enumerate(steps):
        ended = yard.ended(step)
        assert ended.how == (n, None, None)
        assert hashlib.sha256(ended.out).hexdigest() == wanted


def test_a_stop_goes_on_where_it_was(yard: Yard) -> None:
    step = yard.start("trap 'echo asked' TERM; echo up > $WORDS; while :; do sleep 0.01; done")
    yard.word()
    yard.link.ask(do="stop", dir=str(step.parent), grace=0.5, kill=False)
    (killed,) = yard.kill("shepherd")
    yard.until_served(killed)
    ended = yard.ended(step)
    assert (ended.how, ended.out) == ((None, 9, "stop"), b"asked\n")


def test_a_timeout_goes_on_where_it_was(yard: Yard) -> None:
    step = yard.start("trap 'exit 6' TERM; echo up > $WORDS; while :; do sleep 0.01; done", timeout=0.5, grace=30)
    yard.word()
    (killed,) = yard.kill("shepherd")
    yard.until_served(killed)
    assert yard.ended(step).how == (6, None, "timeout")


def test_a_step_can_be_stopped_that_another_shepherd_started(yard: Yard) -> None:
    step = yard.start("trap '' TERM; setsid sh -c 'echo $$ > $WORDS; sleep 1000' & while :; do sleep 1000; done")
    background = int(yard.word())
    (killed,) = yard.kill("shepherd")
    yard.until_served(killed)
    assert yard.link.ask(do="stop", dir=str(step.parent), grace=0, kill=True)["live"] is True
    assert yard.ended(step).how == (None, 9, "stop")
    assert not is_alive(background)


def test_the_limit_of_output_is_that_of_both_together(yard: Yard) -> None:
    step = yard.start("head -c 70 /dev/zero; echo up > $WORDS; read x < $GO; head -c 70 /dev/zero", max_output=100)
    yard.word()
    until(lambda: (step / "out").exists() and (step / "out").stat().st_size == 70, "the first half is kept")
    (killed,) = yard.kill("shepherd")
    yard.until_served(killed)
    yard.go()
    ended = yard.ended(step)
    assert (len(ended.out), ended.closed["out_dropped"]) == (100, 40)


def test_an_end_that_was_on_disk_already_is_not_told_anew(yard: Yard) -> None:
    """Killed between ``exit`` and ``closed``: what is left of the step is killed, and that is not how it ended."""
    step = yard.start("trap '' TERM; echo up > $WORDS; while :; do sleep 1000; done")
    yard.word()
    os.kill(yard.pid, signal.SIGSTOP)
    told = '{"exit_code": 4, "signal": null, "at": 1.0, "cause": null, "error": null}'
    (step / "exit").write_text(told)
    (killed,) = yard.kill("shepherd")
    yard.until_served(killed)
    ended = yard.ended(step)
    assert (ended.how, ended.closed["gone"]) == ((4, None, None), False)
    assert (step / "exit").read_text() == told


def test_the_fence_is_kept_while_no_shepherd_can_begin(yard: Yard) -> None:
    step = yard.start("trap '' TERM; echo $$ > $WORDS; setsid sh -c 'echo $$ > $WORDS; sleep 1000' & sleep 1000")
    pids = [int(yard.word()), int(yard.word())]
    (killed,) = yard.kill("shepherd")
    (yard.state / "shepherd.pid").unlink(missing_ok=True)
    (yard.state / "shepherd.pid").mkdir()
    yard.fence(0.3)
    for pid in pids:
        end(pid)
    assert not (step / "exit").exists()
    (yard.state / "shepherd.pid").rmdir()
    yard.fence(3600)
    until((step / "closed").exists, "the next one closes it")
    assert Ended(step).how == (None, 9, "fence")
    yard.until_served(killed)


def test_a_shepherd_that_hangs_when_the_fence_passes_is_killed_and_its_jobs_end(yard: Yard) -> None:
    yard.fence(1.0)
    step = yard.start("echo $$ > $WORDS; sleep 1000")
    pid, shepherd = int(yard.word()), yard.pid
    os.kill(shepherd, signal.SIGSTOP)
    yard.link.close()
    end(shepherd)
    end(pid)
    until((step / "closed").exists, "what was left is closed")
    assert Ended(step).how == (None, 9, "fence")
    yard.fence(3600)
    yard.launch()
    assert yard.link.ask(do="status")["live"] == []


@pytest.mark.parametrize("said", ["", "{", "[]", '{"exit_code": 0'])
def test_with_a_damaged_record_nothing_goes_on_and_nothing_is_left(yard: Yard, said: str) -> None:
    """Lost, and never a success by mistake."""
    step = yard.start("setsid sh -c 'trap \"\" TERM; echo $$ > $WORDS; sleep 1000' & read x < $GO")
    background = int(yard.word())
    os.kill(yard.pid, signal.SIGSTOP)
    (step / "exit").write_text(said)
    (killed,) = yard.kill("shepherd")
    yard.until_served(killed)
    assert (step / "closed").exists()
    assert not is_alive(background)
    assert (step / "exit").read_text() == said


def test_the_guardian_leaves_with_its_shepherd(yard: Yard) -> None:
    guardian = yard.guardian
    shepherd = yard.pid
    yard.link.close()
    end(shepherd, signal.SIGTERM)
    end(guardian)
    assert yard.launch() != shepherd


def test_a_guardian_that_is_told_to_end_ends_its_shepherd_in_order(yard: Yard) -> None:
    """A service manager knows the guardian only."""
    step = yard.start("echo $$ > $WORDS; sleep 1000")
    pid, guardian, shepherd = int(yard.word()), yard.guardian, yard.pid
    yard.link.close()
    end(guardian, signal.SIGTERM)
    assert not is_alive(pid) and not is_alive(shepherd)
    assert '"gone":true' in (step / "closed").read_text()
    yard.launch()


def test_a_killed_guardians_place_is_taken_by_its_shepherd(yard: Yard) -> None:
    """And the steps go on, guarded as before: they outlive the next shepherd too. So it is each time."""
    for n in range(3):
        step = yard.start("echo 1; echo up > $WORDS; read x < $GO; echo 2; exit 6", run=f"r-{n}", number=n)
        yard.word()
        shepherd = yard.pid
        yard.kill("guardian")
        yard.until_served(shepherd)
        assert yard.guardian == shepherd
        (killed,) = yard.kill("shepherd")
        yard.until_served(killed)
        yard.go()
        ended = yard.ended(step)
        assert (ended.how, ended.out) == ((6, None, None), b"1\n2\n")


def test_steps_that_were_taken_up_are_lost_with_the_guardian_that_is_their_parent(yard: Yard) -> None:
    """Nobody would ever know how they end."""
    step = yard.start("trap '' TERM; echo $$ > $WORDS; read x < $GO")
    pid = int(yard.word())
    (killed,) = yard.kill("shepherd")
    second = yard.until_served(killed)
    yard.kill("guardian")
    end(pid)
    yard.until_served(second)
    assert Ended(step).closed["gone"] is True
    assert yard.run("exit 5", index=1).how == (5, None, None)


def test_an_idle_shepherd_leaves_when_its_guardian_is_killed(make_yard: Callable[..., Yard]) -> None:
    yard = make_yard()
    shepherd = yard.launch()
    yard.kill("guardian")
    end(shepherd)
    assert yard.launch() != shepherd
    assert yard.run("exit 5").how == (5, None, None)


def test_with_guardian_and_shepherd_the_steps_end_at_once(yard: Yard) -> None:
    """Nobody would watch the fence. The launcher sees to it, and has a new shepherd find the rest."""
    step = yard.start("echo $$ > $WORDS; setsid sh -c 'trap \"\" TERM; echo $$ > $WORDS; sleep 1000' & sleep 1000")
    pids = [int(yard.word()), int(yard.word())]
    shepherd, _ = yard.kill("shepherd", "guardian")
    for pid in pids:
        end(pid)
    until((step / "closed").exists, "it is closed, and no daemon was needed")
    assert Ended(step).closed["gone"] is True
    yard.until_served(shepherd)
    assert yard.run("exit 5", index=1).how == (5, None, None)


def test_without_a_step_they_leave_nothing(make_yard: Callable[..., Yard]) -> None:
    yard = make_yard()
    yard.launch()
    assert yard.run("exit 5").how == (5, None, None)
    own = launcher(yard.pid)
    yard.kill("shepherd", "guardian")
    end(own)
    assert not [path for path in Path("/proc").glob("[0-9]*/cwd") if _leads_to(path, yard.state)]


def _leads_to(link: Path, place: Path) -> bool:
    try:
        return Path(os.readlink(link)) == place
    except OSError:
        return False


def test_when_all_three_are_killed_the_next_ends_what_was_left(yard: Yard) -> None:
    step = yard.start("trap '' TERM; echo $$ > $WORDS; setsid sh -c 'echo $$ > $WORDS; sleep 1000' & sleep 1000")
    pids = [int(yard.word()), int(yard.word())]
    yard.kill("shepherd", "guardian", "launcher")
    yard.launch()
    assert not any(is_alive(pid) for pid in pids)
    assert Ended(step).closed["gone"] is True


@pytest.mark.parametrize("who", [("shepherd", "launcher"), ("guardian", "launcher")])
def test_the_launcher_may_be_killed_along(yard: Yard, who: tuple[str, ...]) -> None:
    steps = [yard.start(f"echo up > $WORDS; read x < $GO; exit {n}", run=f"r-{n}", number=n) for n in (3, 4)]
    for _ in steps:
        yard.word()
    shepherd = yard.pid
    yard.kill(*who)
    yard.until_served(shepherd)
    yard.go(2)
    assert [yard.ended(step).how for step in steps] == [(3, None, None), (4, None, None)]


@pytest.mark.root
def test_uids_stay_taken_while_there_is_no_shepherd(make_yard: Callable[..., Yard]) -> None:
    """Another daemon on the machine would be given them, and kill by uid what goes on."""
    first, second = make_yard(with_uids=True), make_yard(with_uids=True)
    first.launch()
    uid, shepherd, guardian = first.real_uid(), first.pid, first.guardian
    os.kill(guardian, signal.SIGSTOP)
    first.kill("shepherd")
    second.launch()
    assert second.real_uid() != uid
    os.kill(guardian, signal.SIGCONT)
    first.until_served(shepherd)
    assert first.real_uid() == uid


@pytest.mark.root
def test_a_range_of_uids_that_the_daemon_set_outlives_the_shepherd(uid_yard: Yard) -> None:
    uid_yard.uid_base += 100
    assert uid_yard.link.ask(do="uids", uid_base=uid_yard.uid_base, uid_count=4)["ok"]
    step = uid_yard.start("echo up > $WORDS; read x < $GO; exit 7")
    uid_yard.word()
    (killed,) = uid_yard.kill("shepherd")
    uid_yard.until_served(killed)
    uid_yard.go()
    assert uid_yard.ended(step).how == (7, None, None)
