"""The shepherd's socket: lines of JSON from the daemon's uid, answers, and hints of what happened. Standard library
only.

Requests name what to ``do``; an ``id`` is given back in the answer. ``{"ok": true, …}`` or ``{"ok": false, "code",
"error"}``; events have no ``ok``. No client can hold anything up: nothing is sent that would block, hints to a slow
one are dropped, and one that doesn't read its answers is cut off. The files are the truth.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
import traceback
from collections.abc import Callable
from typing import Any

from supervisor.shepherd.files import Refusal, say, to_json
from supervisor.shepherd.host import Host
from supervisor.shepherd.loop import Loop, now
from supervisor.shepherd.spec import seconds

PROTOCOL = 2
SOCKET = "shepherd.sock"
_LONGEST_LINE = 16 << 20
_PIECE = 256 << 10
_MOST_HINTS = 256 << 10
_MOST_UNREAD = 4 << 20
_MOST_CONNECTIONS = 32
_FIRST_CLIENT = 5.0
_LOOK = 1.0
_ENDING_LOOK = 0.02
_PEER = struct.Struct("3i")

Reply = Callable[[dict[str, Any]], None]


class Server:
    """Listens in the working directory, which is the state directory: so a long path is no problem."""

    def __init__(self, loop: Loop, host: Host, *, peers: frozenset[int], linger: float) -> None:
        self._loop = loop
        self._host = host
        self._peers = peers
        self._linger = linger
        self._started_at = time.time()
        self._connections: set[_Connection] = set()
        # Whoever started this one may be slow to connect.
        self._quiet_since = now() + _FIRST_CLIENT
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind(SOCKET)
        os.chmod(SOCKET, 0o600)
        if host.policy.owner:
            os.chown(SOCKET, *host.policy.owner)
        self._socket.listen(64)
        loop.watch(self._socket.fileno(), self._on_connection)
        self._look_again()

    def announce(self, event: str, path: str) -> None:
        """A hint to every connection."""
        line = _encode({"event": event, "dir": path})
        for connection in list(self._connections):
            connection.hint(line)

    def end(self) -> None:
        """Ends all jobs, as losses, and leaves as soon as they are dead."""
        self._host.end()
        self.consider_leaving()

    def consider_leaving(self) -> None:
        """With nothing running and nobody connected for a while there is no need to stay."""
        if self._host.ending and self._host.is_idle:
            self._loop.running = False
        elif not self._host.is_idle or self._connections:
            self._quiet_since = now()
        elif now() - self._quiet_since >= self._linger:
            self._loop.running = False
        self._look_again()

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET)
        for connection in list(self._connections):
            connection.close()
        self._socket.close()

    def _look_again(self) -> None:
        self._loop.at(now() + (_ENDING_LOOK if self._host.ending else min(self._linger, _LOOK)), self.consider_leaving)

    def _on_connection(self) -> None:
        try:
            link, _ = self._socket.accept()
        except OSError:
            return
        _, uid, _ = _PEER.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid not in self._peers or len(self._connections) >= _MOST_CONNECTIONS:
            say(f"a connection of uid {uid} is refused")
            link.close()
            return
        connection = _Connection(self._loop, link, self._on_request, self._on_gone)
        self._connections.add(connection)
        # From this line on the client misses no hint: what happened before it is in the files.
        connection.hint(_encode({"event": "hello", "protocol": PROTOCOL, **self._uids()}))

    def _on_gone(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._quiet_since = now()

    def _on_request(self, line: bytes, reply: Reply) -> None:
        answer_id: object = None
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise Refusal("spec", "a request is an object")
            answer_id = request.get("id")
            answer = self._do(request, lambda later: reply({"id": answer_id, **later}))
        except Refusal as refusal:
            answer = {"ok": False, "code": refusal.code, "error": str(refusal)}
        except (ValueError, RecursionError) as error:
            answer = {"ok": False, "code": "spec", "error": f"not a line of JSON: {error}"}
        except OSError as error:
            answer = {"ok": False, "code": "failed", "error": f"{error.filename or 'the machine'}: {error.strerror}"}
        except Exception:
            # A bug; the client is to hear of it, and the jobs are to go on.
            traceback.print_exc()
            answer = {"ok": False, "code": "failed", "error": "the shepherd failed; see shepherd.log"}
        if answer is not None:
            reply({"id": answer_id, **answer})

    def _do(self, request: dict[str, Any], later: Reply) -> dict[str, Any] | None:
        """The answer, or None if it comes later (or did already)."""

        def finished(problem: str | None) -> None:
            later({"ok": True} if problem is None else {"ok": False, "code": "failed", "error": problem})

        match request.get("do"):
            case "start":
                self._host.start(request.get("dir"), later)
                return None
            case "stop":
                grace = seconds(request.get("grace"), "grace") or 0.0
                return {"ok": True, "live": self._host.stop(request.get("dir"), grace, request.get("kill") is True)}
            case "prepare":
                path, files = request.get("dir"), request.get("files")
                self._host.trees.prepare(path, files, request.get("workspace"), request.get("uid"))
                return {"ok": True}
            case "workspace":
                self._host.trees.make_workspace(request.get("path"), request.get("uid"))
                return {"ok": True}
            case "remove":
                self._host.trees.remove(request.get("path"), finished)
                return None
            case "own":
                self._host.trees.own(request.get("path"), request.get("uid"), finished)
                return None
            case "give_back":
                self._host.trees.give_back(request.get("path"), finished)
                return None
            case "uids":
                self._host.set_uids(request.get("uid_base"), request.get("uid_count"))
                return {"ok": True}
            case "status":
                return {"ok": True, **self._status()}
            case other:
                raise Refusal("spec", f"do: {other!r} is not a request")

    def _uids(self) -> dict[str, int]:
        """As the config says; ``uids_from`` is where they really begin."""
        policy = self._host.policy
        return {
            "uid_base": policy.uid_base,
            "uid_count": policy.uid_count,
            "uids_from": policy.real(policy.uid_base),
        }

    def _status(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "pid": os.getpid(),
            "guardian": self._host.bond.guardian,
            "boot_id": self._host.boot_id,
            "started_at": self._started_at,
            **self._uids(),
            "fence_at": self._host.fence.at,
            "live": self._host.live(),
            "connections": len(self._connections),
            "isolation": self._host.isolation(),
        }


class _Connection:
    """A client: a bounded buffer each way."""

    def __init__(
        self,
        loop: Loop,
        link: socket.socket,
        on_request: Callable[[bytes, Reply], None],
        on_close: Callable[[_Connection], None],
    ) -> None:
        self._loop = loop
        self._link = link
        self._on_request = on_request
        self._on_close = on_close
        self._in = bytearray()
        self._seen = 0  # no line ends before this
        self._out = bytearray()
        self._open = True
        self._writes = False  # whether it waits until it can
        link.setblocking(False)
        loop.watch(link.fileno(), self._on_ready)

    def hint(self, line: bytes) -> None:
        if len(self._out) < _MOST_HINTS:
            self._send(line)

    def close(self) -> None:
        if self._open:
            with contextlib.suppress(OSError):
                self._link.send(self._out)
            self._open = False
            self._loop.unwatch(self._link.fileno())
            self._link.close()
            self._on_close(self)

    def _on_ready(self) -> None:
        self._flush()
        if not self._open:
            return
        try:
            data = self._link.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._seen = len(self._in)
        self._in += data
        while (line := self._next_line()) is not None:
            self._on_request(line, self._reply)
        if len(self._in) > _LONGEST_LINE:
            self._reply({"ok": False, "code": "spec", "error": f"a request is {_LONGEST_LINE} bytes at most"})
            self.close()

    def _next_line(self) -> bytes | None:
        end = self._in.find(b"\n", self._seen)
        if end < 0 or not self._open:
            return None
        line = bytes(self._in[:end])
        del self._in[: end + 1]
        self._seen = 0
        return line

    def _reply(self, answer: dict[str, Any]) -> None:
        if len(self._out) > _MOST_UNREAD:
            say("a client that doesn't read its answers is cut off")
            self.close()
        self._send(_encode(answer))

    def _send(self, line: bytes) -> None:
        if self._open:
            if not self._out:
                # With all that is said in this pass: a wake-up of the client's less for each.
                self._loop.soon(self._flush)
            self._out += line

    def _flush(self) -> None:
        while self._open and self._out:
            try:
                sent = self._link.send(self._out)
            except BlockingIOError:
                break
            except OSError:
                self.close()
                return
            del self._out[:sent]
        if self._open and self._writes != bool(self._out):
            self._writes = bool(self._out)
            self._loop.watch(self._link.fileno(), self._on_ready, write=self._writes)


def _encode(value: dict[str, Any]) -> bytes:
    return to_json(value).encode() + b"\n"
