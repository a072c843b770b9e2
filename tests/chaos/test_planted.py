"""Planted faults: with any one rule of the lease switched off, the history checker sees what comes of it.

Each scenario is played twice: as the product is (nothing is broken), and with the rule switched off (it is). So the
checker is shown to be able to see it, and the scenario to need the rule. See ``plants`` for how.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import history
import pytest
import stamps
from harness import alive, until
from plants import NOTHING, Plant, plant
from world import PATIENT, World

from supervisor.model.errors import SessionRefused
from supervisor.model.job import AttemptEnd, HostInfo, Lease, Outcome
from supervisor.ports import Room, SessionGrant
from supervisor.store.pg import PgStore

pytestmark = pytest.mark.slow

TERMS = (0.4, 2.5, 0.8)
"""As short as they may be: what is waited for here is mostly that a term ends."""


# --- scenarios --------------------------------------------------------------------------------------------------------


def a_host_is_gone_for_good(world: World, env: dict[str, str]) -> None:
    """Its job passes to another, which ends it."""
    gate = world.root / "gate"
    one = world.host("a", terms=TERMS, env=env)
    job = world.run(gate=gate)
    world.until_stamped(job)
    world.host("b", terms=TERMS)
    one.kill()
    again = world.until_stamped(job, attempt=2)
    until(lambda: world.stamps_of(job)[-1].at > again.at, "it goes on")
    gate.touch()
    world.settle()


def a_handler_blocks_its_daemon(world: World, env: dict[str, str]) -> None:
    """For longer than the term: the job passes to another host while the handler is about to go on."""
    gate = world.root / "gate"
    one = world.host("a", terms=TERMS, env=env)
    job = world.run_in_process(gate=gate, block=6.0)
    world.until_stamped(job)
    world.host("b", terms=TERMS)
    world.until_stamped(job, attempt=2)
    until(lambda: not one.is_up or any(s.what == "tick" for s in world.stamps_of(job) if s.attempt == 1), "it is over")
    gate.touch()
    world.settle()


def a_zombie_records(world: World, env: dict[str, str]) -> None:
    """Hosts that the test plays, through the store: one that was reaped tells its end while another runs the job. The
    refusal of its write is the rule at work."""
    world.query("INSERT INTO bsup.kind (name) VALUES ('stamped')")
    job = world.run_in_process()

    async def claim(store: PgStore, grant: SessionGrant) -> Lease:
        needs = tuple(need.id for need in await store.needs(0))
        [lease] = await store.claim(grant.me, grant.me.epoch << 32 | 1, Room(1, 1, None, None, needs))
        return lease

    async def play() -> None:
        async with PgStore(world.dsn, application_name="played", connect_timeout=10) as store:
            zombie = await store.open_session(_played("a"), 1.0)
            first = await claim(store, zombie)
            _stamp(world, first, "a", "start")
            while not (await store.pulse(1.0) and (await store.reap()).sessions):  # noqa: ASYNC110 - the database tells
                await asyncio.sleep(0.05)
            other = await store.open_session(_played("b"), 60.0)
            second = await claim(store, other)
            _stamp(world, second, "b", "start")
            with contextlib.suppress(SessionRefused):
                await store.finish(zombie.me, [_end(first, Outcome.FAILED, 3)])
            _stamp(world, second, "b", "end", "0", "0")
            await store.finish(other.me, [_end(second, Outcome.SUCCEEDED, 0)])
            await store.close_session(other.me)

    assert not env
    world.loop.run(play())
    world.settle([job])


def _played(name: str) -> HostInfo:
    return HostInfo(
        name=name,
        labels=(),
        slots=1,
        cpu=None,
        memory=None,
        version="0",
        machine_id=name,
        boot_id=name,
        pid=1,
        kinds=("stamped",),
    )


def _stamp(world: World, lease: Lease, host: str, what: str, *words: str) -> None:
    stamp = stamps.Stamp(0.0, host, lease.job, str(lease.id), lease.attempt, 0, os.getpid(), 0, what, words)
    stamps.write(world.stamps, stamp)


def _end(lease: Lease, outcome: Outcome, code: int) -> AttemptEnd:
    return AttemptEnd(lease=lease.id, job=lease.job, attempt=lease.attempt, outcome=outcome, exit_code=code)


def a_daemon_pauses(world: World, env: dict[str, str]) -> None:
    """For much less than its term, while the reaper has something to do: a job that is tried again after a moment."""
    gate = world.root / "gate"
    one = world.host("a", terms=TERMS, env=env)
    job = world.run(gate=gate)
    world.until_stamped(job)
    world.host("b", terms=TERMS)
    # A database that nobody used before is not reaped in its first term.
    until(lambda: world.query("SELECT FROM bsup.pulse WHERE reap_not_before < bsup.clock()"), "the reaper is at work")
    os.kill(one.pid, signal.SIGSTOP)
    other = world.run(fail_first=1, attempts=2, backoff=0.2)
    world.settle([other])
    with contextlib.suppress(AssertionError):  # as it is to be
        until(lambda: world.stamps_of(job)[-1].attempt == 2, "it was passed on", 0.5)
    os.kill(one.pid, signal.SIGCONT)
    gate.touch()
    world.settle()


def a_start_is_asked_for_twice(world: World, env: dict[str, str]) -> None:
    """As the client does when its connection is lost between the request and its answer."""
    world.host("a", env=env)
    world.run(ticks=6)
    world.settle()


TWICE = """
from supervisor.runners.shepherd_client import ShepherdClient
start_step = ShepherdClient.start_step
async def twice(self, step_dir):
    await start_step(self, step_dir)
    return await start_step(self, step_dir)
