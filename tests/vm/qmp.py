"""The control socket of qemu (QMP), as much of it as ``machine`` needs. Synchronous; every call has a deadline."""

from __future__ import annotations

import json
import socket
from typing import Any


class Qmp:
    """Raises OSError where qemu is gone or silent."""

    def __init__(self, connection: socket.socket, deadline: float = 20.0) -> None:
        self._socket = connection
        self._socket.settimeout(deadline)
        self._lines = self._socket.makefile("rb")
        self._next()
        self.ask("qmp_capabilities")

    def ask(self, what: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": what, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._next()
            if "error" in answer:
                raise AssertionError(f"qemu refused {what}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise ConnectionError("qemu is gone")
        return dict(json.loads(line))

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
