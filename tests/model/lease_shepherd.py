"""What a shepherd does, in the model of the lease protocol; and what is left of a host whose daemon or machine dies.

Part of ``lease_model``. What a function here says is in ``supervisor/shepherd`` and ``supervisor/runners``.
"""

from __future__ import annotations

from tests.model.lease_database import DatabaseRules
from tests.model.lease_search import Step
from tests.model.lease_world import BEGUN, NAMES, Call, Host, LeaseId, Run, Steps, World, fate_of, put, turned


class ShepherdRules(DatabaseRules):
    """Steps of a shepherd's."""

    def shepherd(self, world: World, host: Host) -> Steps:
        name = NAMES[host.number]
        for run in host.runs:
            if run.asked:
                yield self._asked(world, host, run, name)
            if not run.is_alive:
                continue
            if run.actor in ("unsure", "never", "clean"):
                ended = turned(put(world, changed(host, run, run._replace(disk="ended"))), run.lease, "ended")
                yield Step(f"{name}: the shepherd stops {named(run.lease)}, as asked", ended)
            if self.setting.quick:
                continue
            disk = "none" if run.disk == "hidden" and run.actor == "none" else "ok"
            well = turned(put(world, changed(host, run, run._replace(disk=disk))), run.lease, "ok")
            yield Step(f"{name}: the run of {named(run.lease)} succeeds", well)
            if host.fence <= 0 and self.setting.in_process:
                ended = turned(put(world, changed(host, run, run._replace(disk="ended"))), run.lease, "ended")
                yield Step(f"{name}: the fence has passed, the daemon ends {named(run.lease)}", ended)
        if self.must_end(host):
            if self.setting.in_process:
                yield Step(
                    f"{name}: the fence has passed, the shepherd kills the daemon", self.daemon_gone(world, host)
                )
                return
            runs = []
            for run in host.runs:
                runs.append(run._replace(disk="ended") if run.is_alive else run)
                if run.is_alive:
                    world = turned(world, run.lease, "ended")
            yield Step(
                f"{name}: the fence has passed, the shepherd ends all runs", put(world, host._replace(runs=tuple(runs)))
            )

    def _asked(self, world: World, host: Host, run: Run, name: str) -> Step[World]:
        after = run._replace(asked=run.asked - 1)
        may = host.fence > 0 or not self.has("fence_at_start")
        is_first = run.disk == "spec" or (run.disk == "none" and not self.has("handle_first"))
        if not may or not (is_first or not self.has("claim_file")):
            why = "does not start" if not may else "has started before"
            return Step(f"{name}: the shepherd {why} {named(run.lease)}", put(world, changed(host, run, after)))
        if fate_of(world, run.lease) != "leased":
            world = world._replace(wrong="a run is started twice under one lease")
        after = after._replace(disk="runs" if self.has("handle_first") else "hidden")
        looks = (host.looks or host.fence) if self.setting.short else 0
        started = put(world, changed(host, run, after)._replace(looks=looks))
        return Step(f"{name}: the shepherd starts {named(run.lease)}", turned(started, run.lease, "runs"))

    def must_end(self, host: Host) -> bool:
        """Whether somebody must act on the fence before the next tick."""
        return (
            host.fence <= 0
            and any(run.is_alive for run in host.runs)
            and self.has("fence")
            and (host.phase != "down" or self.has("fence_outside"))
            and (not self.setting.in_process or self.has("guard"))
            and (host.looks <= 0 or not self.setting.short or self.has("fence_anew"))
        )

    # --- its end ------------------------------------------------------------------------------------------------------

    def killed(self, host: Host) -> Host:
        """What is on disk is left, and what the shepherd was asked."""
        runs = tuple(run._replace(actor="none") for run in host.runs if run.disk != "none" or run.asked)
        return Host(
            number=host.number,
            saved=host.saved,
            booted=host.booted,
            restarts=1 if self.setting.short else 0,
            fence=host.fence,
            fence_of=host.fence_of,
            slipped=host.slipped,
            looks=host.looks,
            made=host.made,
            runs=runs,
        )

    def daemon_gone(self, world: World, host: Host) -> World:
        """The daemon is dead. What it had sent may be done still; what it ran itself is dead too."""
        world = self.forgotten(world, host, ("keeper", "claimer", "outbox"))
        host = self.killed(host)
        if self.setting.in_process:
            for run in host.runs:
                if run.is_alive:
                    world = turned(world, run.lease, "gone")
            host = host._replace(runs=())
        return put(world, host)

    def forgotten(self, world: World, host: Host, slots: tuple[str, ...]) -> World:
        """Nobody waits for these calls any more."""
        for slot in slots:
            call: Call | None = getattr(host, slot)
            if call is not None and (
                call.answer == BEGUN or (call.answer is None and len(world.late) < self.setting.late)
            ):
                world = world._replace(late=(*world.late, (host.number, call)))
        return world

    def processes_gone(self, world: World, host: Host) -> World:
        """All processes are dead, and nobody saw how they ended. A daemon that lives asks again."""
        runs = []
        for run in host.runs:
            asked = 1 if run.actor == "asked" else 0
            if run.is_alive:
                world = turned(world, run.lease, "gone")
                run = run._replace(disk="gone" if run.disk == "runs" else "none")
            if run.disk != "none" or run.actor != "none":
                runs.append(run._replace(asked=asked))
        return put(world, host._replace(runs=tuple(runs)))


def changed(host: Host, run: Run, after: Run | None) -> Host:
    runs = [after if each is run else each for each in host.runs]
    return host._replace(runs=tuple([each for each in runs if each is not None]))


def named(lease: LeaseId) -> str:
    return f"lease {lease[0]}/{lease[1]}-{lease[2]}"
