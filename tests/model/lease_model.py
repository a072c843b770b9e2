"""The lease protocol as a model: two hosts, one database, one job, and everything that may go wrong between them.

It says what the code does, at the grain at which something can come between. What is a step of its own here: each
statement's arrival at the database, its answer's arrival, each write to the state directory, each look of the
shepherd's, each tick of time. A daemon that is paused, slow or cut off is one whose next step does not come.

Time is in ticks, and every time is what is left until then as its own clock counts it. A host's clock may miss a tick
in each term; the database's may step. A run past its fence is ended before the next tick.

``lease_world`` has the words, ``lease_daemon``, ``lease_shepherd`` and ``lease_database`` what each of them does,
and ``lease_rules`` the rules by name: what each is for, where the code has it, and where it shows that it can't be
left out. This module puts them together: messages, time, faults, and what must never be.
"""

from __future__ import annotations

from itertools import product

from tests.model.lease_daemon import DaemonRules
from tests.model.lease_search import Step
from tests.model.lease_shepherd import named
from tests.model.lease_world import (
    ALWAYS,
    BEGUN,
    NAMES,
    SLOTS,
    Call,
    Database,
    Host,
    Run,
    Saved,
    Session,
    Setting,
    Steps,
    World,
    host_of,
    put,
)


class Model(DaemonRules):
    """``without``: the name of a rule that is left out."""

    def __init__(self, setting: Setting, without: str | None = None) -> None:
        self.setting = setting
        self.without = without
        self.margin = setting.margin if self.has("margin") else 0
        self._at_once = () if setting.late or setting.overlap else SLOTS[1:] if setting.time else SLOTS

    def first(self) -> World:
        """A holds a session, and so does B."""
        setting = self.setting
        a, b = (
            Host(
                number,
                "held",
                Saved(made, made),
                session=made,
                incarnation=made,
                epoch=1,
                fence=setting.term - self.margin,
                fence_of=made,
                made=1,
            )
            for number, made in ((0, 1), (1, 11))
        )
        sessions = [Session(1, 1, 1, setting.term), Session(11, 11, 1, setting.term)]
        if setting.faults.clones:
            b = Host(1)
            del sessions[1]
        elif not setting.both:
            b = b._replace(phase="well")
            sessions[1] = sessions[1]._replace(left=ALWAYS)
        return World(setting.faults, (a, b), Database(sessions=tuple(sessions)))

    def is_goal(self, world: World) -> bool:
        """The job has ended, or was claimed as often as this setting looks at."""
        job, faults = world.database.job, world.faults
        is_capped = any(host.phase == "opening" and host.made >= self.setting.made for host in world.hosts)
        is_spent = is_capped or not (faults.claims or faults.others)
        return job in ("succeeded", "failed") or (job == "ready" and is_spent)

    def wrong(self, world: World) -> str | None:
        if world.wrong is not None:
            return world.wrong
        alive = 0
        for host in world.hosts:
            for run in host.runs:
                if run.is_alive:
                    alive += 1
                    if host.fence > 0 and run.lease[0] not in (host.fence_of, 0):
                        return "a run lives on under the fence of another session"
        return "the job runs twice at once" if alive > 1 and self.setting.strict else None

    def steps(self, world: World) -> Steps:
        for said, after, is_fault in self._steps(world):
            yield Step(said, _settled(self._arrived(after)), is_fault)

    def _arrived(self, world: World) -> World:
        """Statements are done as soon as they are sent: where none can be late, one that is lost is as good as one that
        was not sent. Only a renewal is older when it arrives."""
        for host in world.hosts:
            for slot in self._at_once:
                call: Call | None = getattr(host, slot)
                if call is not None and call.answer is None:
                    moved = self.done(world, call)
                    if moved is not None:
                        world = put(moved[0], moved[0].hosts[host.number]._replace(**{slot: moved[1]}))
        return world

    def _steps(self, world: World) -> Steps:
        for host in world.hosts:
            if host.phase == "done":
                continue
            if host.phase == "well":
                yield from self.well(world, host)
                continue
            yield from self.shepherd(world, host)
            yield from self.daemon(world, host)
            yield from self._faults(world, host)
        yield from self._messages(world)
        yield from self.upkeep(world)
        yield from self.trouble(world)
        if self.setting.time:
            yield from self._time(world)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _messages(self, world: World) -> Steps:
        """A statement is done when it arrives; its answer waits in the call until the daemon hears it."""
        for host in world.hosts:
            name = NAMES[host.number]
            for slot in SLOTS:
                call: Call | None = getattr(host, slot)
                if call is None:
                    continue
                if call.answer is None or call.answer == BEGUN:
                    moved = self.done(world, call)
                    if moved is not None:
                        after, then = moved
                        does = "begins" if then.answer == BEGUN else "does"
                        yield Step(
                            f"the database {does} {name}'s {call.kind}", put(after, host._replace(**{slot: then}))
                        )
                yield from self._losses(world, host, slot, call)
        for at, (number, call) in enumerate(world.late):
            moved = self.done(world, call)
            if moved is not None:
                after, then = moved
                late = world.late[:at] + (((number, then),) if then.answer == BEGUN else ()) + world.late[at + 1 :]
                is_fault = call.answer != BEGUN
                does = "begins" if then.answer == BEGUN else "does"
                yield Step(
                    f"the database {does} {NAMES[number]}'s late {call.kind}", after._replace(late=late), is_fault
                )

    def _losses(self, world: World, host: Host, slot: str, call: Call) -> Steps:
        """The daemon gives up: a message is lost, or the statement is done only later."""
        if call.kind == "open" or (call.kind == "swap" and not world.faults.swaps):
            return  # each makes new ids: no end of them
        if call.kind == "swap":
            world = world._replace(faults=world.faults._replace(swaps=world.faults.swaps - 1))
        after = put(world, self._unanswered(host._replace(**{slot: None}), call))
        said = f"{NAMES[host.number]}'s {call.kind}"
        if self.setting.lost and call.answer != BEGUN:
            yield Step(f"{said}: the {'answer' if call.answer else 'statement'} is lost", after, True)
        if len(world.late) < self.setting.late and (call.answer is None or call.answer == BEGUN):
            late = (*world.late, (host.number, call))
            yield Step(f"{said} is late: the daemon gives up on it", after._replace(late=late), True)

    def _unanswered(self, host: Host, call: Call) -> Host:
        """What a daemon does that does not know whether its statement was done."""
        if call.kind == "swap":
            return host._replace(phase="gain")
        if call.kind == "renew" and not self.has("failed_is_not_gone"):
            return host._replace(phase="ending")
        if call.kind == "claim" and self.has("look_after_unknown"):
            return host._replace(todo=True)
        return host

    # --- time ---------------------------------------------------------------------------------------------------------

    def _time(self, world: World) -> Steps:
        if any(self.must_end(host) for host in world.hosts):
            return
        database = self.passed(world.database, 1, world.faults)
        choices = [(False, True) if self._may_slip(host) else (False,) for host in world.hosts]
        for slips in product(*choices):
            first, second = (_older(host, slip) for host, slip in zip(world.hosts, slips, strict=True))
            said = "a tick" + "".join(f", which {NAMES[at]}'s clock misses" for at in (0, 1) if slips[at])
            after = world._replace(database=database, hosts=(first, second))
            if after != world:
                yield Step(said, after, any(slips))

    def _may_slip(self, host: Host) -> bool:
        call = host.keeper
        if not self.setting.slips or host.phase == "well" or host.slipped or (call is not None and call.slipped):
            return False
        return host.fence > 0 or (call is not None and call.fence > 0)

    # --- faults -------------------------------------------------------------------------------------------------------

    def _faults(self, world: World, host: Host) -> Steps:
        faults, name = world.faults, NAMES[host.number]
        if faults.kills and host.phase != "down":
            spent = self.daemon_gone(world, host)._replace(faults=faults._replace(kills=faults.kills - 1))
            yield Step(f"{name}: the daemon is killed", spent, True)
        if faults.shepherds and any(run.is_alive or run.asked for run in host.runs):
            spent = self.processes_gone(world, host)._replace(faults=faults._replace(shepherds=faults.shepherds - 1))
            yield Step(f"{name}: the shepherd is killed, another one begins", spent, True)
        if faults.boots and host.saved is not None:
            yield from self._power_cut(world._replace(faults=faults._replace(boots=faults.boots - 1)), host, name)
        if faults.clones and host.number == 1 and host.phase == "down" and host.saved is None:
            other = world.hosts[0]
            runs = tuple(Run(r.lease, "gone" if r.is_alive else r.disk) for r in other.runs if r.disk != "none")
            after = put(world, host._replace(saved=other.saved, runs=runs))
            yield Step("A's state directory is copied to B", after._replace(faults=faults._replace(clones=0)), True)

    def _power_cut(self, world: World, host: Host, name: str) -> Steps:
        """All that ran is dead, and of what was written last, and not synced, any part may be lost."""
        world = self.daemon_gone(world, host)
        world = self.processes_gone(world, world.hosts[host.number])
        host = world.hosts[host.number]._replace(booted=True, fence=0, slipped=False)
        yield Step(f"{name}: its power is cut", put(world, host), True)
        for run in host.runs:
            for disk in {"gone": ("spec", "none"), "ok": ("gone", "spec", "none"), "spec": ("none",)}.get(run.disk, ()):
                after = changed_disk(host, run, disk)
                yield Step(
                    f"{name}: its power is cut; of {named(run.lease)} there is {disk} left", put(world, after), True
                )


