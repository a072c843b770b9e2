"""The words of the model of the lease protocol: what a host, a database and a message between them are. Values only.

Part of ``lease_model``. Times are in ticks: what is left until then, as its own clock counts it. Everything is a tuple
of small things, as the search holds hundreds of thousands of worlds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from tests.model.lease_search import Step

T = TypeVar("T", bound=type)


def _quick(values: T) -> T:
    """A ``_replace`` that takes half as long: it is what the search spends its time on."""
    places = {field: place for place, field in enumerate(values._fields)}  # type: ignore[attr-defined]
    new = tuple.__new__

    def replace(self, **changes):  # type: ignore[no-untyped-def]
        parts = list(self)
        for field in changes:
            parts[places[field]] = changes[field]
        return new(values, parts)

    values._replace = replace  # type: ignore[attr-defined]
    return values


LeaseId = tuple[int, int, int]
"""Session, epoch, and the daemon's own counter."""

LOSS_BUDGET = 2
FRESH = 1
"""Ticks for which a pulse counts as fresh: a step of the clock that is no longer is not noticed."""
FAR = 5
"""Ticks that a clock steps: more than a term."""
LONG_AGO = -FAR
"""What lies further back is told as this: a step can't bring it back."""
ALWAYS = 99
"""What is left of a session that somebody renews all the time."""
NAMES = ("A", "B")


# --- messages ---------------------------------------------------------------------------------------------------------


@_quick
class Call(NamedTuple):
    """A statement: its way to the database, its being done there (then it has its ``answer``), and the way back.

    ``fence``: what is left of the fence that it will earn. ``slipped``: the host's clock missed a tick since it was
    sent. ``compares``: no claim and no end was answered since, so what it tells can be compared.
    """

    kind: str
    session: int
    incarnation: int
    argument: object = None
    term: int = 0
    fence: int = 0
    slipped: bool = False
    compares: bool = True
    answer: tuple[object, ...] | None = None


BEGUN: tuple[object, ...] = ("begun",)
"""It has looked at its session, and not committed."""
REFUSED: tuple[object, ...] = ("refused",)


# --- a host -----------------------------------------------------------------------------------------------------------


@_quick
class Run(NamedTuple):
    """A lease as a host knows it.

    ``disk``, what its directory says: none, spec, hidden (it runs, and nothing says so), runs, ok, ended, gone.
    ``actor``: none, new, start, asked, unsure, wait, clean, or the end that it is telling (``ENDS``).
    ``asked``: how many requests to start it the shepherd has not looked at.
    """

    lease: LeaseId
    disk: str = "none"
    actor: str = "none"
    asked: int = 0

    @property
    def is_alive(self) -> bool:
        return self.disk in ("runs", "hidden")


ENDS = ("succeeded", "released", "never", "lost")
"""``never``: released, as never begun."""


@_quick
class Saved(NamedTuple):
    """``session.json``. ``following``: the intent of a swap. ``boot_epoch``: leases before it are of another boot."""

    session: int
    incarnation: int
    following: int = 0
    boot_epoch: int = 0


@_quick
class Host(NamedTuple):
    """A state directory with its daemon and its shepherd.

    ``phase`` of the daemon: down, gain, swap (``swap?``: an intent was there before it; ``swap again``: that one is
    tried), ending, opening, held. A host that is ``well`` is never in trouble; one that is ``done`` has nothing more of
    the job. ``todo``: it is to reconcile. ``before``: leases of an epoch before it are of another boot, as the daemon
    knows. ``booted``: the boot id on disk is not this boot's. ``looks``: what is left until the shepherd's timer.
    ``made``: random ids. ``zombie``: a lease that a second daemon on the same directory has claimed.
    """

    number: int
    phase: str = "down"
    saved: Saved | None = None
    session: int = 0
    incarnation: int = 0
    epoch: int = 0
    counter: int = 0
    todo: bool = False
    before: int = 0
    booted: bool = False
    restarts: int = 0
    fence: int = 0
    fence_of: int = 0
    slipped: bool = False
    looks: int = 0
    made: int = 0
    runs: tuple[Run, ...] = ()
    keeper: Call | None = None
    claimer: Call | None = None
    outbox: Call | None = None
    zombie: LeaseId | None = None


SLOTS = ("keeper", "claimer", "outbox")


def host_of(session: int) -> int:
    return session // 10


