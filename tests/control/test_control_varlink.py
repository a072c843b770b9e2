"""A public varlink client introspects the daemon and calls it: we speak varlink, not something like it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import varlink  # type: ignore[import-untyped]  # it has no stubs
from anyio import to_thread
from control_world import SPEC, World, job_row, running_job

from supervisor.model.job import State
from supervisor.protocol import METHODS
from supervisor.varlink_idl import SERVICE_DESCRIPTION, description


async def in_client(world: World, use: Callable[[Any], Any]) -> Any:
    """Runs ``use`` with the public client's handle on our interface, in a thread, as it blocks."""

    def call() -> Any:
        with varlink.Client(f"unix:{world.path}") as client, client.open("io.bsup.Supervisor") as bsup:
            return use(bsup)

    async with world.serve():
        return await to_thread.run_sync(call)


@pytest.mark.anyio
async def test_it_introspects(world: World) -> None:
    def call() -> Any:
        with varlink.Client(f"unix:{world.path}") as client:
            return client.get_interfaces(), client.get_interface("io.bsup.Supervisor").get_description()

    async with world.serve():
        interfaces, text = await to_thread.run_sync(call)
    assert set(interfaces) == {"org.varlink.service", "io.bsup.Supervisor"}
    assert text == description()


@pytest.mark.anyio
async def test_every_method_and_type_of_the_description_parses(world: World) -> None:
    """Names of types, methods and errors are one set: none hides another."""
    text = description()
    members = varlink.Interface(text).members
    assert set(METHODS) | {"Job", "Step", "UnknownJob", "InternalError", "State"} <= set(members)
    assert len(members) == sum(line.startswith(("type ", "method ", "error ")) for line in text.splitlines())
    varlink.Interface(SERVICE_DESCRIPTION)


def test_the_reference_page_shows_the_description_as_it_is() -> None:
    """``python -m supervisor.varlink_idl`` prints the new one for the page."""
    page = Path(__file__).parents[2] / "docs" / "reference" / "protocol.md"
    assert f"```varlink\n{description()}```\n" in page.read_text()


@pytest.mark.anyio
async def test_it_submits_lists_and_asks_for_the_status(world: World) -> None:
    world.store.add(job_row(1, State.RUNNING, attempt=1), job_row(2))
    world.dispatcher.running = [running_job(1)]

    def use(bsup: Any) -> Any:
        job = bsup.Submit(spec=SPEC, key="k")["id"]
        jobs = [reply["job"] for reply in bsup.List(_more=True) if "job" in reply]
        shown = bsup.Show(job)
        return job, jobs, shown, bsup.Status()["status"]

    job, jobs, shown, status = await in_client(world, use)
    assert job == 3 and [one["id"] for one in jobs] == [1, 2, 3]
    assert jobs[0]["progress"] == {"step": 2, "steps": 5, "name": "test"} and jobs[0]["phase"] == "running"
    assert shown["job"]["state"] == "ready" and shown["job"]["submitted_at"].endswith("Z")
    assert status["running"] == 1 and status["database"]["available"] is True


@pytest.mark.anyio
async def test_it_sees_errors_by_name(world: World) -> None:
    def use(bsup: Any) -> Any:
        found = []
        calls: list[Callable[[], Any]] = [
            lambda: bsup.Show(9),
            lambda: bsup.List(),
            lambda: bsup.Submit(spec={"kind": "not one"}),
        ]
        for call in calls:
            with pytest.raises(varlink.VarlinkError) as caught:
                call()
            found.append((caught.value.error(), caught.value.parameters()))
        return found

    (unknown, which), (more, _), (invalid, what) = await in_client(world, use)
    assert (unknown, which) == ("io.bsup.Supervisor.UnknownJob", {"job": 9})
    assert more == "org.varlink.service.ExpectedMore"
    assert invalid == "io.bsup.Supervisor.InvalidInput" and what["field"] == "kind"
