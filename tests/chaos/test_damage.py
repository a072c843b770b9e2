"""State that is damaged, or of a bsup to come, while a daemon is away: none of it keeps the next one from beginning,
and no job is lost, run twice or told to have succeeded for it. The parts' own tests hold what becomes of each file.
"""

from __future__ import annotations

import json
from pathlib import Path

import history
import pytest
from harness import until
from world import PATIENT, TERMS, World

pytestmark = pytest.mark.slow

GARBAGE = b'{"lease": "\xff\xfe"}'
"""Well-formed as far as its one text, which is not UTF-8."""

KEPT = ("redaction", "notes", "0/spec", "0/started")
"""Without these a run that has begun its first step goes on all the same."""

OF_A_RUN = ("spec", *KEPT, "1/spec")


def runs(state: Path) -> dict[int, Path]:
    """Each job's."""
    return {json.loads(spec.read_bytes())["job"]: spec.parent for spec in (state / "runs").glob("*/spec")}


def litter(state: Path) -> None:
    """What is no state of this bsup's at all."""
    lease = "0" * 32 + "-1"
    for name in (f"runs/{lease}", f"work/{lease}", "runs/of-tomorrow", "logs/of-tomorrow", "mirrors/half.git"):
        (state / name).mkdir(parents=True)
    for name in ("runs/file", f"runs/{lease}/spec", "mirrors/half.git/HEAD", "mirrors/file", "tomorrow", "fence"):
        (state / name).write_bytes(GARBAGE)


def test_damaged_files_of_runs(world: World) -> None:
    """Each of another run. What is not needed any more is not missed; a run of which nobody knows what it was is lost,
    and runs again; a step that nobody knows how to start ends its job."""
    host = world.host(slots=len(OF_A_RUN), terms=PATIENT)
    gate = world.root / "gate"
    jobs = {name: world.run(gate=gate, steps=2) for name in OF_A_RUN}
    for job in jobs.values():
        world.until_stamped(job, "tick")
    host.kill()
    of_job = runs(host.state)
    for name, job in jobs.items():
        (of_job[job] / name).write_bytes(GARBAGE)
    litter(host.state)
    host.start()
    gate.touch()
    found = history.check(world)
    outcomes = {name: [a.outcome for a in found.attempts if a.job == job] for name, job in jobs.items()}
    assert outcomes == {**{name: ["succeeded"] for name in KEPT}, "spec": ["lost", "succeeded"], "1/spec": ["failed"]}


@pytest.mark.parametrize("how", ["damaged", "newer"])
def test_a_session_that_cant_be_read(world: World, how: str) -> None:
    """A new one is begun, which ends the work of the one before first; its jobs are lost with it, and run again."""
    host = world.host(terms=TERMS)
    gate = world.root / "gate"
    job = world.run(gate=gate)
    pid = world.until_stamped(job).pid
    host.kill()
    file = host.state / "session.json"
    said = GARBAGE if how == "damaged" else json.dumps({**json.loads(file.read_bytes()), "version": 2}).encode()
    file.write_bytes(said)
    host.start()
    assert not Path(f"/proc/{pid}").exists()
    [aside] = host.state.glob("session.*.0.json")
    assert aside.read_bytes() == said
    world.until_stamped(job, attempt=2)
    gate.touch()
    found = history.check(world)
    assert [a.outcome for a in found.attempts] == ["lost", "succeeded"]
    until(lambda: (status := host.status()) is not None and status.ok, "all is well")
