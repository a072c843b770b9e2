"""Shepherd, guardian and launcher are killed at once: the next shepherd ends what was left, keeps its output, and says
that the ends are lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest
from yard import RECORD, Ended, Yard, is_alive, until

from supervisor.shepherd.fence import boot_id


@pytest.fixture(params=[pytest.param(True, marks=pytest.mark.root, id="uids"), pytest.param(False, id="shared")])
def unchecked(request: pytest.FixtureRequest, make_yard: Callable[..., Yard]) -> Yard:
    yard = make_yard(with_uids=request.param)
    yard.launch()
    return yard


def kill_shepherd(yard: Yard) -> None:
    yard.kill("shepherd", "guardian", "launcher")


def test_what_lives_of_its_steps_dies_at_the_next_start(unchecked: Yard) -> None:
    yard = unchecked
    step = yard.start(
        "trap '' TERM; echo $$ > $WORDS;"
        "setsid sh -c 'echo $$ > $WORDS; echo from the child; echo > $WORDS; sleep 1000' & while :; do sleep 1000; done"
    )
    pids = [int(word) for word in (yard.word(), yard.word(), yard.word()) if word]
    kill_shepherd(yard)
    yard.launch()
    assert not any(is_alive(pid) for pid in pids)
    ended = Ended(step)
    assert ended.exit is None
    assert ended.closed["gone"] is True
    assert ended.out == b"from the child\n"
    assert not (step / "fifo.out").exists()
    assert yard.link.ask(do="start", dir=str(step))["again"] is True, "it may have run: it never starts again"
    after = yard.run("echo next", index=1)
    assert (after.out, after.how) == (b"next\n", (0, None, None)), (after.exit, after.closed)


def test_a_step_that_was_closed_is_left_as_it_is(unchecked: Yard) -> None:
    before = unchecked.run("echo hi; exit 3")
    kill_shepherd(unchecked)
    unchecked.launch()
    assert Ended(before.step).closed == before.closed


def test_a_claim_without_a_start_is_closed_as_gone(unchecked: Yard) -> None:
    unchecked.workspace()
    step = unchecked.write_step("true")
    (step / "claim").touch()
    (step / "idx").touch()
    kill_shepherd(unchecked)
    unchecked.launch()
    assert Ended(step).closed["gone"] is True


def test_damaged_files_of_a_step_keep_no_shepherd_from_beginning(unchecked: Yard) -> None:
    unchecked.workspace()
    steps = [unchecked.write_step("true", index=index) for index in range(3)]
    for step, started in zip(
        steps, ('{"pid": "x", "boot_id": BOOT}', "{", '{"start_time": [], "boot_id": BOOT}'), strict=True
    ):
        (step / "claim").touch()
        (step / "idx").touch()
        (step / "started").write_text(started.replace("BOOT", json.dumps(boot_id())))
    kill_shepherd(unchecked)
    unchecked.launch()
    assert all(Ended(step).closed["gone"] for step in steps)


def test_a_pid_that_is_another_process_now_is_not_touched(unchecked: Yard) -> None:
    """Nor is its session, which has the same number: so has every job's."""
    unchecked.workspace()
    step = unchecked.write_step("true")
    (step / "claim").touch()
    (step / "idx").touch()
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as other:
        try:
            started = {"pid": other.pid, "start_time": 1, "boot_id": boot_id()}
            (step / "started").write_text(json.dumps(started))
            kill_shepherd(unchecked)
            unchecked.launch()
            assert Ended(step).closed["gone"] is True
            assert is_alive(other.pid)
        finally:
            other.kill()


def test_output_that_was_not_yet_indexed_is(unchecked: Yard) -> None:
    step = unchecked.start("echo 1; read x < $GO; echo 2")
    index = step / "idx"
    until(lambda: index.exists() and index.stat().st_size == RECORD.size, "the first line is indexed")
    unchecked.go()
    ended = unchecked.ended(step)
    (ended.step / "closed").unlink()
    (ended.step / "exit").unlink()
    assert (ended.step / "fifo.out").is_fifo(), "it goes with the run"
    index.write_bytes(index.read_bytes()[: RECORD.size] + b"torn")
    kill_shepherd(unchecked)
    unchecked.launch()
    mended = Ended(ended.step)
    assert mended.out == b"1\n2\n"
    assert [(offset, what) for _, offset, what in mended.index] == [(2, 1), (4, 1)]