ShepherdClient.start_step = twice
"""


def a_state_of_before_comes_back(world: World, env: dict[str, str]) -> None:
    """A copy of the state directory that passes for the original, as of an image; made before the original took its
    session up again. What it holds of runs is left out: on one machine their processes would be there."""
    gate = world.root / "gate"
    one = world.host("a", terms=PATIENT)
    job = world.run(gate=gate)
    world.until_stamped(job)
    one.kill()
    two = world.host("b", terms=PATIENT, env=env, start=False)
    saved = (one.state / "session.json").read_text()
    here, there = one.state.stat(), two.state.stat()
    one.start()
    (two.state / "session.json").write_text(
        saved.replace(f"{here.st_dev}:{here.st_ino}", f"{there.st_dev}:{there.st_ino}")
    )
    two.start()
    other = world.run()
    world.settle([other])
    gate.touch()
    world.settle()


def a_shepherd_dies_with_its_jobs(world: World, env: dict[str, str]) -> None:
    """Nobody knows how they ended."""
    gate = world.root / "gate"
    one = world.host("a", terms=PATIENT, env=env)
    job = world.run(gate=gate)
    pid = world.until_stamped(job).pid
    one.kill_shepherd()
    os.kill(pid, signal.SIGKILL)
    until(lambda: world.state(job) != "running" or world.stamps_of(job)[-1].attempt == 2, "its end is noticed")
    gate.touch()
    world.settle()


def a_pid_is_another_process_now(world: World, env: dict[str, str]) -> None:
    """What a shepherd left behind names a pid that belongs to another host's job by now."""
    gate = world.root / "gate"
    one = world.host("a", terms=PATIENT, env=env)
    gone = world.run(gate=gate)
    stamp = world.until_stamped(gone)
    one.kill()
    one.kill_shepherd()
    os.kill(stamp.pid, signal.SIGKILL)
    until(lambda: not alive(stamp.pid), "its job is dead")
    world.host("b", terms=PATIENT)
    job = world.run(gate=gate)
    innocent = world.until_stamped(job)
    started = one.state / "runs" / stamp.lease / "0" / "started"
    started.write_text(started.read_text().replace(f'"pid":{stamp.pid}', f'"pid":{innocent.pid}'))
    assert f'"pid":{innocent.pid}' in started.read_text()
    one.start()
    until(lambda: world.stamps_of(gone)[-1].attempt == 2, "the lost one runs again")
    gate.touch()
    world.settle()


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """``off`` switches it off; ``broken``: the checker's rules of which at least one then is. ``driver``: a plant that
    harms nothing, as long as the rule holds."""

    scenario: Callable[[World, dict[str, str]], None]
    off: Plant
    broken: tuple[str, ...]
    driver: Plant = NOTHING