def _settled(world: World) -> World:
    """A host that has nothing more of the job, and will not have, is looked at no further."""
    host, database = world.hosts[0], world.database
    if host.runs or host.claimer or host.outbox or world.late or host.phase == "done":
        return world
    if world.faults.claims and database.job not in ("succeeded", "failed"):
        return world
    if world.faults.clones or world.faults.failovers or host.zombie:
        return world
    if database.lease is not None and host_of(database.lease[0]) == 0:
        return world
    sessions = tuple(session for session in database.sessions if host_of(session.id))
    return put(world._replace(database=database._replace(sessions=sessions)), Host(0, "done"))


def changed_disk(host: Host, run: Run, disk: str) -> Host:
    runs = tuple(each._replace(disk=disk) if each is run else each for each in host.runs)
    return host._replace(runs=tuple(each for each in runs if each.disk != "none"))


def _older(host: Host, slip: bool) -> Host:
    """A tick later, unless its clock misses it."""
    if host.phase == "well":
        return host
    call = host.keeper
    if slip:
        return host._replace(slipped=True, keeper=call and call._replace(slipped=True))
    if call is not None and call.fence > 0:
        call = call._replace(fence=call.fence - 1)
    looks = host.looks - 1
    fence = max(host.fence - 1, 0)
    slipped = host.slipped and fence > 0
    if call is not None and call.fence == 0 and call.slipped:
        call = call._replace(slipped=False)
    if looks <= 0:
        looks = fence if any(run.is_alive for run in host.runs) else 0
    return host._replace(fence=fence, looks=looks if host.looks else 0, slipped=slipped, keeper=call)
