"""What the database does, in the model of the lease protocol: statements, pulse, reaper, failovers, its clock.

Part of ``lease_model``. What a function here says is in ``supervisor/store``: ``sql/sessions.sql``,
``sql/dispatch.sql`` and ``migrations/``.
"""

from __future__ import annotations

from tests.model.lease_world import (
    ALWAYS,
    BEGUN,
    FAR,
    FRESH,
    LONG_AGO,
    LOSS_BUDGET,
    REFUSED,
    Call,
    Database,
    Faults,
    LeaseId,
    Session,
    Setting,
    Step,
    Steps,
    World,
    fate_of,
)


class DatabaseRules:
    """Statements as functions of what they find; ``without`` as in ``Model``."""

    setting: Setting
    without: str | None

    def has(self, rule: str) -> bool:
        return self.without != rule

    # --- statements -----------------------------------------------------------------------------------------------

    def done(self, world: World, call: Call) -> tuple[World, Call] | None:
        """The statement's next moment: the world and the call after it. None: it waits for a lock."""
        match call.kind:
            case "open":
                return self._open(world, call)
            case "swap":
                return self._swap(world, call)
            case "renew":
                return self._renew(world, call)
            case "leases":
                return self._leases(world, call)
            case "claim" | "finish":
                if call.answer is None:
                    if self.holder(world.database, call) is None:
                        return world, call._replace(answer=REFUSED)
                    if self.setting.overlap:
                        return world, call._replace(answer=BEGUN)
                return self.claim(world, call) if call.kind == "claim" else self.finish(world, call)
        raise AssertionError(call.kind)

    def holder(self, database: Database, call: Call) -> Session | None:
        session = database.session(call.session)
        if session is None or (session.incarnation != call.incarnation and self.has("incarnation")):
            return None
        return session

    def _open(self, world: World, call: Call) -> tuple[World, Call]:
        session = Session(call.session, call.incarnation, 1, call.term)
        database = world.database._replace(sessions=(*world.database.sessions, session))
        return world._replace(database=database), call._replace(answer=("granted", 1))

    def _swap(self, world: World, call: Call) -> tuple[World, Call] | None:
        database = world.database
        session = database.session(call.session)
        following = call.argument
        assert isinstance(following, int)
        if session is None or session.left <= 0:
            return world, call._replace(answer=REFUSED)
        left = max(call.term, session.left) if self.has("never_shortened") else call.term
        if self.has("swap_compares") and session.incarnation not in (call.incarnation, following):
            return world, call._replace(answer=REFUSED)
        if self.has("swap_waits") and any(each.session == call.session for each in _begun(world)):
            return None
        epoch = session.epoch + 1 if self.has("epoch") else session.epoch
        database = self._with(database, Session(session.id, following, epoch, left))
        return world._replace(database=database), call._replace(answer=("granted", epoch))

    def _renew(self, world: World, call: Call) -> tuple[World, Call]:
        session = self.holder(world.database, call)
        if session is None:
            return world, call._replace(answer=REFUSED)
        database = self._with(world.database, session._replace(left=call.term))
        return world._replace(database=database), call._replace(answer=("held", database.rows(session.id)))

    def _leases(self, world: World, call: Call) -> tuple[World, Call]:
        if self.holder(world.database, call) is None:
            return world, call._replace(answer=REFUSED)
        return world, call._replace(answer=("held", world.database.rows(call.session)))

    def claim(self, world: World, call: Call) -> tuple[World, Call]:
        database = world.database
        session = database.session(call.session)
        is_expired = session is not None and session.left <= 0
        is_free = database.job == "ready" or (database.job == "leased" and not self.has("one_lease"))
        if is_expired or not is_free:
            return world, call._replace(answer=("nothing",))
        lease = call.argument
        assert isinstance(lease, tuple)
        if not self.has("own_ids"):
            lease = (0, 0, database.sequence + 1)
        if any(made == lease for made, _ in world.truth):
            world = world._replace(wrong="two leases have one id")
        database = database._replace(job="leased", lease=lease, sequence=database.sequence + 1)
        world = world._replace(database=database, truth=(*world.truth, (lease, "leased")))
        return world, call._replace(answer=("lease", lease))

    def finish(self, world: World, call: Call) -> tuple[World, Call]:
        database = world.database
        assert isinstance(call.argument, tuple)
        lease, outcome = call.argument
        if database.job == "leased" and database.lease is not None:
            if database.lease == lease:
                return self.record(world, lease, outcome), call._replace(answer=("recorded",))
            if not self.has("named_lease"):
                world = self.record(world, database.lease, outcome)
                wrong = "a write with a lease that is gone changed the job"
                return world._replace(wrong=wrong), call._replace(answer=("recorded",))
        return world, call._replace(answer=("recorded",) if lease in database.ended else ("gone",))

    def record(self, world: World, lease: LeaseId, outcome: str) -> World:
        """What the end of a lease means for its job; and whether it is true."""
        database, truth = world.database, fate_of(world, lease)
        wrong = world.wrong
        if lease in database.ended:
            wrong = "two ends of one lease are recorded"
        elif outcome == "succeeded" and truth != "ok":
            wrong = "a success is recorded of a run that did not succeed"
        elif outcome == "never" and truth != "leased" and self.setting.strict:
            wrong = "a lease is given back, uncounted, as never begun, and it had begun"
        losses = database.losses + (outcome == "lost")
        job = "succeeded" if outcome == "succeeded" else "failed" if losses >= LOSS_BUDGET else "ready"
        ended = (*database.ended, lease)
        return world._replace(database=database._replace(job=job, lease=None, losses=losses, ended=ended), wrong=wrong)

    # --- the pulse and the reaper -----------------------------------------------------------------------------------

    def upkeep(self, world: World) -> Steps:
        """``beat`` and ``reap``, whoever calls them. A pass looks first, and then takes what it found."""
        database = world.database
        if self.setting.pulse:
            beaten = self._beat(database)
            if beaten != database:
                yield Step("a daemon keeps the pulse", world._replace(database=beaten))
        if database.reaper is None:
            if database.sessions and self._may_reap(database):
                seen = tuple(s.id for s in database.sessions if s.left <= 0)
                if seen:
                    reaper = (False, seen)
                    yield Step(
                        "a reaper sees a session that ran out",
                        world._replace(database=database._replace(reaper=reaper)),
                    )
            return
        _, seen = database.reaper
        after = world._replace(database=database._replace(reaper=None))
        for session in database.sessions:
            if session.id not in seen:
                continue
            if session.left > 0 and self.has("expired_now") and self.has("rechecked"):
                continue
            if any(each.session == session.id for each in _begun(world)) and self.has("claim_locks"):
                continue
            after = self._taken(after, session)
        yield Step("the reaper takes what is expired", after)

    def _taken(self, world: World, session: Session) -> World:
        database = world.database
        if database.lease in database.rows(session.id) and database.lease is not None:
            truth = fate_of(world, database.lease)
            if truth == "runs" and not self.setting.strict:
                world = world._replace(wrong="a lease is passed on while its job runs")
            world = self.record(world, database.lease, "lost")
        if not self.has("reaped_is_gone"):
            return world
        left = tuple(s for s in world.database.sessions if s.id != session.id)
        return world._replace(database=world.database._replace(sessions=left))

    def _beat(self, database: Database) -> Database:
        is_back = database.pulse < 0 and self.has("back")
        is_gap = database.pulse > FRESH and self.has("gap")
        is_new = not database.knows and self.has("timeline")
        put_off = self.setting.term if is_back or is_gap or is_new else database.put_off
        pulse = 0 if database.pulse > 0 or is_back or is_new else database.pulse
        return database._replace(pulse=pulse, knows=True, beaten=True, put_off=put_off)

    def _may_reap(self, database: Database) -> bool:
        if database.put_off > 0:
            return False
        if not self.has("fresh_pulse"):
            return True
        return 0 <= database.pulse <= FRESH and (database.knows or not self.has("timeline"))

    # --- its faults -------------------------------------------------------------------------------------------------

    def trouble(self, world: World) -> Steps:
        faults, database = world.faults, world.database
        # Two steps between two beats are not looked at: the second could hide the first.
        if database.beaten:
            for said, by, kind in (("forward", FAR, "steps"), ("back", -FAR, "steps"), ("a little", 1, "small_steps")):
                left: int = getattr(faults, kind)
                if left:
                    spent = faults._replace(**{kind: left - 1})
                    after = world._replace(
                        faults=spent, database=self.passed(database, by, spent)._replace(beaten=False)
                    )
                    yield Step(f"the database's clock steps {said}", after, True)
        if faults.failovers:
            if database.old is None:
                copy = database._replace(reaper=None)
                yield Step("the standby has got so far", world._replace(database=database._replace(old=copy)), True)
            else:
                promoted = database.old._replace(knows=False)
                after = world._replace(database=promoted, faults=faults._replace(failovers=faults.failovers - 1))
                yield Step("the standby is promoted: what it had not got is undone", after, True)

    def passed(self, database: Database, ticks: int, faults: Faults) -> Database:
        """Time as the database's clock counts it. What lies further back than a clock may step is told as that."""
        low = LONG_AGO if faults.steps else 0
        reaper, old = database.reaper, database.old
        return database._replace(
            sessions=tuple(
                [s if s.left == ALWAYS else s._replace(left=max(s.left - ticks, low)) for s in database.sessions]
            ),
            reaper=None if reaper is None else (reaper[0] or ticks < 0, reaper[1]),
            put_off=max(database.put_off - ticks, 0) if database.put_off > 0 else 0,
            pulse=max(min(database.pulse + ticks, FRESH + 1), LONG_AGO) if self.setting.pulse else 0,
            old=None if old is None else self.passed(old, ticks, faults),
        )

    def _with(self, database: Database, session: Session) -> Database:
        """A pass of the reaper that has begun looks at the row again before it takes it, and compares with its own idea
        of now, which is ahead where the clock stepped back."""
        reaper = database.reaper
        if reaper is not None and self.has("rechecked") and not (reaper[0] and not self.has("expired_now")):
            reaper = (reaper[0], tuple([each for each in reaper[1] if each != session.id]))
        sessions = tuple([session if each.id == session.id else each for each in database.sessions])
        return database._replace(sessions=sessions, reaper=reaper)


def _begun(world: World) -> list[Call]:
    """Statements that have looked at their session, and not committed yet."""
    calls = [call for host in world.hosts for call in (host.keeper, host.claimer, host.outbox) if call is not None]
    calls += [call for _, call in world.late]
    return [call for call in calls if call.answer is BEGUN or call.answer == BEGUN]
