"""A daemon whose event loop is blocked ends itself; its process jobs live on, and the next daemon takes them up."""

from __future__ import annotations

import os
import signal
import time

import history
import pytest
from harness import alive
from world import PATIENT, World

from supervisor.watchdog import EXIT_CODE

pytestmark = pytest.mark.slow

BLOCKED_AFTER = 1.5
FOR_EVER = 600.0


def test_a_daemon_that_is_blocked_ends_and_its_jobs_live_on(world: World) -> None:
    """First it is stopped for longer than its patience, which is no block. Then an in-process job blocks it: its log
    says where; the process job beside it keeps its pid and its exit code, the one that blocked is lost, once."""
    host = world.host(terms=PATIENT, config=f"[supervision]\nblocked_after = {BLOCKED_AFTER}")
    gate = world.root / "gate"
    beside = world.run(gate=gate, code=7)
    pid = world.until_stamped(beside).pid

    os.kill(host.pid, signal.SIGSTOP)
    time.sleep(2 * BLOCKED_AFTER)  # not to synchronise: what it is to live through
    os.kill(host.pid, signal.SIGCONT)
    before = world.run()
    world.settle([before])
    assert host.is_up

    blocks = world.run_in_process(block=FOR_EVER)
    world.until_stamped(blocks)
    assert host.die() == EXIT_CODE
    said = host.log.read_text()
    assert f"the event loop was blocked for {BLOCKED_AFTER} s" in said
    assert "in stamped" in said  # the function that blocked
    assert alive(pid)

    host.start()
    gate.touch()
    found = history.check(world)
    assert [(a.exit_code, a.outcome) for a in found.attempts if a.job == beside] == [(7, "failed")]
    assert world.stamps_of(beside)[-1].pid == pid
    assert [a.outcome for a in found.attempts if a.job == blocks] == ["lost", "succeeded"]
    assert found.jobs[blocks].losses == 1
