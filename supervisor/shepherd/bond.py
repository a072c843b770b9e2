"""What a shepherd has its guardian hold, so that the next one can go on with it. Standard library only; ``guardian``
has one side, ``__main__``, ``host`` and ``step`` the other.

For each step that is not closed: the reading ends of its FIFOs. What a job wrote and nobody read yet lives as long as
somebody holds the FIFO, and when a shepherd is killed that may be nobody else. They are sent before the step starts,
and what was sent arrives, whatever becomes of the sender. Everything else is on disk.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from supervisor.shepherd.loop import Loop

Names = tuple[str, str]
"""Run and step."""
_MOST = 100
"""Steps in a message: the kernel takes 253 descriptors."""
_LARGEST = 1 << 16
_CLOSED = -1


@dataclass
class Estate:
    """``fifos``: out and err of each step, -1 where it is closed. ``uids``: the range that the daemon has set."""

    fifos: dict[Names, tuple[int, int]] = field(default_factory=dict)
    uids: tuple[int, int] | None = None

    def drop(self, names: Names) -> None:
        for fd in self.fifos.pop(names, ()):
            if fd != _CLOSED:
                os.close(fd)


def pair() -> tuple[socket.socket, socket.socket]:
    """Whole messages, in order; an end of it is seen."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


class Bond:
    """The shepherd's side. ``estate``: what the one before left; ``guardian``: its pid."""

    def __init__(self, link: socket.socket, guardian: int, estate: Estate) -> None:
        self.guardian = guardian
        self.estate = estate
        self.is_lost = False
        self._link = link
        self._loop: Loop | None = None
        self._on_news: Callable[[], None] = lambda: None
        self._pending: dict[Names, tuple[int, int] | None] = {}
        self._is_due = False

    def listen(self, loop: Loop, on_news: Callable[[], None]) -> None:
        """``on_news`` is called when the guardian has noted an end, and when it is gone (``is_lost``)."""
        self._loop, self._on_news = loop, on_news
        loop.watch(self._link.fileno(), self._on_ready)

    def hold(self, names: Names, fifos: tuple[int, int]) -> None:
        """Sent at the next ``flush``: before the step starts."""
        self._pending[names] = fifos

    def drop(self, names: Names) -> None:
        """Sent soon."""
        if self._pending.pop(names, None) is None:
            self._pending[names] = None
            if not self._is_due and self._loop is not None:
                self._is_due = True
                self._loop.soon(self.flush)

    def flush(self) -> None:
        """Never blocks: what a guardian that is slow doesn't take is sent with the next."""
        self._is_due = False
        while self._pending:
            some = list(self._pending.items())[:_MOST]
            fds = [fd for _, fifos in some if fifos is not None for fd in fifos]
            if not self._send([(*names, fifos is not None) for names, fifos in some], fds):
                return
            for names, _ in some:
                del self._pending[names]

    def serve(self) -> None:
        """It has taken up what there was, and watches the fence from here on."""
        self._send("serves", [])

    def set_uids(self, base: int, count: int) -> None:
        self._send((base, count), [])

    def close(self) -> None:
        if self._loop is not None:
            self._loop.unwatch(self._link.fileno())
        self._link.close()

    def _send(self, message: Any, fds: list[int]) -> bool:
        try:
            socket.send_fds(self._link, [marshal.dumps(message)], fds)
        except BlockingIOError:
            return False
        except OSError:
            return True  # it is gone; ``_on_ready`` tells
        return True

    def _on_ready(self) -> None:
        try:
            said = self._link.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            self.is_lost = True
            if self._loop is not None:
                self._loop.unwatch(self._link.fileno())
        self._on_news()


class Holder:
    """The guardian's side of a bond with one shepherd. ``serves``: that one has said so."""

    def __init__(self, link: socket.socket, estate: Estate) -> None:
        self.serves = False
        self._link = link
        self._estate = estate

    def fileno(self) -> int:
        return self._link.fileno()

    def read(self) -> bool:
        """Takes what was sent; False at its end."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._link, _LARGEST, 2 * _MOST)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._take(marshal.loads(data), fds)

    def poke(self) -> None:
        """An end was noted."""
        with contextlib.suppress(OSError):
            self._link.send(b"noted")

    def close(self) -> None:
        self._link.close()

    def _take(self, message: Any, fds: list[int]) -> None:
        if message == "serves":
            self.serves = True
        elif isinstance(message, tuple):
            self._estate.uids = message
        else:
            for run, index, is_held in message:
                self._estate.drop((run, index))
                if is_held and len(fds) >= 2:  # fewer, if this process may open no more
                    self._estate.fifos[run, index] = fds[0], fds[1]
                    fds = fds[2:]