RULES = {
    "the shepherd ends the work when the fence passes": Rule(
        a_host_is_gone_for_good,
        Plant(shepherd=(("fence.py", "return self.at is not None and now() > self.at", "return False"),)),
        ("overlap",),
    ),
    "a daemon whose handlers don't end at the fence is killed": Rule(
        a_handler_blocks_its_daemon,
        Plant(shepherd=(("fence.py", "self.guarded = _guarded(", "self.guarded = None and _guarded("),)),
        ("overlap",),
    ),
    "an end is recorded only by the holder of the lease": Rule(
        a_zombie_records,
        Plant(
            sql=(
                ("bsup.finish_batch", "IF NOT FOUND THEN", "v_host := coalesce(v_host, 'a');\n    IF false THEN"),
                (
                    "bsup.end_leases",
                    "AND l.session = p_session AND l.counter = i.counter AND l.attempt = i.attempt",
                    "",
                ),
            )
        ),
        ("two ends", "unrecorded", "exit code"),
    ),
    "a session is reaped only when it has expired": Rule(
        a_daemon_pauses,
        Plant(
            sql=(
                (
                    "bsup.reap",
                    "WHERE s.expires_at < least(v_now, bsup.clock())",
                    "WHERE s.expires_at < v_now OR s.host = 'a'",
                ),
            )
        ),
        ("overlap",),
    ),
    "a step is claimed before it starts, once": Rule(
        a_start_is_asked_for_twice,
        Plant(
            shepherd=(
                ("host.py", 'if exists(directory, "claim"):', "if False:"),
                ("files.py", 'if exists(directory, "claim"):', "return\n        if False:"),
            )
        ),
        ("started twice",),
        driver=Plant(daemon=TWICE),
    ),
    "a session is taken up by compare and swap": Rule(
        a_state_of_before_comes_back,
        Plant(
            daemon="""
from supervisor.store.statements import STATEMENTS, Statement
was = STATEMENTS["resume_session"]
swap = "AND s.incarnation IN ($2, $3)"
assert was.sql.count(swap) == 1
by = "AND $2::uuid IS NOT NULL"
STATEMENTS["resume_session"] = Statement(was.name, was.purpose, was.sql.replace(swap, by))
"""
        ),
        ("overlap", "unrecorded"),
    ),
    "an end without an exit record is a loss": Rule(
        a_shepherd_dies_with_its_jobs,
        Plant(
            daemon="""
import supervisor.runners.steps as steps
StepEnd = steps.StepEnd
def hopeful(index, code, signal, started, ended, cause=None, error=None):
    return StepEnd(index, 0, None, started, ended) if cause == "gone" else StepEnd(
        index, code, signal, started, ended, cause, error)
steps.StepEnd = hopeful
"""
        ),
        ("success",),
    ),
    "a pid is the process that it was only with its start time": Rule(
        a_pid_is_another_process_now,
        Plant(shepherd=(("sweep.py", "(pid, int(fields[19])) in known", "pid in {known[0] for known in known}"),)),
        ("killed",),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_with_the_rule_nothing_is_broken(world: World, rule: str) -> None:
    of = RULES[rule]
    of.scenario(world, plant(world, of.driver))
    assert history.violations(history.read(world)) == []


@pytest.mark.parametrize("rule", RULES)
def test_without_it_the_checker_sees_it(world: World, rule: str) -> None:
    of = RULES[rule]
    of.scenario(world, plant(world, of.driver, of.off))
    found = history.violations(history.read(world))
    assert {violation.rule for violation in found} & set(of.broken), found or "nothing was found"
