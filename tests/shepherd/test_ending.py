"""Ending steps from outside: stop, kill, timeout, fence; and that nothing a step started outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from yard import PATIENCE, UID_BASE, Yard, end, is_alive

from supervisor.shepherd import kill

STUBBORN = "trap '' TERM; echo $$ > $WORDS; while :; do sleep 1000; done"
ESCAPE = """
setsid sh -c 'trap "" TERM; setsid sh -c "trap \\"\\" TERM; echo \\$\\$ > $WORDS; exec sleep 1000" &' &
wait
"""


def test_what_a_step_leaves_running_ends_with_it(yard: Yard) -> None:
    ended = yard.run("trap '' TERM HUP; sleep 1000 & echo $!; setsid sleep 1001 & echo $!; exit 7")
    assert ended.how == (7, None, None)
    assert not any(is_alive(int(pid)) for pid in ended.out.split())


def test_an_escapee_without_environment_or_output_ends_too(yard: Yard) -> None:
    """Twice forked, a session of its own, no BSUP_RUN, another directory, no FIFO: the subreaper has it still."""
    step = yard.start(
        "cd /; setsid env -i WORDS=$WORDS sh -c '(sleep 1000 & echo $! > $WORDS) &' < /dev/null > /dev/null 2>&1;"
        "read x < $GO"
    )
    pid = int(yard.word())
    assert is_alive(pid)
    yard.go()
    yard.ended(step)
    assert not is_alive(pid)


def test_a_neighbours_background_process_is_left_alone(yard: Yard) -> None:
    other = yard.start("(sleep 1000 & echo $! > $WORDS); read x < $GO", run="r-2", number=1)
    pid = int(yard.word())
    yard.run("sleep 1001 & exit 0")
    assert is_alive(pid)
    yard.link.ask(do="stop", dir=str(other.parent), grace=0, kill=True)
    yard.ended(other)
    assert not is_alive(pid)


def test_stop_asks_first(yard: Yard) -> None:
    step = yard.start("trap 'echo bye; exit 9' TERM; echo up > $WORDS; while :; do sleep 0.01; done")
    yard.word()
    assert yard.link.ask(do="stop", dir=str(step.parent), grace=30, kill=False)["live"] is True
    ended = yard.ended(step)
    assert ended.how == (9, None, "stop")
    assert ended.out == b"bye\n"


def test_stop_reaches_a_stopped_process(yard: Yard) -> None:
    step = yard.start("echo $$ > $WORDS; sleep 1000")
    os.kill(int(yard.word()), signal.SIGSTOP)
    yard.link.ask(do="stop", dir=str(step.parent), grace=30, kill=False)
    assert yard.ended(step).how == (None, 15, "stop")


def test_stop_kills_after_the_grace_with_all_that_escaped(yard: Yard) -> None:
    """The rule is: gone within grace + 1 s, even if a grandchild in a session of its own holds the output open."""
    step = yard.start("trap '' TERM; " + ESCAPE + "while :; do sleep 1000; done")
    pid = int(yard.word())
    began = time.monotonic()
    yard.link.ask(do="stop", dir=str(step.parent), grace=0.5, kill=False)
    ended = yard.ended(step)
    assert 0.5 <= time.monotonic() - began < 1.5
    assert ended.how == (None, 9, "stop")
    assert not is_alive(pid)


def test_stop_with_kill_does_not_wait(yard: Yard) -> None:
    step = yard.start(STUBBORN)
    pid = int(yard.word())
    yard.link.ask(do="stop", dir=str(step.parent), grace=1000, kill=True)
    assert yard.ended(step).how == (None, 9, "stop")
    assert not is_alive(pid)


def test_a_second_stop_brings_the_end_nearer_never_further(yard: Yard) -> None:
    step = yard.start(STUBBORN)
    yard.word()
    yard.link.ask(do="stop", dir=str(step.parent), grace=1000, kill=False)
    yard.link.ask(do="stop", dir=str(step.parent), grace=0.1, kill=False)
    yard.link.ask(do="stop", dir=str(step.parent), grace=1000, kill=False)
    assert yard.ended(step).how == (None, 9, "stop")


def test_stop_of_a_run_with_nothing_running(yard: Yard) -> None:
    ended = yard.run("true")
    assert yard.link.ask(do="stop", dir=str(ended.step.parent), grace=0, kill=True) == {
        "id": 1,
        "ok": True,
        "live": False,
    }


def test_stop_at_once_after_start_hits_whatever_the_child_is_at(yard: Yard) -> None:
    for index in range(20):
        step = yard.start("while :; do sleep 1000; done", index=index)
        yard.link.ask(do="stop", dir=str(step.parent), grace=5, kill=index % 2 == 0)
        code, number, cause = yard.ended(step).how
        assert (code, cause) == (None, "stop") and number in (9, 15)


def test_timeout_asks_then_kills(yard: Yard) -> None:
    polite = yard.run("trap 'exit 6' TERM; while :; do sleep 0.01; done", timeout=0.2, grace=30)
    assert polite.how == (6, None, "timeout")
    stubborn = yard.run(STUBBORN, index=1, timeout=0.2, grace=0.1)
    assert stubborn.how == (None, 9, "timeout")


def test_a_step_that_ends_in_time_is_no_timeout(yard: Yard) -> None:
    assert yard.run("exit 0", timeout=30).how == (0, None, None)


def test_a_fork_bomb_is_ended(yard: Yard) -> None:
    """Each process replaces itself by a new one, in a session of its own, as fast as it can."""
    step = yard.start("echo 'setsid sh ./b & exit' > b; setsid sh ./b & setsid sh ./b & echo up > $WORDS; sleep 1000")
    yard.word()
    yard.link.ask(do="stop", dir=str(step.parent), grace=0, kill=True)
    ended = yard.ended(step)
    # A shell whose child was killed before it may still say so: 128 + 9.
    assert ended.how in ((None, 9, "stop"), (137, None, "stop"))


@pytest.mark.root
def test_a_job_is_killed_where_no_process_can_be_forked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork bomb has taken all that the service's TasksMax allows."""
    uid = UID_BASE - 1  # no shepherd of these tests has it
    job = subprocess.Popen(["sleep", "1000"], user=uid, group=uid)

    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as full:
        full.setattr(os, "fork", refuse)
        kill.send_uid(uid, (signal.SIGKILL,))
    assert job.wait(PATIENCE) == -signal.SIGKILL


