"""The control actor: listens on the Unix socket, finds out who connects, and gives each peer a ``Connection``.

May import the seams, ``model``, ``protocol`` and the other ``control_`` modules. The root actor runs it; ``app`` makes
it. It shares no state with other actors: what calls ask of them goes through their mailboxes. It needs no database, so
it can be the first to start and the last to stop, and answers while everything else is in trouble.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

import anyio
from anyio import to_thread

from supervisor.actors.control_calls import Calls
from supervisor.actors.control_connection import Connection, Limits
from supervisor.actors.control_parts import Parts
from supervisor.actors.control_peers import Credentials, Peer, Roles, by_number, credentials_of, identify
from supervisor.actors.control_socket import Listener, inherit, listen
from supervisor.framing import encode_frame, error_reply
from supervisor.model.errors import Busy
from supervisor.protocol import SocketView

log = logging.getLogger("supervisor.control")

_ACCEPT_AGAIN: Final = 0.5
"""Seconds until the next accept after one failed (no more file descriptors, say)."""
_IDENTIFY: Final = 5.0
"""Seconds that the user database is given to say who a uid is."""


FILES_KEPT = 32
"""Open files that no connection gets, or an eighth of the limit where that is less: without one no fence is written."""


def _most_files() -> int:
    """The kernel gives a new file the lowest number that is free: with this one or more, so many are open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit - min(FILES_KEPT, limit // 8)


class ControlActor:
    """``listen`` (or ``inherit``) first, then ``run`` until canceled.

    ``roles`` is asked at each new connection, so a reload takes effect for those that come after it. ``credentials``
    and ``identify`` are how a peer is known.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        roles: Callable[[], Roles],
        limits: Limits | None = None,
        credentials: Callable[[socket.socket], Credentials] = credentials_of,
        identify: Callable[[Credentials, Roles], Peer] = identify,
    ) -> None:
        self._roles = roles
        self._limits = limits or Limits()
        self._credentials = credentials
        self._identify = identify
        self._listener: Listener | None = None
        self._open: Counter[int] = Counter()
        self._refused: Counter[str] = Counter()
        self._answered = 0
        # Threads of its own: the pool that writes logs to disk may be busy.
        self._lookups = anyio.CapacityLimiter(8)
        self._handlers = Calls(parts, self._view).handlers()

    def listen(self, path: str, mode: int = 0o666) -> None:
        """Raises SocketTaken, InvalidInput or OSError."""
        self._listener = listen(path, mode)

    def serve(self, listener: Listener) -> None:
        """Takes a socket that is listened on already."""
        self._listener = listener

    def inherit(self, fd: int) -> None:
        """Takes a socket that the service manager listens on. Raises InvalidInput."""
        self._listener = inherit(fd)

    async def run(self) -> None:
        """Serves until it is canceled; then the socket is gone and every connection closed."""
        listener = self._listener
        if listener is None:
            raise RuntimeError("control: listen() comes before run()")
        try:
            async with anyio.create_task_group() as connections:
                while True:
                    sock = await self._accept(listener.socket)
                    if sock is not None:
                        self._admit(sock, connections)
        finally:
            listener.close()
            self._listener = None

    async def _accept(self, listening: socket.socket) -> socket.socket | None:
        try:
            sock, _ = await asyncio.get_running_loop().sock_accept(listening)
        except OSError as error:
            self._refused["accept failed"] += 1
            log.error("no connection can be taken: %s", error)
            await anyio.sleep(_ACCEPT_AGAIN)
            return None
        return sock

    def _admit(self, sock: socket.socket, connections: anyio.abc.TaskGroup) -> None:
        try:
            credentials = self._credentials(sock)
        except OSError:
            sock.close()
            return
        uid = credentials.uid
        if self._open[uid] >= self._limits.max_connections_per_uid:
            self._turn_away(sock, f"uid {uid} has {self._open[uid]} connections open already")
        elif self._open.total() >= self._limits.max_connections:
            self._turn_away(sock, f"{self._open.total()} connections are open already")
        elif sock.fileno() >= _most_files():
            self._turn_away(sock, f"the daemon has {sock.fileno()} files open, and keeps the last ones for its jobs")
        else:
            self._open[uid] += 1
            connections.start_soon(self._serve, sock, credentials)

    def _turn_away(self, sock: socket.socket, why: str) -> None:
        self._refused["too many connections"] += 1
        log.warning("a connection was refused: %s", why)
        with sock:
            try:
                sock.send(encode_frame(error_reply(Busy(f"{why}: close some, or try again later"))))
            except OSError:
                return

    async def _serve(self, sock: socket.socket, credentials: Credentials) -> None:
        try:
            peer = await self._know(credentials)
            await Connection(sock, peer, self._handlers, self._limits, self._refused, self._count).serve()
        except Exception:
            # One connection's fault is not the others'.
            self._refused["failed"] += 1
            log.exception("the connection of uid %d, pid %d failed", credentials.uid, credentials.pid)
        finally:
            sock.close()
            self._open[credentials.uid] -= 1
            if not self._open[credentials.uid]:
                del self._open[credentials.uid]

    async def _know(self, credentials: Credentials) -> Peer:
        """Asks the user database; one that hangs leaves root, the daemon's own user and plain uids their roles."""
        roles = self._roles()
        with anyio.move_on_after(_IDENTIFY):
            return await to_thread.run_sync(
                partial(self._identify, credentials, roles), abandon_on_cancel=True, limiter=self._lookups
            )
        log.warning("the user database did not answer: uid %d is known by its number only", credentials.uid)
        return by_number(credentials, roles)

    def _count(self) -> None:
        self._answered += 1

    def _view(self) -> SocketView:
        return SocketView(
            path=self._listener.path if self._listener else "",
            connections=self._open.total(),
            calls=self._answered,
            refused=dict(self._refused),
        )
