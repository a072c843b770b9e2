"""A daemon that is stopped (SIGSTOP) for longer than its term, then goes on (SIGCONT): a zombie that believes it holds
its session still.

Its shepherd lives on and ends its jobs at the fence; others run them; all that the zombie then writes is refused.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import history
import pytest
from harness import alive, until
from world import Host, World

pytestmark = pytest.mark.slow

TERMS = (0.5, 4.0, 1.0)

STOPS = ("claim-sent", "leased", "prepared", "spawned", "exited", "record-sent", "recorded")
"""Where they stop: one host each."""


def is_stopped(host: Host) -> bool:
    return Path(f"/proc/{host.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def go_on(*hosts: Host) -> None:
    for host in hosts:
        os.kill(host.pid, signal.SIGCONT)


def session(host: Host) -> str | None:
    status = host.status()
    found = None if status is None else status.actors["keeper"].get("session")
    return None if found is None else str(found)


def hosts_of(found: history.History, job: int) -> list[str]:
    return [attempt.host for attempt in found.attempts if attempt.job == job]


def test_a_stopped_daemons_jobs_pass_on_and_its_word_counts_no_more(world: World) -> None:
    """Of its jobs one runs on till the fence, and one ends in the meantime, whose end the zombie wants to record. A
    second daemon has a job within itself, and is therefore killed."""
    within = world.host("c", terms=TERMS, slots=1)
    inner = world.run_in_process(ticks=120, every=0.05)
    world.until_stamped(inner)
    zombie = world.host("a", terms=TERMS)
    gate, other = world.root / "gate", world.root / "other"
    endless, ended = (world.run(gate=each, every=0.02) for each in (gate, other))
    first = {job: world.until_stamped(job) for job in (endless, ended)}
    world.host("b", terms=TERMS)
    before = session(zombie)
    os.kill(zombie.pid, signal.SIGSTOP)
    os.kill(within.pid, signal.SIGSTOP)
    other.touch()
    world.until_stamped(ended, "end", 1)
    world.until_stamped(endless, attempt=2)
    world.until_stamped(inner, attempt=2)
    assert not alive(first[endless].pid) and is_stopped(zombie)
    go_on(zombie)
    until(lambda: session(zombie) not in (None, before), "the zombie begins a session of its own")
    assert within.die() == -signal.SIGKILL, "it had a job of its own, and could not end it"
    gate.touch()
    found = history.check(world)
    for job in (endless, ended):
        told = [(attempt.outcome, attempt.host) for attempt in found.attempts if attempt.job == job]
        assert told[0] == ("superseded", "a") and told[1][0] == "succeeded" and len(told) == 2
    assert hosts_of(found, endless)[1] == hosts_of(found, ended)[1] == "b"
    print(f"least gap between two runs of a job: {min(history.gaps(found)):.3f} s")


def test_daemons_that_stop_in_the_midst_of_what_they_say(world: World) -> None:
    """At each named point at once, each on a host of its own: what they had begun to say is said when it counts no
    more, and what they had begun to start is not started."""
    stopped = [
        world.host(f"at-{number}", terms=TERMS, slots=2, start=False).start(failpoints=f"{point}=stop")
        for number, point in enumerate(STOPS)
    ]
    for _ in range(8 * len(stopped)):
        world.run(ticks=3)
        if all(map(is_stopped, stopped)):
            break
        until(
            lambda: all(map(is_stopped, stopped)) or "ready" not in world.states().values(), "they take what is there"
        )
    until(lambda: all(map(is_stopped, stopped)), "each stops at its point")
    healthy = world.host("b", terms=TERMS)
    world.settle()
    go_on(*stopped)
    for host in stopped:
        until(lambda host=host: session(host) is not None, f"{host.name} has a session")  # type: ignore[misc]
    after = [world.run() for _ in range(len(stopped))]
    found = history.check(world)
    lost = [attempt for attempt in found.attempts if attempt.outcome in ("lost", "superseded")]
    assert lost and {job.state for job in found.jobs.values()} == {"succeeded"}
    assert healthy.name in {attempt.host for attempt in found.attempts} and len(after) == len(stopped)
    told = sorted((attempt.host, attempt.outcome, attempt.reason) for attempt in lost)
    print(f"{len(found.accepted)} jobs, lost: {told}; least gap {min(history.gaps(found), default=None)}")