# --- the database -----------------------------------------------------------------------------------------------------


@_quick
class Session(NamedTuple):
    id: int
    incarnation: int
    epoch: int
    left: int


@_quick
class Database(NamedTuple):
    """``job``: ready, leased, succeeded, failed.

    ``ended``: leases whose end is recorded. ``reaper``: a pass that has begun: whether its idea of now is ahead of the
    clock, and the sessions it saw expired. ``put_off``: until reaping. ``pulse``: its age. ``knows``: the pulse names
    the timeline that is. ``beaten``: there was a beat since the clock stepped. ``sequence``: what ids would be made of
    by a database. ``old``: what the standby has that may be promoted.
    """

    job: str = "ready"
    lease: LeaseId | None = None
    losses: int = 0
    sessions: tuple[Session, ...] = ()
    ended: tuple[LeaseId, ...] = ()
    reaper: tuple[bool, tuple[int, ...]] | None = None
    put_off: int = 0
    pulse: int = 0
    knows: bool = True
    beaten: bool = True
    sequence: int = 0
    old: Database | None = None

    def session(self, session: int) -> Session | None:
        for each in self.sessions:
            if each.id == session:
                return each
        return None

    def rows(self, session: int) -> tuple[LeaseId, ...]:
        return (self.lease,) if self.lease is not None and self.lease[0] == session else ()


# --- all of it --------------------------------------------------------------------------------------------------------


@_quick
class Faults(NamedTuple):
    """How much of each is still to come. ``claims`` are A's, ``others`` B's; ``swaps``: those whose answer is lost."""

    claims: int = 1
    others: int = 1
    swaps: int = 0
    kills: int = 0
    shepherds: int = 0
    boots: int = 0
    steps: int = 0
    small_steps: int = 0
    failovers: int = 0
    clones: int = 0


@_quick
class World(NamedTuple):
    """``late``: statements whose daemon no longer waits for them. ``truth``: what really became of each lease: leased,
    runs, ok, ended, gone. ``wrong``: what must never be, and was."""

    faults: Faults
    hosts: tuple[Host, Host] = (Host(0), Host(1))
    database: Database = Database()
    late: tuple[tuple[int, Call], ...] = ()
    truth: tuple[tuple[LeaseId, str], ...] = ()
    wrong: str | None = None


@dataclass(frozen=True)
class Setting:
    """What may happen in a search, and at which grain it looks."""

    faults: Faults
    term: int = 4
    margin: int = 2
    short: int = 0
    """The term of a daemon that was started again, if another one."""
    time: bool = True
    slips: bool = True
    """A host's clock may miss a tick in each term."""
    lost: bool = True
    """Messages may be lost."""
    late: int = 0
    """How many statements may still be done, at once, though nobody waits for them."""
    overlap: bool = False
    """Others come between a statement's look at its session and its commit."""
    hangs: bool = False
    """The shepherd may hang for longer than a daemon waits for its answer."""
    drains: bool = False
    """A daemon may be told to give back what has not started."""
    in_process: bool = False
    """The job runs in the daemon itself."""
    pulse: bool = False
    """The pulse is kept by beats that may not come; else it is always fresh."""
    strict: bool = True
    """Two runs at once are wrong: not where the database may lose what it acknowledged."""
    compared: bool = True
    """Renewals are compared with what is held."""
    both: bool = False
    """B is a host like A; else it is one that is never in trouble."""
    brief: bool = False
    """Steps of a daemon's between which nothing of this setting can come are one."""
    quick: bool = False
    """A claim is a start, too, and a run's end its record: where only renewals and the fence are of interest."""
    made: int = 3
    """Random ids that a host makes; one that would need more is looked at no further."""
    progress: bool = True
    """It is asked if the job can always end: not where a session never expires and nobody may hold it."""


Steps = Iterator[Step["World"]]


def put(world: World, host: Host) -> World:
    hosts = (host, world.hosts[1]) if host.number == 0 else (world.hosts[0], host)
    return world._replace(hosts=hosts)


def turned(world: World, lease: LeaseId, fate: str) -> World:
    """What really became of a lease."""
    return world._replace(truth=tuple([(each, fate if each == lease else was) for each, was in world.truth]))


def fate_of(world: World, lease: LeaseId) -> str:
    for each, fate in world.truth:
        if each == lease:
            return fate
    return "unknown"
