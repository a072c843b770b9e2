"""The rules of the lease by name: what each says, where the code has it, and where the model shows what it is for.

``SETTINGS``: what may happen in one search of the model. Each is small enough to be searched whole; together they have
all that may go wrong, in all orders. ``RULES``: one entry for each ``has("…")`` of the model.

``python -m tests.model.lease_rules RULE`` prints what happens without a rule.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from tests.model.lease_model import Model
from tests.model.lease_search import Found, search
from tests.model.lease_world import Faults, Setting, World

SETTINGS: dict[str, Setting] = {
    # A renews, is late or cut off; clocks run apart; reapers pass; B takes what is passed on.
    "time": Setting(Faults(), brief=True, compared=False, made=2),
    # The same, and A's daemon is killed and started again at any moment.
    "time and a kill": Setting(Faults(kills=1), term=3, brief=True, compared=False, made=2),
    # Time stands still: A's daemon and its shepherd are killed at any moment; answers are lost, those of swaps too.
    "kills": Setting(Faults(claims=2, kills=2, swaps=2, shepherds=1), time=False, compared=False),
    # Statements that are done long after the daemon gave up on them.
    "late": Setting(Faults(claims=2), time=False, late=1),
    # The same, of a daemon that was killed; and others come between a statement's look at the session and its commit.
    "under way": Setting(Faults(kills=1), time=False, late=1, overlap=True, lost=False, drains=True),
    # A claim that is under way while its session runs out.
    "under way and time": Setting(
        Faults(others=0), term=2, margin=1, slips=False, brief=True, overlap=True, compared=False, made=2
    ),
    # A shepherd that answers only after its daemon has given up.
    "a hanging shepherd": Setting(Faults(), time=False, hangs=True, compared=False),
    # A's machine loses its power, and with it any of what was not synced.
    "power": Setting(Faults(claims=2, kills=1, boots=1), time=False, compared=False),
    # A's state directory is copied to B at any moment, and a daemon started there.
    "a clone": Setting(Faults(clones=1), time=False, both=True),
    # Two hosts alike, one job, kills on both.
    "two hosts": Setting(Faults(kills=1, swaps=1, shepherds=1), time=False, compared=False, both=True, made=2),
    # The job runs in the daemon itself, which may be blocked.
    "in process": Setting(Faults(kills=1), term=3, brief=True, compared=False, made=2, in_process=True),
    # The database's clock steps once far and once a little, which nobody notices; or far, twice.
    "a step of the clock": Setting(
        Faults(steps=1, small_steps=1), term=3, margin=2, pulse=True, quick=True, compared=False, made=1, slips=False
    ),
    "two steps of the clock": Setting(
        Faults(steps=2), term=2, margin=1, pulse=True, quick=True, compared=False, made=1, slips=False
    ),
    # A synchronous failover is an outage and nothing else: the settings above have it. An asynchronous one undoes what
    # was acknowledged, so jobs may run twice; but no lease is ever taken for another.
    "an asynchronous failover": Setting(
        Faults(claims=2, kills=2, failovers=1),
        time=False,
        brief=True,
        progress=False,
        lost=False,
        slips=False,
        strict=False,
    ),
    "an asynchronous failover and time": Setting(
        Faults(others=0, failovers=1),
        term=2,
        margin=1,
        pulse=True,
        quick=True,
        compared=False,
        made=2,
        lost=False,
        slips=False,
        strict=False,
    ),
    # A's daemon is started again with half the term.
    "a shorter term": Setting(
        Faults(kills=1), term=6, margin=2, short=3, lost=False, slips=False, brief=True, compared=False, made=2
    ),
}

TWICE = "the job runs twice at once"
NEVER_BEGUN = "a lease is given back, uncounted, as never begun, and it had begun"
ONE_ID = "two leases have one id"
HARMED = "a run is ended though its lease stands"
STUCK = "the job never ends, though nothing fails any more"


class Rule(NamedTuple):
    """``says`` it; ``where``: a file of the source and a piece of it; without it, in ``setting`` there is ``then``."""

    says: str
    where: tuple[str, str]
    setting: str
    then: str = TWICE


_SESSIONS, _DISPATCH = "store/sql/sessions.sql", "store/sql/dispatch.sql"
_TRANSITIONS, _HOT, _IN_FLIGHT = (
    f"store/migrations/{name}.sql" for name in ("0005_transitions", "0009_hot_path", "0012_in_flight")
)

RULES: dict[str, Rule] = {
    # --- the lease
    "one_lease": Rule(
        "a claim takes the job out of the ready ones", (_DISPATCH, "DELETE FROM bsup.ready r WHERE r.ctid"), "time"
    ),
    "own_ids": Rule(
        "a lease's id is made by the claimer, of a random session and its own counter",
        ("actors/claiming.py", "first = me.epoch << 32 | self._next"),
        "an asynchronous failover",
        ONE_ID,
    ),
    "epoch": Rule(
        "each take-up of a session makes ids of another epoch", (_SESSIONS, "epoch = s.epoch + 1"), "kills", ONE_ID
    ),
    "counters_used_up": Rule(
        "a claim that was sent uses its counters up, whatever came back",
        ("actors/claiming.py", "self._next += room.slots"),
        "late",
        ONE_ID,
    ),
    "named_lease": Rule(
        "an end names its lease",
        (_HOT, "l.session = p_session AND l.counter = i.counter AND l.attempt = i.attempt"),
        "time",
        "a write with a lease that is gone changed the job",
    ),
    "incarnation": Rule(
        "a write names the incarnation of its daemon",
        (_IN_FLIGHT, "s.id = p_session AND s.incarnation = p_incarnation"),
        "under way",
    ),
    # --- the fence
    "fence": Rule(
        "runs are ended when the fence passes", ("shepherd/host.py", 'step.stop("fence", 0.0, at_once=True)'), "time"
    ),
    "fence_outside": Rule(
        "the fence is kept outside of the daemon", ("shepherd/fence.py", '_NAME = "fence"'), "time and a kill"
    ),
    "fence_from_sent": Rule(
        "the fence counts from before the renewal was sent",
        ("actors/keeper.py", "await self._publish_fence(sent, self._terms.term)"),
        "time",
    ),
    "margin": Rule("the fence is a margin ahead of the expiry", ("model/policies.py", "sent + term - margin"), "time"),
    "fence_at_start": Rule("nothing starts behind the fence", ("shepherd/host.py", "self.fence.check_start()"), "time"),
    "fence_anew": Rule(
        "a fence that was moved forward counts at once", ("shepherd/host.py", "self._keep_fence()"), "a shorter term"
    ),
    "never_shortened": Rule(
        "a take-up does not shorten the term that the fence on disk was made with",
        (_SESSIONS, "greatest(s.expires_at, bsup.clock() + make_interval(secs => $13))"),
        "a shorter term",
    ),
    "work_ended": Rule(
        "all work of a session has ended before the fence of another is written",
        ("actors/keeper.py", "await self._end_work()"),
        "an asynchronous failover",
        "a run lives on under the fence of another session",
    ),
    "guard": Rule(
        "a daemon that runs jobs itself and does not end them at the fence is killed",
        ("shepherd/host.py", "daemon.kill(self.policy.service[0])"),
        "in process",
    ),
    # --- the reaper and the database's clock
    "rechecked": Rule(
        "a reaper looks at the expiry again under the row's lock",
        (_IN_FLIGHT, "ORDER BY s.expires_at FOR UPDATE SKIP LOCKED"),
        "time",
    ),
    "expired_now": Rule(
        "a session must have expired by the clock as it is, not only as a pass read it",
        (_IN_FLIGHT, "WHERE s.expires_at < least(v_now, bsup.clock())"),
        "a step of the clock",
    ),
    "reaped_is_gone": Rule(
        "a session whose leases were taken can't be renewed", (_IN_FLIGHT, "incarnation = gen_random_uuid()"), "time"
    ),
    "gap": Rule("a pulse that is late puts reaping off by a term", (_TRANSITIONS, "THEN 'gap'"), "a step of the clock"),
    "back": Rule("so does a clock that went back", (_TRANSITIONS, "THEN 'clock went back'"), "two steps of the clock"),
    "timeline": Rule(
        "so does a failover",
        (_TRANSITIONS, "THEN 'new timeline'"),
        "an asynchronous failover and time",
        "a lease is passed on while its job runs",
    ),
    "fresh_pulse": Rule(
        "nobody is reaped while the pulse is not fresh",
        (_IN_FLIGHT, "v_pulse.at BETWEEN v_now - interval '5 s' AND v_now"),
        "a step of the clock",
    ),
    "claim_locks": Rule(
        "a claim locks its session against the reaper", (_DISPATCH, "FOR KEY SHARE"), "under way and time", STUCK
    ),
    # --- taking a session up again
    "lock": Rule("one daemon a state directory", ("runners/session_file.py", "fcntl.flock"), "kills"),
    "set_aside": Rule(
        "state of another machine or directory is set aside",
        ("runners/session_file.py", "def set_aside_foreign"),
        "a clone",
        HARMED,
    ),
    "swap_compares": Rule(
        "a session is taken up by who knows its incarnation",
        (_SESSIONS, "s.incarnation IN ($2, $3)"),
        "an asynchronous failover",
        ONE_ID,
    ),
    "swap_waits": Rule(
        "a session is taken up after the completions that have begun",
        (_IN_FLIGHT, "s.incarnation = p_incarnation\n    FOR KEY SHARE;"),
        "under way",
    ),
    "intent": Rule(
        "the next incarnation is on disk before it is asked for",
        ("actors/keeper.py", "await self._file.save(me, next_incarnation=following"),
        "kills",
        HARMED,
    ),
    "boot_ends": Rule(
        "leases of another boot are losses, whatever is on disk",
        ("actors/reconciler.py", "rebooted=lease.id.epoch < self._boot_epoch"),
        "power",
        NEVER_BEGUN,
    ),
    "boot_on_disk": Rule(
        "which leases are of another boot is on disk",
        ("actors/keeper.py", "saved.boot_epoch if saved.same_boot else grant.me.epoch"),
        "power",
        NEVER_BEGUN,
    ),
    "greeted_last": Rule(
        "a shepherd greets a daemon after it has done what the one before had asked",
        ("shepherd/server.py", "From this line on the client misses no hint"),
        "time and a kill",
    ),
    # --- host and database agree
    "no_claim_meanwhile": Rule(
        "no claim is under way while a host reconciles",
        ("actors/claiming.py", "if self._must_reconcile:"),
        "kills",
    ),
    "look_after_unknown": Rule(
        "a claim whose outcome is unknown is looked for",
        ("actors/claiming.py", "Refused, unavailable or interrupted: what it did is seen only by looking."),
        "kills",
        STUCK,
    ),
    "compared": Rule(
        "a renewal tells what the database holds, and is compared",
        ("actors/dispatcher.py", "(renewed.count, renewed.checksum)"),
        "late",
        STUCK,
    ),
    "unheld_released": Rule(
        "a lease that no actor holds is released", ("actors/adoption.py", "def release_of"), "kills", STUCK
    ),
    "failed_is_not_gone": Rule(
        "a renewal that failed does not mean that the lease is gone",
        ("actors/keeper.py", "except (StoreUnavailable, TimeoutError)"),
        "time",
        HARMED,
    ),
    "died_with_daemon": Rule(
        "what ran in a daemon before this one is lost, not unbegun",
        ("actors/reconciler.py", "row.id.epoch < me.epoch"),
        "in process",
        NEVER_BEGUN,
    ),
    # --- runs and their ends
    "claim_file": Rule(
        "a run is claimed on disk, once",
        ("shepherd/host.py", "self.state.claim(place.directory)"),
        "kills",
        "a run is started twice under one lease",
    ),
    "handle_first": Rule(
        "what is to run is on disk before it is started",
        ("actors/job.py", "plan = self._runner.prepare(self.lease)"),
        "kills",
        "a run is started twice under one lease",
    ),
    "stop_answered": Rule(
        "that a run never started is told when the shepherd has answered what was asked behind the start",
        ("actors/job.py", "It is answered behind the start"),
        "a hanging shepherd",
        NEVER_BEGUN,
    ),
    "gone_is_loss": Rule(
        "a process that is gone without an exit record is a loss",
        ("model/attempt.py", 'if end.cause == "gone":'),
        "kills",
        "a success is recorded of a run that did not succeed",
    ),
    "clean_up_follows": Rule(
        "the clean-up follows the commit", ("model/attempt.py", "def _on_recorded"), "under way", NEVER_BEGUN
    ),
}


def look(setting: str, without: str | None = None) -> Found[World]:
    chosen = SETTINGS[setting]
    return search(Model(chosen, without), progress=chosen.progress)


if __name__ == "__main__":
    for name in sys.argv[1:] or RULES:
        rule = RULES[name]
        found = look(rule.setting, name)
        print(f"\nIt does not hold that {rule.says} ({rule.setting}; {found.states} states):")
        print(found.trace.text() if found.trace else "nothing goes wrong")
