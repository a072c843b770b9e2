"""``status``, ``hosts``, ``drain``, ``resume``, ``reload``, ``events``, ``actors`` and ``version``: the daemon and
its peers.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from supervisor import __version__
from supervisor.cli.configuration import connect
from supervisor.cli.exits import CommandError, Exit
from supervisor.cli.table import Cell, Column
from supervisor.cli.terminal import STATE_STYLE, Terminal
from supervisor.cli.text import age, duration, local, plural, safe, since
from supervisor.protocol import (
    ActorsParams,
    ActorsReply,
    DrainParams,
    DrainReply,
    EventsParams,
    EventsReply,
    HostsParams,
    HostsReply,
    ReloadParams,
    ReloadReply,
    ResumeParams,
    ResumeReply,
    StatusParams,
    StatusReply,
    StatusView,
    VersionParams,
    VersionReply,
)


def status(args: Namespace, terminal: Terminal) -> int:
    with connect(args) as daemon:
        view = daemon.call("Status", StatusParams(), StatusReply).status
    if terminal.json:
        terminal.object(view)
        return Exit.OK
    _headline(terminal, view)
    facts: list[tuple[str, str]] = []
    running = "not known yet" if view.running is None else plural(view.running, "job")
    facts.append(("running", f"{running}{_slots(view)}"))
    facts.append(("database", _database(view)))
    facts.append(("isolation", "; ".join(f"{name}: {how}" for name, how in view.isolation.items())))
    facts.append(("socket", f"{view.socket.path}, {plural(view.socket.connections, 'connection')}{_refused(view)}"))
    facts.append(("daemon", f"bsup {view.version}, pid {view.pid}, up {duration(view.uptime)}"))
    for label, text in facts:
        if text:
            terminal.item(f"  {terminal.paint(f'{label:<10}', 'dim')} ", text, 13)
    return Exit.OK


def _headline(terminal: Terminal, view: StatusView) -> None:
    host = terminal.paint(safe(view.host), "bold")
    if view.ok and not view.problems:
        terminal.line(f"{host}: {terminal.paint('all is well', 'green')}")
        return
    count = plural(len(view.problems), "thing is", "things are") if view.problems else "something is"
    terminal.line(f"{host}: {terminal.paint(f'{count} wrong', 'red')}")
    for problem in view.problems:
        terminal.item(f"  {terminal.paint('!', 'red')} ", problem, 4)


def _slots(view: StatusView) -> str:
    slots = view.actors.get("dispatcher", {}).get("slots")
    return f" of {slots} slots" if isinstance(slots, int) else ""


def _database(view: StatusView) -> str:
    database = view.database
    if not database.available:
        away = f"away since {local(database.since)} ({age(since(database.since))})"
        return away + (f": {database.error}" if database.error else "")
    words = [database.server or "connected"]
    if database.last_round_trip is not None:
        words.append(f"round trip {database.last_round_trip * 1000:.1f} ms")
    if not database.listening:
        words.append("not listening: polls")
    return ", ".join(words)


def _refused(view: StatusView) -> str:
    refused = {why: count for why, count in view.socket.refused.items() if count}
    return f"; refused: {', '.join(f'{count} {why}' for why, count in refused.items())}" if refused else ""


_HOSTS = (
    Column("HOST", least=8),
    Column("STATE"),
    Column("JOBS", right=True),
    Column("SLOTS", right=True),
    Column("LABELS", least=8, order=2),
    Column("RENEWED", order=1, right=True),
    Column("UP", order=3, right=True),
    Column("VERSION", order=4),
)


def hosts(args: Namespace, terminal: Terminal) -> int:
    rows: list[list[str | Cell]] = []
    with connect(args) as daemon:
        for reply in daemon.stream("Hosts", HostsParams(), HostsReply):
            host = reply.host
            if host is None:
                continue
            if terminal.json:
                terminal.object(host)
                continue
            rows.append(
                [
                    host.name,
                    Cell(host.state, STATE_STYLE.get(host.state)),
                    str(host.leases),
                    str(host.slots),
                    ",".join(host.labels) or "-",
                    f"{age(since(host.renewed_at))} ago",
                    age(since(host.started_at)),
                    host.version,
                ]
            )
    if rows:
        terminal.table(_HOSTS, rows)
    return Exit.OK


def drain(args: Namespace, terminal: Terminal) -> int:
    with connect(args) as daemon:
        # Told at once, so that nothing new is taken, and then waited for: an interrupt ends the waiting, not the drain.
        reply = daemon.call("Drain", DrainParams(wait=False, deadline=args.deadline), DrainReply)
        if args.wait and reply.running:
            terminal.note(f"draining: waiting for {plural(reply.running, 'job')}", "dim")
            try:
                reply = daemon.call("Drain", DrainParams(wait=True, deadline=args.deadline), DrainReply, timeout=None)
            except KeyboardInterrupt:
                terminal.note("bsup: no longer waiting; the drain goes on (`bsup resume` ends it)", "yellow")
                return Exit.INTERRUPTED
    if terminal.json:
        terminal.object({"running": reply.running})
    elif reply.running:
        terminal.line(f"draining: {plural(reply.running, 'job')} still running, no new ones are taken")
    else:
        terminal.line("drained: nothing runs here, no new jobs are taken until `bsup resume`")
    return Exit.OK


def resume(args: Namespace, terminal: Terminal) -> int:
    with connect(args) as daemon:
        daemon.call("Resume", ResumeParams(), ResumeReply)
    if terminal.json:
        terminal.object({"resumed": True})
    else:
        terminal.line("resumed: new jobs are taken")
    return Exit.OK


def reload(args: Namespace, terminal: Terminal) -> int:
    with connect(args) as daemon:
        changed = daemon.call("Reload", ReloadParams(), ReloadReply).changed
    if terminal.json:
        terminal.object({"changed": changed})
        return Exit.OK
    if not changed:
        terminal.line("nothing changed")
    for key, value in changed.items():
        terminal.line(f"{safe(key)}: {safe(_in_words(value))}")
    return Exit.OK


def events(args: Namespace, terminal: Terminal) -> int:
    try:
        with connect(args) as daemon:
            if args.follow:
                # What is kept first, then what comes: nothing falls between, as ids only grow.
                last = 0
                for reply in daemon.stream("Events", EventsParams(after=0), EventsReply):
                    last = _say_event(terminal, reply) or last
                for reply in daemon.stream("Events", EventsParams(after=last, follow=True), EventsReply):
                    _say_event(terminal, reply)
                return Exit.OK
            for reply in daemon.stream("Events", EventsParams(), EventsReply):
                _say_event(terminal, reply)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    return Exit.OK


def _say_event(terminal: Terminal, reply: EventsReply) -> int | None:
    event = reply.event
    if event is None:
        return None
    if terminal.json:
        terminal.object(event)
    else:
        job = "" if event.job is None else f" job {event.job}"
        detail = " ".join(f"{key}={_in_words(value)}" for key, value in event.detail.items() if value is not None)
        what = terminal.paint(safe(event.type), "bold")
        terminal.line(f"{terminal.paint(local(event.at), 'dim')}{job} {what} {safe(detail)}".rstrip())
    terminal.out.flush()
    return event.id


def _in_words(value: Any) -> str:
    import msgspec

    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


_ACTORS = (
    Column("ACTOR", least=10),
    Column("STATE"),
    Column("RESTARTS", order=3, right=True),
    Column("CONTROL", right=True),
    Column("DATA", right=True),
    Column("OLDEST", order=2, right=True),
    Column("HANDLED", order=4, right=True),
    Column("DROPPED", order=1, right=True),
)


def actors(args: Namespace, terminal: Terminal) -> int:
    rows: list[list[str | Cell]] = []
    with connect(args) as daemon:
        for reply in daemon.stream("Actors", ActorsParams(), ActorsReply):
            actor = reply.actor
            if actor is None:
                continue
            if terminal.json:
                terminal.object(actor)
                continue
            rows.append(
                [
                    actor.name,
                    Cell(actor.state, STATE_STYLE.get(actor.state)),
                    str(actor.restarts),
                    str(actor.depth_control),
                    str(actor.depth_data),
                    duration(actor.oldest) if actor.oldest else "-",
                    str(actor.handled),
                    str(actor.dropped),
                ]
            )
    if rows:
        terminal.table(_ACTORS, rows)
    return Exit.OK


def version(args: Namespace, terminal: Terminal) -> int:
    """The command's version needs no daemon; the daemon's is told where one answers."""
    told: VersionReply | None = None
    why = ""
    try:
        with connect(args) as daemon:
            told = daemon.call("Version", VersionParams(), VersionReply, timeout=5.0)
    except CommandError as error:
        why = str(error)
    if terminal.json:
        terminal.object({"version": __version__, "daemon": None if told is None else told.version})
        return Exit.OK
    terminal.line(f"bsup {__version__}")
    if told is None:
        terminal.note(f"daemon: {why}", "dim")
    elif told.version != __version__:
        terminal.line(f"daemon {told.version}")
        terminal.warn("the daemon is of another version than this command; restart it to run the one that is installed")
    else:
        terminal.line(f"daemon {told.version} (Python {told.python})")
    return Exit.OK