def test_the_fence_ends_everything_without_grace(yard: Yard) -> None:
    yard.fence(1.0)
    steps = [yard.start(STUBBORN, run=f"r-{n}", number=n) for n in range(3)]
    pids = [int(yard.word()) for _ in steps]
    # No client is needed: the fence holds when the daemon is dead.
    yard.link.close()
    for pid in pids:
        end(pid)
    assert [yard.ended(step).how for step in steps] == [(None, 9, "fence")] * 3


def test_a_fence_that_was_moved_in_time_ends_nothing(yard: Yard) -> None:
    yard.fence(0.3)
    step = yard.start("sleep 0.8; exit 0")
    yard.fence(3600)
    assert yard.ended(step).how == (0, None, None)


def test_a_fence_that_was_moved_forward_ends_what_was_begun_under_a_later_one(yard: Yard) -> None:
    """As by a daemon that was restarted with a shorter term."""
    yard.fence(3600)
    step = yard.start("sleep 1000")
    yard.fence(0.3)
    assert yard.ended(step).how == (None, 9, "fence")


def test_a_fence_file_that_vanished_holds_as_it_was_known(yard: Yard) -> None:
    yard.fence(0.5)
    step = yard.start("sleep 1000")
    (yard.state / "fence").unlink()
    assert yard.ended(step).how == (None, 9, "fence")


@pytest.mark.parametrize("fault", ["passed", "missing", "another boot", "damaged"])
def test_without_a_good_fence_nothing_starts(yard: Yard, fault: str) -> None:
    yard.workspace()
    step = yard.write_step("true")
    if fault == "missing":
        (yard.state / "fence").unlink()
    elif fault == "damaged":
        (yard.state / "fence").write_text('{"fence_at": "soon"')
    else:
        yard.fence(-1 if fault == "passed" else 3600, boot="another" if fault == "another boot" else None)
    answer = yard.link.ask(do="start", dir=str(step))
    assert (answer["ok"], answer["code"]) == (False, "fence")
    assert not (step / "claim").exists()
    yard.fence(3600)
    assert yard.link.ask(do="start", dir=str(step))["ok"]
    assert yard.ended(step).how == (0, None, None)


@pytest.mark.root
def test_a_job_cant_hold_up_its_own_killing(uid_yard: Yard) -> None:
    """It stops and kills everything it may signal, again and again, also whoever comes to kill it as its uid."""
    step = uid_yard.start("trap '' TERM; echo up > $WORDS; while :; do kill -STOP -1; kill -KILL -1; done")
    uid_yard.word()
    uid_yard.link.ask(do="stop", dir=str(step.parent), grace=0.1, kill=False)
    assert uid_yard.ended(step).how == (None, 9, "stop")


def test_terminated_the_shepherd_ends_its_jobs_as_losses(make_yard: Callable[..., Yard]) -> None:
    yard = make_yard()
    shepherd = yard.launch()
    step = yard.start(STUBBORN)
    pid = int(yard.word())
    end(shepherd, signal.SIGTERM)
    assert not is_alive(pid)
    assert not (step / "exit").exists()
    assert '"gone":true' in (step / "closed").read_text()


@pytest.mark.root
def test_two_shepherds_of_one_machine_never_share_a_uid(make_yard: Callable[..., Yard]) -> None:
    """Both have the same range in their config. What one kills by uid must not be the other's."""
    yards = [make_yard(with_uids=True), make_yard(with_uids=True)]
    for yard in yards:
        yard.launch()
    assert yards[0].real_uid() != yards[1].real_uid()
    steps = [yard.start("id -u > $WORDS; read x < $GO; exit 5") for yard in yards]
    assert [int(yard.word()) for yard in yards] == [yard.real_uid() for yard in yards]
    yards[0].link.ask(do="stop", dir=str(steps[0].parent), grace=0, kill=True)
    assert yards[0].ended(steps[0]).how == (None, 9, "stop")
    yards[1].go()
    assert yards[1].ended(steps[1]).how == (5, None, None)


@pytest.mark.root
def test_a_shepherd_that_comes_back_has_its_uids_again(make_yard: Callable[..., Yard]) -> None:
    first, second = make_yard(with_uids=True), make_yard(with_uids=True)
    for yard in (first, second):
        yard.launch()
    before = second.real_uid()
    for yard in (first, second):
        yard.link.close()
        end(yard.pid, signal.SIGKILL)
    second.launch()
    assert second.real_uid() == before
