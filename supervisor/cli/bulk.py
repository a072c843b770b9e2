"""``stop``, ``retry`` and ``delete``: on jobs named by id, or chosen by the filters of ``ps`` after a preview."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence

import msgspec

from supervisor.cli.configuration import connect
from supervisor.cli.connection import Connection
from supervisor.cli.exits import CommandError, Exit
from supervisor.cli.jobs import filters, job_row
from supervisor.cli.parser import UsageError
from supervisor.cli.table import Column, render
from supervisor.cli.terminal import Terminal
from supervisor.cli.text import plural
from supervisor.model.job import FINAL_STATES, State
from supervisor.protocol import (
    DeleteParams,
    DeleteReply,
    JobReply,
    JobView,
    ListParams,
    ListReply,
    RetryParams,
    StopParams,
    StopReply,
)

AT_ONCE = 10_000
"""Ids in one call at most; the protocol's own limit."""
PREVIEW = 20
"""Jobs shown by name before an answer is asked for."""

_LIVE = frozenset(State) - FINAL_STATES
_RETRIABLE = frozenset({State.FAILED, State.CANCELED})
_COLUMNS = (
    Column("ID", right=True),
    Column("NAME", least=8),
    Column("KIND", order=2),
    Column("STATE"),
    Column("AGE", order=1, right=True),
)

_DID = {
    "canceled": "canceled: nothing of it runs",
    "stopping": "stopping",
    "unavailable": "not stopped: the database is away, and it does not run on this host",
}


def stop(args: Namespace, terminal: Terminal) -> int:
    with connect(args) as daemon:
        ids = _chosen(args, terminal, daemon, "stop", _LIVE)
        hit = failed = 0
        for some in _batches(ids):
            for reply in daemon.stream("Stop", StopParams(ids=some, grace=args.grace, kill=args.kill), StopReply):
                if reply.id is None or reply.did is None:
                    continue
                hit += reply.did in ("canceled", "stopping") and not reply.is_over
                failed += reply.did == "unavailable"
                _say_stop(terminal, reply.id, reply.did, reply)
    if failed:
        return Exit.ERROR
    return Exit.OK if hit else Exit.NOTHING


def _say_stop(terminal: Terminal, job: int, did: str, reply: StopReply) -> None:
    if terminal.json:
        terminal.object({"id": job, "did": did, "is_over": reply.is_over, "recorded": reply.recorded})
        return
    words = f"was over already: {terminal.state(did)}" if reply.is_over else _DID.get(did, did)
    late = "" if reply.recorded or did == "unavailable" else " (the database is away: recorded when it is back)"
    terminal.line(f"{job} {words}{late}")


def retry(args: Namespace, terminal: Terminal) -> int:
    with connect(args) as daemon:
        for some in _batches(_chosen(args, terminal, daemon, "retry", _RETRIABLE)):
            for reply in daemon.stream("Retry", RetryParams(ids=some), JobReply):
                if reply.job is None:
                    continue
                if terminal.json:
                    terminal.object(reply.job)
                else:
                    terminal.line(f"{reply.job.id} {terminal.state(reply.job.state)}")
    return Exit.OK


def delete(args: Namespace, terminal: Terminal) -> int:
    deleted = 0
    with connect(args) as daemon:
        for some in _batches(_chosen(args, terminal, daemon, "delete", FINAL_STATES)):
            deleted += daemon.call("Delete", DeleteParams(ids=some), DeleteReply).deleted
    if terminal.json:
        terminal.object({"deleted": deleted})
    else:
        terminal.line(f"deleted {plural(deleted, 'job')}")
    return Exit.OK


def _batches(ids: Sequence[int]) -> Iterator[list[int]]:
    for at in range(0, len(ids), AT_ONCE):
        yield list(ids[at : at + AT_ONCE])


def _chosen(args: Namespace, terminal: Terminal, daemon: Connection, verb: str, fitting: frozenset[State]) -> list[int]:
    """The jobs that the command means. Raises UsageError, and CommandError where there is none or the answer is no."""
    by_filter = bool(args.state or args.kind or args.label or args.all or args.limit)
    if args.ids and by_filter:
        raise UsageError("ids and filters were both given", "name jobs by id, or choose them by filters")
    if args.ids:
        return list(dict.fromkeys(args.ids))
    if not by_filter:
        raise UsageError(f"which jobs to {verb}?", "name ids, or choose by --state, --kind, --label or --all")
    found = _matching(daemon, filters(args), fitting)
    if not found:
        states = ", ".join(state for state in State if state in fitting)
        raise CommandError(
            f"no job to {verb} matches", f"filters of `{verb}` mean jobs that are {states}", Exit.NOTHING
        )
    if not args.yes:
        _preview(terminal, verb, found)
    return [job.id for job in found]


def _matching(daemon: Connection, params: ListParams, fitting: frozenset[State]) -> list[JobView]:
    # The states that the verb can do something with, unless the user named fewer; the limit counts those alone.
    states = [state for state in State if state in fitting and (not params.states or state in params.states)]
    if not states:
        return []
    asked = msgspec.structs.replace(params, states=states, all=False, brief=True)
    replies = daemon.stream("List", asked, ListReply)
    return [reply.job for reply in replies if reply.job is not None and reply.job.state in fitting]


def _preview(terminal: Terminal, verb: str, found: Sequence[JobView]) -> None:
    rows = [job_row(job)[: len(_COLUMNS)] for job in found[:PREVIEW]]
    for line in render(_COLUMNS, rows, terminal.width, lambda text, style: text):
        terminal.note(line)
    if len(found) > PREVIEW:
        terminal.note(f"… and {len(found) - PREVIEW} more")
    what = f"{verb} {'this job' if len(found) == 1 else f'these {len(found)} jobs'}"
    if not terminal.can_ask:
        raise UsageError(f"would {what}; nothing was done", "add --yes to do it")
    if not terminal.ask(f"{what[:1].upper()}{what[1:]}?"):
        raise CommandError("nothing was done", "", Exit.ERROR)
