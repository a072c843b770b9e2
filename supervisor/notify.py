"""Tells the service manager how the daemon is: the ``sd_notify`` protocol, without libsystemd.

Inert unless ``NOTIFY_SOCKET`` is set, so the daemon calls it always and asks nobody where it runs. It never blocks and
never raises: a service manager that does not listen must not harm jobs. May import the standard library only; ``app``
makes one, the root actor tells it. Keeps the promise ``ports.Notifier``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping


class SystemdNotifier:
    """Sends state to the socket that ``NOTIFY_SOCKET`` names (a path, or ``@name`` for an abstract one)."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        name = environ.get("NOTIFY_SOCKET", "")
        # Anything else (vsock:…, a relative path) is for containers' managers, which speak it to their own init only.
        self._address = "\0" + name[1:] if name.startswith("@") else name if name.startswith("/") else None
        self.watchdog = _watchdog_seconds(environ)

    @property
    def enabled(self) -> bool:
        return self._address is not None

    def ready(self) -> None:
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send("STATUS=" + text.replace("\n", " "))

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def reloading(self) -> None:
        """Begins a reload; ``ready`` ends it. ``Type=notify-reload`` wants the monotonic time of its beginning."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def alive(self) -> None:
        """Feeds the watchdog; call it at least twice per ``watchdog`` seconds."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto(message.encode(), self._address)


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """The watchdog's term, if it is meant for this process (``WATCHDOG_PID``) and not for the one that started it."""
    usec = environ.get("WATCHDOG_USEC", "")
    pid = environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or usec == "0" or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1_000_000
