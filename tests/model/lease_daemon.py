"""What a daemon does, in the model of the lease protocol: its keeper, dispatcher and job actors.

Part of ``lease_model``. What a function here says is in ``supervisor/actors`` and ``supervisor/model/attempt.py``.
"""

from __future__ import annotations

from tests.model.lease_search import Step
from tests.model.lease_shepherd import ShepherdRules, changed, named
from tests.model.lease_world import (
    BEGUN,
    ENDS,
    NAMES,
    REFUSED,
    Call,
    Host,
    LeaseId,
    Run,
    Saved,
    Steps,
    World,
    put,
    turned,
)

SEEN = {"ok": "succeeded", "ended": "released", "gone": "lost"}
"""What an actor tells of a run that is over, by what is on disk."""
WORKING = ("new", "start", "asked", "unsure", "wait")


class DaemonRules(ShepherdRules):
    """Steps of a daemon's. ``margin``: in ticks."""

    margin: int

    def daemon(self, world: World, host: Host) -> Steps:
        name = NAMES[host.number]
        if host.phase == "down":
            # It is greeted by the shepherd, after what the one before had asked.
            if not self.has("greeted_last") or not any(run.asked for run in host.runs):
                yield Step(f"{name}: a daemon starts", put(world, self._started(host)))
            return
        yield from self._keeper(world, host, name)
        if self.setting.quick:
            if host.phase == "held":
                yield from self._at_a_stroke(world, host, "claims")
        elif host.session:
            yield from self._claimer(world, host, name)
            yield from self._outbox(world, host, name)
            for run in host.runs:
                yield from self._actor(world, host, run, name)
        if not self.has("lock") and host.zombie is None and any(run.actor == "new" for run in host.runs):
            zombie = next(run.lease for run in host.runs if run.actor == "new")
            second = self.killed(host)._replace(phase="gain", zombie=zombie)
            yield Step(f"{name}: a second daemon starts on the same directory", put(world, second))
        if host.zombie is not None:
            run = Run(host.zombie, "spec", "none", 1)
            runs = (*(each for each in host.runs if each.lease != host.zombie), run)
            yield Step(
                f"{name}: the first daemon asks for the start", put(world, host._replace(runs=runs, zombie=None))
            )

    def well(self, world: World, host: Host) -> Steps:
        """A host whose sessions are renewed, whose messages arrive and whose daemon lives: it takes what there is."""
        database = world.database
        if database.lease is not None and database.lease[0] == host.session and not host.runs:
            # A failover undid the end that was recorded.
            yield Step("B: gives back what it does not hold", self.record(world, database.lease, "never"))
        yield from self._at_a_stroke(world, host, "others")

    def _at_a_stroke(self, world: World, host: Host, kind: str) -> Steps:
        """Claim and start in one; end and record in one."""
        left: int = getattr(world.faults, kind)
        name = NAMES[host.number]
        if world.database.job == "ready" and left and not host.runs and host.fence > 0:
            claim = self._call(
                host, "claim", host.session, host.incarnation, (host.session, host.epoch, host.counter + 1)
            )
            spent = world._replace(faults=world.faults._replace(**{kind: left - 1}))
            if self.holder(world.database, claim) is not None:
                done, claim = self.claim(spent, claim)
            if claim.answer is not None and claim.answer[0] == "lease":
                lease = claim.answer[1]
                assert isinstance(lease, tuple)
                after = put(done, host._replace(counter=host.counter + 1, runs=(Run(lease, "runs", "wait"),)))
                yield Step(f"{name}: claims the job and runs it", turned(after, lease, "runs"))
        for run in host.runs:
            outcome = SEEN.get(run.disk, "succeeded")
            end = self._call(host, "finish", host.session, host.incarnation, (run.lease, outcome))
            if self.holder(world.database, end) is not None:
                world = turned(world, run.lease, "ok") if run.is_alive else world
                after = self.finish(world, end)[0]
                yield Step(f"{name}: its run is over, {outcome}, and recorded", put(after, host._replace(runs=())))

    def _started(self, host: Host) -> Host:
        saved = host.saved
        if saved is not None and self.has("set_aside") and saved.session // 10 != host.number:
            return host._replace(phase="gain", saved=None, runs=())
        return host._replace(phase="gain")

    # --- the keeper -------------------------------------------------------------------------------------------------

    def _term(self, host: Host) -> int:
        return self.setting.short if self.setting.short and host.restarts else self.setting.term

    def _call(self, host: Host, kind: str, session: int, incarnation: int, argument: object) -> Call:
        term = self._term(host)
        return Call(kind, session, incarnation, argument, term, term - self.margin, compares=self.setting.compared)

    def _keeper(self, world: World, host: Host, name: str) -> Steps:
        call = host.keeper
        if call is not None:
            if call.answer is not None and call.answer != BEGUN:
                yield from self._keeper_hears(world, host._replace(keeper=None), call, name)
            return
        match host.phase, host.saved:
            case "gain", None:
                yield Step(f"{name}: there is no session to take up", put(world, host._replace(phase="ending")))
            case "gain", Saved() as saved:
                following, made = (saved.following, host.made) if saved.following else self._fresh(host)
                noted = saved._replace(following=following) if self.has("intent") else saved
                call = self._call(host, "swap", saved.session, saved.incarnation, following)
                after = host._replace(phase="swap?" if saved.following else "swap", saved=noted, made=made, keeper=call)
                yield Step(f"{name}: notes its next incarnation and asks for the session", put(world, after))
            case "swap again", Saved() as saved:
                following, made = self._fresh(host)
                noted = saved._replace(incarnation=saved.following, following=following)
                call = self._call(host, "swap", saved.session, saved.following, following)
                yield Step(
                    f"{name}: asks for the session from the noted incarnation on",
                    put(world, host._replace(saved=noted, made=made, keeper=call)),
                )
            case "ending", _:
                yield Step(f"{name}: ends all work", self._all_ended(world, host))
            case "opening", _ if host.made < self.setting.made:
                session, made = self._fresh(host)
                call = self._call(host, "open", session, session, None)
                yield Step(f"{name}: asks for a new session", put(world, host._replace(made=made, keeper=call)))
            case "held", _ if self.setting.compared or (
                self.setting.time and host.fence < self._term(host) - self.margin
            ):
                call = self._call(host, "renew", host.session, host.incarnation, None)
                yield Step(f"{name}: sends a renewal", put(world, host._replace(keeper=call)))
        if host.phase == "held" and host.todo and not self.has("no_claim_meanwhile"):
            yield self._looks(world, host, "keeper", name)

    @staticmethod
    def _fresh(host: Host) -> tuple[int, int]:
        """A random id."""
        made = host.made + 1
        return host.number * 10 + made, made

    def _keeper_hears(self, world: World, host: Host, call: Call, name: str) -> Steps:
        answer = call.answer
        assert answer is not None
        if call.kind == "leases":
            yield Step(f"{name}: reconciles", self._reconciled(world, host, call))
        elif answer == REFUSED:
            again = host.phase == "swap?"
            yield Step(
                f"{name}: hears that its {call.kind} is refused",
                put(world, host._replace(phase="swap again" if again else "ending")),
            )
        elif call.kind == "renew":
            host = self._fenced_by(host, call)
            held = {run.lease for run in host.runs if run.actor not in ("none", "clean")}
            is_comparable = call.compares and host.claimer is None and host.outbox is None
            if self.setting.compared and self.has("compared") and is_comparable and held != set(answer[1]):  # type: ignore[call-overload]
                host = host._replace(todo=True)
            yield Step(f"{name}: hears that it is renewed, writes the fence", put(world, host))
        else:
            epoch = answer[1]
            assert isinstance(epoch, int)
            incarnation = call.argument if call.kind == "swap" else call.incarnation
            assert isinstance(incarnation, int)
            known = host.saved.boot_epoch if host.saved is not None and call.kind == "swap" else 0
            before = epoch if host.booted and call.kind == "swap" else known
            host = host._replace(
                phase="held",
                saved=Saved(call.session, incarnation, 0, before if self.has("boot_on_disk") else 0),
                session=call.session,
                incarnation=incarnation,
                epoch=epoch,
                counter=0,
                todo=not self.setting.quick,
                booted=False,
                before=before,
                fence=max(call.fence, 0) if self.has("fence_from_sent") else call.term - self.margin,
                fence_of=call.session,
                slipped=call.slipped,
            )
            yield Step(f"{name}: holds a session, epoch {epoch}; writes it down, then the fence", put(world, host))

    def _fenced_by(self, host: Host, call: Call) -> Host:
        fence = call.fence if self.has("fence_from_sent") else call.term - self.margin
        return host if fence < host.fence else host._replace(fence=fence, slipped=call.slipped)

    def _all_ended(self, world: World, host: Host) -> World:
        runs: list[Run] = []
        for run in host.runs:
            if not self.has("work_ended"):
                if run.disk != "none":
                    runs.append(run._replace(actor="none"))
            elif run.is_alive:
                world = self._put_down(world, host, run)
        world = self.forgotten(world, host, ("claimer", "outbox"))
        host = host._replace(
            phase="opening", session=0, runs=tuple(runs), claimer=None, outbox=None, todo=False, zombie=None
        )
        return put(world, host)

    def _put_down(self, world: World, host: Host, run: Run) -> World:
        """Ends a run because its lease is gone: which must be so."""
        database = world.database
        session = database.session(run.lease[0])
        stands = database.lease == run.lease and session is not None and session.left > 0 and host.fence > 0
        if stands and self.setting.strict:
            world = world._replace(wrong="a run is ended though its lease stands")
        return turned(world, run.lease, "ended")

    # --- the dispatcher -----------------------------------------------------------------------------------------------

    def _claimer(self, world: World, host: Host, name: str) -> Steps:
        call = host.claimer
        if call is not None:
            if call.answer is not None and call.answer != BEGUN:
                yield from self._claimer_hears(world, _heard(host)._replace(claimer=None), call, name)
            return
        if host.phase != "held":
            return
        if host.todo and self.has("no_claim_meanwhile"):
            yield self._looks(world, host, "claimer", name)
            return
        database, faults = world.database, world.faults
        is_there = database.job == "ready" or (database.job == "leased" and not self.has("one_lease"))
        has_room = not any(run.actor in WORKING for run in host.runs)
        kind = "others" if host.number else "claims"
        left: int = getattr(faults, kind)
        if is_there and has_room and left and host.fence > 0:
            used = 0 if not self.has("counters_used_up") else host.counter
            lease = (host.session, host.epoch, used + 1)
            call = self._call(host, "claim", host.session, host.incarnation, lease)
            after = put(world, host._replace(counter=used + 1, claimer=call))
            yield Step(f"{name}: sends a claim", after._replace(faults=faults._replace(**{kind: left - 1})))

    def _looks(self, world: World, host: Host, slot: str, name: str) -> Step[World]:
        known = tuple(run.lease for run in host.runs if run.actor != "none")
        call = self._call(host, "leases", host.session, host.incarnation, known)
        return Step(f"{name}: asks what it holds", put(world, host._replace(**{slot: call})))

    def _claimer_hears(self, world: World, host: Host, call: Call, name: str) -> Steps:
        answer = call.answer
        assert answer is not None
        if answer == REFUSED:
            phase = "ending" if host.phase == "held" else host.phase
            yield Step(f"{name}: hears that its {call.kind} is refused", put(world, host._replace(phase=phase)))
        elif call.kind == "leases":
            yield Step(f"{name}: reconciles", self._reconciled(world, host, call))
        elif answer[0] == "lease":
            lease = answer[1]
            assert isinstance(lease, tuple)
            others = tuple(run for run in host.runs if run.lease != lease)
            yield Step(
                f"{name}: hears of its lease {named(lease)}",
                put(world, host._replace(runs=(*others, Run(lease, actor="new")))),
            )
        else:
            yield Step(f"{name}: hears that there is nothing", put(world, host))

    def _reconciled(self, world: World, host: Host, call: Call) -> World:
        """``adoption.compare``, and what follows."""
        assert call.answer is not None and isinstance(call.argument, tuple)
        rows, before = call.answer[1], call.argument
        assert isinstance(rows, tuple)
        known = {*before, *(run.lease for run in host.runs if run.actor != "none")}
        runs: list[Run] = []
        for run in host.runs:
            if run.actor == "none" and run.lease in rows and run.lease not in known:
                run = self._taken_up(host, run)
            elif run.lease not in rows and (
                # Buried, or gone under an actor that both looks saw.
                run.disk != "hidden" if run.actor == "none" else run.actor in WORKING and run.lease in before
            ):
                if run.is_alive:
                    world = self._put_down(world, host, run)
                continue
            runs.append(run)
        on_host = {run.lease for run in runs}
        if self.has("unheld_released"):
            for lease in rows:
                if lease not in known and lease not in on_host:
                    runs.append(Run(lease, actor=self._end_of_unbegun(host, lease)))
        return put(world, host._replace(runs=tuple(runs), todo=False))

    def _taken_up(self, host: Host, run: Run) -> Run:
        if run.disk in ("none", "hidden"):
            if not self.has("unheld_released"):
                return run
            return run._replace(actor=self._end_of_unbegun(host, run.lease))
        if self._is_of_another_boot(host, run.lease) and run.disk != "ok":
            return run._replace(actor="lost")
        return run._replace(actor="start" if run.disk == "spec" else "wait")

    def _end_of_unbegun(self, host: Host, lease: LeaseId) -> str:
        """Nothing is on disk. Of a process, that is as much as never begun, unless the machine was booted since; what
        ran in a daemon before this one has died with it."""
        if self.setting.in_process and lease[1] < host.epoch and self.has("died_with_daemon"):
            return "lost"
        return "lost" if self._is_of_another_boot(host, lease) else "never"

    def _is_of_another_boot(self, host: Host, lease: LeaseId) -> bool:
        return self.has("boot_ends") and lease[1] < host.before

    def _outbox(self, world: World, host: Host, name: str) -> Steps:
        call = host.outbox
        if call is None:
            for run in host.runs:
                if run.actor in ENDS and host.phase == "held" and run.lease[0] in (host.session, 0):
                    call = self._call(host, "finish", host.session, host.incarnation, (run.lease, run.actor))
                    if not self.has("clean_up_follows"):
                        host = changed(host, run, run._replace(disk="none"))
                    yield Step(
                        f"{name}: tells the end of {named(run.lease)}: {run.actor}",
                        put(world, host._replace(outbox=call)),
                    )
                    return
            return
        if call.answer is None or call.answer == BEGUN:
            return
        host = _heard(host)._replace(outbox=None)
        assert isinstance(call.argument, tuple)
        if call.answer == REFUSED:
            phase = "ending" if host.phase == "held" else host.phase
            yield Step(f"{name}: hears that its finish is refused", put(world, host._replace(phase=phase)))
            return
        # Recorded, or the lease is gone: then it is kept as superseded. Either way it is over here.
        for run in host.runs:
            if run.lease == call.argument[0]:
                host = changed(host, run, None if self.setting.brief and not run.asked else run._replace(actor="clean"))
        yield Step(f"{name}: hears that the end is {call.answer[0]}", put(world, host))

    # --- a job's actor ------------------------------------------------------------------------------------------------

    def _actor(self, world: World, host: Host, run: Run, name: str) -> Steps:
        lease = named(run.lease)

        def step(said: str, after: Run | None) -> Step[World]:
            return Step(f"{name}: {said} {lease}", put(world, changed(host, run, after)))

        match run.actor:
            case "new" | "start" if host.fence <= 0:
                yield step("the fence has passed: gives back", run._replace(actor="released"))
                return
            case "new" | "start" if self.setting.drains:
                yield step("told to drain: gives back", run._replace(actor="released"))
        match run.actor:
            case "new" if self.setting.in_process:
                after = put(world, changed(host, run, run._replace(disk="hidden", actor="wait")))
                yield Step(f"{name}: the daemon itself runs {lease}", turned(after, run.lease, "runs"))
            case "new":
                disk = "spec" if self.has("handle_first") else "none"
                if self.setting.brief:
                    yield step("asks the shepherd to start", run._replace(disk=disk, actor="asked", asked=1))
                else:
                    yield step("writes the handle of", run._replace(disk=disk, actor="start"))
            case "start":
                yield step("asks the shepherd to start", run._replace(actor="asked", asked=run.asked + 1))
            case "asked" if not run.asked:
                if run.disk in ("spec", "none"):
                    yield step("hears that the fence has passed: gives back", run._replace(actor="released"))
                else:
                    disk = "runs" if run.disk == "hidden" else run.disk
                    yield step("hears of the start of", run._replace(disk=disk, actor="wait"))
            case "asked" if self.setting.hangs:
                yield Step(
                    f"{name}: has no answer from the shepherd in time about {lease}",
                    put(world, changed(host, run, run._replace(actor="unsure"))),
                    True,
                )
            case "unsure" if not run.asked or not self.has("stop_answered"):
                if run.disk == "spec":
                    yield step("finds no claim: tells that it could not start", run._replace(actor="never"))
                elif not run.is_alive:
                    yield step("finds the end of", run._replace(actor="wait"))
            case "wait" if run.disk in SEEN:
                told = SEEN[run.disk] if self.has("gone_is_loss") or run.disk != "gone" else "succeeded"
                yield step("sees the end of", run._replace(actor=told))
            case "clean" if not run.asked:
                yield step("cleans up after", None)


def _heard(host: Host) -> Host:
    """A renewal that is under way tells no more what can be compared."""
    call = host.keeper
    return host if call is None or not call.compares else host._replace(keeper=call._replace(compares=False))
