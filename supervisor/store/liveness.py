"""What makes a connection fail soon when the other end is gone without a word: keepalive and user timeout of TCP.

A cable that was pulled, a firewall that forgot: nothing is refused and nothing answers. A statement's own timeout may
be far longer, as one that waits for a lock is no sign of anything; the kernel at the other end, though, acknowledges
whatever that waits for. Both ends are told, the server through settings that any client may make: else it would keep
the session, and the rows that it had locked, for hours. The words are libpq's, and a DSN may say otherwise.

Used by ``connection``. No I/O but on the socket's options.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import msgspec


class Liveness(msgspec.Struct, frozen=True):
    """Whole seconds; ``user_timeout`` milliseconds. 0 leaves it as the machine has it.

    ``user_timeout``: how long what was sent may stay without an acknowledgement, and (with probes) silence may last.
    """

    keepalives: bool = True
    idle: int = 3
    interval: int = 1
    count: int = 3
    user_timeout: int = 5_000

    def set_on(self, transport: Any) -> None:
        """On this end. Nothing to do for a Unix socket, whose other end can't vanish."""
        found = transport.get_extra_info("socket")
        if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
            return
        with socket.socket(fileno=os.dup(found.fileno())) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(self.keepalives))
            for option, value in (
                ("TCP_KEEPIDLE", self.idle),
                ("TCP_KEEPINTVL", self.interval),
                ("TCP_KEEPCNT", self.count),
                ("TCP_USER_TIMEOUT", self.user_timeout),
            ):
                if value and hasattr(socket, option):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def settings(self) -> dict[str, str]:
        """For the server's end: twice as patient, so that it is the client who gives up first and says why."""
        if not self.keepalives:
            return {}
        told = {
            "tcp_keepalives_idle": 2 * self.idle,
            "tcp_keepalives_interval": 2 * self.interval,
            "tcp_keepalives_count": self.count,
            "tcp_user_timeout": 2 * self.user_timeout,
        }
        return {name: str(value) for name, value in told.items() if value}


WORDS: Mapping[str, tuple[str, int]] = {
    "keepalives_idle": ("idle", 16_000),
    "keepalives_interval": ("interval", 16_000),
    "keepalives_count": ("count", 127),
    "tcp_user_timeout": ("user_timeout", 1_000_000_000),
}
"""The DSN's words, the fields that they set, and the most that Linux takes on both ends."""


def liveness(options: Mapping[str, str]) -> Liveness:
    """What a DSN's options ask for, which ``dsn.parse`` has checked; the rest as it is here."""
    chosen = {field: min(int(options[word]), most) for word, (field, most) in WORDS.items() if word in options}
    return Liveness(keepalives=options.get("keepalives", "1") != "0", **chosen)
